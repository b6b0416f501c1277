"""CTCD: a large and a small model that train together and distil each other.

With sg = stop-gradient and p^tau = softmax(z / tau), at the masked positions of one batch:

  L_small = h_s H_s + s_s KL(sg(p_l^tau) || p_s^tau) + sum_e c KL(p_e^tau || p_s^tau)
  L_large = h_l H_l + s_l KL(sg(p_s^tau) || p_l^tau)
  L       = L_small + L_large,                          H = -log p(y)

Both read the other's logits of the same step; because of sg one backward pass gives both
gradients. s_l = 0 is online one-way distillation, both 0 two runs that know nothing of each
other. Gradients must be clipped model by model, or the two are coupled: :func:`ctcd_optimiser`.

Lee et al., Findings of EMNLP 2023 (arXiv 2311.02849).

Deviations: weights and temperature are not in the part of the paper that could be read; those
here (1 each, tau = 1) are of the sister study (``dwt``). Targets are the logits of the
training pass, under dropout where there is any; ``clean_targets`` takes a second pass without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from steppe.models.model import Model
from steppe.train.distill import divergences
from steppe.train.distill.divergences import (
    masked_token_sum,
    positive,
    shown,
    token_divergence,
)
from steppe.train.distill.pairs import (
    TeacherLike,
    beside,
    require_logits,
    shifts,
    targets,
)
from steppe.train.objectives.basic import negative_log_likelihood
from steppe.train.types import Batch, LossOut, Objective, Params, TrainState

LARGE, SMALL = "large", "small"


class CTCDWeights(NamedTuple):
    """Coefficients of the hard and soft losses of each model, and of external teachers."""

    hard_large: float = 1.0
    soft_large: float = 1.0
    hard_small: float = 1.0
    soft_small: float = 1.0
    external: float = 1.0


def ctcd_pair(large: Model, small: Model) -> Model:
    """Both models as one: parameters ``{"large": ..., "small": ...}``; it answers as the small.

    Raises:
      ValueError: vocabularies of different sizes.
    """
    sizes = [getattr(model.config, "vocab_size", None) for model in (small, large)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(divergences.unlike(*sizes))  # type: ignore[arg-type]
    return beside({LARGE: large, SMALL: small}, front=SMALL)


def ctcd_optimiser(
    large: optax.GradientTransformation, small: optax.GradientTransformation
) -> optax.GradientTransformation:
    """One transform of both models; give each its own clip, ``optax.chain(clip, adamw)``."""

    return by_branch({LARGE: large, SMALL: small})


def by_branch(
    transforms: Mapping[str, optax.GradientTransformation],
) -> optax.GradientTransformation:
    """One transform of a tree, each of whose top-level branches has its own."""

    def labels(params: Params) -> Params:
        return {
            name: jax.tree.map(lambda _, name=name: name, branch) for name, branch in params.items()
        }

    return optax.multi_transform(dict(transforms), labels)


def mutual_kd_loss(
    logits_l: Float[Array, "*n V"],
    logits_s: Float[Array, "*n V"],
    labels: Int[Array, "*n"],
    mask: Any,
    w: CTCDWeights | None = None,
    tau: float = 1.0,
    scale_tau2: bool = False,
    ext_teacher_logits: Sequence[jax.Array] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of one batch as a number, with its parts, before their coefficients, beside it.

    Raises:
      ValueError: logits of different shapes; tau <= 0; a negative weight.
    """
    sums, weight = _sums(
        (logits_l, logits_s),
        (logits_l, logits_s),
        labels,
        mask,
        tau,
        scale_tau2,
        ext_teacher_logits,
    )
    means = {name: value / jnp.maximum(weight, 1.0) for name, value in sums.items()}
    losses = _combined(means, _checked(w))
    return losses[LARGE] + losses[SMALL], jax.lax.stop_gradient(means)


