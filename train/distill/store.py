"""Stores of a teacher's predictions: the k most probable tokens and the remainder, on disk.

  kept of a token       i_1..i_k,  log p(i_1) >= ... >= log p(i_k),  log (1 - sum_j p(i_j))

in nats, of the tokens that a row is trained on. The log probabilities are stored as

  float32    exactly
  float16    largest error |log p| / 2^11: 0.004 between -8 and -16
  int8       low + scale (code + 127), one low and scale a token: largest error
             (log p(i_1) - log p(i_k)) / 508; the code -128 is minus infinity

and the remainder as float32. What is read is divided by its sum, so that k + 1 outcomes are a
distribution again; this at most doubles the errors. The largest error that was met while writing
is in the manifest.

Layout: ``FOLDER/shard-00000.safetensors``, ... and ``FOLDER/manifest.json``, which says what the
store is of (hashes of teacher, tokenizer and data) and lists the finished shards with their
SHA-256. A shard appears by one rename, and only then in the manifest, so that a killed writer
goes on after the last one. Reading maps the files into memory and checks the hash of a shard when
it is first used.

Deviations: none; the format is ours.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from steppe.models.weights import Safetensors
from steppe.train.checkpoint import write_json

MANIFEST = "manifest.json"
FORMAT = 1
DTYPES = ("float32", "float16", "int8")
LEVELS = 254  # steps of int8 between the least and the most probable of the k
NOTHING = -128  # code of minus infinity
# What a manifest holds, and what of every shard.
KEYS: dict[str, Any] = {
    **dict.fromkeys(("teacher", "tokenizer", "dataset", "dtype"), str),
    **dict.fromkeys(("k", "vocab_size", "examples", "tokens"), int),
    **dict.fromkeys(("temperature", "max_error"), (int, float)),
    **dict.fromkeys(("shift", "complete"), bool),
    "shards": list,
}
SHARD_KEYS: dict[str, Any] = {
    **dict.fromkeys(("bytes", "examples", "tokens"), int),
    "sha256": str,
    "max_error": (int, float),
}


class StoreError(ValueError):
    """A store that cannot be used; the message says why and what to do."""


class Identity(NamedTuple):
    """What a store is of: three hashes (see ``offline`` for ours).

    Attributes:
      teacher: of the weights and the configuration.
      tokenizer: of the vocabulary.
      dataset: of what is learnt, masks included.
    """

    teacher: str
    tokenizer: str
    dataset: str


class Example(NamedTuple):
    """What is kept of one row of the data. n tokens.

    Attributes:
      labels: the tokens that the teacher was asked for, int32 [n].
      ids: the most probable ones, int32 [n, k].
      log_p: their log probabilities, float32 [n, k].
      log_rest: log probability of all others, float32 [n].
      read: hash of the tokens that the teacher read, int64; 0 = not known.
    """

    labels: Int[np.ndarray, " n"]
    ids: Int[np.ndarray, "n k"]
    log_p: Float[np.ndarray, "n k"]
    log_rest: Float[np.ndarray, " n"]
    read: int = 0


def encode(log_p: Float[np.ndarray, "n k"], dtype: str) -> tuple[dict[str, np.ndarray], float]:
    """What is stored of log probabilities, and the largest error that this makes, in nats.

    Raises:
      ValueError: an unknown dtype; values that are NaN or positive beyond rounding.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    values = np.asarray(log_p, np.float32)
    if not (values <= 1e-3).all():  # NaN too
        raise ValueError("log_p must be log probabilities <= 0; look for NaN logits")
    if dtype != "int8":
        made = {"log_p": values.astype(dtype)}
    else:
        finite = np.isfinite(values)
        top = np.where(finite, values, -np.inf).max(-1, initial=-np.inf, keepdims=True)
        low = np.where(finite, values, np.inf).min(-1, initial=np.inf, keepdims=True)
        low = np.where(np.isfinite(low), low, 0).astype(np.float32)
        scale = np.where(np.isfinite(top), (top - low) / LEVELS, 0).astype(np.float32)
        steps = np.where(finite, values - low, 0) / np.where(scale > 0, scale, 1)
        code = np.clip(np.rint(steps), 0, LEVELS) - 127
        code = np.where(finite, code, NOTHING).astype(np.int8)
        made = {"log_p": code, "low": low[:, 0], "scale": scale[:, 0]}
    back = decode(made)
    finite = np.isfinite(values)
    error = np.abs(np.where(finite, back, 0) - np.where(finite, values, 0))
    return made, float(error.max(initial=0.0))


