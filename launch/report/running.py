"""How a run ran: goodput over all its starts, waits, utilisation, memory, and its processes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steppe.launch.report.folder import RunFolder, mapping, number, read
from steppe.launch.report.svg import escape
from steppe.train import goodput

GIB = 2.0**30


def facts(path: Path) -> dict[str, Any]:
    """For results.json: ``goodput.summary``, medians of the log's rows, and ``ranks``."""
    return found(read(path))


def found(run: RunFolder) -> dict[str, Any]:
    """What the files of a run say; empty where it has no record of its starts."""
    usable = [r for r in run.train if math.isfinite(number(r.get("step_time")))]
    starts = [r for r in run.starts if math.isfinite(number(r.get("step")))]
    out: dict[str, Any] = dict(goodput.summary(starts, [*usable, *run.events]))
    if not out:
        return {}
    for name in ("tokens_per_s", "flops_per_s", "mfu"):
        value = _median(row.get(name) for row in usable)
        if value is not None:
            out[name] = value
    peaks = [number(row.get("memory_peak")) for row in usable]
    peaks = [peak for peak in peaks if math.isfinite(peak)]
    if peaks:
        out["memory_peak"] = max(peaks)
    if run.ranks:
        out["ranks"] = ranks({0: usable, **run.ranks})
    return out


