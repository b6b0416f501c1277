"""TIES: trim, elect signs, merge what agrees.

  trim     keep, of the whole vector tau_i of a task, the fraction K largest in magnitude
  elect    gamma = sign(sum_i trimmed tau_i); where that is 0, sign(sum over entries of gamma)
  merge    of the trimmed entries that have the elected sign: their sum, mean or largest
  theta    theta_0 + lam tau_TIES

Trimming is global: one threshold a task over all leaves together, never leaf by leaf.

Yadav et al., NeurIPS 2023 (arXiv 2306.01708).

Deviations: the paper keeps K d of d entries; the published code keeps every entry that reaches
the (d - int(K d))-th smallest magnitude, that is int(K d) + 1 of them and more where magnitudes
tie. Ours is the code's, ``exact_k=True`` the paper's (of entries that tie, the first in the
order of the sorted paths are kept). Where the majority of signs is 0 too, the code counts an
undecided entry as negative; so do we. The paper's own setting is merge="mean" with lam=1.

The threshold is found without sorting: the bits of a magnitude read as an integer grow with
it, so the k-th largest is searched for among integers. A round counts how many entries reach
each of eight candidates, in one pass. The first candidates come from a sample of the entries,
later ones from interpolation; that takes three or four passes where bisection takes 31. The
candidates only steer the search, they never change what it finds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from steppe.models import tree
from steppe.models.tree import Params
from steppe.train.merge import leafwise

Merge: TypeAlias = Literal["sum", "mean", "max"]
MERGES = ("sum", "mean", "max")

INFINITY = 0x7F800000
CANDIDATES = 8
SAMPLE = 1 << 18  # entries a task from which the first candidates are guessed


class Trim(NamedTuple):
    """Which entries survive.

    Attributes:
      threshold: int32 [N], bits of the smallest kept magnitude.
      cut: of each leaf, int32 [N]: entries that tie with the threshold are kept while their
        place in the leaf is below it. None keeps all that tie.
    """

    threshold: jax.Array
    cut: list[jax.Array] | None


def ties(
    theta0: Mapping[str, Any],
    taus: Mapping[str, Any],
    k: float = 0.2,
    lam: Any = 0.3,
    merge: Merge = "sum",
    exact_k: bool = False,
) -> Params:
    """The TIES merge of N task vectors into the base.

    Called outside jit it needs no memory but the result; inside, XLA copies the task vectors
    for the loop that finds the thresholds.

    Args:
      theta0: the base.
      taus: stacked task vectors, leaves [N, ...].
      k: fraction of each task's entries that is kept, in [0, 1].
      lam: the coefficient; to be tuned anew for every ``merge``.
      merge: how the entries that agree are combined.
      exact_k: keep exactly int(k d) entries.

    Raises:
      ValueError: ``k`` or ``merge`` is not one of the above, ``taus`` are not of this base.
    """
    if merge not in MERGES:
        raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {merge!r}")
    kept = trim(_leaves(taus)[1], k, exact_k)
    return _merged(theta0, taus, kept, lam, merge)


@functools.partial(jax.jit, static_argnames="merge")
def _merged(
    theta0: Mapping[str, Any], taus: Mapping[str, Any], kept: Trim, lam: Any, merge: Merge
) -> Params:
    paths, leaves = _leaves(taus)
    sign = _majority(leaves, kept)
    kept = _apart(kept)
    place = {path: number for number, path in enumerate(paths)}

    def one(path: str, base: jax.Array, tau: jax.Array) -> jax.Array:
        kept_parts = trimmed(tau, kept, place[path])
        move = combine(kept_parts, elect(kept_parts, sign), merge)
        return (base.astype(jnp.float32) + jnp.asarray(lam, jnp.float32) * move).astype(base.dtype)

    return leafwise.apply(theta0, taus, one)


def _apart(kept: Trim) -> Trim:
    """The same thresholds, not known to be the same: trimming twice is one pass each, where a
    shared result would be written to memory for every task."""
    return Trim(*jax.lax.optimization_barrier(tuple(kept)))


def ties_components(taus: Mapping[str, Any], k: float = 0.2, exact_k: bool = False) -> Params:
    """The task vectors after trimming and election, kept apart: what AdaMerging++ scales.

    Entries that were trimmed, or whose sign was not elected, are 0; shapes and dtypes are those
    of ``taus``. Their sum is the TIES vector for merge="sum".

    Raises:
      ValueError: ``k`` is not in [0, 1].
    """
    return _components(taus, trim(_leaves(taus)[1], k, exact_k))


@jax.jit
def _components(taus: Mapping[str, Any], kept: Trim) -> Params:
    paths, leaves = _leaves(taus)
    sign = _majority(leaves, kept)
    kept = _apart(kept)

    def one(number: int, tau: jax.Array) -> jax.Array:
        kept_parts = trimmed(tau, kept, number)
        agreeing = _agreeing(kept_parts, elect(kept_parts, sign))
        return jnp.stack([part.astype(tau.dtype) for part in agreeing])

    flat = {path: one(number, leaves[number]) for number, path in enumerate(paths)}
    return tree.unflatten({path: flat[path] for path in tree.flatten(taus) if path in flat})


def _leaves(taus: Mapping[str, Any]) -> tuple[list[str], list[jax.Array]]:
    """Paths and leaves of the floating-point part, in the order of the sorted paths."""
    leafwise.tasks(taus)
    flat = tree.flatten(taus)
    paths = sorted(path for path, leaf in flat.items() if leafwise.mergeable(leaf))
    return paths, [jnp.asarray(flat[path]) for path in paths]


def keep_count(k: float, entries: int, exact_k: bool = False) -> int:
    """How many of d entries the threshold is to keep when no magnitudes tie.

    Raises:
      ValueError: ``k`` is not in [0, 1].
    """
    if not 0 <= k <= 1:
        raise ValueError(f"k must be a fraction in [0, 1], got {k}")
    wanted = int(entries * k)
    return wanted if exact_k else min(wanted + 1, entries)


def trim(leaves: Sequence[jax.Array], k: float, exact_k: bool = False) -> Trim:
    """Thresholds of N task vectors, one a task over all ``leaves`` [N, ...] together."""
    entries = sum(leaf[0].size for leaf in leaves)
    keep = keep_count(k, entries, exact_k)
    count = leaves[0].shape[0]
    if keep == 0:
        return Trim(jnp.full(count, INFINITY + 1, jnp.int32), None)
    threshold = kth_largest(leaves, keep)
    return Trim(threshold, _cuts(list(leaves), threshold, keep) if exact_k else None)


def bits(leaf: jax.Array) -> jax.Array:
    """Magnitudes as integers of the same order; NaN counts as infinity, so it is not lost."""
    pattern = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.int32)
    return jnp.minimum(pattern & 0x7FFFFFFF, INFINITY)


# --- the k-th largest magnitude ---


def kth_largest(leaves: Sequence[jax.Array], keep: int) -> jax.Array:
    """Bits of the ``keep``-th largest magnitude of every task, int32 [N].

    Args:
      leaves: [N, ...] each, together one vector a task.
      keep: from 1 to the number of entries.
    """
    entries = sum(leaf[0].size for leaf in leaves)
    low, high = bounds(leaves[0].shape[0])
    first = spread(low, high)
    if entries > 16 * SAMPLE:
        first = first_guesses(list(leaves), keep / entries)
    state = begin(entries, low, high, first)
    target = jnp.asarray(divmod(keep, 1 << 16), jnp.int32)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return jax.lax.while_loop(unfinished, lambda s: _narrow(leaves, target, s), state).low
    # Outside jit the loop is in Python: XLA copies what a loop of its own reads, and the task
    # vectors may be most of the memory.
    while bool(unfinished(state)):
        state = _narrow_jit(list(leaves), target, state)
    return state.low


@functools.partial(jax.jit, static_argnums=1)
def first_guesses(leaves: list[jax.Array], share: float) -> jax.Array:
    """First candidates: around the threshold of a sample of the entries, [N, 8]."""
    entries = sum(leaf[0].size for leaf in leaves)
    sample = [_sampled(leaf, entries) for leaf in leaves]
    drawn = sum(leaf[0].size for leaf in sample)
    low, high = bounds(leaves[0].shape[0])
    opening = begin(drawn, low, high, spread(low, high))
    # The rank of the threshold within a sample is binomial; a wrong guess costs a pass.
    slack = 4.5 * math.sqrt(drawn * share * (1 - share)) + 2
    ranks = jnp.clip(jnp.asarray([share * drawn + slack, share * drawn - slack]), 1, drawn)

    def guess(rank: jax.Array) -> jax.Array:
        target = jnp.stack([rank.astype(jnp.int32) >> 16, rank.astype(jnp.int32) & 0xFFFF])
        return jax.lax.while_loop(unfinished, lambda s: _narrow(sample, target, s), opening).low

    below, above = jax.lax.map(guess, ranks)
    return spread(jnp.maximum(below - 1, 0), above + 1)


def bounds(count: int) -> tuple[jax.Array, jax.Array]:
    """Lowest and highest bit pattern of each search before it begins, int32 [count]."""
    return jnp.zeros(count, jnp.int32), jnp.full(count, INFINITY + 1, jnp.int32)


def _sampled(leaf: jax.Array, entries: int) -> jax.Array:
    """Every s-th row and column of a leaf: slices leave a sharded leaf where it lies."""
    stride = max(1, entries // SAMPLE)
    long = [axis for axis in range(1, leaf.ndim) if leaf.shape[axis] >= 64][-2:]
    steps = [1] * leaf.ndim
    for axis in long:
        # Odd steps: an even one would meet the same heads or the same half of them only.
        steps[axis] = max(1, math.ceil(stride ** (1 / len(long)))) | 1
    return leaf[tuple(slice(None, None, step) for step in steps)]


def spread(low: jax.Array, high: jax.Array) -> jax.Array:
    """Eight equally spaced candidates strictly within (low, high), [N, 8]; they may repeat."""
    gap = (high - low) // (CANDIDATES + 1)
    steps = jnp.arange(1, CANDIDATES + 1, dtype=jnp.int32)
    wide = low[:, None] + gap[:, None] * steps
    narrow = low[:, None] + steps
    return jnp.where(gap[:, None] > 0, wide, jnp.minimum(narrow, high[:, None]))


class State(NamedTuple):
    """At least the wanted number of entries reaches low, fewer reach high; [N] each.

    Attributes:
      low, high: bits.
      at_low, at_high: how many entries reach them, float32: they only steer the search.
      guesses: where to count next, [N, 8].
    """

    low: jax.Array
    high: jax.Array
    at_low: jax.Array
    at_high: jax.Array
    guesses: jax.Array


def begin(entries: int, low: jax.Array, high: jax.Array, first: jax.Array) -> State:
    """The searches before their first pass: no entry lies above the high end, all above the low."""
    return State(low, high, jnp.full(low.shape, float(entries)), jnp.zeros(low.shape), first)


def unfinished(state: State) -> jax.Array:
    """Whether a search has more than one bit pattern left, bool []."""
    return jnp.any(state.high - state.low > 1)


def _narrow(leaves: Sequence[jax.Array], target: jax.Array, state: State) -> State:
    """One pass over the entries; ``target`` is the wanted number in two words of 16 bits.

    One int32 would overflow in a model of more than 2^31 entries.
    """
    return update(state, target, reaching(leaves, state.guesses))


@jax.jit
def update(state: State, target: jax.Array, words: jax.Array) -> State:
    """The state after a count; ``words`` [N, 8, 2] as of :func:`reaching`."""
    low, high, at_low, at_high, guesses = state
    enough = (words[..., 0] > target[0]) | (
        (words[..., 0] == target[0]) & (words[..., 1] >= target[1])
    )
    counts = words[..., 0].astype(jnp.float32) * 65536.0 + words[..., 1].astype(jnp.float32)
    new_low = jnp.maximum(low, jnp.where(enough, guesses, 0).max(1))
    new_high = jnp.minimum(high, jnp.where(enough, INFINITY + 1, guesses).min(1))
    at_low = jnp.minimum(at_low, jnp.where(enough, counts, jnp.inf).min(1))
    at_high = jnp.maximum(at_high, jnp.where(enough, -jnp.inf, counts).max(1))

    # Where to count next: about the interpolated place. Within a short range entries are
    # scattered about a straight line as a random walk.
    gap = new_high - new_low
    width = gap.astype(jnp.float32)
    inside = jnp.maximum(at_low - at_high, 1.0)
    wanted = target[0].astype(jnp.float32) * 65536.0 + target[1].astype(jnp.float32)
    place = width * jnp.clip((at_low - wanted) / inside, 0, 1)
    step = jnp.maximum(0.35 * width / jnp.sqrt(inside), 1.0)
    offset = jnp.round(place)[:, None] + step[:, None] * (jnp.arange(CANDIDATES) - 3.0)
    offset = jnp.clip(offset, 0, 2.0**30).astype(jnp.int32)
    near = new_low[:, None] + jnp.clip(offset, 1, jnp.maximum(gap - 1, 1)[:, None])
    # Where that did not help, as with entries of few distinct magnitudes, at equal distances.
    slow = (gap > (high - low) // 4) | (gap <= CANDIDATES + 1)
    following = jnp.where(slow[:, None], spread(new_low, new_high), near)
    return State(new_low, new_high, at_low, at_high, following)


_narrow_jit = jax.jit(_narrow)


def reaching(leaves: Sequence[jax.Array], guesses: jax.Array) -> jax.Array:
    """How many entries of each task reach each candidate, [N, 8, 2] words of 16 bits."""
    words = jnp.zeros((*guesses.shape[::-1], 2), jnp.int32)
    for leaf in leaves:
        pattern = bits(_two_axes(leaf))
        shape = (-1, *(1,) * (pattern.ndim - 1))
        hits = [
            (pattern >= guesses[:, i].reshape(shape)).astype(jnp.int32) for i in range(CANDIDATES)
        ]
        words += _words(_count(hits, keep=1))
    return _carry(words).swapaxes(0, 1)


def _count(hits: Sequence[jax.Array], keep: int = 0) -> jax.Array:
    """Sums over the last axis of several arrays of 0 and 1: [number, *leading axes].

    One reduction of several operands: XLA compiles it to one vectorised pass on a CPU, where
    one reduction an operand would be as many passes, each of them six times slower.
    """
    first = hits[0]
    if first.ndim == keep:
        return jnp.stack(list(hits))
    zeros = (jnp.int32(0),) * len(hits)
    counts = jax.lax.reduce(
        tuple(hits), zeros, lambda a, b: tuple(x + y for x, y in zip(a, b)), (first.ndim - 1,)
    )
    kept = counts[0].shape[:keep]
    return jnp.stack([count.reshape(*kept, -1) for count in counts])


def _words(counts: jax.Array) -> jax.Array:
    """Sums over the last axis as two words (high, low) of 16 bits; low is not carried yet."""
    return jnp.stack(
        [(counts >> 16).sum(-1, dtype=jnp.int32), (counts & 0xFFFF).sum(-1, dtype=jnp.int32)], -1
    )


def _carry(words: jax.Array) -> jax.Array:
    return jnp.stack([words[..., 0] + (words[..., 1] >> 16), words[..., 1] & 0xFFFF], axis=-1)


def _two_axes(leaf: jax.Array) -> jax.Array:
    """A vector a task gets rows where it is long, so that they are counted in parallel."""
    if leaf.ndim == 1:
        return leaf[:, None]
    if leaf.ndim == 2 and leaf.shape[1] >= 1 << 16:
        parts = math.gcd(leaf.shape[1], 1 << 10)
        return leaf.reshape(leaf.shape[0], parts, -1)
    return leaf


# --- exactly k: which of the entries that tie ---


@functools.partial(jax.jit, static_argnums=2)
def _cuts(leaves: list[jax.Array], threshold: jax.Array, keep: int) -> list[jax.Array]:
    """Of each leaf, the place before which entries equal to the threshold are kept."""
    above, level = [], []
    for leaf in leaves:
        pattern = bits(leaf)
        line = threshold.reshape(-1, *(1,) * (leaf.ndim - 1))
        axes = tuple(range(1, leaf.ndim))
        above.append((pattern > line).sum(axes, dtype=jnp.int32))
        level.append((pattern == line).sum(axes, dtype=jnp.int32))
    # Subtracted one by one from a number that Python knows: none of them overflows where a
    # leaf has fewer than 2^31 entries and as few tie.
    high, low = divmod(keep, 1 << 16)
    left_high, left_low = jnp.int32(high), jnp.int32(low)
    for count in above:
        left_low = left_low - (count & 0xFFFF)
        left_high = left_high - (count >> 16) + (left_low >> 16)
        left_low = left_low & 0xFFFF
    left = jnp.where(left_high >= 1 << 14, jnp.int32(1 << 30), left_high * 65536 + left_low)
    cuts = []
    for leaf, ties_ in zip(leaves, level):
        quota = jnp.clip(left, 0, ties_)
        left = left - quota
        cuts.append(_place(leaf, threshold, quota))
    return cuts


def _index(leaf: jax.Array) -> jax.Array:
    """The place of every entry within its task's leaf, row by row."""
    place = jnp.zeros(leaf.shape, jnp.int32)
    size = 1
    for axis in range(leaf.ndim - 1, 0, -1):
        place = place + size * jax.lax.broadcasted_iota(jnp.int32, leaf.shape, axis)
        size *= leaf.shape[axis]
    return place


