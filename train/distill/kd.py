"""Knowledge distillation of any divergence, dense or in pieces of the vocabulary.

  L = (1 - r) sum_t m_t * -log q(y_t) + r sum_t m_t D_t(p, q),        weight = sum_t m_t

p the teacher's and q the student's next-token distribution on the same tokens, m the label mask.
Whose tokens they are is the policy's matter (see ``policies``): with the texts of the data set
this is supervised distillation (kind="forward_kl") or its reverse, with the student's own it is
GKD (jsd, any beta) and DistiLLM (a skewed kind), with half of each ImitKD (forward_kl). Where
the divergence depends on the writer it is ``fdistill``.

  decoupled:  L = alpha TKD + beta DKD           (see ``atkd`` for the two parts)

Hinton et al. 2015 (arXiv 1503.02531); Kim and Rush, EMNLP 2016 (1606.07947); Lin et al., EMNLP
2020 (2009.07253); Agarwal et al., ICLR 2024 (2306.13649); Ko et al., ICML 2024 (2402.03898);
Zhao et al., CVPR 2022 (2203.08679).

Deviations: sums over all valid tokens of the global batch, where several published codes
average within a row or a micro-batch first. T^2 is applied where ``scale_tau2`` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from steppe.models.model import Model
from steppe.train.distill import chunked, topk
from steppe.train.distill.atkd import decompose_pair
from steppe.train.distill.divergences import (
    check,
    fraction,
    masked_token_sum,
    shown,
    token_divergence,
)
from steppe.train.distill.pairs import (
    STUDENT,
    Pair,
    TeacherLike,
    aligned,
    parameters,
    require_logits,
    shards_of,
    targets,
)
from steppe.train.distill.readout import readout_of
from steppe.train.distill.rowwise import rowwise_loss
from steppe.train.objectives.basic import negative_log_likelihood
from steppe.train.types import Batch, LossOut, Objective, Params

# (params, batch, key) -> batch with the tokens to learn on; see ``policies``
Rewrite: TypeAlias = Callable[[Params, Batch, Any], Batch]


class Measured(NamedTuple):
    """What a :class:`Measure` finds at every position.

    Attributes:
      divergence: nats.
      nll: the student's -log q(y), nats; None if it was not asked for.
      mask: float32, 0 where no label counts.
    """

    divergence: Any
    nll: Any
    mask: Any


@dataclass(frozen=True)
class Measure:
    """A divergence of two models, and how it is computed; the arguments are those of :func:`kd`."""

    pair: Pair
    kind: str
    temperature: float = 1.0
    beta: float = 0.5
    alpha: float = 0.1
    top_k: int | None = None
    vocab_chunk: int | None = None
    shards: int | None = None

    def __post_init__(self) -> None:
        check(self.kind, self.temperature, self.beta, self.alpha)
        if self.top_k is not None:
            # Of a classifier the classes, and not the tokens that it reads.
            topk.check_k(self.top_k, self.pair.classes or self.top_k, "top_k")

    @property
    def _how(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "beta": self.beta, "alpha": self.alpha}

    def _sizes(self, vocabulary: int) -> dict[str, Any]:
        assert self.vocab_chunk is not None
        shards = shards_of(vocabulary, self.shards)
        return {"vocab_chunk": self.vocab_chunk, "shards": shards}

    def __call__(self, params: Params, batch: Batch, key: Any, *, nll: bool = False) -> Measured:
        """Runs both models once."""
        if self.vocab_chunk is not None:
            return self._pieces(params, batch, key, nll)
        z_s, z_t, labels, mask = self.pair.dense(params, batch, key)
        if self.top_k is None:
            value = token_divergence(self.kind, z_s, z_t, **self._how)
        else:
            value = topk.topk_divergence(self.kind, z_s, z_t, k=self.top_k, **self._how)
        return Measured(value, negative_log_likelihood(z_s, labels) if nll else None, mask)

    def _pieces(self, params: Params, batch: Batch, key: Any, nll: bool) -> Measured:
        h_s, read_s, h_t, read_t, labels, mask = self.pair.hidden(params, batch, key)
        sizes = self._sizes(read_s.size)
        log_z: Any = None
        if self.top_k is None:
            found = chunked.terms(self.kind, h_s, read_s, h_t, read_t, **self._how, **sizes)
            value, log_z = found.divergence, found.log_z
        else:
            chunked.check_vocabularies(h_s, read_s, h_t, read_t)
            best = topk.chunked_top_k(
                h_t, read_t, self.top_k, temperature=self.temperature, **sizes
            )
            value = topk.chunked_stored_divergence(
                self.kind, h_s, read_s, best, **self._how, **sizes
            )
            if nll:
                log_z = chunked.terms(None, h_s, read_s, **sizes).log_z
        loss = log_z - _label_logit(read_s, h_s, labels) if nll else None
        return Measured(value, loss, mask)

    def nll(self, params: Params, batch: Batch, key: Any) -> Measured:
        """The student's -log q(y) alone; the teacher does not run."""
        own, _ = parameters(params, self.pair.teacher)
        labels, mask = targets(batch, self.pair.shifted)
        out = self.pair.student.apply(own, batch, rng=key, train=key is not None)
        if self.vocab_chunk is None:
            z = shown(mask, require_logits(out, STUDENT)[..., : self.pair.vocab])
            return Measured(None, negative_log_likelihood(z, labels), mask)
        h = shown(mask, aligned(out.hidden, labels))
        readout = readout_of(self.pair.student, own).cut(self.pair.vocab)
        log_z = chunked.terms(None, h, readout, **self._sizes(readout.size)).log_z
        return Measured(None, log_z - _label_logit(readout, h, labels), mask)


