"""Where activations live: rows of the batch over the data axes of the mesh in use.

Parameters are sharded from outside, by rules on their paths. Activations follow, but from
sharded parameters alone the compiler may choose to split a hidden state over its width; one
constraint at the borders of the stack settles it. A mesh with an axis ``seq`` also splits the
tokens there: norms, projections and residuals then run on a part of each text, and attention
gathers keys and values. Without a mesh these are the identity.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import PartitionSpec

# The axes that split a batch, and the one that splits texts; ``steppe.train.mesh`` uses the
# same names.
DATA_AXES = ("data", "fsdp")
SEQUENCE_AXIS = "seq"


def rows(x: jax.Array) -> jax.Array:
    """Keeps axis 0 of ``x`` split over the data axes, the other axes as the compiler likes.

    Axis 1 of hidden states [B, T, D] is split over ``seq`` where the mesh has such an axis. The
    mesh is the one that the surrounding step has set; axes that do not divide the rows, or the
    tokens, are left alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    axes = tuple(axis for axis in DATA_AXES if mesh.shape.get(axis, 1) > 1)
    parts = 1
    for axis in axes:
        parts *= mesh.shape[axis]
    texts = mesh.shape.get(SEQUENCE_AXIS, 1)
    if x.ndim < 3 or x.shape[1] % texts:
        texts = 1
    if x.shape[0] % parts:
        parts = 1
    if parts == texts == 1:
        return x
    used = (axes if parts > 1 else ()) + ((SEQUENCE_AXIS,) if texts > 1 else ())
    if any(mesh._name_to_type[axis] != jax.sharding.AxisType.Auto for axis in used):
        return x
    free: list[Any] = [PartitionSpec.UNCONSTRAINED] * x.ndim
    if parts > 1:
        free[0] = axes
    if texts > 1:
        free[1] = SEQUENCE_AXIS
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*free))
