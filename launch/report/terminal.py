"""The same result for the terminal, as a rich renderable."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from steppe.launch.report.facts import LOWER_IS_BETTER, glance, headline, value_text
from steppe.launch.report.folder import read

if TYPE_CHECKING:
    from rich.console import RenderableType

WIDTH = 28  # of the bars, in characters


def summary(run: str | os.PathLike[str]) -> RenderableType:
    """The main result beside its baselines, the run at a glance, and what is missing.

    Raises:
      FileNotFoundError: the folder does not exist, or holds none of a run's files.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    folder = read(Path(run))
    parts: list[RenderableType] = []
    main = headline(folder)
    if main is not None:
        title = f"{main.split} {main.metric.replace('_', ' ')}"
        if main.examples is not None:
            title += f", {main.examples:,} examples"
        parts.append(Text(title, style="bold"))
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column()
        table.add_column()
        table.add_column(justify="right")
        rows = [*main.baselines, ("this run", main.value)]
        high = max(value for _, value in rows)
        scale = 1.0 if main.metric not in LOWER_IS_BETTER and high <= 1 else high or 1.0
        for name, value in rows:
            own = name == "this run"
            style = "bold green" if own else "dim"
            bar = "━" * round(WIDTH * min(max(value / scale, 0.0), 1.0))
            text = value_text(main.metric, value)
            if own and main.interval is not None:
                low, top = (value_text(main.metric, v) for v in main.interval)
                text += f"  ({low} to {top})"
            table.add_row(
                Text(name, style="bold" if own else ""),
                Text(bar, style=style),
                Text(text, style="bold" if own else ""),
            )
        parts.append(table)
    facts = glance(folder)
    if facts:
        line = Text()
        for name, text in facts:
            line.append(text, style="bold")
            line.append(f" {name}   ", style="dim")
        line.rstrip()
        parts.append(line)
    parts.extend(Text(note, style="yellow") for note in folder.notes)
    if (folder.path / "report.html").is_file():
        parts.append(Text(f"report: {folder.path / 'report.html'}", style="dim"))
    return Group(*parts)
