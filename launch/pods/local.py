"""``steppe launch``: a command as several processes of this host, which end together.

Rank 0 has the terminal. The others say nothing unless one of them is the first to fail: then
the end of what it wrote comes before anything else is said, and the rest are ended at once,
because a rank that has lost another waits for it in the middle of a step.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from steppe.launch.pods import codes, rank

USAGE = """\
usage: steppe launch [--local-processes N] [--devices-per-process M]
                     [--platform cpu|gpu] [--grace SECONDS] finetune|distill ...

  --local-processes N      ranks on this host (2)
  --devices-per-process M  devices of each: fake ones on a cpu; on gpu rank r
                           gets those from r*M to r*M+M-1 (1)
  --platform cpu|gpu       where the ranks compute (cpu)
  --grace SECONDS          for the ranks to save after Ctrl-C or SIGTERM,
                           before they are killed (60)
"""
COMMANDS = ("finetune", "distill")
TAIL = 60  # lines of a failed rank that are shown
# What a rank that only lost another may still need to say so, and the one that failed to end.
SETTLE = 5.0
SAME = 2.0
_ERROR = re.compile(r"steppe: error: (?:rank \d+ of \d+: )?(.*)")
_DEVICE_FLAG = re.compile(r"--xla_force_host_platform_device_count=\d+")


class Options(NamedTuple):
    """What stands before the command; see ``USAGE``."""

    processes: int = 2
    devices: int = 1
    platform: str = "cpu"
    grace: float = 60.0


class Ended(NamedTuple):
    """A rank that has ended: its number, its status (negative: a signal), and when."""

    rank: int
    status: int
    when: float


def main(args: Sequence[str]) -> int:
    """The command; returns the exit status of the run."""
    before = itertools.takewhile(lambda word: word not in COMMANDS, args)
    if not args or {"-h", "--help"} & set(before):
        print(USAGE, end="")
        return 0 if args else codes.MISTAKE
    options, command = parse(args)
    return run([sys.executable, "-m", "steppe.launch.cli", *command], options)


def parse(args: Sequence[str]) -> tuple[Options, list[str]]:
    """Splits the command line into options and the command that the ranks run.

    Raises:
      ValueError: an unknown option, a value out of range, or no command.
    """
    names = {
        "--local-processes": ("processes", int),
        "--devices-per-process": ("devices", int),
        "--platform": ("platform", str),
        "--grace": ("grace", float),
    }
    found: dict[str, Any] = {}
    words = list(args)
    while words and words[0].startswith("-"):
        name, equals, text = words.pop(0).partition("=")
        if name not in names:
            raise ValueError(f"steppe launch has no option {name!r} (known: {', '.join(names)})")
        if not equals:
            if not words:
                raise ValueError(f"{name} needs a value")
            text = words.pop(0)
        field, kind = names[name]
        try:
            found[field] = kind(text)
        except ValueError:
            raise ValueError(f"{name} must be a number, got {text!r}") from None
    options = Options(**found)
    for name, value in (
        ("--local-processes", options.processes),
        ("--devices-per-process", options.devices),
    ):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if options.platform not in ("cpu", "gpu"):
        raise ValueError(f"--platform must be cpu or gpu, got {options.platform!r}")
    if not 0 <= options.grace < float("inf"):
        raise ValueError(f"--grace must be >= 0 seconds and finite, got {options.grace}")
    if not words or words[0] not in COMMANDS:
        what = repr(words[0]) if words else "nothing"
        raise ValueError(f"steppe launch runs {' or '.join(COMMANDS)}, got {what}")
    return options, words


def environment(
    options: Options, index: int, port: int, base: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """The environment of one rank."""
    found = {
        **base,
        rank.COORDINATOR: f"127.0.0.1:{port}",
        rank.COUNT: str(options.processes),
        rank.INDEX: str(index),
        rank.LAUNCHED: "1",
        rank.PLATFORM: options.platform,
        # Ranks of one host need no door to the network.
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
    }
    if options.platform == "cpu":
        flags = _DEVICE_FLAG.sub("", base.get("XLA_FLAGS", ""))
        count = f"--xla_force_host_platform_device_count={options.devices}"
        found |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} {count}".strip()}
    else:
        first = index * options.devices
        found[rank.LOCAL] = ",".join(str(first + k) for k in range(options.devices))
    return found


def run(command: Sequence[str], options: Options) -> int:
    """Runs a command as ranks; returns 0, the status of the rank that failed first, 75 after
    SIGTERM, or 130 after Ctrl-C. A second signal kills."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="steppe-launch-") as scratch:
        words = Path(scratch) / "said"
        told = {rank.LAUNCHED: str(words)}  # of the first; the others need no more than to be told
        ranks = [
            _Rank(command, environment(options, i, port) | ({} if i else told), i)
            for i in range(options.processes)
        ]
        with _signals(ranks, options.grace) as stopped:
            ended = _until_one_fails(ranks)
            if any(e.status for e in ended):
                ended = _settled(ranks, ended)
            for one in ranks:
                one.end()
        said = words.read_text("utf-8") if words.is_file() else ""
    first = blame(ended)
    if stopped and (first is None or first.status in (codes.REQUEUE, *_ASKED)):
        saved = first is not None and first.status == codes.REQUEUE
        return codes.INTERRUPTED if stopped[0] == signal.SIGINT else _status(first, saved)
    if first is None:
        return 0
    if first.status == codes.REQUEUE:
        return codes.REQUEUE
    if not (said and said == (said if first.rank == 0 else ranks[first.rank].last_words())):
        _explain(ranks[first.rank], first, options.processes)
    return first.status if first.status > 0 else 128 - first.status


