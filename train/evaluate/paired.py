"""Two methods on the same seeds: how sure a mean difference over few repetitions is.

  d_i = second_i - first_i,  i = 1..n;   t = mean(d) / (std(d) / sqrt(n)),  n - 1 degrees of freedom
  sign flips: p = share of the 2^n patterns s in {-1, 1}^n with |mean(s d)| >= |mean(d)|

The t-test assumes that the differences are normal; the sign flips only that each is as likely to
have either sign, and with n = 5 their p cannot be below 2 / 32.

Student 1908 (Biometrika 6); Fisher, The Design of Experiments, 1935, section 21 (sign flips).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Above this many pairs the patterns are drawn instead of all tried.
EXACT = 14
DRAWS = 20_000


class Paired(NamedTuple):
    """Mean difference second - first, its t interval, and two p-values (two-sided).

    Attributes:
      difference: mean over the pairs.
      low, high: interval of the mean at ``level``; infinite for one pair, and where all
        differences are equal but not 0.
      level: of the interval.
      p_t, p_sign: of the t-test and of the sign flips; 1.0 where nothing differs, NaN of the
        t-test where the interval is infinite.
      pairs: n.
    """

    difference: float
    low: float
    high: float
    level: float
    p_t: float
    p_sign: float
    pairs: int


def paired(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    seed: int = 0,
) -> Paired:
    """Compares two methods over repetitions that they share, such as seeds.

    Args:
      first, second: one value a repetition [n]; finite.
      level: of the interval, in (0, 1).
      seed: of the patterns that are drawn for more than 14 pairs.

    Raises:
      ValueError: no pairs, different lengths, values that are not finite, a level out of range.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(
            f"first and second must hold one value a pair each, got shapes {a.shape} and {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("first and second must be finite; leave out pairs without a result")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    d = b - a
    mean, n = float(d.mean()), len(d)
    flips = _sign_flips(d, seed)
    if n == 1:
        return Paired(mean, -math.inf, math.inf, level, math.nan, flips, n)
    error = float(d.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        if mean == 0:
            return Paired(0.0, 0.0, 0.0, level, 1.0, flips, n)
        # No spread at all tells of too few values, not of certainty.
        return Paired(mean, -math.inf, math.inf, level, math.nan, flips, n)
    from scipy import stats

    reach = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    p = 2 * float(stats.t.sf(abs(mean) / error, n - 1))
    return Paired(mean, mean - reach, mean + reach, level, p, flips, n)


def _sign_flips(d: np.ndarray, seed: int) -> float:
    observed = abs(d.mean())
    slack = 1e-12 * max(1.0, float(np.abs(d).max()))  # sums in another order
    if len(d) <= EXACT:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(d))))
        return float((np.abs(signs @ d) / len(d) >= observed - slack).mean())
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), (DRAWS, len(d)))
    extreme = int((np.abs(signs @ d) / len(d) >= observed - slack).sum())
    return (1 + extreme) / (1 + DRAWS)