def decode(stored: Mapping[str, np.ndarray]) -> Float[np.ndarray, "n k"]:
    """The log probabilities that :func:`encode` stored, float32."""
    code = stored["log_p"]
    if code.dtype != np.int8:
        return np.asarray(code, np.float32)
    value = stored["low"][:, None] + (code.astype(np.float32) + 127) * stored["scale"][:, None]
    return np.where(code == NOTHING, -np.inf, value).astype(np.float32)


class Writer:
    """Fills a store row by row; goes on with one that was interrupted.

    Use as a context manager: what did not fill a shard yet is lost when the block fails, and
    rows of finished shards need not be computed again (see ``in``).

    Args:
      folder: made if need be.
      identity: what the store is of.
      k: tokens kept of each position.
      vocab_size: V.
      dtype: "float32", "float16" or "int8".
      temperature: at which the log probabilities are.
      shift: whether the label at t is predicted at t - 1.
      shard_tokens: a shard is written when it holds so many tokens.

    Raises:
      ValueError: a number out of range.
      StoreError: the folder holds a store of something else (names both), or a finished one.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        identity: Identity,
        *,
        k: int,
        vocab_size: int,
        dtype: str = "float16",
        temperature: float = 1.0,
        shift: bool = True,
        shard_tokens: int = 1 << 18,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if not 1 <= k <= vocab_size:
            raise ValueError(f"k must lie in 1..{vocab_size}, the vocabulary, got {k}")
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens must be >= 1, got {shard_tokens}")
        self.folder = Path(folder)
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            **identity._asdict(),
            "k": k,
            "vocab_size": vocab_size,
            "dtype": dtype,
            "temperature": float(temperature),
            "shift": bool(shift),
            "complete": False,
            "examples": 0,
            "tokens": 0,
            "max_error": 0.0,
            "shards": [],
        }
        self._shard_tokens = shard_tokens
        self._held: list[tuple[int, Example]] = []
        self._pending = 0
        self._rows: set[int] = set()
        if (self.folder / MANIFEST).is_file():
            self._resume()
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob(".shard-*"):
            stale.unlink()

    def __contains__(self, row: int) -> bool:
        """Whether a row of the data is in the store, or waits for its shard to fill."""
        return int(row) in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def tokens(self) -> int:
        """Tokens of all its rows."""
        return int(self._manifest["tokens"]) + self._pending

    def add(self, row: int, example: Example) -> None:
        """Takes up one row; writes a shard when there is enough for one.

        Raises:
          ValueError: the row is there already, or arrays that do not fit k.
          OSError: the disk is full; finished shards stand.
        """
        k, n = self._manifest["k"], len(example.labels)
        if row in self:
            raise ValueError(f"row {row} is in the store already; skip those that are")
        shapes = [np.shape(x) for x in example[:4]]
        if shapes != [(n,), (n, k), (n, k), (n,)]:
            raise ValueError(
                f"an example of {n} labels must have ids and log_p [{n}, {k}] and log_rest "
                f"[{n}], got {shapes[1:]}"
            )
        self._held.append((int(row), example))
        self._rows.add(int(row))
        self._pending += n
        if self._pending >= self._shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Writes what waits as a shard.

        Raises:
          OSError: the disk is full; finished shards stand.
        """
        if not self._held:
            return
        rows, held = zip(*self._held, strict=True)
        *parts, read = zip(*held, strict=True)
        labels, ids, log_p, log_rest = map(np.concatenate, parts)
        whole = Example(labels, ids, log_p, log_rest)
        stored, error = encode(whole.log_p, self._manifest["dtype"])
        small = self._manifest["vocab_size"] <= 1 << 16
        tensors = {
            "rows": np.asarray(rows, np.int64),
            "read": np.asarray(read, np.int64),
            "starts": np.cumsum([0, *(len(e.labels) for e in held)], dtype=np.int64),
            "labels": whole.labels.astype(np.int32),
            # safetensors' older readers lack uint16: the same bits as int16.
            "ids": whole.ids.astype(np.uint16).view(np.int16)
            if small
            else whole.ids.astype(np.int32),
            "log_rest": whole.log_rest.astype(np.float32),
            **stored,
        }
        number = 1 + max((int(s["file"][6:11]) for s in self._manifest["shards"]), default=-1)
        name = f"shard-{number:05d}.safetensors"
        entry = {"file": name, **_save(self.folder, name, tensors)}
        entry.update(examples=len(rows), tokens=len(whole.labels), max_error=error)
        self._publish([*self._manifest["shards"], entry], complete=False)
        self._held, self._pending = [], 0

    def finish(self) -> Path:
        """Writes the rest and marks the store as complete.

        Raises:
          ValueError: no row was added.
        """
        self.flush()
        if not self._manifest["shards"]:
            raise ValueError(f"the store at {self.folder} would be empty; add rows first")
        self._publish(self._manifest["shards"], complete=True)
        return self.folder

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.finish()

    def _publish(self, shards: list[dict[str, Any]], *, complete: bool) -> None:
        new = {
            **self._manifest,
            "shards": shards,
            "complete": complete,
            "examples": sum(s["examples"] for s in shards),
            "tokens": sum(s["tokens"] for s in shards),
            "max_error": max((s["max_error"] for s in shards), default=0.0),
        }
        write_json(self.folder / MANIFEST, new)
        self._manifest = new

    def _resume(self) -> None:
        found = _read_manifest(self.folder)
        _same(self.folder, found, self._manifest)
        good = []
        for shard in found["shards"]:
            file = self.folder / shard["file"]
            # A damaged shard is of no use: its rows are written again.
            if _damage(file, shard):
                file.unlink(missing_ok=True)
                continue
            good.append(shard)
            self._rows.update(Safetensors([file]).read("rows").tolist())
        if found["complete"] and len(good) == len(found["shards"]):
            raise StoreError(
                f"{self.folder} holds a complete store of {found['examples']} examples; read it, "
                "or choose a new folder"
            )
        self._publish(good, complete=False)


