"""Records by address: ``file:PATH``, ``hf:NAME[/CONFIG]``, ``tfds:NAME``, ``asset:NAME[/PART]``,
``reasoning-gym:NAME[?size=N&seed=S]``.

A record is a dict with a string ``id`` that is stable across runs, plus columns. Whatever
the source, :func:`load` returns a random-access sequence of such dicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

from steppe.data.errors import DataError, column, listing, row_name

Record = dict[str, Any]
Records = Sequence[Record]


class Renamed(Sequence[Record]):
    """A view of records with some columns chosen and renamed; rows are made when asked for."""

    def __init__(self, records: Records, columns: Mapping[str, str]) -> None:
        self._records = records
        self._columns = {"id": "id", **columns}

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        record = self._records[index]
        missing = [old for old in self._columns.values() if old not in record]
        if missing:
            raise DataError(
                f"{row_name(index, record)} has no column {missing[0]!r}, "
                f"only {listing(record)}; name existing ones in columns="
            )
        chosen = {new: record[old] for new, old in self._columns.items()}
        return {**chosen, "id": str(chosen["id"])}

    def __iter__(self) -> Iterator[Record]:
        return (self[row] for row in range(len(self)))


def load(
    address: str,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | Sequence[str] | None = None,
) -> Records:
    """Opens a source.

    Args:
      address: scheme and name, see the module.
      split: which part, for sources that come in parts: the split of an ``hf:`` or ``tfds:``
        data set, the base name of a file inside a ``file:`` folder, the value of an asset's
        ``split`` column.
      columns: names to keep, or a mapping from new to existing names. Columns not named are
        dropped; ``id`` stays. None keeps all.

    Raises:
      DataError: unknown scheme (the known ones are listed), unknown split, malformed data.
      AssetMissing: the asset has not been fetched; the message holds the command.
      FileNotFoundError: there is no such file.
    """
    scheme, colon, name = address.partition(":")
    known = ", ".join(f"{s}:" for s in _SCHEMES)
    if not colon or scheme not in _SCHEMES:
        raise DataError(
            f"address {address!r} has no known scheme ({known}); a file is 'file:{address}'"
        )
    if not name:
        raise DataError(f"address {address!r} names nothing after {scheme!r}:")
    records = _SCHEMES[scheme](name, split)
    if columns is None:
        return records
    if isinstance(columns, str):
        raise DataError(f"columns={columns!r} must be a list of names or a mapping, not text")
    names = columns if isinstance(columns, Mapping) else {name: name for name in columns}
    renamed = Renamed(records, names)
    _ = renamed[0]  # a wrong name is told now, not in the middle of a run
    return renamed


def _file(name: str, split: str | None) -> Records:
    from steppe.data import files

    return files.read(name, split)


def _asset(name: str, split: str | None) -> Records:
    from steppe.data import assets
    from steppe.data.assets import readers

    asset, part = readers.part(name)
    records = part.read(assets.path(asset))
    if split is None:
        return records
    if "split" not in part.columns:
        raise DataError(f"asset:{name} has no official splits; name none, and it is divided")
    chosen = [record for record in records if record["split"] == split]
    if not chosen:
        known = sorted({column(record, "split", 0, option="split") for record in records})
        raise DataError(f"asset:{name} has no split {split!r}; it has {listing(known)}")
    return chosen


def _hugging_face(name: str, split: str | None) -> Records:
    from steppe.data import hub

    return hub.hugging_face(name, split)


def _tensorflow(name: str, split: str | None) -> Records:
    from steppe.data import hub

    return hub.tensorflow_datasets(name, split)


def _reasoning_gym(name: str, split: str | None) -> Records:
    from steppe.data import generated

    if split is not None:
        raise DataError(
            f"reasoning-gym:{name} has no official splits; use another seed, or name none, and it "
            "is divided"
        )
    return generated.reasoning_gym(name)


_SCHEMES: dict[str, Callable[[str, str | None], Records]] = {
    "file": _file,
    "hf": _hugging_face,
    "tfds": _tensorflow,
    "asset": _asset,
    "reasoning-gym": _reasoning_gym,
}
