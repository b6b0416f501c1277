"""A watchdog for hangs: no step for too long, and every thread's stack is written, then the end.

A process that waits for a collective that will never come looks healthy from outside; a
scheduler starts a job again only when it ends.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO

HUNG = 76  # exit status, see steppe.launch.pods.codes


@contextlib.contextmanager
def watching(
    seconds: float,
    *,
    stream: IO[str] | None = None,
    end: Callable[[int], None] = os._exit,
) -> Iterator[Callable[[str], None]]:
    """Ends the process with status 76 when the block does not say for so long that it goes on.

    The stacks of all threads stand in ``stream`` then: that of the main thread says what it
    waits for. A thread does the watching, so that a call that holds the interpreter for ever
    (most of jax's do not) is not seen.

    Args:
      seconds: 0 = no watching.
      stream: with a file descriptor; stderr when None.
      end: is given the status.

    Yields:
      ``beat(what)``: called after every piece of work, with what comes next.

    Raises:
      ValueError: seconds is negative or not finite.
    """
    if not 0 <= seconds < math.inf:
        raise ValueError(f"the watchdog's time must be >= 0 seconds and finite, got {seconds}")
    if seconds == 0:
        yield lambda what: None
        return
    out = sys.stderr if stream is None else stream
    done = threading.Event()
    latest = [(time.monotonic(), "the first step")]

    def beat(what: str) -> None:
        latest[0] = (time.monotonic(), what)

    def watch() -> None:
        while True:
            since, what = latest[0]
            left = since + seconds - time.monotonic()
            if left <= 0:
                break
            if done.wait(left):
                return
        print(
            f"watchdog: {what} has not ended after {seconds / 60:g} minutes; the stacks of all "
            f"threads follow, then the process ends with status {HUNG}",
            file=out,
            flush=True,
        )
        faulthandler.dump_traceback(file=out, all_threads=True)
        out.flush()
        end(HUNG)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield beat
    finally:
        done.set()
        thread.join(1.0)
