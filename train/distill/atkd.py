"""ATKD: adaptive teaching, which weighs two parts of the KL by how unsure the teacher is.

At a position with label y, and with p^, q^ the distributions without y, renormalised:

  UNC  = 1 - p_y
  TKD  = p_y log(p_y / q_y) + (1 - p_y) log((1 - p_y) / (1 - q_y))
  DKD  = KL(p^ || q^),                                KL(p || q) = TKD + UNC DKD
  hard = {t : UNC_t >= the (1 - k) quantile of UNC over all valid tokens},  easy = the others
  L    = lam * mean_easy DKD + (1 - lam) * mean_hard (TKD + DKD)

UNC, and with it the split, is the teacher's, a constant. With ``reverse``, p and q change
places in TKD and DKD and the gradient goes through q in both. All logarithms are in log space:
log(1 - p_y) is a log-sum-exp over the other tokens, never log1p.

Zhong et al., ACL 2024 (arXiv 2402.11890).

Deviations: the quantile is the lower one, index floor((1 - k)(n - 1)) of the sorted values, for
k = 1/2 torch's median. The first end-of-sequence token counts, as the label mask says; the
published code drops it together with the padding. It takes the logarithm of probabilities,
infinite where one underflows. Tokens with p_y below 6e-8 tie at UNC = 1. An objective sees the
rows of one micro-batch, and the threshold is theirs, unless ``with_threshold`` has put that of
the whole batch into it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steppe.models.model import Model
from steppe.train.distill import chunked
from steppe.train.distill.divergences import (
    check_logits,
    fraction,
    kl,
    masked_token_sum,
    shown,
)
from steppe.train.distill.pairs import (
    TEACHER,
    Pair,
    TeacherLike,
    aligned,
    require_logits,
    shards_of,
    targets,
)
from steppe.train.distill.readout import readout_of
from steppe.train.types import Batch, LossOut, Objective, Params

THRESHOLD = "atkd_threshold"


class KDTerms(NamedTuple):
    """The parts of the KL at every position.

    Attributes:
      tkd: between "the label" and "anything else", nats.
      dkd: between the other tokens, nats.
      unc: the teacher's 1 - p_y.
    """

    tkd: Any
    dkd: Any
    unc: Any


def kd_decompose(
    student_logits: Float[Array, "*n V"],
    teacher_logits: Float[Array, "*n V"],
    labels: Int[Array, "*n"],
    *,
    reverse: bool = False,
) -> KDTerms:
    """TKD, DKD and UNC at every position; no gradient reaches the teacher.

    Args:
      labels: y; a negative one is read as 0, for the caller to mask. Where y is no token of the
        vocabulary everything is NaN.
      reverse: of KL(q || p) instead, whose exact sum is TKD + (1 - q_y) DKD.

    Raises:
      ValueError: logits of different shapes, or that do not fit the labels.
    """
    check_logits(student_logits, teacher_logits)
    if student_logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels must have shape {student_logits.shape[:-1]}, got {tuple(labels.shape)}"
        )
    known, y = _read(labels, student_logits.shape[-1])

    def parts(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        z = z.astype(jnp.float32)
        others = jnp.where(jnp.arange(z.shape[-1]) == y, -jnp.inf, z)
        return jnp.take_along_axis(z, y, -1)[..., 0], jax.nn.logsumexp(others, axis=-1), others

    own, other = parts(student_logits), parts(jax.lax.stop_gradient(teacher_logits))
    log_q, log_p = own[2] - own[1][..., None], other[2] - other[1][..., None]
    w, v = (log_q, log_p) if reverse else (log_p, log_q)
    return _terms(own[:2], other[:2], kl(jnp.exp(w), w, v), reverse, known)


def _read(labels: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """(whether a label is not beyond the vocabulary, a token in it to read instead [..., 1])."""
    known = labels < size
    return known, jnp.where(known, jnp.maximum(labels, 0), 0)[..., None]


def _terms(own: Any, other: Any, dkd: jax.Array, reverse: bool, known: jax.Array) -> KDTerms:
    """From (logit of the label, log normaliser of the others) of student and teacher."""

    def two(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        whole = jnp.logaddexp(*pair)
        return pair[0] - whole, pair[1] - whole

    (q_y, q_rest), (p_y, p_rest) = two(own), two(other)
    unc = jnp.exp(p_rest)
    log_q, log_p = jnp.stack([q_y, q_rest], -1), jnp.stack([p_y, p_rest], -1)
    w, v = (log_q, log_p) if reverse else (log_p, log_q)
    tkd = kl(jnp.exp(w), w, v)
    # A label beyond the vocabulary must not be read as another token: NaN stops the loop.
    return KDTerms(*(jnp.where(known, x, jnp.nan) for x in (tkd, dkd, jax.lax.stop_gradient(unc))))


def decompose_pair(
    pair: Pair,
    params: Params,
    batch: Batch,
    key: Any,
    vocab_chunk: int | None = None,
    shards: int | None = None,
    reverse: bool = False,
) -> tuple[KDTerms, jax.Array]:
    """:func:`kd_decompose` of two models on a batch, and the mask; in pieces if asked to."""
    if vocab_chunk is None:
        z_s, z_t, labels, mask = pair.dense(params, batch, key)
        return kd_decompose(z_s, z_t, labels, reverse=reverse), mask
    h_s, readout_s, h_t, readout_t, labels, mask = pair.hidden(params, batch, key)
    known, y = _read(labels, readout_s.size)
    found = chunked.terms(
        "reverse_kl" if reverse else "forward_kl",
        h_s,
        readout_s,
        h_t,
        readout_t,
        exclude=y,
        vocab_chunk=vocab_chunk,
        shards=shards_of(readout_s.size, shards),
    )
    own = readout_s.of(h_s, y)[..., 0], found.log_z_s
    other = jax.lax.stop_gradient((readout_t.of(h_t, y)[..., 0], found.log_z_t))
    return _terms(own, other, found.divergence, reverse, known), mask


# The split -----------------------------------------------------------------------------------


def threshold(unc: jax.Array, valid: jax.Array, hard_ratio: float = 0.5) -> jax.Array:
    """The uncertainty from which a token is hard: a quantile over the valid tokens, scalar.

    NaN, from which on no token is hard, if the uncertainty of a valid token is.
    """
    flat, counts = unc.reshape(-1), jnp.asarray(valid).reshape(-1) > 0
    ordered = jnp.sort(jnp.where(counts, flat, jnp.inf))
    n = counts.sum()
    # A whole number that float32 puts just below itself must not fall to the one before.
    place = jnp.floor((1.0 - hard_ratio) * (n - 1) + 1e-4).astype(jnp.int32)
    found = ordered[jnp.clip(place, 0, flat.shape[0] - 1)]
    broken = (jnp.isnan(flat) & counts).any()
    return jax.lax.stop_gradient(jnp.where(broken, jnp.nan, found))


def with_threshold(
    teacher: TeacherLike,
    params: Params,
    batch: Batch,
    *,
    hard_ratio: float = 0.5,
    shift: bool = True,
    vocab: int | None = None,
    vocab_chunk: int | None = None,
    shards: int | None = None,
) -> dict[str, Any]:
    """The batch with the threshold of all its rows, for steps with micro-batches.

    One more forward pass of the teacher, without which each micro-batch is split at its own
    median. Meant to be compiled: ``jax.jit(partial(with_threshold, Teacher(model)))``.

    Args:
      params: of :func:`atkd`, or the teacher's alone.
      teacher, shift, vocab, vocab_chunk, shards, hard_ratio: as in :func:`atkd`.
    """
    own = params.get(TEACHER, params)
    labels, mask = targets(batch, shift)
    out = teacher.model.apply(own, batch, train=False)
    if vocab_chunk is None:
        z = require_logits(out, TEACHER)[..., :vocab]
        unc = kd_decompose(z, z, labels).unc
    else:
        readout = readout_of(teacher.model, own).cut(vocab)
        known, y = _read(labels, readout.size)
        h = aligned(out.hidden, labels)
        split = shards_of(readout.size, shards)
        rest = chunked.terms(
            None, h, readout, exclude=y, vocab_chunk=vocab_chunk, shards=split
        ).log_z_s
        unc = jnp.exp(rest - jnp.logaddexp(readout.of(h, y)[..., 0], rest))
        unc = jnp.where(known, unc, jnp.nan)
    return {**batch, THRESHOLD: threshold(unc, mask, hard_ratio)}


def atkd_loss(
    student_logits: Float[Array, "*n V"],
    teacher_logits: Float[Array, "*n V"],
    labels: Int[Array, "*n"],
    valid: Any,
    *,
    lam: float = 0.2,
    hard_ratio: float = 0.5,
    reverse: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss as one number, with ``easy``, ``hard``, ``unc`` and ``threshold`` beside it.

    Args:
      labels, valid: already where the logits that answer for them stand.
      lam: share of the easy tokens.
      hard_ratio: k, the share of tokens that are hard, in [0, 1].
      reverse: see the module.
      axis_name: mesh axes of a surrounding ``shard_map`` over which threshold and groups are
        those of all shards; every shard then returns the loss of all.

    Raises:
      ValueError: a number outside [0, 1], shapes that do not fit.
    """
    fraction(lam, "lam")
    fraction(hard_ratio, "hard_ratio")
    valid = jnp.asarray(valid).astype(jnp.float32)
    z_s, z_t = (shown(valid, z) for z in (student_logits, teacher_logits))
    found = kd_decompose(z_s, z_t, labels, reverse=reverse)
    unc, counts = found.unc, valid
    if axis_name is not None:
        unc, counts = (jax.lax.all_gather(x.reshape(-1), axis_name) for x in (unc, counts))
    limit = threshold(unc, counts, hard_ratio)
    groups = _groups(found, valid, limit)
    if axis_name is not None:
        groups = jax.tree.map(lambda x: jax.lax.psum(x, axis_name), groups)
    means = {name: total / jnp.maximum(count, 1.0) for name, (total, count) in groups.items()}
    loss = lam * means["easy"] + (1 - lam) * means["hard"]
    metrics = jax.lax.stop_gradient({**means, "threshold": limit})
    return loss, metrics


