"""Losses on the scores of the classes' words, which need no gradient: the search ranks them.

  cross entropy      sum_i -log softmax(l_i)[y_i]                              nats
  hinge              sum_i sum_{c != y_i} max(0, l_ic - l_{i y_i} + margin)    units of the logits
  negative accuracy  -sum_i [argmax_c l_ic = y_i]

l [N, C] are the logits of the label words only (the columns of the vocabulary, or the head that
stands for them). Every loss is a ``LossOut`` of sums with weight = number of labelled examples,
and aux ``accuracy``; examples with a negative label, or a ``mask`` of 0, do not count.

Sun et al., ICML 2022, arXiv 2201.03514.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steppe.train.objectives.basic import negative_log_likelihood
from steppe.train.types import LossOut

# (logits [N, C], labels [N], mask [N] or None) -> sums
Loss: TypeAlias = Callable[..., LossOut]


def verbalizer_ce(
    logits: Float[Array, "N C"], labels: Int[Array, " N"], mask: Float[Array, " N"] | None = None
) -> LossOut:
    """Cross entropy over the label words, in nats."""
    logits = _checked(logits, labels)
    return _sums(negative_log_likelihood(logits, jnp.maximum(labels, 0)), logits, labels, mask)


def verbalizer_hinge(
    logits: Float[Array, "N C"],
    labels: Int[Array, " N"],
    mask: Float[Array, " N"] | None = None,
    *,
    margin: float = 2.0,
) -> LossOut:
    """Hinge loss over the label words, summed over the wrong ones.

    Raises:
      ValueError: margin is not positive.
    """
    if not margin > 0:
        raise ValueError(f"margin must be positive, got {margin}")
    logits = _checked(logits, labels)
    right = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=1)
    wrong = jnp.arange(logits.shape[1]) != labels[:, None]
    terms = jnp.maximum(0.0, logits - right + margin)
    return _sums(jnp.where(wrong, terms, 0.0).sum(1), logits, labels, mask)


def negative_accuracy(
    logits: Float[Array, "N C"], labels: Int[Array, " N"], mask: Float[Array, " N"] | None = None
) -> LossOut:
    """Minus the number of right answers: N + 1 different values, so most candidates tie."""
    logits = _checked(logits, labels)
    # The best of logits that are no numbers is none, not the first.
    broken = jnp.isnan(logits).any(1)
    right = jnp.where(broken, jnp.nan, jnp.argmax(logits, 1) == labels)
    return _sums(-right, logits, labels, mask)


LOSSES: dict[str, Loss] = {
    "ce": verbalizer_ce,
    "hinge": verbalizer_hinge,
    "accuracy": negative_accuracy,
}


def _checked(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The logits in float32.

    Raises:
      ValueError: shapes that do not fit.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits of shape {logits.shape} and labels of shape {labels.shape} are not [N, C] and "
            "[N]"
        )
    return logits.astype(jnp.float32)


def _sums(each: jax.Array, logits: jax.Array, labels: jax.Array, mask: jax.Array | None) -> LossOut:
    counted = (labels >= 0) & (True if mask is None else mask > 0)
    weight = counted.sum().astype(jnp.float32)
    right = (jnp.argmax(logits, 1) == labels) & counted
    total = jnp.where(counted, each, 0.0).sum()
    return LossOut(total, weight, {"accuracy": (right.sum().astype(jnp.float32), weight)})
