"""Settings of ``steppe continual``."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from steppe.launch.config import DataConfig, FinetuneConfig, OptimConfig

METHODS = ("sequential", "o-lora", "incremental", "replay")
Method = Literal["sequential", "o-lora", "incremental", "replay"]
# What may change when a run is gone on with: more rows, not other ones.
GROWS = ("out", "method", "seeds", "resume")


def short(address: str) -> str:
    """The last part of an address, which names the task; of a file without its ending."""
    kind, _, place = address.partition(":")
    return Path(place).stem if kind == "file" else place.rstrip("/").split("/")[-1]


@dataclass(frozen=True)
class ContinualConfig:
    """``steppe continual``: one model learns several tasks one after the other.

    After each task all are scored on their test splits. Methods, of equal rank: sequential (one
    LoRA goes on), o-lora (a LoRA a task, orthogonal to the frozen ones before), incremental
    (o-lora without the penalty), replay (sequential, with examples of the earlier tasks).

    Attributes:
      model: model folder, or ``asset:NAME``; an encoder or a decoder.
      tasks: addresses of the data in the order in which they are learnt.
      method: one or several, a row of the table each.
      seeds: of head, LoRA, order and dropout.
      out: folder for stages.jsonl, results.json, table.md, and a folder for every method and
        seed with its metrics.jsonl and the delta of its last finished task.
      data: settings of all tasks' data, such as ``--data.limit`` training examples and
        ``--data.eval-limit`` test examples of each; its source is not used.
      optim: AdamW, which begins anew with every task; the rate is constant.
      epochs: over each task's training examples (for replay, over those and the memory).
      batch_size: examples an update.
      heads: own = every task has a head of its own and is known at test; shared = one head for
        the classes of all tasks, those of equal names being the same class.
      rank, alpha, sites, drop: of every LoRA.
      lambda1, lambda2, power: o-lora: weight of the overlaps, of the norms, and the power of the
        overlaps (1 = the published code, 2 = the paper).
      memory: replay: examples that are kept of every task.
      log_every: steps between two rows of metrics.jsonl.
      resume: go on with what ``out`` holds; methods and seeds may be added.
    """

    model: str = "asset:minilm-l6"
    tasks: tuple[str, ...] = ()
    method: tuple[Method, ...] = ("sequential", "o-lora")
    seeds: tuple[int, ...] = (0,)
    out: str = "runs/continual"
    data: DataConfig = field(default_factory=lambda: DataConfig(source="", eval_limit=500))
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            learning_rate=1e-3, weight_decay=0.0, warmup=0.0, schedule="constant"
        )
    )
    epochs: int = 5
    batch_size: int = 16
    heads: Literal["own", "shared"] = "own"
    rank: int = 8
    alpha: float = 32.0
    sites: tuple[str, ...] = ("attn.q", "attn.v")
    drop: float = 0.1
    lambda1: float = 0.5
    lambda2: float = 0.0
    power: int = 1
    memory: int = 50
    log_every: int = 10
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("tasks", "method", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} must not be empty")
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must not hold a value twice, got {values}")
        for method in self.method:
            if method not in METHODS:
                raise ValueError(f"method must be among {', '.join(METHODS)}, got {method!r}")
        if len(self.tasks) < 2:
            raise ValueError(f"tasks must be two or more, got {len(self.tasks)}")
        names = [short(task) for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"tasks must differ in the last part of their addresses, got {names}")
        for name, least in (("epochs", 1), ("batch_size", 1), ("rank", 1), ("memory", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        for name in ("alpha", "lambda1", "lambda2"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must be in [0, 1), got {self.drop}")
        if self.power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {self.power}")
        if self.log_every < 1:
            raise ValueError(f"log_every must be >= 1, got {self.log_every}")
        if not 0 < self.optim.learning_rate < math.inf:
            raise ValueError(
                f"optim.learning_rate must be > 0 and finite, got {self.optim.learning_rate}"
            )
        for seed in self.seeds:
            self.finetune(seed)
        if self.data.source:
            raise ValueError(f"data.source={self.data.source!r} is not used here: see tasks")
        if self.data.task not in ("classification", "pair"):
            raise ValueError(
                f"data.task must be classification or pair, got {self.data.task!r}: the classes "
                "of all tasks make one head"
            )
        if self.optim.schedule != "constant" or self.optim.warmup:
            raise ValueError(
                "optim.schedule must be constant and optim.warmup 0, so that tasks of any length "
                f"run one program, got {self.optim.schedule!r} and {self.optim.warmup}"
            )

    def finetune(self, seed: int) -> FinetuneConfig:
        """The settings in the form that the pieces of ``steppe finetune`` take."""
        return FinetuneConfig(
            model=self.model,
            data=dataclasses.replace(self.data, source=self.tasks[0]),
            optim=self.optim,
            batch_size=self.batch_size,
            baselines=False,
            seed=seed,
        )
