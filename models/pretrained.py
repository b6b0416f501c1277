"""Pretrained models from and to Hugging Face directories (config.json + safetensors).

Files of other formats are read too: ``.onnx`` (BERT, DINOv2), ``.gguf`` (language models) and
``.bin`` (Marian); their readers give the tensors the names that such a directory would.

``load`` gives a :class:`Model` and its parameters, each leaf placed directly in its shards;
``save`` writes a directory that ``transformers`` opens with the same logits. What a new
family takes is in ``steppe.models.families``.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from steppe.models import tree, weights
from steppe.models.families import faithful
from steppe.models.families import family as family_of
from steppe.models.families.names import Config, Family, Name
from steppe.models.heads import HeadConfig
from steppe.models.model import Model
from steppe.models.tree import Params
from steppe.models.weights import Index, Weights

# suffix -> module with ``read(path) -> (Weights, values of a config.json)``
READERS = {
    ".onnx": "steppe.models.onnx_weights",
    ".gguf": "steppe.models.gguf_weights",
    ".bin": "steppe.models.marian_weights",
}
PREPROCESSOR = "preprocessor_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class Plan(Protocol):
    """What ``load`` needs of a mesh plan (see ``steppe.train.mesh``)."""

    def shardings(self, tree: Any) -> Any:
        """A sharding for every leaf of ``tree``."""
        ...


@dataclass(frozen=True)
class Loaded:
    """A model with its parameters.

    Attributes:
      model, params: the network and its parameters.
      source: where they came from.
      fresh: paths that the files did not hold and that were initialised (a new head).
      unused: tensors of the files that the model has no place for.
      labels: names of the classes, when config.json gives them.
    """

    model: Model
    params: Params
    source: Path
    fresh: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None


def load(
    source: str | os.PathLike[str],
    *,
    head: str | HeadConfig | None = "auto",
    num_labels: int | None = None,
    plan: Plan | None = None,
    dtype: Any = "float32",
    key: jax.Array | None = None,
    **overrides: Any,
) -> Loaded:
    """Reads a model.

    Args:
      source: a directory with config.json and safetensors, or a file in one of the other
        formats: ``.onnx``, ``.gguf``, or Marian's ``.bin``.
      head: "auto" = the one that the files hold, None = none, or a kind (see ``heads``) or
        config. A head that the files lack, or hold with other labels, is initialised.
      num_labels: labels of a head that is asked for by kind; default: those in config.json.
      plan: places every leaf directly in its shards; default: the default device.
      dtype: of the floating-point parameters.
      key: for what is initialised; default ``jax.random.key(0)``.
      **overrides: fields of the config, such as ``drop=0.0`` or ``remat="full"``.

    Raises:
      FileNotFoundError: the directory, config.json or the weights are missing.
      ValueError: an unknown family (the known ones are listed), a damaged file, a tensor
        that is missing or has another shape (both shapes are named).
    """
    path = Path(source).expanduser()
    key = jax.random.key(0) if key is None else key
    store, raw = _open(path)
    family = family_of(str(raw.get("model_type")))
    names = _strip(family, store.shapes())
    config = _config(family, raw, names, head, num_labels, path)
    config = _override(config, overrides)
    model = config.build()

    abstract = tree.flatten(model.abstract())
    known = {n.path: n for n in family.names(config.with_head(None))}
    if config.head is not None:
        known.update({n.path: n for n in family.heads[config.head.kind].of(config)})
    wanted = {p: known[p].tensors(leaf.shape) for p, leaf in abstract.items()}
    shapes = store.shapes()

    def expected(p: str) -> tuple[int, ...]:
        return known[p].stored_shape(abstract[p].shape)

    def found(p: str) -> tuple[int, ...]:
        return tuple(shapes[names[wanted[p][0]]])

    fresh = [
        p
        for p, tensors in wanted.items()
        if p.startswith(("head/", "pooler/"))
        and (
            any(t not in names for t in tensors)
            # A head that was asked for by hand may have other labels than the file's.
            or (head != "auto" and p.startswith("head/out/") and found(p) != expected(p))
        )
    ]
    _check(path, shapes, names, wanted, known, abstract, fresh)

    shardings = None if plan is None else tree.flatten(plan.shardings(model.abstract()))
    dtype = jnp.dtype(dtype)
    flat: dict[str, jax.Array] = {}
    for leaf_path, shape in abstract.items():
        if leaf_path in fresh:
            continue
        reader = _Reader(store, [names[t] for t in wanted[leaf_path]], known[leaf_path], dtype)
        flat[leaf_path] = reader.array(
            shape.shape, None if shardings is None else shardings[leaf_path]
        )
    flat.update(_initialise(model, key, fresh, dtype, shardings))
    read = {names[t] for p, ts in wanted.items() if p not in fresh for t in ts}
    return Loaded(
        model=model,
        params=tree.unflatten({p: flat[p] for p in abstract}),
        source=path,
        fresh=tuple(fresh),
        unused=tuple(sorted(t for t in shapes if t not in read and not _ignored(family, t))),
        labels=labels_of(raw),
    )


def load_config(source: str | os.PathLike[str]) -> Any:
    """The configuration of a model without its head; reads no weights of a directory.

    Its class is the family's: ``EncoderConfig``, ``DecoderConfig``, ...

    Raises:
      FileNotFoundError, ValueError: as :func:`load`.
    """
    path = Path(source).expanduser()
    raw = _open(path)[1] if path.suffix in READERS else _read_config(path)
    try:
        return family_of(str(raw.get("model_type"))).read(raw)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def save(
    directory: str | os.PathLike[str],
    model: Model,
    params: Params,
    *,
    labels: Sequence[str] | None = None,
    tokenizer_dir: str | os.PathLike[str] | None = None,
    shard_bytes: int = 5 * 2**30,
) -> Path:
    """Writes a Hugging Face directory, atomically: a failure leaves nothing behind.

    Args:
      directory: must not exist, or be empty, or hold an earlier export (which is replaced).
      labels: names of the classes, written to config.json.
      tokenizer_dir: its tokenizer files are copied along.

    Raises:
      FileExistsError: the directory holds files that are not an export.
      ValueError: the parameters are not those of the model (the first path is named), or
        the number of labels is not the head's.
    """
    config: Config = model.config
    family = family_of(config.family)
    tree.same_structure(params, model.abstract(), ("params", "the model"))
    if labels is not None and config.head is not None and len(labels) != config.head.num_labels:
        raise ValueError(
            f"labels must name the head's {config.head.num_labels} classes, got {len(labels)}"
        )
    flat = tree.flatten(params)
    tensors: dict[str, np.ndarray] = {}
    for group in _by_tensor(family.names(config)):
        leaves = [np.asarray(flat[name.path]) for name in group]
        layers = leaves if group[0].stacked else [leaf[None] for leaf in leaves]
        for number, tensor in enumerate(group[0].tensors(leaves[0].shape)):
            tensors[tensor] = group[0].join([leaf[number] for leaf in layers])
    raw = {
        "architectures": [family.architecture(config)],
        "model_type": family.name,
        "dtype": str(next(iter(tensors.values())).dtype),
        **family.write(config),
        **_write_head(config.head, labels),
    }
    faithful.check(family, config, raw, _strip(family, tensors))
    keep = ("config.json", PREPROCESSOR, weights.SINGLE, weights.SHARDED, *TOKENIZER_FILES)
    target = Path(directory)
    shards = tuple(p.name for p in target.glob("model-*-of-*.safetensors"))
    with weights.atomic_directory(target, keep + shards) as scratch:
        weights.write(scratch, tensors, shard_bytes)
        (scratch / "config.json").write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
        if "image_mean" in raw:
            text = json.dumps(_preprocessor(raw), indent=2)
            (scratch / PREPROCESSOR).write_text(text + "\n", "utf-8")
        if tokenizer_dir is not None:
            copy_tokenizer(tokenizer_dir, scratch)
    return target


def copy_tokenizer(source: str | os.PathLike[str], target: Path) -> None:
    """Copies the tokenizer's files of a folder; those that it lacks are left out."""
    for file in TOKENIZER_FILES:
        origin = Path(source) / file
        if origin.is_file():
            (target / file).write_bytes(origin.read_bytes())


