"""What survives restarts: when a run was started, from which step, and how far it had come.

``FOLDER/starts.jsonl`` gets a line a start and one at a planned end, and is never cut, unlike the
log of metrics, which forgets the steps that are repeated. ``FOLDER/reached`` holds the last
complete step and the time; it is written over at every step, without waiting for the disk: a
process that is killed leaves it, a machine that loses its power may lose the last seconds.

  goodput = time of the steps that count, less input wait / wall time since the first start
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from steppe.train import metrics
from steppe.train.types import TrainState

STARTS = "starts.jsonl"
REACHED = "reached"
_WIDTH = 40


class Record:
    """Writes both files; a watcher of ``loop.run``. One process of a run has it.

    Args:
      folder: of the run.
      clock: seconds since 1970.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, clock: Callable[[], float] = time.time
    ) -> None:
        self._folder = Path(folder)
        self._clock = clock
        self._lines = metrics.JsonLines(self._folder / STARTS, clock=clock)
        self._file: int | None = None
        self._step = 0

    def begin(self, step: int, *, since: float | None = None, **facts: float) -> None:
        """The run goes on from ``step``.

        Args:
          since: when this process began to work for it; None = now.
          facts: numbers about this start, such as devices.
        """
        last = reached(self._folder)
        before = {} if last is None else {"reached": last[0], "until": last[1]}
        began = self._clock() if since is None else since
        self._lines.write(step, "start", {"began": began, **before, **facts})
        self._file = os.open(self._folder / REACHED, os.O_RDWR | os.O_CREAT, 0o644)
        self.after(step)

    def before(self, step: int, state: TrainState) -> None:
        """Nothing: only complete steps count."""

    def after(self, step: int) -> None:
        """The step is complete."""
        assert self._file is not None, "begin() comes first"
        self._step = step
        line = f"{step} {self._clock():.3f}".ljust(_WIDTH - 1) + "\n"
        os.pwrite(self._file, line.encode(), 0)

    def end(self) -> None:
        """The run ends here, complete or as it was asked to."""
        self._lines.write(self._step, "end", {})
        if self._file is not None:
            os.close(self._file)
            self._file = None


def reached(folder: str | os.PathLike[str]) -> tuple[int, float] | None:
    """(last complete step, when) of the last start; None where nothing whole is written."""
    try:
        step, when = (Path(folder) / REACHED).read_text("utf-8").split()
        return int(step), float(when)
    except (OSError, ValueError):
        return None


def summary(
    starts: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    until: float | None = None,
) -> dict[str, float]:
    """How the time of a run was used.

    Args:
      starts: rows of starts.jsonl.
      rows: those of the log: kinds train, slow and rollback count.
      until: end of the wall time; None = the last row of either.

    Returns:
      ``starts``; ``repeated_steps`` that were taken again after a kill; ``rollbacks`` and
      ``skipped_batches`` of loss spikes; ``slow_steps``; ``wall_s`` since the first start,
      ``useful_s`` of the steps that count, ``input_wait_s`` in them, ``compile_s``, ``eval_s``
      and ``save_s`` as far as the log has them, ``down_s`` between a last step and the next
      start; ``goodput`` = useful / wall; ``input_wait_share`` of the steps' time. Empty without a
      start or a step.
    """
    begun = [row for row in starts if row.get("kind") == "start"]
    steps = sorted((r for r in rows if r.get("kind") == "train"), key=lambda r: r["step"])
    if not begun or not steps:
        return {}
    last, useful, waited = 0, 0.0, 0.0
    apart = dict.fromkeys(("compile", "eval", "save"), 0.0)
    for row in steps:
        count, last = row["step"] - last, row["step"]
        wait = _number(row, "input_wait")
        useful += count * (_number(row, "step_time") - wait)
        waited += count * wait
        for name in apart:
            apart[name] += _number(row, f"{name}_time")
    repeated = sum(max(0, int(r.get("reached") or 0) - r["step"]) for r in begun)
    down = sum(max(0.0, _number(r, "began") - r["until"]) for r in begun if r.get("until"))
    ends = [row["time"] for row in (*starts, *steps) if "time" in row]
    wall = (max(ends) if until is None else until) - _number(begun[0], "began")
    back = [row for row in rows if row.get("kind") == "rollback"]
    found = {
        "starts": len(begun),
        "repeated_steps": repeated,
        "rollbacks": len(back),
        "skipped_batches": sum(int(_number(row, "skipped")) for row in back),
        "slow_steps": sum(row.get("kind") == "slow" for row in rows),
        "wall_s": wall,
        "useful_s": useful,
        "input_wait_s": waited,
        "down_s": down,
        **{f"{name}_s": seconds for name, seconds in apart.items()},
    }
    if wall > 0:
        found["goodput"] = useful / wall
    if useful + waited > 0:
        found["input_wait_share"] = waited / (useful + waited)
    return found


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) else 0.0
