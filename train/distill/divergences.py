"""Divergences between a teacher's and a student's next-token distributions, token by token.

With p = softmax(z_T / T), q = softmax(z_S / T) over the vocabulary, in nats:

  forward_kl        KL(p || q) = sum p (log p - log q)
  reverse_kl        KL(q || p)
  jsd               beta KL(p || m) + (1 - beta) KL(q || m),        m = beta p + (1 - beta) q
  tvd               1/2 sum |p - q|
  skew_forward_kl   KL(p || alpha p + (1 - alpha) q)
  skew_reverse_kl   KL(q || (1 - alpha) p + alpha q)
  symmetric_kl      (1 - beta) KL(p || q) + beta KL(q || p)

The gradient reaches every q, also the one inside m; none reaches the teacher. All of it is in
float32, in log space. An entry that is -inf on both sides counts 0. Where the student gives
-inf to what the teacher allows, a forward KL is infinite, as it should be.

Hinton et al. 2015 (arXiv 1503.02531); Wen et al., ACL 2023 (2307.15190); Agarwal et al., ICLR
2024 (2306.13649); Ko et al., ICML 2024 (2402.03898).

Deviations: beta = 0 and 1 of the JSD are the forward and reverse KL, its limits up to the
factors beta and 1 - beta that vanish there, as in published code. DistiLLM's code leaves the
teacher's entropy out of the skewed forward KL, which has the same gradient; its ``lam`` of
the JSD is 1 - beta, that of the symmetric KL (0.9 there) is beta.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

KINDS = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "tvd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "symmetric_kl",
)


def token_divergence(
    kind: str,
    z_s: Float[Array, "*n V"],
    z_t: Float[Array, "*n V"],
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
    alpha: float = 0.1,
) -> Float[Array, "*n"]:
    """The divergence at every position, in nats (TVD: between 0 and 1).

    Args:
      kind: one of ``KINDS``.
      z_s, z_t: logits of student and teacher over one vocabulary.
      temperature: T > 0, divides both. The factor T^2 of classic distillation is the caller's.
      beta: of ``jsd`` and ``symmetric_kl``, in [0, 1].
      alpha: of the skewed divergences, in [0, 1].

    Raises:
      ValueError: an unknown kind, a number out of range, logits of different shapes.

    Example:
      >>> student, teacher = jnp.zeros((1, 2)), jnp.log(jnp.array([[0.9, 0.1]]))
      >>> round(float(token_divergence("forward_kl", student, teacher)[0]), 4)
      0.3681
      >>> round(float(token_divergence("reverse_kl", student, teacher)[0]), 4)
      0.5108
    """
    kind = check(kind, temperature, beta, alpha)
    check_logits(z_s, z_t)
    log_q = log_softmax(z_s, temperature)
    log_p = jax.lax.stop_gradient(log_softmax(z_t, temperature))
    return between(kind, log_p, log_q, beta=beta, alpha=alpha)


def between(
    kind: str,
    log_p: Float[Array, "*n K"],
    log_q: Float[Array, "*n K"],
    *,
    beta: float = 0.5,
    alpha: float = 0.1,
) -> Float[Array, "*n"]:
    """The divergence of two distributions that are given as log probabilities."""
    kind = exact(kind, beta, alpha)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if kind == "zero":
        return jnp.zeros_like(q[..., 0])
    if kind == "forward_kl":
        return kl(p, log_p, log_q)
    if kind == "reverse_kl":
        return kl(q, log_q, log_p)
    if kind == "symmetric_kl":
        return (1 - beta) * kl(p, log_p, log_q) + beta * kl(q, log_q, log_p)
    if kind == "tvd":
        return 0.5 * jnp.abs(p - q).sum(-1)
    log_m = log_mix(log_p, log_q, share(kind, beta, alpha))
    if kind == "skew_forward_kl":
        return kl(p, log_p, log_m)
    if kind == "skew_reverse_kl":
        return kl(q, log_q, log_m)
    return beta * kl(p, log_p, log_m) + (1 - beta) * kl(q, log_q, log_m)


def share(kind: str, beta: float, alpha: float) -> float:
    """The share of the teacher in the mixture m of a divergence that has one."""
    return {"jsd": beta, "skew_forward_kl": alpha, "skew_reverse_kl": 1 - alpha}[kind]


def log_mix(log_p: jax.Array, log_q: jax.Array, of_p: float) -> jax.Array:
    """``log(of_p * p + (1 - of_p) * q)``, 0 < of_p < 1; 0 where both are impossible."""
    # A derivative of logaddexp at (-inf, -inf) is NaN, even when it is multiplied by 0 later.
    none = (log_p == -jnp.inf) & (log_q == -jnp.inf)
    left = jnp.where(none, 0.0, log_p) + math.log(of_p)
    right = jnp.where(none, 0.0, log_q) + math.log1p(-of_p)
    return jnp.logaddexp(left, right)


def kl(w: jax.Array, log_w: jax.Array, log_v: jax.Array) -> jax.Array:
    """``sum_v w (log_w - log_v)`` over the last axis, where entries with w = 0 count nothing."""
    # Both logarithms are replaced before they are subtracted: -inf - -inf would be NaN, and its
    # derivative too, whichever branch is taken.
    there = w > 0
    gap = jnp.where(there, log_w, 0.0) - jnp.where(there, log_v, 0.0)
    return (w * gap).sum(-1)


def log_softmax(z: jax.Array, temperature: float = 1.0) -> jax.Array:
    """``log softmax(z / T)`` in float32; entries of -inf stay so."""
    z = z.astype(jnp.float32)
    return jax.nn.log_softmax(z if temperature == 1.0 else z / temperature, axis=-1)


# Masked sums ---------------------------------------------------------------------------------


def shown(valid: Any, values: Float[Array, "*n K"]) -> Float[Array, "*n K"]:
    """Logits or hidden states with zeros wherever nothing counts.

    What is masked after it was computed with leaves its gradient behind: 0 times NaN is NaN.
    """
    return jnp.where(jnp.asarray(valid)[..., None] > 0, values, 0)


def masked_token_sum(
    values: Float[Array, "*n"], valid: Any
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of the values of valid tokens, their number); what is masked may even be NaN.

    Its gradient may not: give the logits through :func:`shown` where that can happen.
    """
    valid = jnp.asarray(valid).astype(jnp.float32)
    total = jnp.where(valid > 0, values * valid, 0.0).sum()
    return total, valid.sum()


