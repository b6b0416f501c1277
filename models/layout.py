"""Where activations live: rows of the batch over the data axes of the mesh in use.

Parameters are sharded from outside, by rules on their paths. Activations follow, but from
sharded parameters alone the compiler may choose to split a hidden state over its width; one
constraint at the borders of the stack settles it. Without a mesh these are the identity.
"""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

# The axes that split a batch; ``steppe.train.mesh`` uses the same names.
DATA_AXES = ("data", "fsdp")


def rows(x: jax.Array) -> jax.Array:
    """Keeps axis 0 of ``x`` split over the data axes, the other axes as the compiler likes.

    The mesh is the one that the surrounding step has set; axes that do not divide the rows
    are left alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    axes = tuple(axis for axis in DATA_AXES if mesh.shape.get(axis, 1) > 1)
    parts = 1
    for axis in axes:
        parts *= mesh.shape[axis]
    if parts == 1 or x.shape[0] % parts:
        return x
    if any(mesh._name_to_type[axis] != jax.sharding.AxisType.Auto for axis in axes):
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *free))
