"""Quantised models on disk: k bits a weight, steps in float32, the rest as it was.

A folder of

  config.json         the network, as in an unquantised folder
  quantized.json      the rules, bits and shape of every packed kernel, the head
  model.safetensors   <path>/q      uint8 [ceil(n k / 8)], value i in the bits i k ... i k + k - 1
                                    (lowest bit first), as q + 2^(k-1)
                      <path>/scale  float32 [..., groups, out]
                      <path>        every other parameter

and the tokenizer's files. ``transformers`` cannot open it: write dequantised parameters with
``pretrained.save`` for that. A kernel takes k / 32 of its float32 size, and 1 / inputs (1 / group
with groups) more for its steps.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from steppe.models import fake_quant as fq
from steppe.models import integer, pretrained, quantized, tree, weights
from steppe.models.families import family as family_of
from steppe.models.heads import HeadConfig
from steppe.models.model import Model
from steppe.models.quantized import QuantConfig, Quantized, QuantRules
from steppe.models.tree import Params

FILE = "quantized.json"
FORMAT = 1
# Values are packed so many at a time; a multiple of 8, so that pieces end on whole bytes.
PIECE = 1 << 22


class Loaded(NamedTuple):
    """A quantised model from disk.

    Attributes:
      model: it rounds its inputs; see ``Quantized.stored``.
      params: float32 kernels on their grids, or integers.
      labels: names of the classes, where they were saved.
    """

    model: Quantized
    params: Params
    labels: tuple[str, ...] | None


class Sizes(NamedTuple):
    """Bytes of the kernels that are packed: integers and steps, and what they replace."""

    packed: int
    float32: int

    @property
    def ratio(self) -> float:
        """packed / float32."""
        return self.packed / self.float32


# Bits ----------------------------------------------------------------------------------------


def pack(q: np.ndarray, bits: int) -> np.ndarray:
    """Integers of ``bits`` bits as bytes, uint8 [ceil(n bits / 8)].

    Raises:
      ValueError: bits, or integers that do not fit into them.
    """
    fq.check_bits(bits, "bits", bypass=False)
    flat = np.asarray(q).reshape(-1)
    half = 1 << (bits - 1)
    if flat.size and (flat.min() < -half or flat.max() >= half):
        raise ValueError(f"q must lie in {-half}..{half - 1} for {bits} bits, got {flat.min()}..")
    if bits == 8:
        return (flat.astype(np.int16) + half).astype(np.uint8)
    places = np.arange(bits, dtype=np.uint8)
    out = []
    for start in range(0, flat.size, PIECE):
        codes = (flat[start : start + PIECE].astype(np.int16) + half).astype(np.uint8)
        if 8 % bits == 0:  # the same bytes, several times faster
            codes = np.pad(codes, (0, -codes.size % (8 // bits))).reshape(-1, 8 // bits)
            shifted = codes << np.arange(0, 8, bits, dtype=np.uint8)
            out.append(np.bitwise_or.reduce(shifted, axis=1))
            continue
        planes = (codes[:, None] >> places) & 1
        out.append(np.packbits(planes.reshape(-1), bitorder="little"))
    return np.concatenate(out) if out else np.zeros(0, np.uint8)


def unpack(data: np.ndarray, bits: int, shape: Sequence[int]) -> np.ndarray:
    """The reverse of :func:`pack`: int8 of ``shape``.

    Raises:
      ValueError: bits, or bytes that are not as many as the shape needs.
    """
    fq.check_bits(bits, "bits", bypass=False)
    if data.dtype != np.uint8:
        raise ValueError(f"packed integers are bytes (uint8), got {data.dtype}")
    number = int(np.prod(shape, dtype=np.int64))
    if data.size != -(-number * bits // 8):
        raise ValueError(
            f"{number} integers of {bits} bits take {-(-number * bits // 8)} bytes, got {data.size}"
        )
    half = 1 << (bits - 1)
    if bits == 8:
        return (data.astype(np.int16) - half).astype(np.int8).reshape(tuple(shape))
    values = (1 << np.arange(bits)).astype(np.uint8)
    out = np.empty(number, np.int8)
    for start in range(0, number, PIECE):
        count = min(PIECE, number - start)
        piece = np.asarray(data[start * bits // 8 : -(-(start + count) * bits // 8)])
        if 8 % bits == 0:
            codes = (piece[:, None] >> np.arange(0, 8, bits, dtype=np.uint8)) & (2**bits - 1)
            out[start : start + count] = codes.reshape(-1)[:count].astype(np.int16) - half
            continue
        planes = np.unpackbits(piece, bitorder="little", count=count * bits).reshape(count, bits)
        out[start : start + count] = (planes @ values).astype(np.int16) - half
    return out.reshape(tuple(shape))


# Folders -------------------------------------------------------------------------------------


def save(
    directory: str | os.PathLike[str],
    model: Model,
    params: Params,
    rules: QuantRules,
    *,
    labels: Sequence[str] | None = None,
    tokenizer_dir: str | os.PathLike[str] | None = None,
    float_dtype: Any = None,
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a folder, atomically: a failure leaves nothing behind.

    Args:
      directory: must not exist, or be empty, or hold an earlier quantised model.
      model: the network; of a quantised one its base.
      params: of ``quantized.quantize`` or a method of ``train.quantize``, kernels in integers.
      rules: what they were quantised by.
      labels: names of the classes.
      tokenizer_dir: its tokenizer files are copied along.
      float_dtype: of the floating-point parameters that are not packed; None = as they are.
      notes: JSON values to keep with the model, such as the method.

    Raises:
      FileExistsError: the folder holds other files.
      ValueError: a kernel that the rules name is not in integers, or too large for its bits;
        parameters of another model; a configuration that cannot be written.
    """
    base = model.base if isinstance(model, Quantized) and model.base is not None else model
    pairs = quantized.as_pairs(rules)
    chosen = quantized.resolve(base, pairs)
    expected = integer.wrap(base, pairs)
    tree.same_structure(params, expected.abstract(), ("params", "the quantised model"))
    flat = tree.flatten(params)
    tensors: dict[str, np.ndarray] = {}
    kernels = {}
    for path, config in chosen.items():
        if config.w_bits != fq.BYPASS:
            q = np.asarray(flat.pop(f"{path}/q"))
            kernels[path] = {"bits": config.w_bits, "shape": list(q.shape)}
            tensors[f"{path}/q"] = pack(q, config.w_bits)
            tensors[f"{path}/scale"] = np.asarray(flat.pop(f"{path}/scale"), np.float32)
    dtype = None if float_dtype is None else jnp.dtype(float_dtype)
    for path, leaf in flat.items():
        kept = dtype is None or path.startswith(f"{quantized.QUANT}/")
        tensors[path] = np.asarray(leaf) if kept else np.asarray(leaf).astype(dtype)
    raw, differences = pretrained.describe(base.config, labels)
    record = {
        "format": FORMAT,
        "config": differences,
        "head": None if base.config.head is None else dataclasses.asdict(base.config.head),
        "rules": [[p, None if c is None else dataclasses.asdict(c)] for p, c in pairs],
        "kernels": kernels,
        "notes": dict(notes or {}),
    }
    names = ("config.json", FILE, weights.SINGLE, weights.SHARDED, *pretrained.TOKENIZER_FILES)
    target = Path(directory)
    shards = tuple(p.name for p in target.glob("model-*-of-*.safetensors"))
    with weights.atomic_directory(target, names + shards) as scratch:
        weights.write(scratch, tensors)
        (scratch / "config.json").write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
        (scratch / FILE).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
        if tokenizer_dir is not None:
            pretrained.copy_tokenizer(tokenizer_dir, scratch)
    return target


