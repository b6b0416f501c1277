"""Records from Hugging Face ``datasets`` and from TensorFlow Datasets (without TensorFlow)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from steppe.data.errors import DataError, listing

Record = dict[str, Any]


class Rows(Sequence[Record]):
    """A random-access source seen as records: rows are converted when asked for.

    Args:
      source: has ``len`` and ``[i]`` -> dict.
      name: prefix of the ids of rows without an ``id`` column.
      convert: column -> conversion of its value.
    """

    def __init__(
        self, source: Any, name: str, convert: dict[str, Callable[[Any], Any]] | None = None
    ) -> None:
        self._source = source
        self._name = name
        self._convert = convert or {}

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        held = dict(self._source[row])
        for name, function in self._convert.items():
            if held.get(name) is not None:
                held[name] = function(held[name])
        own = held.pop("id", None)
        return {"id": f"{self._name}:{row}" if own is None else str(own), **held}

    def __iter__(self) -> Iterator[Record]:
        return (self[row] for row in range(len(self)))


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _choose(splits: Sequence[str], split: str | None, address: str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None:
        raise DataError(f"{address} has the splits {listing(splits)}; name one with split=")
    if split not in splits:
        raise DataError(f"{address} has no split {split!r}; it has {listing(splits)}")
    return split


def hugging_face(name: str, split: str | None) -> Rows:
    """Opens a data set of ``datasets``: a local folder, or a name on the hub.

    Args:
      name: ``PATH[/CONFIG]`` of a folder that exists, else ``ORG/NAME[/CONFIG]`` or
        ``NAME[/CONFIG]``. A folder may come from ``save_to_disk`` or hold data files.

    Returns:
      Records; class labels (also in lists) become their names.

    Raises:
      FileNotFoundError: the name is a path, and nothing is there.
      DataError: it cannot be opened, or has no such split.
    """
    import datasets

    address = f"hf:{name}"
    path, config = _split_path(name)
    # Ids must not depend on where a folder lies.
    base = name if path is None else "/".join(filter(None, (path.resolve().name, config)))
    if path is not None and config is None and _saved(path):
        try:
            opened = datasets.load_from_disk(str(path))
        except Exception as error:  # many kinds: Arrow, OS, its own
            raise DataError(f"{address} cannot be opened: {_one_line(error)}") from error
    else:
        opened = _load(datasets, address, name, path, config)
    if isinstance(opened, datasets.DatasetDict):
        split = _choose(list(opened), split, address)
        opened = opened[split]
    elif split is not None and str(opened.split) != split:
        raise DataError(f"{address} has no split {split!r}; it holds {opened.split or 'one table'}")
    convert = {
        column: function
        for column, feature in opened.features.items()
        if (function := _label_names(datasets, feature)) is not None
    }
    return Rows(opened, f"{base}/{split}" if split else base, convert)


def _split_path(name: str) -> tuple[Path | None, str | None]:
    """The folder that the name begins with, if one exists, and the configuration after it."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path, None
    # The configurations of a local folder are declared in its README.md.
    if (path.parent / "README.md").is_file() and path.parent != Path():
        return path.parent, path.name
    if name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"hf:{name}: no such folder")
    return None, None


def _saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _load(datasets: Any, address: str, name: str, path: Path | None, config: str | None) -> Any:
    if path is not None:
        tries = [(str(path), config)]
    else:
        head, _, last = name.rpartition("/")
        tries = [(name, None)] if name.count("/") < 2 else []
        tries += [(head, last)] if head else []
    problem: Exception | None = None
    for repository, configuration in tries:
        try:
            return datasets.load_dataset(repository, configuration)
        except Exception as error:  # hub, network, format: all are told in one line
            problem = problem or error
    raise DataError(
        f"{address} cannot be opened: {_one_line(problem) if problem else 'no such data set'}; "
        "give a local folder, or a name on the hub with the network on"
    ) from problem


def _label_names(datasets: Any, feature: Any) -> Callable[[Any], Any] | None:
    """Turns class numbers into names; numbers outside (-1 marks hidden labels) stay."""
    if isinstance(feature, datasets.ClassLabel):
        names = feature.names
        return lambda value: names[value] if 0 <= value < len(names) else value
    inner = getattr(feature, "feature", None)
    if isinstance(inner, datasets.ClassLabel):
        each = _label_names(datasets, inner)
        return lambda values: [each(value) for value in values] if each else values
    return None


def tensorflow_datasets(name: str, split: str | None) -> Rows:
    """Opens a prepared data set of ``tensorflow_datasets`` for random access, without TensorFlow.

    Args:
      name: ``NAME[/CONFIG][:VERSION]``. The folder is ``$TFDS_DATA_DIR`` or the library's own.

    Returns:
      Records; byte strings become text, class labels their names.

    Raises:
      DataError: not prepared in array_record form, or no such split.
    """
    import tensorflow_datasets as tfds

    address = f"tfds:{name}"
    try:
        builder = tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"), try_gcs=False)
        splits = list(builder.info.splits)
        if not splits:
            raise DataError(
                f"{address} is not prepared in {builder.data_dir}; prepare it with "
                "`builder.download_and_prepare(file_format='array_record')`"
            )
        split = _choose(splits, split, address)
        source = builder.as_data_source(split=split)
        features = builder.info.features
    except DataError:
        raise
    except Exception as error:  # registry, files, formats: all are told in one line
        raise DataError(f"{address} cannot be opened: {_one_line(error)}") from error
    convert = {column: _decoder(tfds, features[column]) for column in features}
    return Rows(source, f"{name}/{split}", convert)


def _decoder(tfds: Any, feature: Any) -> Callable[[Any], Any]:
    if isinstance(feature, tfds.features.ClassLabel) and feature.names:
        names = feature.names
        return lambda value: names[int(value)] if 0 <= int(value) < len(names) else int(value)
    return _plain


def _plain(value: Any) -> Any:
    """Bytes to text, numpy scalars to Python's, inside lists and dicts too."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if hasattr(value, "ndim") and hasattr(value, "tolist"):
        return _plain(value.tolist()) if value.dtype == object or value.ndim == 0 else value
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
