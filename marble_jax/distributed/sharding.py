"""Sharding of weights: which axis of which parameter is split over which axis of the mesh.

Every parameter has a tuple of logical axis names by a rule on its path, and a table says over which axis of the mesh a
name is split. Products that widen a layer are split along their outputs and those that narrow it along their inputs
(over `tensor`, as in Megatron), so that one sum over devices a layer is enough; the model's width is split over `fsdp`
and gathered layer by layer where it is used. A parameter that no rule names is an error, not replicated in silence.

The rules of a network are in its own package (`sharding_rules.py`), as a `ShardingRules`; this module knows none.

Source: Shoeybi et al. 2019 (arXiv 1909.08053) for `tensor`; Rajbhandari et al. 2020 (arXiv 1910.02054, stage 3) for
`fsdp`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import traverse_util
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from marble_jax.distributed import device_mesh
from marble_jax.errors import InputError

Path = tuple[str, ...]
Rule = tuple[str, tuple[str, ...]]
"""Pattern of a parameter's whole path, joined with `/`, and the logical axes of that parameter."""
MeshAxes = tuple[tuple[str, str | None], ...]

SHARDED_AXES: MeshAxes = (
    ("embed", "fsdp"),  # the model's width
    ("heads", "tensor"),  # heads x their width, never split within a head
    ("mlp", "tensor"),  # hidden units
    ("vocab", "tensor"),
    ("condition", "tensor"),  # the conditioning vector where modulation is made of it
    ("modulation", "fsdp"),  # shifts, scales and gates
    ("layers", None),  # of a scanned run: every device walks through all of them
    ("vector", None),  # biases and scales of the model's width
    ("features", None),  # of what comes into a network and goes out of it
    ("positions", None),
    ("stack", None),  # an axis of length 1
    ("parts", None),  # shift, scale and gate, each of the model's width
    ("time", None),  # of a convolution's window
    ("height", None),
    ("width", None),
    ("inputs", None),  # channels
    ("outputs", None),
    ("rank", None),  # of an adapter
)
"""Logical axis -> axis of the mesh, for networks whose weights are large."""
REPLICATED_AXES: MeshAxes = tuple((name, None) for name, _ in SHARDED_AXES)
"""Logical axis -> axis of the mesh, for networks that every device holds whole."""
HEAD_WIDTH = 64
"""Width of a head of every published network that is sharded."""
SCANNED_PREFIX = "blocks_"
"""Beginning of the name of a run of blocks that is scanned: its parameters have `layers` in front of their axes."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Bytes of a network's parameters.

    Attributes:
      total: of all of them, once.
      device: on one device.
      unsplit: of parameters that a rule would split and that no device count here divides, whole on every device.
    """

    total: int
    device: int
    unsplit: int


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """How the parameters of one kind of network are split over a mesh.

    Attributes:
      network: its name in errors.
      rules: the first one whose pattern matches a parameter's whole path counts.
      axes: `SHARDED_AXES` or `REPLICATED_AXES`.
      head_width: width of a head, so that no head is split.
    """

    network: str
    rules: tuple[Rule, ...]
    axes: MeshAxes
    head_width: int = HEAD_WIDTH

    def rule_of(self, path: Path) -> Rule:
        """Returns the rule of a parameter.

        Raises:
          InputError: no rule names the parameter.
        """
        rule = _first_match(self.rules, "/".join(path))
        if rule is None:
            raise InputError(
                f"parameter {'/'.join(path)}: expected a rule of {self.network} sharding for it; "
                "received none"
            )
        return rule

    def logical_axes(self, path: Path, rank: int) -> tuple[str, ...]:
        """Returns the names of a parameter's axes, or of an adapter's leaf `a` [in, rank] or `b` [rank, out].

        Raises:
          InputError: no rule names the parameter, or the rule has another number of axes.
        """
        if path[-1] in ("a", "b"):
            names = self._factor_axes(path)
        else:
            _, names = self.rule_of(path)
        if path[0].startswith(SCANNED_PREFIX):
            names = ("layers", *names)
        if len(names) != rank:
            expected = ", ".join(names) or "none"
            raise InputError(
                f"parameter {'/'.join(path)}: expected {len(names)} axes ({expected}); received {rank}"
            )
        return names

    def spec_of(
        self, mesh: Mesh | AbstractMesh, path: Path, shape: tuple[int, ...]
    ) -> PartitionSpec:
        """Returns the axes of the mesh that a parameter is split over; an axis that does not divide is not split.

        Args:
          mesh: the devices.
          path: of the parameter.
          shape: of the parameter.

        Raises:
          InputError: as `logical_axes`.
        """
        names = self.logical_axes(path, len(shape))
        wanted = self._wanted_axes(names)
        spec: list[str | None] = []
        for name, mesh_axis, length in zip(names, wanted, shape, strict=True):
            fits = _divides(mesh, mesh_axis, self._num_units(name, length))
            spec.append(mesh_axis if fits else None)
        return PartitionSpec(*spec)

    def sharding_of(
        self, mesh: Mesh | AbstractMesh, path: Path, shape: tuple[int, ...]
    ) -> NamedSharding:
        """Returns `spec_of` as a sharding; arguments and errors as there."""
        return NamedSharding(mesh, self.spec_of(mesh, path, shape))

    def shardings(self, mesh: Mesh | AbstractMesh, shapes: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the shardings of all parameters, as a tree.

        Args:
          mesh: the devices.
          shapes: tree of arrays or of anything else with a shape.

        Raises:
          InputError: as `logical_axes`.
        """
        by_path = {}
        for path, leaf in traverse_util.flatten_dict(dict(shapes)).items():
            by_path[path] = self.sharding_of(mesh, path, tuple(leaf.shape))
        return traverse_util.unflatten_dict(by_path)

    def layout(self, mesh: Mesh | AbstractMesh, shapes: Mapping[str, Any]) -> Layout:
        """Returns the bytes of all parameters, together and on a device; arguments and errors as `shardings`."""
        total = device = unsplit = 0
        for path, leaf in traverse_util.flatten_dict(dict(shapes)).items():
            num_bytes = leaf.size * leaf.dtype.itemsize
            spec = self.spec_of(mesh, path, tuple(leaf.shape))
            num_parts = math.prod(_num_devices(mesh, axis) for axis in spec)
            total += num_bytes
            device += num_bytes // num_parts
            if num_parts == 1 and self._would_split(mesh, path, len(leaf.shape)):
                unsplit += num_bytes
        return Layout(total, device, unsplit)

    def describe(self, mesh: Mesh | AbstractMesh, shapes: Mapping[str, Any]) -> str:
        """Returns `layout` in words; arguments and errors as `shardings`."""
        layout = self.layout(mesh, shapes)
        sizes = " x ".join(
            f"{axis} {mesh.shape[axis]}" for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1
        )
        if not sizes:
            return "replicated"
        text = f"sharded over {sizes}: {layout.device / 1e9:.2f} of {layout.total / 1e9:.2f} GB a device"
        if layout.unsplit:
            megabytes = layout.unsplit / 1e6
            text += f", {megabytes:.0f} MB of it on every device as no axis divides"
        return text

    def gather(self, mesh: Mesh) -> Gather | None:
        """Returns what puts a block's weights together on a mesh; None where every device holds them whole."""
        return Gather(mesh, self) if mesh.shape["fsdp"] > 1 else None

    def place_over_host(self) -> Callable[[Path, Any], jax.Array] | None:
        """Returns what splits weights over the devices of this host, where every host runs the network for itself.

        Text encoders are the larger part of a model (one alone can take 9.5 GB), and a device that held them whole
        would have little room for anything else.

        Returns:
          (path, leaf) -> array; None where the host has one device.
        """
        mesh = device_mesh.host_mesh()
        if mesh.size == 1:
            return None

        def place(path: Path, leaf: Any) -> jax.Array:
            return device_mesh.read_sharded(self.sharding_of(mesh, path, leaf.shape), leaf)

        return place

    def _factor_axes(self, path: Path) -> tuple[str, ...]:
        """Axes of a factor of an adapter, which has the outer ones of the kernel that it adds to."""
        _, (inner, outer) = self.rule_of((*path[:-1], "kernel"))
        return (inner, "rank") if path[-1] == "a" else ("rank", outer)

    def _wanted_axes(self, names: tuple[str, ...]) -> tuple[str | None, ...]:
        """Axes of the mesh by the table alone, whatever the lengths; Flax uses each of them once a parameter."""
        # Flax's signature allows None, which it returns for no names only.
        return tuple(nn.logical_to_mesh_axes(names, self.axes) or ())

    def _num_units(self, name: str, length: int) -> int:
        # Heads are dealt out whole: a head on two devices would split the products of its softmax.
        if name == "heads" and length % self.head_width == 0:
            return length // self.head_width
        return length

    def _would_split(self, mesh: Mesh | AbstractMesh, path: Path, rank: int) -> bool:
        wanted = self._wanted_axes(self.logical_axes(path, rank))
        return any(_num_devices(mesh, axis) > 1 for axis in wanted)


@dataclasses.dataclass(frozen=True)
class Gather:
    """Puts weights of a network together over `fsdp`, inside a compiled function.

    Left to itself the compiler may split the products instead, and then exchanges activations, which are larger.

    Attributes:
      mesh: the devices.
      rules: of the network.
    """

    mesh: Mesh
    rules: ShardingRules

    def __call__(self, path: Path, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns parameters with every axis whole that `fsdp` splits.

        Args:
          path: in front of the parameters' own paths; one block of a scanned run is `block_0`.
          params: the parameters below it.
        """
        by_path = traverse_util.flatten_dict(dict(params))
        for name, leaf in by_path.items():
            spec = self.rules.spec_of(self.mesh, (*path, *name), leaf.shape)
            if "fsdp" in spec:
                gathered = NamedSharding(self.mesh, _without_fsdp(spec))
                by_path[name] = jax.lax.with_sharding_constraint(leaf, gathered)
        return traverse_util.unflatten_dict(by_path)


@functools.cache
def _first_match(rules: tuple[Rule, ...], name: str) -> Rule | None:
    for rule in rules:
        if re.fullmatch(rule[0], name):
            return rule
    return None


def _without_fsdp(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec))


def _divides(mesh: Mesh | AbstractMesh, axis: str | None, units: int) -> bool:
    num_devices = _num_devices(mesh, axis)
    return num_devices > 1 and units % num_devices == 0


def _num_devices(mesh: Mesh | AbstractMesh, axis: str | None) -> int:
    return 1 if axis is None else mesh.shape[axis]
