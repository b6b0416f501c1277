"""DWT: pretraining a large student under a weaker teacher.

With p^tau = softmax(z / tau), at the masked positions of a batch:

  H = -log p_S(y)                      S = KL(p_T^tau || p_S^tau)
  L = alpha_h mean H + alpha_s mean S

"Normal" is alpha_h : alpha_s = 1 : 1, "Strong" 1 : 4, which is faster early and worse at the
end; the authors recommend alpha_s falling from 4 to 1. A teacher much worse than the student
harms. Starting the student from the teacher's layers was found to harm too
(:func:`remap_parameters` is there for the comparison).

Lee et al., Findings of ACL 2023 (arXiv 2305.18239).

Deviations: the paper writes no tau^2; ``scale_tau2`` adds it. The shape of the falling weight
is not given there: linear, or half a cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from steppe.models import tree
from steppe.models.model import Model
from steppe.train.distill.divergences import (
    masked_token_mean,
    masked_token_sum,
    positive,
    shown,
    token_divergence,
)
from steppe.train.distill.kd import Measure
from steppe.train.distill.pairs import Pair, TeacherLike
from steppe.train.objectives.basic import negative_log_likelihood
from steppe.train.spikes import skip_over
from steppe.train.types import Batch, LossOut, Objective, Params

ALPHA, STEP = "alpha_s", "alpha_s_step"


def soft_kl(
    student_logits: Float[Array, "*n V"],
    teacher_logits: Float[Array, "*n V"],
    mask: Any,
    tau: float = 1.0,
    scale_tau2: bool = False,
) -> Float[Array, ""]:
    """Mean of KL(teacher || student) over the masked-in positions, nats.

    Raises:
      ValueError: tau <= 0, logits of different shapes.
    """
    z_s, z_t = (shown(mask, z) for z in (student_logits, teacher_logits))
    value = token_divergence("forward_kl", z_s, z_t, temperature=tau)
    return masked_token_mean(value, mask) * (tau**2 if scale_tau2 else 1.0)


def dwt_loss(
    student_logits: Float[Array, "*n V"],
    teacher_logits: Float[Array, "*n V"],
    labels: Int[Array, "*n"],
    mask: Any,
    alpha_h: float | jax.Array = 1.0,
    alpha_s: float | jax.Array = 4.0,
    tau: float = 1.0,
    scale_tau2: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of one batch as a number, with ``hard`` and ``soft`` before their coefficients."""
    nll = negative_log_likelihood(shown(mask, student_logits).astype(jnp.float32), labels)
    hard = masked_token_mean(nll, mask)
    soft = soft_kl(student_logits, teacher_logits, mask, tau, scale_tau2)
    return alpha_h * hard + alpha_s * soft, jax.lax.stop_gradient({"hard": hard, "soft": soft})


def alpha_schedule(
    start: float = 4.0, end: float = 1.0, *, steps: int, kind: str = "linear"
) -> optax.Schedule:
    """alpha_s by step: ``start`` at 0, ``end`` from ``steps`` on.

    Raises:
      ValueError: steps < 1, a negative end, an unknown kind.
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    for name, value in (("start", start), ("end", end)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    if kind == "linear":
        return optax.linear_schedule(start, end, steps)
    if kind == "cosine":
        return lambda step: (
            end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(step / steps, 0.0, 1.0)))
        )
    raise ValueError(f"kind must be linear or cosine, got {kind!r}")


def with_alpha(batches: Any, schedule: Callable[[Any], Any], *, first: int = 0) -> Scheduled:
    """Batches that carry ``alpha_s`` of their step, for :func:`dwt` with ``alpha_s=None``.

    Args:
      batches: an iterator of batches; where it can be resumed, so can the result.
      schedule: step -> alpha_s, see :func:`alpha_schedule`.
      first: the step of the first batch.
    """
    return Scheduled(batches, schedule, first)


class Scheduled:
    """What :func:`with_alpha` returns: an iterator with the state of the one inside."""

    def __init__(self, batches: Any, schedule: Callable[[Any], Any], number: int) -> None:
        self._batches, self._schedule, self._number = batches, schedule, number

    def __iter__(self) -> Scheduled:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        alpha = np.float32(self._schedule(self._number))
        self._number += 1
        return {**batch, ALPHA: alpha}

    def skip(self, count: int) -> None:
        """Leaves out batches, not steps: the next one has the weight that was due."""
        skip_over(self._batches, count)

    def get_state(self) -> dict[str, int]:
        """Where it is: the state of the batches inside, and the step."""
        return {**self._batches.get_state(), STEP: self._number}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes on from a state of :meth:`get_state`."""
        self._number = int(state[STEP])
        self._batches.set_state({name: value for name, value in state.items() if name != STEP})


