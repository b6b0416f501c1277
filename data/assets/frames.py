"""Reads a pickled pandas table as inert data: no class is looked up, no function is called.

Unpickling executes what the file asks for, so steppe never unpickles. Some packages ship
tables in no other form. This module walks the opcodes (``pickletools.genops`` only parses)
and builds a description: a global becomes a :class:`Name`, a call becomes a :class:`Call`
that is never made. The columns are then picked out of that description. Anything that is
not in the short list of opcodes, or does not look like a plain pandas table, is an error.
"""

from __future__ import annotations

import lzma
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steppe.data.errors import DataError, shorten

MAX_BYTES = 256 << 20  # of the decompressed pickle


@dataclass(frozen=True)
class Name:
    """A global that the pickle mentions; never imported."""

    module: str
    name: str


@dataclass
class Call:
    """A call that the pickle asks for; never made. `state` is what it would be set to."""

    function: Any
    arguments: Any
    state: Any = None


@dataclass
class _Machine:
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: list[Any] = field(default_factory=list)

    def since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def take(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("the stack is empty")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _call(machine: _Machine, _: Any) -> None:
    function, arguments = machine.take(2)
    machine.stack.append(Call(function, arguments))


def _build(machine: _Machine, _: Any) -> None:
    (state,) = machine.take(1)
    target = machine.stack[-1]
    if not isinstance(target, Call):
        raise TypeError(f"state for {shorten(target)}")
    target.state = state


def _global(machine: _Machine, _: Any) -> None:
    module, name = machine.take(2)
    machine.stack.append(Name(module, name))


def _items(machine: _Machine, _: Any) -> None:
    pairs = machine.since_mark()
    machine.stack[-1].update(zip(pairs[::2], pairs[1::2]))


def _appends(machine: _Machine, _: Any) -> None:
    items = machine.since_mark()
    machine.stack[-1].extend(items)


def _item(machine: _Machine, _: Any) -> None:
    key, value = machine.take(2)
    machine.stack[-1][key] = value


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(tuple(machine.take(count)))


_OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "MEMOIZE": lambda machine, _: machine.memo.append(machine.stack[-1]),
    "BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1"), _push),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE"), _push),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BYTEARRAY8"), _push),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "APPENDS": _appends,
    "SETITEM": _item,
    "SETITEMS": _items,
    "STACK_GLOBAL": _global,
    "REDUCE": _call,
    "NEWOBJ": _call,
    "BUILD": _build,
}


def describe(data: bytes, label: str) -> Any:
    """The description of a pickle's value, built without executing it.

    Raises:
      DataError: an opcode that a plain table does not need, or a damaged pickle.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                (value,) = machine.stack
                return value
            if opcode.name not in _OPCODES:
                raise DataError(
                    f"{label}: refuses the pickle opcode {opcode.name}; "
                    "only a plain pandas table of text and numbers can be read"
                )
            _OPCODES[opcode.name](machine, argument)
    except DataError:
        raise
    except (ValueError, IndexError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"{label}: damaged pickle ({error})") from error
    raise DataError(f"{label}: the pickle ends too early")


def text_columns(path: Path) -> dict[str, list[str]]:
    """The text columns of an xz-compressed pickled pandas table, in order.

    Raises:
      DataError: not such a table (the message names the file and what was met).
    """
    label = path.name
    try:
        with lzma.open(path) as stream:
            data = stream.read(MAX_BYTES + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"{label}: not an xz file ({error})") from error
    if len(data) > MAX_BYTES:
        raise DataError(f"{label}: unpacks to more than {MAX_BYTES >> 20} MiB; refused")
    frame = describe(data, label)
    try:
        return _columns(frame)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{label}: not a plain pandas table ({error})") from error


def _columns(frame: Any) -> dict[str, list[str]]:
    if frame.function != Name("pandas.core.frame", "DataFrame"):
        raise ValueError(f"holds {shorten(frame.function)}")
    manager = frame.state["_mgr"]
    blocks, axes = manager.arguments
    names = _values(axes[0])
    columns: dict[str, list[str]] = {}
    for block in blocks:
        values, placement, _ = block.arguments
        if values.function != Name("numpy.core.multiarray", "_reconstruct"):
            continue  # a block of numbers
        _, shape, _, fortran, cells = values.state
        start, stop, step = placement.arguments
        places = range(start, stop, step)
        width, rows = shape
        if len(places) != width or len(cells) != width * rows:
            raise ValueError("a block does not have the shape that it claims")
        for offset, place in enumerate(places):
            column = cells[offset::width] if fortran else cells[offset * rows : (offset + 1) * rows]
            if not all(isinstance(cell, str) for cell in column):
                raise ValueError(f"column {names[place]!r} holds more than text")
            columns[names[place]] = column
    return columns


def _values(axis: Any) -> list[Any]:
    """The entries of a pandas Index: its description carries them as an array of objects."""
    _, details = axis.arguments
    cells = details["data"].state[4]
    return list(cells)
