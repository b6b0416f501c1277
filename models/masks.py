"""Masks that are learnt by gradient: hard concrete, binary concrete, straight-through top-k.

a = log alpha (or l) is the only number that is trained of one mask entry; logit(u) = log u -
log(1 - u); gamma = -0.1, zeta = 1.1, beta = 2/3; sg = stop_gradient.

  hard concrete     u ~ U(0, 1);  s = sigma((logit(u) + a) / beta)
                    m = clip(s (zeta - gamma) + gamma, 0, 1)
                    P(m != 0) = sigma(a - beta log(-gamma / zeta))
                    P(m = 1)  = sigma(a - beta log((1 - gamma) / (zeta - 1)))
                    without noise: clip(sigma(a) (zeta - gamma) + gamma, 0, 1), with no beta
  binary concrete   s = sigma((logit(u) + l) / tau);  P(s > 1/2) = sigma(l) for every tau
                    straight through: 1[s > 1/2] + s - sg(s)
  top-k             hard + score - sg(score): the gradient of the mask is that of the score
  slimming          m = c, trained with lambda sum |c|, ranked by its signed value
  binarised         score > quantile(score, sparsity)

All sampling is in float32: in half precision log u underflows. A leaf of stacked layers is L
tensors wherever a tensor counts as one. Structure masks of a network's heads, feed-forward
neurons and layers are ``models.model.Masks``; here are the numbers to put into them, and masks
over weights (embeddings, norms and biases are not masked).

Louizos, Welling, Kingma, ICLR 2018 (arXiv 1712.01312); Maddison et al. and Jang et al., ICLR
2017; Liu et al., ICCV 2017 (slimming).

Deviations: groups of neighbouring rows or columns are contiguous; published code of robust
tickets takes rows r, r + n, ... for one group (``strided=True``).
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from steppe.models import tree
from steppe.models.binarize import binarize as binarize
from steppe.models.binarize import cubic_density as cubic_density
from steppe.models.binarize import l1_penalty as l1_penalty
from steppe.models.tree import Params

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
TINY = float(jnp.finfo(jnp.float32).tiny)
Granularity = Literal["weight", "row", "column", "matrix"]


# Noise ---------------------------------------------------------------------------------------


def leaf_keys(key: jax.Array, like: Mapping[str, Any]) -> Params:
    """One key a leaf, a function of ``key`` and the leaf's path alone.

    The draw of a leaf therefore depends neither on its neighbours nor on their order.
    """
    return tree.map_with_path(
        lambda path, _: jax.random.fold_in(key, zlib.crc32(path.encode())), like
    )


def uniform(key: jax.Array, shape: tuple[int, ...], eps: float = 0.0) -> Float[Array, "..."]:
    """U(0, 1) in float32, held inside [max(eps, tiny), 1 - max(eps, 2^-24)]: logits are finite."""
    u = jax.random.uniform(key, shape, jnp.float32)
    return jnp.clip(u, max(eps, TINY), 1 - max(eps, 2.0**-24))


def logit(u: jax.Array) -> jax.Array:
    """log u - log(1 - u)."""
    return jnp.log(u) - jnp.log1p(-u)


# A. Hard concrete ----------------------------------------------------------------------------


def hard_concrete(
    u: jax.Array, a: jax.Array, *, beta: float = BETA, gamma: float = GAMMA, zeta: float = ZETA
) -> jax.Array:
    """The mask that the noise ``u`` in (0, 1) makes of ``a``: in [0, 1], float32."""
    s = jax.nn.sigmoid((logit(u) + a.astype(jnp.float32)) / beta)
    return jnp.clip(s * (zeta - gamma) + gamma, 0.0, 1.0)


def sample_hard_concrete(
    rng: jax.Array,
    a: jax.Array,
    *,
    beta: float = BETA,
    gamma: float = GAMMA,
    zeta: float = ZETA,
    eps: float = 1e-6,
) -> jax.Array:
    """One draw of the mask, of the shape of ``a``; for training only (see hard_concrete_mean).

    Args:
      a: log alpha, any shape.
      beta: temperature; towards 0 the mask is 1 with probability sigma(a), else 0.
      gamma, zeta: the stretched interval, gamma < 0 and zeta > 1.
      eps: the noise stays in [eps, 1 - eps] (1e-4 in the code of robust tickets).

    Raises:
      ValueError: beta <= 0, or (gamma, zeta) does not hold [0, 1] inside.
    """
    _check_stretch(beta, gamma, zeta)
    return hard_concrete(uniform(rng, a.shape, eps), a, beta=beta, gamma=gamma, zeta=zeta)


def hard_concrete_mean(a: jax.Array, *, gamma: float = GAMMA, zeta: float = ZETA) -> jax.Array:
    """The mask without noise, for evaluation and ranking; it is not the mean of the samples."""
    s = jax.nn.sigmoid(a.astype(jnp.float32))
    return jnp.clip(s * (zeta - gamma) + gamma, 0.0, 1.0)


def hard_concrete_cdf(
    x: jax.Array,
    a: jax.Array,
    *,
    beta: float = BETA,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> jax.Array:
    """P(stretched sample <= x) before clipping: Q((x - gamma) / (zeta - gamma))."""
    s = jnp.clip((jnp.asarray(x, jnp.float32) - gamma) / (zeta - gamma), TINY, 1 - 2.0**-24)
    return jax.nn.sigmoid(beta * logit(s) - a)


def probability_nonzero(
    a: jax.Array, *, beta: float = BETA, gamma: float = GAMMA, zeta: float = ZETA
) -> jax.Array:
    """P(m != 0), the part of an L0 norm that one entry is expected to add."""
    return jax.nn.sigmoid(a.astype(jnp.float32) - beta * math.log(-gamma / zeta))


def probability_one(
    a: jax.Array, *, beta: float = BETA, gamma: float = GAMMA, zeta: float = ZETA
) -> jax.Array:
    """P(m = 1)."""
    return jax.nn.sigmoid(a.astype(jnp.float32) - beta * math.log((1 - gamma) / (zeta - 1)))


def expected_l0(
    a_tree: Mapping[str, Any],
    reduction: Literal["per_matrix_mean", "global_mean", "sum"] = "per_matrix_mean",
    *,
    sizes: Mapping[str, Any] | None = None,
    beta: float = BETA,
    gamma: float = GAMMA,
    zeta: float = ZETA,
) -> jax.Array:
    """The expected number (or share) of weights that are on, a scalar to put a price on.

    Args:
      a_tree: log alpha of every mask; a stacked leaf holds L matrices.
      reduction: "per_matrix_mean" is the mean of P(m != 0) in each matrix, then the plain mean
        over matrices, so that a small one counts as much as a large one; "global_mean" is over
        all weights; "sum" is the number of weights.
      sizes: number of weights behind one entry of each leaf (broadcast); default 1.

    Raises:
      ValueError: an unknown reduction, or an empty tree.
    """
    if reduction not in ("per_matrix_mean", "global_mean", "sum"):
        raise ValueError(
            f"reduction must be 'per_matrix_mean', 'global_mean' or 'sum', got {reduction!r}"
        )
    flat = tree.flatten(a_tree)
    if not flat:
        raise ValueError("a_tree holds no mask: nothing has an L0 norm")
    weight = dict.fromkeys(flat, 1.0) if sizes is None else tree.flatten(sizes)
    total, count, mean, matrices = jnp.float32(0), jnp.float32(0), jnp.float32(0), 0
    for path, a in flat.items():
        p = probability_nonzero(a, beta=beta, gamma=gamma, zeta=zeta)
        size = jnp.broadcast_to(jnp.asarray(weight[path], jnp.float32), p.shape)
        number = p.shape[0] if tree.is_stacked(path) else 1
        total, count = total + (p * size).sum(), count + size.sum()
        # Entries of one matrix have one size, so its mean needs no weights; neither do layers.
        mean, matrices = mean + p.mean() * number, matrices + number
    if reduction == "sum":
        return total
    return total / count if reduction == "global_mean" else mean / matrices


def log_alpha(p: float, *, gamma: float = GAMMA, zeta: float = ZETA) -> float:
    """The a whose noiseless mask is p.

    Raises:
      ValueError: p outside (0, 1): no finite a gives it a gradient.
    """
    if not 0 < p < 1:
        raise ValueError(f"p must lie in (0, 1), got {p}")
    s = (p - gamma) / (zeta - gamma)
    return math.log(s) - math.log1p(-s)


def clamp_log_alpha(a: Any) -> Any:
    """Every leaf held in [log 0.01, log 100], as the L0 code does after each update."""
    bound = math.log(100)
    return jax.tree.map(lambda leaf: jnp.clip(leaf, -bound, bound), a)


# Which weights share an entry ----------------------------------------------------------------


@dataclass(frozen=True)
class MaskSpec:
    """Which kernels are masked, and how finely.

    Attributes:
      path_regex: matches the whole path of a kernel.
      granularity: "weight" (an entry a weight), "row" (an entry an input feature), "column" (an
        entry an output feature) or "matrix".
      group: so many neighbouring rows or columns share an entry: the size of a head for
        attention heads; 1 for neurons.
    """

    path_regex: str
    granularity: Granularity = "weight"
    group: int = 1

    def __post_init__(self) -> None:
        if self.granularity not in ("weight", "row", "column", "matrix"):
            raise ValueError(
                "granularity must be 'weight', 'row', 'column' or 'matrix', "
                f"got {self.granularity!r}"
            )
        if self.group < 1:
            raise ValueError(f"group must be >= 1, got {self.group}")

    def shape(self, path: str, kernel: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the mask of a kernel [in, out], or [L, in, out] where layers are stacked.

        Raises:
          ValueError: the kernel is no matrix (weights of any rank can be masked one by one), or
            the group does not divide its rows or columns.
        """
        if self.granularity == "weight":
            return kernel
        stacked = int(tree.is_stacked(path))
        if len(kernel) - stacked != 2:
            raise ValueError(
                f"{path!r} of shape {kernel} is no matrix: mask it with granularity 'weight'"
            )
        stack, (rows, columns) = kernel[:stacked], kernel[stacked:]
        if self.granularity == "matrix":
            return (*stack, 1, 1)
        size = rows if self.granularity == "row" else columns
        if size % self.group:
            raise ValueError(
                f"group={self.group} does not divide the {size} {self.granularity}s of {path!r}"
            )
        found = size // self.group
        return (*stack, found, 1) if self.granularity == "row" else (*stack, 1, found)


