"""Settings of ``steppe blackbox``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from steppe.launch import config as config_
from steppe.launch.config import DataConfig, FinetuneConfig

# Settings that may differ when a run is resumed: they change nothing that has been computed.
FREE = ("resume", "dry_run", "out", "budget", "mesh", "at_once", "baselines")
# method -> (sigma, alpha) of the papers
STEPS = {"bbt": (1.0, 1.0), "bbtv2": (0.2, 0.2)}


@dataclass(frozen=True)
class BlackboxConfig:
    """``steppe blackbox``: a prompt for a frozen model, found by evolution from few examples.

    A forward pass is one of all training examples; nothing is differentiated. Encoders get a head
    of class means (see ``steppe.train.blackbox.prototypes``), decoders the next word's logits of
    the classes' words.

    Attributes:
      model: model folder, file of weights, or ``asset:NAME``; an encoder or a decoder.
      out: run folder; empty = runs/ and a name made of data, model, method and seed.
      data: examples of one or two texts and their class; the shots are of its training split.
      method: bbt: one prompt at the embeddings; bbtv2: one in every layer, in turn.
      shots: training examples a class; as many more are for choosing among the prompts.
      loss: of the search: ce, cross entropy; hinge; accuracy, minus the right answers.
      margin: hinge: by how much a wrong class must be below.
      budget: forward passes; whole rounds over the prompts are made.
      popsize: candidates a generation.
      sigma: step size in the beginning; None = 1 (bbt), 0.2 (bbtv2).
      alpha: spread of the first candidates over that of what they are added to; None = 1 (bbt),
        0.2 (bbtv2).
      rank: dimensions of the search in a prompt.
      length: positions of a prompt.
      projection: entries of the random projection, normal on the scale of the model, or uniform.
      inject: add: to the hidden states of ordinary words in the text; concat: rows in front of
        it (bbt only).
      start: concat: folder of a prompt overlay whose rows the search begins at.
      first_id: add: the words are so many tokens from this id on, and a full stop.
      suffix: decoders: what stands behind a text, before the word that is its class.
      words: decoders: a word a class, in the order of the classes; empty = their names.
      select: which prompt is tried on the development examples, the best so far, or the last
        candidate, as in the published code.
      dev_every: forward passes between two such trials, which are not counted.
      at_once: candidates of a device that are computed together; 0 = one on a CPU, all elsewhere.
      mesh: devices by axis; the candidates are divided over ``data``. Empty = all on ``data``.
      seed: of the examples, the projections and the search.
      baselines: also fit majority class and frozen features + logistic regression.
      resume: continue the run in ``out``; the budget may have grown.
      dry_run: print what would be done, and stop.
    """

    model: str = "asset:minilm-l6"
    out: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    method: Literal["bbt", "bbtv2"] = "bbtv2"
    shots: int = 16
    loss: Literal["ce", "hinge", "accuracy"] = "ce"
    margin: float = 2.0
    budget: int = 8000
    popsize: int = 20
    sigma: float | None = None
    alpha: float | None = None
    rank: int = 500
    length: int = 50
    projection: Literal["normal", "uniform"] = "normal"
    inject: Literal["add", "concat"] = "add"
    start: str = ""
    first_id: int = 1000
    suffix: str = " It was"
    words: tuple[str, ...] = ()
    select: Literal["best", "last"] = "best"
    dev_every: int = 100
    at_once: int = 0
    mesh: str = ""
    seed: int = 0
    baselines: bool = True
    resume: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        least = {"popsize": 2, "shots": 2, "rank": 1, "length": 1, "dev_every": 1, "at_once": 0}
        for name, low in (least | {"budget": 1, "first_id": 0}).items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be >= {low}, got {getattr(self, name)}")
        for name in ("sigma", "alpha", "margin"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2^32), got {self.seed}")
        if self.data.task not in ("classification", "pair"):
            raise ValueError(
                f"data.task must be classification or pair, got {self.data.task!r}: the search "
                "ranks answers of a class"
            )
        if self.inject == "concat" and self.method != "bbt":
            raise ValueError(
                "inject=concat puts rows in front of the embeddings, which only --method bbt "
                "searches; take inject=add with bbtv2"
            )
        if self.start and self.inject != "concat":
            raise ValueError("start gives rows in front of the text; it needs inject=concat")

    @property
    def run(self) -> Path:
        """The run folder."""
        if self.out:
            return Path(self.out)
        plain = FinetuneConfig(model=self.model, data=self.data, seed=self.seed).run
        return plain.with_name(f"{plain.name}-{self.method}")

    @property
    def step(self) -> float:
        """sigma, given or the method's."""
        return STEPS[self.method][0] if self.sigma is None else self.sigma

    @property
    def spread(self) -> float:
        """alpha, given or the method's."""
        return STEPS[self.method][1] if self.alpha is None else self.alpha

    @property
    def deep(self) -> bool:
        """Whether every layer has a prompt."""
        return self.method == "bbtv2"

    def fixed(self) -> dict[str, Any]:
        """The settings that must be the same when the run is resumed."""
        return {k: v for k, v in config_.to_dict(self).items() if k not in FREE}

    def as_finetune(self) -> FinetuneConfig:
        """Model and data as other commands read them from a run folder."""
        return FinetuneConfig(model=self.model, out=self.out, data=self.data, seed=self.seed)