def describe(
    config: Any, labels: Sequence[str] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json of a configuration, the fields that it does not hold); the head apart.

    Raises:
      ValueError: such a field is no JSON value.
    """
    family = family_of(config.family)
    raw = {"model_type": family.name, **family.write(config), **_write_head(config.head, labels)}
    plain, missing = family.read(raw), {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "head" or value == getattr(plain, field.name, None):
            continue
        flat = value if isinstance(value, tuple) else (value,)
        if not all(item is None or isinstance(item, str | int | float) for item in flat):
            raise ValueError(f"{field.name}={value!r} has no place in a {family.name} config.json")
        missing[field.name] = value
    return raw, missing


def _by_tensor(names: Sequence[Name]) -> list[list[Name]]:
    """Leaves that are parts of one tensor together, in the order of their parts."""
    groups: dict[str, list[Name]] = {}
    for name in names:
        groups.setdefault(name.tensor, []).append(name)
    return [sorted(group, key=lambda name: name.part or (0, 1)) for group in groups.values()]


class _Reader:
    """Reads one leaf, or any region of it, from the tensors that make it up."""

    def __init__(self, store: Weights, tensors: list[str], name: Name, dtype: Any) -> None:
        self._store, self._tensors, self._name, self._dtype = store, tensors, name, dtype

    def array(self, shape: tuple[int, ...], sharding: Any) -> jax.Array:
        if sharding is None:
            return jax.device_put(
                self._region(tuple(slice(0, n) for n in shape), shape), may_alias=True
            )
        return jax.make_array_from_callback(
            shape, sharding, lambda index: self._region(index or (), shape)
        )

    def _region(self, index: Index, shape: tuple[int, ...]) -> np.ndarray:
        name = self._name
        bounds = [s.indices(n) for s, n in zip(index, shape, strict=True)]
        layers = range(*bounds[0]) if name.stacked else range(1)
        inner = tuple(slice(*b) for b in (bounds[1:] if name.stacked else bounds))
        out = _aligned([len(range(*b)) for b in bounds], self._dtype)
        for place, layer in enumerate(layers):
            target = out[place] if name.stacked else out
            if name.codec is not None:
                target[...] = name.codec.load(self._store.read(self._tensors[layer]))[inner]
                continue
            stored = name.region(inner, shape[1:] if name.stacked else shape)
            part = self._store.read(self._tensors[layer], stored)
            target[...] = part.T if name.transposed else part
        return out


def _aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, which the CPU backend takes without a copy."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _open(path: Path) -> tuple[Weights, dict[str, Any]]:
    """The tensors and the config.json values of a source."""
    reader = READERS.get(path.suffix)
    if reader is not None:
        if not path.is_file():
            raise FileNotFoundError(f"model file {path} does not exist")
        opened: tuple[Weights, dict[str, Any]] = importlib.import_module(reader).read(path)
        return opened
    raw = _read_config(path)  # first: what it says of a wrong folder is clearer
    if (path / "quantized.json").is_file():  # packed.FILE, which imports this module
        raise ValueError(
            f"{path} holds a quantized model, whose kernels are integers: what trains needs the "
            "float model that it was made from (models.packed.load opens it)"
        )
    return weights.open_directory(path), raw


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise FileNotFoundError(f"model folder {directory} does not exist")
    file = directory / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{directory} holds no config.json; is it a model folder?")
    try:
        raw = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} must hold an object, got {type(raw).__name__}")
    # How pixels are normalised is part of a vision model; the ecosystem keeps it beside.
    beside = directory / PREPROCESSOR
    if beside.is_file():
        try:
            given = json.loads(beside.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{beside} is not valid JSON ({error})") from error
        raw = {**{k: given[k] for k in ("image_mean", "image_std") if k in given}, **raw}
    return raw


def _strip(family: Family, shapes: Mapping[str, Any]) -> dict[str, str]:
    """Canonical tensor name -> name in the file: no prefix, and today's names of norms."""
    names = {}
    for name in shapes:
        short = name.removeprefix(family.prefix + ".") if family.prefix else name
        if short.endswith((".gamma", ".beta")):  # files of 2018-2019
            stem, _, old = short.rpartition(".")
            short = f"{stem}.{'weight' if old == 'gamma' else 'bias'}"
        names[short] = name
    return names


