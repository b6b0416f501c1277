"""The gradients of one step: of the whole batch, of chosen rows, and the losses of single rows.

The loss of a step is ``sum_k total_k / W_k`` with ``W_k`` the weight of component k summed
over the global batch. It does not depend on how the batch is split: the weights of all
micro-batches come first (the compiler drops the forward pass when weights only need the
labels), then every micro-batch contributes the gradient of ``sum_k total_k / W_k``.

A :class:`Work` holds what the gradient functions that a transform may call are closed over:
the rows, the random numbers, the micro-batches, the precision and the mesh of one step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from steppe.models import tree
from steppe.train import fisher, types
from steppe.train.mesh import MeshPlan
from steppe.train.microbatch import split_rows
from steppe.train.types import Batch, Metrics, Objective, Params


class Found(NamedTuple):
    """What one pass over a batch gives.

    Attributes:
      loss: float32 scalar.
      metrics: ``loss``, its named components and the objective's aux, as (sum, weight).
      norm: global norm of the gradient before clipping.
      grads: gradient in the dtype of the parameters, clipped.
      rows: the loss of every row, see :meth:`Work.losses`; None where the objective does not
        tell its rows apart.
    """

    loss: jax.Array
    metrics: Metrics
    norm: jax.Array
    grads: Params
    rows: jax.Array | None = None


class Sums(NamedTuple):
    """What is added up over the rows of a pass.

    Attributes:
      loss: float32 scalar, ``sum_k total_k / weight_k``.
      totals, weights: of each component of the objective.
      aux: metrics of the objective, as (sum, weight).
      grads: gradient of ``loss`` in the dtype of the parameters.
      rows: as in :class:`Found`.
    """

    loss: jax.Array
    totals: dict[str, jax.Array]
    weights: dict[str, jax.Array]
    aux: Metrics
    grads: Params
    rows: jax.Array | None = None

    def found(self, clip_norm: float | None = None) -> Found:
        """With the metrics of a step, and the gradient clipped."""
        metrics = metrics_of(self.loss, self.totals, self.weights, self.aux)
        norm = optax.global_norm(self.grads)
        grads = clipped(self.grads, norm, clip_norm)
        return Found(self.loss, metrics, norm, grads, self.rows)


@dataclasses.dataclass(frozen=True)
class Work:
    """The batch of one step and the way in which its gradients are computed.

    Attributes:
      objective: see ``train.types``.
      frozen: parameters that are not differentiated.
      batch: arrays [B, ...], the global batch.
      key: of the step; the key of micro-batch i is ``fold_in(key, i)``.
      plan: the mesh that the rows are split over, or None.
      microbatches: number of parts whose gradients are added up.
      compute_dtype: of the forward and backward pass, or None.
      clip_norm: largest norm of a gradient, or None.
    """

    objective: Objective
    frozen: Params
    batch: Batch
    key: jax.Array
    plan: MeshPlan | None = None
    microbatches: int = 1
    compute_dtype: Any = None
    clip_norm: float | None = None

    @functools.cached_property
    def parts(self) -> Batch:
        """The batch as micro-batches [M, B / M, ...]; the batch itself for one."""
        if self.microbatches == 1:
            return self.batch
        return split_rows(self.batch, self.microbatches, self.plan)

    @functools.cached_property
    def still(self) -> Params:
        """The frozen parameters in the compute dtype."""
        return cast(self.frozen, self.compute_dtype)

    @property
    def rows(self) -> int:
        """B, the number of rows of the global batch."""
        return next(int(v.shape[0]) for v in self.batch.values() if jnp.ndim(v))

    def evaluate(self, params: Params) -> Found:
        """Loss, metrics and gradient of the whole batch."""
        return self.sums(params).found(self.clip_norm)

    def sums(self, params: Params) -> Sums:
        """What :meth:`evaluate` is made of."""
        found = accumulate(
            self.objective,
            params,
            self.still,
            self.parts,
            self.key,
            self.microbatches,
            self.compute_dtype,
        )
        self._check_rows(found.rows)
        return found

    def _check_rows(self, found: jax.Array | None) -> None:
        if found is not None and found.shape != (self.rows,):
            raise ValueError(
                f"LossOut.rows must have one entry for each of the {self.rows} rows of the batch, "
                f"got {found.shape[0]}"
            )

    def gradient(self, params: Params) -> Params:
        """The gradient of the whole batch: ``grad_fn`` of a transform."""
        return self.evaluate(params).grads

    def fisher(self, params: Params) -> Params:
        """The mean squared gradient of the batch's examples; see ``train.fisher``."""
        return fisher.diagonal(
            self.objective,
            params,
            self.still,
            self.batch,
            self.plan,
            compute_dtype=self.compute_dtype,
        )

    def losses(self, params: Params) -> jax.Array:
        """The loss of every row of the batch by itself, [B] float32, in the batch's order.

        A row's loss is ``sum_k total_k / weight_k`` of that row alone, and NaN where all its
        weights are 0 (no label, a row that fills the batch up): 0 would be larger than a loss
        that fell.

        Where the objective tells its rows apart (``LossOut.rows``) this is one forward pass, with
        the dropout of the step, and ``evaluate(params).rows`` are the same numbers. Where it
        does not, every row is run by itself without dropout: an objective draws for all the rows
        that it is given at once, so the draw of a row in the batch's pass is not that of the row
        alone. Either way the losses at two points differ by the points only.
        """
        compute = cast(params, self.compute_dtype)

        def told(batch: Batch, index: Any) -> jax.Array | None:
            key = jax.random.fold_in(self.key, index)
            return _row_losses(self.objective(tree.merge(compute, self.still), batch, key))

        if self.microbatches == 1:
            found = told(self.parts, 0)
        else:
            parts = (self.parts, jnp.arange(self.microbatches))
            _, found = jax.lax.scan(lambda _, part: (None, told(*part)), None, parts)
            found = None if found is None else _in_order(found)
        self._check_rows(found)
        return self._single(compute) if found is None else found

    def _single(self, compute: Params) -> jax.Array:
        """The losses of rows that are run one by one."""
        scalars = {name for name, value in self.batch.items() if not jnp.ndim(value)}

        def loss(row: Batch) -> jax.Array:
            one = {n: value if n in scalars else value[None] for n, value in row.items()}
            out = self.objective(tree.merge(compute, self.still), one, None)  # type: ignore[arg-type]
            return _alone(*types.components(out))

        axes = {name: None if name in scalars else 0 for name in self.batch}
        each = jax.vmap(loss, in_axes=(axes,))
        if self.microbatches == 1:
            return each(dict(self.batch))
        _, found = jax.lax.scan(lambda _, part: (None, each(part)), None, self.parts)
        return _in_order(found)

    def subset(self, params: Params, rows: jax.Array) -> Params:
        """The gradient of the mean loss of some rows: ``subset_grad_fn`` of a transform.

        Costs k / B of a whole gradient. On a mesh the rows may move between devices. Its
        dropout is drawn for the k rows, from the keys of the step.

        Args:
          rows: int32 [k], indices into the batch; k is static.
        """
        count = rows.shape[0]
        share = 1 if self.plan is None else self.plan.data_size
        even = self.plan if count % share == 0 else None
        most = range(min(self.microbatches, count), 0, -1)
        fits = (m for m in most if count % (m * (share if even else 1)) == 0)
        chosen = {
            name: jnp.asarray(value)[rows] if jnp.ndim(value) else value
            for name, value in self.batch.items()
        }
        if even is not None:
            sharding = even.rows()
            chosen = {
                name: jax.lax.with_sharding_constraint(value, sharding) if value.ndim else value
                for name, value in chosen.items()
            }
        work = dataclasses.replace(self, batch=chosen, plan=even, microbatches=next(fits, 1))
        return work.gradient(params)


