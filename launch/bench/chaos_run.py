"""The run that ``chaos`` kills: FSAM + distillation + LoRA on a tiny language model.

A process of its own, one of several where it is asked for; it ends itself by a signal that a thread
sends at a moment that was drawn before. ``python -m steppe.launch.bench.chaos_run SETTINGS`` with
the fields of ``Settings`` as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steppe.launch.pods import local, rank, stop

ROWS, LENGTH, VOCAB = 16, 8, 32
WHEN = ("step", "save", "restore")


@dataclass(frozen=True)
class Settings:
    """One start of the run.

    Attributes:
      folder: of the run.
      steps, save_every: of all starts.
      processes, devices: ranks, and devices of each.
      when: during what it is killed: step, save or restore; empty = not at all.
      at: the first step at which that may be.
      delay: seconds from the begin of the step or of the restore, or from the moment when a
        checkpoint that is being written appears on disk.
      signal: SIGTERM or SIGKILL.
      rank: which process is sent it.
    """

    folder: str
    steps: int
    save_every: int
    processes: int = 1
    devices: int = 1
    when: str = ""
    at: int = 0
    delay: float = 0.0
    signal: str = "SIGKILL"
    rank: int = 0


class Numbered:
    """Endless batches, each a function of its number.

    Args:
      rows: numbers of the rows of every batch that this process holds.
    """

    def __init__(self, rows: np.ndarray) -> None:
        self._rows, self._number = rows, 0

    def __iter__(self) -> Numbered:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        self._number += 1
        rng = np.random.default_rng(self._number)
        mask = (np.arange(LENGTH) < rng.integers(3, LENGTH + 1, (ROWS, 1))).astype(np.int32)
        # A text counts upwards from anywhere, so that there is something to learn.
        ids = 1 + (rng.integers(0, VOCAB - 1, (ROWS, 1)) + np.arange(LENGTH)) % (VOCAB - 1)
        ids = ids.astype(np.int32) * mask
        counted = mask.astype(np.float32) * (np.arange(LENGTH) > 0)
        made = {"input_ids": ids, "attention_mask": mask, "labels": ids, "label_mask": counted}
        return {name: value[self._rows] for name, value in made.items()}

    def get_state(self) -> dict[str, int]:
        """Batches given so far."""
        return {"number": self._number}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes on behind so many."""
        self._number = state["number"]


class Killer:
    """Sends this process its signal, once; a watcher of the loop."""

    def __init__(self, settings: Settings, checkpoints: Path) -> None:
        import jax

        self._settings, self._checkpoints = settings, checkpoints
        self._armed = bool(settings.when) and settings.rank == jax.process_index()

    def restoring(self) -> None:
        """A restore begins."""
        if self._armed and self._settings.when == "restore":
            self._after(lambda: None)

    def before(self, step: int, state: Any) -> None:
        """A step begins; the next save does not come before it."""
        if self._armed and step >= self._settings.at and self._settings.when != "restore":
            self._after(self._saving if self._settings.when == "save" else lambda: None)

    def after(self, step: int) -> None:
        """Nothing."""

    def _saving(self) -> None:
        from steppe.train.checkpoint import PARTIAL

        while not any(PARTIAL in name for name in _names(self._checkpoints)):
            time.sleep(0.0005)

    def _after(self, moment: Callable[[], None]) -> None:
        self._armed = False

        def kill() -> None:
            moment()
            time.sleep(self._settings.delay)
            os.kill(os.getpid(), getattr(signal, self._settings.signal))

        threading.Thread(target=kill, daemon=True).start()


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def train(settings: Settings) -> Any:
    """Goes on with the run from what its folder holds; returns the final state.

    Raises:
      Interrupted: after SIGTERM; saved.
    """
    import jax
    import optax

    from steppe import optim
    from steppe.launch.pieces import rows_here
    from steppe.models.decoder import DecoderConfig
    from steppe.models.heads import HeadConfig
    from steppe.models.overlays import lora
    from steppe.train import checkpoint, distill, goodput, loop, mesh, metrics, step

    sizes: dict[str, Any] = {"vocab_size": VOCAB, "heads": 2, "kv_heads": 2, "ffn_width": 32}
    sizes |= {"layers": 2, "positions": 2 * LENGTH, "head": HeadConfig("lm")}
    bare, taught = (DecoderConfig("llama", width=w, **sizes).build() for w in (16, 24))
    base, own = (jax.jit(m.init)(jax.random.key(i)) for i, m in enumerate((bare, taught)))
    student = lora.overlay(rank=4, sites=("attn.q", "attn.v", "ffn.in"), drop=0.1).bind(
        bare, frozen=base
    )
    model = distill.with_teacher(student, distill.Teacher(taught, own))
    objective = distill.kd(student, distill.Teacher(taught), ratio=0.5)
    # A large epsilon: where a gradient is rounding, Adam would make a whole step of it.
    tx = optim.fsam(optax.adamw(1e-3, eps=1e-3), 0.05, keep_ratio=0.5, refresh_every=20)
    count = settings.processes * settings.devices
    plan = mesh.plan({"data": count}, model.axes, devices=jax.devices()[:count])
    state = step.init(jax.random.key(2), model, tx, plan)
    batches = Numbered(rows_here(plan, ROWS))
    folder = Path(settings.folder)
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints", manifest={"run": "chaos"})
    watch = Killer(settings, checkpoints.directory)
    lines = metrics.JsonLines(folder / "metrics.jsonl")
    writers = [lines] if rank.lead() else []
    watchers: list[Any] = [watch]
    if checkpoints.latest is not None:
        watch.restoring()
        state = loop.resume(state, batches, checkpoints, writers)
    elif rank.lead():
        lines.truncate(-1)
    if rank.lead():
        record = goodput.Record(folder)
        facts = {"processes": settings.processes, "devices": settings.devices}
        record.begin(int(state.step), **facts)
        watchers.append(record)
    return loop.run(
        step.make(objective, tx, plan),
        state,
        batches,
        steps=settings.steps,
        checkpoints=checkpoints,
        save_every=settings.save_every,
        log_every=1,
        writers=writers,
        watchers=watchers,
    )


def main(text: str) -> int:
    """One start as a process; returns its exit status."""
    settings = Settings(**json.loads(text))
    if settings.processes > 1 and rank.INDEX not in os.environ:
        command = [sys.executable, "-m", "steppe.launch.bench.chaos_run", text]
        return local.run(command, local.Options(settings.processes, settings.devices))
    with stop.requeued():
        rank.join()
        try:
            train(settings)
        except KeyboardInterrupt as stopped:
            print(stopped, file=sys.stderr)
            return int(getattr(stopped, "status", 130))
    return 0


def command(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """The words of a start, and what its environment has beside ours."""
    text = json.dumps(dataclasses.asdict(settings))
    options = local.Options(1, settings.devices)
    given = os.environ.get("XLA_FLAGS", "")
    more = [flag for flag in FLAGS if flag.split("=")[0] not in given]
    own = local.environment(options, 0, 0, {"XLA_FLAGS": " ".join([given, *more])})
    env = {name: own[name] for name in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return [sys.executable, "-m", "steppe.launch.bench.chaos_run", text], env


# Fake devices on few cores: a program that comes out of the compilation cache starts its
# independent collectives in an order of its own on every device, which this scheduler prevents, and
# threads may join a collective late.
FLAGS = (
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)

if __name__ == "__main__":
    status = main(sys.argv[1])
    if rank.joined() is not None:
        rank.leave(status)
    sys.exit(status)