def _config(
    family: Family,
    raw: dict[str, Any],
    names: Mapping[str, str],
    head: str | HeadConfig | None,
    num_labels: int | None,
    path: Path,
) -> Any:
    try:
        config = family.read(raw)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    in_file = len(raw.get("id2label", {0: 0, 1: 1}))
    if head == "auto":
        architecture = (raw.get("architectures") or [""])[0]
        head = family.kind_of(architecture, raw)
        # Encoders are often published under the class they were pretrained as, headless.
        if head is not None and not _held(family, family.settle(config, names), head, names):
            head = None
    if isinstance(head, str):
        if head in ("classification", "token"):
            count = in_file if num_labels is None else num_labels
        else:
            count = {"span": 2}.get(head, 1)
        head = family.head(head, count, _head_drop(raw, head, getattr(config, "drop", 0.0)))
    return family.settle(config.with_head(head), names)


def _held(family: Family, config: Any, kind: str, names: Mapping[str, str]) -> bool:
    """Whether the file holds all of a head's tensors."""
    return all(name.tensor in names for name in family.heads[kind].of(config))


def _head_drop(raw: Mapping[str, Any], kind: str, default: float) -> float:
    """Dropout before the output layer, under the names that the families give it."""
    if kind in ("span", "mlm", "lm"):
        return float(raw.get("qa_dropout", 0.0)) if kind == "span" else 0.0
    given = raw.get("classifier_dropout", raw.get("seq_classif_dropout"))
    return default if given is None else float(given)


