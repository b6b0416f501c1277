"""Exposure bias, and how far a student agrees with its teacher: sums over tokens.

  k_t         = KL(p(. | y_<t) || q(. | y_<t))      p teacher (oracle), q student; nats
  eps_l       = 1/l sum_{t<=l} E_{y from data} k_t  error a step where prefixes are given
  R_l         = sum_{t<=l} E_{y from q} k_t         error where the student writes them
  AccErr_l    = R_l / eps_l                         l without exposure bias, up to l^2
  ExAccErr_l  = 100 (R_l - l eps_l) / (l eps_l)     per cent; 0 without exposure bias

The prefixes of R are what the student itself writes, by the decoding that is to be judged
(greedy, sampling); those of eps are texts of the data. t counts the labelled tokens of a row, so
that prompts of different lengths do no harm, and E is the mean over the rows that are as long.

  agreement = share of the tokens at which p and q have the same most probable token

Arora, El Asri, Bahuleyan, Cheung, Findings of ACL 2022 (arXiv 2204.01171); as a measure of
distilled students: Zhong et al., Findings of EMNLP 2024 (2410.11371).

Deviations: the published code estimates k_t by the log ratio of one token, whose mean k_t is; here
it is exact, the sum over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from steppe.models import tree
from steppe.models.model import Model
from steppe.train.types import Batch, Params


class StepErrors(NamedTuple):
    """Sums by step; those of batches are added up with ``+`` of their fields (see ``add``).

    Attributes:
      error: sum of k_t over the rows, nats [L].
      rows: those that have a t-th labelled token [L].
      agree: of them, those whose most probable token is the same in both [L].
    """

    error: Float[Array, " L"]
    rows: Float[Array, " L"]
    agree: Float[Array, " L"]

    def add(self, other: StepErrors) -> StepErrors:
        """The sums over both."""
        return StepErrors(*(a + b for a, b in zip(self, other, strict=True)))


class ExposureBias(NamedTuple):
    """What :func:`exposure_bias` found.

    Attributes:
      ex_acc_err: excess of accumulated errors, per cent.
      acc_err: accumulated errors in units of the error per step.
      regret: R, nats a text of ``length`` tokens.
      per_step: eps, nats a token.
      length: l, tokens.
    """

    ex_acc_err: float
    acc_err: float
    regret: float
    per_step: float
    length: int


def agreement(
    student: Float[Array, "... V"], teacher: Float[Array, "... V"], mask: Num[Array, "..."]
) -> tuple[jax.Array, jax.Array]:
    """Tokens at which both have the same most probable token, and tokens; two sums.

    Args:
      student, teacher: logits; of equal ones the first counts.
      mask: weight of every token, 0 = not one.

    Raises:
      ValueError: shapes that do not fit, as with two vocabularies.
    """
    _check(student, teacher, mask)
    weight = jnp.asarray(mask, jnp.float32)
    same = jnp.argmax(student, -1) == jnp.argmax(teacher, -1)
    return jnp.where(same, weight, 0.0).sum(), weight.sum()


def step_errors(
    student: Float[Array, "B T V"],
    teacher: Float[Array, "B T V"],
    mask: Num[Array, "B T"],
    *,
    length: int,
) -> StepErrors:
    """Sums by step over the rows of a batch.

    Args:
      student, teacher: logits of the same tokens; -inf for tokens that cannot occur.
      mask: non-zero at the positions whose logits count, in both.
      length: L; steps beyond it are left out.

    Raises:
      ValueError: shapes that do not fit, or length < 1.
    """
    _check(student, teacher, mask)
    if length < 1:
        raise ValueError(f"length must be >= 1 token, got {length}")
    log_q = jax.nn.log_softmax(student.astype(jnp.float32), axis=-1)
    log_p = jax.nn.log_softmax(teacher.astype(jnp.float32), axis=-1)
    p = jnp.exp(log_p)
    # 0 log 0 = 0, also where both are minus infinity.
    kl = jnp.where(p > 0, p * (jnp.where(p > 0, log_p, 0.0) - log_q), 0.0).sum(-1)
    on = jnp.asarray(mask) != 0
    step = jnp.where(on, jnp.cumsum(on, axis=1) - 1, length)
    same = jnp.argmax(student, -1) == jnp.argmax(teacher, -1)

    def by_step(values: jax.Array) -> jax.Array:
        values = jnp.where(on, values.astype(jnp.float32), 0.0)
        # Places from ``length`` on are dropped.
        return (
            jnp.zeros(length, jnp.float32).at[step.reshape(-1)].add(values.reshape(-1), mode="drop")
        )

    return StepErrors(by_step(kl), by_step(jnp.ones_like(kl)), by_step(same))


def measure(
    student: Model, teacher: Model, *, length: int, shift: bool = True, compute_dtype: Any = None
) -> Callable[[Params, Params, Batch], StepErrors]:
    """A compiled ``(student's params, teacher's params, batch) -> StepErrors``.

    Call it on batches of data, whose sums are eps, and on batches of the same prompts continued
    by the student, whose sums are R. A batch holds ``input_ids`` and ``label_mask`` [B, T] (and
    ``attention_mask``), the mask non-zero on the tokens of the answer, its end included.

    Args:
      student, teacher: language models of one vocabulary.
      length: L, see :func:`step_errors`.
      shift: True for causal models: token t is judged by the logits at t - 1. False where
        logits and labels stand in one column (encoder-decoders).
      compute_dtype: both models' parameters are cast to it; None leaves them as they are.

    Raises:
      ValueError: length < 1; when called: a model without a head, or two vocabularies.
    """
    if length < 1:
        raise ValueError(f"length must be >= 1 token, got {length}")

    def fn(student_params: Params, teacher_params: Params, batch: Batch) -> StepErrors:
        mask = jnp.asarray(batch["label_mask"])
        if shift:
            mask = jnp.roll(mask, -1, axis=1).at[:, -1].set(0)
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "label_mask")}
        found = []
        for model, params in ((student, student_params), (teacher, teacher_params)):
            if compute_dtype is not None:
                params = tree.cast(params, compute_dtype)
            logits = model.apply(params, inputs).logits
            if logits is None:
                raise ValueError("a model has no head, so it returns no logits; load it with head=")
            found.append(logits)
        return step_errors(found[0], found[1], mask, length=length)

    return jax.jit(fn)


def exposure_bias(
    generated: StepErrors, reference: StepErrors, length: int | None = None
) -> ExposureBias:
    """AccErr and ExAccErr from the sums over the student's texts and those over the data.

    Args:
      generated: sums over texts that the student wrote.
      reference: sums over texts of the data.
      length: l; default the longest that both have rows for.

    Raises:
      ValueError: length < 1 or longer than either, or the student makes no error on the data, in
        which case no ratio to it is defined.
    """
    g = [np.asarray(x, np.float64) for x in generated]
    r = [np.asarray(x, np.float64) for x in reference]
    both = min(_filled(g[1]), _filled(r[1]))
    if length is None:
        length = both
    if not 1 <= length <= both:
        raise ValueError(
            f"length must lie in 1..{both}, for which both have tokens at every step, got {length}"
        )
    regret = float((g[0][:length] / g[1][:length]).sum())
    given = float((r[0][:length] / r[1][:length]).sum())
    if not given > 0:
        raise ValueError(
            f"the student's error on the data is {given} nats: it equals the teacher, and an "
            "excess over nothing is undefined"
        )
    return ExposureBias(
        ex_acc_err=100 * (regret - given) / given,
        acc_err=length * regret / given,
        regret=regret,
        per_step=given / length,
        length=length,
    )


def _filled(count: np.ndarray) -> int:
    """Steps before the first one without a row."""
    return int(np.argmin(np.append(count > 0, False)))


def _check(student: Any, teacher: Any, mask: Any) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must have logits of one shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; agreement is defined over one vocabulary"
        )
    if tuple(mask.shape) != tuple(student.shape[:-1]):
        raise ValueError(
            f"mask must have shape {tuple(student.shape[:-1])}, got {tuple(mask.shape)}"
        )
