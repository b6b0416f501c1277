"""``steppe report FOLDER``: the page of any folder that a command has left, written again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = "report.html"


def write(folder: Path) -> Path:
    """Writes the page from what lies in the folder, prints its table, and returns the page.

    Raises:
      FileNotFoundError: no such folder, or nothing in it that a report is made of.
      ValueError: what lies there is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"run folder {folder} does not exist")
    for mark, kind in KINDS.items():
        if (folder / mark).is_file():
            return kind(folder)
    return _run(folder)


def _comparison(folder: Path) -> Path:
    from rich.console import Console

    from steppe.launch.compare import command, table

    Console().print(table.rich_table(command.report(folder)))
    return folder / PAGE


def _merges(folder: Path) -> Path:
    from rich.console import Console

    from steppe.launch.merge import study, study_table

    Console().print(study_table.rich_table(study.report(folder)))
    return folder / PAGE


def _merge(folder: Path) -> Path:
    from steppe.launch.merge import command

    return command.report(folder)


def _quantization(folder: Path) -> Path:
    from rich.console import Console

    from steppe.launch import outputs
    from steppe.launch.quantize import table
    from steppe.launch.report import quantizing

    found = _read(folder / "quantize.json")
    outputs.write_text(folder / PAGE, quantizing.render(found, folder))
    Console().print(table.terminal(found))
    return folder / PAGE


def _continual(folder: Path) -> Path:
    from rich.console import Console

    from steppe.launch import outputs
    from steppe.launch.continual import table
    from steppe.launch.report import streaming

    found = _read(folder / "results.json")
    outputs.write_text(folder / PAGE, streaming.render(found))
    Console().print(table.rich_table(found))
    return folder / PAGE


def _tour(folder: Path) -> Path:
    from steppe.launch.tour import command

    return command.write(folder)


def _read(file: Path) -> Any:
    from steppe.launch import outputs

    try:
        return outputs.read_json(file)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{file.parent} holds no finished task yet: go on with --resume"
        ) from None


def _run(folder: Path) -> Path:
    from rich.console import Console

    from steppe.launch import report

    file = report.write(folder)
    Console().print(report.summary(folder))
    return file


# The file by which a folder is known -> who writes its page.
KINDS: dict[str, Callable[[Path], Path]] = {
    "runs.jsonl": _comparison,
    "merges.jsonl": _merges,
    "merge.json": _merge,
    "quantize.json": _quantization,
    "stages.jsonl": _continual,
    "tour.json": _tour,
}
