"""Settings of the commands: frozen dataclasses that a recipe fills in and the command line edits.

The resolved value is written beside every run as ``config.json`` and read back by
``--resume``, ``evaluate`` and ``report``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from steppe.launch import optimiser, watch

TaskKind = Literal[
    "classification",
    "pair",
    "regression",
    "token",
    "span",
    "mlm",
    "lm",
    "chat",
    "seq2seq",
    "image",
]
Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class DataConfig:
    """Where examples come from and what they mean.

    Attributes:
      source: address, such as ``asset:vader/movies``, ``file:reviews.csv``, ``hf:imdb``.
      task: what is predicted. lm: all tokens of a text; chat: the answers of conversations;
        seq2seq: one text from another; image: the class of an image.
      text: column of the text (of the words for token tasks, of the question for span).
      pair: column of the second text (of the context for span); a regression reads it too
        where the data has it.
      label: column of the label.
      messages: chat: column of the conversations, lists of {role, content}.
      prompt, answer: chat: columns of question and answer, for data without conversations.
      system: chat: what the first message of every question-and-answer conversation says.
      input, target: seq2seq: columns of the two texts.
      prefix: seq2seq: put in front of every input, as T5 wants ("translate English to German: ").
      image: image: column of the images.
      image_size: image: side in pixels that images are scaled to; 0 = the model's own.
      packed: lm, chat: several texts a row of max_length tokens in training.
      classes: names of the classes in order; empty = those found, sorted.
      split: split of the source to read, for sources that have several.
      fractions: train, valid, test shares of the hash split.
      group: column whose equal values stay in one split, such as ``db_id`` or ``group``; empty
        = every example by itself.
      official: test on the examples that the data's own ``split`` column calls "test"; the
        others are divided into train and valid.
      limit: use only the first N training examples of the hash order; 0 = all.
      eval_limit: the same for the validation and the test examples, each.
      max_length: tokens an example (packed: a row) may have; longer ones are cut.
      buckets: padded lengths; every distinct one is one compiled program. Packed rows have one
        length, images one size; seq2seq: empty = pairs of lengths chosen from the data.
    """

    source: str = "asset:vader/movies"
    task: TaskKind = "classification"
    text: str = "text"
    pair: str = "text_pair"
    label: str = "label"
    messages: str = "messages"
    prompt: str = "prompt"
    answer: str = "answer"
    system: str = ""
    input: str = "source"
    target: str = "target"
    prefix: str = ""
    image: str = "image"
    image_size: int = 0
    packed: bool = True
    classes: tuple[str, ...] = ()
    split: str | None = None
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    group: str = ""
    official: bool = False
    limit: int = 0
    eval_limit: int = 0
    max_length: int = 128
    buckets: tuple[int, ...] = (32, 64, 128)

    def __post_init__(self) -> None:
        for name in ("limit", "eval_limit", "image_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} must be >= 0, got {getattr(self, name)}")
        if self.max_length < 1:
            raise ValueError(f"data.max_length must be >= 1, got {self.max_length}")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
      learning_rate: peak.
      weight_decay: on matrices; biases and norms have none.
      warmup: share of the steps over which the rate rises from 0.
      schedule: what follows.
      b1, b2, eps: of Adam.
      clip_norm: global norm of the gradient; 0 = no clipping.
    """

    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.06
    schedule: Schedule = "linear"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            if not 0.0 <= value < math.inf:
                raise ValueError(f"optim.{name} must be > 0 and finite, or 0, got {value}")
        for name in ("warmup", "b1", "b2"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise ValueError(f"optim.{name} must be in [0, 1), got {value}")
        if not 0.0 < self.eps < math.inf:
            raise ValueError(f"optim.eps must be > 0 and finite, got {self.eps}")


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA overlay in place of full fine-tuning; rank 0 = none.

    Attributes:
      rank, alpha, sites, drop: see ``steppe.models.overlays.lora``. Encoder-decoders name
        their sites ``encoder.attn.q``, ``decoder.attn.q``, ``decoder.cross.q``, ...
    """

    rank: int = 0
    alpha: float = 16.0
    sites: tuple[str, ...] = ("attn.q", "attn.v")
    drop: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank must be >= 0, got {self.rank}")
        if not math.isfinite(self.alpha):
            raise ValueError(f"lora.alpha must be finite, got {self.alpha}")
        if not 0.0 <= self.drop < 1.0:
            raise ValueError(f"lora.drop must be in [0, 1), got {self.drop}")


@dataclass(frozen=True)
class BalanceConfig:
    """The balancing constraint of LoRAMoE, for ``--overlay loramoe``; beta 0 = none.

    Attributes:
      beta: weight of the constraint, see ``steppe.train.objectives.loramoe_loss``.
      delta: how far the two types of examples are sent to different halves of the experts.
      column: of the records, with what tells the types apart.
      first: value of that column that makes a record one of type 1 (the paper's questions of
        world knowledge); any other makes it one of type 0.
    """

    beta: float = 0.0
    delta: float = 0.1
    column: str = ""
    first: str = ""

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta < math.inf:
            raise ValueError(f"balance.beta must be >= 0 and finite, got {self.beta}")
        if not 0.0 <= self.delta < 1.0:
            raise ValueError(f"balance.delta must be in [0, 1), got {self.delta}")
        if not self.beta and (self.column or self.first):
            raise ValueError(
                "balance.beta must be > 0 where balance.column or balance.first is given, got 0"
            )
        if self.beta and not (self.column and self.first):
            raise ValueError(
                f"balance.beta must be 0 where the types of the examples are not told, got "
                f"{self.beta}: balance.column is a column of the data, balance.first its value for "
                "the one type"
            )


@dataclass(frozen=True)
class FinetuneConfig:
    """``steppe finetune``: fine-tune a pretrained model, evaluate it, report, export.

    Attributes:
      model: model folder, file of weights (``.onnx``, ``.gguf``, ``.bin``), or ``asset:NAME``.
      out: run folder; empty = runs/ and a name made of data and model.
      data: where examples come from and what they mean.
      optim: AdamW and its schedule.
      lora: a LoRA overlay in place of full fine-tuning; rank 0 = none.
      overlay: parameter-efficient methods in place of full fine-tuning, ``NAME`` or
        ``NAME:SETTING=VALUE,...``, see ``steppe overlays list``; several are composed.
      merge: export an overlay as part of the weights, where it can be; else beside its base,
        as ``models.overlays.bank`` reads it.
      balance: loramoe: the constraint that balances its experts; beta 0 = none.
      sharpness: sharpness-aware method around AdamW, see ``steppe.optim``; most take two
        gradients a step. What follows, up to climb, are its settings, None being the
        method's default, see ``steppe.launch.optimiser``.
      rho: radius of the ball that the loss is to be low in; fine-tuning bears about 0.01 to
        0.02 (asam: ten times that) and collapses far above it.
      rho_warmup: share of the steps over which rho rises from 0.
      keep_ratio: fsam: share of the parameters that is perturbed.
      refresh_every: fsam: steps that a mask serves.
      fisher: fsam: scores from the batch's gradient, or per sample.
      mask: fsam: element, tensor (whole tensors), layer (whole layers), head:HEADS[:KV_HEADS]
        (whole attention heads; the model's number of them), or N:M (N of every M neighbours).
      exclude: fsam: regexes of parameter paths that are never perturbed.
      eta: asam: added to the size of a weight.
      alpha: gsam: weight of the gap; looksam: of the direction that is used again.
      look_every: looksam: steps from one second gradient to the next.
      beta, gamma: esam: shares of the tensors that are perturbed and of the rows that the
        second gradient is taken on.
      ascent: sam, asam, fsam, gsam: whose gradient is climbed by: global (the whole batch's),
        device (of each device's rows), or a number of rows (of each group of so many).
      climb: sam, asam, fsam, esam: what the first gradient is computed on: whole, or, cheaper,
        fraction:SHARE of the rows, cut:LAYER (that layer and those above), bfloat16; joined by +.
      epochs: passes over the training split; ignored when steps > 0.
      steps: optimiser updates; 0 = from epochs.
      batch_size: examples an update, over all devices and micro-batches.
      microbatches: pieces that a batch is computed in; the result is the same.
      drop: dropout rate; negative = the model's own.
      freeze: regexes of parameter paths that do not train.
      probe: train nothing but the head: a logistic regression on features that are computed
        once, on prefixes of other runs too (``--overlay prefix-fixed:folders=RUN``). Classes
        only; the epochs, steps and optimiser settings are not used.
      ema: decay of an exponential moving average of the weights, used for evaluation; 0 = off.
      compute_dtype: of the forward and backward pass; the master copy is float32.
      mesh: devices by axis, such as ``data=4,model=2``; empty = all on ``data``.
      seed: of initial values, order and dropout.
      log_every, eval_every, save_every: in steps; 0 = eval and save once an epoch.
      keep: checkpoints to keep.
      tensorboard: also write event files to ``RUN/tensorboard`` (needs the extra of that name).
      baselines: also fit majority class and frozen features + logistic regression.
      samples: lm, chat, seq2seq: test examples for which texts are written before and after
        the training, greedily; 0 = none.
      sample_tokens: most tokens of such a text.
      watchdog: minutes that a step (its compilation included), an evaluation or a save may take;
        beyond, stacks are dumped and the run ends with status 76. 0 = no limit.
      spike_factor: go back to the last checkpoint, and leave out the batches that led there, when
        the loss is above so many times its median, such as 3; 0 = off. See ``train.spikes``.
      spike_norm_factor: the same for the gradient norm, such as 10.
      spike_window, spike_rollbacks: steps that the median is of; rollbacks before it is an error.
      profile: steps to trace, ``10:13`` for 10 to 12, into ``RUN/profile``; empty = none.
      resume: continue the run in ``out``.
      dry_run: print parameter count, memory and FLOPs, and stop.
    """

    model: str = "asset:minilm-l6"
    out: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    overlay: tuple[str, ...] = ()
    merge: bool = True
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    sharpness: optimiser.Method = "none"
    rho: float | None = None
    rho_warmup: float = 0.0
    keep_ratio: float | None = None
    refresh_every: int | None = None
    fisher: Literal["batch", "per_sample"] | None = None
    mask: str | None = None
    exclude: tuple[str, ...] = ()
    eta: float | None = None
    alpha: float | None = None
    look_every: int | None = None
    beta: float | None = None
    gamma: float | None = None
    ascent: str | None = None
    climb: str | None = None
    epochs: float = 3.0
    steps: int = 0
    batch_size: int = 32
    microbatches: int = 1
    drop: float = -1.0
    freeze: tuple[str, ...] = ()
    probe: bool = False
    ema: float = 0.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: str = ""
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    keep: int = 2
    tensorboard: bool = False
    baselines: bool = True
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
        positive = ("batch_size", "microbatches", "keep", "log_every")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("steps", "eval_every", "save_every", "samples", "sample_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.samples and not self.sample_tokens:
            raise ValueError(
                f"sample_tokens must be >= 1 where texts are written (samples={self.samples}), "
                "got 0; samples=0 writes none"
            )
        if self.steps == 0 and not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs must be > 0 and finite (or give steps), got {self.epochs}")
        if not 0 <= self.watchdog < math.inf:
            raise ValueError(f"watchdog must be >= 0 minutes and finite, got {self.watchdog}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2^32), got {self.seed}")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if self.overlay and self.lora.rank:
            own = any(o.split(":")[0] == "lora" for o in self.overlay)
            raise ValueError(
                f"overlay and lora.rank={self.lora.rank} are both given: write --overlay lora:rank="
                f"{self.lora.rank}{'' if own else ' NAME for both'}, or --lora.rank 0 where a "
                "recipe has the LoRA"
            )
        if self.balance.beta and not any(o.split(":")[0] == "loramoe" for o in self.overlay):
            raise ValueError(
                f"balance.beta={self.balance.beta} balances the experts of LoRAMoE: add --overlay "
                "loramoe"
            )
        if self.probe and (self.lora.rank or self.freeze or self.ema):
            raise ValueError(
                "probe=True trains the head alone: it goes with neither lora, freeze nor ema"
            )
        learns = [o for o in self.overlay if o.split(":")[0] != "prefix-fixed"]
        if self.probe and learns:
            raise ValueError(
                f"probe=True trains the head alone, and overlay={learns[0]} has parameters that "
                "train: leave one of them out; only prefix-fixed has none"
            )
        if not self.drop < 1.0:
            raise ValueError(f"drop must be below 1, got {self.drop}")
        optimiser.check(self)
        watch.check(self)

    @property
    def run(self) -> Path:
        """The run folder."""
        if self.out:
            return Path(self.out)
        parts = [_slug(self.data.source), _slug(self.model), f"seed{self.seed}"]
        return Path("runs") / "-".join(p for p in parts if p)


@dataclass(frozen=True)
class EvaluateConfig:
    """``steppe evaluate``: evaluate an exported model on any data.

    Attributes:
      model: run folder (its ``model/`` is taken), model folder, or ``asset:NAME`` with a head.
      data: examples; for a run folder, its own settings where they are not given here.
      split: train, valid or test of the hash split, or ``all`` examples; ``auto`` = test on
        the run's own source, all examples of any other.
      batch_size: examples a forward pass, at most.
      samples: lm, chat, seq2seq: examples for which texts are written, greedily; answers and
        translations are scored by chrF, BLEU and equality.
      sample_tokens: most tokens of such a text.
      task: of a model that answers several, whose classes are called TASK/CLASS: the one that the
        data is of; empty = the one that has the data's classes.
      out: JSON file for the result; empty = print only.
    """

    model: str
    data: DataConfig = field(default_factory=lambda: DataConfig(source=""))
    split: Literal["auto", "train", "valid", "test", "all"] = "auto"
    batch_size: int = 64
    samples: int = 0
    sample_tokens: int = 64
    task: str = ""
    out: str = ""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("samples", 0), ("sample_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")


def _slug(address: str) -> str:
    name = address.split(":", 1)[-1].rstrip("/")
    tail = "-".join(name.split("/")[-2:]) if address.startswith("asset:") else Path(name).stem
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in tail).strip("-.")


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """``"data=4,model=2"`` -> ``{"data": 4, "model": 2}``; empty = all devices on ``data``.

    Raises:
      ValueError: not of that form.
    """
    if not text.strip():
        return {"data": devices}
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name.strip() or not size.strip().isdecimal() or int(size) < 1:
            raise ValueError(f"mesh must look like data=4,model=2, got {text!r}")
        if name.strip() in axes:
            raise ValueError(f"mesh has the axis {name.strip()!r} twice in {text!r}")
        axes[name.strip()] = int(size)
    return axes


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type, values: Mapping[str, Any]) -> Any:
    """Inverse of :func:`to_dict`.

    Raises:
      ValueError: an unknown setting, or one of the wrong form.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{kind.__name__} must be an object, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{kind.__name__} has no setting {unknown[0]!r}")
    nested = {
        "data": DataConfig,
        "optim": OptimConfig,
        "lora": LoraConfig,
        "balance": BalanceConfig,
        "base": FinetuneConfig,
    }
    out: dict[str, Any] = {}
    for name, value in values.items():
        inner = nested.get(name)
        # ``base`` is a text in other commands' settings.
        if inner is not None and inner.__name__ in str(fields[name].type):
            value = from_dict(inner, value)
        out[name] = tuple(value) if isinstance(value, list) else value
    return kind(**out)


def read(run: Path) -> FinetuneConfig:
    """The config of a run folder; of one of ``steppe distill``, the training of its student; of
    one of ``steppe blackbox``, its model and data.

    Raises:
      FileNotFoundError: it is not a run folder.
      ValueError: its config.json is damaged or of another version.
    """
    file = run / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{run} is not a run folder: it holds no config.json")
    try:
        values = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error})") from error
    if isinstance(values, dict) and {"teacher", "scheme"} <= set(values):
        from steppe.launch.distill.settings import DistillConfig

        distilled: DistillConfig = _of_file(DistillConfig, values, file)
        return distilled.training()
    if isinstance(values, dict) and {"popsize", "shots"} <= set(values):
        from steppe.launch.blackbox.settings import BlackboxConfig

        searched: BlackboxConfig = _of_file(BlackboxConfig, values, file)
        return searched.as_finetune()
    made: FinetuneConfig = _of_file(FinetuneConfig, values, file)
    return made


def _of_file(kind: type, values: Any, file: Path) -> Any:
    try:
        return from_dict(kind, values)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is of another command or version ({error}); name another folder"
        ) from error
