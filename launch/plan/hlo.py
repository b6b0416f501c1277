"""Reads the text of an XLA program: computations, instructions, loops and groups of devices.

Only what counting needs is understood: shapes, operands, the trip count of loops that jax's
``scan`` makes, and which devices talk to each other in a collective. The text is that of
``Lowered.as_text("hlo")`` or of a dump after partitioning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

ITEMSIZE = {
    "pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1, "token": 0,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")


class Array(NamedTuple):
    """A dtype by XLA's name, and dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.size * ITEMSIZE.get(self.dtype, 4)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in its computation.
      op: opcode, such as ``dot``.
      arrays: the result: one array, or the elements of a tuple (nested ones flattened).
      operands: names.
      rest: attributes, as text.
      root: whether it is the computation's result.
    """

    name: str
    op: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return sum(array.nbytes for array in self.arrays)

    def called(self, key: str) -> str | None:
        """The computation that an attribute such as ``body`` names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None

    def numbers(self, key: str) -> tuple[int, ...]:
        """The numbers of an attribute such as ``lhs_contracting_dims={1}``."""
        found = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.rest)
        return tuple(int(n) for n in found.group(1).split(",") if n) if found else ()


@dataclass
class Computation:
    """Instructions in the order of the text, which is one that they can run in."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    @property
    def root(self) -> Instruction:
        """The result."""
        return next((i for i in self.instructions if i.root), self.instructions[-1])


class Module(NamedTuple):
    """A program."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads a program.

    Raises:
      ValueError: the text holds no entry computation.
    """
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = ""
    for line in text.splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head and not line.startswith("HloModule"):
                current = computations[head.group(2)] = Computation(head.group(2))
                entry = head.group(2) if head.group(1) else entry
        elif line.startswith("}"):
            current = None
        else:
            found = _LINE.match(re.sub(r"/\*.*?\*/", "", line))
            if found:
                current.instructions.append(_instruction(*found.groups()))
    if not entry:
        raise ValueError("the text is no XLA program: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(root: str | None, name: str, text: str) -> Instruction:
    shape, rest = _split(text)
    op, _, behind = rest.partition("(")
    inside, after = _closed(behind)
    arrays = tuple(
        Array(dtype, tuple(int(n.strip("<=")) for n in dims.split(",") if n))
        for dtype, dims in _ARRAY.findall(shape)
    )
    operands: tuple[str, ...] = ()
    if op == "constant" or op == "parameter":
        after = f"{inside}){after}"
    else:
        operands = tuple(_name(part) for part in _commas(inside) if part.strip())
    return Instruction(name, op.strip(), arrays, operands, after, root is not None)


def _split(text: str) -> tuple[str, str]:
    """A shape, which may be a tuple, and what follows it."""
    if text.startswith("("):
        inside, rest = _closed(text[1:])
        return inside, rest.strip()
    shape, _, rest = text.partition(" ")
    return shape, rest


def _closed(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes, and after it."""
    depth = 1
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _commas(text: str) -> list[str]:
    return re.split(r",(?![^\[{(]*[\]})])", text)


def _name(operand: str) -> str:
    return operand.split()[-1].lstrip("%")


def trip_count(module: Module, loop: Instruction) -> int | None:
    """Turns of a ``while`` that counts up from 0 by 1, as a scan does; None = not such a one."""
    known = re.search(r"known_trip_count[^\d]*(\d+)", loop.rest)
    if known:
        return int(known.group(1))
    condition = module.computations[loop.called("condition") or ""]
    by_name = {i.name: i for i in condition.instructions}
    root = condition.root
    if root.op != "compare" or "direction=LT" not in root.rest:
        return None
    for name in root.operands:
        bound = by_name.get(name)
        if bound is not None and bound.op == "constant":
            return int(bound.rest.split(")")[0])
    return None


def axes_of(instruction: Instruction, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which a collective moves data; those of size 1 never appear.

    Devices are numbered in the order of the mesh. Groups that do not come from one mesh axis or
    several give every axis that differs within a group.
    """
    names, sizes = tuple(mesh), tuple(mesh.values())
    total = math.prod(sizes)
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", instruction.rest)
    moved: set[str] = set()
    if pairs:
        groups = [[int(a), int(b)] for a, b in re.findall(r"(\d+),(\d+)", pairs.group(1))]
    else:
        groups = _groups(instruction.rest, total)
    for group in groups:
        where = np.unravel_index(np.array(group), sizes)
        moved |= {n for n, c in zip(names, where, strict=True) if len(set(c.tolist())) > 1}
    return tuple(n for n in names if n in moved)


def _groups(rest: str, total: int) -> list[list[int]]:
    text = rest.partition("replica_groups=")[2]
    if text.startswith("{{"):
        inside = text[1 : text.index("}}") + 1]
        return [[int(n) for n in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", inside)]
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape, dims, order = (_ints(g) for g in iota.groups())
        ids = np.arange(math.prod(dims)).reshape(dims)
        ids = ids.transpose(order) if order else ids
        return ids.reshape(shape).tolist()
    named = re.match(r"mesh\[(.*?)\](.*?)\{(.*?)\}", text)
    if named:
        sizes = {n: int(s) for n, s in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
        ids = np.arange(total)
        moved = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", named.group(2))
        if moved:
            dims, order = _ints(moved.group(1)), _ints(moved.group(2))
            # What is given is the order in which the mesh reads the devices.
            ids = ids.reshape(dims).transpose(order).reshape(-1) if order else ids
        ids = ids.reshape(tuple(sizes.values()))
        chosen = re.findall(r"'([^']+)'", named.group(3))
        keep = [i for i, n in enumerate(sizes) if n not in chosen]
        count = math.prod(s for n, s in sizes.items() if n not in chosen)
        along = [i for i, n in enumerate(sizes) if n in chosen]
        return ids.transpose(keep + along).reshape(count, -1).tolist()
    return [list(range(total))]


def _ints(text: str | None) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",")) if text else ()
