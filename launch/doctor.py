"""``steppe doctor``: what this machine has, what will not work here, and the cure.

Every line is one look: fine, worth knowing, or broken. Broken is what the main commands need; it
makes the exit status 1. Nothing is changed or fetched.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from steppe.launch import machine

State = Literal["ok", "note", "broken"]
MARKS = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "broken": "[red]broken[/red]"}
# Of the required packages, those whose import says more than their presence.
IMPORTED = {
    "jax": "jax",
    "flax": "flax",
    "optax": "optax",
    "orbax-checkpoint": "orbax.checkpoint",
    "transformers": "transformers",
}
# package -> (what is absent without it, how to get it).
OPTIONAL = {
    "tensorboardX": ("finetune --tensorboard", "pip install '.[tensorboard]'"),
    "torch": ("the PyTorch side of benchmarks", "pip install '.[parity]'"),
}
# What a fine-tuning of the smallest model takes, bytes.
MEMORY, DISK = 2 * 2**30, 2**30


@dataclass(frozen=True)
class Look:
    """One line.

    Attributes:
      name: what was looked at.
      found: what is there.
      state: see the module.
      cure: what to do, where something is to be done.
    """

    name: str
    found: str
    state: State = "ok"
    cure: str = ""


def main(args: list[str]) -> int:
    """Prints all looks; the status is 1 where something is broken."""
    if args:
        asked = args in (["-h"], ["--help"])
        print("usage: steppe doctor      (no options)", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold", no_wrap=column in ("", "what"))
    found = list(looks())
    for look in found:
        cells = (look.name, look.found, look.cure)
        table.add_row(MARKS[look.state], *map(escape, cells))
    console.print(table, highlight=False)
    broken = [look.name for look in found if look.state == "broken"]
    if broken:
        console.print(f"broken: {', '.join(broken)}", style="red")
        return 1
    return 0


def looks() -> Iterator[Look]:
    """Every look, one after the other; one that fails by itself is a broken one."""
    parts: tuple[Callable[[], Iterator[Look]], ...] = (
        _python, _packages, _devices, _memory, _folders, _assets, _environment
    )  # fmt: skip
    for part in parts:
        try:
            yield from part()
        except Exception as error:
            name = part.__name__.removeprefix("_")
            yield Look(name, f"{type(error).__name__}: {error}", "broken", "report it")


def _python() -> Iterator[Look]:
    version = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info < (3, 11)
    cure = "make the environment with Python 3.11 or newer" if old else ""
    yield Look("python", version, "broken" if old else "ok", cure)


def _packages() -> Iterator[Look]:
    install = "pip install -c constraints.txt .   in the checkout"
    present = []
    for package in required():
        try:
            if package in IMPORTED:
                _import(IMPORTED[package])
            present.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            yield Look(package, "not installed", "broken", install)
        except Exception as error:
            yield Look(package, f"{type(error).__name__}: {error}", "broken", install)
    yield Look("packages", ", ".join(present))
    for package, (what, how) in OPTIONAL.items():
        try:
            yield Look(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            yield Look(package, "not installed", "note", f"for {what}: {how}")


def _import(name: str) -> None:
    """Imports without what packages log meanwhile: that PyTorch is absent has a line of its own."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        importlib.import_module(name)
    finally:
        logging.disable(before)


def required() -> tuple[str, ...]:
    """Names of the packages that steppe depends on, for this Python and system."""
    try:
        lines = metadata.requires("steppe") or []
    except metadata.PackageNotFoundError:  # run from a source tree
        return tuple(IMPORTED)
    plain = [line for line in lines if "extra ==" not in line]
    return tuple(re.split(r"[\s\[(<>=!~;]", line, maxsplit=1)[0] for line in plain)


