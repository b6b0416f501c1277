"""Who reads what inside a computation of a program, and which results are written to memory.

Matrix products, collectives, look-ups, sorts and loops write their results; elementwise operations
are fused into whoever reads them, unless that is one of these (a reduction reads them as they
come).
"""

from __future__ import annotations

import math
import re

from steppe.launch.plan.hlo import Computation, Instruction

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Results that are neither stored nor computed.
VIEWS = frozenset(
    ("parameter", "get-tuple-element", "tuple", "bitcast", "reshape", "copy", "constant", "iota",
     "broadcast", "optimization-barrier", "after-all", "partition-id", "replica-id", "domain",
     "add-dependency")
)  # fmt: skip
SLICES = frozenset(("slice", "dynamic-slice"))
# They read what they need from memory and write their results there.
HEAVY = frozenset(
    (*COLLECTIVES, "dot", "convolution", "while", "conditional", "call", "gather", "scatter",
     "sort", "concatenate", "custom-call", "reduce", "reduce-window", "select-and-scatter",
     "dynamic-update-slice", "rng-bit-generator", "topk")
)  # fmt: skip
# Those of them into which elementwise operations are fused all the same.
FUSING = frozenset(("reduce", "reduce-window", "dynamic-update-slice", "concatenate"))


class Flow:
    """Who reads what in a computation, and which results are stored."""

    def __init__(self, computation: Computation) -> None:
        self.computation = computation
        self.by_name = {i.name: i for i in computation.instructions}
        self.users: dict[str, list[Instruction]] = {}
        for i in computation.instructions:
            for n in i.operands:
                self.users.setdefault(n, []).append(i)
        self.free: set[str] = set()  # arguments that are constants
        self.stored = {i.name for i in computation.instructions if self._is_stored(i)}
        self._reads: dict[str, frozenset[str]] = {}
        for i in computation.instructions:  # operands first, so that nothing recurses
            self._reads[i.name] = self._resolve(i)

    def _is_stored(self, i: Instruction) -> bool:
        if i.op in HEAVY:
            return True
        if i.op in VIEWS or i.op in SLICES:
            return False
        return self._wanted(i, set())

    def _wanted(self, i: Instruction, seen: set[str]) -> bool:
        """Whether somebody needs the result of an elementwise operation in memory."""
        if i.root:
            return True
        for user in self.users.get(i.name, ()):
            if user.op in ("tuple", "while", "call", "conditional"):
                return True
            if user.op in HEAVY and user.op not in FUSING:
                return True
            if user.op in ("reshape", "bitcast", "copy", "transpose") and user.name not in seen:
                seen.add(user.name)
                if self._wanted(user, seen):
                    return True
        return False

    def _resolve(self, i: Instruction) -> frozenset[str]:
        """The stored results, arguments and slices that an instruction reads."""
        if i.op in ("constant", "iota", "partition-id", "replica-id"):
            return frozenset()
        if i.op == "get-tuple-element":
            number = re.search(r"index=(\d+)", i.rest)
            return self._element(i, self.by_name[i.operands[0]], int(number[1]) if number else 0)
        out: set[str] = set()
        for n in i.operands:
            found = self.by_name.get(n)
            if found is None:
                continue
            if n in self.stored or found.op in SLICES or found.op == "parameter":
                out.add(n)
            else:
                out |= self._reads[n]
        return frozenset(out)

    def _element(self, i: Instruction, source: Instruction, number: int) -> frozenset[str]:
        """What an element of a tuple stands for."""
        while source.op in ("optimization-barrier", "copy", "domain"):
            source = self.by_name[source.operands[0]]
        if source.op == "parameter":
            return frozenset((i.name,))
        if source.op == "while":
            return frozenset((self._carried(source, number),))
        if source.op == "tuple":
            name = source.operands[number]
            held = name in self.stored or self.by_name[name].op in (*SLICES, "parameter")
            return frozenset((name,)) if held else self._reads.get(name, frozenset())
        return frozenset((f"{source.name}#{number}",))

    def _carried(self, loop: Instruction, number: int) -> str:
        """The buffer of an element of a loop's result: its own, or the one that went in."""
        carried = self.by_name[loop.operands[0]]
        if carried.op != "tuple":
            return f"{loop.name}#{number}"
        source = carried.operands[number]
        if self.fresh(source):
            return f"{loop.name}#{number}"
        if source in self.stored or self.by_name[source].op == "parameter":
            return source
        through = self._reads[source]
        return next(iter(through)) if len(through) == 1 else f"{loop.name}#{number}"

    def reads(self, i: Instruction) -> frozenset[str]:
        """See :meth:`_resolve`; of a slice that is read, what it is a slice of as well."""
        found = set(self._reads[i.name])
        for n in list(found):
            source = self.by_name.get(n)
            if source is not None and source.op in SLICES:
                found |= self._reads[n]
        return frozenset(found)

    def direct(self, i: Instruction) -> frozenset[str]:
        """What is read, a slice as itself."""
        return self._reads[i.name]

    def elements(self, number: int) -> set[str]:
        """Names of an element of the argument, of a computation that takes one tuple."""
        return {
            i.name
            for i in self.computation.instructions
            if i.op == "get-tuple-element"
            and f"index={number}," in f"{i.rest},"
            and self.by_name[i.operands[0]].op == "parameter"
        }

    def made_of_nothing(self, name: str) -> bool:
        """Whether a value depends on constants alone."""
        i = self.by_name[name]
        return i.op not in HEAVY and i.op != "parameter" and not self._reads[name]

    def fresh(self, name: str) -> bool:
        """Whether a loop's initial value is made for it: zeros that it fills."""
        i = self.by_name.get(name)
        return i is not None and i.op in ("broadcast", "constant")

    def returned(self, i: Instruction) -> bool:
        """Whether the computation's result holds it."""
        return i.root or any(
            u.root or (u.op in ("reshape", "bitcast", "copy") and self.returned(u))
            for u in self.users.get(i.name, ())
        )

    def only_sliced(self, i: Instruction) -> bool:
        """Whether every reader takes a part of the result, through changes of form only."""
        users = self.users.get(i.name, [])
        forms = ("convert", "reshape", "bitcast", "copy", "transpose")
        return bool(users) and all(
            u.op == "dynamic-slice" or (u.op in forms and self.only_sliced(u)) for u in users
        )


