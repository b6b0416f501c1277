"""Fisher merging: a mean of the models, every entry weighted by how much its model needs it.

  theta = sum_i c_i F_i theta_i / sum_i c_i F_i,     F_i = E_x sum_y p_i(y|x) (d log p_i(y|x))^2

on the models theta_i, not on their task vectors. 1e-6 is added to F. With normalisation
c_i = coef_i (1 / (|F_i| + 1e-6)) / sum_j 1 / (|F_j| + 1e-6), the norm being over the whole model.

Matena and Raffel, NeurIPS 2022 (arXiv 2111.09832).

Deviations: the published code back-propagates sum_batch sum_y sqrt(p_y) log p_y once, squares
the result and divides by the number of examples. That holds products of different examples and
classes and is not the Fisher; it is there as mode="shortcut". For logits of many classes or
positions mode="sampled" draws y ~ p instead of summing over it, which is unbiased. The gradients
of a regression head are those of its squared error, as in the published code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.models.tree import Params
from steppe.train.merge import leafwise

Mode: TypeAlias = Literal["exact", "shortcut", "sampled"]
MODES = ("exact", "shortcut", "sampled")
Batch: TypeAlias = Mapping[str, Any]
# (params, batch) -> logits [B, C] or [B, T, C]; [B] of a regression head.
LogitsFn: TypeAlias = Callable[[Params, Batch], jax.Array]


def diag_fisher(
    apply_fn: LogitsFn,
    params: Params,
    batches: Iterable[Batch],
    mode: Mode = "exact",
    *,
    chunk: int = 8,
    key: jax.Array | None = None,
) -> Params:
    """The diagonal of the Fisher information, averaged over the examples; float32.

    Integer and boolean leaves are left out. 256 to 2048 examples a task are usual.

    Args:
      apply_fn: gives the logits without dropout.
      params: where the gradients are taken.
      batches: dicts of arrays [B, ...]; ``label_mask`` or ``attention_mask`` [B, T] says which
        positions of [B, T, C] logits count; ``labels`` [B] are read for logits [B] only.
      mode: "exact", or the published "shortcut", or "sampled".
      chunk: examples whose gradients are in memory at once, but for the shortcut.
      key: of the samples; default ``jax.random.key(0)``.

    Raises:
      ValueError: an unknown mode, chunk < 1, no batch, or a regression batch without labels.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}")
    flat = tree.flatten(params)
    live = tree.unflatten({p: x for p, x in flat.items() if leafwise.mergeable(x)})
    rest = tree.unflatten({p: x for p, x in flat.items() if not leafwise.mergeable(x)})
    key = jax.random.key(0) if key is None else key

    total, examples = None, 0
    for number, batch in enumerate(batches):
        arrays = {name: jnp.asarray(value) for name, value in batch.items()}
        draw = jax.random.fold_in(key, number)
        part = _squares(live, rest, arrays, draw, apply_fn=apply_fn, mode=mode, chunk=chunk)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
        examples += next(iter(arrays.values())).shape[0]
    if total is None or examples == 0:
        raise ValueError("batches must not be empty: the Fisher information of nothing is unknown")
    return jax.tree.map(lambda leaf: leaf / examples, total)


# One program for all tasks of a network: the parameters are arguments, not constants.
@functools.partial(jax.jit, static_argnames=("apply_fn", "mode", "chunk"))
def _squares(
    live: Params,
    rest: Params,
    batch: Batch,
    key: jax.Array,
    *,
    apply_fn: LogitsFn,
    mode: str,
    chunk: int,
) -> Params:
    def logits(p: Params, part: Batch) -> jax.Array:
        return apply_fn(tree.merge(p, rest), part).astype(jnp.float32)

    if mode == "shortcut":
        grads = jax.grad(lambda p: _shortcut(logits(p, batch), batch))(live)
        return jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)), grads)
    return _per_sample(logits, live, batch, chunk, key if mode == "sampled" else None)


def _shortcut(logits: jax.Array, batch: Batch) -> jax.Array:
    if logits.ndim == 1:
        return _error(logits, batch).mean()
    logs = jax.nn.log_softmax(logits)
    root = jnp.sqrt(jax.lax.stop_gradient(jnp.exp(logs)))
    return ((root * logs).sum(-1) * _positions(logits, batch)).sum()


def _error(logits: jax.Array, batch: Batch) -> jax.Array:
    if "labels" not in batch:
        raise ValueError("a regression head needs the batch's labels: its gradients are of errors")
    return jnp.square(logits - batch["labels"].astype(jnp.float32))


def _positions(logits: jax.Array, batch: Batch) -> jax.Array:
    """1 where logits count, shaped like them but for the classes."""
    if logits.ndim == 3:
        for name in ("label_mask", "attention_mask"):
            mask = batch.get(name)
            if mask is not None and mask.shape == logits.shape[:2]:
                return mask.astype(jnp.float32)
    return jnp.ones(logits.shape[:-1], jnp.float32)