def masked_token_mean(values: Float[Array, "*n"], valid: Any) -> Float[Array, ""]:
    """Mean over the valid tokens of all rows together; 0 where there is none."""
    total, count = masked_token_sum(values, valid)
    return total / jnp.maximum(count, 1.0)


# Checks --------------------------------------------------------------------------------------


def check(kind: str, temperature: float, beta: float, alpha: float) -> str:
    """``kind``, after a look at the numbers.

    Raises:
      ValueError: an unknown kind; a temperature <= 0; beta or alpha outside [0, 1].
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    positive(temperature, "temperature")
    for name, value in (("beta", beta), ("alpha", alpha)):
        fraction(value, name)
    return kind


def exact(kind: str, beta: float, alpha: float) -> str:
    """The kind that a divergence is at the ends of its range; "zero" where it vanishes."""
    if kind in ("jsd", "symmetric_kl") and beta in (0, 1):
        return "forward_kl" if beta == 0 else "reverse_kl"
    if kind.startswith("skew_") and alpha in (0, 1):
        return kind.removeprefix("skew_") if alpha == 0 else "zero"
    return kind


def unlike(student: int, teacher: int) -> str:
    """The message about vocabularies of different sizes."""
    return (
        f"the student has {student} classes and the teacher {teacher}: a divergence by token needs "
        "one vocabulary. Where the ids agree and only padding differs, give vocab= (the common "
        "size); with another tokenizer, train on texts that the teacher has written"
    )


def check_logits(z_s: jax.Array, z_t: jax.Array) -> None:
    """Raises ValueError where the logits of student and teacher do not fit each other."""
    if z_s.shape[-1] != z_t.shape[-1]:
        raise ValueError(unlike(z_s.shape[-1], z_t.shape[-1]))
    if z_s.shape != z_t.shape:
        raise ValueError(
            f"logits of shape {z_s.shape} (student) and {z_t.shape} (teacher) are not of the same "
            "positions: give both models the same input_ids"
        )


def fraction(value: float, name: str) -> None:
    """Raises ValueError for what is not a number in [0, 1]."""
    if not _real(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")


def positive(value: float, name: str) -> None:
    """Raises ValueError for what is not a finite number above 0."""
    if not _real(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")


def _real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
