"""A cheaper first gradient for sharpness-aware transforms: what they climb by need not be exact.

  fraction  the direction comes from the first rows of every device and micro-batch
  dtype     the first pass computes in it; perturbation and displaced parameters stay float32
  cut       the network is split at layer k: only what lies above is back-propagated through
            and perturbed, and the second pass starts from the activations of the first

The second gradient is always that of the whole batch in the step's ``compute_dtype``, so the
minimum that is looked for is not another one; only e is an estimate. In units of one forward and
backward pass SAM costs 2, and here 1 + fraction, or 1 + (L - k) / L with a cut at layer k of L
equal layers: 1.5 for the upper half. With micro-batches a cut runs the part below forward once
more, because its intermediate values are not kept from one micro-batch to the next: 1.67.

A step with ``ascent=`` has its metrics from the cheap pass (``grad_norm`` is the norm of the
direction), and hands the full gradient and the loss of the whole batch over as always; what the
transform does not read of them the compiler drops. Transforms that know of ``Climb`` use it in
place of ``grads``; a step whose transform does not is refused, and so are GSAM and LookSAM, which
compare both gradients.

Deviations: with a cut, e is normalised by the norm of the part that is perturbed, |e| = rho;
the norm of the whole gradient, which published masks divide by, is not known in the first pass.
A leaf that both sides read (a table tied to the output layer, relative positions shared by all
layers) is not perturbed, and its gradient has the parts of both sides.

Foret et al., ICLR 2021 (arXiv 2010.01412) for the steps; Zhong et al., Findings of EMNLP 2022
(arXiv 2210.05497) for perturbing a part.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from steppe.models import tree
from steppe.train import types
from steppe.train.gradient import Found, Work, accumulate, cast, clipped
from steppe.train.mesh import MeshPlan
from steppe.train.types import Batch, Climb, LossOut, Objective, Params

# Where the part above a cut finds the activations in its batch.
CARRIED = "activations"


@dataclasses.dataclass(frozen=True)
class Cut:
    """A network split in two; see :func:`steppe.train.cut.at_layer`.

    Attributes:
      below: ``(params, batch, key) -> activations`` [B, ...], one array.
      above: objective whose batch also holds the activations, as ``CARRIED``. Below and above
        together are the step's objective, dropout included.
      layer: the first layer above, of leaves that are stacked over layers.
    """

    below: Callable[[Params, Batch, jax.Array], jax.Array]
    above: Objective
    layer: int

    def __post_init__(self) -> None:
        layer = self.layer
        if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)) or layer < 1:
            raise ValueError(f"a cut needs a whole layer >= 1, got {layer!r}")


class Watched(Climb):
    """A ``Climb`` that knows whether somebody used it.

    Attributes:
      read: True once the direction or the gradient was asked for.
    """

    read = False

    def __getattribute__(self, name: str) -> Any:
        if name in ("direction", "grad_fn"):
            self.read = True
        return super().__getattribute__(name)


@dataclasses.dataclass(frozen=True)
class Ascent:
    """How the first gradient of a step is computed; the defaults are the plain way.

    Attributes:
      fraction: share of the rows, in (0, 1]; of every micro-batch on every device the first
        ``max(1, round(fraction * rows))``, so that none moves.
      dtype: of the first pass, such as "bfloat16"; None = the step's.
      cut: where the network is split; None = not at all.
    """

    fraction: float = 1.0
    dtype: Any = None
    cut: Cut | None = None

    def __post_init__(self) -> None:
        share = self.fraction
        if isinstance(share, bool) or not isinstance(share, numbers.Real) or not 0 < share <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {share!r}")
        if self.dtype is not None and not _floating(self.dtype):
            raise ValueError(f"dtype must be a floating-point type or None, got {self.dtype!r}")
        if self.cut is not None and not isinstance(self.cut, Cut):
            raise ValueError(f"cut must be a Cut, see train.cut.at_layer, got {self.cut!r}")


def _floating(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:  # no such type
        return False


def cheaper(work: Work, params: Params, ascent: Ascent) -> tuple[Found, Climb]:
    """The first pass: its metrics, and what the transform gets."""
    dtype = work.compute_dtype if ascent.dtype is None else ascent.dtype
    cut = ascent.cut
    if cut is None:
        batch = first_rows(work.batch, ascent.fraction, work.microbatches, work.plan)
        found = dataclasses.replace(work, batch=batch, compute_dtype=dtype).evaluate(params)
        return found, Climb(found.grads, work.gradient)
    live = reached(cut, work, params)
    grad_fn: types.GradFn
    if work.microbatches > 1:

        def upper(p: Params, batch: Batch, key: jax.Array) -> LossOut:
            h = jax.lax.stop_gradient(cut.below(p, batch, key))
            return cut.above(p, {**batch, CARRIED: h}, key)

        batch = first_rows(work.batch, ascent.fraction, work.microbatches, work.plan)
        first = dataclasses.replace(work, objective=upper, batch=batch, compute_dtype=dtype)
        grad_fn = work.gradient
    else:
        h, grad_fn = _split(work, params, cut)
        batch = {**work.batch, CARRIED: cast({"h": jax.lax.stop_gradient(h)}, dtype)["h"]}
        batch = first_rows(batch, ascent.fraction, 1, work.plan)
        first = dataclasses.replace(work, objective=cut.above, batch=batch, compute_dtype=dtype)
    sums = first.sums(params)
    # Stacked leaves are zero below the cut already: the layers there were not run.
    grads = jax.tree.map(lambda g, on: g if on.shape or on else jnp.zeros_like(g), sums.grads, live)
    found = sums._replace(grads=grads).found(work.clip_norm)
    return found, Climb(found.grads, grad_fn, live)


def _split(work: Work, params: Params, cut: Cut) -> tuple[jax.Array, types.GradFn]:
    """Activations at the cut, and the gradient at parameters that differ above it only."""
    key = jax.random.fold_in(work.key, 0)
    compute = cast(params, work.compute_dtype)
    h, pull = jax.vjp(
        lambda p: cut.below(tree.merge(p, work.still), work.batch, key),
        compute,
    )

    def above(both: Params, batch: Batch, key: jax.Array) -> LossOut:
        whole = tree.merge(both["params"], work.still)
        return cut.above(whole, {**batch, CARRIED: both["h"]}, key)

    def grad_fn(there: Params) -> Params:
        sums = accumulate(
            above, {"params": there, "h": h}, {}, work.batch, work.key, 1, work.compute_dtype
        )
        (lower,) = pull(sums.grads["h"])
        grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums.grads["params"], lower)
        return clipped(grads, optax.global_norm(grads), work.clip_norm)

    return h, grad_fn


def first_rows(
    batch: Batch, fraction: float, microbatches: int, plan: MeshPlan | None
) -> dict[str, Any]:
    """The first rows of every device's part of every micro-batch."""
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}
    if fraction == 1:
        return arrays
    shards = 1 if plan is None else plan.data_size

    def one(value: jax.Array) -> jax.Array:
        if not value.ndim:
            return value
        own = value.shape[0] // shards
        # Micro-batch i of M holds the rows i, i + M, ...: the first k of each are the first k M.
        kept = max(1, round(fraction * own / microbatches)) * microbatches
        blocks = value.reshape(shards, own, *value.shape[1:])[:, :kept]
        rows = blocks.reshape(shards * kept, *value.shape[1:])
        if plan is None:
            return rows
        return jax.lax.with_sharding_constraint(rows, plan.rows())

    return {name: one(value) for name, value in arrays.items()}


