"""Optimisers: gradients -> updates, as optax transforms only."""

from steppe.optim.basic import adamw, schedule
from steppe.optim.fsam import fsam
from steppe.optim.sam import asam, gsam, looksam, rho_like, sam

__all__ = ["adamw", "asam", "fsam", "gsam", "looksam", "rho_like", "sam", "schedule"]