def init_log_alpha(
    params: Mapping[str, Any],
    spec: MaskSpec,
    p: float = 0.9,
    *,
    key: jax.Array | None = None,
    spread: float = 0.01,
) -> Params:
    """log alpha, float32, for every kernel that ``spec`` names.

    Args:
      p: the noiseless mask at the start.
      key: with a key, the L0 code's start instead: a ~ N(log(p / (1 - p)), spread^2), p being
        the share that is kept.

    Raises:
      ValueError: no path matches, p outside (0, 1), or a kernel that ``spec`` does not fit.
    """
    value = log_alpha(p) if key is None else math.log(p) - math.log1p(-p)
    shapes = {
        path: spec.shape(path, tuple(leaf.shape))
        for path, leaf in tree.flatten(params).items()
        if re.fullmatch(spec.path_regex, path)
    }
    if not shapes:
        raise ValueError(f"path_regex {spec.path_regex!r} matches no parameter")
    made = {path: jnp.full(shape, value, jnp.float32) for path, shape in shapes.items()}
    if key is not None:
        keys = tree.flatten(leaf_keys(key, tree.unflatten(made)))
        made = {
            path: a + spread * jax.random.normal(keys[path], a.shape) for path, a in made.items()
        }
    return tree.unflatten(made)


def expand(mask: jax.Array, shape: tuple[int, ...], *, strided: bool = False) -> jax.Array:
    """A mask of groups, one entry a weight.

    Args:
      mask: of the rank of ``shape``; each dimension divides the one of ``shape``.
      strided: row r belongs to group r mod n rather than to r // (rows / n).

    Raises:
      ValueError: a dimension does not divide.
    """
    if mask.ndim != len(shape) or any(n % max(m, 1) for m, n in zip(mask.shape, shape)):
        raise ValueError(f"a mask of shape {mask.shape} does not group weights of shape {shape}")
    for axis, (have, want) in enumerate(zip(mask.shape, shape)):
        if have in (1, want):
            continue  # broadcasting does it
        times = want // have
        tiles = [times if a == axis else 1 for a in range(mask.ndim)]
        mask = jnp.tile(mask, tiles) if strided else jnp.repeat(mask, times, axis)
    return jnp.broadcast_to(mask, shape)


