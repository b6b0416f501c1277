"""The page of ``steppe sharpness``: one or several models' landscapes on the same axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from steppe.launch.report import surfaces
from steppe.launch.report.surfaces import STYLES, Line
from steppe.launch.report.svg import escape, short
from steppe.train.evaluate.curvature import Density, smooth

# In addition to the style sheet of the reports.
_STYLE = """
.stack { display: grid; gap: 36px; }
svg .contour {
  fill: none; stroke: var(--ink); stroke-opacity: .35; stroke-width: .8; stroke-linecap: round;
}
figcaption .key.dashed::before {
  background: repeating-linear-gradient(90deg, currentColor 0 3px, transparent 3px 6px);
}
figcaption .key.accent.dashed::before {
  background: repeating-linear-gradient(90deg, var(--accent) 0 3px, transparent 3px 6px);
}
figcaption .key.ink.dashed::before {
  background: repeating-linear-gradient(90deg, var(--ink) 0 3px, transparent 3px 6px);
}
.wide { overflow-x: auto; }
.wide tbody th, .wide td { white-space: nowrap; }
"""


def numbers(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table: a name, then one text a model."""
    models = result["models"]
    rows: list[tuple[str, ...]] = [
        ("loss", *(_text(m["loss"]) for m in models)),
        ("gradient norm", *(_text(m["gradient_norm"]) for m in models)),
    ]
    kind = " (adaptive)" if result["settings"].get("norm") == "adaptive" else ""
    for number, rho in enumerate(result["settings"]["rho"]):
        gaps = (f"+{_text(m['balls'][number]['gap'])}" for m in models)
        rows.append((f"rise within {short(rho)}{kind}", *gaps))
    for number in range(max(len(m["eigenvalues"]) for m in models)):
        cells = []
        for m in models:
            if number >= len(m["eigenvalues"]):
                cells.append("")
                continue
            error = m["residuals"][number]
            cells.append(f"{_text(m['eigenvalues'][number])} ± {_few(error)}")
        rows.append((f"eigenvalue {number + 1}", *cells))
    traces = (m["trace"] for m in models)
    rows.append(("trace", *(f"{_text(t['mean'])} ± {_few(t['standard_error'])}" for t in traces)))
    rows.append(("seconds", *(f"{m['seconds']:,.0f}" for m in models)))
    return rows


def render(result: Mapping[str, Any]) -> str:
    """The whole page as text; depends on ``result`` only.

    Args:
      result: what ``steppe sharpness`` writes to sharpness.json, with NaN for null.
    """
    models = result["models"]
    names = _names([m["run"] for m in models])
    parts = [_header(result, names), _table(result, names), _plane(result, names)]
    parts += [_around(result, names), _spectrum(result, names), _how(result)]
    return Template(_resource("page.html")).substitute(
        title=escape(f"Sharpness of {names[0]} · steppe"),
        style=_resource("style.css").rstrip() + _STYLE.rstrip(),
        body="\n".join(part for part in parts if part),
    )