def _devices() -> Iterator[Look]:
    import jax
    import jax.numpy as jnp

    try:
        devices = jax.devices()
        total = float(jax.jit(lambda x: (x @ x).sum())(jnp.ones((8, 8))))
    except RuntimeError as error:
        cure = "look at JAX_PLATFORMS and the driver; JAX_PLATFORMS=cpu works anywhere"
        yield Look("devices", str(error), "broken", cure)
        return
    kinds = sorted({device.device_kind for device in devices})
    found = f"{len(devices)} x {', '.join(kinds)} ({jax.default_backend()})"
    wrong = total != 512.0
    cure = "a small product came out wrong: the driver or the device is faulty" if wrong else ""
    yield Look("devices", found, "broken" if wrong else "ok", cure)
    idle = _idle_accelerator()
    if jax.default_backend() == "cpu" and idle:
        yield Look("accelerator", f"{idle} is here, and jax does not use it", "note",
                   "pip install '.[cuda13]', or '.[tpu]'")  # fmt: skip
    stats = devices[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "bytes_limit" in stats:
        yield Look("device memory", f"{stats['bytes_limit'] / 2**30:.1f} GiB each")


def _idle_accelerator() -> str:
    """The name of an accelerator that jax may not know of; empty where there is none."""
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        return "an NVIDIA GPU"
    return "a TPU" if Path("/dev/accel0").exists() else ""


def _memory() -> Iterator[Look]:
    hardware = machine.hardware()
    cores, total = hardware["cores"], hardware["memory_gib"]
    low = total is not None and total * 2**30 < MEMORY
    found = f"{cores} cores" + ("" if total is None else f", {total:.1f} GiB")
    cure = "less than the smallest model takes in training; use a larger machine" if low else ""
    yield Look("cores and memory", found, "broken" if low else "ok", cure)


def _folders() -> Iterator[Look]:
    from steppe.data import assets

    cache = assets.root()
    for name, folder, cure in (
        ("cache", cache, "export STEPPE_CACHE=FOLDER with another folder"),
        ("here", Path.cwd(), "change to a folder of your own, or give --out FOLDER"),
    ):
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free
        found = f"{folder}, {free / 2**30:.1f} GiB free"
        if not _writable(there):
            yield Look(name, f"{found}, not writable", "broken", cure)
        elif free < DISK:
            yield Look(name, found, "note", f"less than 1 GiB is left: {cure}")
        else:
            yield Look(name, found)


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _assets() -> Iterator[Look]:
    from steppe.data import assets

    here: list[str] = []
    absent: list[str] = []
    damaged: list[str] = []
    for asset in assets.list():
        try:
            assets.path(asset.name)
            here.append(asset.name)
        except assets.AssetMissing as missing:
            (damaged if "damaged" in str(missing) else absent).append(asset.name)
    if here:
        yield Look("assets here", ", ".join(here))
    if absent:
        # What the first command of the README reads.
        first = [name for name in ("minilm-l6", "vader", "sarcasm") if name in absent]
        cure = f"steppe assets fetch {' '.join(first)}" if first else "steppe assets fetch NAME"
        yield Look("assets absent", ", ".join(absent), "note", cure)
    if damaged:
        cure = f"steppe assets fetch {' '.join(damaged)}"
        yield Look("assets damaged", ", ".join(damaged), "broken", cure)


def _environment() -> Iterator[Look]:
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in flags:
        cure = "unset XLA_FLAGS for work: fake devices share the cores of one"
        yield Look("XLA_FLAGS", flags, "note", cure)
    if "xla_backend_optimization_level" in flags:
        yield Look("XLA_FLAGS", flags, "note", "unset XLA_FLAGS for work: code is not optimised")
    for name in ("JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DISABLE_JIT", "STEPPE_CACHE"):
        value = os.environ.get(name)
        if value is None:
            continue
        slow = name == "JAX_DISABLE_JIT" and value.lower() not in ("", "0", "false")
        cure = "unset JAX_DISABLE_JIT: nothing is compiled" if slow else ""
        yield Look(name, value, "note" if slow else "ok", cure)
