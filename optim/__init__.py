"""Optimisers: gradients -> updates, as optax transforms; two players: ``minimax``."""

from steppe.optim import minimax
from steppe.optim.basic import adamw, schedule
from steppe.optim.esam import esam
from steppe.optim.flooding import flooding
from steppe.optim.fsam import fsam
from steppe.optim.looksam import looksam
from steppe.optim.sam import asam, gsam, rho_like, sam
from steppe.optim.selective import selective_gradient

__all__ = [
    "adamw",
    "asam",
    "esam",
    "flooding",
    "fsam",
    "gsam",
    "looksam",
    "minimax",
    "rho_like",
    "sam",
    "schedule",
    "selective_gradient",
]
