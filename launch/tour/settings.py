"""Settings of ``steppe tour``."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from steppe.launch.config import DataConfig, FinetuneConfig, OptimConfig
from steppe.launch.merge.settings import MergeConfig
from steppe.launch.merge.study_settings import StudyConfig, short
from steppe.launch.quantize.settings import QuantizeConfig
from steppe.models import quantized

ADAMW = "adamw"
TASKS = ("asset:vader/movies", "asset:vader/tweets", "asset:sarcasm")
ELSEWHERE = ("asset:vader/products", "asset:vader/editorials")
# Divergences of distillation that need no further setting.
Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True)
class TourConfig:
    """``steppe tour``: fine-tune, merge, distil and quantize, with what each step costs and gains.

    A pretrained encoder learns every task, with AdamW and with a sharpness-aware method; the
    better of the two on the validation splits is merged by every method; the best merge teaches
    a student of fewer layers that serves all tasks; the student is rounded. Give the same
    command again to go on: stages that are finished are kept, and a changed setting runs what
    depends on it.

    Attributes:
      model: model folder, or ``asset:NAME``; an encoder.
      tasks: addresses of the data, one task each; classes.
      elsewhere: further data, scored by the heads of the tasks whose classes have the same
        names, and never trained on; default: reviews and editorials for the default tasks, and
        none for others.
      out: the run folder.
      seeds: of heads, order, dropout, merging and games; each runs everything.
      full: the longer version: more examples, epochs, iterations, and three seeds. What is
        given beside it counts.
      data: settings of all data: ``data.limit`` training examples a task, ``data.eval-limit``
        for validation and test, each; its source is not used.
      optim, epochs, batch_size: of the fine-tuning.
      sharpness, rho, keep_ratio: the method that runs beside AdamW; see ``steppe finetune``.
      methods: of merging, as in ``steppe compare merging``.
      sweep: coefficients that those without one are chosen from.
      merge_batch: examples a task and adaptation step.
      layers: of the student.
      divergence, beta: what the student learns by; beta is of jsd.
      student_epochs, student_lr: passes over all tasks' training texts, peak of the rate.
      bits, rounding: schemes and methods of quantization, see ``steppe quantize``.
      steps: of the games that quantization plays (zsaq), not of the fine-tuning: iterations.
      k_min: games: steps of the student for one of the generator.
      game_lr: games: the student's rate.
      rho_x: games: radius of the perturbation.
      adapter: games: what maps the generator to embeddings.
      embed: also round the embeddings.
      curvature: training examples a task for eigenvalue and ball; 0 = neither.
      ball: radius of that ball.
      grid: points a side of the two loss surfaces; 0 = none.
      keeps: share of the accuracy before it that a stage must leave to count as keeping it.
      dry_run: print the stages, what is done of them, and stop.
    """

    model: str = "asset:minilm-l6"
    tasks: tuple[str, ...] = TASKS
    elsewhere: tuple[str, ...] | None = None
    out: str = "runs/tour"
    seeds: tuple[int, ...] = (0,)
    full: bool = False
    data: DataConfig = field(
        default_factory=lambda: DataConfig(
            source="", group="group", limit=320, eval_limit=150, max_length=24, buckets=()
        )
    )
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=2e-4))
    epochs: float = 2.0
    batch_size: int = 8
    sharpness: Literal["sam", "asam", "fsam"] = "fsam"
    rho: float = 0.01
    keep_ratio: float = 0.1
    methods: tuple[str, ...] = (
        "average",
        "task-arithmetic",
        "ties",
        "regmean:examples=64",
        "concrete-adamerging:steps=15,tta_steps=15,mask_lr=0.1,lr=0.01",
    )
    sweep: tuple[float, ...] = (0.3, 0.5, 1.0)
    merge_batch: int = 8
    layers: int = 3
    divergence: Divergence = "jsd"
    beta: float = 0.5
    student_epochs: float = 3.0
    student_lr: float = 1e-4
    bits: tuple[str, ...] = ("w8a8", "w4a8")
    rounding: tuple[Literal["rtn", "zsaq"], ...] = ("rtn", "zsaq")
    steps: int = 10
    k_min: int = 2
    game_lr: float = 1e-4
    rho_x: float = 0.05
    adapter: Literal["soft_embed", "gumbel", "linear"] = "gumbel"
    embed: bool = True
    curvature: int = 8
    ball: float = 0.05
    grid: int = 7
    keeps: float = 0.95
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in ("tasks", "seeds", "methods", "sweep", "bits", "rounding"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} must not be empty")
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must not hold a value twice, got {values}")
        for name, addresses in (("tasks", self.tasks), ("elsewhere", self.further)):
            for address in addresses:
                if not address.partition(":")[2]:
                    raise ValueError(
                        f"{name} must be addresses of data such as file:{address or 'FILE'} or "
                        f"asset:vader/movies, got {address!r}"
                    )
        if not self.out:
            raise ValueError("out must name the run folder: --out FOLDER")
        if set(self.tasks) & set(self.further):
            raise ValueError("elsewhere must hold data that is no task's, got some of both")
        names = [short(one) for one in (*self.tasks, *self.further)]
        if len(set(names)) != len(names):
            raise ValueError(f"tasks must differ in the last part of their addresses, got {names}")
        for name, low in (("layers", 1), ("curvature", 0), ("grid", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be >= {low}, got {getattr(self, name)}")
        for name in ("epochs", "student_epochs", "student_lr", "game_lr", "ball"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.rho_x < math.inf:
            raise ValueError(f"rho_x must be >= 0 and finite, got {self.rho_x}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be in [0, 1], got {self.beta}")
        if self.grid == 1:
            raise ValueError("grid must be 0 (no surface) or >= 2, got 1")
        if not 0 < self.keeps <= 1:
            raise ValueError(f"keeps must be in (0, 1], got {self.keeps}")
        if self.data.source:
            raise ValueError(f"data.source={self.data.source!r} is not used here: see tasks")
        if self.data.task != "classification":
            raise ValueError(
                f"data.task must be classification, got {self.data.task!r}: the classes of all "
                "tasks make one head"
            )
        self.study()
        for name in (ADAMW, self.sharpness):
            self.finetune(self.tasks[0], name, 0, "x")
        for text in self.bits:
            try:
                quantized.parse(text)
            except ValueError as error:
                raise ValueError(f"bits={text!r}: {error}") from error
        for seed in self.seeds:
            self.quantize(seed)

    @property
    def further(self) -> tuple[str, ...]:
        """The data elsewhere."""
        if self.elsewhere is not None:
            return self.elsewhere
        return ELSEWHERE if set(self.tasks) <= set(TASKS) else ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks."""
        return tuple(map(short, self.tasks))

    @property
    def optimisers(self) -> tuple[str, str]:
        """AdamW, and what runs beside it."""
        return (ADAMW, self.sharpness)

    def finetune(self, address: str, optimiser: str, seed: int, out: str) -> FinetuneConfig:
        """Settings of one fine-tuning; the group column stays open, see ``world``."""
        values: dict[str, Any] = {}
        if optimiser != ADAMW:
            values = {"sharpness": optimiser, "rho": self.rho}
        if optimiser == "fsam":
            values["keep_ratio"] = self.keep_ratio
        return FinetuneConfig(
            model=self.model,
            out=out,
            data=dataclasses.replace(self.data, source=address),
            optim=self.optim,
            epochs=self.epochs,
            batch_size=self.batch_size,
            keep=1,
            seed=seed,
            baselines=False,
            **values,
        )

    def study(self) -> StudyConfig:
        """What reads the merging methods, and refuses those that it does not know."""
        return StudyConfig(
            base=FinetuneConfig(model=self.model, baselines=False),
            tasks=self.tasks,
            methods=self.methods,
            sweep=self.sweep,
        )

    def merge(self, method: str, seed: int) -> MergeConfig:
        """Settings of one merging method."""
        shared = MergeConfig(
            batch_size=self.merge_batch, seed=seed, adapt_on="valid", sweep=self.sweep
        )
        return self.study().arm(method, shared)

    def quantize(self, seed: int) -> QuantizeConfig:
        """Settings of the quantization."""
        return QuantizeConfig(
            bits=self.bits,
            method=self.rounding,
            embed=self.embed,
            rho=self.rho_x,
            k_min=self.k_min,
            steps=self.steps,
            student_lr=self.game_lr,
            adapter=self.adapter,
            length=self.data.max_length,
            batch_size=self.batch_size,
            seeds=(seed,),
        )

    def rounded(self) -> tuple[tuple[str, str], ...]:
        """(bits, method) of every quantized model."""
        return tuple((bits, method) for bits in self.bits for method in self.rounding)


def full() -> TourConfig:
    """The longer version: 1,500 examples a task and three seeds; hours on two cores."""
    plain = TourConfig()
    return dataclasses.replace(
        plain,
        out="runs/tour-full",
        seeds=(0, 1, 2),
        full=True,
        data=dataclasses.replace(plain.data, limit=1500, eval_limit=500, max_length=48),
        optim=dataclasses.replace(plain.optim, learning_rate=1e-4),
        epochs=4.0,
        batch_size=16,
        rho=0.02,
        methods=(
            "average",
            "task-arithmetic",
            "ties",
            "regmean:examples=256",
            "adamerging:steps=150,lr=0.01",
            "concrete-adamerging:steps=100,tta_steps=100,mask_lr=0.1,lr=0.01",
        ),
        sweep=(0.1, 0.2, 0.3, 0.5, 0.7, 1.0),
        student_epochs=6.0,
        steps=100,
        k_min=5,
        curvature=64,
        grid=11,
    )