def dwt(
    student: Model,
    teacher: TeacherLike,
    *,
    alpha_h: float = 1.0,
    alpha_s: float | None = None,
    tau: float = 1.0,
    scale_tau2: bool = False,
    vocab: int | None = None,
    vocab_chunk: int | None = None,
    shards: int | None = None,
    shift: bool | None = None,
) -> Objective:
    """DWT as an objective; weight = number of labelled (masked) positions.

    aux: ``hard`` and ``soft`` before their coefficients.

    Args:
      alpha_h, alpha_s: coefficients; None = ``batch["alpha_s"]``, which :func:`with_alpha` puts
        there. 0 leaves the teacher out of the program.
      tau: temperature of the soft loss.
      student, teacher, vocab, vocab_chunk, shards, shift: as in ``kd``.

    Raises:
      ValueError: a coefficient out of range; no alpha_s in the batch; as ``kd``.
    """
    positive(tau, "tau")
    for name, value in (("alpha_h", alpha_h), ("alpha_s", alpha_s)):
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    pair = Pair(student, teacher, shift, vocab)
    measure = Measure(pair, "forward_kl", temperature=tau, vocab_chunk=vocab_chunk, shards=shards)

    def objective(params: Params, batch: Batch, key: Any) -> LossOut:
        if alpha_s is None and ALPHA not in batch:
            raise ValueError(
                "alpha_s=None reads batch['alpha_s'], which is not there: wrap the batches in "
                "with_alpha(batches, alpha_schedule(...)), or give alpha_s a number"
            )
        weight_s = batch[ALPHA] if alpha_s is None else alpha_s
        if alpha_s == 0:
            found = measure.nll(params, batch, key)
        else:
            found = measure(params, batch, key, nll=True)
        hard, weight = masked_token_sum(found.nll, found.mask)
        aux = {"hard": (jax.lax.stop_gradient(hard), weight)}
        total = alpha_h * hard
        if found.divergence is not None:
            soft = masked_token_sum(found.divergence, found.mask)[0]
            soft = soft * (tau**2 if scale_tau2 else 1.0)
            aux["soft"] = (jax.lax.stop_gradient(soft), weight)
            total = total + weight_s * soft
        return LossOut(total, weight, aux)

    return objective


def remap_parameters(
    teacher_params: Mapping[str, Any],
    student_params: Mapping[str, Any],
    layer_map: Sequence[int] = (0, 1, 2, 3, 3, 3),
) -> Params:
    """A student whose layer i is the teacher's layer ``layer_map[i]``, and whose rest is its rest.

    Works on stacked layers. What the teacher lacks stays the student's.

    Args:
      layer_map: a layer of the teacher for each layer of the student.

    Raises:
      ValueError: a layer that the teacher has not, as many entries as the student has not
        layers, leaves whose shapes differ (the widths must agree).
    """
    theirs = tree.flatten(teacher_params)
    out = {}
    for path, leaf in tree.flatten(student_params).items():
        if path not in theirs:
            out[path] = leaf
            continue
        new = theirs[path]
        if tree.STACK in path.split(tree.SEPARATOR):
            if len(layer_map) != leaf.shape[0]:
                raise ValueError(
                    f"layer_map must name a layer for each of the student's {leaf.shape[0]}, got "
                    f"{list(layer_map)}"
                )
            if not all(0 <= i < new.shape[0] for i in layer_map):
                raise ValueError(
                    f"layer_map must name layers of the teacher, 0..{new.shape[0] - 1}, got "
                    f"{list(layer_map)}"
                )
            new = jnp.take(jnp.asarray(new), jnp.asarray(layer_map), axis=0)
        if tuple(new.shape) != tuple(leaf.shape):
            raise ValueError(
                f"{path!r} has shape {tuple(leaf.shape)} in the student and {tuple(new.shape)} "
                "from the teacher: parameters can be copied between equal widths only"
            )
        out[path] = jnp.asarray(new, leaf.dtype)
    return tree.unflatten(out)
