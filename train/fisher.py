"""The diagonal of the empirical Fisher information on one batch: F = 1/N sum_i (d log p_i)^2.

i runs over the N labelled examples of the global batch, p_i is the probability of all labels
of example i, without dropout. Gradients of a few examples are in memory at a time; on a mesh
every device works on its own rows, and what is summed are the squares.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.train import types
from steppe.train.mesh import MeshPlan
from steppe.train.microbatch import split_rows
from steppe.train.types import Batch, Objective, Params

CHUNK = 8


def diagonal(
    objective: Objective,
    params: Params,
    frozen: Params,
    batch: Batch,
    plan: MeshPlan | None = None,
    *,
    chunk: int = CHUNK,
    compute_dtype: Any = None,
) -> Params:
    """The Fisher diagonal of ``params``, float32, shaped and sharded like them.

    Args:
      objective: its ``total`` for one example is that example's negative log-likelihood.
      frozen: the parameters that are not differentiated, in the compute dtype.
      batch: arrays [B, ...]; rows of weight 0 count neither in the sum nor in N.
      plan: the mesh that the batch's rows are split over.
      chunk: examples whose gradients are held at once, at least one a device.
      compute_dtype: dtype of the forward and backward pass; squares are float32.

    Raises:
      ValueError: chunk < 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}")
    scalars = {name for name, value in batch.items() if not jnp.ndim(value)}
    rows = next(value.shape[0] for name, value in batch.items() if name not in scalars)
    parts = 1 if plan is None else plan.data_size
    # The largest number of rows at once that divides the batch and fills the devices evenly.
    fits = [n for n in range(parts, max(chunk, parts) + 1, parts) if rows % n == 0]
    together = fits[-1] if fits else rows
    compute = params if compute_dtype is None else tree.cast(params, compute_dtype)

    def loss(p: Params, example: Batch) -> tuple[jax.Array, jax.Array]:
        one = {n: value if n in scalars else value[None] for n, value in example.items()}
        out = objective(tree.merge(p, frozen), one, None)  # type: ignore[arg-type]
        totals, weights = types.components(out)
        return sum(totals.values(), jnp.float32(0)), sum(weights.values(), jnp.float32(0)) > 0

    axes = {name: None if name in scalars else 0 for name in batch}
    each = jax.vmap(jax.grad(loss, has_aux=True), in_axes=(None, axes))

    def add(carry: tuple[Params, jax.Array], part: Batch) -> tuple[Any, None]:
        total, count = carry
        grads, real = each(compute, part)

        def squares(t: jax.Array, g: jax.Array) -> jax.Array:
            live = real.reshape(-1, *(1,) * (g.ndim - 1))
            return t + jnp.where(live, jnp.square(g.astype(jnp.float32)), 0.0).sum(0)

        return (jax.tree.map(squares, total, grads), count + real.sum()), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    pieces = split_rows(batch, rows // together, plan)
    (total, count), _ = jax.lax.scan(add, (zeros, jnp.int32(0)), pieces)
    return jax.tree.map(lambda t: t / jnp.maximum(count, 1), total)
