"""From settings to values: the model folder, the records, the task, the encoded splits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steppe.data import assets, sources, splits, tasks
from steppe.data.text import Tokenizer
from steppe.launch import kinds
from steppe.launch.config import DataConfig
from steppe.models import pretrained

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Attributes:
      name: as the user wrote it.
      weights: folder, or file of one of the formats that are read.
      tokenizer: folder with the tokenizer's files, or the ``.gguf`` file itself.
      licence: of the weights, where it is known.
    """

    name: str
    weights: Path
    tokenizer: Path
    licence: str = ""


@dataclass(frozen=True)
class Data:
    """A task with its encoded splits.

    Attributes:
      task: from ``steppe.data.tasks``.
      tokenizer: what encoded it; None for images.
      splits: split -> Dataset.
      source, licence: for the report.
    """

    task: Any
    tokenizer: Tokenizer | None
    splits: dict[str, Any]
    source: str
    licence: str = ""

    def counts(self) -> dict[str, int]:
        """Examples a split."""
        return {name: len(dataset) for name, dataset in self.splits.items()}


def origin(name: str) -> Origin:
    """Finds a model by ``asset:NAME`` or path.

    Raises:
      AssetMissing: not fetched; the message holds the command.
      FileNotFoundError: no such folder.
    """
    if name.startswith("asset:"):
        asset = assets.get(name.removeprefix("asset:"))
        if asset.role != "weights":
            raise ValueError(f"model must be a model, but asset {asset.name!r} is {asset.role}")
        folder = assets.path(asset.name)
        files = [f for suffix in pretrained.READERS for f in sorted(folder.glob(f"*{suffix}"))]
        weights = files[0] if files else folder
        own = weights if weights.suffix == ".gguf" else assets.tokenizer(asset.name)
        return Origin(name, weights, own, asset.licence)
    path = Path(name).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"model {name!r} does not exist; give a folder, or asset:NAME (steppe assets list)"
        )
    if path.is_file() and path.suffix not in pretrained.READERS:
        known = ", ".join(pretrained.READERS)
        raise ValueError(f"model {name!r} must be a folder or a file of {known}")
    inside = path.is_dir() or path.suffix == ".gguf"
    return Origin(name, path, path if inside else path.parent)


def records(config: DataConfig) -> list[dict[str, Any]]:
    """The records of the source, in its order."""
    return list(sources.load(config.source, split=config.split))


def task(config: DataConfig, found: list[dict[str, Any]], image_size: int = 224) -> Any:
    """The task of the settings; classes that are not given are those found, sorted.

    Args:
      image_size: of the model, for settings that leave it open.

    Raises:
      ValueError: a second column is asked for that the task or the data does not have.
    """
    _check_pair(config, found)
    if config.task in ("lm", "chat", "seq2seq"):
        return _language_task(config, found)
    if config.task == "image":
        size = config.image_size or image_size
        options: dict[str, Any] = {"image": config.image, "label": config.label, "size": size}
        if config.classes:
            return tasks.ImageClassification(config.classes, **options)
        return tasks.ImageClassification.from_records(found, **options)
    names = config.classes
    if config.task == "classification":
        if names:
            return tasks.Classification(names, text=config.text, label=config.label)
        return tasks.Classification.from_records(found, text=config.text, label=config.label)
    if config.task == "pair":
        columns = {"first": config.text, "second": config.pair, "label": config.label}
        if names:
            return tasks.PairClassification(names, **columns)
        return tasks.PairClassification.from_records(found, **columns)
    if config.task == "regression":
        second = config.pair if found and config.pair in found[0] else None
        return tasks.Regression(text=config.text, target=config.label, second=second)
    if config.task == "token":
        options = _token_options(config, found)
        if names:
            return tasks.TokenClassification(labels=names, **options)
        return tasks.TokenClassification.from_records(found, **options)
    if config.task == "span":
        return tasks.SpanQA(question=config.text, context=config.pair, answers=config.label)
    return tasks.MaskedLM(text=config.text)


def _language_task(config: DataConfig, found: list[dict[str, Any]]) -> Any:
    if config.task == "lm":
        return tasks.CausalLM(text=config.text, packed=config.packed)
    if config.task == "seq2seq":
        return tasks.Seq2Seq(source=config.input, target=config.target, source_prefix=config.prefix)
    if found and config.messages in found[0]:
        return tasks.Chat(messages=config.messages, packed=config.packed)
    return tasks.Instruction(
        prompt=config.prompt,
        answer=config.answer,
        system=config.system or None,
        packed=config.packed,
    )


def _check_pair(config: DataConfig, found: list[dict[str, Any]]) -> None:
    default = DataConfig().pair
    if config.pair == default or config.task in ("pair", "span"):
        return
    if config.task != "regression":
        raise ValueError(
            f"data.pair={config.pair!r} is not read by a {config.task} task; "
            "use --data.task pair for two texts"
        )
    if found and config.pair not in found[0]:
        raise ValueError(
            f"data.pair={config.pair!r} is not a column of the data, only {', '.join(found[0])}"
        )


