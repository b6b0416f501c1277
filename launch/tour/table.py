"""The stages in one table: what each model scores, weighs and costs, over the seeds."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steppe.launch import config as config_
from steppe.launch import machine, setup
from steppe.launch.tour import claims
from steppe.launch.tour.graph import Done, Graph
from steppe.launch.tour.settings import TourConfig
from steppe.launch.tour.stages import OTHER, named, slugs
from steppe.launch.tour.world import World, few


def summary(
    config: TourConfig,
    world: World,
    graph: Graph,
    found: Mapping[str, Done],
    command: Sequence[str],
) -> dict[str, Any]:
    """What tour.json holds; the page and the terminal's table are made of it alone."""
    first = config.seeds[0]
    merges = {slug: found[f"{first}/merge/{slug}"].result for slug in slugs(config)}
    seconds = {name: done.seconds for name, done in found.items()}
    return {
        "command": shlex.join(command),
        "config": config_.to_dict(config),
        "tasks": [
            {
                "name": task.name,
                "source": task.data.source,
                "licence": setup.licence(task.data.source),
                "classes": list(task.description.label_names),
                "examples": {split: len(data) for split, data in task.splits.items()},
                "further": list(world.further[task.name]),
            }
            for task in world.tasks.values()
        ],
        "model": {"name": config.model, "licence": world.origin.licence},
        "rows": rows(config, found),
        "claims": claims.all_of(config, found),
        "choices": {
            what: found[f"{first}/choice/{what}"].result
            for what in ("optimiser", "merge", "rounded")
        },
        "crossed": {o: found[f"{first}/scores/{o}"].result["crossed"] for o in config.optimisers},
        "surface": found[f"{first}/surface"].result if config.grid else None,
        "mask": next((one["mask"] for one in merges.values() if one.get("mask")), None),
        "notes": [*few(world.tasks), *notes(config, found)],
        "export": found[f"{first}/export"].result,
        "seconds": {"total": sum(seconds.values()), "stages": seconds},
        "hashes": graph.hashes,
        "versions": machine.versions(),
        "hardware": machine.hardware(),
    }


def notes(config: TourConfig, found: Mapping[str, Done]) -> list[str]:
    """What a reader of the table has to know of the first seed's merges and games."""
    first, said = config.seeds[0], []
    for slug in slugs(config):
        for note in found[f"{first}/merge/{slug}"].result.get("notes", []):
            said.append(f"{slug}: {note}")
    for bits, method in config.rounded():
        if method == "rtn":
            continue
        moved = found[f"{first}/quantize/{bits}-{method}"].result["moved"]
        kept = "the game keeps the rounding that it began with"
        share = f"{moved:.2%} of the integers are not those of rounding"
        said.append(f"{bits.upper()}, {method.upper()}: {share if moved else kept}")
    return said


def rows(config: TourConfig, found: Mapping[str, Done]) -> list[dict[str, Any]]:
    """A row for every model, in the order of the stages.

    Every row has ``name``, ``phase``, ``key`` (of its scores), ``tests`` (a mean accuracy a
    seed), the means over the seeds of ``test``, ``ece``, ``further``, ``tasks`` (task ->
    accuracy) and ``away`` (task -> data -> accuracy), ``seconds`` that its own making took, and
    where they are known ``bytes``, ``ms`` (rows of the pass -> a text), ``flops``,
    ``bit_operations``, ``top_eigenvalue``, ``ball_gap``.
    """
    first = config.seeds[0]
    costs = found[f"{first}/costs"].result
    best = str(found[f"{first}/choice/merge"].result["best"]).rpartition("/")[2]
    out = []
    for o in config.optimisers:
        makers = [f"finetune/{task}-{o}" for task in config.names]
        name = f"{named(o)}, one a task"
        out.append(_row(config, found, o, name, "flat", makers, costs["full"], o))
    for slug in (*slugs(config), OTHER):
        name = slug
        if slug == OTHER:
            name = f"average of {named(found[f'{first}/merge/{slug}'].result['optimiser'])}'s"
        flat = "merged" if slug == best else ""
        made = _row(config, found, slug, name, "shared", [f"merge/{slug}"], costs["full"], flat)
        out.append({**made, "goes_on": slug == best})
    name = f"student, {config.layers} layers"
    out.append(
        _row(config, found, "student", name, "small", ["student"], costs["student"], "student")
    )
    handed = str(found[f"{first}/choice/rounded"].result["best"]).rpartition("/")[2]
    for bits, method in config.rounded():
        slug = f"{bits}-{method}"
        name = f"{bits.upper()}, {'to nearest' if method == 'rtn' else method.upper()}"
        made = _row(config, found, slug, name, "rounded", [f"quantize/{slug}"], costs[bits], "")
        out.append({**made, "goes_on": slug == handed})
    return out


