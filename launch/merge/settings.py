"""Settings of ``steppe merge``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal[
    "average",
    "weighted",
    "task-arithmetic",
    "ties",
    "dare",
    "dare-ties",
    "slerp",
    "fisher",
    "regmean",
    "adamerging",
    "concrete-ta",
    "concrete-adamerging",
]
METHODS: tuple[str, ...] = Method.__args__  # type: ignore[attr-defined]
# Read from disk and written to disk a tensor at a time; the others need data and whole trees.
STREAMED = ("average", "weighted", "task-arithmetic", "ties", "dare", "dare-ties", "slerp")
# theta_0 + lam * direction: lam is swept, and chosen on the validation split.
SWEPT = ("task-arithmetic", "ties", "dare", "dare-ties")
ADAPTED = ("adamerging", "concrete-ta", "concrete-adamerging")
GRID = tuple(round(0.1 * i, 1) for i in range(11))
LAM = 0.3
MOST = 3.4028234e38  # of float32


@dataclass(frozen=True)
class MergeConfig:
    """``steppe merge METHOD BASE MODEL MODEL ...``: one model out of several fine-tunes.

    Attributes:
      method: see ``steppe.train.merge``.
      base: what the models were fine-tuned from: folder, run folder, file, or ``asset:NAME``.
      models: run folders of ``steppe finetune``, or exported folders; one a task, in order.
      out: the new folder.
      names: of the tasks; empty = the folders' names.
      data: for models that are no run folders, one a model: an address such as
        ``asset:vader/movies``, or a run folder whose data settings are taken; empty = the
        runs' own.
      weights: average, weighted: one a model.
      lam: coefficient of the task vectors; None = chosen on the validation split where there is
        data, else 0.3; of the adapted methods where coefficients start.
      sweep: values of the coefficient that are scored on both splits; none = no sweep.
      k: ties, adamerging --plus: share of the entries that is kept.
      merge: ties: how entries that agree are combined.
      p: dare: share of the entries that is dropped.
      t: slerp: 0 = the first model, 1 = the second.
      a: regmean: what off-diagonal entries of the Gram matrices are multiplied by.
      examples: fisher, regmean: examples a task, from the training split.
      fisher: exact, per sample; sampled, with labels drawn; or the published code's shortcut.
      level: adamerging, concrete-adamerging: a coefficient a task, or a task and tensor.
      plus: AdaMerging++: learns on task vectors that TIES has trimmed.
      adapt_on: whose inputs adaptation sees, never with labels. test = transductive.
      steps: of the adaptation (concrete: of the mask); None = the paper's, 1,000 (2,000).
      lr: of the coefficients.
      tta_steps: concrete-adamerging: steps of the coefficients with the mask frozen.
      mask_lr, base_lr, temperature: concrete: of the mask, of the inner problem, of the noise.
      final: concrete: the mask that is kept: one draw, a draw of zeros and ones, or the mean.
      batch_size: adaptation, fisher, regmean: examples a task at once.
      eval_limit: validation and test examples a task, each; 0 = as the runs.
      seed: of draws and of the order of batches.
      maps: angles between the task vectors, and where their signs disagree.
      anew: drop what an interrupted merge into ``out`` has left.
    """

    method: Method = "task-arithmetic"
    base: str = ""
    models: tuple[str, ...] = ()
    out: str = ""
    names: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    lam: float | None = None
    sweep: tuple[float, ...] = GRID
    k: float = 0.2
    merge: Literal["sum", "mean", "max"] = "sum"
    p: float = 0.5
    t: float = 0.5
    a: float = 0.9
    examples: int = 256
    fisher: Literal["exact", "sampled", "shortcut"] = "exact"
    level: Literal["task", "layer"] = "layer"
    plus: bool = False
    adapt_on: Literal["train", "valid", "test"] = "train"
    steps: int | None = None
    lr: float = 1e-3
    tta_steps: int = 1000
    mask_lr: float = 1e-3
    base_lr: float = 1.0
    temperature: float = 0.5
    final: Literal["sample", "hard", "mean"] = "sample"
    batch_size: int = 16
    eval_limit: int = 1000
    seed: int = 0
    maps: bool = True
    anew: bool = False

    def __post_init__(self) -> None:
        if self.models and not self.base:
            raise ValueError("base must be given: steppe merge METHOD BASE MODEL MODEL ...")
        for name, count in (("names", len(self.names)), ("data", len(self.data))):
            if count and count != len(self.models):
                raise ValueError(
                    f"{name} must be {len(self.models)}, one a model, got {count}: "
                    f"{', '.join(getattr(self, name))}"
                )
        if self.weights and self.method not in ("average", "weighted"):
            raise ValueError(f"weights are of average and weighted, not of {self.method}")
        if self.method == "weighted" and self.models and not self.weights:
            raise ValueError("weighted takes --weights, one a model")
        if self.weights and len(self.weights) != len(self.models):
            raise ValueError(
                f"weights must be {len(self.models)}, one a model, got {len(self.weights)}"
            )
        if not all(abs(weight) <= MOST for weight in self.weights):
            raise ValueError(f"weights must be finite numbers of float32, got {self.weights}")
        if self.method == "average" and self.weights and sum(self.weights) == 0:
            raise ValueError(f"weights must not sum to 0, got {self.weights}")
        for name in ("lam", "t", "lr", "mask_lr", "base_lr"):
            value = getattr(self, name)
            if value is not None and not abs(value) <= MOST:
                raise ValueError(f"{name} must be a finite number of float32, got {value}")
        if any(not abs(value) <= MOST for value in self.sweep):
            raise ValueError(f"sweep must hold finite numbers of float32, got {self.sweep}")
        if not 0 < self.k <= 1:
            raise ValueError(f"k must be in (0, 1], got {self.k}")
        if not 0 <= self.p < 1:
            raise ValueError(f"p must be in [0, 1), got {self.p}")
        if not 0 <= self.a <= 1:
            raise ValueError(f"a must be in [0, 1], got {self.a}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        for name, least in (("examples", 1), ("batch_size", 1), ("eval_limit", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be in [0, 2^32), got {self.seed}")
        for name in ("steps", "tta_steps"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        for name in ("lr", "mask_lr", "base_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.plus and self.method != "adamerging":
            raise ValueError(f"plus is a form of adamerging, not of {self.method}")

    @property
    def updates(self) -> int:
        """Steps of the adaptation (of the mask)."""
        if self.steps is not None:
            return self.steps
        return 1000 if self.method == "adamerging" else 2000
