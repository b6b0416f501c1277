"""A model that writes, opened with its tokenizer; what cannot be used is told before it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from steppe.data.text import Tokenizer
from steppe.launch import kinds, overlays, setup
from steppe.models import packed, pretrained, quantized, tree
from steppe.train.merge import joined


@dataclass(frozen=True)
class Opened:
    """A model with its parameters and its tokenizer.

    Attributes:
      origin: where they come from.
      kind: decoder or encoder-decoder.
    """

    origin: setup.Origin
    model: Any
    params: Any
    tokenizer: Tokenizer
    kind: str


def resolve(name: str) -> setup.Origin:
    """The origin of a model; of a run folder, of the model that it exported."""
    if not name.startswith("asset:") and (Path(name).expanduser() / "model").is_dir():
        return setup.origin(str(Path(name).expanduser() / "model"))
    return setup.origin(name)


def with_output(weights: Path, task: str) -> pretrained.Loaded:
    """The model with its head; of a language model that was saved without the class of a head, a
    tied one is there all the same.

    Args:
      task: kind of the data, which says whether a language model is meant.
    """
    if overlays.is_overlay(weights):
        return overlays.load(weights)
    if packed.is_packed(weights):
        held = packed.load(weights)
        return pretrained.Loaded(held.model, held.params, weights, (), (), held.labels)
    loaded = pretrained.load(weights)
    if loaded.model.config.head is not None or task not in ("lm", "chat", "seq2seq"):
        return loaded
    found = pretrained.load(weights, head="lm")
    return loaded if found.fresh else found


def not_finite(params: Any) -> str | None:
    """The path of the first leaf that holds NaN or infinity; None where there is none."""
    fine = jax.jit(lambda own: jax.tree.map(lambda x: jnp.isfinite(x).all(), own))(params)
    return next((path for path, whole in tree.flatten(fine).items() if not bool(whole)), None)


def one_task(
    loaded: pretrained.Loaded, task: str, classes: Callable[[], Collection[str]]
) -> pretrained.Loaded:
    """The columns of one task of a model that answers several, see ``train.merge.joined``; any
    other model as it is.

    Args:
      task: its name; empty = the only one that has all of the data's classes.
      classes: reads these; asked for such a model alone.

    Raises:
      ValueError: no such task; several could be meant, or none; a task is given for a model of one.
    """
    names, head = loaded.labels or (), loaded.model.config.head
    several = head is not None and names and all(joined.BETWEEN in name for name in names)
    if not several:
        if task:
            raise ValueError(f"task={task!r}, but the model answers one task alone; leave it out")
        return loaded
    what = joined.read(loaded.model, names)
    seen = set() if task else set(classes())
    fits = [name for name, own in what.classes.items() if seen <= set(own)]
    if not task and seen <= set(names):
        return loaded  # data whose labels say the task themselves
    if not task and len(fits) != 1:
        known = "; ".join(f"{name}: {', '.join(own)}" for name, own in what.classes.items())
        raise ValueError(f"the model answers several tasks ({known}); say which one by --task")
    task = task or fits[0]
    config = what.config_of(task)
    model = config.build()
    if isinstance(loaded.model, quantized.Quantized):
        model = quantized.wrap(model, loaded.model.rules, weights=False)
    params = what.alone(task, loaded.params)
    return dataclasses.replace(loaded, model=model, params=params, labels=what.classes[task])


def open_writer(name: str, dtype: str = "float32") -> Opened:
    """Opens a model that writes text.

    Args:
      name: run folder, model folder, file of weights, or ``asset:NAME``.
      dtype: of the parameters.

    Raises:
      ValueError: the model writes no text, or its tokenizer is another model's.
      FileNotFoundError: no such model, or it has no tokenizer.
    """
    origin = resolve(name)
    bare = pretrained.load_config(origin.weights)
    kinds.check_writer(bare, name)
    tokenizer = Tokenizer.open(origin.tokenizer)
    setup.check_vocabulary(tokenizer, bare.vocab_size, origin.tokenizer)
    if overlays.is_overlay(origin.weights):
        loaded = overlays.load(origin.weights, dtype)
    elif packed.is_packed(origin.weights):
        loaded = with_output(origin.weights, "lm")
    else:
        loaded = pretrained.load(origin.weights, dtype=dtype)
    if loaded.model.config.head is None:
        # Saved without the class of a head; a tied one needs nothing more.
        loaded = pretrained.load(origin.weights, head="lm", dtype=dtype)
        if loaded.fresh:
            raise ValueError(f"{name} holds no output layer ({loaded.fresh[0]} is missing)")
    kind = kinds.check_writes(loaded.model, name)
    return Opened(origin, loaded.model, loaded.params, tokenizer, kind)
