"""Puts the sections into one HTML file that needs nothing else, and writes it atomically."""

from __future__ import annotations

import contextlib
import os
import tempfile
from importlib import resources
from pathlib import Path
from string import Template

from steppe.launch.report import distilling, record, running, searching, sections, texts
from steppe.launch.report.folder import RunFolder, read
from steppe.launch.report.svg import escape

REPORT = "report.html"


def write(run: str | os.PathLike[str]) -> Path:
    """Writes ``report.html`` into a run folder from the files that are there.

    The page is self-contained: style and figures are inline, no script, nothing is loaded from
    elsewhere. The same files give the same bytes. An earlier report is replaced only when the
    new one is complete.

    Args:
      run: the run folder: config.json, metrics.jsonl, results.json, predictions.jsonl, each
        of which may be missing or cut off.

    Returns:
      The path of the report.

    Raises:
      FileNotFoundError: the folder does not exist, or holds none of a run's files.
    """
    folder = Path(run)
    text = render(read(folder))
    handle, scratch = tempfile.mkstemp(prefix=f".{REPORT}.", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(scratch, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(scratch, folder / REPORT)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        raise
    return folder / REPORT


def render(run: RunFolder) -> str:
    """The whole page as text; depends on ``run`` only."""
    parts = [
        sections.header(run),
        sections.result(run),
        distilling.beside(run),
        distilling.difficulty(run),
        texts.before_and_after(run),
        texts.written(run),
        searching.search(run),
        sections.learning(run),
        running.section(run),
        sections.errors(run),
        sections.cases(run),
        record.record(run),
    ]
    return Template(_resource("page.html")).substitute(
        title=escape(f"{run.path.resolve().name} · steppe"),
        style=_resource("style.css").rstrip(),
        body="\n".join(part for part in parts if part),
    )


def _resource(name: str) -> str:
    return resources.files("steppe.launch.report").joinpath(name).read_text("utf-8")