def _row(
    config: TourConfig,
    found: Mapping[str, Done],
    key: str,
    name: str,
    phase: str,
    makers: Sequence[str],
    cost: Mapping[str, Any],
    flat: str,
) -> dict[str, Any]:
    results = [found[f"{seed}/scores/{key}"].result for seed in config.seeds]
    first = config.seeds[0]
    sizes = [found[f"{first}/{maker}"].result.get("bytes") for maker in makers]
    size = results[0].get("bytes") if phase == "flat" else sizes[0]
    out: dict[str, Any] = {
        "name": name,
        "phase": phase,
        "key": key,
        "goes_on": phase == "small",
        "tests": [r["mean"]["test"] for r in results],
        "bytes": size,
        "ms": {rows: times["median"] for rows, times in cost["ms"].items()},
        "flops": cost["flops"],
        "bit_operations": cost["bit_operations"],
        "seconds": _mean(
            [sum(found[f"{s}/{maker}"].seconds for maker in makers) for s in config.seeds]
        ),
    }
    for metric in ("test", "valid", "ece", "further"):
        out[metric] = _mean([r["mean"][metric] for r in results])
    out["tasks"] = {
        task: _mean([r["test"][task]["accuracy"] for r in results]) for task in config.names
    }
    out["away"] = {
        task: {
            other: _mean([r["further"][task][other]["accuracy"] for r in results])
            for other in results[0]["further"][task]
        }
        for task in config.names
    }
    if flat and config.curvature:
        for metric in ("top_eigenvalue", "ball_gap"):
            values = [found[f"{s}/flatness/{flat}"].result["mean"][metric] for s in config.seeds]
            out[metric] = _mean(values)
    return out


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def spread(row: Mapping[str, Any]) -> str:
    """Mean accuracy, with the standard deviation over seeds where there are several."""
    values = [100 * value for value in row["tests"]]
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def number(value: float | None, form: str, unit: float = 1.0) -> str:
    """A value in a table; nothing where it is not known."""
    return "" if value is None or not math.isfinite(value) else format(unit * value, form)


def terminal(found: Mapping[str, Any]) -> Any:
    """The table for the terminal."""
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("", no_wrap=True)
    tasks = [task["name"] for task in found["tasks"]]
    for name in ("mean", *tasks, "away", "ECE", "MB", "ms"):
        table.add_column(name, justify="right")
    phase = ""
    for row in found["rows"]:
        if phase and row["phase"] != phase:
            table.add_section()
        phase = row["phase"]
        cells = [spread(row), *(number(row["tasks"][t], ".1f", 100) for t in tasks)]
        cells += [number(row["further"], ".1f", 100), number(row["ece"], ".1f", 100)]
        cells += [number(row["bytes"], ".1f", 1e-6), number(row["ms"]["1"], ".1f")]
        mark = " *" if row["goes_on"] else ""
        table.add_row(row["name"] + mark, *cells)
    return table


def said(found: Mapping[str, Any]) -> list[str]:
    """The claims as lines, and what the mark in the table means."""
    width = max(len(claims.verdict(one)) for one in found["claims"])
    lines = ["* goes on to the next stage, chosen on the validation splits"]
    for one in found["claims"]:
        lines.append(f"{claims.verdict(one):>{width}}  {one['claim']}: {one['said']}")
    return lines
