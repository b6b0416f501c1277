"""Settings of ``steppe distill``."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from steppe.launch import config as config_
from steppe.launch.config import DataConfig, FinetuneConfig, LoraConfig, OptimConfig
from steppe.launch.distill import schemes

SchemeName = Literal[
    "kd",
    "dkd",
    "seqkd",
    "imitkd",
    "gkd",
    "fdistill",
    "minillm",
    "distillm",
    "atkd",
    "kid",
    "dwt",
    "ctcd",
    "features",
]
Divergence = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "tvd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "symmetric_kl",
]
Policy = Literal["gt", "teacher", "student", "mix_request", "mix_token", "imperfect", "replay"]
# Settings of FinetuneConfig that are taken over as they are.
SHARED = (
    "data",
    "optim",
    "lora",
    "epochs",
    "steps",
    "batch_size",
    "microbatches",
    "drop",
    "freeze",
    "ema",
    "compute_dtype",
    "mesh",
    "seed",
    "log_every",
    "eval_every",
    "save_every",
    "keep",
    "tensorboard",
    "samples",
    "sample_tokens",
    "watchdog",
    "spike_factor",
    "spike_norm_factor",
    "spike_window",
    "spike_rollbacks",
    "profile",
    "resume",
    "dry_run",
)
# What a student is cut to.
CUTS = ("layers", "heads", "kv_heads", "ffn_width", "width")
TEACHER = "teacher"


class Cut(NamedTuple):
    """What a student is made of.

    Attributes:
      source: the model that it is, or is cut from; "teacher" = the teacher.
      sizes: some of ``CUTS``, and ``how``; empty = nothing is cut.
    """

    source: str
    sizes: dict[str, Any]

    @property
    def name(self) -> str:
        """For a reader: ``the teacher, layers 3``."""
        first = "the teacher" if self.source == TEACHER else self.source
        return ", ".join([first, *(f"{k} {v}" for k, v in self.sizes.items())])


@dataclass(frozen=True)
class DistillConfig:
    """``steppe distill``: a student learns from a teacher, which does not change but for ctcd.

    Attributes:
      teacher: run folder, exported folder, file of weights, or ``asset:NAME``. Classification:
        one with a fitted head, such as a run of ``steppe finetune``.
      student: the same, or ``teacher``: cut from the teacher. Sizes may stand behind it:
        ``teacher:layers=3,how=first``.
      layers, heads, kv_heads, ffn_width, width: what the student keeps of its model; None = all.
        A width is of the hidden states; heads keep their size.
      how: which layers.
      out: run folder; empty = runs/ and a name made of data, student and scheme.
      data, optim: as in ``steppe finetune``.
      lora: a LoRA overlay of the student in place of full training; rank 0 = none.
      scheme: see ``steppe.launch.distill.schemes`` for what goes together.
      divergence: between the two distributions; None = the scheme's.
      policy: whose texts are learnt from; None = the scheme's.
      weight: share of the distillation loss, the rest is the label loss; None = the scheme's.
        dwt: None lets it fall from soft_start to soft_end beside a label loss of 1.
      teacher_dtype: of the teacher's parameters.
      temperature: divides the logits of both; the loss is multiplied by its square.
      beta, alpha: of the jsd and symmetric divergences; of the skewed ones.
      top_k: compare the teacher's k most probable classes and the remainder.
      store: kd on the data's texts: folder of the teacher's predictions for the training split, its
        top_k tokens each; written if it is not there. No step runs the teacher then.
      vocab_chunk: decoders: columns of the vocabulary at a time; None = all logits in memory.
      token_chunk: decoders: tokens at a time, in place of vocab_chunk: the same loss at the work
        of the dense form.
      tkd, dkd: dkd: coefficients of the two parts.
      lam, hard_ratio: atkd: weight of the easy tokens, share of the hard ones.
      soft_start, soft_end: dwt: coefficient of the teacher's loss, first and last.
      back: ctcd: share of the student's answers in what the teacher learns, the rest is the label
        loss; 0 = it learns from labels alone. It is exported to ``teacher/`` in the run folder.
      features: features: what is compared.
      layer_map: features: pairs ``student:teacher``; hidden states count from 0, the
        embeddings, layers of attention from 0 too; empty = evenly spaced.
      share: mix_request: of the batches that the student writes; mix_token: of the tokens that
        are the teacher's.
      mix_with: mix_request: whose texts the other batches are.
      mask_share, mask_strategy: imperfect: tokens of an answer that are filled, and which.
      capacity: replay: texts that are kept; the policy adapts at every evaluation.
      prompt_tokens: lm: tokens of a text that are given, at most half of it.
      max_new_tokens, sample_temperature: of the texts that are written to learn from.
      epochs, steps, batch_size, microbatches, drop, freeze, ema, compute_dtype, mesh, seed,
        log_every, eval_every, save_every, keep, tensorboard, samples, sample_tokens, watchdog,
        spike_factor, spike_norm_factor, spike_window, spike_rollbacks, profile, resume: as in
        ``steppe finetune``.
      dry_run: print what is compared, and stop.
    """

    teacher: str = ""
    student: str = ""
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ffn_width: int | None = None
    width: int | None = None
    how: Literal["even", "first", "last"] = "even"
    out: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    scheme: SchemeName = "kd"
    divergence: Divergence | None = None
    policy: Policy | None = None
    weight: float | None = None
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    temperature: float | None = None
    beta: float | None = None
    alpha: float | None = None
    top_k: int | None = None
    store: str | None = None
    vocab_chunk: int | None = None
    token_chunk: int | None = None
    tkd: float | None = None
    dkd: float | None = None
    lam: float | None = None
    hard_ratio: float | None = None
    soft_start: float | None = None
    soft_end: float | None = None
    back: float | None = None
    features: Literal["hidden", "attention", "relation"] | None = None
    layer_map: tuple[str, ...] = ()
    share: float | None = None
    mix_with: Literal["gt", "teacher"] | None = None
    mask_share: float | None = None
    mask_strategy: Literal["random", "uniform", "hard", "easy"] | None = None
    capacity: int | None = None
    prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    sample_temperature: float | None = None
    epochs: float = 3.0
    steps: int = 0
    batch_size: int = 32
    microbatches: int = 1
    drop: float = -1.0
    freeze: tuple[str, ...] = ()
    ema: float = 0.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: str = ""
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep: int = 2
    tensorboard: bool = False
    samples: int = 16
    sample_tokens: int = 64
    watchdog: float = 0.0
    spike_factor: float = 0.0
    spike_norm_factor: float = 0.0
    spike_window: int = 50
    spike_rollbacks: int = 3
    profile: str = ""
    resume: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in ("weight", "back", "beta", "alpha", "lam", "hard_ratio", "share", "mask_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        for name in ("temperature", "sample_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {value}")
        for name in ("tkd", "dkd", "soft_start", "soft_end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        if self.vocab_chunk is not None and self.token_chunk is not None:
            raise ValueError("vocab_chunk and token_chunk are given both: one of them is enough")
        counts = (
            "top_k",
            "vocab_chunk",
            "token_chunk",
            "capacity",
            "prompt_tokens",
            "max_new_tokens",
        )
        for name in (*CUTS, *counts):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if self.capacity is not None and self.capacity < self.batch_size:
            raise ValueError(
                f"capacity={self.capacity} must hold a batch of {self.batch_size} texts"
            )
        pairs(self.layer_map)
        schemes.check(self)
        self.training()  # the settings that are shared are checked there

    @property
    def run(self) -> Path:
        """The run folder."""
        if self.out:
            return Path(self.out)
        base = FinetuneConfig(model=self.student or TEACHER, data=self.data, seed=self.seed).run
        return base.with_name(f"{base.name}-{self.scheme}".replace(":", "-"))

    @property
    def cut(self) -> Cut:
        """The student.

        Raises:
          ValueError: sizes that are given twice, or are none.
        """
        source, behind = self.student, ""
        found = re.fullmatch(r"(.*?):(\w+=.*)", self.student)
        if found is not None:
            source, behind = found.groups()
        sizes: dict[str, Any] = {}
        for part in behind.split(",") if behind else ():
            name, _, text = part.partition("=")
            if name in sizes:
                raise ValueError(f"student={self.student!r} names {name} twice")
            if name == "how" and text in ("even", "first", "last"):
                sizes[name] = text
            elif name in CUTS and text.isdecimal() and int(text):
                sizes[name] = int(text)
            else:
                raise ValueError(
                    f"student={self.student!r}: {part!r} is no size; write such as "
                    f"teacher:layers=3,how=first with {', '.join(CUTS)}"
                )
        for name in CUTS:
            value = getattr(self, name)
            if value is not None and name in sizes:
                raise ValueError(f"{name} is given in student={self.student!r} and as an option")
            if value is not None:
                sizes[name] = value
        if self.how != "even":
            sizes.setdefault("how", self.how)
        if "how" in sizes and "layers" not in sizes:
            raise ValueError(
                f"how={sizes['how']!r} says which layers stay, and no number is given: add "
                "--layers, or leave how out"
            )
        return Cut(source or (TEACHER if sizes else ""), sizes)

    def training(self) -> FinetuneConfig:
        """The training of the student as ``steppe finetune`` would have it."""
        shared = {name: getattr(self, name) for name in SHARED}
        source = self.cut.source
        model = self.teacher if source == TEACHER else source
        return FinetuneConfig(model=model, out=self.out or str(self.run), baselines=False, **shared)


def pairs(given: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """``("1:2", "2:4")`` -> ``((1, 2), (2, 4))``.

    Raises:
      ValueError: not of that form.
    """
    found = []
    for text in given:
        left, _, right = text.partition(":")
        if not left.isdecimal() or not right.isdecimal():
            raise ValueError(
                f"layer_map must hold pairs such as 1:2 (student:teacher), got {text!r}"
            )
        found.append((int(left), int(right)))
    return tuple(found)


def read(run: Path) -> DistillConfig:
    """The config of a run folder of ``steppe distill``.

    Raises:
      FileNotFoundError: it is not a run folder.
      ValueError: its config.json is damaged, or of another command.
    """
    file = run / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{run} is not a run folder: it holds no config.json")
    try:
        values = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error})") from error
    found: DistillConfig = config_.from_dict(DistillConfig, values)
    return found
