"""Metrics as (sum, weight) pairs, and the files that they are written to.

A pair can be added over steps, micro-batches and devices without an error; the mean is taken
once, at the end, in float64. A writer has three methods, ``write(step, kind, values)``,
``truncate(step)`` and ``close()``; the loop calls ``truncate`` when it resumes, so that a file
never holds a step twice.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from steppe.train.types import Metrics

RESERVED = ("step", "kind", "time")


def fetch(metrics: Metrics) -> dict[str, tuple[float, float]]:
    """The pairs of one step as Python floats, in a single transfer from the device."""
    host = jax.device_get(dict(metrics))
    return {name: (float(total), float(weight)) for name, (total, weight) in host.items()}


def mean(total: float, weight: float) -> float | None:
    """total / weight, or None where nothing was counted (weight 0): there is no mean then."""
    return float(total) / float(weight) if weight else None


class Mean:
    """A streaming mean of named (sum, weight) pairs.

    Sums are kept in float64 on the host, so a million float32 steps lose nothing.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        """Adds the pairs of one step; names may come and go from step to step.

        Raises:
          ValueError: a value that is not a pair of scalars, or a negative weight.
        """
        for name, pair in jax.device_get(dict(metrics)).items():
            if np.shape(pair) != (2,):
                raise ValueError(f"metric {name!r} must be a pair (sum, weight), got {pair!r}")
            total, weight = float(pair[0]), float(pair[1])
            if weight < 0:
                raise ValueError(f"the weight of metric {name!r} must be >= 0, got {weight}")
            before = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (before[0] + total, before[1] + weight)

    def result(self) -> dict[str, float]:
        """The means so far. A metric whose weights add up to 0 has none and is left out."""
        means = {name: mean(*pair) for name, pair in self._sums.items()}
        return {name: value for name, value in means.items() if value is not None}

    def reset(self) -> dict[str, float]:
        """The means so far; starts anew."""
        result = self.result()
        self._sums = {}
        return result


class Writer(Protocol):
    """Where the numbers of a run go."""

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Records named numbers of one step; kind is ``"train"`` or ``"eval"``."""

    def truncate(self, step: int) -> None:
        """Forgets what was recorded after ``step``, because the run goes on from there."""

    def close(self) -> None:
        """Leaves everything on disk; nothing can be written afterwards."""


class JsonLines:
    """One JSON object a line: ``{"step", "kind", "time", name: number, ...}``.

    Rows are appended whole, by one write each, so several readers can follow the file and a
    kill leaves at most one torn last row; the next write or ``truncate`` removes it. Numbers
    that JSON does not have (NaN, infinities) are written as null.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, clock: Callable[[], float] = time.time
    ) -> None:
        """Nothing is created or changed before the first write.

        Args:
          path: the file; its folder is created when needed.
          clock: gives the ``time`` of a row, seconds since 1970.
        """
        self.path = Path(path)
        self._clock = clock

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Appends one row.

        Raises:
          ValueError: a metric is called step, kind or time, or is not a number.
        """
        row: dict[str, Any] = {"step": int(step), "kind": kind, "time": round(self._clock(), 3)}
        for name, value in values.items():
            if name in RESERVED:
                raise ValueError(f"a metric may not be called {name!r}; rename it")
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise ValueError(f"metric {name!r} must be a number, got {value!r}") from None
            row[name] = number if math.isfinite(number) else None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._repair()
        with open(self.path, "ab", buffering=0) as file:
            file.write((json.dumps(row) + "\n").encode())

    def truncate(self, step: int) -> None:
        """Drops the rows after ``step`` by replacing the file in one move.

        A kill at any moment leaves either the old file or the new one. A missing file is
        left missing.

        Raises:
          ValueError: a row that is not JSON (other than a torn last one); names the line.
        """
        if not self.path.exists():
            return
        kept = [row for row in read(self.path) if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, self.path.stat().st_mode)
            os.replace(name, self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """Nothing to do: every row is in the file when ``write`` returns."""

    def _repair(self) -> None:
        """Makes the file end with a newline: completes a whole last row, removes a torn one."""
        if not self.path.exists():
            return
        with open(self.path, "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                return
            file.seek(size - 1)
            if file.read(1) == b"\n":
                return
            file.seek(0)
            data = file.read()
            start = data.rfind(b"\n") + 1
            if _parse(data[start:]) is None:
                file.truncate(start)
            else:
                file.write(b"\n")


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics file, in order; a torn last row is left out.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another row is not a JSON object with a step; names the line.
    """
    lines = Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            raise ValueError(
                f"{path} line {number} is not a metrics row: {line[:60].decode(errors='replace')!r}"
            )
    return rows


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


class TensorBoard:
    """Scalars ``kind/name`` for TensorBoard, through tensorboardX (imported at first use)."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """
        Args:
          folder: event files are written here.

        Raises:
          ImportError: tensorboardX is not installed.
        """
        try:
            import tensorboardX
        except ImportError:
            raise ImportError(
                "TensorBoard logs need tensorboardX: pip install 'steppe[tensorboard]'"
            ) from None
        self._make = tensorboardX.SummaryWriter
        self._folder = str(folder)
        self._writer: Any = None
        self._purge: int | None = None

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Records the numbers of one step."""
        if self._writer is None:
            extra = {} if self._purge is None else {"purge_step": self._purge}
            self._writer = self._make(self._folder, **extra)
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", float(value), int(step))

    def truncate(self, step: int) -> None:
        """Tells TensorBoard to discard what earlier event files hold after ``step``."""
        self.close()
        self._purge = int(step) + 1

    def close(self) -> None:
        """Flushes the event file; a later write opens another one."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
