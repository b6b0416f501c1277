"""A safetensors folder that is written tensor by tensor, and can be taken up again.

The headers are laid out first and the files are given their whole size, so that a full disk is
noticed before any work. A journal beside them names the tensors that are safely on the disk.
Everything lies in a hidden folder ``.NAME.partial`` beside the target until it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from steppe.models import weights
from steppe.train import locks

JOURNAL = "journal.jsonl"
SYNC = 64 << 20  # bytes written between two waits for the disk
MARGIN = 16 << 20
CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


class Place(NamedTuple):
    """Where a tensor lies."""

    file: str
    offset: int
    nbytes: int


@contextlib.contextmanager
def explained(place: Path) -> Iterator[None]:
    """Errors of the system that name no file, as those of a write, get ``place`` and the cure.

    Raises:
      OSError: the same error, in a sentence.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(
            error.errno,
            f"{place} cannot be written ({error.strerror}); free some space or raise the limit, "
            "then the same call goes on",
        ) from error


def lay_out(
    tensors: Mapping[str, tuple[tuple[int, ...], Any]], shard_bytes: int
) -> tuple[dict[str, bytes], dict[str, Place], dict[str, int]]:
    """Headers and sizes of the files, and the place of every tensor.

    Args:
      tensors: name -> (shape, dtype), in order.
      shard_bytes: a file is closed before it would grow beyond this.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    sizes = {n: math.prod(s) * np.dtype(d).itemsize for n, (s, d) in tensors.items()}
    for name, size in sizes.items():
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    headers, places, totals = {}, {}, {}
    for number, names in enumerate(shards, 1):
        many = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = weights.SINGLE if len(shards) == 1 else many
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name in names:
            shape, dtype = tensors[name]
            header[name] = {
                "dtype": CODES[np.dtype(dtype).name],
                "shape": list(shape),
                "data_offsets": [start, start + sizes[name]],
            }
            start += sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = struct.pack("<Q", len(text)) + text
        base = len(headers[file])
        for name in names:
            places[name] = Place(file, base + header[name]["data_offsets"][0], sizes[name])
        totals[file] = base + start
    return headers, places, totals


class Output:
    """The folder under work.

    Args:
      target: the final folder; must not exist, or be empty.
      tensors: name -> (shape, dtype) of all that will be written.
      run: what identifies the work: inputs and method.
      resume: go on with an earlier partial output.

    Raises:
      FileExistsError: ``target`` holds files, or another process is merging into it.
      OSError: the disk has too little space (ENOSPC); nothing was written then.
      ValueError: a partial output of other inputs, another method or layout lies there.
    """

    def __init__(
        self,
        target: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], Any]],
        run: Mapping[str, Any],
        *,
        resume: bool = True,
        shard_bytes: int = 5 * 2**30,
    ) -> None:
        self.target = target.absolute()
        if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
            raise FileExistsError(f"{self.target} is there already; choose a new folder")
        self.folder = self.target.parent / f".{self.target.name}.partial"
        headers, self.places, totals = lay_out(tensors, shard_bytes)
        run = {**run, "files": totals}
        self._written: dict[str, int] = {}
        self.done: set[str] = set()
        self.state: dict[str, Any] | None = None
        self._pending: list[str] = []
        self._unsynced = 0
        self._files: dict[str, int] = {}
        self._held = locks.NOTHING  # the folder itself
        try:
            if self.folder.exists():
                self._lock()
                if resume and (self.folder / JOURNAL).is_file():
                    self._read(run)
                else:  # not wanted, or it broke off before its journal began
                    shutil.rmtree(self.folder)
                    self._release()
            if not self.folder.exists():
                self._create(headers, totals, run)
            for file in totals:
                self._files[file] = os.open(self.folder / file, os.O_RDWR)
        except BaseException:
            self.close()
            raise
        self.bytes = sum(totals.values())

    def _lock(self) -> None:
        """Holds the folder for this process until it closes it, or ends.

        Raises:
          FileExistsError: another process holds it.
        """
        try:
            self._held = locks.hold(self.folder)
        except BlockingIOError:
            raise FileExistsError(
                f"another process is merging into {self.target}; wait for it, or choose another "
                "folder"
            ) from None

    def _release(self) -> None:
        locks.release(self._held)
        self._held = locks.NOTHING

    def _create(
        self, headers: Mapping[str, bytes], totals: Mapping[str, int], run: Mapping[str, Any]
    ) -> None:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        need = sum(totals.values()) + MARGIN
        free = shutil.disk_usage(self.target.parent).free
        if free < need:
            raise OSError(
                errno.ENOSPC,
                f"the merged model needs {need / 1e9:.2f} GB in {self.target.parent}, where "
                f"{free / 1e9:.2f} GB are free; free some space or choose another disk",
            )
        self.folder.mkdir()
        self._lock()
        try:
            with explained(self.folder):
                for file, header in headers.items():
                    with open(self.folder / file, "wb") as stream:
                        stream.write(header)
                        stream.truncate(totals[file])
                self._log({"run": dict(run)})
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _read(self, run: Mapping[str, Any]) -> None:
        whole = 0
        for line in (self.folder / JOURNAL).read_bytes().splitlines(keepends=True):
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if entry is None:
                # It was being written when the work broke off; the next entry starts a new line.
                os.truncate(self.folder / JOURNAL, whole)
                break
            whole += len(line)
            if "run" in entry and entry["run"] != json.loads(json.dumps(dict(run))):
                raise ValueError(
                    f"{self.folder} holds the start of another merge (its inputs, their files or "
                    "the method differ); finish that one, or start anew: resume=False, on the "
                    "command line --anew"
                )
            if "tensor" in entry:
                self.done.add(entry["tensor"])
            if "state" in entry:
                self.state = entry["state"]

    def _log(self, *entries: Mapping[str, Any]) -> None:
        with open(self.folder / JOURNAL, "a", encoding="utf-8") as stream:
            for entry in entries:
                stream.write(json.dumps(entry) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def remember(self, state: Mapping[str, Any]) -> None:
        """Keeps what later tensors depend on, such as thresholds, for a resumed run."""
        self.state = dict(state)
        with explained(self.folder / JOURNAL):
            self._log({"state": self.state})

    def write(self, name: str, start: int, values: np.ndarray) -> None:
        """Writes entries ``start`` onwards of a tensor.

        Raises:
          OSError: the disk is full, or the file may not grow (names file and cure).
        """
        place = self.places[name]
        data = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        offset = place.offset + start * values.dtype.itemsize
        view = memoryview(data.data)
        while len(view):
            with explained(self.folder / place.file):
                written = os.pwrite(self._files[place.file], view, offset)
            view, offset = view[written:], offset + written
        self._unsynced += data.nbytes
        self._written[name] = self._written.get(name, 0) + data.nbytes

    def finish(self, name: str) -> None:
        """All of a tensor is written.

        Raises:
          RuntimeError: its bytes are not as many as the header says.
        """
        written, wanted = self._written.pop(name, 0), self.places[name].nbytes
        if written != wanted:
            raise RuntimeError(f"{name!r} must take {wanted} bytes, got {written}")
        self._pending.append(name)
        self.done.add(name)
        if self._unsynced >= SYNC:
            self.sync()

    def sync(self) -> None:
        """Waits for the disk, then tells the journal."""
        with explained(self.folder):
            for handle in self._files.values():
                if handle >= 0:
                    os.fsync(handle)
            if self._pending:
                self._log(*({"tensor": name} for name in self._pending))
        self._pending, self._unsynced = [], 0

    def publish(self) -> Path:
        """Moves the complete folder to its place.

        Raises:
          FileExistsError: something has been put there meanwhile; the merge is kept.
        """
        self.sync()
        self._close_files()
        if len(self._files) > 1:
            total = sum(place.nbytes for place in self.places.values())
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: place.file for name, place in self.places.items()},
            }
            with explained(self.folder / weights.SHARDED):
                (self.folder / weights.SHARDED).write_text(json.dumps(index, indent=2), "utf-8")
        try:
            if self.target.exists():
                self.target.rmdir()
            self.folder.rename(self.target)
        except OSError as error:
            raise FileExistsError(
                f"{self.target} cannot be replaced ({error.strerror}); what is merged is kept: "
                "make it an empty folder again, or remove it, and give the same call"
            ) from error
        # To the last moment: without it another call would begin anew.
        (self.target / JOURNAL).unlink()
        self._release()
        return self.target

    def close(self) -> None:
        """Closes the files and lets go of the folder; what is finished can be taken up again."""
        self._close_files()
        self._release()

    def _close_files(self) -> None:
        for handle in self._files.values():
            if handle >= 0:
                os.close(handle)
        self._files = dict.fromkeys(self._files, -1)

    def interrupt(self) -> None:
        """Saves what is finished and closes, whatever state the disk is in."""
        try:
            with contextlib.suppress(OSError):
                self.sync()
        finally:
            self.close()

    def discard(self) -> None:
        """Removes the partial output."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()