def partial(fn: Callable[..., Params], whole: Params) -> Callable[..., Params]:
    """``fn(params, ...)`` for callers that see a part of the tree only.

    ``optax.partition`` and ``optax.masked`` show an inner transform ``MaskedNode`` in place of
    the leaves that are not its own. Those are taken from ``whole``, and left out of the result.
    """

    def call(params: Params, *args: Any) -> Params:
        return hide(fn(fill(params, whole), *args), params)

    return call


def masked(node: Any) -> bool:
    """Whether a leaf stands for one that this transform does not see."""
    return isinstance(node, optax.MaskedNode)


def fill(params: Params, whole: Params) -> Params:
    """``params`` with the leaves that are masked in it taken from ``whole``."""
    return jax.tree.map(lambda own, new: own if masked(new) else new, whole, params, is_leaf=masked)


def hide(found: Params, params: Params) -> Params:
    """``found`` with the leaves masked that are masked in ``params``."""
    return jax.tree.map(lambda new, got: new if masked(new) else got, params, found, is_leaf=masked)


def clipped(grads: Params, norm: jax.Array, clip_norm: float | None) -> Params:
    """``grads`` of global norm ``norm``, shortened to ``clip_norm`` where it is longer."""
    if clip_norm is None:
        return grads
    # The 1.0 branch keeps an unclipped gradient bitwise what it was.
    factor = jnp.where(norm > clip_norm, clip_norm / norm, 1.0)
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)