class Store:
    """A store, read row by row.

    Args:
      folder: what a :class:`Writer` made.
      teacher, tokenizer, dataset: hashes that the store must have; None = any.
      partial: also open one whose writer has not finished.

    Raises:
      FileNotFoundError: no store.
      StoreError: a damaged manifest, a store of something else (names both hashes), an
        unfinished one.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        teacher: str | None = None,
        tokenizer: str | None = None,
        dataset: str | None = None,
        partial: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        wanted = {"teacher": teacher, "tokenizer": tokenizer, "dataset": dataset}
        _same(self.folder, self.manifest, {k: v for k, v in wanted.items() if v is not None})
        if not self.manifest["complete"] and not partial:
            raise StoreError(
                f"the store at {self.folder} is unfinished ({self.manifest['examples']} examples); "
                "run its writer again, or open it with partial=True"
            )
        self.k: int = self.manifest["k"]
        self.shift: bool = self.manifest["shift"]
        self.temperature: float = self.manifest["temperature"]
        self._shards: dict[int, Safetensors] = {}
        self._places: dict[int, tuple[int, int]] | None = None

    def __len__(self) -> int:
        return int(self.manifest["examples"])

    def __contains__(self, row: int) -> bool:
        return int(row) in self._index()

    def check(self) -> None:
        """Reads every shard and compares its hash.

        Raises:
          StoreError: a shard is damaged or missing; names the file.
        """
        for number in range(len(self.manifest["shards"])):
            self._shard(number)

    def example(self, row: int) -> Example:
        """What is kept of a row of the data.

        Raises:
          StoreError: the row is not in the store, or its shard is damaged.
        """
        place = self._index().get(int(row))
        if place is None:
            raise StoreError(
                f"row {row} is not in the store at {self.folder}; it was written for other data"
            )
        number, at = place
        shard = self._shard(number)
        start, stop = (int(n) for n in shard.read("starts", (slice(at, at + 2),)))
        part = (slice(start, stop),)
        names = ["log_p", *(n for n in ("low", "scale") if n in shard.shapes())]
        log_p = decode({name: shard.read(name, part) for name in names})
        log_rest = np.array(shard.read("log_rest", part), np.float32)
        total = np.logaddexp(np.logaddexp.reduce(log_p, axis=1, initial=-np.inf), log_rest)
        read = int(shard.read("read", (slice(at, at + 1),))[0]) if "read" in shard.shapes() else 0
        ids = np.asarray(shard.read("ids", part))
        if ids.dtype == np.int16:
            ids = ids.view(np.uint16)
        return Example(
            labels=np.array(shard.read("labels", part)),
            ids=ids.astype(np.int32),
            log_p=log_p - total[:, None],
            log_rest=log_rest - total,
            read=read,
        )

    def _index(self) -> dict[int, tuple[int, int]]:
        """Row of the data -> (shard, place in it); does not read the shards to their end."""
        if self._places is None:
            self._places = {}
            for number, entry in enumerate(self.manifest["shards"]):
                rows = self._opened(entry, whole=False).read("rows").tolist()
                self._places.update((int(row), (number, at)) for at, row in enumerate(rows))
        return self._places

    def _shard(self, number: int) -> Safetensors:
        if number not in self._shards:
            self._shards[number] = self._opened(self.manifest["shards"][number], whole=True)
        return self._shards[number]

    def _opened(self, entry: Mapping[str, Any], *, whole: bool) -> Safetensors:
        file = self.folder / entry["file"]
        damage = _damage(file, entry, whole=whole)
        if not damage:
            try:
                return Safetensors([file])
            except ValueError as error:
                damage = f"is damaged ({error})"
        raise StoreError(f"{file} {damage}; run the store's writer again to replace it")


def _save(folder: Path, name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Writes a file in one move; its size and hash."""
    from safetensors.numpy import save_file

    scratch = folder / f".{name}"
    try:
        save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, scratch)
        with open(scratch, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        size = scratch.stat().st_size
        os.replace(scratch, folder / name)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    return {"sha256": digest, "bytes": size}


def _damage(file: Path, entry: Mapping[str, Any], *, whole: bool = True) -> str:
    """What is wrong with a shard, or nothing; without ``whole`` by its size alone."""
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    if size != entry["bytes"]:
        return f"is damaged: {size} bytes, the manifest says {entry['bytes']}"
    if not whole:
        return ""
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != entry["sha256"]:
        return f"is damaged: SHA-256 {found[:12]}, the manifest says {entry['sha256'][:12]}"
    return ""


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"no store at {folder}: it holds no {MANIFEST}")
    try:
        found = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise StoreError(f"{file} is damaged ({error!r}); write the store again") from None
    _holds(file, "", found, {"format": int})
    if found["format"] != FORMAT:
        raise StoreError(f"{file} has the format {found['format']}, this version reads {FORMAT}")
    _holds(file, "", found, KEYS)
    for number, shard in enumerate(found["shards"]):
        where = f"shards[{number}]."
        _holds(file, where, shard, {"file": str})
        if Path(shard["file"]).name != shard["file"]:
            raise StoreError(f"{file} names a shard outside its folder: {shard['file']!r}")
        _holds(file, where, shard, SHARD_KEYS)
    return dict(found)


def _holds(file: Path, where: str, found: Any, keys: Mapping[str, Any]) -> None:
    """Raises StoreError unless a part of the manifest has all keys, with values of their kind."""
    for key, kind in keys.items():
        value = found.get(key) if isinstance(found, dict) else None
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            continue
        what = "lacks" if value is None else f"holds {value!r} for"
        raise StoreError(f"{file} is damaged: it {what} {where + key!r}; write the store again")


def _same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if name in ("complete", "examples", "tokens", "max_error", "shards"):
            continue
        if found.get(name) != value:
            raise StoreError(
                f"the store at {folder} was made with another {name}: {found.get(name)!r}, here "
                f"it is {value!r}; use what it was made with, or write a new store"
            )
