"""Cutting a batch into pieces whose results add up to those of the whole."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from steppe.train.mesh import MeshPlan
from steppe.train.types import Batch


def split_rows(batch: Batch, parts: int, plan: MeshPlan | None = None) -> dict[str, Any]:
    """``[B, ...]`` -> ``[parts, B / parts, ...]``; part i holds the rows i, i + parts, ...

    With this order a device that holds a block of rows holds a block of every part, so no
    row moves between devices. Scalars are repeated.
    """

    def one(value: jax.Array) -> jax.Array:
        if not value.ndim:
            return jnp.broadcast_to(value, (parts,))
        rows = value.reshape(value.shape[0] // parts, parts, *value.shape[1:])
        stacked = jnp.swapaxes(rows, 0, 1)
        if plan is None:
            return stacked
        return jax.lax.with_sharding_constraint(stacked, plan.rows(leading=1))

    return {name: one(jnp.asarray(value)) for name, value in batch.items()}
