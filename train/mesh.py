"""Device meshes, and a plan that keeps the sharding rules of a model with its mesh.

Axis names used by steppe: ``data`` and ``fsdp`` split the batch, ``seq`` the tokens between
layers, every name that the rules use (``fsdp``, ``model``, ...) splits parameters; see
``sharding``. Axes are of type Auto: shardings are hints that the compiler propagates, so model
code is the same on one device and on a pod.

Devices of several slices (pods of TPUs that a slower network joins) make a hybrid mesh: an axis
that runs across slices has its slices outermost, so that all other axes stay on the fast links.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from steppe.models.layout import DATA_AXES, SEQUENCE_AXIS
from steppe.models.tree import path_of
from steppe.train import sharding
from steppe.train.sharding import REPLICATE, Axes, Rules
from steppe.train.types import TrainState

__all__ = ["REPLICATE", "Axes", "MeshPlan", "Rules", "abstract", "plan", "put", "settle", "sizes"]


def plan(
    shape: Mapping[str, int],
    rules: Rules | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    slices: Mapping[str, int] | None = None,
) -> MeshPlan:
    """Builds a mesh over the devices and keeps the sharding rules with it.

    Args:
      shape: axis name -> size, such as ``{"data": 4, "model": 2}``; one size may be -1 and
        then takes what is left. The outermost axis comes first.
      rules: pairs (regular expression matching a whole parameter path, one mesh axis name or
        None for each dimension); ``()`` replicates. The first match counts. Axes that the
        mesh does not have are dropped. None replicates every parameter.
      devices: default all devices of all processes.
      slices: axis name -> number of slices that it runs across, a part of its size; the other
        axes lie within a slice. None = the first axis of the batch runs across all slices that
        the devices say they are on, if these are several.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, an axis would do nothing
        because neither the batch nor any rule uses it, or slices that do not fit.
    """
    found = list(jax.devices() if devices is None else devices)
    whole = sizes(shape, len(found), rules)
    return MeshPlan(_mesh(whole, found, slices), sharding.frozen(rules))


def abstract(shape: Mapping[str, int], rules: Rules | None = None) -> MeshPlan:
    """A plan for devices that are not there: shapes and shardings, but nothing can be placed.

    Args:
      shape, rules: as in :func:`plan`, without -1.

    Raises:
      ValueError: as :func:`plan`.
    """
    whole = sizes(shape, math.prod(shape.values()), rules)
    axes = (AxisType.Auto,) * len(whole)
    mesh = AbstractMesh(tuple(whole.values()), tuple(whole), axis_types=axes)
    return MeshPlan(mesh, sharding.frozen(rules))


def sizes(shape: Mapping[str, int], devices: int, rules: Rules | None = None) -> dict[str, int]:
    """``shape`` with -1 filled in, after checking it against the devices and the rules.

    Raises:
      ValueError: see :func:`plan`.
    """
    out = dict(shape)
    if not out or any(size < 1 and size != -1 for size in out.values()):
        raise ValueError(f"mesh sizes must be >= 1, or -1 for what is left, got {out}")
    free = [name for name, size in out.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"only one mesh axis may be -1, got {out}")
    fixed = math.prod(size for size in out.values() if size != -1)
    if free and devices % fixed == 0:
        out[free[0]] = devices // fixed
    elif free or fixed != devices:
        raise ValueError(
            f"mesh {dict(shape)} needs {'a multiple of ' if free else ''}{fixed} devices, but "
            f"there are {devices}: choose sizes whose product is {devices}"
        )
    named = sharding.named(REPLICATE if rules is None else rules)
    for name, size in out.items():
        if size > 1 and name not in (*DATA_AXES, SEQUENCE_AXIS) and name not in named:
            raise ValueError(
                f"mesh axis {name!r} of size {size} is used by no rule and does not split the "
                f"batch; the batch is split by {DATA_AXES}, the rules name {sorted(named)}"
            )
    return out


def _mesh(
    whole: Mapping[str, int], devices: list[jax.Device], slices: Mapping[str, int] | None
) -> Mesh:
    count = len({_slice(device) for device in devices})
    if slices is None and count > 1:
        first = next((axis for axis in whole if axis in DATA_AXES), next(iter(whole)))
        slices = {first: count}
    axes = (AxisType.Auto,) * len(whole)
    if not slices or math.prod(slices.values()) == 1:
        return jax.make_mesh(tuple(whole.values()), tuple(whole), axis_types=axes, devices=devices)
    return Mesh(arrange(whole, slices, devices), tuple(whole), axis_types=axes)


def arrange(whole: Mapping[str, int], slices: Mapping[str, int], devices: Sequence[Any]) -> Any:
    """The devices as an array of the mesh's shape, slices outermost along their axes.

    Devices that do not know their slice are cut into equal consecutive ones.

    Raises:
      ValueError: ``slices`` names an axis that the mesh lacks, does not divide its size, or is
        another number of slices than the devices are on.
    """
    for name, count in slices.items():
        size = whole.get(name)
        if size is None or count < 1 or size % count:
            raise ValueError(
                f"slices {dict(slices)}: axis {name!r} of mesh {dict(whole)} cannot run across "
                f"{count} slices; its size must be a multiple of them"
            )
    across = tuple(slices.get(name, 1) for name in whole)
    within = tuple(size // part for size, part in zip(whole.values(), across, strict=True))
    known = sorted({_slice(device) for device in devices})
    count = math.prod(across)
    if len(known) > 1 and len(known) != count:
        raise ValueError(
            f"slices {dict(slices)} are {count}, but the devices are on {len(known)}: choose "
            f"numbers whose product is {len(known)}"
        )
    if len(known) > 1:
        return mesh_utils.create_hybrid_device_mesh(within, across, devices)
    # One block of consecutive devices a slice; then the axes are brought together.
    cut = np.array(devices, dtype=object).reshape(*across, *within)
    order = [axis for i in range(len(across)) for axis in (i, len(across) + i)]
    return cut.transpose(order).reshape(tuple(whole.values()))


def _slice(device: Any) -> int:
    return getattr(device, "slice_index", None) or 0


@dataclass(frozen=True)
class MeshPlan:
    """A mesh and the rules that split a tree of parameters over it; see :func:`plan`."""

    mesh: Mesh | AbstractMesh
    rules: tuple[tuple[str, Axes], ...]

    def under(self, rules: Rules) -> MeshPlan:
        """The same mesh with other rules."""
        return dataclasses.replace(self, rules=sharding.frozen(rules))

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
        assert isinstance(self.mesh, Mesh), "an abstract mesh runs nothing"
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
        axes = sharding.spec(self.rules, self.mesh.shape, path, shape)
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def shardings(self, tree: Any) -> Any:
        """The sharding of every leaf (array or abstract shape) of a tree of parameters.

        Raises:
          ValueError: as :meth:`sharding`.
        """
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
            to = self.rows() if local.ndim else self.replicated
            if processes == 1:
                out[name] = jax.device_put(local, to)
            else:
                out[name] = jax.make_array_from_process_local_data(to, local)
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
