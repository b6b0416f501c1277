"""The model that is quantized, and its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from steppe.launch import evaluation, kinds, opening, outputs, overlays, setup
from steppe.launch.merge.material import LESS, Task
from steppe.launch.pieces import rows_of
from steppe.launch.quantize.settings import QuantizeConfig
from steppe.models import packed, pretrained
from steppe.models.model import Model
from steppe.models.tree import Params
from steppe.models.vision import VisionConfig
from steppe.train.quantize import generator


@dataclass(frozen=True)
class Opened:
    """What a run of the command works on.

    Attributes:
      model, params: float.
      labels: names of the classes, or None.
      tokenizer_dir: of the tokenizer's files, or None.
      task: data of the scores, or None where none is known.
      ends: ids that begin and end every text of an encoder, or None.
    """

    model: Model
    params: Params
    labels: tuple[str, ...] | None
    tokenizer_dir: Path | None
    task: Task | None
    ends: tuple[int, int] | None

    @property
    def vision(self) -> bool:
        """Whether the model reads images."""
        return isinstance(self.model.config, VisionConfig)


def open_model(config: QuantizeConfig) -> Opened:
    """Reads the model and, where some is known, its data.

    Raises:
      FileNotFoundError: no such model.
      ValueError: it is quantized already, or does not fit the data.
    """
    if not config.model:
        raise ValueError("no model is named: steppe quantize MODEL, such as a run folder")
    origin = opening.resolve(config.model)
    if packed.is_packed(origin.weights):
        raise ValueError(f"{config.model} is quantized already; give the float model it came from")
    if overlays.is_overlay(origin.weights):
        raise ValueError(
            f"{config.model} is an overlay that could not be merged into its base, and integers "
            "have no place for it: quantize the base, or a run whose overlay is merged"
        )
    own = evaluation.own_data(config.model)
    data = config.data if config.data.source or own is None else own
    loaded = opening.with_output(origin.weights, data.task)
    folder = origin.tokenizer if origin.tokenizer.is_dir() else None
    if not data.source:
        return Opened(
            loaded.model, loaded.params, loaded.labels, folder, None, ends(origin, loaded.model)
        )
    if config.eval_limit and not (0 < data.eval_limit <= config.eval_limit):
        data = dataclasses.replace(data, eval_limit=config.eval_limit)
    named = tuple(loaded.labels or ())
    if not data.classes and named and not all(label.startswith("LABEL_") for label in named):
        data = dataclasses.replace(data, classes=named)
    made = setup.prepare(data, origin, pretrained.load_config(origin.weights))
    kind, head = made.task.kind, loaded.model.config.head
    if head is None or head.kind != kinds.head_of(kind):
        has = "no head" if head is None else f"a {head.kind} head"
        raise ValueError(
            f"{config.model} has {has}, but {data.source} is a {kind} task: fine-tune it on its "
            "task first, or give other data"
        )
    if kind in ("classification", "token") and made.task.num_labels != head.num_labels:
        raise ValueError(
            f"{config.model} knows {head.num_labels} classes ({', '.join(named)}), {data.source} "
            f"has {made.task.num_labels} ({', '.join(made.task.label_names)})"
        )
    metric = outputs.HEADLINE[kind]
    rows = rows_of(loaded.model.config, kind, data.max_length)
    task = Task(
        data.source, kind, metric, metric in LESS, data, made.task, made.tokenizer, made.splits,
        rows,
    )  # fmt: skip
    around = ends(origin, loaded.model)
    return Opened(loaded.model, loaded.params, loaded.labels, folder, task, around)


def ends(origin: Any, model: Model) -> tuple[int, int] | None:
    """What the tokenizer puts around an empty text, where that is one token on either side."""
    from steppe.data.text import Tokenizer
    from steppe.models.encoder import EncoderConfig

    if not isinstance(model.config, EncoderConfig):
        return None
    ids = list(Tokenizer.open(origin.tokenizer).encode_batch([""])[0]["input_ids"])
    return (int(ids[0]), int(ids[-1])) if len(ids) == 2 else None


def calibration(opened: Opened, config: QuantizeConfig, seed: int) -> tuple[Model, list[Any]]:
    """(the model as it reads them, batches of inputs), of the training split or of noise.

    Raises:
      ValueError: data is asked for, and none is known.
    """
    if config.calibration == "data":
        if opened.task is None:
            raise ValueError(
                f"{config.model} names no data to calibrate with: give --data.source, or "
                "--calibration noise"
            )
        some: Iterator[dict[str, np.ndarray]] = opened.task.some(
            config.examples, config.batch_size, seed
        )
        return opened.model, [{k: v for k, v in b.items() if k != "labels"} for b in some]
    rows = min(config.batch_size, config.examples)
    count = -(-config.examples // rows)
    made = noise(opened, config, rows)
    key = jax.random.key(seed)
    batches = generator.batches(made, made.init(key), opened.params, key, count)
    rest = config.examples - rows * (count - 1)
    batches[-1] = jax.tree.map(lambda leaf: leaf[:rest], batches[-1])
    return generator.feeding(opened.model), batches


def noise(opened: Opened, config: QuantizeConfig, rows: int) -> generator.Generator:
    """Inputs that nobody learns: random tokens; dead leaves, or images of an untrained network."""
    if opened.vision and config.images == "leaves":
        return generator.leaves(opened.model, rows=rows, size=_side(opened))
    if opened.vision:
        return generator.pixels(opened.model, rows=rows, size=_side(opened))
    return generator.random_tokens(
        opened.model, rows=rows, length=length(opened, config), ends=opened.ends
    )


def learned(opened: Opened, config: QuantizeConfig) -> generator.Generator:
    """The generator of a game.

    Raises:
      ValueError: an adapter or candidates that do not fit the model.
    """
    if opened.vision and config.candidates:
        raise ValueError(
            f"candidates={config.candidates} are words, and {config.model} reads images: leave it "
            "at 0"
        )
    if opened.vision:
        return generator.pixels(
            opened.model,
            rows=config.batch_size,
            size=_side(opened),
            scenes=config.images == "leaves",
        )
    return generator.noise(
        opened.model,
        rows=config.batch_size,
        length=length(opened, config),
        adapter=config.adapter,
        ends=opened.ends,
        candidates=config.candidates,
    )


def length(opened: Opened, config: QuantizeConfig) -> int:
    """Tokens of a made text: as asked for, as far as the model reads."""
    return min(config.length, int(opened.model.config.max_length))


def _side(opened: Opened) -> int | None:
    """Pixels of the data's images, which may be smaller than the model's."""
    return None if opened.task is None else opened.task.data.image_size or None
