"""Fisher merging: a mean of the models, every entry weighted by how much its model needs it.

  theta = sum_i c_i F_i theta_i / sum_i c_i F_i,     F_i = E_x sum_y p_i(y|x) (d log p_i(y|x))^2

on the models theta_i, not on their task vectors. 1e-6 is added to F. With normalisation
c_i = coef_i (1 / (|F_i| + 1e-6)) / sum_j 1 / (|F_j| + 1e-6), the norm being over the whole model.

Matena and Raffel, NeurIPS 2022 (arXiv 2111.09832).

Deviations: the published code back-propagates sum_batch sum_y sqrt(p_y) log p_y once, squares
the result and divides by the number of examples. That holds products of different examples and
classes and is not the Fisher; it is there as mode="shortcut". For logits of many classes or
positions mode="sampled" draws y ~ p instead of summing over it, which is unbiased. The gradients
of a regression head are those of its squared error, as in the published code. A span is two
answers, its first and its last token; each is a softmax over the tokens that the attention mask
shows, and the two are independent given x, so that their Fishers add up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from steppe.models import tree
from steppe.models.tree import Params
from steppe.train.merge import leafwise

Mode: TypeAlias = Literal["exact", "shortcut", "sampled"]
MODES = ("exact", "shortcut", "sampled")
KINDS = ("classification", "regression", "token", "span", "mlm", "lm", "seq2seq")
HIDDEN = -1e30  # a logit that cannot be chosen; minus infinity times its probability were NaN
Batch: TypeAlias = Mapping[str, Any]
# (params, batch) -> logits [B, C] or [B, T, C]; [B] of a regression head, [B, T, 2] of spans.
LogitsFn: TypeAlias = Callable[[Params, Batch], jax.Array]


def diag_fisher(
    apply_fn: LogitsFn,
    params: Params,
    batches: Iterable[Batch],
    mode: Mode = "exact",
    *,
    chunk: int = 8,
    key: jax.Array | None = None,
    kind: str | None = None,
) -> Params:
    """The diagonal of the Fisher information, averaged over the examples; float32.

    Integer and boolean leaves are left out. 256 to 2048 examples a task are usual.

    Args:
      apply_fn: gives the logits without dropout.
      params: where the gradients are taken.
      batches: dicts of arrays [B, ...]; ``label_mask`` or ``attention_mask`` [B, T] says which
        positions of [B, T, C] logits count; ``labels`` [B] are read for logits [B] only. Of an
        encoder-decoder ``attention_mask`` is about other positions: there it is ``label_mask``,
        ``decoder_attention_mask``, or ``labels`` [B, U] >= 0.
      mode: "exact", or the published "shortcut", or "sampled".
      chunk: examples whose gradients are in memory at once, but for the shortcut.
      key: of the samples; default ``jax.random.key(0)``.
      kind: of the task, one of ``KINDS``. Needed for "span" and "seq2seq", whose logits look
        like those of token classes; the others are told by the logits' shape.

    Raises:
      ValueError: an unknown mode or kind, chunk < 1, no batch, a regression batch without
        labels, or logits that are not of a span though ``kind`` says so.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
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
        part = _squares(
            live, rest, arrays, draw, apply_fn=apply_fn, mode=mode, chunk=chunk,
            kind=kind if kind in ("span", "seq2seq") else None,
        )  # fmt: skip
        total = part if total is None else jax.tree.map(jnp.add, total, part)
        examples += next(iter(arrays.values())).shape[0]
    if total is None or examples == 0:
        raise ValueError("batches must not be empty: the Fisher information of nothing is unknown")
    return jax.tree.map(lambda leaf: leaf / examples, total)


# One program for all tasks of a network: the parameters are arguments, not constants.
@functools.partial(jax.jit, static_argnames=("apply_fn", "mode", "chunk", "kind"))
def _squares(
    live: Params,
    rest: Params,
    batch: Batch,
    key: jax.Array,
    *,
    apply_fn: LogitsFn,
    mode: str,
    chunk: int,
    kind: str | None,
) -> Params:
    def logits(p: Params, part: Batch) -> jax.Array:
        found = apply_fn(tree.merge(p, rest), part).astype(jnp.float32)
        return _ends(found, part) if kind == "span" else found

    if mode == "shortcut":
        grads = jax.grad(lambda p: _shortcut(logits(p, batch), batch, kind))(live)
        return jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)), grads)
    return _per_sample(logits, live, batch, chunk, key if mode == "sampled" else None, kind)


def _ends(logits: jax.Array, batch: Batch) -> jax.Array:
    """Span logits [B, T, 2] as two choices of a token, [B, 2, T]."""
    if logits.ndim != 3 or logits.shape[-1] != 2:
        raise ValueError(
            f"kind='span' needs logits [B, T, 2] of first and last tokens, got {logits.shape}"
        )
    ends = jnp.swapaxes(logits, 1, 2)
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != logits.shape[:2]:
        return ends
    return jnp.where(mask[:, None, :] != 0, ends, HIDDEN)