def reached(cut: Cut, work: Work, params: Params) -> Any:
    """What a cut lets the transform perturb: see ``Climb.live``.

    Layers from ``cut.layer`` on of stacked leaves; of the others those that the part below
    does not read.

    Raises:
      ValueError: the cut is above the layers, or nothing that trains lies above it.
    """
    leaves, structure = jax.tree.flatten(params)

    def lower(flat: list[Any]) -> jax.Array:
        whole = tree.merge(jax.tree.unflatten(structure, flat), work.frozen)
        return cut.below(whole, work.batch, work.key)

    program = jax.make_jaxpr(lower)(leaves).jaxpr
    read = {id(var) for equation in program.eqns for var in equation.invars}
    read |= {id(var) for var in program.outvars}
    marks = iter([id(var) in read for var in program.invars])

    def one(path: str, leaf: Any) -> np.ndarray:
        below = next(marks)
        if not tree.is_stacked(path):
            return np.asarray(not below)
        if cut.layer >= leaf.shape[0]:
            raise ValueError(
                f"the cut is at layer {cut.layer}, but {path!r} holds {leaf.shape[0]} layers"
            )
        live = np.arange(leaf.shape[0]) >= cut.layer
        return live.reshape(-1, *(1,) * (leaf.ndim - 1))

    flags = [
        one(tree.path_of(keys), leaf)
        for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    ]
    if not any(flag.any() for flag in flags):
        raise ValueError(
            f"the cut at layer {cut.layer} leaves nothing to climb with: all that trains lies "
            "below it, or on both sides; cut lower, or climb on the whole"
        )
    return jax.tree.unflatten(structure, flags)
