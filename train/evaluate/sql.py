"""Execution accuracy of SQL: does a predicted query give what the gold query gives?

  EX = share of the questions whose prediction executes and whose result equals the gold result

Both queries run on a SQLite database in a process of its own, which may only read, for a limited
time and in limited memory (see ``sql_worker``); the process is replaced when it had to be killed.

Results are equal when they have the same number of columns and the same rows:

- as lists where the gold query has an ORDER BY outside all parentheses, else as multisets; rows
  that tie under that ORDER BY have the order that the plan gives them, so a tie may count as an
  error (as in the published evaluation);
- NULL equals NULL and nothing else; 1 equals 1.0, and no number equals a text; numbers with a
  fraction are rounded to 12 significant digits, since sums depend on the order of rows; -0.0
  is 0.0; texts count letter by letter, blobs byte by byte;
- names of columns do not count, and their order does not unless ``column_order=True``: one
  reordering of the columns must make all rows equal.

Yu et al., EMNLP 2018 (arXiv 1809.08887); Zhong, Yu, Klein, EMNLP 2020 (2010.02840) for the
comparison of results.

Deviations: the published script looks for the words "order by" anywhere in the gold query, which
makes the order count where only a subquery sorts. It compares numbers exactly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from steppe.train.evaluate import checks
from steppe.train.evaluate.sql_text import exact_match, is_ordered, normalise

__all__ = [
    "Executor",
    "Limits",
    "Outcome",
    "SQLScores",
    "exact_match",
    "execution_accuracy",
    "is_ordered",
    "normalise",
    "same_result",
]

GRACE = 2.0  # seconds beyond the limit that a worker gets to answer before it is killed
START = 60.0  # seconds for a worker to start on a busy machine
READY, GONE = "ready\n", ""  # what a worker says that has started, and one that has ended
DIGITS = 12
Row = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one query may use.

    Attributes:
      seconds: wall-clock time.
      steps: instructions of SQLite's virtual machine, which are the same on every machine (50
        to 200 million take a second).
      memory: bytes of the process; SQLite's heap gets half of them.
      rows: rows of the result.
      value_bytes: longest text or blob, also in between.
      result_bytes: all texts of the result together.
    """

    seconds: float = 10.0
    steps: int = 100_000_000
    memory: int = 1 << 29
    rows: int = 20_000
    value_bytes: int = 1_000_000
    result_bytes: int = 20_000_000

    def __post_init__(self) -> None:
        for name, least in (("seconds", 0.01), ("steps", 1_000), ("memory", 1 << 27), ("rows", 1),
                            ("value_bytes", 1_000), ("result_bytes", 1_000)):  # fmt: skip
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")


class Outcome(NamedTuple):
    """What came of a query: rows, or the reason why there are none.

    Attributes:
      rows: tuples of None, int, float, str, bytes; None where the query did not execute.
      columns: their number.
      error: one line; empty where the query executed.
    """

    rows: list[Row] | None
    columns: int = 0
    error: str = ""

    @property
    def valid(self) -> bool:
        """Whether the query executed within the limits."""
        return self.rows is not None