_ASKED = (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT)


def _status(first: Ended | None, saved: bool) -> int:
    return codes.REQUEUE if saved else 0 if first is None else 128 - first.status


def tell(file: str, words: str) -> None:
    """Leaves the last words of the first process where ``run`` looks for them.

    Args:
      file: what ``STEPPE_LAUNCHED`` holds; no path for the other processes.
    """
    path = Path(file)
    if path.parent.is_dir() and path.is_absolute():
        path.write_text(words, "utf-8")


def blame(ended: Sequence[Ended]) -> Ended | None:
    """The rank that the run failed by: the first that failed by itself, not for want of another.

    jax aborts a process (SIGABRT) whose coordinator has gone, or that another process has
    left; status 69 says the same in words.
    """
    bad = sorted((e for e in ended if e.status), key=lambda e: e.when)
    own = [e for e in bad if e.status not in (codes.LOST, -signal.SIGABRT)]
    # Ranks that were asked to stop and saved say so; one that failed instead counts more.
    wrong = [e for e in own if e.status != codes.REQUEUE]
    found = wrong or own or bad
    return found[0] if found else None


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Rank:
    """One process; what ranks but the first write is kept, its last lines that is."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], index: int) -> None:
        self.index = index
        self.lines: collections.deque[str] = collections.deque(maxlen=TAIL)
        piped = subprocess.PIPE if index else None
        # A process group of its own: Ctrl-C reaches the ranks through us, once.
        self.process = subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL if index else None,
            stdout=piped,
            stderr=subprocess.STDOUT if index else None,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.ended: Ended | None = None
        self._waiting = threading.Thread(target=self._wait, daemon=True)
        self._waiting.start()
        self._reading: threading.Thread | None = None
        if self.process.stdout is not None:
            self._reading = threading.Thread(
                target=self._read, args=(self.process.stdout,), daemon=True
            )
            self._reading.start()

    def _wait(self) -> None:
        # A thread each, so that the order of their ends is known to a millisecond.
        status = self.process.wait()
        self.ended = Ended(self.index, status, time.monotonic())

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                if not line.startswith("[Gloo]"):  # who is connected to whom, again and again
                    self.lines.append(line)

    def last_words(self) -> str:
        """Its error, as the command line says one, without the name of the rank."""
        found = [_ERROR.match(line.rstrip("\n")) for line in self.lines]
        said = [match[1] for match in found if match is not None]
        return said[-1] if said else ""

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def end(self) -> None:
        """Kills what is left of it, its own children too."""
        self.signal(signal.SIGKILL)
        self._waiting.join(10)
        if self._reading is not None:
            self._reading.join(5)


def _until_one_fails(ranks: Sequence[_Rank]) -> list[Ended]:
    while True:
        ended = [one.ended for one in ranks if one.ended is not None]
        if len(ended) == len(ranks) or any(e.status for e in ended):
            return ended
        time.sleep(0.02)


def _settled(ranks: Sequence[_Rank], ended: list[Ended]) -> list[Ended]:
    """Waits for the rank to blame where those that have ended only lost it; for all ranks where
    the first one has saved, as they all do then."""
    begin = time.monotonic()
    while True:
        ended = [one.ended for one in ranks if one.ended is not None]
        first = blame(ended)
        assert first is not None
        wait = {codes.REQUEUE: 4 * SETTLE, codes.LOST: SETTLE, -signal.SIGABRT: SETTLE}
        if first.rank:  # the same mistake of the first process comes a moment later
            wait[codes.MISTAKE] = SAME
        left = begin + wait.get(first.status, 0.0) - time.monotonic()
        if left <= 0 or len(ended) == len(ranks):
            return ended
        time.sleep(0.02)


def _explain(one: _Rank, ended: Ended, count: int) -> None:
    """What the failed rank wrote, unless it wrote to the terminal itself."""
    how = f"status {ended.status}"
    if ended.status < 0:
        how = f"signal {signal.Signals(-ended.status).name}"
    print(f"steppe: rank {ended.rank} of {count} failed first ({how})", file=sys.stderr)
    for line in one.lines:
        print(f"[rank {ended.rank}] {line.rstrip()}", file=sys.stderr)
    if codes.again(ended.status):
        print("steppe: give the same command with --resume to go on", file=sys.stderr)
    sys.stderr.flush()


@contextlib.contextmanager
def _signals(ranks: Sequence[_Rank], grace: float) -> Iterator[list[int]]:
    """Passes a request to stop on as SIGTERM, which makes ranks save; kills after ``grace``."""
    seen: list[int] = []

    def kill() -> None:
        for one in ranks:
            one.signal(signal.SIGKILL)

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        for one in ranks:
            one.signal(signal.SIGTERM if len(seen) == 1 else signal.SIGKILL)
        if len(seen) == 1:
            timer = threading.Timer(grace, kill)
            timer.daemon = True
            timer.start()

    if threading.current_thread() is not threading.main_thread():
        yield seen
        return
    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
