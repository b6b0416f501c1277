"""The loss of a distillation over a large vocabulary: all logits, or some of them at a time.

Four programs give loss and gradient of one divergence from the same hidden states: dense (all
logits of both models), by vocabulary (``distill.chunked_divergence``), by tokens
(``distill.rowwise_loss``), and PyTorch's dense form. They run in turns, in a process a library;
their losses and the length of their gradients must agree. Memory is what the compiler sets aside
beside arguments and results.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steppe.launch.bench import environment, harness
from steppe.launch.bench.environment import plain
from steppe.launch.bench.harness import Protocol
from steppe.launch.bench.worker import Worker, WorkerError

if TYPE_CHECKING:
    from rich.console import RenderableType

OURS = ("dense", "by vocabulary", "by tokens")
TORCH = "torch, dense"
# Time to the dense form; memory to its logits (of one model).
GOALS = (1.3, 0.1)


@dataclass(frozen=True)
class DistillBench:
    """Measure the divergence of large vocabularies.

    Attributes:
      vocabulary: V.
      tokens: N, positions at once.
      width, teacher_width: of the hidden states.
      kind: of the divergence, see ``steppe.train.distill.KINDS``.
      vocab_chunk: columns at a time, by vocabulary.
      token_chunk: tokens at a time, by tokens.
      peer: torch, or none.
      tolerance: largest relative difference of losses and gradients of our programs.
      peer_tolerance: the same of the peer's: PyTorch's gradient of the matrix is off by 2e-3 at
        32,000 entries and 1e-2 at 152,000, where ours are within 1e-6 of float64.
      threads: processor cores; 0 = all that there are.
      protocol: warm-up, rounds and steps.
      seed: of hidden states and matrices.
      out: file for the result as JSON.
    """

    vocabulary: int = 32_000
    tokens: int = 2048
    width: int = 576
    teacher_width: int = 576
    kind: str = "forward_kl"
    vocab_chunk: int = 2048
    token_chunk: int = 64
    peer: str = "torch"
    tolerance: float = 1e-4
    peer_tolerance: float = 5e-2
    threads: int = 0
    protocol: Protocol = field(default_factory=lambda: Protocol(1, 5, 1))
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        names = ("vocabulary", "tokens", "width", "teacher_width", "vocab_chunk", "token_chunk")
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        from steppe.train.distill import KINDS

        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.peer not in ("torch", "none"):
            raise ValueError(f"peer must be 'torch' or 'none', got {self.peer!r}")
        if self.peer == "torch" and self.kind not in ("forward_kl", "reverse_kl"):
            raise ValueError(f"peer='torch' has forward_kl and reverse_kl, not {self.kind!r}")
        environment.check_threads(self.threads)


class Side:
    """Our three programs, in a process of their own (see ``worker``)."""

    def __init__(self, **settings: Any) -> None:
        import jax

        self._arrays = [jax.device_put(x) for x in arrays(settings)]
        self._programs = {name: self._compiled(name, settings) for name in OURS}

    def _compiled(self, name: str, settings: Mapping[str, Any]) -> Any:
        import jax
        import jax.numpy as jnp

        from steppe.train import distill

        kind = settings["kind"]

        def loss(h_s: Any, w_s: Any, h_t: Any, w_t: Any) -> Any:
            s, t = distill.Readout(w_s), distill.Readout(w_t)
            n = len(h_s)
            if name == "dense":
                value = distill.token_divergence(kind, s.logits(h_s), t.logits(h_t))
                return value.sum() / n
            if name == "by vocabulary":
                chunk = settings["vocab_chunk"]
                value = distill.chunked_divergence(kind, h_s, s, h_t, t, vocab_chunk=chunk)
                return value.sum() / n
            ones, labels = jnp.ones(n), jnp.zeros(n, jnp.int32)
            rows = settings["token_chunk"]
            return distill.rowwise_loss(kind, h_s, s, h_t, t, ones, labels, rows=rows).loss / n

        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*self._arrays).compile()

    def turn(self, name: str, steps: int) -> float:
        """Runs a program so many times and returns the seconds."""
        import jax

        start = time.perf_counter()
        for _ in range(steps):
            jax.block_until_ready(self._programs[name](*self._arrays))
        return time.perf_counter() - start

    def check(self, name: str) -> list[float]:
        """Loss, and the lengths of both gradients."""
        import jax.numpy as jnp

        value, grads = self._programs[name](*self._arrays)
        return [float(value), *(float(jnp.sqrt(jnp.square(g).sum())) for g in grads)]

    def memory(self, name: str) -> int:
        """Bytes that a program needs beside its arguments and results."""
        return int(self._programs[name].memory_analysis().temp_size_in_bytes)


class TorchSide:
    """PyTorch's eager form."""

    def __init__(self, **settings: Any) -> None:
        import torch

        h_s, w_s, h_t, w_t = (torch.tensor(x) for x in arrays(settings))
        self._student = [h_s.requires_grad_(), w_s.requires_grad_()]
        self._teacher = [h_t, w_t]
        self._kind = settings["kind"]

    def _step(self) -> Any:
        import torch

        h_s, w_s = self._student
        h_s.grad = w_s.grad = None
        log_q = torch.log_softmax(h_s @ w_s.T, -1)
        with torch.no_grad():
            log_p = torch.log_softmax(self._teacher[0] @ self._teacher[1].T, -1)
        pair = (log_q, log_p) if self._kind == "forward_kl" else (log_p, log_q)
        loss = torch.nn.functional.kl_div(*pair, reduction="sum", log_target=True) / len(h_s)
        loss.backward()
        return loss

    def turn(self, name: str, steps: int) -> float:
        """Runs it so many times and returns the seconds."""
        start = time.perf_counter()
        for _ in range(steps):
            self._step()
        return time.perf_counter() - start

    def check(self, name: str) -> list[float]:
        """Loss, and the lengths of both gradients."""
        loss = float(self._step().detach())
        return [loss, *(float(x.grad.norm()) for x in self._student)]


