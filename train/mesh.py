"""Device meshes and sharding rules: a regular expression on a path says how a leaf is split.

Axis names used by steppe: ``data`` and ``fsdp`` split the batch, every name that the rules
use (``fsdp``, ``model``, ...) splits parameters. Axes are of type Auto: shardings are hints
that the compiler propagates, so model code is the same on one device and on a pod.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from steppe.models.layout import DATA_AXES
from steppe.models.tree import path_of
from steppe.train.types import TrainState

Axes = tuple[str | tuple[str, ...] | None, ...]
Rules = Sequence[tuple[str, Sequence[str | tuple[str, ...] | None]]]

REPLICATE: Rules = ((".*", ()),)


def plan(
    shape: Mapping[str, int],
    rules: Rules | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> MeshPlan:
    """Builds a mesh over the devices and keeps the sharding rules with it.

    Args:
      shape: axis name -> size, such as ``{"data": 4, "model": 2}``; one size may be -1 and
        then takes what is left. The outermost axis comes first.
      rules: pairs (regular expression matching a whole parameter path, one mesh axis name or
        None for each dimension); ``()`` replicates. The first match counts. Axes that the
        mesh does not have are dropped. None replicates every parameter.
      devices: default all devices of all processes.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or an axis would do
        nothing because neither the batch nor any rule uses it.
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = dict(shape)
    if not sizes or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh sizes must be >= 1, or -1 for what is left, got {sizes}")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"only one mesh axis may be -1, got {sizes}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and len(found) % fixed == 0:
        sizes[free[0]] = len(found) // fixed
    elif free or fixed != len(found):
        raise ValueError(
            f"mesh {dict(shape)} needs {'a multiple of ' if free else ''}{fixed} devices, but "
            f"there are {len(found)}: choose sizes whose product is {len(found)}"
        )
    chosen = tuple(
        (pattern, tuple(tuple(a) if isinstance(a, list) else a for a in axes))
        for pattern, axes in (REPLICATE if rules is None else rules)
    )
    named = {name for _, axes in chosen for axis in axes for name in _names(axis)}
    for name, size in sizes.items():
        if size > 1 and name not in DATA_AXES and name not in named:
            raise ValueError(
                f"mesh axis {name!r} of size {size} is used by no rule and does not split the "
                f"batch; the batch is split by {DATA_AXES}, the rules name {sorted(named)}"
            )
    mesh = jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=found,
    )
    return MeshPlan(mesh, chosen)