def ranks(logs: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The processes beside each other.

    A step ends everywhere when it ends on the slowest process, so that the times of a step hardly
    differ. What differs is how long each host was at work before it could wait for its device: the
    busiest one is the one that the others wait for.

    Returns:
      ``each``: rank -> medians [s a step] of ``step_time``, ``busy`` and ``input_wait``, and
      ``worst``, the largest step_time of a row; ``slowest``: the rank that is busy longest;
      ``spread``: its busy time less the shortest one, as a share of the step's time.
    """
    each: dict[str, dict[str, float]] = {}
    # Steps that all have: a run may have begun on fewer processes, whose steps were others.
    common = set.intersection(*({row.get("step") for row in rows} for rows in logs.values()))
    for index, every in logs.items():
        rows = [row for row in every if row.get("step") in common]
        times = [number(row.get("step_time")) for row in rows]
        times = [time for time in times if math.isfinite(time)]
        if not times:
            continue
        busy = [number(r.get("step_time")) - number(r.get("device_wait")) for r in rows]
        each[str(index)] = {
            "step_time": statistics.median(times),
            "busy": _median(busy) or 0.0,
            "input_wait": _median(row.get("input_wait") for row in rows) or 0.0,
            "worst": max(times),
        }
    if len(each) < 2:
        return {}
    order = sorted(each, key=lambda index: each[index]["busy"])
    first, last = each[order[0]], each[order[-1]]
    spread = (last["busy"] - first["busy"]) / last["step_time"] if last["step_time"] else 0.0
    return {"each": each, "slowest": int(order[-1]), "spread": spread}


def glance(run: RunFolder) -> list[tuple[str, str]]:
    """(what, value) of the numbers that a reader looks for first."""
    have = _facts(run)
    out = []
    for name, text in (
        ("goodput", "goodput"),
        ("input_wait_share", "input wait"),
        ("mfu", "MFU"),
    ):
        if math.isfinite(number(have.get(name))):
            out.append((text, f"{have[name]:.1%}"))
    for name, text in (("repeated_steps", "steps repeated"), ("rollbacks", "rollbacks")):
        if number(have.get(name)) > 0:
            out.append((text, f"{have[name]:,.0f}"))
    return out


def section(run: RunFolder) -> str:
    """Use of the time, rollbacks and slow steps, and a table of the processes."""
    have = _facts(run)
    if not have:
        return ""
    blocks = [_table("Use of the time", _time(have))]
    other = _other(have)
    if other:
        blocks.append(_table("Throughput and memory", other))
    events = [_event(row) for row in run.events]
    if events:
        more = f"<li>and {len(events) - 20} more</li>" if len(events) > 20 else ""
        items = "".join(f"<li>{escape(text)}</li>" for text in events[:20])
        blocks.append(
            f'<section class="block"><h3>What went wrong</h3><ul>{items}{more}</ul></section>'
        )
    out = f'<div class="columns">{"".join(blocks)}</div>' + _processes(mapping(have.get("ranks")))
    return f"<section><h2>How it ran</h2>{out}</section>"


def _facts(run: RunFolder) -> Mapping[str, Any]:
    """As results.json has them, which a complete run writes, else from the log as far as it is."""
    return mapping(run.results.get("running")) or found(run)


def _time(have: Mapping[str, Any]) -> dict[str, str]:
    rows = {"goodput": f"{number(have.get('goodput')):.1%}"}
    for name, text in (
        ("wall_s", "since the first start"),
        ("useful_s", "steps that count"),
        ("input_wait_s", "waiting for input"),
        ("compile_s", "compiling"),
        ("eval_s", "evaluating"),
        ("save_s", "blocked by saving"),
        ("down_s", "between two starts"),
    ):
        value = number(have.get(name))
        if value > 0:
            rows[text] = f"{value:,.1f} s" if value < 600 else f"{value / 60:,.0f} min"
    for name, text in (
        ("starts", "starts"),
        ("repeated_steps", "steps taken again after a kill"),
        ("rollbacks", "rollbacks of loss spikes"),
        ("skipped_batches", "batches skipped by them"),
        ("slow_steps", "slow steps"),
    ):
        value = number(have.get(name))
        if value > (1 if name == "starts" else 0):
            rows[text] = f"{value:,.0f}"
    return rows


def _other(have: Mapping[str, Any]) -> dict[str, str]:
    rows = {}
    for name, text, scale, unit in (
        ("tokens_per_s", "tokens a second", 1.0, ""),
        ("flops_per_s", "model FLOPs a second", 1e12, " T"),
        ("memory_peak", "memory of the fullest device", GIB, " GiB"),
    ):
        value = number(have.get(name))
        if math.isfinite(value):
            rows[text] = f"{value / scale:,.4g}{unit}" if unit else f"{value:,.0f}"
    if math.isfinite(number(have.get("mfu"))):
        rows["MFU, of the bf16 peak"] = f"{have['mfu']:.1%}"
    return rows


def _event(row: Mapping[str, Any]) -> str:
    if row["kind"] == "rollback":
        cause = next((n for n in ("loss", "grad_norm") if n in row), None)
        why = f"{cause} {number(row[cause]):.4g}" if cause else "not finite"
        return (
            f"step {number(row.get('bad_step')):,.0f}: {why}; back to step "
            f"{number(row.get('anchor')):,.0f}, {number(row.get('skipped')):,.0f} batches skipped"
        )
    return (
        f"step {row['step']:,} took {number(row.get('step_time')):.2f} s, the median was "
        f"{number(row.get('median')):.3f} s"
    )


def _processes(have: Mapping[str, Any]) -> str:
    each = mapping(have.get("each"))
    if not each:
        return ""
    names = ("step_time", "busy", "input_wait", "worst")
    head = "<tr><th>rank</th><th>step</th><th>host at work</th><th>input wait</th><th>slowest</th>"
    body = ""
    for index, values in each.items():
        cells = "".join(f"<td>{1e3 * number(mapping(values).get(n)):,.1f} ms</td>" for n in names)
        body += f"<tr><th>{escape(str(index))}</th>{cells}</tr>"
    said = (
        f"Rank {number(have.get('slowest')):.0f} is the one that the others wait for: its host is "
        f"at work {number(have.get('spread')):.1%} of a step longer than the least busy one."
    )
    return (
        f'<div class="block"><h3>Processes</h3><table class="numbers"><thead>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table><p class="under">{said}</p></div>'
    )


def _table(title: str, rows: Mapping[str, str]) -> str:
    body = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items())
    return (
        f'<section class="block"><h3>{title}</h3><table class="plain"><tbody>{body}</tbody>'
        "</table></section>"
    )


def _median(values: Iterable[Any]) -> float | None:
    known = [v for v in map(number, values) if math.isfinite(v)]
    return statistics.median(known) if known else None
