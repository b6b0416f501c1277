"""Merging speed: eight task vectors of a vision transformer against PyTorch and the memory.

GB/s counts what a merge has to move at least: N task vectors and the base in, one model out, in
float32. It stands beside the GB/s of a copy and a triad by the same threads. Both sides work on
the same tensors, in turns, and their results are compared. The streamed merge runs in a process
whose address space may grow by less than all inputs take together; Concrete's meta steps are
those of a text encoder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steppe.launch.bench import environment, harness
from steppe.launch.bench.environment import plain
from steppe.launch.bench.harness import Protocol
from steppe.launch.bench.merge_sides import METHODS, PEERS, tensors
from steppe.launch.bench.shapes import Shapes
from steppe.launch.bench.worker import Worker, WorkerError

if TYPE_CHECKING:
    from rich.console import RenderableType

# times as fast as the library; share of the memory's bandwidth
GOAL, SHARE = 3.0, 0.5
TOLERANCE = {"dare": 0.01}
STREAMED = ("average", "task-arithmetic", "ties", "dare")


@dataclass(frozen=True)
class MergeBench:
    """Measure merging; the defaults are 8 task vectors of a ViT-B/32 trunk, 87 M parameters.

    Attributes:
      width, layers, ffn_width, patch, positions: of the vision transformer.
      tasks: N.
      methods: those to measure; none = none.
      peers: torch: the plain formulas; fusion_bench: the library's functions, where its folder
        is on PYTHONPATH. A peer that is not installed is left out and named.
      triad: entries of the arrays that the bandwidth is measured on.
      stream: methods that are streamed from disk to disk under a memory limit; none = none.
      room: bytes by which the streaming process may grow; 0 = a quarter of all inputs.
      scratch: folder for the streamed models; empty = the system's.
      meta: encoder of the Concrete steps; meta_steps = 0: none.
      meta_tasks, meta_batch, meta_length, meta_steps: of a round of them.
      threads: processor cores; 0 = all that there are.
      protocol: warm-up, rounds and steps.
      seed: of everything that is made.
      out: file for the result as JSON.
    """

    width: int = 768
    layers: int = 12
    ffn_width: int = 3072
    patch: int = 32
    positions: int = 50
    tasks: int = 8
    methods: tuple[str, ...] = METHODS
    peers: tuple[str, ...] = PEERS
    triad: int = 50_000_000
    stream: tuple[str, ...] = STREAMED
    room: int = 0
    scratch: Path | None = None
    meta: Shapes = field(default_factory=Shapes)
    meta_tasks: int = 4
    meta_batch: int = 16
    meta_length: int = 32
    meta_steps: int = 5
    threads: int = 0
    protocol: Protocol = field(default_factory=lambda: Protocol(1, 5, 1))
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        least = dict.fromkeys(("width", "layers", "ffn_width", "patch", "positions"), 1)
        least |= {"tasks": 2, "triad": 1, "room": 0, "meta_steps": 0}
        least |= dict.fromkeys(("meta_tasks", "meta_batch", "meta_length"), 1)
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be >= {low}, got {getattr(self, name)}")
        for name, known in (("methods", METHODS), ("peers", PEERS), ("stream", STREAMED)):
            for one in getattr(self, name):
                if one not in known:
                    raise ValueError(f"{name} must be of {', '.join(known)}, got {one!r}")
        environment.check_threads(self.threads)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one model."""
        return tensors(self.width, self.layers, self.ffn_width, self.patch, self.positions)


