"""KID: the student's own mistakes, imitated by one parallel pass, as the text to distil on.

  M   = ceil(alpha n) of the n output positions of a row; its tokens are replaced by BOS
  y'  = argmax of the student's logits at t - 1 for t in M, the gold token elsewhere
  L   = mean_t KL(q(. | x, y'_<t) || p(. | x, y'_<t)) + mean_t -log q(y_t | x, y'_<t)

y' is made anew for every batch, without gradient and without dropout; both models read y', the
targets stay gold. Costs one more forward pass of the student in place of a generation.

Zhong et al., Findings of EMNLP 2024 (arXiv 2410.11371).

Deviations: no code is published to compare with. Where the paper is silent, here n counts the
tokens that may be masked (labelled, not an end token, not the row's first token); the fills
are the most probable tokens; the likelihood is taken under y' (``mle_context="clean"``: under
the gold text, one more pass) and has the weight 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from steppe.models.model import Model
from steppe.train.distill import chunked
from steppe.train.distill.divergences import fraction, masked_token_sum
from steppe.train.distill.kd import Measure, Rewrite
from steppe.train.distill.pairs import (
    STUDENT,
    Pair,
    TeacherLike,
    require_logits,
    shards_of,
)
from steppe.train.distill.readout import readout_of
from steppe.train.types import Batch, LossOut, Objective, Params

STRATEGIES = ("random", "uniform", "hard", "easy")
CONTEXTS = ("imperfect", "clean")
MASK = "imperfect_mask"


def sample_mask(
    key: Any,
    valid: Bool[Array, "B T"],
    alpha: float = 0.2,
    strategy: str = "random",
    entropy: Float[Array, "B T"] | None = None,
) -> Bool[Array, "B T"]:
    """ceil(alpha n) of the n valid positions of every row, at least one; none for alpha = 0.

    Args:
      key: of "random"; the others ignore it.
      valid: positions that may be masked.
      strategy: "random"; "uniform", evenly spaced; "hard" and "easy", where ``entropy`` is
        highest and lowest.
      entropy: of the distribution that predicts the token at each position, nats.

    Raises:
      ValueError: alpha outside [0, 1], an unknown strategy, entropy that is missing.
    """
    _check(alpha, strategy)
    if strategy in ("hard", "easy") and entropy is None:
        raise ValueError(f"strategy={strategy!r} needs entropy, [B, T] of the student in nats")
    valid = jnp.asarray(valid).astype(bool)
    n = valid.sum(1, keepdims=True)
    # A product that float32 puts just above a whole number must not become the next one.
    count = jnp.maximum(jnp.ceil(alpha * n - 1e-4).astype(jnp.int32), int(alpha > 0))
    if strategy == "uniform":
        place = jnp.cumsum(valid, axis=1) - 1
        # (place * count) mod n runs over 0..n-1 and falls below count exactly count times.
        turn = (place * count + n // 2) % jnp.maximum(n, 1)
        return valid & (turn < count)
    if strategy == "random":
        score = jax.random.uniform(key, valid.shape)
    else:
        assert entropy is not None
        score = -entropy if strategy == "hard" else entropy
    order = jnp.argsort(jnp.where(valid, score, jnp.inf), axis=1)
    rank = jnp.argsort(order, axis=1)
    return valid & (rank < count)


def rewrite(
    student_logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Int[Array, "B T"]:
    """``tokens`` with those of ``mask`` replaced by what the logits one position before say."""
    return _filled(jnp.argmax(student_logits, axis=-1), tokens, mask)


def _filled(best: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    # Position 0 is predicted by nothing; roll would give it the last column.
    mask = mask & (jnp.arange(tokens.shape[1]) > 0)
    return jnp.where(mask, jnp.roll(best, 1, axis=1).astype(tokens.dtype), tokens)


def maskable(batch: Batch, eos_id: int | Sequence[int] | None) -> jax.Array:
    """bool [B, T]: labelled tokens but the first of a row and those that end a text."""
    ids = jnp.asarray(batch["input_ids"])
    labels = jnp.asarray(batch["labels"])
    valid = labels >= 0
    if batch.get("label_mask") is not None:
        valid = valid & (jnp.asarray(batch["label_mask"]) > 0)
    ends = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    for end in ends:
        valid = valid & (ids != end)
    return valid & (jnp.arange(ids.shape[1]) > 0)


def imperfect(
    student: Model,
    *,
    bos_id: int,
    eos_id: int | Sequence[int] | None,
    alpha: float = 0.2,
    strategy: str = "random",
    fill: bool = True,
    vocab: int | None = None,
    vocab_chunk: int | None = None,
    shards: int | None = None,
) -> Rewrite:
    """The policy "imperfect": ``(params, batch, key) -> batch`` whose ``input_ids`` are y'.

    Labels and masks stay those of the batch; ``imperfect_mask`` says which tokens were masked.

    Args:
      student: a causal language model, whose labels are its inputs.
      bos_id: the token that stands for a masked one.
      eos_id: tokens that end a text, which are never masked; None = there are none.
      alpha, strategy: see :func:`sample_mask`.
      fill: False leaves the masked tokens masked (the ablation "masking-only").
      vocab: ids from here on are padding of the vocabulary, and never chosen.
      vocab_chunk, shards: as in ``kd``.

    Raises:
      ValueError: as :func:`sample_mask`; a bos_id that the student does not know.
    """
    _check(alpha, strategy)
    known = getattr(student.config, "vocab_size", None)
    if bos_id < 0 or (known is not None and bos_id >= known):
        raise ValueError(
            f"bos_id must be a token of the student, 0..{(known or 0) - 1}, got {bos_id}"
        )

    def best(params: Params, batch: Batch) -> jax.Array:
        """The student's most probable next token at every position."""
        out = student.apply(params, batch, train=False)
        length = jnp.shape(batch["input_ids"])[1]
        if vocab_chunk is None:
            z = require_logits(out, STUDENT)[..., :vocab]
            return jnp.argmax(z, axis=-1)
        readout = readout_of(student, params).cut(vocab)
        h = out.hidden[:, -length:]
        _, ids = chunked.largest(
            h.reshape(-1, h.shape[-1]),
            readout,
            1,
            vocab_chunk=vocab_chunk,
            shards=shards_of(readout.size, shards),
        )
        return ids.reshape(h.shape[:-1])

    def spread(params: Params, batch: Batch) -> jax.Array:
        """Entropy of the distribution that predicts each token."""
        z = require_logits(student.apply(params, batch, train=False), STUDENT)[..., :vocab]
        log_q = jax.nn.log_softmax(z, axis=-1)
        return jnp.roll(-(jnp.exp(log_q) * log_q).sum(-1), 1, axis=1)

    def policy(params: Params, batch: Batch, key: Any) -> Batch:
        own = jax.lax.stop_gradient(params.get(STUDENT, params))
        # Evaluation has no key; its masks are the same in every pass.
        key = jax.random.key(0) if key is None else jax.random.fold_in(key, 1)
        ids = jnp.asarray(batch["input_ids"])
        entropy = spread(own, batch) if strategy in ("hard", "easy") else None
        mask = sample_mask(key, maskable(batch, eos_id), alpha, strategy, entropy)
        new = jnp.where(mask, jnp.asarray(bos_id, ids.dtype), ids)
        if fill and alpha > 0:
            new = _filled(best(own, {**batch, "input_ids": new}), ids, mask)
        return {**batch, "input_ids": jax.lax.stop_gradient(new), MASK: mask}

    return policy


