"""One side of a comparison in a process of its own.

Each side has its own thread pool, memory and environment, and only one works at a time. The
parent sends one JSON line ``[method, arguments]`` and gets one back; whatever a library
prints goes to stderr.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from steppe.launch import tuning
from steppe.launch.bench import harness

# The parent may run with fake devices (a test suite does), which would cut up the threads.
_FAKE_DEVICES = re.compile(r"--xla_force_host_platform_device_count=\d+\s*")


class WorkerError(ChildProcessError):
    """A side has failed; the message ends with what it said last."""


class Worker:
    """Starts ``module:Class`` in a fresh interpreter and calls its methods.

    Use it as a context manager; the process ends with the block.
    """

    def __init__(
        self,
        target: str,
        arguments: Mapping[str, Any],
        *,
        threads: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
          target: ``package.module:Class``; it is made with ``arguments`` as keywords.
          threads: cores that the process may use, for every library in it; None = all.
          environment: added to ours.
        """
        env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
        env["XLA_FLAGS"] = _FAKE_DEVICES.sub("", env.get("XLA_FLAGS", ""))
        if threads is not None:
            env |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        env |= dict(environment or {})
        self._tail: collections.deque[str] = collections.deque(maxlen=20)
        self._name = target
        self._process = subprocess.Popen(
            [sys.executable, "-m", "steppe.launch.bench.worker", target, str(threads or 0)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=env,
        )
        self._reader = threading.Thread(target=self._drain, daemon=True)
        self._reader.start()
        try:
            self._ask(dict(arguments))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """Calls a method of the side and waits for its value.

        Raises:
          WorkerError: it raised, or the process died.
        """
        return self._ask([method, list(arguments)])

    def close(self) -> None:
        """Ends the process; may be called twice."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._reader.join(timeout=10)
        if process.stderr is not None:
            process.stderr.close()

    def _ask(self, message: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._reader.join(timeout=10)
            last = "\n".join(self._tail) or f"exit status {self._process.returncode}"
            raise WorkerError(f"{self._name} died:\n{last}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self._name}: {answer['error']}")
        return answer["value"]

    def _drain(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._tail.append(line.rstrip("\n"))


def serve(target: str, threads: int) -> None:
    """The other end: answers calls until stdin ends."""
    if threads and hasattr(os, "sched_setaffinity"):
        # Before any library counts the cores: the same limit for every thread pool.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    side: Any = None
    answer: dict[str, Any]
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if side is None:
                module, _, name = target.partition(":")
                if name == "Steppe":  # as our command line does; PyTorch keeps its memory itself
                    tuning.prepare()
                side = getattr(importlib.import_module(module), name)(**message)
                answer = {"value": None}
            else:
                answer = {"value": getattr(side, message[0])(*message[1])}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def interleave(
    worker: Worker, names: Iterable[str], protocol: harness.Protocol
) -> dict[str, list[float]]:
    """``harness.interleave`` of a side's own programs, by its method ``turn(name, steps)``."""

    def turn(name: str) -> harness.Turn:
        return lambda steps: float(worker.call("turn", name, steps))

    return harness.interleave({name: turn(name) for name in names}, protocol)


def against(base: Worker, worker: Worker, name: str, protocol: harness.Protocol) -> dict[str, Any]:
    """Times of a side in turns with another, both by their method ``turn(steps)``.

    Args:
      name: what the other one is called.

    Returns:
      ``seconds`` a step with median and range; ``against``, the name, and ``base_seconds``;
      ``ratio`` round by round; ``peak_memory`` of the side, bytes.
    """

    def turn(side: Worker) -> harness.Turn:
        return lambda steps: float(side.call("turn", steps))

    theirs, seconds = harness.compare(turn(base), turn(worker), protocol)
    return {
        "seconds": seconds,
        **harness.spread(seconds)._asdict(),
        "against": name,
        "base_seconds": theirs,
        "ratio": harness.ratio(seconds, theirs)._asdict(),
        "peak_memory": worker.call("peak_memory"),
    }


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
