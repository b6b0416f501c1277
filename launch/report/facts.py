"""The few numbers that a reader looks for first; shared by the page and the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from steppe.launch.report import running
from steppe.launch.report.folder import RunFolder, mapping, number, sequence
from steppe.launch.report.outcomes import task

# The metric that names a run's success, by kind of task: the first one that it has.
PRIMARY = {
    "classification": ("accuracy", "f1", "mcc"),
    "regression": ("pearson", "spearman", "mse"),
    "token": ("entity_f1", "f1", "accuracy"),
    "span": ("f1", "span_f1", "exact_match", "em"),
    "mlm": ("perplexity", "accuracy"),
    "lm": ("perplexity", "loss"),
    "seq2seq": ("chrf", "perplexity"),
}
LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "mse", "mae", "ece", "error")
_OF_TEXTS = ("chrf", "bleu", "exact")  # over the texts of a sample
_PERCENT = ("accuracy", "exact_match", "em")


class Headline(NamedTuple):
    """The main result.

    Attributes:
      metric, value: its name and value.
      interval: (low, high) or None.
      split: what it was measured on.
      examples: how many the split has, or None.
      baselines: (name, value) of the same metric, in the run's order.
      step: step of the evaluation when the run has no final result, else None.
    """

    metric: str
    value: float
    interval: tuple[float, float] | None
    split: str
    examples: int | None
    baselines: Sequence[tuple[str, float]]
    step: int | None


def headline(run: RunFolder) -> Headline | None:
    """The main result, of results.json or else the last evaluation; None without either."""
    kind, _ = task(run.results, run.predictions)
    splits = {k: mapping(v) for k, v in mapping(run.results.get("metrics")).items()}
    for split in [s for s in ("test", "valid", "validation") if s in splits] + list(splits):
        metric = primary(kind, splits[split])
        if metric is None:
            continue
        bounds = [number(v) for v in sequence(mapping(run.results.get("intervals")).get(metric))]
        interval = (bounds[0], bounds[1]) if len(bounds) == 2 else None
        if interval is not None and not all(map(math.isfinite, interval)):
            interval = None
        baselines = [
            (str(name), number(mapping(values).get(metric)))
            for name, values in mapping(run.results.get("baselines")).items()
        ]
        known = [(name, value) for name, value in baselines if math.isfinite(value)]
        value = number(splits[split][metric])
        size = split_size(run, split)
        written = number(splits[split].get("generated"))
        if metric in _OF_TEXTS and math.isfinite(written):
            size = int(written)
        return Headline(metric, value, interval, split, size, known, None)
    for row in reversed(run.evals):
        metric = primary(kind, row)
        if metric is not None:
            split = str(row.get("split", "evaluation"))
            size = split_size(run, split)
            return Headline(metric, number(row[metric]), None, split, size, (), row["step"])
    return None


def primary(kind: str, values: Mapping[str, Any]) -> str | None:
    """The main metric of a kind of task among those that have a finite value."""
    for name in (*PRIMARY.get(kind, ()), "accuracy", "f1", "loss"):
        if math.isfinite(number(values.get(name))):
            return name
    return None


def split_size(run: RunFolder, split: str) -> int | None:
    """Examples in a split, as results.json counts them."""
    data = mapping(run.results.get("data"))
    for place in (data, *(mapping(v) for v in data.values())):
        size = number(place.get(split))
        if math.isfinite(size):
            return int(size)
    return None


def glance(run: RunFolder) -> list[tuple[str, str]]:
    """(what, value) of the numbers beside the main one."""
    found: list[tuple[str, str]] = []
    model = mapping(run.results.get("model"))
    parameters = number(model.get("parameters"))
    if math.isfinite(parameters):
        found.append(("parameters", big(parameters)))
        trainable = number(model.get("trainable"))
        if math.isfinite(trainable) and trainable != parameters:
            found.append(("trainable", big(trainable)))
    found += distilled(run)
    if run.last_step is not None:
        found.append(("steps", f"{run.last_step:,}"))
    losses = [number(row.get("loss")) for row in run.train]
    tail = [v for v in losses[-max(1, len(losses) // 20) :] if math.isfinite(v)]
    if tail:
        found.append(("final training loss", f"{sum(tail) / len(tail):.3f}"))
    speeds = [number(row.get("tokens_per_s")) for row in run.train]
    speeds = sorted(v for v in speeds if math.isfinite(v))
    if speeds:
        found.append(("tokens per second", big(speeds[len(speeds) // 2])))
    span = wall_time(run)
    if span is not None:
        found.append(("training time", duration(span)))
    return found + running.glance(run)


def distilled(run: RunFolder) -> list[tuple[str, str]]:
    """(what, value) of a student beside its teacher; empty for other runs."""
    given = mapping(run.results.get("distillation"))
    found: list[tuple[str, str]] = []
    share = number(mapping(given.get("sizes")).get("share"))
    if math.isfinite(share):
        found.append(("of the teacher's parameters", f"{share:.1%}"))
    same = number(mapping(given.get("agreement")).get("top1"))
    if math.isfinite(same):
        found.append(("agreement with the teacher", f"{same:.1%}"))
    speed = mapping(given.get("speed"))
    ratio, low, high = (number(speed.get(name)) for name in ("ratio", "low", "high"))
    if math.isfinite(ratio):
        found.append(("times as fast as the teacher", f"{ratio:.2f} ({low:.2f} to {high:.2f})"))
    return found


def wall_time(run: RunFolder) -> float | None:
    """Seconds of training: as written in results.json, or from first to last logged row."""
    timings = mapping(run.results.get("timings"))
    for name in ("train", "training", "train_s", "total", "total_s"):
        if math.isfinite(number(timings.get(name))):
            return number(timings[name])
    times = [number(row.get("time")) for row in (*run.train, *run.evals)]
    times = [t for t in times if math.isfinite(t)]
    return max(times) - min(times) if len(times) > 1 else None


def ended(run: RunFolder) -> str | None:
    """When the last row was logged, in UTC."""
    times = [number(row.get("time")) for row in (*run.train, *run.evals)]
    times = [t for t in times if 0 < t < 4e9]
    if not times:
        return None
    return datetime.fromtimestamp(max(times), UTC).strftime("%Y-%m-%d %H:%M UTC")


def value_text(metric: str, value: float) -> str:
    """A metric's value as the report prints it."""
    if not math.isfinite(value):
        return "not finite"
    if metric.rsplit("/", 1)[-1] in _PERCENT and 0 <= value <= 1:
        return f"{100 * value:.1f}%"
    return f"{value:.3f}" if abs(value) < 1000 else big(value)


def big(value: float) -> str:
    """A large number with a unit: 22.7 M."""
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == ' k' else limit):.1f}{unit}"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as text: 0.8 s, 6 min 12 s, 3 h 05 min."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"
