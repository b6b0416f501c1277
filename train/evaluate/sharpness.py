"""How sharp the loss is around a set of parameters: the public names of four files.

==============  =================================================================================
``landscape``   the loss of a fixed set of examples, with gradient and Hessian-vector product
``ball``        the largest loss within a radius: what SAM and ASAM minimise
``curvature``   top eigenvalues of the Hessian, its trace, its spectral density
``surface``     losses along lines and over planes, with filter-normalised directions
==============  =================================================================================

    loss = batched_loss(objective, frozen, batches)
    ball_max(loss, params, 0.05).gap
    top_eigenvalues(loss, params, jax.random.key(0)).values
"""

from steppe.train.evaluate.ball import Ball, ball_max
from steppe.train.evaluate.curvature import (
    Density,
    Eigen,
    Trace,
    smooth,
    spectral_density,
    summarise,
    top_eigenvalues,
    trace,
)
from steppe.train.evaluate.landscape import BatchedLoss, batched_loss
from steppe.train.evaluate.surface import (
    Curve,
    Line,
    Surface,
    directions,
    line,
    surface_1d,
    surface_2d,
)

__all__ = [
    "Ball",
    "BatchedLoss",
    "Curve",
    "Density",
    "Eigen",
    "Line",
    "Surface",
    "Trace",
    "ball_max",
    "batched_loss",
    "directions",
    "line",
    "smooth",
    "spectral_density",
    "summarise",
    "surface_1d",
    "surface_2d",
    "top_eigenvalues",
    "trace",
]
