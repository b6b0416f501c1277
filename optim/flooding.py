"""Flooding as a transform: the gradient turns round when the loss is below the flood level.

  L~ = |L - b| + b        dL~ = sign(L - b) dL

L is the mean loss of the global batch, which ``update`` gets as ``value``; first in a chain the
transform equals the flooded loss under any optimiser, with micro-batches and on a mesh too,
where |.| of each part's own mean would be another loss.

Ishida, Yamane, Sakai, Niu, Sugiyama, ICML 2020, arXiv 2002.08709; Liu et al., ACL 2022
(Flooding-X, which finds b: see ``steppe.train.flooding``).

With sharpness-aware transforms ``value`` is the loss at w, and the order matters:

  sam(chain(flooding(b), adamw))  the flooded SAM: the base gets sign(L(w) - b) dL(w + e), with e
                                  uphill as always; below the level it climbs
  chain(flooding(b), sam(adamw))  is not flooding: the sign only turns e round, SAM takes its
                                  second gradient itself and goes on downhill below the level

The loss |L - b| + b under SAM would differ from the first by reading the sign at w + e and by
turning e round below the level, where the two losses' uphill directions are opposite.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax


def flooding(level: Any) -> optax.GradientTransformationExtraArgs:
    """Multiplies gradients by ``sign(value - level)``; put it first in the chain.

    Where the loss is exactly the level the gradient is 0, as that of |.| is; where the loss is
    not a number neither is the update, so that a check of the loss or the updates sees it.

    Args:
      level: b, in the units of the loss (nats): a number >= 0, or an array that
        ``optax.inject_hyperparams`` fills in. 0 is plain training of a loss >= 0.

    Raises:
      ValueError: level is negative, NaN or infinite; from ``update``, no ``value``, or one that
        is not a scalar.
    """
    _check(level)

    def init(params: Any) -> optax.EmptyState:
        return optax.EmptyState()

    def update(
        grads: Any, state: optax.EmptyState, params: Any = None, *, value: Any = None, **extra: Any
    ) -> tuple[Any, optax.EmptyState]:
        if value is None:
            raise ValueError(
                "flooding needs value, the mean loss of the batch that the gradient is of: pass "
                "tx.update(grads, state, params, value=loss); train.step.make does so"
            )
        loss = jnp.asarray(value, jnp.float32)
        if loss.shape:
            raise ValueError(f"value must be the mean loss, a scalar, got shape {loss.shape}")
        sign = jnp.sign(loss - jnp.asarray(level, jnp.float32))
        return jax.tree.map(lambda g: g * sign.astype(g.dtype), grads), state

    return optax.GradientTransformationExtraArgs(init, update)


def _check(level: Any) -> None:
    if isinstance(level, jax.core.Tracer):
        return
    try:
        number = math.nan if isinstance(level, bool) else float(level)
    except (TypeError, ValueError):
        number = math.nan
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"level must be a finite number >= 0, got {level!r}")
