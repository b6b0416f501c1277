"""OUT/runs.jsonl: a line for every finished trial, on the disk before the next one begins."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from steppe.launch.compare.settings import Cell

FILE = "runs.jsonl"
K = TypeVar("K", bound=Hashable)


class Trial(NamedTuple):
    """One training run: what makes it another one than all others.

    Attributes:
      cell, arm: see ``settings``; the arm by its name.
      rho: radius; 0 for AdamW.
      seed: of head, order, dropout and draw of examples.
      reported: scored on the test split; otherwise on the validation split, to choose rho.
    """

    cell: Cell
    arm: str
    rho: float
    seed: int
    reported: bool


class Lines:
    """A file of JSON lines, each on the disk before the next one begins.

    A line that a kill has torn off is ignored, and overwritten by the next one.
    """

    def __init__(self, file: Path) -> None:
        """
        Raises:
          ValueError: a line that is no JSON object.
        """
        self.file = file
        self.read: list[dict[str, Any]] = []
        # Cut off when something is written: another process may be writing it, not be killed.
        self._torn_at: int | None = None
        if not file.is_file():
            return
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise self.damaged(number, error) from error
            if not isinstance(row, dict):
                raise self.damaged(number, "no object")
            self.read.append(row)
        if len(whole) < len(content):
            self._torn_at = len(whole)

    def damaged(self, number: int, why: object) -> ValueError:
        """What is said of line ``number``."""
        return ValueError(f"{self.file}, line {number} is damaged ({why})")

    def by(self, key: Callable[[Mapping[str, Any]], K]) -> dict[K, dict[str, Any]]:
        """The rows by a key that is read from them; of rows with the same one the last.

        Raises:
          ValueError: a row that the key cannot be read from (the line is named).
        """
        found = {}
        for number, row in enumerate(self.read, 1):
            try:
                found[key(row)] = row
            except (KeyError, TypeError, ValueError) as error:
                raise self.damaged(number, error) from error
        return found

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes a row."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self._torn_at is not None:
            os.truncate(self.file, self._torn_at)
            self._torn_at = None
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


class Journal:
    """The finished trials of a folder."""

    def __init__(self, folder: Path) -> None:
        self._lines = Lines(folder / FILE)
        self.file = self._lines.file
        self.rows: dict[Trial, dict[str, Any]] = self._lines.by(_trial)

    def __contains__(self, trial: Trial) -> bool:
        return trial in self.rows

    def get(self, trial: Trial) -> dict[str, Any] | None:
        """What the trial found; None where it has not run."""
        return self.rows.get(trial)

    def add(self, trial: Trial, found: Mapping[str, Any]) -> None:
        """Writes a finished trial."""
        row = {**trial.cell._asdict(), **trial._asdict(), **found}
        del row["cell"]
        self._lines.append(row)
        self.rows[trial] = row


def _trial(row: Mapping[str, Any]) -> Trial:
    cell = Cell(row["source"], int(row["size"]), float(row["noise"]))
    return Trial(cell, row["arm"], float(row["rho"]), int(row["seed"]), bool(row["reported"]))