def _groups(found: KDTerms, valid: jax.Array, limit: jax.Array) -> dict[str, Any]:
    hard = found.unc >= limit
    return {
        "easy": masked_token_sum(found.dkd, jnp.where(hard, 0.0, valid)),
        "hard": masked_token_sum(found.tkd + found.dkd, jnp.where(hard, valid, 0.0)),
        "unc": masked_token_sum(found.unc, valid),
    }


def atkd(
    student: Model,
    teacher: TeacherLike,
    *,
    lam: float = 0.2,
    hard_ratio: float = 0.5,
    reverse: bool = False,
    vocab: int | None = None,
    vocab_chunk: int | None = None,
    shards: int | None = None,
    shift: bool | None = None,
    policy: Any = None,
) -> Objective:
    """ATKD as an objective with the components ``easy`` and ``hard``, each over its own tokens.

    aux: ``tkd``, ``dkd``, ``unc`` over all labelled tokens, ``hard`` the share of hard ones.

    Args:
      lam, hard_ratio, reverse: as in :func:`atkd_loss`.
      student, teacher, vocab, vocab_chunk, shards, shift, policy: as in ``kd``.

    Raises:
      ValueError: as :func:`atkd_loss` and ``kd``.
    """
    fraction(lam, "lam")
    fraction(hard_ratio, "hard_ratio")
    pair = Pair(student, teacher, shift, vocab)

    def objective(params: Params, batch: Batch, key: Any) -> LossOut:
        if policy is not None:
            batch = policy(params, batch, key)
        found, mask = decompose_pair(pair, params, batch, key, vocab_chunk, shards, reverse)
        limit = batch[THRESHOLD] if THRESHOLD in batch else threshold(found.unc, mask, hard_ratio)
        groups = _groups(found, mask, limit)
        weight = mask.sum()
        aux = {
            name: (jax.lax.stop_gradient(masked_token_sum(value, mask)[0]), weight)
            for name, value in found._asdict().items()
        }
        aux["hard"] = (groups["hard"][1], weight)
        scale = {"easy": lam, "hard": 1 - lam}
        totals = {name: share * groups[name][0] for name, share in scale.items()}
        return LossOut(totals, {name: groups[name][1] for name in scale}, aux)

    return objective