def apply_weight_masks(
    params: Mapping[str, Any], mask_tree: Mapping[str, Any], *, strided: bool = False
) -> Params:
    """``params`` with W * m at every path of ``mask_tree``; biases and the rest as they are.

    Raises:
      KeyError: a mask without a parameter. ValueError: a mask that does not fit its kernel.
    """

    def one(path: str, mask: jax.Array) -> jax.Array:
        w = tree.get(params, path)
        m = expand(jnp.asarray(mask), tuple(w.shape), strided=strided)
        return (w.astype(jnp.float32) * m.astype(jnp.float32)).astype(w.dtype)

    return tree.replace(params, {p: one(p, m) for p, m in tree.flatten(mask_tree).items()})


# B. Binary concrete --------------------------------------------------------------------------


def binary_concrete(u: jax.Array, l: jax.Array, tau: float) -> jax.Array:  # noqa: E741
    """sigma((logit(u) + l) / tau) for noise ``u`` in (0, 1), float32."""
    return jax.nn.sigmoid((logit(u) + l.astype(jnp.float32)) / tau)


def gumbel_sigmoid(
    rng: jax.Array,
    l: jax.Array,  # noqa: E741
    tau: float = 1.0,
    hard: bool = False,
) -> jax.Array:
    """One draw of a binary concrete variable, float32, of the shape of ``l``.

    Args:
      l: logits; an entry is above 1/2 with probability sigma(l), whatever tau is.
      tau: temperature > 0.
      hard: return 0 or 1, with the gradient of the soft value.

    Raises:
      ValueError: tau <= 0.
    """
    _check_temperature(tau)
    s = binary_concrete(uniform(rng, l.shape), l, tau)
    return (s > 0.5).astype(jnp.float32) + (s - jax.lax.stop_gradient(s)) if hard else s


