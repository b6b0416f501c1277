"""The sections of the page, each a pure function from a run to HTML; empty when it has nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from steppe.launch.report import figures, outcomes
from steppe.launch.report.curves import Series, series
from steppe.launch.report.facts import (
    LOWER_IS_BETTER,
    Headline,
    ended,
    glance,
    headline,
    primary,
    value_text,
)
from steppe.launch.report.folder import RunFolder, mapping
from steppe.launch.report.svg import escape


def header(run: RunFolder) -> str:
    """Name of the run, what it is, and what is missing."""
    kind, names = outcomes.task(run.results, run.predictions)
    model = mapping(run.results.get("model")).get("name") or run.config.get("model")
    facts = []
    if isinstance(model, str):
        facts.append(escape(model))
    if mapping(run.results.get("task")):
        few = f": {', '.join(names)}" if 0 < len(names) <= 6 else ""
        facts.append(escape(f"{_TASKS.get(kind, kind)}{few}"))
    method = mapping(run.results.get("optimiser")).get("method")
    if isinstance(method, str):
        facts.append(escape(method.split(",")[0].split(";")[0]))
    when = ended(run)
    if when:
        facts.append(f"ended {when}")
    lede = "".join(f"<span>{fact}</span>" for fact in facts)
    out = f'<p class="over">steppe run</p><h1>{escape(run.path.resolve().name)}</h1>'
    out += f'<p class="lede">{lede}</p>' if lede else ""
    if run.notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in run.notes)
        out += f'<aside class="notes"><h3>This report is not complete</h3><ul>{items}</ul></aside>'
    return f"<header>{out}</header>"


_TASKS = {
    "classification": "classification",
    "regression": "regression",
    "token": "token classification",
    "span": "span extraction",
    "mlm": "masked language modelling",
    "lm": "language modelling",
    "seq2seq": "text to text",
}


def result(run: RunFolder) -> str:
    """The main number beside its baselines, and the run at a glance."""
    main = headline(run)
    out = ""
    if main is not None:
        text = value_text(main.metric, main.value)
        of = f"{main.split} {main.metric.replace('_', ' ')}"
        aside = []
        if main.examples is not None:
            aside.append(f"{main.examples:,} examples")
        if main.interval is not None:
            low, high = (value_text(main.metric, v) for v in main.interval)
            aside.append(f"95% interval {low} to {high}")
        if main.step is not None:
            aside.append(f"last evaluation, at step {main.step:,}")
        number = (
            f'<div><p class="what">{escape(of.capitalize())}</p>'
            f'<p class="figure">{escape(text)}</p>'
            f'<p class="aside">{escape(", ".join(aside))}</p></div>'
        )
        bars = _bars(main)
        out += (
            f'<div class="head">{number}{bars}</div>'
            if bars
            else f'<div class="head">{number}</div>'
        )
    facts = glance(run)
    if facts:
        items = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts)
        out += f'<dl class="strip">{items}</dl>'
    return f"<section>{out}</section>" if out else ""


def _bars(main: Headline) -> str:
    """Bars from zero, the run's last with its interval; none without baselines."""
    if not main.baselines:
        return ""
    values = [value for _, value in main.baselines] + [main.value]
    if min(values) < 0:  # a negative correlation has no length
        return ""
    high = max(*values, main.interval[1] if main.interval else 0.0)
    scale = 1.0 if main.metric not in LOWER_IS_BETTER and high <= 1 else high * 1.05 or 1.0
    rows = [(name, value, "") for name, value in main.baselines]
    rows.append(("this run", main.value, " own"))
    out = ""
    for name, value, style in rows:
        whisker = ""
        if style and main.interval:
            left, right = (min(max(v / scale, 0.0), 1.0) for v in main.interval)
            whisker = (
                f'<span class="whisker" style="left:{100 * left:.2f}%;'
                f'width:{100 * (right - left):.2f}%"></span>'
            )
        width = 100 * value / scale
        out += (
            f'<span class="name{style}">{escape(name)}</span><span class="track{style}">'
            f'<span class="bar" style="width:{width:.2f}%"></span>{whisker}</span>'
            f'<span class="value{style}">{escape(value_text(main.metric, value))}</span>'
        )
    label = escape(f"{main.metric} of this run and its baselines")
    return f'<div class="bars" role="group" aria-label="{label}">{out}</div>'


def learning(run: RunFolder) -> str:
    """Curves over steps: loss, metric, learning rate, gradient norm, speed."""
    kind, _ = outcomes.task(run.results, run.predictions)
    metric = next((m for m in (primary(kind, row) for row in run.evals) if m), None)
    if metric in (None, "loss"):
        metric = "accuracy"
    parts = [_curve_figure(run, "Loss", "loss")]
    parts.append(_curve_figure(run, metric.replace("_", " ").capitalize(), metric))
    rate = series(run.train, "learning_rate")
    parts.append(
        _figure(
            "Learning rate",
            figures.curves("Learning rate over steps", rate, {}, zero=True, smoothed=False),
        )
    )
    norm = figures.curves("Gradient norm over steps", series(run.train, "grad_norm"), {})
    parts.append(_figure("Gradient norm", norm))
    speed = series(run.train, "tokens_per_s")
    parts.append(
        _figure("Tokens per second", figures.curves("Tokens per second", speed, {}, zero=True))
    )
    parts.append(_time_figure(run))
    drawn = "".join(part for part in parts if part)
    if not drawn:
        return ""
    return f'<section><h2>Learning</h2><div class="pair">{drawn}</div></section>'


