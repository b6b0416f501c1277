"""PlugAT: adversarial training of a plugged module that refuses examples which make it forget.

  delta_i   K steps of ascent on the word embeddings through the whole plugged model
  a_i = grad_P l(f(e_i + delta_i; P), y_i),   c = grad_P mean_j l(f(e_j; P), y_j)
  L = mean_j l(f(e_j; P), y_j) + mean_{i in A} l(f(e_i + delta_i; P), y_i)

A holds the examples that do not impair the predictions on the originals:

  grad       <a_i, c> >= rho |a_i| |c|: a step along -a_i does not raise the clean loss
  lookahead  L_clean(P - eta a_i) <= L_clean(P) + margin
  project    all, but with a_i less its part against c: a_i - (<a_i, c> / <c, c>) c where negative
  none       all

For rho = 0 all <a_i, c> are one derivative of the losses along c (``jax.jvp``); the other rules
take the gradient of every example. ``project`` needs none either: the sum of the projected
gradients is that of sum_i l_i + s L_clean with s = sum_i max(0, -<a_i, c>) / <c, c>.

Perturbations are those of PGD with an l2 step a text: delta_0 = U(-1, 1) mag / sqrt(len D) on its
tokens, delta <- delta + lr g / |g|, on padding 0, within |delta| <= eps where eps > 0.

Zheng et al., COLING 2022, pages 2873-2882; Madry et al., ICLR 2018, arXiv 1706.06083.

Deviations: the abstract fixes only that bad examples are filtered out; the rules are ours. The
clean gradient is that of the micro-batch. Nothing has dropout: what is compared would be noisy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from steppe.models.model import Model
from steppe.models.overlays.overlay import OVERLAY
from steppe.models.overlays.prompt import table_of
from steppe.train.objectives.basic import negative_log_likelihood
from steppe.train.types import Batch, LossOut, Objective, Params

RULES = ("grad", "lookahead", "project", "none")


def plugat_loss(
    model: Model,
    *,
    rule: str = "grad",
    rho: float = 0.0,
    margin: float = 0.0,
    step: float = 1e-3,
    steps: int = 5,
    lr: float = 0.03,
    mag: float = 0.05,
    eps: float = 0.0,
) -> Objective:
    """The objective of a classifier with a module bound to it.

    The batch holds ``input_ids``, ``labels`` and where wanted ``attention_mask`` and
    ``label_mask``. Components ``clean`` and ``adversarial``, in nats, each a mean of its own; with
    no example kept the second one is 0. aux: ``kept``, share of the adversarial examples;
    ``accuracy`` and ``adversarial_accuracy``.

    Args:
      model: the bound model; P are the leaves of its overlay.
      rule: ``grad``, ``lookahead``, ``project`` or ``none``, see the module.
      rho: of ``grad``, least cosine.
      margin, step: of ``lookahead``, nats and eta.
      steps, lr, mag, eps: of the ascent: K, size of a step, initial norm, largest norm (0 = any).

    Raises:
      ValueError: an unknown rule, rho outside [-1, 1], steps < 1, or a size that is negative or
        not finite.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not -1.0 <= rho <= 1.0:
        raise ValueError(f"rho must be in [-1, 1], got {rho}")
    if steps < 1 or not all(0 <= size < math.inf for size in (lr, mag, eps, step)):
        raise ValueError(
            f"steps must be >= 1 and lr, mag, eps, step >= 0 and finite, got {steps}, {lr}, {mag}, "
            f"{eps}, {step}"
        )
    if math.isnan(margin):
        raise ValueError(f"margin must be a number of nats, got {margin}")

    def objective(params: Params, batch: Batch, key: jax.Array | None) -> LossOut:
        embeds = word_embeddings(params, batch)
        mask = _counted(batch)
        weight = mask.sum()
        draw = jax.random.key(0) if key is None else key
        delta = attack(model, params, batch, draw, steps=steps, lr=lr, mag=mag, eps=eps)

        def losses(own: Params, at: jax.Array) -> tuple[jax.Array, jax.Array]:
            return _losses({**params, OVERLAY: own}, at)

        def _losses(full: Params, at: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = _logits(model, full, batch, at)
            right = (jnp.argmax(logits, -1) == batch["labels"]) * mask
            return negative_log_likelihood(logits, batch["labels"]) * mask, right.sum()

        def clean(own: Params) -> jax.Array:
            return losses(own, embeds)[0].sum() / jnp.maximum(weight, 1.0)

        def adversarial(own: Params) -> jax.Array:
            return losses(own, embeds + delta)[0]

        still = jax.lax.stop_gradient(params[OVERLAY])
        keep, against = mask > 0, jnp.zeros(())
        if rule == "project":
            dots, norm = influences(clean, adversarial, still)
            against = jnp.maximum(-dots, 0.0).sum() / jnp.maximum(norm, 1e-20)
        elif rule != "none":
            keep &= adv_filter(
                clean, adversarial, still, rule=rule, rho=rho, margin=margin, step=step
            )
        kept = keep.astype(jnp.float32)
        on, right = _losses(params, embeds)
        off, resisted = _losses(params, embeds + delta)
        total = (off * kept).sum()
        if rule == "project":
            # Its value is 0, its gradient what the projection adds.
            mean = on.sum() / jnp.maximum(weight, 1.0)
            total = total + jax.lax.stop_gradient(against) * (mean - jax.lax.stop_gradient(mean))
        return LossOut(
            {"clean": on.sum(), "adversarial": total},
            {"clean": weight, "adversarial": kept.sum()},
            {
                "kept": (kept.sum(), weight),
                "accuracy": (right, weight),
                "adversarial_accuracy": (resisted, weight),
            },
        )

    return objective


def influences(
    clean: Callable[[Params], jax.Array],
    adversarial: Callable[[Params], Float[Array, "B"]],
    own: Params,
) -> tuple[Float[Array, "B"], jax.Array]:
    """(<a_i, c> for every example, <c, c>), without a gradient of each.

    Args:
      clean: the mean loss on the originals.
      adversarial: the loss of every adversarial example.
      own: P.
    """
    c = jax.grad(clean)(own)
    _, dots = jax.jvp(adversarial, (own,), (c,))
    return dots, _inner(c, c)


def adv_filter(
    clean: Callable[[Params], jax.Array],
    adversarial: Callable[[Params], Float[Array, "B"]],
    own: Params,
    *,
    rule: str = "grad",
    rho: float = 0.0,
    margin: float = 0.0,
    step: float = 1e-3,
) -> Bool[Array, "B"]:
    """Which adversarial examples to train on; arguments as in :func:`influences`.

    Args:
      rule: ``grad`` or ``lookahead``.

    Raises:
      ValueError: another rule.
    """
    if rule not in ("grad", "lookahead"):
        raise ValueError(f"rule must be grad or lookahead, got {rule!r}")
    if rule == "grad":
        dots, norm = influences(clean, adversarial, own)
        if rho == 0.0:
            return dots >= 0
        each = jax.jacrev(adversarial)(own)
        sizes = jax.vmap(lambda a: jnp.sqrt(_inner(a, a)))(each)
        return dots >= rho * sizes * jnp.sqrt(norm)
    now = clean(own)

    def ahead(a: Params) -> jax.Array:
        return clean(jax.tree.map(lambda p, g: p - step * g, own, a)) <= now + margin

    return jax.lax.map(ahead, jax.jacrev(adversarial)(own))


def attack(
    model: Model,
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    steps: int = 5,
    lr: float = 0.03,
    mag: float = 0.05,
    eps: float = 0.0,
) -> Float[Array, "B T D"]:
    """Perturbations of the word embeddings that raise the loss, see the module; no gradient.

    Args:
      model: with everything that is plugged into it.
    """
    embeds = word_embeddings(params, batch)
    mask = batch.get("attention_mask")
    shown = jnp.ones(embeds.shape[:2]) if mask is None else jnp.asarray(mask) != 0
    shown = shown.astype(jnp.float32)[..., None]
    counted = _counted(batch)
    size = jnp.sqrt(jnp.maximum(shown.sum(1, keepdims=True), 1.0) * embeds.shape[-1])
    delta = jax.random.uniform(key, embeds.shape, minval=-1.0, maxval=1.0) * shown * mag / size
    still = jax.lax.stop_gradient((params, embeds))

    def climb(delta: jax.Array, _: None) -> tuple[jax.Array, None]:
        def loss(delta: jax.Array) -> jax.Array:
            logits = _logits(model, still[0], batch, still[1] + delta)
            return (negative_log_likelihood(logits, batch["labels"]) * counted).sum()

        g = jax.grad(loss)(delta)
        delta = (delta + lr * g / jnp.maximum(_norms(g), 1e-8)) * shown
        if eps > 0:
            delta = delta * jnp.minimum(1.0, eps / jnp.maximum(_norms(delta), 1e-12))
        return delta, None

    return jax.lax.stop_gradient(jax.lax.scan(climb, delta, length=steps)[0])


def word_embeddings(params: Params, batch: Batch) -> Float[Array, "B T D"]:
    """The look-up that ``embeds`` of ``apply`` stands for.

    Raises:
      ValueError: a model without words, or a batch without ``input_ids``.
    """
    table = table_of(params, "word")
    if table is None or "input_ids" not in batch:
        raise ValueError(
            "an attack on embeddings needs a model of words and input_ids in the batch"
        )
    found: jax.Array = jnp.take(table, jnp.asarray(batch["input_ids"]), axis=0)
    return found


def _logits(model: Model, params: Params, batch: Batch, embeds: jax.Array) -> jax.Array:
    logits = model.apply(params, batch, embeds=embeds).logits
    if logits is None or logits.ndim != 2:
        raise ValueError("plugat trains classifiers; load the model with a classification head")
    return logits.astype(jnp.float32)


def _counted(batch: Batch) -> jax.Array:
    labels = jnp.asarray(batch["labels"])
    known = (labels >= 0).astype(jnp.float32)
    given: Any = batch.get("label_mask")
    return known if given is None else known * jnp.asarray(given, jnp.float32)


def _norms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(x).sum((1, 2), keepdims=True))


def _inner(left: Params, right: Params) -> jax.Array:
    parts = jax.tree.map(lambda a, b: (a * b).sum(), left, right)
    return jnp.asarray(sum(jax.tree.leaves(parts)))
