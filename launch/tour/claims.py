"""What each stage promises, and whether it is so: numbers of every seed, and what they show.

A difference is true where its 95% interval of the mean (paired by seed, t) is above 0, not true
where it is below, and not shown where it holds 0; a share is kept where every seed keeps it. One
seed has no spread: it is said to be one, and its interval is twice the standard error that the
numbers of test texts give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steppe.launch.tour.graph import Done
from steppe.launch.tour.settings import ADAMW, TourConfig
from steppe.launch.tour.stages import OTHER, named, slugs
from steppe.train.evaluate.paired import paired

# Logits that are computed in another order differ by so much at most.
ROUNDOFF = 1e-3


def all_of(config: TourConfig, found: Mapping[str, Done]) -> list[dict[str, Any]]:
    """Every claim that the finished stages decide."""
    sharp = named(config.sharpness)
    first = config.seeds[0]

    def test(name: str) -> Callable[[int], float]:
        return lambda seed: float(found[f"{seed}/scores/{name}"].result["mean"]["test"])

    def error(*names: str) -> float:
        """Standard error of the sum or difference of the first seed's scores, in points."""
        return math.hypot(*(standard_error(found[f"{first}/scores/{name}"]) for name in names))

    def merge(seed: int) -> float:
        return test(_best(found, seed, "merge"))(seed)

    def chosen(seed: int) -> float:
        return test(_best(found, seed, "optimiser"))(seed)

    def averaged(seed: int, optimiser: str) -> str:
        return "average" if optimiser == _best(found, seed, "optimiser") else OTHER

    def kept_by_averaging(seed: int, optimiser: str) -> float:
        return test(averaged(seed, optimiser))(seed) / test(optimiser)(seed)

    def share_error(optimiser: str) -> float:
        """Of a share, by that of its two accuracies (delta method)."""
        above, below = averaged(first, optimiser), optimiser
        parts = (error(name) / test(name)(first) for name in (above, below))
        return kept_by_averaging(first, optimiser) * math.hypot(*parts)

    out = [
        _difference(
            config, f"{sharp} helps", f"mean accuracy with {sharp} less AdamW's, points",
            test(ADAMW), test(config.sharpness), error(ADAMW, config.sharpness),
        )
    ]  # fmt: skip
    if config.curvature:
        out.append(_flatter(config, found, sharp))
    methods = slugs(config)
    if "average" in methods:
        out.append(
            _difference(
                config,
                "flat models merge better",
                f"share of the accuracy that averaging leaves, {sharp}'s models less AdamW's, "
                "points",
                lambda seed: kept_by_averaging(seed, ADAMW),
                lambda seed: kept_by_averaging(seed, config.sharpness),
                math.hypot(share_error(ADAMW), share_error(config.sharpness)),
            )
        )
    out.append(
        _share(
            config, "merging keeps", "accuracy of the merge that goes on, of the individual models",
            lambda seed: merge(seed) / chosen(seed),
        )
    )  # fmt: skip
    for slug in methods:
        if slug.startswith("concrete") and "average" in methods:
            out.append(
                _difference(
                    config, f"{slug} beats averaging",
                    f"mean accuracy of {slug} less the average's, points",
                    test("average"), test(slug), error("average", slug),
                )
            )  # fmt: skip
    out.append(
        _share(
            config,
            "distilling keeps",
            f"accuracy of the student of {config.layers} layers, of the merged model",
            lambda seed: test("student")(seed) / merge(seed),
        )
    )
    for bits in config.bits:
        if {"rtn", "zsaq"} <= set(config.rounding):
            out.append(
                _difference(
                    config, f"ZSAQ beats rounding, {bits.upper()}",
                    "mean accuracy of ZSAQ less that of rounding to nearest, points",
                    test(f"{bits}-rtn"), test(f"{bits}-zsaq"),
                    error(f"{bits}-rtn", f"{bits}-zsaq"),
                )
            )  # fmt: skip
    out.append(_files(config, found))
    return out


def standard_error(scores: Done) -> float:
    """Of the mean over the tasks of the test accuracies, in points.

    Every task counts as one, however many texts it has; those of two models count as independent,
    which two related ones are not: their difference is known better. The share of right answers is
    drawn to one half by an answer of each kind, so that few texts, all right, do not look certain.
    """
    variances = []
    for one in scores.result["test"].values():
        count = float(one["examples"])
        right = (count * one["accuracy"] + 1) / (count + 2)
        variances.append(right * (1 - right) / count)
    return 100 * math.sqrt(sum(variances)) / len(variances)


