"""pmap semantics on a mesh: one program a device, collectives by the name of an axis.

For methods whose definition is per device (the m in m-SAM, per-device batch statistics).
``jax.pmap`` is in maintenance mode; this is ``jax.shard_map`` under ``jax.jit``.

Gradients are per device, as under pmap: nothing is summed unless the function says so with
``jax.lax.psum`` or ``pmean``. (Under shard_map with checked axes the gradient of a replicated
argument is already summed over the mesh, and a further ``psum`` makes it too large by the
number of devices, silently. So the check is off here.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from steppe.train.mesh import settle


def replicated(
    fn: Callable[..., Any],
    *,
    axis_name: str = "devices",
    in_axes: int | Sequence[int | None] | None = 0,
    devices: Sequence[jax.Device] | None = None,
    donate_argnums: int | Sequence[int] = (),
) -> Callable[..., Any]:
    """Runs ``fn`` once on every device, each on its slice of the arguments.

    Args:
      fn: ``fn(*args)`` on one device's slices, which lack the leading axis; may use
        collectives over ``axis_name``.
      axis_name: the name for ``jax.lax.psum`` and the like.
      in_axes: for every argument 0 (its leaves have a leading axis, one entry a device) or
        None (every device gets all of it); one value holds for all arguments.
      devices: default all devices.
      donate_argnums: arguments whose memory may be reused.

    Returns:
      A compiled function whose results have a leading axis, one entry a device.

    Raises:
      ValueError: an in_axes that is neither 0 nor None; when called, a leaf whose leading
        axis is not the number of devices, or another number of arguments than in_axes.
    """
    found = list(jax.devices() if devices is None else devices)
    count = len(found)
    mesh = Mesh(np.array(found), (axis_name,))
    each = PartitionSpec(axis_name)

    def axes_of(args: Sequence[Any]) -> tuple[int | None, ...]:
        if in_axes is None or isinstance(in_axes, int):
            axes: tuple[int | None, ...] = (in_axes,) * len(args)
        else:
            axes = tuple(in_axes)
        if any(axis not in (0, None) for axis in axes):
            raise ValueError(f"in_axes must be 0 or None for each argument, got {in_axes}")
        if len(axes) != len(args):
            raise ValueError(f"in_axes={in_axes} is for {len(axes)} arguments, got {len(args)}")
        return axes

    def run(*args: Any) -> Any:
        axes = axes_of(args)

        def one(*local: Any) -> Any:
            own = [
                jax.tree.map(lambda leaf: leaf[0], arg) if axis == 0 else arg
                for arg, axis in zip(local, axes, strict=True)
            ]
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], fn(*own))

        specs = tuple(each if axis == 0 else PartitionSpec() for axis in axes)
        mapped = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=each, check_vma=False)
        return mapped(*args)

    if not isinstance(in_axes, Sequence):
        axes_of([None])
    compiled = jax.jit(run, donate_argnums=donate_argnums)

    def call(*args: Any) -> Any:
        for number, (arg, axis) in enumerate(zip(args, axes_of(args), strict=True)):
            if axis is None:
                continue
            for key, leaf in jax.tree_util.tree_flatten_with_path(arg)[0]:
                if np.shape(leaf)[:1] != (count,):
                    raise ValueError(
                        f"argument {number}{jax.tree_util.keystr(key)} has shape "
                        f"{np.shape(leaf)}: its leading axis must be the {count} devices; "
                        "give in_axes=None to hand all of it to every device"
                    )
        return settle(compiled(*args), found)

    return call
