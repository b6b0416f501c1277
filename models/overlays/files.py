"""A saved overlay: its delta, what it was made with, and which base it belongs to.

  FOLDER/delta.safetensors   the leaves under their paths, and the trained leaves of the base
  FOLDER/overlay.json        name, settings, name and hash of the base

A delta means nothing on another base: ``load`` compares the hash before anything is attached.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from steppe.models import tree, weights
from steppe.models.overlays.overlay import BASE, OVERLAY, Overlay
from steppe.models.pretrained import TOKENIZER_FILES
from steppe.models.tree import Params

DELTA, ABOUT = "delta.safetensors", "overlay.json"


class Saved(NamedTuple):
    """What a folder holds.

    Attributes:
      params: ``{"overlay": delta, "base": leaves}`` with the leaves of the base that trained with
        it, such as the head; to be merged into the bound model's parameters.
      name, settings: of the overlay.
      base: name and hash of the base's parameters.
      notes: what was saved beside.
    """

    params: Params
    name: str
    settings: dict[str, Any]
    base: dict[str, str]
    notes: dict[str, Any]


def belongs(params: Params, trainable: Sequence[str], fresh: Sequence[str] = ()) -> Params:
    """The leaves of ``{"base", "overlay"}`` that a folder must hold, so that the delta can be
    attached again: the whole delta, what trains of the base, and what the base's files lack.

    Args:
      trainable: patterns of what trains, see ``models.model.Model``.
      fresh: paths in the base that its files do not hold and that were initialised, such as a new
        pooler.
    """
    more = [rf"{OVERLAY}/.*"] if params.get(OVERLAY) else []
    more += [re.escape(f"{BASE}/{path}") for path in fresh]
    return tree.split(params, (*trainable, *more))[0]


def save(
    folder: str | os.PathLike[str],
    overlay: Overlay,
    params: Params,
    *,
    base: str,
    fingerprint: str,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a folder, atomically.

    Args:
      folder: must not exist, be empty, or hold an earlier overlay, which is replaced.
      params: the whole delta, and what trains of the base.
      base: name of the base, for people.
      fingerprint: hash of its parameters before training, as ``train.checkpoint.fingerprint``
        gives it.
      notes: JSON values to keep with it.

    Raises:
      FileExistsError: the folder holds other files.
      ValueError: the parameters hold something that is neither delta nor base.
    """
    other = set(params) - {BASE, OVERLAY}
    if other:
        raise ValueError(f"params must hold 'overlay' and 'base' alone, got {sorted(other)}")
    from safetensors.numpy import save_file

    flat = {p: np.asarray(x, order="C") for p, x in tree.flatten(params).items()}
    about = {
        "name": overlay.name,
        "settings": _plain(overlay.settings),
        "base": {"name": base, "hash": fingerprint},
        "notes": dict(notes or {}),
        "parameters": sum(x.size for p, x in flat.items() if p.startswith(f"{OVERLAY}/")),
    }
    target = Path(folder)
    kept = (DELTA, ABOUT, "config.json", *TOKENIZER_FILES)
    with weights.atomic_directory(target, kept) as scratch:
        save_file(flat, scratch / DELTA)
        (scratch / ABOUT).write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    return target


def load(folder: str | os.PathLike[str], *, fingerprint: str | None = None) -> Saved:
    """Reads a folder.

    Args:
      fingerprint: of the base that it is to be attached to; None = not compared.

    Raises:
      FileNotFoundError: it is no such folder.
      ValueError: a damaged file, or a delta of another base.
    """
    source = Path(folder)
    if not (source / ABOUT).is_file() or not (source / DELTA).is_file():
        raise FileNotFoundError(f"{folder} holds no overlay: {ABOUT} and {DELTA} are missing")
    try:
        about = json.loads((source / ABOUT).read_text("utf-8"))
        base = {str(k): str(v) for k, v in about["base"].items()}
        name, settings = str(about["name"]), dict(about["settings"] or {})
        notes = dict(about.get("notes") or {})
    # A file that is nested without end ends Python's recursion.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{source / ABOUT} is damaged ({error})") from error
    if fingerprint is not None and base.get("hash") != fingerprint:
        raise ValueError(
            f"{folder} is an overlay of {base.get('name')} (hash {base.get('hash')}), not of this "
            f"base (hash {fingerprint}); load the base that it was trained on"
        )
    store = weights.Safetensors([source / DELTA])
    flat = {path: np.array(store.read(path)) for path in store.shapes()}
    return Saved(tree.unflatten(flat), name, settings, base, notes)


def _plain(settings: Any) -> Any:
    """Pairs as an object, for JSON; what is composed of overlays keeps their order."""
    if not isinstance(settings, tuple):
        return settings
    if settings and all(
        isinstance(s, tuple) and len(s) == 2 and isinstance(s[0], str) for s in settings
    ):
        return {name: _plain(value) for name, value in settings}
    return [_plain(value) for value in settings]


def settings_of(overlay: Overlay) -> Mapping[str, Any]:
    """The settings of an overlay as JSON values."""
    found: dict[str, Any] = _plain(overlay.settings)
    return found