def _curve_figure(run: RunFolder, title: str, key: str) -> str:
    train = series(run.train, key)
    splits: dict[str, Series] = {}
    for split in dict.fromkeys(str(row.get("split", "evaluation")) for row in run.evals):
        rows = [row for row in run.evals if str(row.get("split", "evaluation")) == split]
        found = series(rows, key)
        if not found.empty:
            splits[split] = found
    keys = [] if train.empty else [("accent", "training, smoothed")]
    for i, split in enumerate(splits):
        keys.append(("ink" if i == 0 else "muted", split))
    drawing = figures.curves(f"{title} over steps", train, splits)
    under = ""
    if splits:
        name, first = next(iter(splits.items()))
        lower = key.rsplit("/", 1)[-1] in LOWER_IS_BETTER
        at = int((np.nanargmin if lower else np.nanargmax)(first.values))
        best, step = value_text(key, float(first.values[at])), int(first.steps[at])
        under = f"Best {name}: {best} at step {step:,}"
    return _figure(title, drawing, keys, under)


def _time_figure(run: RunFolder) -> str:
    def milliseconds(key: str) -> Series:
        found = series(run.train, key)
        return Series(found.steps, found.values * 1e3)

    step, wait = milliseconds("step_time"), milliseconds("input_wait")
    keys = [("accent", "whole step")]
    under = ""
    if not wait.empty and not step.empty:
        keys.append(("muted", "waiting for input"))
        share = np.nansum(wait.values) / max(np.nansum(step.values), 1e-12)
        under = f"Waiting for input takes {share:.1%} of the time"
    drawing = figures.curves(
        "Milliseconds per step",
        None if step.empty else step,
        {},
        zero=True,
        second=None if wait.empty else wait,
        robust=True,  # the first step compiles
    )
    return _figure("Milliseconds per step", drawing, keys if len(keys) > 1 else (), under)


def errors(run: RunFolder) -> str:
    """Confusion and calibration, or the scatter of a regression."""
    kind, names = outcomes.task(run.results, run.predictions)
    parts: list[str] = []
    if kind == "regression":
        true, predicted = outcomes.points(run.predictions)
        if len(true):
            drawing = figures.scatter(true, predicted)
            under = f"{len(true):,} examples; the dashed line is a perfect prediction"
            parts.append(
                _figure(
                    "Prediction over label", drawing, [("plain", "label along the bottom")], under
                )
            )
            error = predicted - true
            under = f"Mean {error.mean():.3g}, standard deviation {error.std():.3g}"
            drawing = figures.histogram("Prediction minus label", error)
            parts.append(_figure("Prediction minus label", drawing, (), under))
    elif kind in ("classification", "token"):
        found = outcomes.classes(run.predictions, names)
        if found is not None:
            unit = "tokens" if kind == "token" else "examples"
            under = f"{len(found.true):,} {unit}; shade is the share of the true class"
            drawing = figures.confusion(outcomes.confusion(found))
            key = [("plain", "true class in rows")]
            parts.append(_figure("Confusion matrix", drawing, key, under))
            fitted = outcomes.calibration(found)
            if fitted is not None:
                under = (
                    f"Expected calibration error {fitted.error:.3f}. Bars are accuracy at each "
                    f"confidence, the strip below is how many {unit} have it; the dashed line "
                    "is perfect calibration."
                )
                key = [("plain", "accuracy over confidence")]
                parts.append(_figure("Calibration", figures.reliability(fitted), key, under))
    if not parts:
        return ""
    return f'<section><h2>Errors</h2><div class="pair">{"".join(parts)}</div></section>'


def cases(run: RunFolder) -> str:
    """The examples with the largest loss."""
    kind, names = outcomes.task(run.results, run.predictions)
    found = outcomes.worst(run.predictions, names, kind)
    if not found:
        return ""
    items = "".join(_case(case) for case in found)
    return f'<section><h2>Examples it gets most wrong</h2><ol class="cases">{items}</ol></section>'


def _case(case: outcomes.Example) -> str:
    said = ""
    if case.tokens:
        text = " ".join(_token(*token) for token in case.tokens)
    else:
        text = escape(case.text)
        pair = [("predicted", case.prediction), ("is", case.label)]
        said = ", ".join(f"<span>{w}</span> <b>{escape(v)}</b>" for w, v in pair if v) + "<br>"
    facts = []
    if math.isfinite(case.confidence):
        facts.append(f"confidence {case.confidence:.3f}")
    if not math.isnan(case.loss):
        facts.append(f"loss {case.loss:.2f}")
    name = f'<p class="id">{escape(case.id)}</p>' if case.id else ""
    return (
        f'<li><div><p class="text" dir="auto">{text}</p>{name}</div>'
        f'<p class="said">{said}<span>{", ".join(facts)}</span></p></li>'
    )


def _token(token: str, label: str, prediction: str) -> str:
    if label == prediction or not label:
        return escape(token)
    tip = escape(f"label {label}, predicted {prediction}")
    return (
        f'<span class="wrong" title="{tip}">{escape(token)}</span>'
        f"<small>{escape(prediction)}, not {escape(label)}</small>"
    )


def _figure(
    title: str,
    drawing: str | None,
    keys: Sequence[tuple[str, str]] = (),
    under: str = "",
) -> str:
    if drawing is None:
        return ""
    legend = "".join(f'<span class="key {style}">{escape(name)}</span>' for style, name in keys)
    below = f'<p class="under">{escape(under)}</p>' if under else ""
    return (
        f"<figure><figcaption><h3>{escape(title)}</h3>{legend}</figcaption>"
        f"{drawing}{below}</figure>"
    )