def _place(leaf: jax.Array, threshold: jax.Array, quota: jax.Array) -> jax.Array:
    """The smallest place with ``quota`` entries equal to the threshold before it, int32 [N]."""
    shape = (-1, *(1,) * (leaf.ndim - 1))
    equal = bits(leaf) == threshold.reshape(shape)
    place = _index(leaf)
    axes = tuple(range(1, leaf.ndim))
    size = leaf[0].size

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # fewer than quota before low (or low = 0), at least quota before high
        middle = low + (high - low) // 2
        before = (equal & (place < middle.reshape(shape))).sum(axes, dtype=jnp.int32)
        return jnp.where(before < quota, middle, low), jnp.where(before < quota, high, middle)

    start = (jnp.zeros_like(quota), jnp.full_like(quota, size))
    _, high = jax.lax.fori_loop(0, max(1, size).bit_length() + 1, halve, start)
    return jnp.where(quota == 0, 0, high)


# --- trimming, electing, merging: pure functions of one entry's N values ---


def trimmed(tau: jax.Array, kept: Trim, number: int) -> list[jax.Array]:
    """The tasks' trimmed leaves, float32."""
    place = None if kept.cut is None else _index(tau[:1])[0]
    out = []
    for task, part in enumerate(leafwise.rows(tau)):
        pattern, line = bits(part), kept.threshold[task]
        if kept.cut is None or place is None:
            live = pattern >= line
        else:
            live = (pattern > line) | ((pattern == line) & (place < kept.cut[number][task]))
        out.append(jnp.where(live, part.astype(jnp.float32), 0.0))
    return out


