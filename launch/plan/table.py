"""The report of a plan for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType


def render(found: Mapping[str, Any]) -> RenderableType:
    """Tables of memory, collectives and time, and the verdict."""
    from rich.console import Group
    from rich.text import Text

    lines = [Text(f"  {reason}") for reason in found["why"]]
    parts: list[RenderableType] = [_head(found), *lines, Text(""), _memory(found)]
    if "times" in found:
        parts += [Text(""), _moved(found), Text(""), _time(found)]
    return Group(*parts, Text(""), *_verdict(found))


def _grid(title: str, *columns: str) -> Any:
    from rich.table import Table

    grid = Table(title=title, title_justify="left", box=None, show_header=bool(columns))
    for number, name in enumerate(columns):
        grid.add_column(name, justify="left" if number == 0 else "right")
    return grid


def _head(found: Mapping[str, Any]) -> RenderableType:
    from rich.text import Text

    mesh = ",".join(f"{n}={s}" for n, s in found["mesh"].items())
    by = f" x {found['length']} tokens" if found["length"] else ""
    taught = f" taught by {found['teacher']}" if found["teacher"] else ""
    across = f" in {found['slices']} slices" if found["slices"] > 1 else ""
    return Text(
        f"{found['model']}{taught}: {found['parameters']:,} parameters, {found['trainable']:,} "
        f"train; {found['rows']} rows{by} a step, {found['compute_dtype']}\n"
        f"{found['devices']} devices of {found['accelerator']['name']}{across}, mesh {mesh}:"
    )


def _memory(found: Mapping[str, Any]) -> RenderableType:
    grid = _grid("bytes a device", "", "GiB")
    for name, size in found["state"].items():
        if size >= 2**20:
            grid.add_row(name, _gib(size))
    if "inside" in found:
        for name, size in found["inside"].items():
            if size >= 2**20:
                grid.add_row(f"in the step: {name}", _gib(size))
    else:
        for name in ("gradients", "ascent_copy", "compute_copies", "activations_estimated"):
            if found[name]:
                grid.add_row(name.replace("_", " "), _gib(found[name]))
    grid.add_row("total", _gib(found["total"]))
    grid.add_row("usable", _gib(found["usable"]))
    return grid


def _moved(found: Mapping[str, Any]) -> RenderableType:
    grid = _grid("collectives a step", "", "over", "GiB sent", "calls", "ms")
    for one in found["times"]["collectives"]:
        if one["seconds"] < 1e-3 * found["times"]["step"]:
            continue
        grid.add_row(
            one["kind"],
            "+".join(one["axes"]),
            _gib(one["sent"]),
            f"{one['calls']:,}",
            f"{1e3 * one['seconds']:,.4g}",
        )
    if not grid.row_count:
        grid.add_row("none that takes 0.1% of the step", "", "", "", "")
    return grid


def _time(found: Mapping[str, Any]) -> RenderableType:
    times, place = found["times"], found["accelerator"]
    grid = _grid("roofline (the least time a step can take)")
    tflops = found["flops"] / 1e12
    grid.add_row("FLOPs a device", f"{tflops:,.4g} T ({found['model_flops'] / 1e12:,.4g} T model)")
    ridge = place["peak"] / place["bandwidth"]
    grid.add_row(
        "arithmetic intensity",
        f"{times['intensity']:.3g} FLOPs a byte (the ridge in bf16 is {ridge:.3g}); "
        f"{times['bound']:.0%} of the kernels' time at peak",
    )
    grid.add_row("kernels", f"{1e3 * times['compute']:,.4g} ms")
    grid.add_row("collectives beside them", f"{1e3 * times['overlapped']:,.4g} ms")
    grid.add_row("collectives waited for", f"{1e3 * times['exposed']:,.4g} ms")
    rate = f"{found['tokens_per_s']:,.0f} tokens a second"
    grid.add_row("step", f"{1e3 * times['step']:,.4g} ms, {rate}")
    grid.add_row(
        "efficiency",
        f"{times['efficiency']:.0%} of the step computes; MFU at most {found['mfu']:.0%}",
    )
    return grid


def _verdict(found: Mapping[str, Any]) -> list[RenderableType]:
    from rich.text import Text

    share = found["total"] / found["usable"]
    if found["fits"]:
        lines: list[RenderableType] = [Text(f"fits: {share:.0%} of the usable memory", "green")]
    else:
        lines = [Text("does not fit", "red"), *(Text(f"  {c}") for c in found["change"])]
    if found.get("unknown_loops"):
        lines.append(Text(f"{found['unknown_loops']} loops of unknown length are counted once"))
    return lines


def _gib(size: float) -> str:
    return f"{size / 2**30:,.4g}"
