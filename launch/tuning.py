"""Process settings that must be made before jax allocates anything. Imports nothing of jax.

XLA's CPU backend allocates the temporary memory of a step anew each time. glibc serves blocks
of that size by mmap and gives them back at once, so that every step touches its memory for the
first time: 100,000 page faults a step of MiniLM-L6. Kept in one heap they cost nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Numbers of malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX.
_SETTINGS = ((-4, 0), (-1, 2**31 - 1), (-2, 2**28), (-8, 1))


def keep_memory() -> bool:
    """Tells glibc to keep freed memory for the process; True where that took effect.

    The command line calls it; a library must not change its host process. It is left alone
    where a user tunes malloc already, off Linux, with other C libraries, and where jax has
    been imported.
    """
    if sys.platform != "linux" or "jax" in sys.modules:
        return False
    if "GLIBC_TUNABLES" in os.environ or any(k.startswith("MALLOC_") for k in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    results = [mallopt(name, value) for name, value in _SETTINGS]  # all of them, not to the first 0
    return all(results)
