"""How sharp the loss is around a set of parameters: the public names of four files.

==============  =================================================================================
``landscape``   the loss of a fixed set of examples, with gradient and Hessian-vector product
``ball``        the largest loss within a radius: what SAM and ASAM minimise
``curvature``   top eigenvalues of the Hessian, its trace, its spectral density
``surface``     losses along lines and over planes, with filter-normalised directions
==============  =================================================================================

    >>> import jax, jax.numpy as jnp
    >>> from steppe.train import LossOut
    >>> def objective(params, batch, key):  # 3 w_0^2 + w_1^2 a row: the Hessian is diag(6, 2)
    ...     loss = 3 * params["w"][0] ** 2 + params["w"][1] ** 2
    ...     return LossOut(loss * batch["x"].shape[0], jnp.float32(batch["x"].shape[0]), {})
    >>> loss = batched_loss(objective, {}, [{"x": jnp.zeros((4, 1))}])
    >>> params = {"w": jnp.zeros(2)}
    >>> found = top_eigenvalues(loss, params, jax.random.key(0))
    >>> round(float(found.values[0]), 3)
    6.0
    >>> round(float(ball_max(loss, {"w": jnp.ones(2)}, 0.05).gap), 2)  # the norm of (6, 2) x rho
    0.32
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