def load(directory: str | os.PathLike[str], *, integers: bool = False) -> Loaded:
    """Reads a folder that :func:`save` wrote.

    Args:
      integers: keep int8 kernels and multiply integers (``models.integer``); by default kernels
        are float32 on their grids, and the model is ``quantized.wrap(..., weights=False)``.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, of a later format, or does not fit the network.
    """
    path = Path(directory).expanduser()
    record = _record(path)
    try:
        raw = json.loads((path / "config.json").read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} is damaged ({error}): save it again") from error
    try:
        config = family_of(str(raw.get("model_type"))).read(raw)
        head = None if record["head"] is None else HeadConfig(**record["head"])
        config = dataclasses.replace(config, **_tuples(record["config"])).with_head(head)
        pairs = tuple((p, None if c is None else QuantConfig(**c)) for p, c in record["rules"])
        kernels = {p: (k["bits"], tuple(k["shape"])) for p, k in record["kernels"].items()}
        chosen = quantized.resolve(config.build(), pairs)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / FILE} does not describe a quantised model: {error}") from error
    store = weights.open_directory(path)
    flat: dict[str, Any] = {}
    for name in store.shapes():
        stem = name.removesuffix("/q")
        if stem in kernels and name != stem:
            bits, shape = kernels[stem]
            try:
                flat[name] = jnp.asarray(unpack(np.asarray(store.read(name)), bits, shape))
            except ValueError as error:
                raise ValueError(
                    f"{path / FILE} does not fit the weights beside it, kernel {stem!r}: {error}; "
                    "save the model again"
                ) from error
        else:
            flat[name] = jnp.array(store.read(name))
    for name, (bits, _) in kernels.items():
        if name not in chosen or chosen[name].w_bits != bits:
            rule = chosen[name].w_bits if name in chosen else "none"
            raise ValueError(
                f"{path / FILE} contradicts itself: kernel {name!r} is stored in {bits} bits, its "
                f"rule says {rule}; save the model again"
            )
    base = config.build()
    model = integer.wrap(base, pairs)
    params = tree.unflatten(flat)
    tree.same_structure(params, model.abstract(), (str(path), "its configuration"))
    labels = pretrained.labels_of(raw)
    if integers:
        return Loaded(model, params, labels)
    model = quantized.wrap(base, pairs, weights=False)
    return Loaded(model, quantized.dequantize(params), labels)


def sizes(directory: str | os.PathLike[str]) -> Sizes:
    """Bytes of the packed kernels of a folder, steps included, beside those in float32.

    Raises:
      FileNotFoundError, ValueError: as :func:`load`.
    """
    path = Path(directory).expanduser()
    kernels = _record(path)["kernels"]
    shapes = weights.open_directory(path).shapes()
    packed = sum(int(np.prod(shapes[f"{p}/q"])) for p in kernels)
    packed += sum(4 * int(np.prod(shapes[f"{p}/scale"])) for p in kernels)
    return Sizes(packed, sum(4 * int(np.prod(k["shape"])) for k in kernels.values()))


def is_packed(directory: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a quantised model."""
    return (Path(directory).expanduser() / FILE).is_file()


def _record(path: Path) -> dict[str, Any]:
    file = path / FILE
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no {FILE}: it is no quantised model")
    try:
        record: dict[str, Any] = json.loads(file.read_text("utf-8"))
        version = record["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error})") from error
    if version != FORMAT:
        raise ValueError(f"{file} has format {version}, this version reads {FORMAT}: update steppe")
    return record


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists where frozen configurations have tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