def _best(found: Mapping[str, Done], seed: int, what: str) -> str:
    return str(found[f"{seed}/choice/{what}"].result["best"]).rpartition("/")[2]


def _difference(
    config: TourConfig,
    claim: str,
    about: str,
    first: Callable[[int], float],
    second: Callable[[int], float],
    error: float,
) -> dict[str, Any]:
    """Of values between 0 and 1, in points of a percent.

    Args:
      error: standard error of a difference that the test texts alone give, points.
    """
    a = [100 * first(seed) for seed in config.seeds]
    b = [100 * second(seed) for seed in config.seeds]
    row = _row(claim, about, [y - x for x, y in zip(a, b, strict=True)])
    mean = row["mean"]
    if len(a) == 1:
        holds = _verdict(mean - 2 * error, mean + 2 * error)
        said = f"{mean:+.1f}, one seed; the test texts alone give ± {error:.1f}"
        return row | {"holds": holds, "said": said}
    test = paired(a, b)
    holds = _verdict(test.low, test.high)
    spread = f"{test.low:+.1f} to {test.high:+.1f}" if math.isfinite(test.low) else "unknown"
    said = f"{mean:+.1f} (95% interval {spread}, {len(a)} seeds)"
    return row | {"low": test.low, "high": test.high, "holds": holds, "said": said}


def _verdict(low: float, high: float) -> bool | None:
    """Of a difference that lies between the two; NaN for an end that is not known."""
    return True if low > 0 else False if high < 0 else None


def _share(
    config: TourConfig, claim: str, about: str, share: Callable[[int], float]
) -> dict[str, Any]:
    """At least ``config.keeps`` of what was there before."""
    row = _row(claim, f"{about}; kept from {config.keeps:.0%} on", [share(s) for s in config.seeds])
    return row | _every(row["values"], lambda v: v >= config.keeps, lambda v: f"{v:.1%}")


def _flatter(config: TourConfig, found: Mapping[str, Done], sharp: str) -> dict[str, Any]:
    def top(name: str, seed: int) -> float:
        return float(found[f"{seed}/flatness/{name}"].result["mean"]["top_eigenvalue"])

    ratios = [top(config.sharpness, s) / top(ADAMW, s) for s in config.seeds]
    about = f"largest eigenvalue of the Hessian, {sharp}'s over AdamW's, mean of the tasks"
    row = _row(f"{sharp} is flatter", about, ratios)
    return row | _every(ratios, lambda v: v < 1, lambda v: f"{v:.2f} times")


def _files(config: TourConfig, found: Mapping[str, Done]) -> dict[str, Any]:
    result = found[f"{config.seeds[0]}/export"].result
    sides = [result[name] for name in ("student", "packed", "transformers") if name in result]
    largest = max(side["difference"] for side in sides)
    same = min(side["same"] for side in sides)
    about = "largest difference of a logit to the model in memory, both folders"
    if "transformers" in result:
        about += "; one also by transformers"
    row = _row("what is written opens with the same answers", about, [largest])
    said = f"{largest:.1g}; {same:.1%} of the answers are the same"
    return row | {"holds": largest <= ROUNDOFF and same == 1.0, "said": said}


def _row(claim: str, about: str, values: Sequence[float]) -> dict[str, Any]:
    return {
        "claim": claim,
        "about": about,
        "values": list(values),
        "mean": sum(values) / len(values),
    }


def _every(
    values: Sequence[float], good: Callable[[float], bool], text: Callable[[float], str]
) -> dict[str, Any]:
    count = sum(map(good, values))
    if len(values) == 1:
        return {"holds": bool(count), "said": f"{text(values[0])}, one seed"}
    holds = True if count == len(values) else False if count == 0 else None
    shown = f"{text(min(values))} to {text(max(values))}"
    return {"holds": holds, "said": f"{shown}; {count} of {len(values)} seeds"}


def verdict(claim: Mapping[str, Any]) -> str:
    """``true``, ``not true``, or ``not shown``."""
    return {True: "true", False: "not true"}.get(claim["holds"], "not shown")
