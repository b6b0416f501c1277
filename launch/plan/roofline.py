"""Time of a step on a named accelerator: the roofline of every kernel, and its collectives.

  kernel:      max(FLOPs / peak, bytes / bandwidth)
  collective:  bytes that a device sends / link, and the time of the hops one after the other
  step:        max(sum of kernels, collectives over data and fsdp) + the other collectives

Gathers of parameters and sums of gradients can run beside products; sums over ``model`` are waited
for. No kernel reaches its roofline, so that this is the least time that the step can take, not the
time that it will.

A collective whose group spans several domains (GPU nodes, TPU slices) is counted as the
hierarchical one: inside a domain first, then 1 / k of it across, with k devices of the group in a
domain. Devices are numbered with the last axis of the mesh innermost.

Williams et al., "Roofline", CACM 2009; the cost of ring collectives as in Thakur et al., IJHPCA
2005.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from steppe.launch.plan.accelerators import Accelerator
from steppe.launch.plan.count import Collective, Counts

# Axes whose collectives a compiler overlaps with products.
OVERLAPPED = ("data", "fsdp")


class Moved(NamedTuple):
    """Collectives of one kind over the same axes: bytes that a device sends, number, seconds."""

    kind: str
    axes: tuple[str, ...]
    sent: float
    calls: int
    seconds: float


class Times(NamedTuple):
    """A step.

    Attributes:
      compute: seconds of all kernels.
      bound: share of ``compute`` that is spent at the peak, the rest waits for memory.
      overlapped, exposed: seconds of collectives beside and between the kernels.
      step: seconds.
      intensity: FLOPs of products a byte of memory traffic.
      collectives: what moves.
    """

    compute: float
    bound: float
    overlapped: float
    exposed: float
    step: float
    intensity: float
    collectives: tuple[Moved, ...]

    @property
    def efficiency(self) -> float:
        """Share of a step in which the kernels run: what more devices could at most cost."""
        return self.compute / self.step if self.step else 1.0


def times(
    counts: Counts, accelerator: Accelerator, mesh: Mapping[str, int], slices: int = 1
) -> Times:
    """Predicts a step.

    Args:
      mesh: axis -> size, outermost first.
      slices: equal parts of the devices that only the network joins.
    """
    compute = peak = traffic = 0.0
    for flops, nbytes, dtype, number in counts.kernels:
        work, wait = flops / accelerator.rate(dtype), nbytes / accelerator.bandwidth
        compute += number * max(work, wait)
        peak += number * work if work >= wait else 0.0
        traffic += number * nbytes
    if accelerator.exp:
        compute += counts.exponentials / accelerator.exp
    sums: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for one in counts.collectives:
        seconds = one.times * duration(one, accelerator, mesh, slices)
        entry = sums.setdefault((one.kind, one.axes), [0.0, 0, 0.0])
        entry[0] += one.sent * one.times
        entry[1] += one.times
        entry[2] += seconds
    moved = tuple(Moved(kind, axes, s, int(n), t) for (kind, axes), (s, n, t) in sums.items())
    beside = sum(m.seconds for m in moved if set(m.axes) <= set(OVERLAPPED))
    between = sum(m.seconds for m in moved) - beside
    return Times(
        compute,
        peak / compute if compute else 0.0,
        beside,
        between,
        max(compute, beside) + between,
        counts.flops / traffic if traffic else 0.0,
        tuple(sorted(moved, key=lambda m: -m.seconds)),
    )


def duration(
    one: Collective, accelerator: Accelerator, mesh: Mapping[str, int], slices: int = 1
) -> float:
    """Seconds of one collective."""
    near, far = parts(one.axes, mesh, min(accelerator.domain, math.prod(mesh.values()) // slices))
    seconds = one.sent / accelerator.link if near > 1 else 0.0
    seconds += one.sent / near / accelerator.network if far > 1 else 0.0
    turns = 2 if one.kind == "all-reduce" else 1
    return seconds + turns * accelerator.steps(one.devices) * accelerator.hop


def parts(axes: tuple[str, ...], mesh: Mapping[str, int], domain: int) -> tuple[int, int]:
    """Of a group over some axes: its devices within a domain, and the domains that it spans."""
    inner, near, far = 1, 1, 1
    for name, size in reversed(tuple(mesh.items())):
        fits = max(1, min(size, domain // inner))
        fits = math.gcd(fits, size)
        if name in axes:
            near *= fits
            far *= size // fits
        inner *= size
    return near, far


def to_dict(found: Times) -> dict[str, Any]:
    """As JSON values."""
    return {
        **{name: getattr(found, name) for name in Times._fields if name != "collectives"},
        "efficiency": found.efficiency,
        "collectives": [m._asdict() for m in found.collectives],
    }
