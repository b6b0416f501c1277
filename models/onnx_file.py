"""The tensors and nodes of an ONNX file, read in place.

An ONNX file is one protobuf message. Parsing it with generated classes copies every weight
two or three times; walking the message needs only where each tensor's bytes lie, so that a
tensor is a memory map, as one of safetensors is. The graph is never run, and data that it
keeps in other files is refused: a graph must not make us open any path that it names.

Message layout: onnx.proto of ONNX 1.17 (field numbers are part of the format's stability).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from steppe.models.weights import Index

_TYPES: dict[int, Any] = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
    16: ml_dtypes.bfloat16,
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Span = tuple[int, int]


class Tensor(NamedTuple):
    """Where a tensor lies: at a byte offset of the file, or small enough to be held here."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int | None
    values: np.ndarray | None = None


class Node(NamedTuple):
    """One operation. Attributes hold numbers and, for constants, arrays; the rest is left out."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


class OnnxFile:
    """The initialisers and nodes of a graph.

    Attributes:
      path: the file.
      tensors: initialisers by name.
      nodes: operations in the order of the file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not an ONNX file, a truncated one, or one that keeps its data elsewhere.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"weights file {path} does not exist")
        self.path = path
        self.tensors: dict[str, Tensor] = {}
        self.nodes: list[Node] = []
        try:
            if path.stat().st_size == 0:
                raise ValueError("it is empty")
            with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=1) as data:
                self._walk(data)
        except (struct.error, IndexError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not an ONNX file, or truncated ({error})") from error
        except ValueError as error:
            raise ValueError(f"{path} is not an ONNX file, or truncated: {error}") from error
        if not self.nodes and not self.tensors:
            raise ValueError(f"{path} is not an ONNX file: it holds no graph")

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """The tensor, or a region of it; a view of the file."""
        dtype, shape, offset, values = self.tensors[name]
        if values is None:
            if 0 in shape:
                return np.zeros(shape, dtype)
            values = np.memmap(self.path, dtype, "r", offset or 0, shape)
        return values if index is None else values[index]

    def constants(self) -> dict[str, np.ndarray]:
        """Values of the constants by the name of their output."""
        return {
            node.outputs[0]: node.attributes["value"]
            for node in self.nodes
            if node.op == "Constant" and isinstance(node.attributes.get("value"), np.ndarray)
        }

    def _walk(self, data: mmap.mmap) -> None:
        for number, kind, value in _fields(data, (0, len(data))):
            if number == 7 and kind == _BYTES:
                for inner, wire, span in _fields(data, value):
                    if wire != _BYTES:
                        continue
                    if inner == 1:
                        self.nodes.append(_node(data, span))
                    elif inner == 5:
                        name, tensor = _tensor(data, span)
                        self.tensors[name] = tensor


def _varint(data: Any, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            raise ValueError(f"a number is cut off at byte {at}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: Any, span: Span) -> Iterator[tuple[int, int, Any]]:
    """(number, wire type, value) of a message; a value is an int, bytes, or a span."""
    at, end = span
    while at < end:
        key, at = _varint(data, at, end)
        number, kind = key >> 3, key & 7
        value: Any
        if kind == _VARINT:
            value, at = _varint(data, at, end)
        elif kind == _BYTES:
            length, at = _varint(data, at, end)
            value = (at, at + length)
            at += length
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
            value = data[at : at + size]
            at += size
        else:
            raise ValueError(f"byte {at} starts no field")
        if at > end:
            raise ValueError(f"a field ends at byte {at}, beyond {end}")
        if number == 0:
            raise ValueError(f"byte {at} starts no field")
        yield number, kind, value


def _text(data: Any, span: Span) -> str:
    return bytes(data[span[0] : span[1]]).decode("utf-8")


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _integers(data: Any, span: Span) -> list[int]:
    at, end = span
    out = []
    while at < end:
        value, at = _varint(data, at, end)
        out.append(_signed(value))
    return out


def _tensor(data: Any, span: Span) -> tuple[str, Tensor]:
    name, code = "", 0
    shape: list[int] = []
    place: Span | None = None
    listed: list[int] = []
    elsewhere = False
    for number, kind, value in _fields(data, span):
        if number == 1:
            shape += [value] if kind == _VARINT else _integers(data, value)
        elif number == 2 and kind == _VARINT:
            code = value
        elif number == 8 and kind == _BYTES:
            name = _text(data, value)
        elif number in (4, 9, 10) and kind == _BYTES:
            place = value
        elif number in (5, 7):
            listed += [_signed(value)] if kind == _VARINT else _integers(data, value)
        elif number == 13 or (number == 14 and value == 1):
            elsewhere = True
    if elsewhere:
        raise ValueError(f"tensor {name!r} is kept in another file, which is not supported")
    if code not in _TYPES:
        # Such as text; nothing that is a weight.
        return name, Tensor(np.dtype(np.uint8), (0,), None)
    dtype, dims = np.dtype(_TYPES[code]), tuple(shape)
    if place is None:
        return name, Tensor(dtype, dims, None, np.array(listed, dtype).reshape(dims))
    size = int(np.prod(dims, dtype=np.int64)) * dtype.itemsize
    if place[1] - place[0] != size:
        raise ValueError(
            f"tensor {name!r} of shape {dims} takes {size} bytes, the file holds "
            f"{place[1] - place[0]}"
        )
    return name, Tensor(dtype, dims, place[0])


def _node(data: Any, span: Span) -> Node:
    texts: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    attributes: dict[str, Any] = {}
    for number, kind, value in _fields(data, span):
        if kind != _BYTES:
            continue
        if number in texts:
            texts[number].append(_text(data, value))
        elif number == 5:
            name, content = _attribute(data, value)
            if content is not None:
                attributes[name] = content
    op, name = ("".join(texts[i]) for i in (4, 3))
    return Node(op, name, tuple(texts[1]), tuple(texts[2]), attributes)


def _attribute(data: Any, span: Span) -> tuple[str, Any]:
    name, content = "", None
    for number, kind, value in _fields(data, span):
        if number == 1 and kind == _BYTES:
            name = _text(data, value)
        elif number == 2 and kind == _FIXED32:
            content = struct.unpack("<f", value)[0]
        elif number == 3 and kind == _VARINT:
            content = _signed(value)
        elif number == 5 and kind == _BYTES:
            tensor = _tensor(data, value)[1]
            content = tensor.values
            if content is None and tensor.offset is not None:
                size = int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
                raw = bytes(data[tensor.offset : tensor.offset + size])
                content = np.frombuffer(raw, tensor.dtype).reshape(tensor.shape)
    return name, content
