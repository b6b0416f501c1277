"""TPU slices by name: how many chips and hosts ``v5p-128`` is, and what GKE calls it.

The number in a name counts chips for v5e and v6e, TensorCores for v4 and v5p (two a chip); see
cloud.google.com/tpu/docs/v5e, /v6e, /v5p and /v4.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple


class Slice(NamedTuple):
    """One slice.

    Attributes:
      name: as gcloud has it, ``v5litepod-16``.
      chips: devices for jax: one a chip.
      hosts: machines, each with ``chips // hosts`` of them; one process a machine.
      node: label cloud.google.com/gke-tpu-accelerator.
      topology: label cloud.google.com/gke-tpu-topology.
      runtime: the TPU VM image that fits.
    """

    name: str
    chips: int
    hosts: int
    node: str
    topology: str
    runtime: str


class _Kind(NamedTuple):
    gcloud: str
    units: int  # of the number in the name, a chip
    flat: bool  # a torus of 2 dimensions, else of 3
    most: int  # chips
    node: str
    runtime: str


_KINDS = {
    "v4": _Kind("v4", 2, False, 4096, "tpu-v4-podslice", "tpu-ubuntu2204-base"),
    "v5e": _Kind("v5litepod", 1, True, 256, "tpu-v5-lite-podslice", "v2-alpha-tpuv5-lite"),
    "v5p": _Kind("v5p", 2, False, 6144, "tpu-v5p-slice", "v2-alpha-tpuv5"),
    "v6e": _Kind("v6e", 1, True, 256, "tpu-v6e-slice", "v2-alpha-tpuv6e"),
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}
_FLAT = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}


def is_slice(name: str) -> bool:
    """Whether a name is meant to be a TPU slice."""
    return re.fullmatch(r"(tpu-)?v\d\w*-\d+", name.lower()) is not None


def parse(name: str) -> Slice:
    """``"v5p-128"`` -> 64 chips on 16 hosts.

    Raises:
      ValueError: an unknown kind, or a size that no slice has; names the next ones.
    """
    kind_name, _, number = name.lower().removeprefix("tpu-").rpartition("-")
    kind = _KINDS.get(_ALIASES.get(kind_name, kind_name))
    if kind is None or not number.isdigit():
        raise ValueError(
            f"accelerator={name!r} is no TPU slice that is known: write KIND-NUMBER with one of "
            f"{', '.join(_KINDS)}"
        )
    if int(number) not in _sizes(kind):
        what = "chips" if kind.units == 1 else "TensorCores, two a chip"
        raise ValueError(
            f"accelerator={name!r}: there is no slice of {number} ({what}); near ones: "
            f"{', '.join(near(kind_name, int(number)))}"
        )
    chips = int(number) // kind.units
    # Single hosts of v5e and v6e have up to 8 chips; everything else has 4 a host.
    hosts = 1 if chips <= (8 if kind.flat else 4) else chips // 4
    topology = _FLAT[chips] if kind.flat else "x".join(map(str, _torus(chips)))
    return Slice(f"{kind.gcloud}-{number}", chips, hosts, kind.node, topology, kind.runtime)


def near(kind: str, number: int, count: int = 3) -> list[str]:
    """Names of the slices of a kind that are closest to a number, by size.

    Raises:
      KeyError: an unknown kind.
    """
    sizes = _sizes(_KINDS[_ALIASES.get(kind, kind)])
    chosen = sorted(sizes, key=lambda size: abs(math.log(size / max(number, 1))))[:count]
    return [f"{kind}-{size}" for size in sorted(chosen)]


def most(kind: str) -> int:
    """Number of the largest slice of a kind.

    Raises:
      KeyError: an unknown kind.
    """
    return max(_sizes(_KINDS[_ALIASES.get(kind, kind)]))


def _sizes(kind: _Kind) -> list[int]:
    if kind.flat:
        return [chips for chips in _FLAT if chips <= kind.most]
    return [chips * kind.units for chips in range(4, kind.most + 1, 4) if _torus(chips)]


@functools.cache
def _torus(chips: int) -> tuple[int, ...]:
    """The most even a x b x c = chips; sides are 2 or multiples of 4. Empty: there is none."""
    if chips == 4:  # a host by itself
        return (2, 2, 1)
    most = round(chips ** (1 / 3))
    for a in (n for n in range(most, 1, -1) if _side(n) and chips % n == 0):
        rest = chips // a
        for b in (n for n in range(math.isqrt(rest), a - 1, -1) if _side(n) and rest % n == 0):
            if _side(rest // b):
                return (a, b, rest // b)
    return ()


def _side(n: int) -> bool:
    return n == 2 or n % 4 == 0