def _per_sample(
    logits_fn: LogitsFn, params: Params, batch: Batch, chunk: int, key: jax.Array | None
) -> Params:
    """Sum over the batch of the squared gradients of single examples."""
    rows = next(iter(batch.values())).shape[0]
    size = max(n for n in range(1, min(chunk, rows) + 1) if rows % n == 0)

    def one(example: Batch, key: jax.Array | None) -> Params:
        single = {name: value[None] for name, value in example.items()}
        if jax.eval_shape(logits_fn, params, single).ndim == 1:
            grads = jax.grad(lambda p: _error(logits_fn(p, single), single)[0])(params)
            return _square(grads, 1.0)

        def log_probs(p: Params) -> jax.Array:
            return jax.nn.log_softmax(logits_fn(p, single))[0]  # [C] or [T, C]

        logs, pull = jax.vjp(log_probs, params)
        weights = jnp.exp(logs) * _positions(logs[None], single)[0][..., None]
        if key is not None:
            # Positions are independent given x, so products between them vanish on average.
            drawn = jax.nn.one_hot(jax.random.categorical(key, logs), logs.shape[-1])
            live = _positions(logs[None], single)[0][..., None]
            return _square(pull((drawn * live).astype(logs.dtype))[0], 1.0)

        def add(total: Params, place: jax.Array) -> tuple[Params, None]:
            unit = jnp.zeros(logs.size, logs.dtype).at[place].set(1.0).reshape(logs.shape)
            part = _square(pull(unit)[0], weights.reshape(-1)[place])
            return jax.tree.map(jnp.add, total, part), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return jax.lax.scan(add, zeros, jnp.arange(logs.size))[0]

    def some(total: Params, part: tuple[Batch, jax.Array | None]) -> tuple[Params, None]:
        each = jax.vmap(one, in_axes=(0, None if key is None else 0))(*part)
        return jax.tree.map(lambda t, e: t + e.sum(0), total, each), None

    pieces = {n: v.reshape(rows // size, size, *v.shape[1:]) for n, v in batch.items()}
    keys = None if key is None else jax.random.split(key, (rows // size, size))
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    return jax.lax.scan(some, zeros, (pieces, keys))[0]


def _square(grads: Params, weight: Any) -> Params:
    return jax.tree.map(lambda g: weight * jnp.square(g.astype(jnp.float32)), grads)


def norms(fishers: Sequence[Mapping[str, Any]]) -> jax.Array:
    """The L2 norm of every Fisher diagonal over the whole model, float32 [N]."""
    sums = [
        sum(
            (jnp.sum(jnp.square(x.astype(jnp.float32))) for x in tree.flatten(f).values()),
            jnp.float32(0),
        )
        for f in fishers
    ]
    return jnp.sqrt(jnp.stack(sums))


def coefficients(norm: jax.Array, coef: Any, normalize: bool, eps: float) -> jax.Array:
    """c_i of the formula above, [N].

    Raises:
      ValueError: ``coef`` are not N numbers.
    """
    count = norm.shape[0]
    given = jnp.full(count, 1.0 / count) if coef is None else jnp.asarray(coef, jnp.float32)
    if given.shape != (count,):
        raise ValueError(f"coef must be {count} numbers, one a model, got shape {given.shape}")
    if not normalize:
        return given
    inverse = 1.0 / (norm + eps)
    return given * inverse / inverse.sum()


def fisher_merge(
    thetas: Sequence[Mapping[str, Any]],
    fishers: Sequence[Mapping[str, Any]],
    coef: Any = None,
    normalize: bool = True,
    eps: float = 1e-6,
) -> Params:
    """The Fisher-weighted mean of the models.

    Args:
      thetas: N models of one structure.
      fishers: N diagonals with the paths of the floating-point leaves; non-negative. A leaf
        that they lack is averaged by c_i alone.
      coef: N coefficients; default 1/N each.
      normalize: divide every Fisher by its norm over the model.
      eps: added to every Fisher entry and to the norms.

    Raises:
      ValueError: as many models and Fishers are not given, structures differ.
    """
    leafwise.check_models(thetas)
    if len(fishers) != len(thetas):
        raise ValueError(f"there must be one Fisher a model: {len(thetas)}, got {len(fishers)}")
    flats = [tree.flatten(fisher) for fisher in fishers]
    for number, flat in enumerate(flats):
        for path in flats[0]:
            if path not in flat or flat[path].shape != flats[0][path].shape:
                raise ValueError(f"Fisher {number} differs from Fisher 0 at {path!r}")
    c = leafwise.rows(coefficients(norms(fishers), coef, normalize, eps))

    def one(path: str, *leaves: Any) -> Any:
        if not leafwise.mergeable(leaves[0]):
            return leaves[0]
        known = path in flats[0]
        if known and flats[0][path].shape != leaves[0].shape:
            raise ValueError(
                f"the Fishers at {path!r} have shape {flats[0][path].shape}, "
                f"the models {leaves[0].shape}"
            )
        weights = [
            ci * (flat[path].astype(jnp.float32) + eps if known else 1.0)
            for ci, flat in zip(c, flats)
        ]
        whole = leafwise.total([jnp.asarray(w) for w in weights])
        return (leafwise.total(leaves, weights) / whole).astype(leaves[0].dtype)

    return tree.map_with_path(one, *thetas)