def ctcd(
    large: Model,
    small: Model,
    *,
    weights: CTCDWeights | None = None,
    tau: float = 1.0,
    scale_tau2: bool = False,
    clean_targets: bool = False,
    external: Sequence[TeacherLike] = (),
    shift: bool | None = None,
) -> Objective:
    """CTCD on ``ctcd_pair(large, small)``, with the components ``large`` and ``small``.

    Each model draws its own dropout. aux: ``hard_large``, ``soft_large``, ``hard_small``,
    ``soft_small`` (and ``external``), before their coefficients.

    Args:
      weights: see :class:`CTCDWeights`.
      tau: temperature of the soft losses.
      scale_tau2: multiply them by tau^2.
      clean_targets: each learns from the other's logits without dropout, one more pass each.
      external: further fixed teachers of the small model.
      shift: as in ``kd``.

    Raises:
      ValueError: a negative weight, tau <= 0; from a call, logits and labels that do not fit.
    """
    w = _checked(weights)
    positive(tau, "tau")
    shifted = shifts(small) if shift is None else shift
    models = {LARGE: large, SMALL: small}

    def objective(params: Params, batch: Batch, key: Any) -> LossOut:
        if not {LARGE, SMALL} <= set(params):
            raise ValueError(
                f"params must hold {LARGE!r} and {SMALL!r}, got {sorted(params)}: build the state "
                "from ctcd_pair(large, small)"
            )
        labels, mask = targets(batch, shifted)

        def logits(name: str, train: bool) -> jax.Array:
            # Streams of their own: what one model draws must not depend on the other.
            own = jax.random.fold_in(key, list(models).index(name)) if train else None
            out = models[name].apply(params[name], batch, rng=own, train=train)
            return require_logits(out, name)

        live = tuple(logits(name, key is not None) for name in models)
        still = live
        if clean_targets and key is not None:
            still = tuple(logits(name, False) for name in models)
        others = [
            require_logits(t.model.apply(t.params, batch, train=False), "external teacher")
            for t in external
        ]
        sums, weight = _sums(live, still, labels, mask, tau, scale_tau2, others)
        aux = {name: (jax.lax.stop_gradient(value), weight) for name, value in sums.items()}
        return LossOut(_combined(sums, w), {LARGE: weight, SMALL: weight}, aux)

    return objective


def export_large(state: TrainState) -> Params:
    """The large model's parameters, as a plain tree."""
    return dict(state.full()[LARGE])


def export_small(state: TrainState) -> Params:
    """The small model's parameters, as a plain tree."""
    return dict(state.full()[SMALL])


def _sums(
    live: Sequence[jax.Array],
    still: Sequence[jax.Array],
    labels: jax.Array,
    mask: Any,
    tau: float,
    scale_tau2: bool,
    external: Sequence[jax.Array],
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Sums over the counted positions of each part; live and still are (large, small)."""
    scale = tau**2 if scale_tau2 else 1.0
    live, still, external = ([shown(mask, z) for z in zs] for zs in (live, still, external))

    def hard(z: jax.Array) -> jax.Array:
        return masked_token_sum(negative_log_likelihood(z.astype(jnp.float32), labels), mask)[0]

    def soft(z: jax.Array, teacher: jax.Array) -> jax.Array:
        value = token_divergence("forward_kl", z, teacher, temperature=tau)
        return scale * masked_token_sum(value, mask)[0]

    large, small = live
    sums = {
        "hard_large": hard(large),
        "soft_large": soft(large, still[1]),
        "hard_small": hard(small),
        "soft_small": soft(small, still[0]),
    }
    if external:
        sums["external"] = sum((soft(small, z) for z in external), jnp.float32(0))
    return sums, jnp.asarray(mask).astype(jnp.float32).sum()


def _combined(parts: dict[str, jax.Array], w: CTCDWeights) -> dict[str, jax.Array]:
    small = w.hard_small * parts["hard_small"] + w.soft_small * parts["soft_small"]
    if "external" in parts:
        small = small + w.external * parts["external"]
    large = w.hard_large * parts["hard_large"] + w.soft_large * parts["soft_large"]
    return {LARGE: large, SMALL: small}


def _checked(w: CTCDWeights | None) -> CTCDWeights:
    w = CTCDWeights() if w is None else w
    for name, value in w._asdict().items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"weights.{name} must be a finite number >= 0, got {value!r}")
    return w