def arrays(settings: Mapping[str, Any]) -> list[Any]:
    """h_S [N, D], W_S [V, D], h_T, W_T in float32, with logits of a standard deviation of 3."""
    import numpy as np

    rng = np.random.default_rng(settings["seed"])
    found = []
    for width in (settings["width"], settings["teacher_width"]):
        found.append(rng.standard_normal((settings["tokens"], width), np.float32))
        matrix = rng.standard_normal((settings["vocabulary"], width), np.float32)
        found.append(matrix * np.float32(3 / width**0.5))
    return found


def run(config: DistillBench, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures and returns the result; also writes it when ``config.out`` is given.

    Raises:
      harness.Void: the programs do not agree.
      worker.WorkerError: a process failed.
    """
    load = environment.load_average()
    for line in environment.load_lines(load):
        say(line)
    threads = config.threads or environment.cores()
    names = ("vocabulary", "tokens", "width", "teacher_width", "kind", "vocab_chunk")
    settings = {name: getattr(config, name) for name in (*names, "token_chunk", "seed")}
    programs = [*OURS, TORCH] if config.peer == "torch" else list(OURS)
    with (
        Worker(f"{__name__}:Side", settings, threads=threads) as ours,
        Worker(f"{__name__}:TorchSide", settings, threads=threads)
        if config.peer == "torch"
        else _Nobody() as torch,
    ):
        side = {name: torch if name == TORCH else ours for name in programs}
        checked = {name: side[name].call("check", name) for name in programs}
        worst = agree({name: checked[name] for name in OURS}, config.tolerance)
        peer = agree(checked, config.peer_tolerance)
        memory = {name: ours.call("memory", name) for name in OURS}

        def turn(name: str) -> harness.Turn:
            return lambda steps: float(side[name].call("turn", name, steps))

        times = harness.interleave({name: turn(name) for name in programs}, config.protocol)
    logits = 4 * config.tokens * config.vocabulary
    result = {
        "bench": "distill",
        "config": plain(config),
        "threads": threads,
        "load_average": load,
        **environment.environment(),
        "logits": logits,
        "gradient": 4 * config.vocabulary * config.width,
        "worst_difference": worst,
        "peer_difference": peer,
        "programs": {
            name: {
                "seconds": found,
                **harness.spread(found)._asdict(),
                "ratio": harness.ratio(found, times["dense"])._asdict(),
                "memory": memory.get(name),
            }
            for name, found in times.items()
        },
        "goals": GOALS,
        "unsteady": harness.unsteady(times),
        "load_average_after": environment.load_average(),
    }
    if config.out is not None:
        environment.write_json(config.out, result)
    return result


def agree(checked: Mapping[str, list[float]], tolerance: float) -> float:
    """The largest relative difference to the dense program.

    Raises:
      harness.Void: it is above the tolerance, or a number is not finite.
    """
    worst = 0.0
    for name, numbers in checked.items():
        for ours, wanted in zip(numbers, checked["dense"], strict=True):
            away = abs(ours - wanted) / max(abs(wanted), 1e-12)
            if not (math.isfinite(away) and away <= tolerance):
                raise harness.Void(
                    f"{name} gives {ours:.7g}, dense {wanted:.7g}; the comparison is void"
                )
            worst = max(worst, away)
    return worst


class _Nobody:
    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def call(self, *_: Any) -> Any:
        raise WorkerError("there is no peer")


def table(result: Mapping[str, Any]) -> RenderableType:
    """The result for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    config = result["config"]
    title = (
        f"{config['kind']} and its gradient, {config['tokens']:,} tokens x "
        f"{config['vocabulary']:,} entries, {result['threads']} threads"
    )
    grid = Table(title=title, title_justify="left", box=None, padding=(0, 3, 0, 0))
    for number, column in enumerate(("", "s", "range", "to dense", "memory", "of the logits")):
        grid.add_column(column, justify="left" if number == 0 else "right")
    for name, found in result["programs"].items():
        ratio, memory = found["ratio"], found["memory"]
        grid.add_row(
            name,
            f"{found['median']:.3f}",
            f"{found['low']:.3f} to {found['high']:.3f}",
            f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
            "" if memory is None else f"{memory / 2**20:,.0f} MiB",
            "" if memory is None else f"{memory / result['logits']:.2f}",
        )
    slow, share = result["goals"]
    lines = [
        f"goals: {slow:g} times the time, {share:g} of the logits of one model "
        f"({result['logits'] / 2**20:,.0f} MiB; the gradient of the matrix is "
        f"{result['gradient'] / 2**20:,.0f} MiB)",
        f"losses and gradients agree to {result['worst_difference']:.1e}, with the peer to "
        f"{result['peer_difference']:.1e}",
    ]
    lines += [f"warning: {reason}" for reason in result["unsteady"]]
    return Group(grid, *(Text(line) for line in lines))
