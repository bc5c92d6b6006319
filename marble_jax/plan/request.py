"""What `marble-jax plan` is asked for."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
      devices: how many; 0 for those of the topology.
      topology: slice to compile for, such as `v5e:4x4`; empty for none.
      chip: what the devices are; empty for that of the topology, or unknown.
      utilisation: share of the peak at which products are assumed to run, recomputation included.
      file: where the record goes as JSON; empty for nowhere.
      programs: names of the programs to compile; empty for all.
    """

    devices: int = 0
    topology: str = ""
    chip: str = ""
    utilisation: float = 0.4
    file: str = ""
    programs: tuple[str, ...] = ()
