"""Tensors on disk: safetensors files read region by region, written atomically.

Only safetensors is read, never pickle. A tensor is a memory map that lives as long as its
copy takes, so that reading never holds more than one tensor beside what was asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

Index = tuple[slice, ...]

SINGLE = "model.safetensors"
SHARDED = "model.safetensors.index.json"

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class Weights(Protocol):
    """Named tensors that can be read in part."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor."""
        ...

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """The tensor, or a region of it. May be a view of the file: copy it, do not keep it."""
        ...


class _Entry(NamedTuple):
    file: Path
    dtype: Any
    shape: tuple[int, ...]
    offset: int


class _Unread(ValueError):
    """A sound file holds a tensor of a type that is not read."""


class Safetensors:
    """The tensors of one or several safetensors files.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is truncated or not in the format, or a tensor is of a type that is not
        read.
    """

    def __init__(self, files: list[Path]) -> None:
        self._entries: dict[str, _Entry] = {}
        for file in files:
            self._entries.update(_header(file))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        entry = self._entries[name]
        if 0 in entry.shape:
            return np.zeros(entry.shape, entry.dtype)
        whole = np.memmap(entry.file, entry.dtype, "r", entry.offset, entry.shape)
        return whole if index is None else whole[index]


def _header(file: Path) -> dict[str, _Entry]:
    if not file.is_file():
        raise FileNotFoundError(f"weights file {file} does not exist")
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(stream.read(length))
        entries = {}
        for name, info in header.items():
            if name == "__metadata__":
                continue
            if info["dtype"] not in _DTYPES:
                raise _Unread(
                    f"{file}: tensor {name!r} has the type {info['dtype']}, which is not read; "
                    f"convert it to one of {', '.join(_DTYPES)}"
                )
            dtype = np.dtype(_DTYPES[info["dtype"]])
            start, end = info["data_offsets"]
            shape = tuple(int(n) for n in info["shape"])
            if start < 0 or end - start != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
                raise ValueError(f"tensor {name!r} has offsets that do not fit its shape {shape}")
            if 8 + length + end > size:
                raise ValueError(
                    f"tensor {name!r} ends at byte {8 + length + end} of a file of {size} bytes"
                )
            entries[name] = _Entry(file, dtype, shape, 8 + length + start)
    except (struct.error, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a safetensors file ({error})") from error
    except _Unread:
        raise
    except ValueError as error:
        raise ValueError(f"{file} is truncated or damaged: {error}; fetch it again") from error
    return entries


def open_directory(directory: Path) -> Safetensors:
    """Opens ``model.safetensors``, or all shards of ``model.safetensors.index.json``.

    Raises:
      FileNotFoundError: neither is there, or a shard is missing; pickle files are not read.
      ValueError: the index names a path outside the directory or is not valid.
    """
    single, index = directory / SINGLE, directory / SHARDED
    if single.is_file():
        return Safetensors([single])
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is not a valid index of shards ({error})") from error
        for shard in shards:
            if Path(shard).name != shard:
                raise ValueError(f"{index} names a shard outside its folder: {shard!r}")
        return Safetensors([directory / shard for shard in shards])
    pickles = sorted(p.name for p in directory.glob("*.bin")) + sorted(
        p.name for p in directory.glob("*.pt*")
    )
    hint = f" ({', '.join(pickles)} may run code and is not read; convert it)" if pickles else ""
    raise FileNotFoundError(f"{directory} holds neither {SINGLE} nor {SHARDED}{hint}")


@contextlib.contextmanager
def atomic_directory(target: Path, keep: tuple[str, ...] = ()) -> Iterator[Path]:
    """A scratch directory that becomes ``target`` when the block ends without an error.

    Until then ``target`` is untouched, so a full disk or a kill leaves the old one whole.
    An existing ``target`` is replaced only if all that it holds is in ``keep``.

    Raises:
      FileExistsError: ``target`` holds other files, which would be lost.
    """
    target = target.absolute()
    if target.exists():
        foreign = sorted(p.name for p in target.iterdir() if p.name not in keep)
        if foreign:
            raise FileExistsError(
                f"{target} already holds {', '.join(foreign[:3])}; choose a new folder"
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        # mkdtemp makes it private; an export is to be as readable as any other folder.
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o777 & ~umask)
        yield scratch
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.rename(old / target.name)
            try:
                scratch.rename(target)
            except BaseException:
                (old / target.name).rename(target)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=target.exists())
        else:
            scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write(directory: Path, tensors: Mapping[str, np.ndarray], shard_bytes: int = 5 * 2**30) -> None:
    """Writes ``tensors`` as one file, or as shards of at most ``shard_bytes`` with an index."""
    from safetensors.numpy import save_file

    shards: list[dict[str, np.ndarray]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        # ``ascontiguousarray`` would give a scalar an axis.
        shards[-1][name] = np.asarray(tensor, order="C")
        filled += tensor.nbytes
    metadata = {"format": "pt"}  # readers of the ecosystem ask for this key
    if len(shards) == 1:
        save_file(shards[0], directory / SINGLE, metadata)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata)
        places.update(dict.fromkeys(shard, file))
    total = sum(int(t.nbytes) for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / SHARDED).write_text(json.dumps(index, indent=2), "utf-8")