class Executor:
    """Runs queries one after the other in a process that is replaced when it is killed.

    Use as a context manager, or call :meth:`close`. Calls from several threads take turns.

    Attributes:
      started: how many processes there have been.
    """

    def __init__(self, limits: Limits = Limits()) -> None:
        self.limits = limits
        self.started = 0
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._listener: threading.Thread | None = None
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def run(self, database: str | os.PathLike[str], query: str) -> Outcome:
        """Runs one query.

        Args:
          database: a SQLite file.
          query: one SELECT; anything else gives an Outcome with an error.

        Raises:
          FileNotFoundError: no such database.
          OSError: the worker cannot be started.
        """
        file = Path(database).absolute()
        if not file.is_file():
            raise FileNotFoundError(f"no database at {file}; see sql_database.build")
        request = json.dumps({"database": str(file), "query": query})
        with self._lock:
            fresh = self._process is None or self._process.poll() is not None
            if fresh:
                self._start()
            answer = self._ask(request, self.limits.seconds + GRACE)
            if answer == GONE and not fresh:  # it may have been killed while it was idle
                self._start()
                answer = self._ask(request, self.limits.seconds + GRACE)
        if not answer:
            return Outcome(None, error="the process was killed: it took too long or too much")
        found = json.loads(answer)
        if "error" in found:
            return Outcome(None, error=found["error"])
        rows = [tuple(_value(v) for v in row) for row in found["rows"]]
        return Outcome(rows, found["columns"])

    def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        if self._listener is not None:
            self._listener.join()  # it sees the end of the pipe
        for pipe in (process.stdin, process.stdout):
            # Flushing what a dead process did not read fails; there is nothing to save.
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _start(self) -> None:
        self.close()
        worker, python = Path(__file__).with_name("sql_worker.py"), sys.executable
        said = f"the process that runs SQL did not start ({python or 'no Python'} {worker})"
        try:
            # -I -S: no settings and no packages of the caller, and a start in 20 ms.
            process = subprocess.Popen(
                [python or "", "-I", "-S", str(worker)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="ascii",
            )
        except OSError as error:
            raise OSError(f"{said}: {error}; sys.executable must be a Python") from None
        self._process = process
        self.started += 1
        # A queue of its own: what a killed process still wrote is not taken for an answer.
        self._answers = queue.SimpleQueue()
        args = (self._process.stdout, self._answers)
        self._listener = threading.Thread(target=_listen, args=args, daemon=True)
        self._listener.start()
        # The time to start is not the query's: it waits until the worker says that it is there.
        if self._ask(json.dumps(dataclasses.asdict(self.limits)), START) != READY:
            self.close()
            raise OSError(
                f"{said}: it ended with status {process.returncode}; does that Python run, and has "
                f"the machine {self.limits.memory >> 20} MiB to spare?"
            )

    def _ask(self, request: str, seconds: float) -> str | None:
        """The answer; ``GONE`` if the process was not there, None if it had to be killed."""
        answer: str | None = GONE
        try:
            if self._send(request):
                answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            answer = None
        except BaseException:  # an answer that nobody took must not become that of the next query
            self.close()
            raise
        if not answer:
            self.close()
        return answer

    def _send(self, line: str) -> bool:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except OSError:
            return False
        return True


class SQLScores(NamedTuple):
    """What :func:`execution_accuracy` found. N questions.

    Attributes:
      execution: share of the predictions that execute and give the gold result.
      valid: share of the predictions that execute within the limits.
      exact: share that equals the gold query after ``normalise``.
      empty: share of the gold results without rows, which many wrong queries give too.
      correct: the outcome of each question, bool [N].
      errors: of each prediction, why it did not execute; empty where it did.
    """

    execution: float
    valid: float
    exact: float
    empty: float
    correct: np.ndarray
    errors: tuple[str, ...]


def execution_accuracy(
    predictions: Sequence[str],
    gold: Sequence[str],
    databases: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    column_order: bool = False,
    limits: Limits = Limits(),
) -> SQLScores:
    """Runs predictions and gold queries and compares their results.

    Args:
      predictions: one query a question; whatever a model wrote.
      gold: the right query of each question; must execute.
      databases: the SQLite file, or one a question.
      column_order: whether the columns must come in the order of the gold query.
      limits: of every single query.

    Raises:
      ValueError: no questions, different lengths, or a gold query that does not execute (names
        its row and the reason).
      FileNotFoundError: a database is missing.
      OSError: the process that runs them cannot be started.
    """
    if isinstance(predictions, str) or isinstance(gold, str):
        raise ValueError("predictions and gold must be lists of queries, got one text")
    if not len(predictions):
        raise ValueError("predictions must not be empty: a metric of no examples is undefined")
    if isinstance(databases, str | os.PathLike):
        databases = [databases] * len(predictions)
    checks.same_length(predictions=predictions, gold=gold, databases=databases)
    correct, errors, empty = np.zeros(len(gold), bool), [], 0
    known: dict[tuple[str, str], Outcome] = {}
    with Executor(limits) as executor:
        for row, (said, wanted, database) in enumerate(zip(predictions, gold, databases)):
            key = (str(database), wanted)
            if key not in known:
                known[key] = executor.run(database, wanted)
            right = known[key]
            if not right.valid:
                raise ValueError(
                    f"gold[{row}] does not execute on {database} ({right.error}): {wanted!r}"
                )
            empty += not right.rows
            # A query that equals the gold one is not spared: it need not be deterministic.
            found = executor.run(database, said)
            errors.append(found.error)
            correct[row] = found.valid and same_result(
                found, right, ordered=is_ordered(wanted), column_order=column_order
            )
    n = len(gold)
    return SQLScores(
        execution=float(correct.mean()),
        valid=sum(not e for e in errors) / n,
        exact=sum(exact_match(p, g) for p, g in zip(predictions, gold)) / n,
        empty=empty / n,
        correct=correct,
        errors=tuple(errors),
    )


def same_result(
    found: Outcome, gold: Outcome, *, ordered: bool = False, column_order: bool = False
) -> bool:
    """Whether two results are equal by the rules above; False where one did not execute.

    Args:
      ordered: compare the rows as lists.
      column_order: compare the columns in the order in which they stand.
    """
    if found.rows is None or gold.rows is None or found.columns != gold.columns:
        return False
    if len(found.rows) != len(gold.rows):
        return False
    a = [tuple(map(_comparable, row)) for row in found.rows]
    b = [tuple(map(_comparable, row)) for row in gold.rows]
    if _same_rows(a, b, ordered):
        return True
    return not column_order and gold.columns > 1 and _reordered(a, b, ordered)


def _same_rows(a: list[Row], b: list[Row], ordered: bool) -> bool:
    return a == b if ordered else Counter(a) == Counter(b)


def _reordered(a: list[Row], b: list[Row], ordered: bool) -> bool:
    """Whether some order of a's columns gives the rows of b, trying column after column.

    A column is taken only if the rows up to it agree, so that few orders are ever tried, and of
    columns with the same content only the first.
    """
    columns = list(zip(*a, strict=True))
    width = len(b[0]) if b else 0
    heads = [[row[: n + 1] for row in b] for n in range(width)]

    def fits(chosen: tuple[int, ...]) -> bool:
        n = len(chosen)
        if n == width:
            return True
        tried: set[Row] = set()
        for column in range(width):
            if column in chosen or columns[column] in tried:
                continue
            tried.add(columns[column])
            order = (*chosen, column)
            if _same_rows([tuple(row[c] for c in order) for row in a], heads[n], ordered) and fits(
                order
            ):
                return True
        return False

    return width > 0 and fits(())


def _comparable(value: Any) -> tuple[str, Any]:
    """The value as it is compared: never equal across kinds."""
    if value is None:
        return ("null", 0)
    if isinstance(value, float) and not value.is_integer():
        return ("number", float(f"{value:.{DIGITS}g}"))
    if isinstance(value, int | float):
        return ("number", value)  # Python compares 3 and 3.0, and 2^60 + 1, exactly
    return ("text" if isinstance(value, str) else "blob", value)


def _value(value: Any) -> Any:
    return bytes.fromhex(value["blob"]) if isinstance(value, dict) else value


def _listen(pipe: Any, answers: queue.SimpleQueue[str]) -> None:
    """Hands over the lines of a process, and ``GONE`` when it is."""
    try:
        for line in pipe:
            answers.put(line)
    except (OSError, ValueError):  # closed under our hands
        pass
    answers.put(GONE)
