"""SIGTERM while a run is not training: it ends with the status of a job to be started again.

While it trains, the loop saves first (see ``train.loop``). Before and after there is nothing to
save, every file is written whole or not at all, and the same command goes on from what there is.
Python's default would end the process without a word, with 143, which not every scheduler starts
again.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from steppe.launch.pods import codes, rank


class Stopped(KeyboardInterrupt):
    """SIGTERM came where nothing had to be saved.

    Attributes:
      status: the exit status of a process that ends by it.
    """

    status = codes.REQUEUE


SAID = (
    "stopped by SIGTERM while nothing was to be saved: give the same command again "
    "(with --resume where the run folder is there)"
)


class Handler:
    """What SIGTERM calls: the first raises ``Stopped``, a second ends the process at once.

    Attributes:
      asked: whether the first has come. An exception that a signal raises within a callback (of
        the garbage collector, say) ends there, and the program goes on: so the training loop
        looks here when it begins.
    """

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: Any) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.asked = True
        raise Stopped(SAID)


@contextlib.contextmanager
def requeued() -> Iterator[None]:
    """Turns SIGTERM into ``Stopped`` in the main thread; a second one ends the process at once.

    A process that joins others gives its SIGTERM to jax, which lets all of them stop at one step:
    there it is noticed when the training begins. Whatever ends the block after a SIGTERM ends it
    as ``Stopped``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = Handler()
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    except Exception as error:
        # Raised within an import, it comes out as another error, and would count as a mistake.
        if handler.asked:
            raise Stopped(SAID) from error
        raise
    finally:
        if rank.joined() is None:  # else the handler is jax's, which Python does not know of
            signal.signal(signal.SIGTERM, before)