@dataclass(frozen=True)
class MeshPlan:
    """A mesh and the rules that split a tree of parameters over it; see :func:`plan`."""

    mesh: Mesh
    rules: tuple[tuple[str, Axes], ...]

    @property
    def replicated(self) -> NamedSharding:
        """The sharding that puts a full copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def data_axes(self) -> tuple[str, ...]:
        """The axes of this mesh that split the batch."""
        return tuple(axis for axis in DATA_AXES if axis in self.mesh.shape)

    @property
    def data_size(self) -> int:
        """Into how many parts the batch is split."""
        return math.prod(self.mesh.shape[axis] for axis in self.data_axes)

    def settle(self, tree: Any) -> Any:
        """Waits for ``tree`` where that is needed, and returns it: see :func:`settle`."""
        return settle(tree, self.mesh.devices.flat)

    def rows(self, *, leading: int = 0) -> NamedSharding:
        """Sharding of an array whose dimension ``leading`` counts the rows of a batch."""
        spec = (None,) * leading + ((self.data_axes,) if self.data_axes else ())
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def sharding(self, path: str, shape: Sequence[int]) -> NamedSharding:
        """Sharding of the parameter at ``path``. A scalar needs no rule.

        Raises:
          ValueError: no rule matches, the rule's rank is not the leaf's, or a dimension is
            not divisible by its mesh axis.
        """
        if not shape:
            return self.replicated
        rule = next((rule for rule in self.rules if re.fullmatch(rule[0], path)), None)
        if rule is None:
            raise ValueError(
                f"no sharding rule covers {path!r} of shape {tuple(shape)}: add a rule, "
                "or ('.*', ()) at the end to replicate what is left"
            )
        pattern, axes = rule
        if axes and len(axes) != len(shape):
            raise ValueError(
                f"rule {pattern!r} names {len(axes)} axes {axes}, but {path!r} has "
                f"{len(shape)} dimensions {tuple(shape)}"
            )
        spec: list[Any] = []
        for dim, axis in enumerate(axes):
            present = tuple(name for name in _names(axis) if name in self.mesh.shape)
            parts = math.prod(self.mesh.shape[name] for name in present)
            if shape[dim] % parts:
                raise ValueError(
                    f"dimension {dim} of {path!r} has size {shape[dim]}, not divisible by the "
                    f"{parts} devices of mesh axis {'+'.join(present)!r}"
                )
            spec.append(present if len(present) > 1 else present[0] if present else None)
        # P(None, None) and P() are the same placement but compare unequal, which would make
        # a checkpoint or a compiled step look different from its twin.
        while spec and spec[-1] is None:
            spec.pop()
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def shardings(self, tree: Any) -> Any:
        """The sharding of every leaf (array or abstract shape) of a tree of parameters."""
        return jax.tree_util.tree_map_with_path(
            lambda key, leaf: self.sharding(path_of(key), leaf.shape), tree
        )

    def mirror(self, other: Any, params: Any) -> Any:
        """Shardings for a tree that shadows parameters, such as an optimiser state.

        A leaf whose path ends with a parameter's path and that has the parameter's shape
        (moments, averages, masks) is split like it; every other leaf is replicated.
        """
        known = {
            path_of(key): tuple(leaf.shape)
            for key, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
        }

        def one(key: Any, leaf: Any) -> NamedSharding:
            parts = path_of(key).split("/")
            for start in range(len(parts)):
                path = "/".join(parts[start:])
                if known.get(path) == tuple(leaf.shape):
                    return self.sharding(path, leaf.shape)
            return self.replicated

        return jax.tree_util.tree_map_with_path(one, other)

    def state(self, state: TrainState) -> TrainState:
        """The sharding of every leaf of a training state (arrays or abstract shapes)."""
        return TrainState(
            step=self.replicated,
            params=self.shardings(state.params),
            frozen=self.shardings(state.frozen),
            opt_state=self.mirror(state.opt_state, state.params),
            extra=self.mirror(state.extra, state.params),
            rng=jax.tree.map(lambda _: self.replicated, state.rng),
        )

    def place(self, tree: Any) -> Any:
        """Puts every leaf of a tree of parameters straight into its shards, one at a time."""
        return jax.tree.map(put, tree, self.shardings(tree))

    def batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Splits the rows of a batch over the data axes; scalars are replicated.

        With several processes each gives its own rows, and the result is the global batch.

        Raises:
          ValueError: the number of rows is not divisible by the data axes.
        """
        parts = self.data_size
        processes = jax.process_count()
        out = {}
        for name, value in batch.items():
            if isinstance(value, jax.Array) and isinstance(value.sharding, NamedSharding):
                out[name] = value
                continue
            local = np.asarray(value)
            rows = local.shape[0] * processes if local.ndim else parts
            if rows % parts:
                raise ValueError(
                    f"batch[{name!r}] has {rows} rows, not divisible by the {parts} parts of "
                    f"mesh axes {self.data_axes}: use a multiple of {parts}"
                )
            sharding = self.rows() if local.ndim else self.replicated
            if processes == 1:
                out[name] = jax.device_put(local, sharding)
            else:
                out[name] = jax.make_array_from_process_local_data(sharding, local)
        return out


def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """Places one array; from host memory each device gets its own shard and no more."""
    if isinstance(leaf, jax.Array):
        return jax.device_put(leaf, sharding)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def settle(tree: Any, devices: Iterable[jax.Device]) -> Any:
    """Lets a program finish before the next one starts, on several devices of one CPU only.

    Such devices (``--xla_force_host_platform_device_count``) share one pool of threads. When
    two programs with collectives are under way, each can hold the threads that the other one
    waits for, and after 40 s XLA aborts the process. Accelerators queue programs: no waiting.
    """
    found = list(devices)
    if len(found) > 1 and found[0].platform == "cpu":
        jax.block_until_ready(tree)
    return tree


def _names(axis: str | Iterable[str] | None) -> tuple[str, ...]:
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
