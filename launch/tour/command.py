"""``steppe tour``: runs the stages that are left, and writes the table and the page.

OUT/stages/NAME-HASH     a folder for every stage, see ``graph``
OUT/model, OUT/student   what is handed out: packed integers, and the float student
OUT/config.json, tour.json, report.html
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from steppe.launch import config as config_
from steppe.launch import outputs
from steppe.launch.compare import folders
from steppe.launch.progress import Line
from steppe.launch.tour import shipped, stages, table
from steppe.launch.tour.graph import STAGES, Graph, Stage, alone
from steppe.launch.tour.settings import TourConfig
from steppe.launch.tour.world import World, few
from steppe.train import loop

RESULT, PAGE, PROGRAMS = "tour.json", "report.html", "programs"
NEEDED = ("config", "tasks", "rows", "claims", "notes", "export", "seconds", "hashes")
# What only a tour's settings have, all of them.
MARKS = {"tasks", "elsewhere", "rounding", "student_epochs"}


def run(config: TourConfig, command: Sequence[str] = ()) -> dict[str, Any]:
    """The whole command; returns what is in tour.json, or with ``dry_run`` the stages.

    Raises:
      FileExistsError: ``out`` holds something else.
      ValueError, OSError: settings, data or a model that do not fit; nothing is written.
      Interrupted: stopped by Ctrl-C or SIGTERM; finished stages are kept.
    """
    from rich.console import Console

    out = Path(config.out)
    check(out)
    world = World(config)
    graph = stages.graph(config, world)
    if config.dry_run:
        return _dry(graph)
    outputs.write_json(out / folders.CONFIG, config_.to_dict(config))
    said = Console(stderr=True)
    begin = time.perf_counter()
    left = sum(graph.done(stage.name) is None for stage in graph.stages)
    said.print(f"{left} of {len(graph.stages)} stages are left; {out}", highlight=False)
    for warning in few(world.tasks):
        said.print(f"warning: {warning}", highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def around(stage: Stage, number: int, total: int) -> Iterator[None]:
        mark = time.perf_counter()
        place = f"{number}/{total} {stage.what}"
        if stage.resumes:  # has a progress bar of its own
            said.print(place, highlight=False)
            yield
        else:
            with Line(place, name=place, every=20.0) as shown:
                world.tell = shown.tell
                yield
        seconds = time.perf_counter() - mark
        said.print(f"{place}: {seconds:.0f} s", highlight=False, soft_wrap=True)

    try:
        with folders.terminable(), alone(out), programs(out):
            found = graph.run(around)
    except KeyboardInterrupt as stop:
        done = sum(graph.done(stage.name) is not None for stage in graph.stages)
        raise loop.Interrupted(
            f"interrupted; {done} of {len(graph.stages)} stages are finished and kept in "
            f"{graph.root}. Give the same command again to go on"
        ) from stop
    result = table.summary(config, world, graph, found, command)
    result["seconds"]["this_run"] = time.perf_counter() - begin
    outputs.write_json(out / RESULT, result)
    export = found[f"{config.seeds[0]}/export"].folder
    for name, target in ((shipped.PACKED, "model"), (shipped.HUB, "student")):
        place(export / name, out / target)
    write(out)
    return result


def write(out: Path) -> Path:
    """Writes the page of a finished tour again, prints the summary, and returns the page.

    Raises:
      ValueError: tour.json is damaged.
    """
    from rich.console import Console

    from steppe.launch.report import touring
    from steppe.launch.report.sharpness import finite

    found = outputs.read_json(out / RESULT)
    lacking = [name for name in NEEDED if not isinstance(found, dict) or name not in found]
    if lacking:
        raise ValueError(
            f"{out / RESULT} is damaged: it lacks {lacking[0]!r}; give the tour's command again, "
            "which writes it from the finished stages"
        )
    outputs.write_text(out / PAGE, touring.render(finite(found)))
    console = Console()
    console.print(table.terminal(found))
    for line in table.said(found):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    total = found["seconds"]["total"]
    console.print(f"{total / 60:.1f} minutes in {len(found['hashes'])} stages", highlight=False)
    console.print(f"model: {out / 'model'}", highlight=False, soft_wrap=True)
    console.print(f"report: {out / PAGE}", highlight=False, soft_wrap=True)
    return out / PAGE


def check(out: Path) -> None:
    """Refuses a folder that holds something else.

    Raises:
      FileExistsError: it does.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose another --out")
    held = sorted(file.name for file in out.iterdir()) if out.is_dir() else []
    if not held:
        return
    try:
        values = json.loads((out / folders.CONFIG).read_text("utf-8"))
    except (OSError, ValueError):
        values = None
        if (out / STAGES).is_dir():
            return  # a tour, whose settings are written again
    if not isinstance(values, dict) or not values.keys() >= MARKS:
        raise FileExistsError(
            f"{out} holds something else ({held[0]}), and no tour; choose a new --out"
        )


def place(source: Path, target: Path) -> None:
    """A copy of a folder in place of an earlier one, which is there until the copy is."""
    fresh, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source, fresh)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def programs(out: Path) -> Iterator[None]:
    """Compiled programs are kept in the run folder: tasks of one size share theirs, and so does
    a run that goes on. A cache that the user has set is left alone."""
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.values["jax_compilation_cache_dir"] is not None:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str(out.absolute() / PROGRAMS))
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def _dry(graph: Graph) -> dict[str, Any]:
    """Prints the stages, with their hashes and what is done of them."""
    from rich.console import Console
    from rich.table import Table

    shown = Table("stage", "hash", "", "what", box=None, header_style="bold")
    rows = []
    for stage in graph.stages:
        state = graph.state(stage.name)
        shown.add_row(stage.name, graph.hashes[stage.name], state, stage.what)
        rows.append({"name": stage.name, "hash": graph.hashes[stage.name], "state": state})
    console = Console()
    console.print(shown)
    done = sum(row["state"] == "done" for row in rows)
    console.print(f"{done} of {len(rows)} stages are done in {graph.root}", highlight=False)
    return {"stages": rows}
