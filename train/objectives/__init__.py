"""Objectives: pure functions ``(params, batch, key) -> LossOut`` that return sums, never means."""

from steppe.train.objectives.basic import (
    classification_ce,
    for_task,
    mlm_ce,
    mse,
    span_ce,
    token_ce,
    weighted,
)

__all__ = [
    "classification_ce",
    "for_task",
    "mlm_ce",
    "mse",
    "span_ce",
    "token_ce",
    "weighted",
]
