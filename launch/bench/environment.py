"""Where a measurement was made: versions, hardware, load, command; and its file."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("steppe", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
LOAD_LIMIT = 0.7


def environment(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Versions, processor, memory and command; starts no accelerator."""
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "versions": versions,
        "hardware": {
            "processor": _processor(),
            "cores": cores(),
            "memory_gb": _memory_gb(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_threads(threads: int) -> None:
    """
    Raises:
      ValueError: fewer than 0 (which means all) or more than there are cores.
    """
    if not 0 <= threads <= cores():
        raise ValueError(f"threads must be between 0 (all) and the {cores()} cores, got {threads}")


def load_average() -> float:
    """Mean number of runnable processes over the last minute, ours included."""
    return os.getloadavg()[0]


def load_lines(load: float) -> list[str]:
    """What is printed before anything is measured: the load, and a warning when it is high."""
    lines = [f"load average {load:.2f}"]
    if load > LOAD_LIMIT:
        lines.append(
            f"warning: above {LOAD_LIMIT} another process shares the machine; "
            "the numbers that follow may be wrong"
        )
    return lines


def write_json(path: str | os.PathLike[str], result: Mapping[str, Any]) -> Path:
    """Writes a result, atomically."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(result, indent=2) + "\n")
        os.replace(scratch, target)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return target


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON types; paths become strings."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config), default=str)))


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes.

    Linux carries ``getrusage``'s peak over from the process that started this one, so the
    kernel's own count of this address space is preferred.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    with contextlib.suppress(OSError, ValueError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None
