"""Checkpoints that cannot be used: what is said of them, and to whom.

Several processes read a checkpoint together. What one of them finds, a file that it cannot read,
the others may not see; if they went on, they would wait for it in the next collective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np


class CheckpointError(ValueError):
    """A checkpoint that cannot be used here; the message says why and what to do."""


class Damaged(CheckpointError):
    """A checkpoint that does not hold what was written, or cannot be read at all."""


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turns whatever goes wrong into ``Damaged`` of a checkpoint's folder.

    Raises:
      Damaged: the block raised.
    """
    try:
        yield
    except Exception as error:
        raise Damaged(
            f"checkpoint {file} is damaged and cannot be used ({one_line(error)})"
        ) from error


def one_line(error: Exception) -> str:
    """What an exception says, in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def together(read: Callable[[], Any], file: Path) -> Any:
    """Reads, and where one of several processes finds damage, it is damage for all of them.

    Raises:
      Damaged: this process, or another one, could not read.
    """
    found, damage = None, None
    try:
        with readable(file):
            found = read()
    except Damaged as error:
        damage = error
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        bad = np.flatnonzero(multihost_utils.process_allgather(np.int32(damage is not None)))
        if damage is None and len(bad):
            damage = Damaged(
                f"checkpoint {file} is damaged and cannot be used (process {bad[0]} says so)"
            )
    if damage is not None:
        raise damage
    return found
