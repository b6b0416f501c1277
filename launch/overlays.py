"""Overlays by name: ``--overlay prefix:length=10 lora:rank=8`` and ``steppe overlays list``."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steppe.data.errors import near
from steppe.launch import prose, setup
from steppe.models import pretrained, tree
from steppe.models.heads import HeadConfig
from steppe.models.overlays import (
    Overlay,
    adapter,
    added_prompt,
    bitfit,
    compacter,
    compose,
    files,
    ia3,
    idpg,
    lora,
    loramoe,
    lpt,
    mp2,
    o_lora,
    plugat,
    prefix,
    prefix_fixed,
    prompt,
    residual_prompt,
    unipelt,
)
from steppe.models.overlays.overlay import BASE, OVERLAY
from steppe.models.tree import Params
from steppe.train.checkpoint import fingerprint


def fixed_prefixes(
    *, folders: str = "", lengths: Sequence[int] = (10,), attentions: Sequence[str] = ("attn",)
) -> Overlay:
    """The overlay of prefixes that runs with ``--overlay prefix`` have saved.

    Args:
      folders: of those runs, joined by ``+``; empty = of these lengths, as a saved one is.

    Raises:
      FileNotFoundError: a folder holds no overlay.
      ValueError: an overlay that is no prefix, prefixes of several bases; from ``init``, a base
        that they do not belong to.
    """
    if not folders:
        return prefix_fixed.overlay(lengths=lengths, attentions=attentions)
    found, hashes = [], []
    for name in folders.split("+"):
        folder = Path(name)
        saved = files.load(folder / "model" if is_overlay(folder / "model") else folder)
        if saved.name != "prefix":
            raise ValueError(f"folders must be runs with one prefix each, {name} has {saved.name}")
        delta = saved.params.get(OVERLAY, {})
        found.append(prefix.fold(delta) if saved.settings.get("hidden") else delta)
        hashes.append(saved.base["hash"])
        if hashes[-1] != hashes[0]:
            raise ValueError(f"the prefix of {name} is of another base than that of {folders}")
    rows = tuple(prefix_fixed.length_of(one) for one in found)
    names = tuple(n.removesuffix(f".{prefix.SITE}") for n in found[0][tree.STACK])
    for what, given, own, usual in (
        ("lengths", tuple(lengths), rows, (10,)),
        ("attentions", tuple(attentions), names, ("attn",)),
    ):
        if given not in (own, usual):
            raise ValueError(
                f"{what}={'/'.join(str(g) for g in given)} are not those of {folders}, "
                f"{'/'.join(str(o) for o in own)}; leave {what} out where folders are given"
            )
    made = prefix_fixed.overlay(lengths=rows, attentions=names, prefixes=found)

    def init(key: Any, params: Params) -> Params:
        leaves = jax.tree.leaves(params)
        known = all(isinstance(a, jax.Array | np.ndarray) for a in leaves)
        known = known and not any(isinstance(a, jax.core.Tracer) for a in leaves)
        # The parameters are values even where the delta is made inside a compiled function.
        with jax.ensure_compile_time_eval():
            other = known and base_hash(params) != hashes[0]
        if other:
            raise ValueError(
                f"the prefixes of {folders} belong to other parameters than this model's; take "
                "the model that they were trained on"
            )
        return made.init(key, params)

    return dataclasses.replace(made, init=init)


KNOWN: dict[str, Callable[..., Overlay]] = {
    "lora": lora.overlay,
    "o-lora": o_lora.overlay,
    "loramoe": loramoe.overlay,
    "prefix": prefix.overlay,
    "prompt": prompt.overlay,
    "added-prompt": added_prompt.overlay,
    "residual-prompt": residual_prompt.overlay,
    "houlsby": functools.partial(adapter.overlay, kind="houlsby"),
    "pfeiffer": functools.partial(adapter.overlay, kind="pfeiffer"),
    "parallel": functools.partial(adapter.overlay, kind="parallel"),
    "ia3": ia3.overlay,
    "bitfit": bitfit.overlay,
    "compacter": compacter.overlay,
    "unipelt": unipelt.overlay,
    "idpg": idpg.overlay,
    "lpt": lpt.overlay,
    "mp2": mp2.overlay,
    "plugat": plugat.overlay,
    "prefix-fixed": fixed_prefixes,
}

# Settings that are several whole numbers; other settings of several values are names.
NUMBERS = ("ids", "after", "lengths")


def parse(texts: Sequence[str]) -> Overlay:
    """``("prefix:length=10", "lora:rank=8,alpha=16")`` as one overlay, composed in this order.

    Settings of several values are separated by slashes: ``lora:sites=attn.q/attn.v``.

    Raises:
      ValueError: an unknown overlay or setting, or a value that it cannot have.
      FileNotFoundError: prefixes to be combined that are not there.
    """
    made = []
    for text in texts:
        name, _, rest = text.partition(":")
        if name not in KNOWN:
            raise ValueError(
                f"overlay must be one of {', '.join(KNOWN)}, got {name!r}{near(name, KNOWN)}"
            )
        known = settings_of(name)
        values: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            key = key.strip().replace("-", "_")
            if not equals or key not in known or key in values:
                raise ValueError(
                    f"overlay has {part!r} in {text!r}; it must be SETTING=VALUE with one of "
                    f"{', '.join(known)}, each once{near(key, known)}"
                )
            values[key] = _value(key, value, known[key], text)
        if KNOWN[name] is fixed_prefixes and not values.get("folders"):
            raise ValueError(f"overlay {name} needs folders=RUN+RUN, runs with --overlay prefix")
        made.append(KNOWN[name](**values))
    return made[0] if len(made) == 1 else compose(*made)


def settings_of(name: str) -> dict[str, Any]:
    """Settings of an overlay with their defaults."""
    fixed = getattr(KNOWN[name], "keywords", {})
    found = inspect.signature(KNOWN[name]).parameters
    return {n: p.default for n, p in found.items() if n not in fixed}


def _value(key: str, text: str, default: Any, where: str) -> Any:
    try:
        flag = default is None and text.lower() in ("true", "false")
        if isinstance(default, bool) or flag:
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, tuple):
            items = text.split("/")
            return tuple(int(i) for i in items) if key in NUMBERS else tuple(items)
        if isinstance(default, int):
            return int(text)
        return text if isinstance(default, str) else float(text)
    except (KeyError, ValueError):
        kind = type(default).__name__ if default is not None else "number"
        raise ValueError(f"overlay has {key}={text!r} in {where!r}; it must be a {kind}") from None


def rebuilt(name: str, settings: Mapping[str, Any]) -> Overlay:
    """The overlay that a saved delta was made with.

    Raises:
      ValueError: an overlay that this version does not know, or not with these settings.
    """
    if "+" in name and name not in _MADE:
        return compose(*(rebuilt(_stem(part), own or {}) for part, own in settings.items()))
    if name not in _MADE:
        raise ValueError(f"no overlay is called {name!r}; known: {', '.join(_MADE)}")
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    try:
        return _MADE[name](**plain)
    except TypeError as error:
        raise ValueError(
            f"the overlay {name!r} has other settings in this version ({error})"
        ) from error


# By the names that overlays give themselves, which stand in the files.
_MADE: dict[str, Callable[..., Overlay]] = {
    **{n: fn for n, fn in KNOWN.items() if n not in ("houlsby", "pfeiffer", "parallel")},
    **{f"adapter-{kind}": adapter.overlay for kind in adapter.KINDS},
    "compacter++": compacter.overlay,
}


def _stem(name: str) -> str:
    """The name of a part, without the number of a second one."""
    head, _, tail = name.rpartition("-")
    return head if tail.isdecimal() and head in _MADE else name


def save(
    target: Path,
    overlay: Overlay,
    live: Params,
    *,
    base: str,
    hashed: str,
    model: Any,
    labels: Sequence[str] | None,
    tokenizer_dir: Path | None,
) -> None:
    """Writes a folder that :func:`load` opens: the delta, and the configuration of base and head.

    Args:
      live: what has trained, delta and leaves of the base.
      base: address of the base.
      hashed: ``base_hash`` of its parameters before training.
      model: the base model with its head.
    """
    head = model.config.head
    notes = {
        "head": None if head is None else dataclasses.asdict(head),
        "labels": None if labels is None else list(labels),
    }
    files.save(target, overlay, live, base=base, fingerprint=hashed, notes=notes)
    raw, _ = pretrained.describe(model.config, labels)
    (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
    if tokenizer_dir is not None:
        pretrained.copy_tokenizer(tokenizer_dir, target)


def check_forward(model: Any, plan: Any) -> None:
    """Runs a bound model on the shapes of its longest batch: nothing may fail once a run began.

    Args:
      model: bound, with the parameters that it was given.
      plan: of the batches, see ``data.batches.Plan``.

    Raises:
      ValueError: whatever the overlays find wrong with a batch, such as a column that it lacks or
        a text that leaves no positions for a prompt.
    """
    batch = plan.batch(0, slice(0, 2))
    longest = plan.buckets[-1]
    tokens = np.shape(batch["input_ids"])[1] if isinstance(longest, int) else 0
    made = {}
    for name, column in batch.items():
        shape = list(np.shape(column))
        if tokens and shape[1:2] == [tokens]:
            shape[1] = longest
        made[name] = jax.ShapeDtypeStruct(shape, np.asarray(column).dtype)

    def forward(params: Params, batch: Any) -> Any:
        return model.apply(params, batch)

    delta = jax.eval_shape(model.init, jax.random.key(0))
    jax.eval_shape(forward, tree.merge(delta, model.given or {}), made)


def base_hash(params: Params) -> str:
    """Hash of the parameters that come from the base: a new head is not of it."""
    return fingerprint({n: v for n, v in params.items() if n not in ("head", "pooler")})


def is_overlay(folder: Path) -> bool:
    """Whether a folder holds a delta and no weights."""
    return (folder / files.ABOUT).is_file()


def load(folder: Path, dtype: Any = "float32") -> pretrained.Loaded:
    """The base with the delta attached.

    Raises:
      FileNotFoundError: the base is not there any more.
      ValueError: a base whose parameters are others than those that the delta was trained on;
        tensors that are missing, unknown or of another shape than the settings say.
    """
    saved = files.load(folder)
    origin = setup.origin(saved.base["name"])
    noted = saved.notes.get("head")
    head = None if noted is None else HeadConfig(**noted)
    loaded = pretrained.load(origin.weights, head=head)
    found = base_hash(loaded.params)
    if found != saved.base["hash"]:
        raise ValueError(
            f"{folder} belongs to other parameters than those of {saved.base['name']} (hash "
            f"{saved.base['hash']}, not {found}): put the base back that it was trained on"
        )
    delta = saved.params.get(OVERLAY, {})
    try:
        overlay = rebuilt(saved.name, saved.settings)
        wanted = jax.eval_shape(overlay.init, jax.random.key(0), loaded.params)
        tree.same_structure(delta, wanted, ("the file", f"{saved.name} with these settings"))
        base = tree.replace(loaded.params, tree.flatten(saved.params.get(BASE, {})))
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{folder / files.DELTA} is not what {files.ABOUT} beside it describes: {error.args[0]}"
        ) from error
    params = {BASE: base, OVERLAY: delta}
    params = tree.cast(params, jnp.dtype(dtype))
    labels = saved.notes.get("labels")
    return pretrained.Loaded(
        overlay.bind(loaded.model), params, folder, labels=None if labels is None else tuple(labels)
    )


def show() -> str:
    """Every overlay: what it is and, below, its settings."""
    lines = []
    for name, make in KNOWN.items():
        module = inspect.getmodule(getattr(make, "func", make))
        if make is fixed_prefixes:
            module = prefix_fixed
        about = (inspect.getdoc(module) or "").split("\n")[0]
        settings = ", ".join(f"{k}={_shown(v)}" for k, v in settings_of(name).items())
        lines.append(prose.fill(about, f"{name:16} "))
        lines.append(prose.fill(settings or "no settings", " " * 17))
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
