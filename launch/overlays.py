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
from steppe.models.model import Model
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
    *, folders: str = "", lengths: Sequence[int] = (), attentions: Sequence[str] = ()
) -> Overlay:
    """The overlay of prefixes that runs with ``--overlay prefix`` have saved.

    Args:
      folders: of those runs, joined by ``+``; empty = of these lengths, as a saved one is.
      lengths, attentions: those of the folders, where they are given too; empty = whatever the
        folders have, without folders one prefix of 10 rows at ``attn``.

    Raises:
      FileNotFoundError: a folder holds no overlay.
      ValueError: an overlay that is no prefix, prefixes of several bases, lengths or attentions
        that are not theirs; from ``init``, a base that they do not belong to.
    """
    if not folders:
        return prefix_fixed.overlay(lengths=lengths or (10,), attentions=attentions or ("attn",))
    found, hashes = [], []
    for name in folders.split("+"):
        folder = Path(name)
        saved = _read(folder / "model" if is_overlay(folder / "model") else folder)
        if saved.name != "prefix":
            raise ValueError(f"folders must be runs with one prefix each, {name} has {saved.name}")
        delta = saved.params.get(OVERLAY, {})
        found.append(prefix.fold(delta) if saved.settings.get("hidden") else delta)
        hashes.append(saved.base["hash"])
        if hashes[-1] != hashes[0]:
            raise ValueError(f"the prefix of {name} is of another base than that of {folders}")
    rows = tuple(prefix_fixed.length_of(one) for one in found)
    names = tuple(n.removesuffix(f".{prefix.SITE}") for n in found[0][tree.STACK])
    for what, given, own in (
        ("lengths", tuple(lengths), rows),
        ("attentions", tuple(attentions), names),
    ):
        if given not in (own, ()):
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

# What a base has above its body; some of it is new in every task.
TOP = ("head", "pooler")

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
    return {n: value for n, value in _defaults(KNOWN[name]).items() if n not in fixed}


def _defaults(make: Callable[..., Overlay]) -> dict[str, Any]:
    return {n: p.default for n, p in inspect.signature(make).parameters.items()}


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
        for part, own in settings.items():
            if not isinstance(own or {}, Mapping):
                raise ValueError(f"the settings of {part!r} in {name!r} are {own!r}, no object")
        return compose(*(rebuilt(_stem(part), own or {}) for part, own in settings.items()))
    if name not in _MADE:
        raise ValueError(f"no overlay is called {name!r}; known: {', '.join(_MADE)}")
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    for key, usual in _defaults(_MADE[name]).items():
        if key in plain and not _fits(key, plain[key], usual):
            raise ValueError(
                f"the overlay {name!r} has {key}={settings[key]!r}, which must be "
                f"{_KINDS[type(usual)]}"
            )
    try:
        return _MADE[name](**plain)
    except TypeError as error:
        raise ValueError(
            f"the overlay {name!r} has other settings in this version ({error})"
        ) from error


_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a name",
    tuple: "a list of names, or of whole numbers",
    type(None): "a number, a flag or null",
}


def _fits(key: str, value: Any, default: Any) -> bool:
    """Whether what a file says of a setting is of the kind of its default."""
    if isinstance(default, tuple):
        kind = int if key in NUMBERS else str
        return isinstance(value, tuple) and all(type(v) is kind for v in value)
    if default is None:  # a number or a flag
        return value is None or isinstance(value, bool | int | float)
    return type(value) is type(default) or (type(default) is float and type(value) is int)


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
    top: str | None = None,
) -> None:
    """Writes a folder that :func:`load` opens: the delta, and the configuration of base and head.

    Args:
      live: what has trained, delta and leaves of the base.
      base: address of the base.
      hashed: ``base_hash`` of its parameters before training.
      model: the base model with its head.
      top: ``top_hash`` of the base; None = not noted, and not compared by :func:`load`.
    """
    head = model.config.head
    notes: dict[str, Any] = {
        "head": None if head is None else dataclasses.asdict(head),
        "labels": None if labels is None else list(labels),
    }
    if top is not None:
        notes["top"] = top
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
    """Hash of the base's body, which runs of several tasks share: neither head nor pooler."""
    return fingerprint({n: v for n, v in params.items() if n not in TOP})


def top_hash(params: Params, kept: Params) -> str:
    """Hash of the base's head and pooler as far as they come from its files, "" for nothing.

    Args:
      params: of the base, before or after training.
      kept: of them, those that a folder holds beside the delta: they trained or were initialised.
    """
    flat = tree.flatten({name: params[name] for name in TOP if name in params})
    held = tree.flatten(kept)
    own = {path: leaf for path, leaf in flat.items() if path not in held}
    return fingerprint(tree.unflatten(own)) if own else ""


