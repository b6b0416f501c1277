"""Objectives: pure functions ``(params, batch, key) -> LossOut`` that return sums, never means."""

from steppe.train.objectives.balance import localized_balance_loss, loramoe_loss
from steppe.train.objectives.basic import (
    classification_ce,
    for_task,
    mlm_ce,
    mse,
    span_ce,
    token_ce,
    weighted,
)
from steppe.train.objectives.verbalizer import verbalizer_ce

__all__ = [
    "classification_ce",
    "for_task",
    "localized_balance_loss",
    "loramoe_loss",
    "mlm_ce",
    "mse",
    "span_ce",
    "token_ce",
    "verbalizer_ce",
    "weighted",
]
