"""From learnt scores to a 0/1 mask of a prescribed sparsity, and how fast to get there.

  keep         score > quantile(score, sparsity), linear interpolation as in numpy.quantile
  min_alive    while a tensor keeps too few, its best scores are raised above all others and
               the threshold is found anew
  density(t)   d_f + (d_i - d_f) (1 - (t - t0) / (t1 - t0))^3 on [t0, t1]

The order statistics behind a quantile are found by fixing one bit of the answer after the
other, from the highest: 32 counts over the scores where they lie, under ``jit`` and on a mesh,
without gathering or sorting them.

Wang et al., AAAI 2020 and Chen et al., ACL 2021 (tickets drawn from slimming coefficients); Zhu
and Gupta, 2017 (arXiv 1710.01878, the cubic schedule).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steppe.models import tree


def binarize(
    scores: Any,
    sparsity: float,
    scope: Literal["global", "layerwise"] = "global",
    min_alive: int = 0,
) -> Any:
    """Bool masks, True where a score lies above the quantile of its scope.

    Scores are ranked by their signed value. Equal scores at the threshold are all dropped, so
    more than asked may go: look at the counts.

    Args:
      scores: an array [L, ...] with a row a layer, or a tree of parameters, in which every
        tensor (a layer of a stacked leaf) is such a row. NaN ranks last.
      sparsity: share to drop, in [0, 1).
      scope: "global" has one threshold, "layerwise" one for each row.
      min_alive: each row keeps at least so many of its scores; all of them if it has fewer.

    Raises:
      ValueError: sparsity outside [0, 1), an unknown scope, or a negative min_alive.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}")
    if scope not in ("global", "layerwise"):
        raise ValueError(f"scope must be 'global' or 'layerwise', got {scope!r}")
    if min_alive < 0:
        raise ValueError(f"min_alive must be >= 0, got {min_alive}")
    flat = tree.flatten(scores) if isinstance(scores, Mapping) else {tree.STACK + "/": scores}
    rows = []
    for path, leaf in flat.items():
        stacked = tree.is_stacked(path)
        value = leaf.astype(jnp.float32).reshape(leaf.shape[0] if stacked else 1, -1)
        rows.append(jnp.where(jnp.isnan(value), -jnp.inf, value))
    if sparsity == 0:
        kept = [jnp.ones(row.shape, bool) for row in rows]
    elif scope == "global":
        kept = _global(rows, sparsity, min_alive)
    else:
        kept = [_layerwise(row, sparsity, min_alive) for row in rows]
    masks = {p: k.reshape(leaf.shape) for (p, leaf), k in zip(flat.items(), kept, strict=True)}
    return tree.unflatten(masks) if isinstance(scores, Mapping) else masks[tree.STACK + "/"]


def quantile(leaves: Sequence[jax.Array], q: float) -> jax.Array:
    """The q-quantile of all entries of ``leaves`` together, float32, as numpy.quantile.

    Raises:
      ValueError: q outside [0, 1], or no entry.
    """
    size = sum(leaf.size for leaf in leaves)
    if not 0 <= q <= 1 or not size:
        raise ValueError(f"q must lie in [0, 1] and there must be scores, got {q} of {size}")
    place = q * (size - 1)
    low = math.floor(place)
    first = order_statistic(leaves, low)
    if place == low:
        return first
    second = order_statistic(leaves, low + 1)
    share = jnp.float32(place - low)
    # Between equal infinities the difference is NaN; the value is either of them.
    return jnp.where(first == second, first, first + (second - first) * share)


