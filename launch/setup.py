"""From settings to values: the model folder, the records, the task, the encoded splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steppe.data import assets, sources, splits, tasks
from steppe.data.text import Tokenizer
from steppe.launch.config import DataConfig

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Attributes:
      name: as the user wrote it.
      weights: folder or ``.onnx`` file.
      tokenizer: folder with the tokenizer's files.
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
      tokenizer: what encoded it.
      splits: split -> Dataset.
      source, licence: for the report.
    """

    task: Any
    tokenizer: Tokenizer
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
        onnx = sorted(folder.glob("*.onnx"))
        weights = onnx[0] if onnx else folder
        return Origin(name, weights, assets.tokenizer(asset.name), asset.licence)
    path = Path(name).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"model {name!r} does not exist; give a folder, or asset:NAME (steppe assets list)"
        )
    return Origin(name, path, path if path.is_dir() else path.parent)


def records(config: DataConfig) -> list[dict[str, Any]]:
    """The records of the source, in its order."""
    return list(sources.load(config.source, split=config.split))


def task(config: DataConfig, found: list[dict[str, Any]]) -> Any:
    """The task of the settings; classes that are not given are those found, sorted.

    Raises:
      ValueError: a second column is asked for that the task or the data does not have.
    """
    _check_pair(config, found)
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
    """Train, valid and test by hash of the id, the training split cut to ``limit``."""
    shares = dict(zip(SPLITS, config.fractions, strict=True))
    parts = splits.by_hash(found, shares)
    if config.limit:
        parts["train"] = parts["train"][: config.limit]
    return parts


def prepare(config: DataConfig, tokenizer_dir: Path, max_positions: int, vocab_size: int) -> Data:
    """Reads, divides and encodes.

    Args:
      max_positions: longest sequence that the model can take, in tokens.
      vocab_size: rows of the model's embedding.

    Raises:
      ValueError: max_length above the model's positions, a tokenizer with ids that the model
        has no embedding for; and whatever is wrong with the data, naming the row.
    """
    check_fit(config, max_positions)
    tokenizer = Tokenizer.from_dir(tokenizer_dir)
    check_vocabulary(tokenizer, vocab_size, tokenizer_dir)
    found = records(config)
    made = task(config, found)
    encoded = {
        name: made.encode(rows, tokenizer, config.max_length)
        for name, rows in divide(config, found).items()
    }
    return Data(made, tokenizer, encoded, config.source, licence(config.source))


def check_fit(config: DataConfig, max_positions: int) -> None:
    """Raises ValueError where ``max_length`` is beyond the model's positions."""
    if config.max_length > max_positions:
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


def buckets(config: DataConfig) -> tuple[int, ...]:
    """Padded lengths up to ``max_length``, which is always the last of them."""
    return (*sorted(b for b in set(config.buckets) if b < config.max_length), config.max_length)


def _token_options(config: DataConfig, found: list[dict[str, Any]]) -> dict[str, Any]:
    def marked(row: dict[str, Any]) -> bool:
        tags = row.get(config.label)
        return isinstance(tags, list) and any(str(tag).startswith("B-") for tag in tags)

    scheme = "iob2" if any(map(marked, found)) else "plain"
    return {"words": config.text, "tags": config.label, "scheme": scheme}
