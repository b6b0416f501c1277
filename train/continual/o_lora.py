"""O-LoRA's loss: a task's own, and a penalty on directions that earlier tasks have taken.

  L = L_task + lambda_1 sum |A_i^T A_t| + lambda_2 sum (|A_t|_F + |B_t|_F)

See ``models.overlays.o_lora`` for the terms. The penalties do not depend on the batch: they count
once a step at full weight, however many micro-batches there are.

Wang et al., Findings of EMNLP 2023, arXiv 2310.14152.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from steppe.models.overlays import o_lora
from steppe.models.overlays.overlay import OVERLAY
from steppe.train.objectives.basic import weighted
from steppe.train.types import Batch, LossOut, Objective, Params


def olora_loss(
    objective: Objective,
    *,
    lambda1: float = 0.5,
    lambda2: float = 0.0,
    p: int = 1,
    delta: Callable[[Params], Params] = lambda params: params[OVERLAY],
) -> Objective:
    """``objective`` and the penalties, of a model with ``o_lora.overlay``.

    Components: ``task`` and, where their coefficient is not 0, ``orthogonality`` and ``l2``; aux
    has each before its coefficient, as ``NAME/loss``.

    Args:
      lambda1: of the orthogonality; 0 = a fresh LoRA a task and nothing else.
      lambda2: of the norms of the current A and B.
      p: 1 or 2, the power of the overlaps.
      delta: where the overlay's delta is among the parameters.

    Raises:
      ValueError: a coefficient that is negative or not finite, p neither 1 nor 2.
    """
    for name, value in (("lambda1", lambda1), ("lambda2", lambda2)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")
    if p not in (1, 2):
        raise ValueError(f"p must be 1 (absolute values) or 2 (squares), got {p}")
    parts = {"task": (objective, 1.0)}
    if lambda1:
        parts["orthogonality"] = (_of(lambda d: o_lora.penalty(d, p), delta), lambda1)
    if lambda2:
        parts["l2"] = (_of(o_lora.l2_penalty, delta), lambda2)
    return weighted(parts)


def _of(penalty: Callable[[Params], jax.Array], delta: Callable[[Params], Params]) -> Objective:
    def objective(params: Params, batch: Batch, key: jax.Array | None) -> LossOut:
        return LossOut(penalty(delta(params)), jnp.float32(1))

    return objective
