"""Feature distillation of encoders: hidden states, attention maps, and relations of tokens.

For pairs (i, j) of a student's and a teacher's layer, over the real tokens t of a batch:

  hidden     sum_t m_t |h_S^i W_i - h_T^j|^2 / D_T          W_i learnt; none for equal widths
  attention  sum_t m_t mean_heads KL(A_T^j[t] || A_S^i[t])  A = softmax(Q K^T / sqrt(d) + mask)
  relation   the same of R_X = softmax(X X^T / sqrt(d_r)),  X = Q, K, V cut into A_r heads

Hidden states 0..L are the embeddings and the outputs of the layers; layers of attention and
relation count from 0. Relations need neither equal widths nor equal numbers of heads.

Romero et al., ICLR 2015 (arXiv 1412.6550); Jiao et al., Findings of EMNLP 2020 (TinyBERT,
1909.10351); Wang et al., Findings of ACL 2021 (MiniLMv2, 2012.15828).

Deviations: attention is compared by the KL of MiniLM (Wang et al. 2020, 2002.10957), where
TinyBERT takes the squared error of the scores. Sums over tokens, not means within a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from steppe.models.encoder import EncoderConfig, relative_buckets
from steppe.models.model import Model
from steppe.train.distill.divergences import kl
from steppe.train.distill.pairs import EXTRA, TeacherLike, parameters
from steppe.train.types import Batch, LossOut, Objective, Params

LayerMap = Sequence[tuple[int, int]]
RELATIONS = ("q", "k", "v")
PROJECTIONS = "projections"


def even_map(student: int, teacher: int, *, start: int = 0) -> tuple[tuple[int, int], ...]:
    """Layer i of ``student`` with layer i * teacher / student, the embeddings with each other.

    Args:
      student, teacher: numbers of layers; the first must divide the second.
      start: 1 leaves the embeddings (0, 0) out.

    Raises:
      ValueError: numbers that do not divide.
    """
    if student < 1 or teacher % student:
        raise ValueError(
            f"the teacher's layers must be a multiple of the student's, got {teacher} and "
            f"{student}: write the pairs (student's, teacher's) by hand"
        )
    step = teacher // student
    return tuple((i, i * step) for i in range(start, student + 1))


def projections(
    student: Model, teacher: Model, layer_map: LayerMap
) -> Callable[[jax.Array], Params]:
    """``(key) -> {"projections": {"3": [D_S, D_T]}}``, for ``with_teacher(..., extra=...)``."""
    shape = (student.config.width, teacher.config.width)

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(layer_map))
        scale = 1 / math.sqrt(shape[0])
        made = {
            str(i): scale * jax.random.normal(k, shape)
            for (i, _), k in zip(layer_map, keys, strict=True)
        }
        return {PROJECTIONS: made}

    return init


def hidden(
    student: Model,
    teacher: TeacherLike,
    layer_map: LayerMap,
    *,
    project: Callable[[Params], Mapping[str, Any]] | None = None,
) -> Objective:
    """Squared error of hidden states, averaged over the width; weight = real tokens * pairs.

    Args:
      layer_map: pairs (student's, teacher's) of hidden states, 0 = the embeddings.
      project: parameters -> ``{str(i): W_i}``; default: ``params["extra"]["projections"]``
        where there is one (see :func:`projections`), none otherwise.

    Raises:
      ValueError: a layer that a model has not, widths that differ without a projection.
    """
    _check_map(layer_map, student, teacher.model)

    def objective(params: Params, batch: Batch, key: Any) -> LossOut:
        (h_s, h_t), _ = _states(student, teacher, params, batch, key)
        matrices = _matrices(params) if project is None else project(params)
        mask = _tokens(batch, h_s)
        total = jnp.float32(0)
        for i, j in layer_map:
            own, other = h_s[i].astype(jnp.float32), h_t[j].astype(jnp.float32)
            if str(i) in matrices:
                own = own @ matrices[str(i)].astype(jnp.float32)
            if own.shape != other.shape:
                raise ValueError(
                    f"hidden state {i} of the student has width {own.shape[-1]} here, {j} of the "
                    f"teacher {other.shape[-1]}: give extra=projections(...) to with_teacher"
                )
            error = ((own - other) ** 2).mean(-1)
            total += jnp.where(mask > 0, error * mask, 0.0).sum()
        return LossOut(total, mask.sum() * len(layer_map))

    return objective


def attention(student: Model, teacher: TeacherLike, layer_map: LayerMap) -> Objective:
    """KL between attention maps, mean over heads; weight = real tokens * pairs. For encoders.

    Args:
      layer_map: pairs (student's, teacher's) of layers, counted from 0.

    Raises:
      ValueError: models that are no encoders or have different numbers of heads; a layer that a
        model has not; parameters under an overlay.
    """
    _check_map(layer_map, student, teacher.model, last=-1)
    heads = [_encoder(m).heads for m in (student, teacher.model)]
    if heads[0] != heads[1]:
        raise ValueError(
            f"the student has {heads[0]} heads and the teacher {heads[1]}: attention maps cannot "
            "be paired; use relation, which cuts both into the same number"
        )

    def objective(params: Params, batch: Batch, key: Any) -> LossOut:
        states, trees = _states(student, teacher, params, batch, key)
        mask = _tokens(batch, states[0])
        models = (student, teacher.model)
        total = jnp.float32(0)
        for layers in layer_map:
            log_q, log_p = (
                _attention(model, tree, h[layer], layer, batch)
                for model, tree, h, layer in zip(models, trees, states, layers, strict=True)
            )
            total += _summed(log_p, log_q, mask)
        return LossOut(total, mask.sum() * len(layer_map))

    return objective


def relation(
    student: Model,
    teacher: TeacherLike,
    *,
    layers: tuple[int, int] | None = None,
    heads: int = 48,
    of: Sequence[str] = RELATIONS,
) -> Objective:
    """KL between self-relations of queries, keys and values; weight = real tokens * relations.

    Args:
      layers: (student's, teacher's) layer, counted from 0; None = the last ones.
      heads: A_r, into which the widths are cut; must divide both.
      of: which relations, of "q", "k", "v".

    Raises:
      ValueError: models that are no encoders, a width that heads do not divide, an unknown
        relation; parameters under an overlay.
    """
    models = (student, teacher.model)
    widths = [_encoder(m).width for m in models]
    if heads < 1 or any(width % heads for width in widths):
        raise ValueError(f"heads must divide the widths {widths[0]} and {widths[1]}, got {heads}")
    if not of or not set(of) <= set(RELATIONS):
        raise ValueError(f"of must name relations out of {', '.join(RELATIONS)}, got {tuple(of)}")
    chosen = layers or (student.config.layers - 1, teacher.model.config.layers - 1)
    _check_map([chosen], *models, last=-1)

    def objective(params: Params, batch: Batch, key: Any) -> LossOut:
        states, trees = _states(student, teacher, params, batch, key)
        mask = _tokens(batch, states[0])

        def log_relation(side: int, name: str) -> jax.Array:
            layer = chosen[side]
            x = _cut(_projected(trees[side], states[side][layer], layer, name), heads)
            return _log_softmax(jnp.einsum("bthd,bshd->bhts", x, x), x.shape[-1], mask)

        total = sum(
            (_summed(log_relation(1, name), log_relation(0, name), mask) for name in of),
            jnp.float32(0),
        )
        return LossOut(total, mask.sum() * len(of))

    return objective


# Parts ---------------------------------------------------------------------------------------


def _states(
    student: Model, teacher: TeacherLike, params: Params, batch: Batch, key: Any
) -> tuple[Any, Any]:
    """Hidden states [L + 1, B, T, D] of (student, teacher), and their parameters."""
    own, other = parameters(params, teacher)
    h_s = student.apply(own, batch, rng=key, train=key is not None, all_hidden=True).hidden
    h_t = teacher.model.apply(other, batch, train=False, all_hidden=True).hidden
    return (h_s, jax.lax.stop_gradient(h_t)), (own, other)


def _attention(model: Model, params: Params, h: jax.Array, layer: int, batch: Batch) -> jax.Array:
    """Log attention probabilities [B, H, T, T] of a layer whose input is ``h``."""
    c = _encoder(model)
    q, k = (_cut(_projected(params, h, layer, name), c.heads) for name in ("q", "k"))
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    bias = None
    if c.relative_buckets:
        table = params["relative"]["table"].astype(jnp.float32)
        buckets = relative_buckets(h.shape[1], c.relative_buckets, c.relative_distance)
        bias = jnp.take(table, buckets, axis=0).transpose(2, 0, 1)[None]
    return _log_softmax(scores, q.shape[-1], _tokens(batch, h[None]), bias)


def _projected(params: Params, h: jax.Array, layer: int, name: str) -> jax.Array:
    if "overlay" in params:
        raise ValueError(
            "attention and relation read the projections of the base, which an overlay changes: "
            "distil the student without overlay, or use hidden"
        )
    p = params["layers"]["attn"][name]
    y = h.astype(jnp.float32) @ p["kernel"][layer].astype(jnp.float32)
    return y + p["bias"][layer].astype(jnp.float32)


def _cut(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], heads, -1)


def _log_softmax(
    scores: jax.Array, dim: int, mask: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    scores = scores / math.sqrt(dim)
    scores = scores if bias is None else scores + bias
    # A row of padding only sees itself whole, so that its (uncounted) numbers are numbers.
    seen = (mask > 0) | ~(mask > 0).any(1, keepdims=True)
    return jax.nn.log_softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)


def _summed(log_p: jax.Array, log_q: jax.Array, mask: jax.Array) -> jax.Array:
    log_p = jax.lax.stop_gradient(log_p)
    value = kl(jnp.exp(log_p), log_p, log_q).mean(1)
    return jnp.where(mask > 0, value * mask, 0.0).sum()


def _tokens(batch: Batch, h: jax.Array) -> jax.Array:
    """float32 [B, T], 1 at real tokens."""
    given = batch.get("attention_mask")
    if given is None:
        return jnp.ones(h.shape[1:3], jnp.float32)
    if given.ndim != 2:
        raise ValueError(
            f"features need an attention_mask [batch, tokens], got shape {tuple(given.shape)}"
        )
    return (jnp.asarray(given) != 0).astype(jnp.float32)


def _matrices(params: Params) -> Mapping[str, Any]:
    found: Mapping[str, Any] = params.get(EXTRA, {}).get(PROJECTIONS, {})
    return found


def _encoder(model: Model) -> EncoderConfig:
    if not isinstance(model.config, EncoderConfig):
        raise ValueError(
            f"attention and relation are for encoders, got a {type(model.config).__name__}: use "
            "hidden"
        )
    return model.config


def _check_map(layer_map: LayerMap, student: Model, teacher: Model, *, last: int = 0) -> None:
    if not layer_map:
        raise ValueError("layer_map must hold at least one pair (student's, teacher's), got none")
    for pair in layer_map:
        for layer, model, name in zip(
            pair, (student, teacher), ("student", "teacher"), strict=True
        ):
            most = model.config.layers + last
            if not 0 <= layer <= most:
                raise ValueError(
                    f"layer_map names layer {layer} of the {name}, which has 0..{most}"
                )