def elect(parts: Sequence[jax.Array], majority: jax.Array) -> jax.Array:
    """gamma of every entry: -1, 0 or 1; NaN where an entry is NaN."""
    gamma = jnp.sign(leafwise.total(parts))
    return jnp.where(gamma == 0, majority, gamma)


def _agreeing(parts: Sequence[jax.Array], gamma: jax.Array) -> list[jax.Array]:
    """The entries that have the elected sign; undecided entries count as negative."""
    up = gamma > 0
    lost = jnp.isnan(gamma)
    return [jnp.where(jnp.where(up, part > 0, part < 0) | lost, part, 0.0) for part in parts]


def combine(parts: Sequence[jax.Array], gamma: jax.Array, merge: Merge) -> jax.Array:
    """Merges N trimmed leaves under the elected signs, float32."""
    agreeing = _agreeing(parts, gamma)
    if merge == "max":
        largest = jnp.abs(agreeing[0])
        for part in agreeing[1:]:
            largest = jnp.maximum(largest, jnp.abs(part))
        return largest * gamma
    added = leafwise.total(agreeing)
    if merge == "sum":
        return added
    number = leafwise.total([(part != 0).astype(jnp.float32) for part in agreeing])
    return added / jnp.maximum(number, 1.0)


def _majority(leaves: Sequence[jax.Array], kept: Trim) -> jax.Array:
    """sign(sum over all entries of the elected sign), float32 scalar."""
    words = []
    for number, leaf in enumerate(leaves):
        votes = leafwise.total(trimmed(leaf, kept, number))
        sides = ((votes > 0).astype(jnp.int32), (votes < 0).astype(jnp.int32))
        words.append(_words(_count(sides)))
    (up_high, up_low), (down_high, down_low) = _carry(sum(words, jnp.zeros((2, 2), jnp.int32)))
    up = (up_high > down_high) | ((up_high == down_high) & (up_low > down_low))
    down = (up_high < down_high) | ((up_high == down_high) & (up_low < down_low))
    return up.astype(jnp.float32) - down.astype(jnp.float32)
