"""A folder that one process holds: another one that wants it is told, and none waits.

The lock is on the folder itself, so that it leaves no file, and it ends with the process.
"""

from __future__ import annotations

import os
from pathlib import Path

# What is held where a system, or a disk, has no locks.
NOTHING = -1


def hold(folder: Path) -> int:
    """Takes a folder for this process; returns what :func:`release` wants back.

    Raises:
      BlockingIOError: another process holds it.
      FileNotFoundError: there is no such folder.
    """
    try:
        import fcntl
    except ImportError:  # a system without locks of this kind
        return NOTHING
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise
    except OSError:  # a disk without locks
        os.close(held)
        return NOTHING
    return held


def release(held: int) -> None:
    """Gives a folder back."""
    if held != NOTHING:
        os.close(held)
