"""What a run folder holds, read so that a killed or half-written run still gives a report.

Nothing here raises for damaged content: whatever is missing or unreadable becomes a note, and
the rest is returned. Only a folder that holds no run at all is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from steppe.launch import watch
from steppe.train import goodput

Row: TypeAlias = dict[str, Any]

CONFIG = "config.json"
METRICS = "metrics.jsonl"
RESULTS = "results.json"
PREDICTIONS = "predictions.jsonl"

# What the report lacks without each file, in the words of its reader.
_LOST = {
    CONFIG: "the configuration is unknown",
    METRICS: "there are no curves",
    RESULTS: "the run has not been evaluated, or was stopped before",
    PREDICTIONS: "there is no error analysis",
}


@dataclass(frozen=True)
class RunFolder:
    """The content of a run folder.

    Attributes:
      path: the folder.
      config: resolved configuration, nested; empty when missing.
      results: content of results.json; empty when missing.
      train: training rows of metrics.jsonl by increasing step.
      evals: evaluation rows by increasing step.
      predictions: rows of the evaluation split.
      events: slow steps and rollbacks by increasing step.
      starts: rows of starts.jsonl, see ``train.goodput``.
      ranks: rank -> training rows of the processes but the first.
      notes: sentences about everything that is missing or damaged.
    """

    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    train: Sequence[Row] = ()
    evals: Sequence[Row] = ()
    predictions: Sequence[Row] = ()
    notes: Sequence[str] = ()
    events: Sequence[Row] = ()
    starts: Sequence[Row] = ()
    ranks: Mapping[int, Sequence[Row]] = field(default_factory=dict)

    @property
    def last_step(self) -> int | None:
        """The last step that was logged, or None."""
        steps = [row["step"] for row in (*self.train, *self.evals)]
        return max(steps) if steps else None


def read(path: Path) -> RunFolder:
    """Reads a run folder.

    Raises:
      FileNotFoundError: the folder does not exist, or holds none of a run's files.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"run folder {path} does not exist")
    if not any((path / name).is_file() for name in _LOST):
        raise FileNotFoundError(f"{path} is not a run folder: it holds none of {', '.join(_LOST)}")
    notes: list[str] = []
    config = _read_json(path / CONFIG, notes)
    results = _read_json(path / RESULTS, notes)
    metrics = _read_lines(path / METRICS, notes)
    predictions = _read_lines(path / PREDICTIONS, notes)
    train = _by_step(row for row in metrics if row.get("kind") == "train")
    evals = _by_step(row for row in metrics if row.get("kind") == "eval")
    bad = [row["step"] for row in train if "loss" in row and not math.isfinite(number(row["loss"]))]
    if bad:
        notes.append(f"The training loss is not finite in {len(bad)} rows, first at step {bad[0]}.")
    events = [row for row in metrics if row.get("kind") in ("slow", "rollback")]
    return RunFolder(
        path,
        config,
        results,
        train,
        evals,
        predictions,
        tuple(notes),
        [row for row in events if math.isfinite(number(row.get("step")))],
        _whole_lines(path / goodput.STARTS),
        {
            index: _by_step(row for row in _whole_lines(file) if row.get("kind") == "train")
            for index, file in watch.others(path).items()
        },
    )


def number(value: Any) -> float:
    """``value`` as a float; NaN for everything that is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits is still valid JSON
        return math.nan


def mapping(value: Any) -> Mapping[str, Any]:
    """``value`` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: Any) -> Sequence[Any]:
    """``value`` if it is a list or tuple, else an empty one."""
    return value if isinstance(value, (list, tuple)) else ()


def _read_json(file: Path, notes: list[str]) -> Mapping[str, Any]:
    if not file.is_file():
        notes.append(f"{file.name} is missing: {_LOST[file.name]}.")
        return {}
    try:
        content = json.loads(file.read_bytes().decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        notes.append(f"{file.name} is damaged and was left out: {_LOST[file.name]}.")
        return {}
    if not isinstance(content, Mapping):
        notes.append(f"{file.name} does not hold an object and was left out.")
        return {}
    return content


def _read_lines(file: Path, notes: list[str]) -> list[Row]:
    if not file.is_file():
        notes.append(f"{file.name} is missing: {_LOST[file.name]}.")
        return []
    rows: list[Row] = []
    damaged = 0
    torn = False
    with file.open("rb") as stream:
        for line in stream:
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8", "replace"))
            except (ValueError, RecursionError):
                row = None
            torn = row is None and not line.endswith(b"\n")
            if isinstance(row, dict):
                rows.append(row)
            elif not torn:
                damaged += 1
    if torn:
        notes.append(
            f"{file.name} ends in a torn line: the run was killed while writing it. "
            f"The {len(rows)} rows before it are shown."
        )
    if damaged:
        notes.append(f"{damaged} lines of {file.name} are not valid and were left out.")
    if not rows and not torn:
        notes.append(f"{file.name} holds no rows: {_LOST[file.name]}.")
    return rows


def _whole_lines(file: Path) -> list[Row]:
    """Rows of a file that a run may lack; what is damaged is left out."""
    return _read_lines(file, []) if file.is_file() else []


def _by_step(rows: Iterable[Row]) -> list[Row]:
    """Rows by increasing step, one a (step, split): of a repeated step the last one written."""
    last: dict[tuple[int, str], Row] = {}
    for row in rows:
        step = number(row.get("step"))
        if math.isfinite(step):
            last[int(step), str(row.get("split", ""))] = {**row, "step": int(step)}
    return [last[key] for key in sorted(last)]
