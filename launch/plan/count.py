"""Counts what one device does in a partitioned program: products, traffic, collectives, memory.

Loops count as often as they turn, exactly: the layers of a stack are one loop, so that the
program of 80 layers is as short as that of 8 and nothing is extrapolated.

Which results are written to memory is the compiler's choice; it is modelled by the rule of
``flow``. Memory is the largest sum of results that are alive at once, in the order of the text.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from steppe.launch.plan import hlo
from steppe.launch.plan.flow import COLLECTIVES, HEAVY, SLICES, VIEWS, Flow, dtype, flops, traffic
from steppe.launch.plan.hlo import Instruction, Module
from steppe.models.layout import DATA_AXES

EXPONENTIALS = frozenset(
    ("exponential", "log", "tanh", "erf", "logistic", "power", "sine", "cosine",
     "exponential-minus-one", "log-plus-one", "rsqrt", "sqrt", "cbrt")
)  # fmt: skip
SILENT = frozenset(
    ("transpose", "convert", "select", "compare", "pad", "reverse", "and", "or", "not")
)


class Kernel(NamedTuple):
    """Something that runs by itself: FLOPs of products, bytes read and written, dtype, times."""

    flops: float
    nbytes: float
    dtype: str
    times: float


class Collective(NamedTuple):
    """A collective: kind, axes, devices of a group, bytes that a device sends, times a step."""

    kind: str
    axes: tuple[str, ...]
    devices: int
    sent: float
    times: float


@dataclass
class Counts:
    """What one device does in a step.

    Attributes:
      kernels, collectives: see there.
      flops: of matrix products.
      elementwise: elements that arithmetic is done on, exponentials and the like among them.
      exponentials: elements of these.
      memory: label -> bytes of what lives at the fullest moment, the state apart.
      unknown: loops whose turns could not be read, counted once.
    """

    kernels: list[Kernel] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    flops: float = 0.0
    elementwise: float = 0.0
    exponentials: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)
    unknown: int = 0

    @property
    def nbytes(self) -> float:
        """Bytes read and written."""
        return sum(k.nbytes * k.times for k in self.kernels)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; equal kernels and collectives are put together."""
        kernels: dict[tuple[float, float, str], float] = defaultdict(float)
        for done, nbytes, kind, times in self.kernels:
            kernels[done, nbytes, kind] += times
        sent: dict[tuple[str, tuple[str, ...], int, float], float] = defaultdict(float)
        for kind, axes, devices, size, times in self.collectives:
            sent[kind, axes, devices, size] += times
        return {
            "kernels": [[*key, times] for key, times in kernels.items()],
            "collectives": [[k, list(a), n, s, times] for (k, a, n, s), times in sent.items()],
            "flops": self.flops,
            "elementwise": self.elementwise,
            "exponentials": self.exponentials,
            "memory": self.memory,
            "unknown": self.unknown,
        }


def combined(moved: list[Collective]) -> list[Collective]:
    """The collectives of one computation, those that nobody waits for in between as one.

    Gathers of parameters and sums of gradients are independent of each other: compilers join them.
    Sums of hidden states depend on each other.
    """
    joined: dict[tuple[str, tuple[str, ...]], Collective] = {}
    out = []
    for one in moved:
        if not set(one.axes) <= set(DATA_AXES):
            out.append(one)
            continue
        known = joined.get((one.kind, one.axes))
        sent = one.sent + (0.0 if known is None else known.sent)
        joined[one.kind, one.axes] = one._replace(sent=sent)
    return out + list(joined.values())


def from_dict(values: Mapping[str, Any]) -> Counts:
    """Inverse of :meth:`Counts.to_dict`."""
    kernels = [Kernel(*k) for k in values["kernels"]]
    collectives = [Collective(k, tuple(a), n, s, t) for k, a, n, s, t in values["collectives"]]
    rest = {n: v for n, v in values.items() if n not in ("kernels", "collectives")}
    return Counts(kernels, collectives, **rest)


def count(
    text: str,
    mesh: Mapping[str, int],
    gradients: Collection[tuple[int, ...]] = (),
    dear: float = 1.0,
) -> Counts:
    """Counts a program.

    Args:
      text: the program of one device, after partitioning.
      mesh: axis -> size, in the order in which the devices are numbered.
      gradients: shapes of the shards of what trains: results of these shapes are called so.
      dear: share of the steps that take the longer branch where the program has two, as a
        method does that renews its mask now and then. Memory is that of the longer one.
    """
    walker = _Walker(hlo.parse(text), mesh, frozenset(gradients), dear)
    walker.walk(walker.module.entry, 1)
    walker.counts.memory = walker.peak(walker.module.entry, top=True)
    return walker.counts