def _shortcut(logits: jax.Array, batch: Batch, kind: str | None) -> jax.Array:
    if logits.ndim == 1:
        return _error(logits, batch).mean()
    logs = jax.nn.log_softmax(logits)
    root = jnp.sqrt(jax.lax.stop_gradient(jnp.exp(logs)))
    return ((root * logs).sum(-1) * _positions(logits, batch, kind)).sum()


def _error(logits: jax.Array, batch: Batch) -> jax.Array:
    if "labels" not in batch:
        raise ValueError("a regression head needs the batch's labels: its gradients are of errors")
    return jnp.square(logits - batch["labels"].astype(jnp.float32))


def _positions(logits: jax.Array, batch: Batch, kind: str | None) -> jax.Array:
    """1 where logits count, shaped like them but for the classes."""
    masks = {name: batch.get(name) for name in ("label_mask", "attention_mask")}
    if kind == "seq2seq":
        labels = batch.get("labels")
        masks["attention_mask"] = batch.get("decoder_attention_mask")
        masks["labels"] = None if labels is None else labels >= 0
    if logits.ndim == 3 and kind != "span":
        for mask in masks.values():
            if mask is not None and mask.shape == logits.shape[:2]:
                return mask.astype(jnp.float32)
    return jnp.ones(logits.shape[:-1], jnp.float32)


def _per_sample(
    logits_fn: LogitsFn,
    params: Params,
    batch: Batch,
    chunk: int,
    key: jax.Array | None,
    kind: str | None,
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
            return jax.nn.log_softmax(logits_fn(p, single))[0]  # [C] or [T, C]; of a span [2, T]

        logs, pull = jax.vjp(log_probs, params)
        live = _positions(logs[None], single, kind)[0][..., None]
        weights = jnp.exp(logs) * live
        if key is not None:
            # Positions are independent given x, so products between them vanish on average.
            drawn = jax.nn.one_hot(jax.random.categorical(key, logs), logs.shape[-1])
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
      ValueError: ``coef`` are not N numbers, or those that :func:`check_coef` refuses.
    """
    count = norm.shape[0]
    check_coef(coef)
    given = jnp.full(count, 1.0 / count) if coef is None else jnp.asarray(coef, jnp.float32)
    if given.shape != (count,):
        raise ValueError(f"coef must be {count} numbers, one a model, got shape {given.shape}")
    if not normalize:
        return given
    inverse = 1.0 / (norm + eps)
    return given * inverse / inverse.sum()


def check_coef(coef: Any) -> None:
    """
    Raises:
      ValueError: a coefficient that is negative or not finite, or a sum that is not > 0: the
        merge would divide by 0, or leave what lies between the models. Traced ones are not
        looked at.
    """
    if coef is None or any(isinstance(c, jax.core.Tracer) for c in jax.tree.leaves(coef)):
        return
    values = np.asarray(coef, np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0):
        raise ValueError(
            f"coef must be finite numbers >= 0 with a sum > 0, got {tuple(values.ravel().tolist())}"
        )


def _check_diagonal(number: int, flat: Mapping[str, Any]) -> None:
    """
    Raises:
      ValueError: an entry that is negative or not finite (names it); traced leaves are not
        looked at.
    """
    for path, leaf in flat.items():
        if isinstance(leaf, jax.core.Tracer) or leaf.size == 0:
            continue
        with jax.ensure_compile_time_eval():  # known values may stand inside a traced function
            least, most = float(jnp.min(leaf)), float(jnp.max(leaf))  # NaN if one entry is
        if not 0 <= least <= most < np.inf:
            raise ValueError(
                f"Fisher {number} at {path!r} must be finite and >= 0 to be a Fisher diagonal, "
                f"got values from {least:g} to {most:g}"
            )


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
      coef: N coefficients >= 0, not all 0; default 1/N each.
      normalize: divide every Fisher by its norm over the model.
      eps: added to every Fisher entry and to the norms.

    Raises:
      ValueError: as many models and Fishers are not given, structures differ; a Fisher with an
        entry that is negative or not finite; ``coef`` out of range.
    """
    leafwise.check_models(thetas)
    if len(fishers) != len(thetas):
        raise ValueError(f"there must be one Fisher a model: {len(thetas)}, got {len(fishers)}")
    flats = [tree.flatten(fisher) for fisher in fishers]
    for number, flat in enumerate(flats):
        for path in flats[0]:
            if path not in flat or flat[path].shape != flats[0][path].shape:
                raise ValueError(f"Fisher {number} differs from Fisher 0 at {path!r}")
        _check_diagonal(number, flat)
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