def finite(value: Any) -> Any:
    """JSON values with NaN where there is null, as :func:`render` takes them."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return math.nan if value is None else value


def _header(result: Mapping[str, Any], names: Sequence[str]) -> str:
    data, first = result["data"], result["models"][0]
    facts = [
        f"{data['examples']:,} examples of {data['source']}, {data['split']}",
        f"{first['parameters']:,} parameters",
    ]
    facts += [f"beside {', '.join(names[1:])}"] if len(names) > 1 else []
    lede = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    strip = ""
    top = first["eigenvalues"][0]
    shown = [("loss", _text(first["loss"])), ("largest eigenvalue", _text(top))]
    shown.append(("trace", _text(first["trace"]["mean"])))
    if first["balls"]:
        ball = first["balls"][-1]
        shown.append((f"rise within {short(ball['rho'])}", f"+{_text(ball['gap'])}"))
    for name, text in shown:
        strip += f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>"
    return (
        f'<header><p class="over">sharpness of a steppe run</p><h1>{escape(names[0])}</h1>'
        f'<p class="lede">{lede}</p></header><dl class="strip">{strip}</dl>'
    )


def _table(result: Mapping[str, Any], names: Sequence[str]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = ""
    for name, *cells in numbers(result):
        texts = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body += f"<tr><th>{escape(name)}</th>{texts}</tr>"
    return (
        '<section><h2>In numbers</h2><div class="wide"><table class="numbers">'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        '<p class="under">Rise within rho: how much higher the loss is at the worst point found '
        "in a ball of that radius around the weights. Behind an eigenvalue: how far at most the "
        "nearest true one is. Behind the trace: its standard error.</p></section>"
    )


def _plane(result: Mapping[str, Any], names: Sequence[str]) -> str:
    found = [m.get("surface") for m in result["models"]]
    if not all(found):
        return ""
    planes = [np.asarray(surface["losses"], np.float64) for surface in found]
    marks = surfaces.levels(planes)
    figures = ""
    for name, surface, losses in zip(names, found, planes, strict=True):
        drawn = surfaces.plane(f"Loss over a plane, {name}", surface["at"], losses, marks)
        figures += _figure(name if len(names) > 1 else "Over a plane", drawn)
    if len(names) == 1:
        figures += f'<div class="stack">{_curve(result, names)}{_rises(result, names)}</div>'
    return (
        f'<section><h2>The surface</h2><div class="pair">{figures}</div>'
        '<p class="under">Two random directions, each filter of them as long as the same filter '
        "of the weights: 1 is as large as the weights themselves. The dot is the model, and every "
        "line is one value of the loss. All models are seen along the same directions.</p>"
        "</section>"
    )


def _around(result: Mapping[str, Any], names: Sequence[str]) -> str:
    if len(names) == 1 and result["models"][0].get("surface"):
        return ""  # stands beside the plane
    figures = _curve(result, names) + _rises(result, names)
    return f'<section><h2>Around the model</h2><div class="pair">{figures}</div></section>'


def _rises(result: Mapping[str, Any], names: Sequence[str]) -> str:
    found = []
    for name, model in zip(names, result["models"], strict=True):
        by = sorted(model["balls"], key=lambda ball: ball["rho"])
        found.append(Line(name, [0.0, *(b["rho"] for b in by)], [0.0, *(b["gap"] for b in by)]))
    if not result["models"][0]["balls"]:
        return ""
    drawn = surfaces.lines("Rise of the loss within a ball", found, dots=True, zero=True)
    return _figure("Largest rise of the loss within rho", drawn, names)


def _curve(result: Mapping[str, Any], names: Sequence[str]) -> str:
    along = [
        Line(name, m["curve"]["at"], m["curve"]["losses"])
        for name, m in zip(names, result["models"], strict=True)
    ]
    drawn = surfaces.lines("Loss along a random direction", along, dots=len(names) == 1)
    return _figure("Along the first direction", drawn, names)


def _spectrum(result: Mapping[str, Any], names: Sequence[str]) -> str:
    every = []
    for m in result["models"]:
        nodes = tuple(np.asarray(x, np.float64) for x in m["density"]["nodes"])
        weights = tuple(np.asarray(x, np.float64) for x in m["density"]["weights"])
        every.append(Density(nodes, weights, (), np.zeros(0)))
    ends = np.concatenate([x for one in every for x in one.nodes])
    # One width for all models: a density that is drawn wider would look lower.
    width = float(ends.max() - ends.min()) / 120 or 1e-6
    found, rugs = [], []
    for name, one, m in zip(names, every, result["models"], strict=True):
        grid, values = smooth(one, width=width)
        found.append(Line(name, grid.tolist(), values.tolist()))
        rugs.append(Line(name, m["eigenvalues"], ()))
    drawn = surfaces.density("Spectral density of the Hessian", found, rugs)
    figure = _figure("How many eigenvalues there are of each size", drawn, names)
    return (
        f'<section><h2>The spectrum</h2><div class="pair">{figure}<p class="under">Density of the '
        "eigenvalues of the Hessian, on a logarithmic axis; dots below are the largest ones. Most "
        "directions are flat: nearly all of the density stands at 0, and a few eigenvalues stand "
        "far to the right. Negative ones are directions in which the loss curves down.</p></div>"
        "</section>"
    )


def _how(result: Mapping[str, Any]) -> str:
    s = result["settings"]
    rows = [
        ("ball", f"{s['norm']} norm, best of {s['steps']} ascent steps"),
        ("eigenvalues", f"Lanczos, {s['runs']} x {s['iterations']} Hessian-vector products"),
        ("trace", f"Hutchinson, {s['probes'] + s['runs']} probes"),
        ("directions", f"normal, filter-normalised, seed {s['seed']}"),
        ("parameters", "all that train by default; dropout off"),
    ]
    rows += [(name, str(value)) for name, value in result.get("versions", {}).items()]
    body = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows)
    return (
        "<section><h2>How it was measured</h2>"
        f'<table class="plain"><tbody>{body}</tbody></table></section>'
    )


def _figure(title: str, drawn: str, names: Sequence[str] = ()) -> str:
    keys = ""
    if len(names) > 1:
        for name, style in zip(names, STYLES, strict=False):
            keys += f'<span class="key {style}">{escape(name)}</span>'
    return f"<figure><figcaption><h3>{escape(title)}</h3>{keys}</figcaption>{drawn}</figure>"


def _names(runs: Sequence[str]) -> list[str]:
    """Names of the folders; whole paths where two have the same name."""
    short_ = [Path(run).expanduser().resolve().name for run in runs]
    return short_ if len(set(short_)) == len(short_) else list(runs)


def _text(value: float) -> str:
    return f"{value:,.4g}" if math.isfinite(value) else "not finite"


def _few(value: float) -> str:
    return f"{value:.1g}" if math.isfinite(value) else "unknown"


def _resource(name: str) -> str:
    return resources.files("steppe.launch.report").joinpath(name).read_text("utf-8")
