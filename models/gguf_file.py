"""The GGUF container: metadata, and tensors of which any rows can be dequantised.

Written after the format's description (ggml, docs/gguf.md). The ``gguf`` package does the
arithmetic of the quantised types; its own reader of files is not used, because it keeps an array
object for every token of the vocabulary, which takes more memory than a small model's weights.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# ggml types: plain ones by their dtype, the rest through ``gguf.quants``.
_PLAIN: dict[int, Any] = {0: np.float32, 1: np.float16, 30: ml_dtypes.bfloat16}
_QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
_CHUNK = 1 << 20  # values dequantised at a time: what it needs beside the result

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9


class Entry(NamedTuple):
    """One tensor as stored: rows of `width` bytes from byte `offset` on."""

    kind: int
    shape: tuple[int, ...]
    offset: int
    width: int


class File(NamedTuple):
    """A header: metadata (arrays of texts as their length) and where the tensors are."""

    path: Path
    meta: dict[str, Any]
    entries: dict[str, Entry]

    def get(self, key: str) -> Any:
        """A value of the architecture's own metadata."""
        name = f"{self.meta['general.architecture']}.{key}"
        if name not in self.meta:
            raise ValueError(f"{self.path} lacks the metadata key {name!r}; convert it again")
        return self.meta[name]

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number."""
        value = self.option(key, default)
        if value is None:
            value = self.get(key)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int):
            raise ValueError(
                f"{self.path}: {key!r} is {value!r}; models whose layers differ are not supported"
            )
        return value

    def option(self, key: str, default: Any = None) -> Any:
        return self.meta.get(f"{self.meta['general.architecture']}.{key}", default)


def rows_of(path: Path, entry: Entry, rows: np.ndarray) -> np.ndarray:
    """Some rows of a tensor: float32, or the plain type that they are stored in.

    Raises:
      ValueError: a quantised tensor of more than two dimensions.
    """
    count = entry.shape[0]
    if not entry.shape[-1] or not count:
        return np.zeros((len(rows), *entry.shape[1:]), np.float32)
    dtype = _PLAIN.get(entry.kind)
    # Consecutive rows stay a view of the file.
    whole = len(rows) > 0 and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows)))
    if dtype is not None:
        data = np.memmap(path, dtype, "r", entry.offset, entry.shape)
        return data[rows[0] : rows[0] + len(rows)] if whole else data[rows]
    from gguf import GGMLQuantizationType, quants

    if len(entry.shape) > 2:
        raise ValueError(f"{path}: quantised tensors of {len(entry.shape)} dimensions are not read")
    kind = GGMLQuantizationType(entry.kind)
    if len(entry.shape) == 1:
        data = np.memmap(path, np.uint8, "r", entry.offset, (1, entry.width))
        return quants.dequantize(data, kind).reshape(-1)[rows]
    out = np.empty((len(rows), entry.shape[-1]), np.float32)
    step = max(1, _CHUNK // entry.shape[-1])
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        # A map for every few rows: what has been read of the file need not stay in memory.
        first = int(some.min())
        table = (int(some.max()) - first + 1, entry.width)
        data = np.memmap(path, np.uint8, "r", entry.offset + first * entry.width, table)
        raw = data if whole else data[some - first]
        out[start : start + step] = quants.dequantize(raw, kind)
    return out


def open_file(path: Path) -> File:
    """Reads the header and checks that every tensor lies inside the file.

    Raises:
      ValueError: not a GGUF file, another version, truncated (the first tensor that is cut off
        is named with both sizes), or a tensor of a type that is not read.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file (it does not start with the letters GGUF)")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                meta, tensors, start = _header(path, data)
            except (
                struct.error,
                UnicodeDecodeError,
                MemoryError,
                OverflowError,
                RecursionError,
            ) as error:
                raise ValueError(
                    f"{path} is truncated or damaged inside its header ({error}); fetch it again"
                ) from error
    entries = {}
    for name, (shape, kind, offset) in sorted(tensors.items(), key=lambda item: item[1][2]):
        entry = Entry(kind, shape, start + offset, _width(path, name, kind, shape))
        end = entry.offset + math.prod(shape[:-1]) * entry.width
        if end > size:
            raise ValueError(
                f"{path} is truncated: tensor {name!r} ends at byte {end} of a file of {size} "
                "bytes; fetch it again"
            )
        entries[name] = entry
    return File(path, meta, entries)


def _width(path: Path, name: str, kind: int, shape: tuple[int, ...]) -> int:
    """Bytes of a row.

    Raises:
      ValueError: a type that is not read, or a row that is not a whole number of blocks.
    """
    if kind in _PLAIN:
        return shape[-1] * np.dtype(_PLAIN[kind]).itemsize
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    known = {int(t): t.name for t in GGMLQuantizationType}
    label = known.get(kind, f"number {kind}")
    if label not in _QUANTISED:
        raise ValueError(
            f"{path}: tensor {name!r} has the type {label}; F32, F16, BF16, "
            f"{', '.join(_QUANTISED)} are read"
        )
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if shape[-1] % block:
        raise ValueError(
            f"{path}: tensor {name!r} has rows of {shape[-1]} values, which are no whole number "
            f"of {label} blocks of {block}; the file is damaged"
        )
    return shape[-1] // block * size


def _header(
    path: Path, data: mmap.mmap
) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], int, int]], int]:
    """Metadata, (shape, type, offset) of every tensor, and the byte where tensors begin.

    Nothing of the vocabulary is needed here, so texts in arrays are stepped over.
    """
    version, count, keys = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise ValueError(
            f"{path} is GGUF version {version}; versions 2 and 3 are read "
            "(a file of the other byte order shows as a huge version)"
        )
    at = 24

    def take(layout: str) -> tuple[Any, ...]:
        nonlocal at
        at += struct.calcsize("<" + layout)
        return struct.unpack_from("<" + layout, data, at - struct.calcsize("<" + layout))

    def text() -> str:
        nonlocal at
        (length,) = take("Q")
        if at + length > len(data):
            raise struct.error(f"a text of {length} bytes at byte {at}")
        at += length
        return data[at - length : at].decode("utf-8")

    def value(kind: int) -> Any:
        nonlocal at
        if kind == _STRING:
            return text()
        if kind == _ARRAY:
            inner, length = take("IQ")
            if inner in _SCALARS:
                if length > len(data):
                    raise struct.error(f"a list of {length} values at byte {at}")
                return list(take(f"{length}{_SCALARS[inner]}"))
            for _ in range(length):  # lengths vary: each is stepped over
                if inner == _STRING:
                    at += 8 + struct.unpack_from("<Q", data, at)[0]
                else:
                    value(inner)
            return length
        if kind not in _SCALARS:
            raise struct.error(f"a value of unknown type {kind} at byte {at}")
        return take(_SCALARS[kind])[0]

    meta = {}
    for _ in range(keys):
        key = text()
        meta[key] = value(take("I")[0])
    tensors = {}
    for _ in range(count):
        name = text()
        (rank,) = take("I")
        if not 1 <= rank <= 4:
            raise struct.error(f"tensor {name!r} of {rank} dimensions")
        shape = tuple(int(n) for n in reversed(take(f"{rank}Q")))
        kind, offset = take("IQ")
        tensors[name] = (shape, int(kind), int(offset))
    align = int(meta.get("general.alignment", 32))
    if align < 1:
        raise struct.error(f"alignment {align}")
    return meta, tensors, -(-at // align) * align