def kid(
    student: Model,
    teacher: TeacherLike,
    *,
    bos_id: int,
    eos_id: int | Sequence[int] | None,
    alpha: float = 0.2,
    strategy: str = "random",
    fill: bool = True,
    kind: str = "reverse_kl",
    mle: float = 1.0,
    mle_context: str = "imperfect",
    vocab: int | None = None,
    vocab_chunk: int | None = None,
    shards: int | None = None,
) -> Objective:
    """KID as an objective with the components ``kd`` and ``mle``, over all labelled positions.

    aux: ``wrong``, the share of the masked tokens whose fill is not the gold token.

    Args:
      student, teacher: causal language models over one vocabulary.
      bos_id, eos_id, alpha, strategy, fill: as in :func:`imperfect`.
      kind: the divergence; the paper's is the reverse KL.
      mle: coefficient of the likelihood, >= 0; 0 leaves it out.
      mle_context: "imperfect" or "clean", see the module.
      vocab, vocab_chunk, shards: as in ``kd``.

    Raises:
      ValueError: as :func:`imperfect` and ``kd``; an unknown context, a negative coefficient.
    """
    if mle_context not in CONTEXTS:
        raise ValueError(f"mle_context must be one of {', '.join(CONTEXTS)}, got {mle_context!r}")
    if not 0 <= mle < float("inf"):
        raise ValueError(f"mle must be a finite number >= 0, got {mle!r}")
    sizes: dict[str, Any] = {"vocab": vocab, "vocab_chunk": vocab_chunk, "shards": shards}
    policy = imperfect(
        student,
        bos_id=bos_id,
        eos_id=eos_id,
        alpha=alpha,
        strategy=strategy,
        fill=fill,
        **sizes,
    )
    measure = Measure(
        Pair(student, teacher, True, vocab), kind, vocab_chunk=vocab_chunk, shards=shards
    )

    def objective(params: Params, batch: Batch, key: Any) -> LossOut:
        new = policy(params, batch, key)
        same = mle > 0 and mle_context == "imperfect"
        found = measure(params, new, key, nll=same)
        total, weight = masked_token_sum(found.divergence, found.mask)
        masked = new[MASK].astype(jnp.float32)
        wrong = masked * (new["input_ids"] != jnp.asarray(batch["input_ids"]))
        aux = {"wrong": (wrong.sum(), masked.sum())}
        if mle == 0:
            return LossOut({"kd": total}, {"kd": weight}, aux)
        nll = found.nll if same else measure.nll(params, batch, key).nll
        loss = masked_token_sum(nll, found.mask)[0]
        return LossOut({"kd": total, "mle": mle * loss}, {"kd": weight, "mle": weight}, aux)

    return objective


def _check(alpha: float, strategy: str) -> None:
    fraction(alpha, "alpha")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
