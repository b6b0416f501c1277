"""A classifier out of the few examples themselves, for encoders that predict no words.

  mu_c = mean of x_i with y_i = c,    l_c(x) = tau (x . mu_c - |mu_c|^2 / 2)

x [D] is what the model's head reads, with the prompt 0. The class of the largest logit is that of
the nearest mean, whatever tau is; the logits are those of normal classes that share one spherical
covariance I / tau. tau, which the losses do depend on, is the one of a grid that has the least
cross entropy when every example is scored by means that leave it out. The head is fixed from then
on.

In a search the examples are scored the same way, by fixed means that leave each one out: a mean
of 16 vectors that one of them is in is nearer to it than to any other, so that the plain head
is right on all of them from the beginning and a prompt has nothing to learn.

Snell, Swersky, Zemel, NeurIPS 2017, arXiv 1703.05175 (nearest means of few examples). In black-box
tuning the scores are those of label words of a masked language model; this stands in where there is
no such head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from steppe.models.sites import Site, SiteContext


class Prototypes(NamedTuple):
    """A linear head.

    Attributes:
      kernel, bias: [D, C] and [C] float32, with the mean of all examples as the origin of x.
      own_kernel, own_bias: [N, D] and [N], the column of each example's class, without it.
      labels: [N].
      scale: tau.
      held_out: accuracy on the examples, each left out of the means that score it.
    """

    kernel: NDArray[np.float32]
    bias: NDArray[np.float32]
    own_kernel: NDArray[np.float32]
    own_bias: NDArray[np.float32]
    labels: NDArray[np.int32]
    scale: float
    held_out: float


def prototypes(x: NDArray[np.floating], labels: NDArray[np.integer], classes: int) -> Prototypes:
    """The head of examples x [N, D] with labels [N].

    Raises:
      ValueError: a class with fewer than two examples, a feature that is not finite.
    """
    x, y = np.asarray(x, np.float64), np.asarray(labels)
    counts = np.bincount(y[y >= 0], minlength=classes)[:classes]
    if counts.min() < 2:
        poor = int(counts.argmin())
        raise ValueError(
            f"class {poor} has {counts[poor]} examples; a mean that leaves one out needs 2 a class"
        )
    if not np.isfinite(x).all():
        raise ValueError("the features hold values that are not finite; the model is damaged")
    # The origin is free: around the mean the numbers are small and the rounding too.
    center = x.mean(0)
    means = np.stack([x[y == c].mean(0) for c in range(classes)])
    moved, far = means - center, x - center
    own = counts[y][:, None]
    without = (own * moved[y] - far) / (own - 1)
    near = far @ moved.T - (moved**2).sum(1) / 2
    near[np.arange(len(y)), y] = (far * without).sum(1) - (without**2).sum(1) / 2
    # In units of the inverse mean squared distance to the own mean; where the means tell the
    # classes no better than chance the least loss is that of no scale at all, hence the lower end.
    within = float(((x - means[y]) ** 2).sum(1).mean())
    grid = 2.0 ** np.arange(-2, 25) / max(within, 1e-30)
    losses = [_cross_entropy(t * near, y) for t in grid]
    tau = float(grid[int(np.argmin(losses))])
    held = float((near.argmax(1) == y).mean())

    def bias(mean: NDArray[np.float64]) -> NDArray[np.float32]:
        # Around the center, written for x itself; equal up to a term of x alone.
        return (-tau * ((mean**2).sum(1) / 2 + mean @ center)).astype(np.float32)

    kernel, own_kernel = (tau * m for m in (moved.T, without))
    return Prototypes(
        kernel.astype(np.float32),
        bias(moved),
        own_kernel.astype(np.float32),
        bias(without),
        y.astype(np.int32),
        tau,
        held,
    )


def left_out(head: Prototypes) -> Site:
    """The site ``logits`` under which the examples of ``head``, in their order, are scored by
    means that leave them out."""

    def fn(own: Any, x: jax.Array, base: Callable[[Any], Any], context: SiteContext) -> jax.Array:
        logits: jax.Array = base(x)
        kernel, bias, labels = own
        column = ((x * kernel).sum(-1) + bias).astype(logits.dtype)
        return jnp.where(jnp.arange(logits.shape[1]) == labels[:, None], column[:, None], logits)

    return Site(fn, (head.own_kernel, head.own_bias, head.labels))


def _cross_entropy(logits: NDArray[np.float64], y: NDArray[np.integer]) -> float:
    top = logits.max(1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
    return float((total - logits[np.arange(len(y)), y]).mean())
