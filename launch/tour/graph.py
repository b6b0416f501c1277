"""A run as a graph of stages: a folder each, named by what its result depends on.

  hash = sha256(name, settings, versions of what makes it, hashes of the stages it needs)

OUT/stages/NAME-HASH/stage.json is written last, by one rename: a stage with that file, and with
every other file of the size that it says, is finished and is never touched again; without it, it
starts over, or goes on where it can. A
changed setting gives another hash to the stage and to all that depend on it, and to no other;
what was there before stays, so that the old setting finds its results again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from steppe.launch import outputs
from steppe.train import locks

STAGES, FILE = "stages", "stage.json"
LENGTH = 12
Result: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Done:
    """A finished stage.

    Attributes:
      name: of the stage.
      folder: what it left.
      result: JSON values.
      seconds: that its last attempt took.
    """

    name: str
    folder: Path
    result: Result
    seconds: float


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
      name: parts separated by slashes, such as ``0/merge/ties``.
      settings: JSON values that decide the result.
      work: ``(folder, needed stages by name) -> result``; the folder is there.
      needs: names of stages before it.
      what: for people.
      resumes: whether ``work`` goes on with what an attempt before has left in the folder;
        otherwise that is removed first.
    """

    name: str
    settings: Mapping[str, Any]
    work: Callable[[Path, Mapping[str, Done]], Result]
    needs: tuple[str, ...] = ()
    what: str = ""
    resumes: bool = False


Around: TypeAlias = Callable[[Stage, int, int], contextlib.AbstractContextManager[Any]]


@dataclass
class Graph:
    """Stages in an order in which each comes after those it needs.

    Attributes:
      root: the run folder.
      hashes: stage -> hash.
    """

    root: Path
    stages: Sequence[Stage]
    hashes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for stage in self.stages:
            if stage.name in self.hashes:
                raise ValueError(f"two stages are called {stage.name!r}")
            lacking = [name for name in stage.needs if name not in self.hashes]
            if lacking:
                raise ValueError(
                    f"stage {stage.name!r} needs {lacking[0]!r}, which is not before it"
                )
            self.hashes[stage.name] = digest(
                [stage.name, stage.settings, [[n, self.hashes[n]] for n in stage.needs]]
            )

    def folder(self, name: str) -> Path:
        """Where a stage leaves what it makes."""
        return self.root / STAGES / f"{name.replace('/', '-')}-{self.hashes[name]}"

    def done(self, name: str) -> Done | None:
        """A finished stage; None where it is not finished, or a file of it is damaged."""
        folder = self.folder(name)
        try:
            found = json.loads((folder / FILE).read_text("utf-8"))
            whole = (
                found["hash"] == self.hashes[name]
                and found["digest"] == digest(found["result"])
                and found["files"] == sizes(folder)
            )
            if whole:
                return Done(name, folder, found["result"], float(found["seconds"]))
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def state(self, name: str) -> str:
        """``done``, ``begun`` or ``to do``."""
        if self.done(name) is not None:
            return "done"
        return "begun" if self.folder(name).is_dir() else "to do"

    def run(self, around: Around | None = None) -> dict[str, Done]:
        """Runs what is left, in order; returns every stage's result.

        Args:
          around: a context in which every stage runs that is not finished, given the stage, its
            number, and of how many.
        """
        found: dict[str, Done] = {}
        for number, stage in enumerate(self.stages, 1):
            held = self.done(stage.name)
            if held is None:
                needed = {name: found[name] for name in stage.needs}
                total = len(self.stages)
                with around(stage, number, total) if around else contextlib.nullcontext():
                    held = self._work(stage, needed)
            found[stage.name] = held
        return found

    def _work(self, stage: Stage, needed: Mapping[str, Done]) -> Done:
        folder = self.folder(stage.name)
        # One that was finished is damaged, or it would not be here: nothing of it is to be trusted.
        if folder.exists() and (not stage.resumes or (folder / FILE).exists()):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        # As it will be read the next time: lists for tuples, null for what is no number.
        result = outputs.plain(stage.work(folder, needed))
        seconds = time.perf_counter() - begin
        file = folder / FILE
        outputs.write_json(
            file,
            {
                "name": stage.name,
                "hash": self.hashes[stage.name],
                "settings": stage.settings,
                "needs": {name: self.hashes[name] for name in stage.needs},
                "seconds": seconds,
                "files": sizes(folder),
                "digest": digest(result),
                "result": result,
            },
        )
        return Done(stage.name, folder, result, seconds)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of a stage but its own record."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and f != folder / FILE]
    return {f.relative_to(folder).as_posix(): f.stat().st_size for f in files}


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Holds a run folder for this process until the block, or the process, ends.

    Raises:
      BlockingIOError: another process works in it.
    """
    root.mkdir(parents=True, exist_ok=True)
    try:
        held = locks.hold(root)
    except BlockingIOError:
        raise BlockingIOError(
            f"another process works in {root}; wait for it, or choose another --out"
        ) from None
    try:
        yield
    finally:
        locks.release(held)


def digest(value: Any) -> str:
    """A short hash of JSON values, the same for the same values in any order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def content(path: Path) -> str:
    """A short hash of a file's bytes, or of those of a folder's files and their names."""
    total = hashlib.sha256()
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    for file in files:
        total.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:LENGTH]
