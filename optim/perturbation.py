"""Perturbations of sharpness-aware minimisation: the point w + e at which the second gradient
is taken.

  SAM    e = rho * g / (|g| + delta)
  ASAM   e = rho * T^2 g / (|T g| + delta),   T = |w| + eta on matrices and 1 elsewhere

|.| is one L2 norm over all leaves, accumulated in float32 whatever the dtype of the leaves.
Where the norm is 0 there is no direction to climb in, and e = 0.

Foret et al., ICLR 2021 (arXiv 2010.01412); Kwon et al., ICML 2021 (arXiv 2102.11600). The
published implementations differ in delta (0 to 1e-7); ours is 1e-12.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from steppe.models.tree import STACK
from steppe.optim import check

# (gradient, parameters, rho) -> e, all trees of one structure.
Perturbation: TypeAlias = Callable[[Any, Any, Any], Any]
DELTA = 1e-12


def global_norm(tree: Any) -> jax.Array:
    """L2 norm over all leaves together, float32 scalar."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def dot(left: Any, right: Any) -> jax.Array:
    """Inner product over all leaves, float32 scalar."""
    products = jax.tree.map(
        lambda a, b: jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32)), left, right
    )
    return sum(jax.tree.leaves(products), jnp.float32(0))


def l2(*, delta: float = DELTA) -> Perturbation:
    """SAM's: rho along the gradient.

    Args:
      delta: added to the norm.
    """

    def perturb(grads: Any, params: Any, rho: Any) -> Any:
        scale = _scale(rho, global_norm(grads), delta)
        return jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads)

    return perturb


def adaptive(
    *, eta: float = 0.01, scaled: Literal["matrices", "all"] = "matrices", delta: float = DELTA
) -> Perturbation:
    """ASAM's: the ball is measured relative to each parameter's size.

    Args:
      eta: added to |w|, so that a weight of 0 can move.
      scaled: which leaves have T = |w| + eta: "matrices" (tensors of two or more dimensions,
        a stacked leaf counting as one tensor a layer) as in the authors' code, or "all" as in
        the usual PyTorch port, which also has eta = 0.
      delta: added to the norm.

    Raises:
      ValueError: eta is no finite number >= 0, or scaled is neither.
    """
    check.number(eta, "eta", ">= 0 and finite", check.within(0), array=True)
    if scaled not in ("matrices", "all"):
        raise ValueError(f"scaled must be 'matrices' or 'all', got {scaled!r}")

    def perturb(grads: Any, params: Any, rho: Any) -> Any:
        t = sizes(params, eta, scaled)
        tg = jax.tree.map(lambda t, g: t * g.astype(jnp.float32), t, grads)
        scale = _scale(rho, global_norm(tg), delta)
        return jax.tree.map(lambda t, tg: t * tg * scale, t, tg)

    return perturb


def sizes(params: Any, eta: Any, scaled: str) -> Any:
    """T of :func:`adaptive`: |w| + eta on the leaves that are scaled, 1 on the others.

    Args:
      scaled: "matrices", "all" or "none".
    """

    def size(path: Any, w: jax.Array) -> jax.Array:
        if scaled == "all" or (scaled == "matrices" and dimensions(path, w) >= 2):
            return jnp.abs(w.astype(jnp.float32)) + eta
        return jnp.ones((), jnp.float32)

    return jax.tree_util.tree_map_with_path(size, params)


def dimensions(path: Any, leaf: Any) -> int:
    """Dimensions of the tensor at a key path; the layer axis of a stacked leaf is none."""
    stacked = any(getattr(key, "key", None) == STACK for key in path[:-1])
    return int(leaf.ndim) - int(stacked)


def _scale(rho: Any, norm: jax.Array, delta: float) -> jax.Array:
    """rho / (norm + delta), and 0 for a norm of 0; NaN stays NaN."""
    safe = jnp.where(norm == 0, 1.0, norm + delta)
    return jnp.where(norm == 0, 0.0, jnp.asarray(rho, jnp.float32) / safe)


def displace(params: Any, step: Any) -> Any:
    """``params + step`` added in float32 and returned in the dtype of each parameter."""
    return jax.tree.map(lambda w, e: (w.astype(jnp.float32) + e).astype(w.dtype), params, step)