class _Walker:
    def __init__(
        self,
        module: Module,
        mesh: Mapping[str, int],
        gradients: frozenset[tuple[int, ...]],
        dear: float,
    ) -> None:
        self.module, self.mesh, self.gradients, self.dear = module, mesh, gradients, dear
        self.counts = Counts()
        self._flows: dict[str, Flow] = {}
        self._peaks: dict[str, dict[str, int]] = {}

    def flow(self, name: str) -> Flow:
        if name not in self._flows:
            self._flows[name] = Flow(self.module.computations[name])
        return self._flows[name]

    def walk(self, name: str, times: float) -> None:
        """Adds a computation that runs ``times`` times."""
        flow, counts = self.flow(name), self.counts
        moved: list[Collective] = []
        for i in flow.computation.instructions:
            if i.op == "while":
                turns = hlo.trip_count(self.module, i)
                counts.unknown += turns is None
                body = self.flow(i.called("body") or "")
                body.free |= {n for k in self.constant(flow, i) for n in body.elements(k)}
                self.walk(i.called("body") or "", times * (1 if turns is None else turns))
            elif i.op == "call":
                self.walk(i.called("to_apply") or "", times)
            elif i.op == "conditional":
                *others, longest = self._branches(i)
                self.walk(longest, times * self.dear)
                for other in others:
                    self.walk(other, times * (1 - self.dear) / len(others))
            elif i.op in COLLECTIVES:
                moved += self._collective(flow, i, times)
            elif i.name in flow.stored:
                work = flops(flow, i)
                counts.flops += work * times
                counts.kernels.append(Kernel(work, traffic(flow, i), dtype(flow, i), times))
            if i.op not in VIEWS and i.op not in HEAVY and i.op not in SLICES:
                size = sum(a.size for a in i.arrays)
                counts.elementwise += 0 if i.op in SILENT else size * times
                counts.exponentials += size * times if i.op in EXPONENTIALS else 0
        counts.collectives += combined(moved)

    def constant(self, flow: Flow, loop: Instruction) -> set[int]:
        """Elements that a loop carries through unchanged and that are constants.

        Compilers move them into the body, so that they cost nothing.
        """
        carried = flow.by_name[loop.operands[0]]
        body = self.flow(loop.called("body") or "")
        root = body.computation.root
        if carried.op != "tuple" or root.op != "tuple":
            return set()
        return {
            k
            for k, (start, end) in enumerate(zip(carried.operands, root.operands, strict=True))
            if end in body.elements(k) and flow.made_of_nothing(start)
        }

    def _branches(self, i: Instruction) -> list[str]:
        """The branches of a conditional, the one of most instructions last."""
        listed = i.rest.partition("branch_computations={")[2].partition("}")[0]
        names = re.findall(r"[\w.\-]+", listed)
        names += [n for key in ("true_computation", "false_computation") if (n := i.called(key))]
        return sorted(names, key=lambda n: len(self.module.computations[n].instructions))

    def _collective(self, flow: Flow, i: Instruction, times: float) -> list[Collective]:
        axes = hlo.axes_of(i, self.mesh)
        devices = math.prod(self.mesh[a] for a in axes)
        if devices == 1:
            return []
        read = sum(flow.by_name[n].nbytes for n in i.operands)
        kind = i.op
        if kind == "all-reduce" and flow.only_sliced(i):
            kind = "reduce-scatter"  # as compilers for accelerators write it
        share = (devices - 1) / devices
        sent = {
            "all-gather": i.nbytes * share,
            "all-reduce": 2 * read * share,
            "reduce-scatter": read * share,
            "all-to-all": read * share,
            "collective-permute": float(read),
        }[kind]
        return [Collective(kind, axes, devices, sent, times)]

    def peak(self, name: str, *, top: bool = False) -> dict[str, int]:
        """Label -> bytes at the fullest moment of a computation."""
        if name in self._peaks:
            return self._peaks[name]
        flow = self.flow(name)
        order = flow.computation.instructions
        buffers: dict[str, tuple[str, int]] = {}
        born: dict[str, int] = {}
        dies: dict[str, int] = {}
        for at, i in enumerate(order):
            for part, size, label in self._allocated(flow, i, top):
                buffers[part], born[part], dies[part] = (label, size), at, at
            if i.name in flow.stored or i.root or i.op in HEAVY:
                for read in flow.reads(i):
                    if read in dies:
                        dies[read] = at
        for kept in flow.reads(flow.computation.root):
            if kept in dies and not top:
                dies[kept] = len(order)
        best: dict[str, int] = {}
        alive: Counter[str] = Counter()
        ends: dict[int, list[str]] = {}
        starts: dict[int, list[str]] = {}
        for part in buffers:
            starts.setdefault(born[part], []).append(part)
            ends.setdefault(dies[part], []).append(part)
        for at, i in enumerate(order):
            for part in starts.get(at, ()):
                alive[buffers[part][0]] += buffers[part][1]
            inner: dict[str, int] = {}
            for key in ("body", "to_apply"):
                called = i.called(key) if i.op in ("while", "call") else None
                if called:
                    inner = self.peak(called)
            if i.op == "conditional":
                inner = self.peak(self._branches(i)[-1])
            if sum(alive.values()) + sum(inner.values()) > sum(best.values()):
                best = dict(alive + Counter(inner))
            for part in ends.get(at, ()):
                alive[buffers[part][0]] -= buffers[part][1]
        self._peaks[name] = best
        return best

    def _allocated(self, flow: Flow, i: Instruction, top: bool) -> list[tuple[str, int, str]]:
        """(buffer, bytes, label) of what an instruction allocates."""
        if i.op == "while":
            carried, constant = flow.by_name[i.operands[0]], self.constant(flow, i)
            out = []
            for number, array in enumerate(i.arrays):
                source = carried.operands[number] if number < len(carried.operands) else ""
                if flow.fresh(source) and array.size > 1 and number not in constant:
                    label = "gradients" if array.dims in self.gradients else "saved by layers"
                    out.append((f"{i.name}#{number}", array.nbytes, label))
            return out
        if i.op in ("call", "conditional"):
            parts = [f"{i.name}#{k}" for k in range(len(i.arrays))]
            return [(p, a.nbytes, "working set") for p, a in zip(parts, i.arrays, strict=True)]
        if i.name not in flow.stored or i.op == "dynamic-update-slice":
            return []
        if top and i.op not in HEAVY and flow.returned(i):
            return []  # written over what was given up
        if not i.arrays:
            return []
        label = "working set"
        if i.arrays[0].dims in self.gradients:
            label = "compute copies" if i.op == "convert" else "gradients"
        elif i.op == "all-gather":
            label = "gathered"
        return [(i.name, i.nbytes, label)]