@jax.jit
def order_statistic(leaves: Sequence[jax.Array], rank: Any) -> jax.Array:
    """The entry that has ``rank`` entries before it in ascending order; for fewer than 2^32."""
    top = jnp.uint32(1 << 31)

    def ordered(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32) + 0.0, jnp.uint32)
        return jnp.where(bits >= top, ~bits, bits | top)

    keys = [ordered(leaf) for leaf in leaves]

    def settle(step: int, found: jax.Array) -> jax.Array:
        candidate = found | (top >> jnp.asarray(step, jnp.uint32))
        below = sum(((k < candidate).sum(dtype=jnp.uint32) for k in keys), jnp.uint32(0))
        return jnp.where(below <= jnp.asarray(rank, jnp.uint32), candidate, found)

    found = jax.lax.fori_loop(0, 32, settle, jnp.uint32(0))
    bits = jnp.where(found >= top, found ^ top, ~found)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _global(rows: list[jax.Array], sparsity: float, min_alive: int) -> list[jax.Array]:
    """Keeps what lies above one threshold; rows with too few are helped until none has."""

    def keep(rows: list[jax.Array]) -> list[jax.Array]:
        threshold = quantile(rows, sparsity)
        return [row > threshold for row in rows]

    if not min_alive:
        return keep(rows)
    finite = [jnp.where(jnp.isfinite(row), row, -jnp.inf).max() for row in rows]
    largest = jnp.stack(finite).max()
    # Above every score and still finite: between infinities there is no quantile.
    raised = largest + jnp.maximum(jnp.abs(largest), 1.0)
    best = [_best(row, min_alive) for row in rows]
    enough = [min(min_alive, row.shape[1]) for row in rows]

    def dead(rows: list[jax.Array]) -> list[jax.Array]:
        return [k.sum(1) < need for k, need in zip(keep(rows), enough, strict=True)]

    def some(carry: tuple[list[jax.Array], list[jax.Array]]) -> jax.Array:
        rows, helped = carry
        # A row that is helped already cannot be helped again (all others may be as well).
        open_ = [(d & ~h).any() for d, h in zip(dead(rows), helped, strict=True)]
        return jnp.stack(open_).any()

    def help_(carry: tuple[list[jax.Array], list[jax.Array]]) -> Any:
        rows, helped = carry
        now = [d | h for d, h in zip(dead(rows), helped, strict=True)]
        lifted = [jnp.where(h[:, None] & b, raised, row) for row, h, b in zip(rows, now, best)]
        return lifted, now

    start = (rows, [jnp.zeros(row.shape[0], bool) for row in rows])
    lifted, helped = jax.lax.while_loop(some, help_, start)
    # With very high sparsities the threshold itself can be a raised score: those stay.
    return [k | (h[:, None] & b) for k, h, b in zip(keep(lifted), helped, best)]


def _layerwise(row: jax.Array, sparsity: float, min_alive: int) -> jax.Array:
    kept = jax.vmap(lambda r: r > quantile([r], sparsity))(row)
    if not min_alive:
        return kept
    few = kept.sum(1, keepdims=True) < min(min_alive, row.shape[1])
    return kept | (few & _best(row, min_alive))


def _best(row: Float[Array, "L n"], number: int) -> jax.Array:
    """True on the ``number`` largest scores of each row; of equal ones the first."""
    _, chosen = jax.lax.top_k(row, min(number, row.shape[1]))
    mask = jnp.zeros(row.shape, bool)
    return jax.vmap(lambda m, c: m.at[c].set(True))(mask, chosen)


def l1_penalty(coefficients: Any) -> jax.Array:
    """sum |c| over all leaves: the price of slimming coefficients, before its factor."""
    leaves = jax.tree.leaves(coefficients)
    return sum((jnp.abs(c.astype(jnp.float32)).sum() for c in leaves), jnp.float32(0))


def cubic_density(step: Any, start: float, end: float, t0: int, t1: int) -> jax.Array:
    """Share of entries that are kept at ``step``: fast at first, flat towards ``t1``.

    Args:
      start, end: densities up to t0 and from t1 on, in [0, 1].

    Raises:
      ValueError: t1 <= t0, or a density outside [0, 1].
    """
    if not t1 > t0:
        raise ValueError(f"t1 must be > t0, got {t1} and {t0}")
    for name, value in (("start", start), ("end", end)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    done = jnp.clip((jnp.asarray(step, jnp.float32) - t0) / (t1 - t0), 0.0, 1.0)
    return end + (start - end) * (1.0 - done) ** 3
