"""Accelerators: peak rates, memory and links, as their makers publish them.

Sources. TPUs: Google Cloud, "TPU v5e", "TPU v5p" and "TPU v6e"
(docs.cloud.google.com/tpu/docs/v5e, /v5p-training, /v6e): bf16 peak, HBM, the bidirectional
interconnect bandwidth of a chip and its ports, the network of a chip or host. A mesh axis is taken
to lie along one dimension of the torus: a chip sends through two ports, so that
``link`` = bidirectional bandwidth / ports. GPUs: NVIDIA's datasheets "H100 Tensor Core GPU" (SXM),
"H200 Tensor Core GPU" and "DGX B200" (values of eight GPUs, divided by 8): dense bf16, which is
half of the figure with sparsity; NVLink counts both directions, ``link`` is one of them. Eight GPUs
share an NVLink domain; beyond it each has one 400 Gb/s adapter (DGX H100 and DGX B200 user guides).
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from steppe.launch.pods import slices

GB = 1e9


@dataclass(frozen=True)
class Accelerator:
    """One device as jax counts them.

    Attributes:
      name: short name.
      peak: dense bf16 matrix products, FLOP/s.
      peak32: float32 ones at jax's default precision, FLOP/s: TPUs multiply in one pass of
        bf16, NVIDIA's use TF32.
      memory: bytes.
      bandwidth: of that memory, bytes/s.
      link: what a device sends to others of its domain along one mesh axis, bytes/s.
      network: the same to devices of another domain (TPU slice, GPU node), bytes/s.
      domain: most devices that the fast links join.
      hop: seconds that a message takes from one device to the next; an assumption, which only
        matters to small collectives.
      torus: dimensions of the links' torus, along which a collective goes one after the other;
        0 = switches, through which it goes as a tree.
      units: what the number in a name such as v5p-128 counts, a device: a v5p chip is one
        device of two TensorCores, and its names count TensorCores.
      exp: elementwise exponentials a second where they were measured, 0 = not a limit.
    """

    name: str
    peak: float
    peak32: float
    memory: float
    bandwidth: float
    link: float
    network: float
    domain: int
    hop: float = 1e-6
    torus: int = 0
    units: int = 1
    exp: float = 0.0

    @property
    def ridge(self) -> float:
        """FLOPs a byte above which bf16 products are bound by compute."""
        return self.peak / self.bandwidth

    def steps(self, devices: int) -> int:
        """Messages one after the other in a collective of so many devices."""
        if self.torus:
            return self.torus * (math.ceil(devices ** (1 / self.torus) - 1e-9) - 1)
        return math.ceil(math.log2(devices))

    def rate(self, dtype: str) -> float:
        """Peak for products of this dtype, FLOP/s."""
        return self.peak if dtype in ("bf16", "f16") else self.peak32


ACCELERATORS: dict[str, Accelerator] = {
    a.name: a
    for a in (
        # 197 TFLOP/s, 16 GB, 819 GB/s; 400 GB/s by 4 ports; 2 x 100 Gb/s a host of 8 chips.
        Accelerator("v5e", 197e12, 197e12, 16 * GB, 819 * GB, 100 * GB, 3.125 * GB, 256, torus=2),
        # 459 TFLOP/s, 95 GB, 2,765 GB/s; 1,200 GB/s by 6 ports; 50 Gb/s a chip.
        Accelerator(
            "v5p", 459e12, 459e12, 95 * GB, 2765 * GB, 200 * GB, 6.25 * GB, 6144, torus=3, units=2
        ),
        # 918 TFLOP/s, 32 GB, 1,638 GB/s; 800 GB/s by 4 ports; 4 x 200 Gb/s a host of 8 chips.
        Accelerator("v6e", 918e12, 918e12, 32 * GB, 1638 * GB, 200 * GB, 12.5 * GB, 256, torus=2),
        # 989 and TF32 495 TFLOP/s, 80 GB, 3.35 TB/s, NVLink 900 GB/s.
        Accelerator("h100", 989e12, 495e12, 80 * GB, 3350 * GB, 450 * GB, 50 * GB, 8, 2e-6),
        # The same with 141 GB at 4.8 TB/s.
        Accelerator("h200", 989e12, 495e12, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, 8, 2e-6),
        # DGX: 36 PFLOP/s sparse bf16 and 18 TF32, 1,440 GB, 64 TB/s, NVLink 1.8 TB/s a GPU.
        Accelerator("b200", 2250e12, 1125e12, 180 * GB, 8000 * GB, 900 * GB, 50 * GB, 8, 2e-6),
    )
}
CPU = "cpu"
NAMES = (*ACCELERATORS, CPU)
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e"}


@dataclass(frozen=True)
class Place:
    """What ``--on`` names.

    Attributes:
      name: of the accelerator, or "cpu".
      devices: how many, as jax counts them.
    """

    name: str
    devices: int

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator; this machine is measured for it (see ``calibrate``)."""
        if self.name == CPU:
            from steppe.launch.plan import calibrate

            return calibrate.cpu(self.devices)
        return ACCELERATORS[self.name]


def parse(text: str) -> Place:
    """``"v5p-128"`` -> 64 devices of v5p (128 TensorCores), ``"h100-8"``, ``"cpu"``.

    Raises:
      ValueError: an unknown accelerator (the nearest is named), or a number that is none, or
        not a multiple of what a device has.
    """
    word = text.strip().lower().replace("tpu-", "").replace("tpu", "")
    found = re.fullmatch(r"([a-z]\w*?)(?:[-:x](-?\w+))?", word)
    name, number = (found.group(1), found.group(2)) if found else (word, None)
    name = ALIASES.get(name, name)
    if name not in NAMES:
        near = difflib.get_close_matches(name, (*NAMES, *ALIASES), 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"unknown accelerator {name!r} in on={text!r}{hint} (known: {', '.join(NAMES)}; "
            "write such as v5p-128, h100-8 or cpu)"
        )
    units = 1 if name == CPU else ACCELERATORS[name].units
    if number is None:
        return Place(name, 1)
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"on={text!r} must end with a number >= 1 of devices, such as {name}-8")
    count = int(number)
    if count % units:
        raise ValueError(
            f"on={text!r}: the number counts TensorCores, and a {name} device has {units}: use "
            f"{' or '.join(slices.near(name, count, 2))}"
        )
    return Place(name, count // units)


def check_slices(place: Place, count: int) -> None:
    """Whether so many slices of TPUs exist; one device by itself is planned as such.

    Raises:
      ValueError: there is no slice of that size; names what is near.
    """
    accelerator = ACCELERATORS.get(place.name)
    if accelerator is None or not accelerator.torus or place.devices == 1:
        return
    number = place.devices * accelerator.units // count
    names = slices.near(place.name, number)
    if f"{place.name}-{number}" in names:
        return
    largest = slices.most(place.name)
    if number > largest:
        cure = f"the largest slice is {place.name}-{largest}: give --slices for several"
    else:
        cure = f"near ones: {', '.join(names)}"
    text = f"{place.name}-{place.devices * accelerator.units}"
    each = f", {number} in each of {count} slices" if count > 1 else ""
    raise ValueError(f"on={text!r}{each}: there is no such slice; {cure}")