def accumulate(
    objective: Objective,
    params: Params,
    frozen: Params,
    parts: Batch,
    key: jax.Array,
    microbatches: int,
    compute_dtype: Any,
    weights: dict[str, jax.Array] | None = None,
) -> Sums:
    """Sums and gradient over the micro-batches of some rows.

    Args:
      frozen: in the compute dtype.
      parts: [M, rows, ...], or [rows, ...] for one micro-batch.
      weights: W_k that the totals are divided by; None = those of the rows given.
    """
    # Cast once, outside the scan; the gradient with respect to the cast copy is what the
    # transpose of a cast inside would receive.
    compute = cast(params, compute_dtype)

    def scaled(p: Params, batch: Batch, index: Any, weights: Any) -> tuple[jax.Array, Any]:
        out = objective(tree.merge(p, frozen), batch, jax.random.fold_in(key, index))
        totals, own = types.components(out)
        weights = jax.lax.stop_gradient(own if weights is None else weights)
        loss = _loss(totals, weights)
        aux = {
            name: (types.scalar(s, f"aux {name!r}"), types.scalar(w, f"aux {name!r}"))
            for name, (s, w) in out.aux.items()
        }
        return loss, (loss, totals, weights, aux, _row_losses(out))

    grad = jax.grad(scaled, has_aux=True)
    if microbatches == 1:
        grads, (loss, totals, weights, aux, rows) = grad(compute, parts, 0, weights)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        return Sums(loss, totals, weights, aux, grads, rows)

    if weights is None:
        weights = weigh(objective, compute, frozen, parts, key, microbatches)
    indices = jnp.arange(microbatches)

    def add(carry: Params, part: tuple[Batch, jax.Array]) -> tuple[Params, Any]:
        grads, (loss, totals, _, aux, rows) = grad(compute, *part, weights)
        added = jax.tree.map(lambda c, g: c + g.astype(c.dtype), carry, grads)
        return added, ((loss, totals, aux), rows)

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    grads, (sums, rows) = jax.lax.scan(add, zeros, (parts, indices))
    loss, totals, aux = jax.tree.map(lambda x: x.sum(0), sums)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    return Sums(loss, totals, weights, aux, grads, None if rows is None else _in_order(rows))


def weigh(
    objective: Objective,
    compute: Params,
    frozen: Params,
    parts: Batch,
    key: jax.Array,
    microbatches: int,
) -> dict[str, jax.Array]:
    """The weight of every component, added over the micro-batches; see :func:`accumulate`."""

    def one(batch: Batch, index: Any) -> dict[str, jax.Array]:
        out = objective(tree.merge(compute, frozen), batch, jax.random.fold_in(key, index))
        return types.components(out)[1]

    if microbatches == 1:
        return one(parts, 0)
    indices = jnp.arange(microbatches)
    _, each = jax.lax.scan(lambda _, part: (None, one(*part)), None, (parts, indices))
    summed: dict[str, jax.Array] = jax.tree.map(lambda w: w.sum(0), each)
    return summed


def known(plan: MeshPlan | None) -> contextlib.AbstractContextManager[Any]:
    """Makes the mesh known to the models that are traced inside; see ``models.layout``."""
    if plan is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(plan.mesh.abstract_mesh)


def _loss(totals: dict[str, jax.Array], weights: dict[str, jax.Array]) -> jax.Array:
    loss = jnp.float32(0)
    for name, total in totals.items():
        loss += total / jnp.where(weights[name] == 0, 1.0, weights[name])
    return loss


def _alone(totals: dict[str, jax.Array], weights: dict[str, jax.Array]) -> jax.Array:
    """The loss of single rows from their sums, and NaN where a row weighs nothing."""
    some = jnp.stack([weight != 0 for weight in weights.values()]).any(0)
    return jax.lax.stop_gradient(jnp.where(some, _loss(totals, weights), jnp.nan))


def _row_losses(out: types.LossOut) -> jax.Array | None:
    found = types.rows(out)
    return None if found is None else _alone(*found)


def _in_order(found: jax.Array) -> jax.Array:
    """[M, B / M] in the order of the batch: micro-batch i holds the rows i, i + M, ..."""
    return found.T.reshape(-1)


def cast(params: Params, dtype: Any) -> Params:
    """``params`` in ``dtype``, or as they are for None."""
    return params if dtype is None else tree.cast(params, dtype)


def metrics_of(
    loss: jax.Array, totals: dict[str, Any], weights: dict[str, Any], aux: Metrics
) -> Metrics:
    """The metrics of a step from the sums of its parts.

    Raises:
      ValueError: a name in ``aux`` that the step has already.
    """
    one = jnp.float32(1)
    if set(totals) == {""}:
        out: Metrics = {"loss": (totals[""], weights[""])}
    else:
        out = {"loss": (loss, one)}
        out |= {f"loss/{name}": (totals[name], weights[name]) for name in totals}
    for name, pair in aux.items():
        if name in out or name == "grad_norm":
            raise ValueError(f"aux metric {name!r} has the name of a metric of the step: rename it")
        out[name] = pair
    return out