def divide(config: DataConfig, found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Train, valid and test by hash of the id, cut to ``limit`` and ``eval_limit``.

    Raises:
      ValueError: an official split is asked for that the data does not have; a split that
        would be empty.
    """
    shares = dict(zip(SPLITS, config.fractions, strict=True))
    key = config.group or "id"
    if config.official:
        test = [row for row in found if row.get("split") == "test"]
        if not test or len(test) == len(found):
            raise ValueError(
                "data.official needs a column 'split' that says test for a part of the data; "
                "leave it out to divide by hash"
            )
        rest = [row for row in found if row.get("split") != "test"]
        whole = shares["train"] + shares["valid"]
        parts = splits.by_hash(rest, {k: shares[k] / whole for k in SPLITS[:2]}, key=key)
        parts["test"] = test
    else:
        parts = splits.by_hash(found, shares, key=key)
    return {
        name: first(rows, config.limit if name == "train" else config.eval_limit)
        for name, rows in parts.items()
    }


def first(rows: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The ``limit`` rows whose ids hash lowest, in the order of the data; 0 = all rows.

    Files are often sorted by class or by date: the first rows of a file are no sample of it.
    """
    if not limit or limit >= len(rows):
        return rows
    places = [splits.position(str(row["id"]), "limit") for row in rows]
    chosen = sorted(sorted(range(len(rows)), key=places.__getitem__)[:limit])
    return [rows[i] for i in chosen]


def prepare(config: DataConfig, source: Origin, model: Any) -> Data:
    """Reads, divides and encodes.

    Args:
      source: the model's origin, for its tokenizer.
      model: its configuration, without a head.

    Raises:
      ValueError: a task that the model does not serve, max_length above its positions, a
        tokenizer with ids that it has no embedding for, an image size that its patches do not
        divide; and whatever is wrong with the data, naming the row.
    """
    tokenizer = fitting(config, source, model)
    found = records(config)
    made = task(config, found, getattr(model, "image_size", 224))
    encoded = {
        name: encode(made, rows, tokenizer, config, training=name == "train")
        for name, rows in divide(config, found).items()
    }
    return Data(made, tokenizer, encoded, config.source, licence(config.source))


def fitting(config: DataConfig, source: Origin, model: Any) -> Tokenizer | None:
    """The tokenizer, after checking that settings, model and tokenizer go together.

    None for images. Errors as :func:`prepare`.
    """
    kinds.check_task(config.task, model, source.name)
    if config.task == "image":
        _check_image(config, model)
        return None
    check_fit(config, model.max_length)
    tokenizer = Tokenizer.open(source.tokenizer)
    check_vocabulary(tokenizer, model.vocab_size, source.tokenizer)
    return tokenizer


def encode(
    made: Any,
    rows: list[dict[str, Any]],
    tokenizer: Tokenizer | None,
    config: DataConfig,
    *,
    training: bool,
) -> Any:
    """The dataset of some records.

    What is evaluated stands one text a row; a text of several rows shows each of them half of
    the row before, so that no token is predicted from almost nothing.
    """
    if made.kind == "lm" and not training:
        made = made.unpacked()
        if hasattr(made, "overlap"):
            made = dataclasses.replace(made, overlap=config.max_length // 2)
    return made.encode(rows, tokenizer, config.max_length)


def _check_image(config: DataConfig, model: Any) -> None:
    size = config.image_size or model.image_size
    if size % model.patch:
        near = max(round(size / model.patch), 1) * model.patch
        raise ValueError(
            f"data.image_size={size} is not a multiple of the model's patch of {model.patch} "
            f"pixels; use {near}"
        )
    if model.channels != 3:
        raise ValueError(f"images have 3 channels, but the model takes {model.channels}")


def check_fit(config: DataConfig, max_positions: int | None) -> None:
    """Raises ValueError where ``max_length`` is beyond the model's positions (None: no limit)."""
    if max_positions is not None and config.max_length > max_positions:
        raise ValueError(
            f"data.max_length={config.max_length} is longer than the model's {max_positions} "
            "positions; lower it"
        )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, folder: Path) -> None:
    """Raises ValueError where the tokenizer knows ids that the model does not embed."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} tokens but the model embeds "
            f"{vocab_size}; they do not belong together"
        )


def licence(address: str) -> str:
    """Licence of an asset's data; empty for other sources."""
    if not address.startswith("asset:"):
        return ""
    return assets.get(address.removeprefix("asset:").split("/")[0]).licence


def buckets(config: DataConfig, *, training: bool = False) -> tuple[int, ...] | None:
    """Padded lengths up to ``max_length``, which is always the last of them.

    None where the data decides: images have one size, and pairs of texts that no lengths are
    given for get pairs of lengths.
    """
    if config.task == "image" or (config.task == "seq2seq" and not config.buckets):
        return None
    if training and config.packed and config.task in ("lm", "chat"):
        return (config.max_length,)
    return (*sorted(b for b in set(config.buckets) if b < config.max_length), config.max_length)


def _token_options(config: DataConfig, found: list[dict[str, Any]]) -> dict[str, Any]:
    def marked(row: dict[str, Any]) -> bool:
        tags = row.get(config.label)
        return isinstance(tags, list) and any(str(tag).startswith("B-") for tag in tags)

    scheme = "iob2" if any(map(marked, found)) else "plain"
    return {"words": config.text, "tags": config.label, "scheme": scheme}
