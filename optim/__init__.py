"""Optimisers: gradients -> updates, as optax transforms only."""

from steppe.optim.basic import adamw, schedule

__all__ = ["adamw", "schedule"]
