"""The folder of a comparison: whose it is, and what may change when it is gone on with."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from steppe.launch import config as config_
from steppe.train import checkpoint

CONFIG = "config.json"


def read(folder: Path, kind: type) -> Any:
    """The settings of a comparison's folder; those that its file does not know yet have the
    values that they had then.

    Raises:
      ValueError: its config.json is damaged, or of another command.
    """
    try:
        values = json.loads((folder / CONFIG).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG} is damaged ({error})") from error
    try:
        return config_.from_dict(kind, values)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG} is not of this command ({error}); choose another --out"
        ) from error


def check(config: Any, folder: Path, grows: Collection[str]) -> None:
    """Refuses a folder that holds something else, and a resume with other settings.

    Args:
      config: settings with ``resume``.
      grows: settings that may change on the way: more rows, not other ones.

    Raises:
      FileExistsError: the folder holds something of another command, or a comparison of this one
        and ``resume`` is not given.
      ValueError: another setting differs; a config.json that is none of this command.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another --out")
    held = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if "metrics.jsonl" in held:
        raise FileExistsError(f"{folder} is a run of steppe finetune; choose another --out")
    if held and CONFIG not in held:
        raise FileExistsError(
            f"{folder} already holds other files ({held[0]}); choose another --out"
        )
    if not held:
        return
    old = read(folder, type(config))
    if not config.resume:
        if held == [CONFIG]:
            return  # it ended before anything was finished: from the beginning
        raise FileExistsError(
            f"{folder} already holds another comparison; go on with it by --resume, or choose a "
            "new --out"
        )
    before, after = (
        {k: v for k, v in config_.to_dict(c).items() if k not in grows} for c in (old, config)
    )
    different = checkpoint.first_difference(before, after)
    if different is not None:
        path, was, now = different
        raise ValueError(
            f"{folder} is a comparison with other settings: {path} was {was!r}, now it is "
            f"{now!r}; resume with the old value or choose a new out"
        )


def nothing_lost(
    folder: Path, held: Mapping[str, Iterable[Any]], given: Mapping[str, Iterable[Any]]
) -> None:
    """Refuses settings under which finished rows of a folder would be missing from its table.

    Args:
      held: by the name of a setting, its values in the finished rows.
      given: its values now.

    Raises:
      ValueError: a value of ``held`` is not among those of ``given``.
    """
    for name, values in held.items():
        before, now = dict.fromkeys(map(str, values)), set(map(str, given[name]))
        lost = [value for value in before if value not in now]
        if lost:
            raise ValueError(
                f"{folder} has {name} {' '.join(before)}, and {lost[0]} is not among those given "
                "now: with --resume there may be more of them, not fewer; name all, or choose a "
                "new --out"
            )


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends a comparison as Ctrl-C does, also while it compiles or scores."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