def _override(config: Any, overrides: Mapping[str, Any]) -> Any:
    fields = {f.name for f in dataclasses.fields(config)}
    for name in overrides:
        if name not in fields:
            raise ValueError(f"{name!r} is not a setting of the model; it has {sorted(fields)}")
    return dataclasses.replace(config, **overrides)


def _check(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    names: Mapping[str, str],
    wanted: Mapping[str, list[str]],
    known: Mapping[str, Name],
    abstract: Mapping[str, Any],
    fresh: list[str],
) -> None:
    """Checks every tensor before the first is read."""
    for leaf, tensors in wanted.items():
        if leaf in fresh:
            continue
        expected = known[leaf].stored_shape(abstract[leaf].shape)
        for tensor in tensors:
            if tensor not in names:
                raise ValueError(f"{path} lacks the tensor {tensor!r} (our {leaf!r})")
            found = tuple(shapes[names[tensor]])
            if found != expected:
                raise ValueError(
                    f"{path}: tensor {tensor!r} (our {leaf!r}) has shape {found}, "
                    f"but config.json asks for {expected}"
                )


def _initialise(
    model: Model, key: jax.Array, fresh: Sequence[str], dtype: Any, shardings: Any
) -> dict[str, jax.Array]:
    """Initial values of some leaves only: XLA drops the rest of ``init``."""
    if not fresh:
        return {}

    def init(key: jax.Array) -> dict[str, jax.Array]:
        flat = tree.flatten(model.init(key))
        return {path: flat[path].astype(dtype) for path in fresh}

    out = None if shardings is None else {path: shardings[path] for path in fresh}
    return jax.jit(init, out_shardings=out)(key)


def _ignored(family: Family, tensor: str) -> bool:
    return tensor.endswith(family.ignored)


def labels_of(raw: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the classes in a config.json, where it gives them."""
    names = raw.get("id2label")
    if not isinstance(names, Mapping):
        return None
    return tuple(str(names[k]) for k in sorted(names, key=int))


def _preprocessor(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an image processor that does to pixels what our vision models do."""
    side = raw.get("image_size", raw.get("vision_config", {}).get("image_size", 224))
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(raw["image_mean"]),
        "image_std": list(raw["image_std"]),
    }


def _write_head(head: HeadConfig | None, labels: Sequence[str] | None) -> dict[str, Any]:
    if head is None or head.kind in ("mlm", "lm"):
        return {}
    if head.kind == "span":
        return {"qa_dropout": head.drop}
    labels = labels or [f"LABEL_{i}" for i in range(head.num_labels)]
    out: dict[str, Any] = {
        "id2label": {str(i): str(name) for i, name in enumerate(labels)},
        "label2id": {str(name): i for i, name in enumerate(labels)},
        "classifier_dropout": head.drop,
        "seq_classif_dropout": head.drop,
    }
    if head.kind == "regression":
        out["problem_type"] = "regression"
    return out
