"""Process settings that must be made before jax allocates anything. Imports nothing of jax.

XLA's CPU backend allocates the temporary memory of a step anew each time. glibc serves blocks
of that size by mmap and gives them back at once, so that every step touches its memory for the
first time: 100,000 page faults a step of MiniLM-L6. Kept in one heap they cost nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib import metadata
from pathlib import Path

_VECTOR = "--xla_cpu_prefer_vector_width"
# Numbers of malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX.
# A trim threshold of -1 is none at all: 2 GiB, the largest number, is less than a step of a
# language model holds.
_SETTINGS = ((-4, 0), (-1, -1), (-2, 2**28), (-8, 1))


def prepare() -> None:
    """Both settings below; the command line calls it before anything imports jax."""
    keep_memory()
    wide_vectors()


def wide_vectors() -> bool:
    """Lets XLA's CPU backend use whole 512-bit registers; True where that was set.

    By default it prefers 256 bits even where AVX-512 is there; here 512 took 4% off a step of
    MiniLM-L6. A flag that the user has set is left alone, and so are versions of jaxlib that
    this was not tried with: XLA ends the process on a flag that it does not know.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "jax" in sys.modules or _VECTOR in flags:
        return False
    try:
        version = tuple(int(part) for part in metadata.version("jaxlib").split(".")[:2])
        has_avx512 = "avx512f" in Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except (metadata.PackageNotFoundError, OSError, ValueError):
        return False
    if not has_avx512 or not (0, 10) <= version < (0, 13):
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {_VECTOR}=512".strip()
    return True


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