def run(config: MergeBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures and returns the result; also writes it when ``config.out`` is given.

    Raises:
      harness.Void: a peer's result differs from ours.
      worker.WorkerError: a process failed.
    """
    load = environment.load_average()
    for line in environment.load_lines(load):
        say(line)
    threads = config.threads or environment.cores()
    result: dict[str, Any] = {
        "bench": "merge",
        "config": plain(config),
        "threads": threads,
        "load_average": load,
        **environment.environment(),
        "goal": GOAL,
        "share": SHARE,
    }
    result |= _in_memory(config, threads, say)
    if config.stream:
        result["streamed"] = _streamed(config, threads, say)
    if config.meta_steps:
        result["meta"] = _meta(config, threads)
    result["load_average_after"] = environment.load_average()
    if config.out is not None:
        environment.write_json(config.out, result)
    return result


def _in_memory(config: MergeBench, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    arguments = {
        "shapes": {name: list(shape) for name, shape in config.tensors.items()},
        "tasks": config.tasks,
        "seed": config.seed,
        "threads": threads,
    }
    rows: dict[str, Any] = {}
    left_out: list[str] = []
    steady: dict[str, list[float]] = {}
    target = "steppe.launch.bench.merge_sides:Side"
    with Worker(target, arguments, threads=threads) as worker:
        facts = worker.call("facts")
        speed = worker.call("bandwidth", config.triad, max(config.protocol.rounds, 3))
        sides = {"steppe": list(METHODS)}
        for peer in config.peers:
            try:
                sides[peer] = worker.call("open", peer)
            except WorkerError as error:
                left_out.append(f"{peer}: {str(error).splitlines()[-1]}")
        ceiling = max(max(speed["triad"]), max(speed["copy"]))
        for method in config.methods:
            present = [side for side in sides if method in sides[side]]
            if "fusion_bench" in present and method == "ties":
                need, free = 5 * facts["bytes"], worker.call("available")
                if free and free < need:  # copies of all task vectors at once
                    present.remove("fusion_bench")
                    left_out.append(
                        f"fusion_bench's ties takes about {need / 1e9:.0f} GB, "
                        f"{free / 1e9:.0f} GB are free"
                    )
            times: dict[str, list[float]] = {side: [] for side in present}
            for side in present:
                worker.call("turn", side, method, max(config.protocol.warmup, 1))
            differences = {}
            for side in present[1:]:
                found = worker.call("difference", side, method)
                if not found < TOLERANCE.get(method, 1e-5):
                    raise harness.Void(f"{side}'s {method} differs from ours by {found:.2e}")
                differences[side] = found
            for _ in range(config.protocol.rounds):
                for side in present:
                    seconds = float(worker.call("turn", side, method, config.protocol.steps))
                    times[side].append(seconds / config.protocol.steps)
            row: dict[str, Any] = {"differences": differences}
            for side, found in times.items():
                rate = harness.spread([facts["bytes"] / t / 1e9 for t in found])
                row[side] = {"seconds": found, "gigabytes_a_second": rate._asdict()}
                if side != "steppe":
                    row[side]["speedup"] = harness.ratio(found, times["steppe"])._asdict()
                steady[f"{side}'s {method}"] = found
            row["of_bandwidth"] = row["steppe"]["gigabytes_a_second"]["median"] / ceiling
            rows[method] = row
            rate = row["steppe"]["gigabytes_a_second"]["median"]
            say(f"{method}: {rate:.2f} GB/s, {row['of_bandwidth']:.0%} of the bandwidth")
        peak = worker.call("peak_memory")
    return {
        **facts,
        "bandwidth": {name: harness.spread(found)._asdict() for name, found in speed.items()},
        "methods": rows,
        "left_out": left_out,
        "unsteady": harness.unsteady(steady),
        "peak_memory": peak,
    }


_STREAM = """
import json, resource, sys, time
import jax
from steppe.launch.bench import environment
from steppe.train.merge import stream
told = json.loads(sys.argv[1])
methods = {
    "average": stream.Average(),
    "task-arithmetic": stream.TaskArithmetic(),
    "ties": stream.Ties(),
    "dare": stream.Dare(),
}
method = methods[told["method"]]
small = told["small"]
# Compiled first: the compiler's memory is not what is measured.
stream.merge(method, small[1:], told["out"] + "-warm", base=small[0])
size = lambda: int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, held = size(), resident()
limit = before + told["room"]
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
begin = time.perf_counter()
done = stream.merge(method, told["models"], told["out"], base=told["base"])
seconds = time.perf_counter() - begin
peak = environment.peak_memory()
print(json.dumps({
    "seconds": seconds, "limit": limit, "before": before, "resident_before": held,
    "peak_memory": peak, "grown": max(peak - held, 0), "tensors": done.tensors,
}))
"""


def _streamed(config: MergeBench, threads: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Every method from disk to disk, in a process with a limit on its memory."""
    import os

    import numpy as np

    found: dict[str, Any] = {}
    entries = sum(int(np.prod(shape)) for shape in config.tensors.values())
    inputs = 4 * entries * (config.tasks + 1)
    room = config.room or inputs // 4
    with tempfile.TemporaryDirectory(prefix="steppe-bench-", dir=config.scratch) as scratch:
        root = Path(scratch)
        folders = [_write(root / f"m{i}", config, i) for i in range(config.tasks + 1)]
        small = [_write(root / f"s{i}", config, i, pieces=True) for i in range(config.tasks + 1)]
        for method in config.stream:
            told = {
                "method": method,
                "base": folders[0],
                "models": folders[1:],
                "small": small,
                "out": str(root / f"out-{method}"),
                "room": room,
            }
            env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            command = [sys.executable, "-c", _STREAM, json.dumps(told)]
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            if done.returncode:
                raise WorkerError(f"streamed {method} failed:\n{done.stderr[-2000:]}")
            row = json.loads(done.stdout.strip().splitlines()[-1])
            row["gigabytes_a_second"] = 4 * entries * (config.tasks + 2) / row["seconds"] / 1e9
            found[method] = row
            say(
                f"streamed {method}: {row['gigabytes_a_second']:.2f} GB/s, grew by "
                f"{row['grown'] / 2**20:,.0f} MiB of the {room / 2**20:,.0f} allowed"
            )
    return {"inputs": inputs, "room": room, "methods": found}


def _write(folder: Path, config: MergeBench, number: int, pieces: bool = False) -> str:
    """A folder with a made model, every layer a tensor of its own; or one of a piece's size."""
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng([config.seed, number])
    base = np.random.default_rng([config.seed, 0])
    shapes: dict[str, tuple[int, ...]] = {"t": ((1 << 20) + 300,)} if pieces else {}
    for name, shape in () if pieces else config.tensors.items():
        if not name.startswith("layers/"):
            shapes[name.replace("/", ".")] = shape
            continue
        for layer in range(shape[0]):
            inner = name.removeprefix("layers/").replace("/", ".")
            shapes[f"encoder.layer.{layer}.{inner}"] = shape[1:]
    tensors = {}
    for name, shape in shapes.items():
        value = 0.02 * base.standard_normal(shape, np.float32)
        if number:
            value += np.float32(2e-3) * rng.standard_normal(shape, np.float32)
        tensors[name] = value
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


class Meta:
    """Concrete on random tokens, in a process of its own."""

    def __init__(self, shapes: Mapping[str, int], tasks: int, batch: int, length: int) -> None:
        import jax
        import numpy as np

        from steppe.train.merge import adaptive, concrete, heads

        model = Shapes(**shapes).config().build()
        whole = jax.jit(model.init)(jax.random.key(0))
        self._theta0, head = heads.split(whole)
        self._taus = jax.tree.map(
            lambda x: 1e-3 * jax.random.normal(jax.random.key(1), (tasks, *x.shape)), self._theta0
        )
        objective = adaptive.entropies(model, [{"head": head}] * tasks)
        rng = np.random.default_rng(0)
        self._batches = tuple(
            {
                "input_ids": rng.integers(0, shapes["vocab_size"], (batch, length), np.int32),
                "attention_mask": np.ones((batch, length), np.int32),
            }
            for _ in range(tasks)
        )
        cfg = concrete.ConcreteConfig()
        shared: dict[str, Any] = {"theta0": self._theta0, "entropy_fn": objective, "cfg": cfg}
        total = jax.tree.map(lambda x: x.sum(0, keepdims=True), self._taus)
        key = jax.random.key(2)
        pair = (self._batches, self._batches)
        self._steps: dict[str, Callable[[Any], Any]] = {
            "concrete-ta": lambda s: concrete.arithmetic_step(
                s, self._batches, key, total=total, **shared
            ),
            "concrete-adamerging": lambda s: concrete.meta_step(
                s, pair, key, taus=self._taus, **shared
            ),
        }
        self._states = {
            "concrete-ta": concrete.mask_init(self._taus, cfg),
            "concrete-adamerging": concrete.mask_init(self._taus, cfg, "layer"),
        }

    def turn(self, name: str, steps: int) -> float:
        """Takes so many steps and returns the seconds."""
        import time

        import jax

        start = time.perf_counter()
        for _ in range(steps):
            self._states[name], _ = self._steps[name](self._states[name])
        jax.block_until_ready(self._states[name].logits)
        return time.perf_counter() - start

    def peak_memory(self) -> int:
        """Largest resident memory of this process, bytes."""
        return environment.peak_memory()


def _meta(config: MergeBench, threads: int) -> dict[str, Any]:
    arguments = {
        "shapes": plain(config.meta),
        "tasks": config.meta_tasks,
        "batch": config.meta_batch,
        "length": config.meta_length,
    }
    with Worker(f"{__name__}:Meta", arguments, threads=threads) as worker:
        names = ("concrete-ta", "concrete-adamerging")
        for name in names:
            worker.call("turn", name, 1)
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(config.protocol.rounds):
            for name in names:
                times[name].append(float(worker.call("turn", name, config.meta_steps)))
        peak = worker.call("peak_memory")
    steps = {name: [config.meta_steps / t for t in found] for name, found in times.items()}
    rates = {name: harness.spread(found)._asdict() for name, found in steps.items()}
    return {"steps_a_second": rates, "peak_memory": peak, "unsteady": harness.unsteady(times)}


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    config = result["config"]
    title = (
        f"{config['tasks']} task vectors of {result['entries'] / 1e6:.1f} M entries, "
        f"{result['threads']} threads"
    )
    peers = [peer for peer in PEERS if any(peer in row for row in result["methods"].values())]
    grid = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    heads = ["", "GB/s", "range", "of memory"]
    for number, head in enumerate([*heads, *peers]):
        grid.add_column(head, justify="left" if number == 0 else "right", no_wrap=True)
    for name, row in result["methods"].items():
        rate = row["steppe"]["gigabytes_a_second"]
        cells = [f"{rate['median']:.2f}", f"{rate['low']:.2f} to {rate['high']:.2f}"]
        cells.append(f"{row['of_bandwidth']:.0%}")
        for peer in peers:
            other = row.get(peer)
            if other:
                rate = other["gigabytes_a_second"]["median"]
                cells.append(f"{other['speedup']['median']:.2f} ({rate:.2f})")
            else:
                cells.append("")
        grid.add_row(name, *cells)
    speed = result["bandwidth"]
    lines = [
        "a peer: how many times as fast ours is (GB/s of the peer)",
        f"bandwidth: copy {speed['copy']['median']:.1f}, triad {speed['triad']['median']:.1f} "
        f"GB/s; goals: {result['goal']:g} times as fast as a peer, {result['share']:.0%} of it",
        f"peak memory {result['peak_memory'] / 2**20:,.0f} MiB, the peers' included",
    ]
    streamed = result.get("streamed")
    if streamed:
        lines.append(
            f"streamed, {streamed['inputs'] / 2**20:,.0f} MiB of inputs, at most "
            f"{streamed['room'] / 2**20:,.0f} MiB more than before:"
        )
        for name, row in streamed["methods"].items():
            lines.append(
                f"  {name}: {row['gigabytes_a_second']:.2f} GB/s, grew by "
                f"{row['grown'] / 2**20:,.0f} MiB"
            )
    for name, rate in result.get("meta", {}).get("steps_a_second", {}).items():
        lines.append(
            f"{name}: {rate['median']:.2f} steps a second ({rate['low']:.2f} to {rate['high']:.2f})"
        )
    reasons = [*result["unsteady"], *result.get("meta", {}).get("unsteady", [])]
    lines += [f"left out: {reason}" for reason in result["left_out"]]
    lines += [f"warning: {reason}" for reason in reasons]
    return Group(grid, *(Text(line) for line in lines))