def is_overlay(folder: Path) -> bool:
    """Whether a folder holds a delta and no weights."""
    return (folder / files.ABOUT).is_file()


def load(folder: Path, dtype: Any = "float32") -> pretrained.Loaded:
    """The base with the delta attached.

    Raises:
      FileNotFoundError: the base is not there any more.
      ValueError: a base whose parameters are others than those that the delta was trained on; a
        damaged overlay.json; tensors, of the delta or of the base, that are missing, unknown or of
        another shape than the settings say.
    """
    saved = _read(folder)
    head, labels = _noted(saved.notes, folder / files.ABOUT)
    origin = setup.origin(saved.base["name"])
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
        _numbers(saved.params)
        bound = overlay.bind(loaded.model)
        base = _with_kept(loaded, bound, saved.params)
    # Settings of a damaged file may fail anywhere in the making of the overlay.
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{folder / files.DELTA} is not what {files.ABOUT} beside it describes: "
            f"{error.args[0] if error.args else error!r}"
        ) from error
    noted = saved.notes.get("top")
    if noted is not None and noted != top_hash(loaded.params, saved.params.get(BASE, {})):
        raise ValueError(
            f"{folder} belongs to another head or pooler than that of {saved.base['name']}: put "
            "the base back that it was trained on"
        )
    params = tree.cast({BASE: base, OVERLAY: delta}, jnp.dtype(dtype))
    return pretrained.Loaded(bound, params, folder, labels=labels)


def _numbers(params: Params) -> None:
    """
    Raises:
      ValueError: a leaf that is no finite float.
    """
    for path, leaf in tree.flatten(params).items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{path} is of {leaf.dtype}, no floating-point type")
        if not np.isfinite(leaf.astype(np.float32)).all():
            raise ValueError(f"{path} holds numbers that are not finite")


def _read(folder: Path) -> files.Saved:
    """A saved overlay that says which base it belongs to.

    Raises:
      FileNotFoundError, ValueError: as ``files.load``; the base has no name or no hash.
    """
    saved = files.load(folder)
    for key in ("name", "hash"):
        if not saved.base.get(key):
            raise ValueError(f"{folder / files.ABOUT} is damaged: its base has no {key!r}")
    return saved


def _noted(
    notes: Mapping[str, Any], file: Path
) -> tuple[HeadConfig | None, tuple[str, ...] | None]:
    """Head and labels that were saved beside a delta.

    Raises:
      ValueError: they are none.
    """
    raw, labels = notes.get("head"), notes.get("labels")
    head = None
    try:
        if raw is not None:
            head = HeadConfig(**raw)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: notes.head is {raw!r} ({error})") from error
    if labels is None:
        return head, None
    if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
        raise ValueError(f"{file} is damaged: notes.labels is {labels!r}, no list of names")
    classes = head is not None and head.kind in ("classification", "token")
    if head is not None and classes and len(labels) != head.num_labels:
        raise ValueError(
            f"{file} is damaged: notes.labels names {len(labels)} classes, its head has "
            f"{head.num_labels}"
        )
    return head, tuple(labels)


def _with_kept(loaded: pretrained.Loaded, bound: Model, saved: Params) -> Params:
    """The base's parameters with the leaves in their places that were kept beside a delta.

    Raises:
      ValueError: a leaf is missing that trains with the delta or that the base's files do not hold,
        one is there that does neither, or one has another shape.
    """
    other = sorted(set(saved) - {BASE, OVERLAY})
    if other:
        raise ValueError(f"the file has {other[0]!r}, which is neither of the delta nor the base")
    own, kept = tree.flatten(loaded.params), tree.flatten(saved.get(BASE, {}))
    live = [path for path in own if tree.matches(f"{BASE}/{path}", bound.trainable)]
    for path in live:
        if path not in kept:
            raise ValueError(f"the file lacks {BASE}/{path}, which trains with the overlay")
    for path in loaded.fresh:
        if path not in kept:
            raise ValueError(f"the file lacks {BASE}/{path}, which the base's files do not hold")
    for path, leaf in kept.items():
        if path not in own:
            raise ValueError(f"the base has no parameter at {path!r}, which the file has")
        # What the base's files lack was initialised, and may be kept although it does not train.
        if path not in live and path not in loaded.fresh:
            raise ValueError(
                f"the file has {BASE}/{path}, which does not train with the overlay: the base "
                "has its own"
            )
        if np.shape(leaf) != np.shape(own[path]):
            raise ValueError(
                f"shape mismatch at {BASE}/{path}: the file has {np.shape(leaf)}, the base "
                f"{np.shape(own[path])}"
            )
    return tree.replace(loaded.params, kept)


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
