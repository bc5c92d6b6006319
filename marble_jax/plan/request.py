"""What `marble-jax plan` is asked for."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
      devices: number of devices; 0 for that of the topology, or one.
      topology: devices to compile for, such as `v5e:4x4` or `h100:8`; empty for none.
      chip: kind of the devices, such as `v5e`; empty for that of the topology, or unknown.
      utilisation: share of the peak, in (0, 1], at which products are assumed to run, recomputation included.
      file: JSON file that the record goes to; empty for none.
      programs: names of the programs to compile; empty for those of a run.
      roofline: whether to reckon the least time of each compiled program.
    """

    devices: int = 0
    topology: str = ""
    chip: str = ""
    utilisation: float = 0.4
    file: str = ""
    programs: tuple[str, ...] = ()
    roofline: bool = False