def _label_logit(readout: Any, h: jax.Array, labels: jax.Array) -> jax.Array:
    # A label beyond the vocabulary must not be read as another token: NaN stops the loop.
    picked = readout.of(h, jnp.clip(labels, 0, readout.size - 1)[..., None])[..., 0]
    return jnp.where(labels < readout.size, picked, jnp.nan)


def kd(
    student: Model,
    teacher: TeacherLike,
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    alpha: float = 0.1,
    ratio: float = 1.0,
    scale_tau2: bool = False,
    top_k: int | None = None,
    vocab: int | None = None,
    vocab_chunk: int | None = None,
    token_chunk: int | None = None,
    shards: int | None = None,
    shift: bool | None = None,
    policy: Rewrite | None = None,
) -> Objective:
    """Distils the teacher into the student; weight = number of labelled positions.

    The batch holds ``labels`` and ``label_mask`` as in ``token_ce`` or ``classification_ce``.
    aux: ``kd``, the divergence (before T^2); ``ce``, the cross entropy, if ratio < 1.

    Args:
      student: the model to train; may be under an overlay.
      teacher: a model with its parameters, see ``pairs``; runs without dropout and gradient.
      kind, temperature, beta, alpha: see ``divergences``.
      ratio: r above; 1 leaves the cross entropy out.
      scale_tau2: multiply the divergence by temperature^2, which keeps its gradient's size.
      top_k: compare the teacher's k most probable tokens and the remainder only.
      vocab: common size of vocabularies that differ by padding at the end.
      vocab_chunk: columns of the vocabulary at a time (see ``chunked``); None = all logits of
        both models in memory at once. For decoders.
      token_chunk: tokens at a time (see ``rowwise``), as exact, with the work of the dense form:
        the better choice wherever a gradient is taken and no top_k. For decoders.
      shards: see ``chunked_divergence``; None = the size of the mesh axis "model".
      shift: logits at t answer for the label at t + 1; None = yes for language models.
      policy: ``(params, batch, key) -> batch`` applied inside the objective, such as
        ``imperfect(...)``; those that generate text are applied outside, before the step.

    Raises:
      ValueError: a number out of range, an unknown kind, vocabularies that differ; from a call,
        what does not fit in the batch.
    """
    fraction(ratio, "ratio")
    pair = Pair(student, teacher, shift, vocab)
    measure = Measure(pair, kind, temperature, beta, alpha, top_k, vocab_chunk, shards)
    scale = ratio * (temperature**2 if scale_tau2 else 1.0)
    if token_chunk is not None and (isinstance(token_chunk, bool) or token_chunk < 1):
        raise ValueError(f"token_chunk must be a whole number >= 1, or None, got {token_chunk!r}")
    if token_chunk is not None and (top_k is not None or vocab_chunk is not None):
        raise ValueError(
            "token_chunk takes whole vocabularies: give it without vocab_chunk and top_k"
        )

    def by_tokens(params: Params, batch: Batch, key: Any, rows: int) -> LossOut:
        h_s, readout_s, h_t, readout_t, labels, mask = pair.hidden(params, batch, key)
        sums = rowwise_loss(
            kind,
            h_s,
            readout_s,
            h_t,
            readout_t,
            mask,
            labels,
            temperature=temperature,
            beta=beta,
            alpha=alpha,
            mix=(scale, 1 - ratio),
            rows=rows,
        )
        weight = mask.astype(jnp.float32).sum()
        aux = {"kd": (jax.lax.stop_gradient(sums.divergence), weight)}
        if ratio < 1:
            aux["ce"] = (jax.lax.stop_gradient(sums.nll), weight)
        return LossOut(sums.loss, weight, aux)

    def objective(params: Params, batch: Batch, key: Any) -> LossOut:
        if policy is not None:
            batch = policy(params, batch, key)
        if token_chunk is not None:
            return by_tokens(params, batch, key, token_chunk)
        found = measure(params, batch, key, nll=ratio < 1)
        total, weight = masked_token_sum(found.divergence, found.mask)
        aux = {"kd": (jax.lax.stop_gradient(total), weight)}
        total = total * scale
        if found.nll is not None:
            ce = masked_token_sum(found.nll, found.mask)[0]
            aux["ce"] = (jax.lax.stop_gradient(ce), weight)
            total = total + (1 - ratio) * ce
        return LossOut(total, weight, aux)

    return objective


def decoupled_kd(
    student: Model,
    teacher: TeacherLike,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    vocab: int | None = None,
    vocab_chunk: int | None = None,
    shards: int | None = None,
    shift: bool | None = None,
    policy: Rewrite | None = None,
) -> Objective:
    """Decoupled distillation, alpha TKD + beta DKD at every labelled position.

    alpha = 1 with beta = 1 - p_y would be the forward KL; the defaults are those of the images
    that the method was published on. aux: ``tkd``, ``dkd``, ``unc`` (the teacher's 1 - p_y).

    Args:
      alpha, beta: coefficients, >= 0.
      student, teacher, vocab, vocab_chunk, shards, shift, policy: as in :func:`kd`.

    Raises:
      ValueError: a negative coefficient; as :func:`kd`.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    pair = Pair(student, teacher, shift, vocab)

    def objective(params: Params, batch: Batch, key: Any) -> LossOut:
        if policy is not None:
            batch = policy(params, batch, key)
        found, mask = decompose_pair(pair, params, batch, key, vocab_chunk, shards)
        sums = {name: masked_token_sum(value, mask)[0] for name, value in found._asdict().items()}
        weight = mask.sum()
        total = alpha * sums["tkd"] + beta * sums["dkd"]
        aux = {name: (jax.lax.stop_gradient(s), weight) for name, s in sums.items()}
        return LossOut(total, weight, aux)

    return objective
