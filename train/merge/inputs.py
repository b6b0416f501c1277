"""The folders that a streamed merge reads: what they hold, and whether they fit together.

Nothing but headers and configurations is read here. Tensors are compared under their names
without the family's prefix, because a base is often published without the class that wraps it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from steppe.models import weights
from steppe.models.families import family as family_of
from steppe.models.families.names import Family
from steppe.models.heads import POOLED
from steppe.train.merge.roles import Roles, head_names, role_of

# config.json keys that must agree for two folders to hold one architecture.
ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "dim",
    "d_model",
    "n_embd",
    "num_hidden_layers",
    "n_layers",
    "n_layer",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "patch_size",
)
# Keys that change what the same tensors compute. Many files leave them out where they have the
# family's default, so only folders that name one are compared. One line, one meaning: the first
# key that a folder has counts.
BEHAVIOUR = (
    ("num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads"),
    ("decoder_attention_heads",),
    ("num_key_value_heads",),
    ("head_dim",),
    ("hidden_activation", "hidden_act", "activation_function", "activation"),
    ("feed_forward_proj",),
    ("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps"),
    ("rope_theta",),
    ("position_embedding_type",),
    ("relative_attention_num_buckets",),
    ("relative_attention_max_distance",),
)
TASK_HEADS = ("classification", "regression", "token", "span")
ROWS = 10


class Tensor(NamedTuple):
    """A tensor of a file: its name there, shape, dtype and file."""

    stored: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


@dataclass(frozen=True)
class Input:
    """A folder with a model.

    Attributes:
      name: what it is called in reports; the task of a fine-tuned model.
      folder: where it is.
      raw: its config.json, {} where there is none.
      tensors: name without the family's prefix -> tensor.
      store: the open files.
    """

    name: str
    folder: Path
    raw: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    store: weights.Safetensors

    def read(self, name: str) -> np.ndarray:
        """The tensor as a flat memory map; keep it no longer than a copy takes."""
        return self.store.read(self.tensors[name].stored).reshape(-1)

    @property
    def family(self) -> Family | None:
        """The family of its config.json, None where that is not known."""
        try:
            return family_of(str(self.raw.get("model_type")))
        except ValueError:
            return None


def open_input(folder: str | os.PathLike[str], name: str) -> Input:
    """Opens a folder of Hugging Face layout.

    Raises:
      FileNotFoundError: there are no weights; pickle files are not read.
      ValueError: a file is damaged.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"model folder {path} does not exist")
    store = weights.open_directory(path)
    config = path / "config.json"
    raw = {}
    if config.is_file():
        try:
            raw = json.loads(config.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{config} is not valid JSON ({error})") from error
        if not isinstance(raw, dict):
            raise ValueError(f"{config} must hold an object, got {json.dumps(raw)[:40]}")
    opened = Input(name, path, raw, {}, store)
    family = opened.family
    prefix = f"{family.prefix}." if family is not None and family.prefix else ""
    tensors: dict[str, Tensor] = {}
    for stored, shape in store.shapes().items():
        view = store.read(stored)
        file = Path(view.filename) if isinstance(view, np.memmap) and view.filename else path
        short = stored.removeprefix(prefix)
        if short in tensors:
            raise ValueError(
                f"{file}: tensors {tensors[short].stored!r} and {stored!r} are both {short!r} to "
                "this family; keep the one that belongs to the model"
            )
        tensors[short] = Tensor(stored, tuple(shape), view.dtype, file)
    return Input(name, path, raw, tensors, store)


def digest(inputs: Sequence[Input]) -> str:
    """A hash of the folders, names, sizes, times and headers of all files, in order."""
    out = hashlib.sha256()
    for one in inputs:
        out.update(f"{one.folder.absolute()}\n".encode())
        for file in sorted({tensor.file for tensor in one.tensors.values()}):
            status = file.stat()
            out.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        for name, tensor in sorted(one.tensors.items()):
            out.update(f"{name} {tensor.shape} {tensor.dtype}\n".encode())
    return out.hexdigest()


class Difference(NamedTuple):
    """One row of the table: what differs, and its value in every input."""

    what: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What a merge would do, before any work.

    Attributes:
      inputs: the base first, where there is one.
      differences: what makes a merge impossible, in the order of the files.
      shared: tensors that are merged.
      unbased: those of them that the base lacks: they are averaged.
      copied: tensors that only the base holds, of a family that is not known: copied from it.
      apart: input -> tensors that stay with it.
      notes: what differs and does no harm, such as dtypes.
    """

    inputs: tuple[Input, ...]
    based: bool
    differences: tuple[Difference, ...] = ()
    shared: tuple[str, ...] = ()
    unbased: frozenset[str] = frozenset()
    copied: tuple[str, ...] = ()
    apart: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the inputs fit together."""
        return not self.differences

    @property
    def base(self) -> Input | None:
        return self.inputs[0] if self.based else None

    @property
    def models(self) -> tuple[Input, ...]:
        return self.inputs[1:] if self.based else self.inputs

    @property
    def reference(self) -> Input:
        """Whose names and dtypes the output has: the base, or the first model."""
        return self.inputs[0]

    def origin(self, name: str) -> Input:
        """The first input that holds a shared tensor."""
        return self.models[0] if name in self.unbased else self.inputs[0]

    def table(self) -> str:
        """The first differences, a row each, a column an input; "" when there is none."""
        if self.ok:
            return ""
        head = ("", *(one.name for one in self.inputs))
        rows = [head, *((d.what, *d.values) for d in self.differences[:ROWS])]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
        if len(self.differences) > ROWS:
            lines.append(f"... and {len(self.differences) - ROWS} more")
        return "\n".join(lines)

    def check(self) -> None:
        """Raises a ValueError with the table when the inputs do not fit together."""
        if not self.ok:
            raise ValueError(
                "the models cannot be merged: they differ in architecture or vocabulary\n"
                + self.table()
            )


def inspect(
    base: str | os.PathLike[str] | None,
    models: Sequence[str | os.PathLike[str]],
    heads: Sequence[str] = (),
    names: Sequence[str] | None = None,
) -> Report:
    """Compares the headers of all inputs.

    Only heads may be missing in some of them. What else a model lacks is a difference, except
    poolers that no head reads and buffers, which the output does without.

    Args:
      base: folder of the base model, or None.
      models: folders of the fine-tuned models; their order is kept.
      heads: regular expressions on whole tensor names (without the family's prefix) that stay
        with their task, besides the heads that the family knows.
      names: of the models; default the names of their folders.

    Raises:
      FileNotFoundError, ValueError: as :func:`open_input`; no model; names that repeat; a
        pattern of ``heads`` that matches nothing.
    """
    if not models:
        raise ValueError("there must be at least one model to merge, got none")
    called = [Path(m).name for m in models] if names is None else list(names)
    if len(called) != len(models) or len(set(called)) != len(called):
        raise ValueError(f"names must be {len(models)} different ones, one a model, got {called}")
    inputs = [] if base is None else [open_input(base, "the base")]
    inputs += [open_input(folder, name) for folder, name in zip(models, called)]
    tuned = inputs[1:] if base is not None else inputs
    everything = list(dict.fromkeys(name for one in inputs for name in one.tensors))
    for pattern in heads:
        if not any(re.fullmatch(pattern, name) for name in everything):
            raise ValueError(
                f"heads={pattern!r} matches no tensor; names are like {everything[:3]}"
            )
    own = {one.name: _head_tensors(one) for one in tuned}

    differences = _configurations(inputs)
    roles = Roles.of(inputs)
    shared: list[str] = []
    unbased: set[str] = set()
    copied: list[str] = []
    left: list[str] = []
    notes: list[str] = []
    apart: dict[str, list[str]] = {one.name: [] for one in inputs}
    for name in everything:
        holders = [one for one in inputs if name in one.tensors]
        kept = any(re.fullmatch(pattern, name) for pattern in heads)
        if kept or any(name in own[one.name] for one in tuned):
            for one in holders:
                apart[one.name].append(name)
            continue
        row = Difference(
            name, tuple(str(o.tensors[name]) if name in o.tensors else "-" for o in inputs)
        )
        if len(holders) < len(inputs):
            with_it = [one for one in tuned if name in one.tensors]
            role = role_of(
                name,
                roles,
                in_base=base is not None and name in inputs[0].tensors,
                in_models=bool(with_it),
                pooled=any(_reads_pooler(one) for one in with_it),
            )
            if role == "buffer":
                continue
            if len(with_it) == len(tuned) and role != "layer":
                if len({one.tensors[name].shape for one in tuned}) > 1:
                    differences.append(row)
                else:
                    shared.append(name)
                    unbased.add(name)
            elif role == "head":
                for one in holders:
                    apart[one.name].append(name)
            elif role == "unread":
                left.append(name)
            elif role == "base":
                copied.append(name)
            else:
                differences.append(row)
            continue
        found = [one.tensors[name] for one in inputs]
        kinds = {bool(jnp.issubdtype(t.dtype, jnp.floating)) for t in found}
        if len({t.shape for t in found}) > 1 or len(kinds) > 1:
            differences.append(row)
            continue
        shared.append(name)
        if len({t.dtype for t in found}) > 1 and len(notes) < ROWS:
            notes.append(f"{name} has several dtypes: {', '.join(row.values)}")
    for names_, what in (
        (copied, "only in the base, so copied from it"),
        (left, "not in every model and read by no head, so left out"),
    ):
        if names_:
            some = ", ".join(names_[:2]) + (", ..." if len(names_) > 2 else "")
            notes.append(f"{some}: {what}")
    return Report(
        tuple(inputs),
        base is not None,
        tuple(differences),
        tuple(shared),
        frozenset(unbased),
        tuple(copied),
        {name: tuple(held) for name, held in apart.items() if held},
        tuple(notes),
    )


def head_of(one: Input) -> tuple[str, Family] | None:
    """(kind, family) of the task head that a fine-tuned model declares, or None."""
    found = declared(one)
    return None if found is None or found[0] not in TASK_HEADS else found


def declared(one: Input) -> tuple[str, Family] | None:
    """(kind, family) of whatever head the configuration declares, those over words too."""
    family = one.family
    names = one.raw.get("architectures") or [""]
    kind = None if family is None else family.kind_of(str(names[0]), one.raw)
    return None if kind is None or family is None else (kind, family)


def _reads_pooler(one: Input) -> bool:
    """Whether the head that a model declares reads the pooler."""
    found = declared(one)
    return found is not None and found[0] in POOLED and found[1].pooled


def word_heads(report: Report) -> list[str]:
    """Patterns for ``heads`` of the heads over words (lm, mlm, seq2seq) that models declare.

    They are merged like any tensor unless these patterns are given; empty where they are tied.
    """
    found: set[str] = set()
    for one in report.models:
        head = declared(one)
        if head is not None and head[0] not in TASK_HEADS:
            found |= _tensors_of(one, *head)
    return [re.escape(name) for name in sorted(found)]


def _head_tensors(one: Input) -> set[str]:
    """Tensors of the task head that the configuration declares."""
    found = head_of(one)
    return set() if found is None else _tensors_of(one, *found)


def _tensors_of(one: Input, kind: str, family: Family) -> set[str]:
    try:
        names = head_names(family.read(one.raw), family, kind)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{one.folder / 'config.json'}: {error}") from error
    return names & set(one.tensors)


def _configurations(inputs: Sequence[Input]) -> list[Difference]:
    """Differences of the configurations, and of the vocabularies word by word."""
    told = [one for one in inputs if one.raw]
    rows = []
    for key in ARCHITECTURE:
        values = [str(one.raw.get(key, "-")) for one in inputs]
        if len({str(one.raw.get(key)) for one in told}) > 1:
            rows.append(Difference(f"config.json: {key}", tuple(values)))
    for keys in BEHAVIOUR:
        named = [_behaviour(one.raw, keys) for one in inputs]
        values = ["-" if pair is None else str(pair[1]) for pair in named]
        what = next((pair[0] for pair in named if pair is not None), "")
        if len({pair[1] for pair in named if pair is not None}) > 1 and what not in ARCHITECTURE:
            rows.append(Difference(f"config.json: {what}", tuple(values)))
    marks = [_vocabulary(one.folder) for one in inputs]
    if len({mark for mark, _ in marks if mark}) > 1:
        values = [f"{size} words, {mark[:8]}" if mark else "-" for mark, size in marks]
        rows.append(Difference("vocabulary", tuple(values)))
    return rows


def _behaviour(raw: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, Any] | None:
    """(key, value) of the first of ``keys`` that a configuration names; None without one."""
    inner = raw.get("rope_parameters")
    both = {**inner, **raw} if isinstance(inner, Mapping) else raw
    key = next((key for key in keys if both.get(key) is not None), None)
    return None if key is None else (key, _number(both[key]))


def _number(value: Any) -> Any:
    """10000 and 10000.0 are one value; what cannot be hashed is compared as text."""
    return value if isinstance(value, (int, float, str)) else str(value)


def _vocabulary(folder: Path) -> tuple[str, int]:
    """(hash, number of words) of a tokenizer's vocabulary; ("", 0) where there is none."""
    file = folder / "tokenizer.json"
    try:
        words = json.loads(file.read_text("utf-8"))["model"]["vocab"] if file.is_file() else None
    except (ValueError, KeyError, TypeError):
        words = None
    if words is None and (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text("utf-8", errors="replace").splitlines()
        words = {word: number for number, word in enumerate(lines)}
    if words is None:
        return "", 0
    ordered = sorted(words.items(), key=lambda item: item[1]) if isinstance(words, dict) else words
    return hashlib.sha256(json.dumps(ordered).encode()).hexdigest(), len(words)