def flops(flow: Flow, i: Instruction) -> float:
    if i.op != "dot":
        return 0.0
    left = flow.by_name[i.operands[0]].arrays[0]
    contracted = math.prod(left.dims[d] for d in i.numbers("lhs_contracting_dims"))
    return 2.0 * i.arrays[0].size * contracted


def dtype(flow: Flow, i: Instruction) -> str:
    if i.op == "dot":
        return flow.by_name[i.operands[0]].arrays[0].dtype
    return i.arrays[0].dtype if i.arrays else ""


def traffic(flow: Flow, i: Instruction) -> float:
    """Bytes that an instruction reads and writes."""
    if i.op == "gather":
        return 2.0 * i.nbytes
    if i.op == "scatter":
        return 3.0 * flow.by_name[i.operands[-1]].nbytes
    if i.op == "dynamic-update-slice":
        update = flow.by_name[i.operands[1]]
        own = 0 if update.name in flow.stored else sum(size(flow, n) for n in flow.direct(update))
        return float(update.nbytes + max(own, update.nbytes))
    read = sum(size(flow, n) for n in flow.direct(i))
    return float(read + i.nbytes)


def size(flow: Flow, name: str) -> int:
    base, _, number = name.partition("#")
    if name in flow.free:
        return 0
    i = flow.by_name.get(base)
    if i is None:
        return 0
    if number:
        return i.arrays[int(number)].nbytes
    return i.nbytes