def concrete_mask(
    key: jax.Array, logits_tree: Mapping[str, Any], T: float = 0.5, *, hard: bool = False
) -> Params:
    """:func:`gumbel_sigmoid` of every leaf, each with a key of its own (see leaf_keys)."""
    keys = leaf_keys(key, logits_tree)
    return tree.map_with_path(lambda _, l, k: gumbel_sigmoid(k, l, T, hard), logits_tree, keys)  # noqa: E741


def rescale(mask_tree: Mapping[str, Any]) -> Params:
    """m / mean(m), tensor by tensor: each has mean 1, and the gradient flows through the mean.

    The mean is that of the entries themselves, not of their probabilities; a tensor that is 0
    everywhere (possible with hard masks) stays 0.
    """

    def one(path: str, m: jax.Array) -> jax.Array:
        axes = tuple(range(int(tree.is_stacked(path)), m.ndim))
        mean = m.mean(axes, keepdims=True)
        return m / jnp.where(mean == 0, 1.0, mean)

    return tree.map_with_path(one, mask_tree)


def rescaled_mask(
    key: jax.Array, logits_tree: Mapping[str, Any], T: float = 0.5, *, hard: bool = False
) -> Params:
    """One draw of a mask over a tree, divided tensor by tensor by its own mean.

    Args:
      key: the same key gives the same mask, on any mesh.
      logits_tree: shaped like the parameters that it masks.
      T: temperature.
      hard: see :func:`gumbel_sigmoid`.

    Raises:
      ValueError: T <= 0.
    """
    return rescale(concrete_mask(key, logits_tree, T, hard=hard))


# C and D. Straight-through top-k -------------------------------------------------------------


def topk_ste(score: jax.Array, k: int) -> jax.Array:
    """Ones at the k largest scores, zeros elsewhere; backwards the identity.

    With masked weights W * m the score then gets dL/dW' * W. Of equal scores the first ones
    survive, so that they are exactly k. ``jax.vmap`` it for a budget a row.

    Raises:
      ValueError: k is negative or larger than the number of scores.
    """
    if not 0 <= k <= score.size:
        raise ValueError(f"k must lie between 0 and the {score.size} scores, got {k}")
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(score).reshape(-1), k)
    hard = jnp.zeros(score.size, score.dtype).at[chosen].set(1).reshape(score.shape)
    # The difference is exactly 0 forwards; hard + score - score would round.
    return hard + (score - jax.lax.stop_gradient(score))


def gumbel_topk_ste(
    rng: jax.Array,
    score: Float[Array, "... n"],
    k: int,
    tau: float = 1.0,
    valid: Bool[Array, "... n"] | None = None,
) -> Float[Array, "... n"]:
    """A random set of k of n, by noisy scores; backwards the relaxed softmax.

    Args:
      score: along the last axis.
      k: entries that are set a row; of fewer valid ones, those.
      tau: temperature of the softmax whose gradient is used.
      valid: False where an entry cannot be chosen (padding).

    Raises:
      ValueError: tau <= 0, or k outside 0 to n.
    """
    _check_temperature(tau)
    n = score.shape[-1]
    if not 0 <= k <= n:
        raise ValueError(f"k must lie between 0 and the {n} scores, got {k}")
    allowed = jnp.ones(score.shape, bool) if valid is None else valid
    # Finite, so that a row without a valid entry has a gradient of 0 and no NaN.
    low = jnp.float32(-1e30)
    noise = -jnp.log(-jnp.log(uniform(rng, score.shape)))
    noisy = jax.nn.log_softmax(jnp.where(allowed, score.astype(jnp.float32), low), axis=-1) + noise
    y = jnp.where(allowed, jax.nn.softmax(jnp.where(allowed, noisy, low) / tau, axis=-1), 0.0)
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(jnp.where(allowed, noisy, low)), k)
    hard = jax.nn.one_hot(chosen, n, dtype=jnp.float32).sum(-2) * allowed
    return hard + (y - jax.lax.stop_gradient(y))


def _check_stretch(beta: float, gamma: float, zeta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    if not (gamma < 0 and zeta > 1):
        raise ValueError(f"gamma must be < 0 and zeta > 1, got {gamma} and {zeta}")


def _check_temperature(tau: Any) -> None:
    """Checks a number; an annealed temperature is only known when the program runs."""
    if not isinstance(tau, jax.core.Tracer) and not tau > 0:
        raise ValueError(f"the temperature must be > 0, got {tau}")
