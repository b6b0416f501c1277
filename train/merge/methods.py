"""The methods of a streamed merge as values: what ``stream.merge`` is told to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeAlias

from steppe.train.merge.fisher import check_coef
from steppe.train.merge.inputs import Report
from steppe.train.merge.ties import MERGES, Merge, keep_count


@dataclass(frozen=True)
class Average:
    """The mean; with ``weights``, divided by their sum."""

    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Weighted:
    """``sum_i weights_i theta_i``."""

    weights: tuple[float, ...]


@dataclass(frozen=True)
class TaskArithmetic:
    """``theta_0 + lam sum_i tau_i``; a negative lam forgets. Or one lam a model."""

    lam: float | tuple[float, ...] = 0.3


@dataclass(frozen=True)
class Ties:
    """TIES; see :func:`steppe.train.merge.ties`."""

    k: float = 0.2
    lam: float = 0.3
    merge: Merge = "sum"


@dataclass(frozen=True)
class Dare:
    """DARE, and what merges the dropped task vectors."""

    p: float = 0.5
    then: TaskArithmetic | Ties = field(default_factory=TaskArithmetic)
    seed: int = 0
    rescale: bool = True


@dataclass(frozen=True)
class Slerp:
    """Spherical interpolation of two models, tensor by tensor."""

    t: float = 0.5


@dataclass(frozen=True)
class Fisher:
    """Fisher merging; ``fishers`` are folders with diagonals under the models' tensor names."""

    fishers: tuple[str, ...]
    coef: tuple[float, ...] | None = None
    normalize: bool = True
    eps: float = 1e-6


Method: TypeAlias = Average | Weighted | TaskArithmetic | Ties | Dare | Slerp | Fisher


def check(method: Method, report: Report) -> None:
    """Checks the settings of a method against its inputs.

    Raises:
      ValueError: a setting is out of range, or the models are not as many as it takes.
    """
    count = len(report.models)
    needs_base = isinstance(method, TaskArithmetic | Ties | Dare)
    if needs_base and not report.based:
        raise ValueError(f"{type(method).__name__} adds task vectors to a base: give base=")
    if isinstance(method, Slerp) and count != 2:
        raise ValueError(f"Slerp is between two models, got {count}")
    inner = method.then if isinstance(method, Dare) else method
    if isinstance(inner, Ties):
        keep_count(inner.k, 1)
        if inner.merge not in MERGES:
            raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {inner.merge!r}")
    if isinstance(method, Dare) and not 0 <= method.p < 1:
        raise ValueError(f"p must be in [0, 1), got {method.p}")
    given = {
        "weights": getattr(method, "weights", None),
        "lam": inner.lam if isinstance(inner, TaskArithmetic) else None,
        "fishers": getattr(method, "fishers", None),
        "coef": getattr(method, "coef", None),
    }
    for name, value in given.items():
        if isinstance(value, tuple) and len(value) != count:
            raise ValueError(f"{name} must be {count}, one a model, got {len(value)}")
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(x, (int, float)) and not math.isfinite(x) for x in numbers):
            raise ValueError(f"{name} must be finite, got {value}")
    if isinstance(method, Fisher):
        check_coef(method.coef)
    lam = inner.lam if isinstance(inner, Ties) else 0.0
    t = method.t if isinstance(method, Slerp) else 0.0
    for name, value in (("lam", lam), ("t", t)):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    if isinstance(method, Average) and method.weights is not None and sum(method.weights) == 0:
        raise ValueError(f"weights must not sum to 0, got {method.weights}")
