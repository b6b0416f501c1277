"""Reads Marian's own ``.bin`` files: students with an SSRU decoder, in int8 or float32.

Little endian: u64 version (1), u64 n, n headers of four u64 (name length, type, rank, bytes), n
names that end in NUL, all shapes as int32, u64 padding and so many bytes, the data blocks.

  0x404    float32
  0x4101   int8 values, then one float32 multiplier m: weight = value / m. All but the word
           table ``Wemb`` are stored transposed, (out, in), although their shape is (in, out).
  0x101    bytes: ``special:model.yml`` holds the hyper-parameters

Dequantising is exact in float32 up to the one division. ``*_QuantMultA`` are scales for int8
activations, which a float forward pass does not need. The tensors are given the names that
``families.marian_ssru`` writes, linear maps as (out, in).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from steppe.models.weights import Index

VERSION = 1
FLOAT32, INT8, BYTES = 0x404, 0x4101, 0x101
SETTINGS = "special:model.yml"
TABLE = "Wemb"
# What the files do not say: Marian computes positions without a limit; models are trained on
# sentences far shorter than this.
MAX_LENGTH = 512
# (setting, the only value that we implement)
FIXED = (
    ("type", "transformer"),
    ("transformer-decoder-autoreg", "rnn"),
    ("dec-cell", "ssru"),
    ("transformer-preprocess", ""),
    ("transformer-postprocess", "dan"),
    ("transformer-postprocess-top", ""),
    ("transformer-train-position-embeddings", "false"),
    ("tied-embeddings-all", "true"),
)


class _Entry(NamedTuple):
    kind: int
    shape: tuple[int, ...]
    offset: int
    size: int


class MarianFile:
    """The tensors of a file under their own names, in float32 and as (in, out).

    Raises:
      ValueError: another version or format, a truncated file, a type that is not known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        empty = path.stat().st_size == 0  # which has no memory map
        self._data = np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, "r")
        try:
            self.entries = self._header()
        except (struct.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is truncated or no Marian model ({error})") from error
        for name, entry in self.entries.items():
            self._check(name, entry)

    def _header(self) -> dict[str, _Entry]:
        size, at = len(self._data), 0

        def take(form: str) -> tuple[Any, ...]:
            nonlocal at
            length = struct.calcsize(form)
            if at + length > size:
                raise ValueError(
                    f"{self.path} is truncated: its header needs {at + length} bytes, the file "
                    f"has {size}; fetch it again"
                )
            out = struct.unpack(form, self._data[at : at + length].tobytes())
            at += length
            return out

        version, count = take("<QQ")
        if version != VERSION:
            raise ValueError(
                f"{self.path} is no Marian model of version {VERSION}: it starts with "
                f"{version:#x}. A .bin file of PyTorch may run code and is not read; convert it "
                "to safetensors"
            )
        if count * 32 > size:
            raise ValueError(
                f"{self.path} is truncated: {count} tensors need a header of more than "
                f"{count * 32} bytes, the file has {size}; fetch it again"
            )
        headers = [take("<QQQQ") for _ in range(count)]
        names = [take(f"<{length}s")[0].rstrip(b"\0").decode("utf-8") for length, *_ in headers]
        shapes = [take(f"<{rank}i") for _, _, rank, _ in headers]
        (padding,) = take("<Q")
        offset = at + padding
        entries = {}
        for name, shape, (_, kind, _, length) in zip(names, shapes, headers, strict=True):
            entries[name] = _Entry(kind, shape, offset, length)
            offset += length
        return entries

    def _check(self, name: str, entry: _Entry) -> None:
        size = len(self._data)
        if entry.offset + entry.size > size:
            raise ValueError(
                f"{self.path} is truncated: tensor {name!r} ends at byte "
                f"{entry.offset + entry.size}, the file has {size}; fetch it again"
            )
        if entry.kind not in (FLOAT32, INT8, BYTES):
            raise ValueError(
                f"{self.path}: tensor {name!r} has the type {entry.kind:#x}, which is not known; "
                f"those that are: {FLOAT32:#x} (float32), {INT8:#x} (int8)"
            )
        # QuantMultA of the word table is marked as int8 and holds no matrix.
        if entry.kind == BYTES or name.endswith("_QuantMultA"):
            return
        needed = int(np.prod(entry.shape, dtype=np.int64))
        needed = needed * 4 if entry.kind == FLOAT32 else needed + 4
        if min(entry.shape, default=0) < 1 or entry.size < needed:
            raise ValueError(
                f"{self.path}: tensor {name!r} of shape {entry.shape} needs {needed} bytes, its "
                f"block has {entry.size}"
            )

    def text(self, name: str) -> str:
        """A block of text.

        Raises:
          ValueError: there is none.
        """
        if name not in self.entries:
            raise ValueError(f"{self.path} holds no {name}; it is no complete Marian model")
        entry = self.entries[name]
        block = self._data[entry.offset : entry.offset + entry.size].tobytes()
        return block.rstrip(b"\0").decode("utf-8", errors="replace")

    def read(self, name: str) -> np.ndarray:
        """A tensor in float32, shaped as the file says."""
        kind, shape, offset, _ = self.entries[name]
        count = int(np.prod(shape, dtype=np.int64))
        if kind == FLOAT32:
            raw = self._data[offset : offset + 4 * count]
            return np.frombuffer(raw.tobytes(), "<f4").reshape(shape)
        values = self._data[offset : offset + count].view(np.int8)
        end = self._data[offset + count : offset + count + 4].tobytes()
        multiplier = np.frombuffer(end, "<f4")[0]
        whole = values.astype(np.float32) / multiplier
        return whole.reshape(shape) if name == TABLE else whole.reshape(shape[::-1]).T


class MarianWeights:
    """The tensors of a file under the names of ``families.marian_ssru``."""

    def __init__(self, file: MarianFile, names: dict[str, tuple[str, bool]]) -> None:
        self._file, self._names = file, names

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        out = {}
        for ours, (theirs, transposed) in self._names.items():
            shape = self._file.entries[theirs].shape
            out[ours] = _shape(shape, ours, transposed)
        return out

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """The tensor, or a region of it, in float32."""
        theirs, transposed = self._names[name]
        value = self._file.read(theirs)
        value = value.T if transposed else value.reshape(_shape(value.shape, name, False))
        return value if index is None else value[index]


def _shape(shape: tuple[int, ...], name: str, transposed: bool) -> tuple[int, ...]:
    """Biases and norms are rows [1, D] there; the bias of the logits is one with us too."""
    if transposed:
        return shape[::-1]
    vector = len(shape) == 2 and shape[0] == 1 and name != "final_logits_bias"
    return shape[1:] if vector else shape


def read(path: Path) -> tuple[MarianWeights, dict[str, Any]]:
    """The weights, and the values of the config.json that would describe them.

    Raises:
      FileNotFoundError: no such file.
      ValueError: see :class:`MarianFile`; or the model is not a student with an SSRU decoder.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    file = MarianFile(path)
    settings = _settings(file.text(SETTINGS))
    for key, wanted in FIXED:
        found = settings.get(key)
        if found != wanted:
            raise ValueError(
                f"{path}: {key} is {found!r}; of Marian's own files only those with {wanted!r} "
                "are read (students with an SSRU decoder)"
            )

    def number(key: str) -> int:
        try:
            return int(settings[key])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: {SETTINGS} gives no number for {key}") from error

    width, encoder, decoder = number("dim-emb"), number("enc-depth"), number("dec-depth")
    names = _names(encoder, decoder)
    for ours, (theirs, _) in names.items():
        if theirs not in file.entries:
            raise ValueError(f"{path} lacks the tensor {theirs!r} (our {ours!r})")
    table = file.entries[TABLE].shape
    if len(table) != 2 or table[1] != width:
        raise ValueError(f"{path}: {TABLE} has shape {table}, but dim-emb is {width}")
    raw = {
        "model_type": "marian_ssru",
        "architectures": ["MarianSSRUForConditionalGeneration"],
        "vocab_size": table[0],
        "d_model": width,
        "encoder_layers": encoder,
        "decoder_layers": decoder,
        "encoder_attention_heads": number("transformer-heads"),
        "decoder_attention_heads": number("transformer-heads"),
        "encoder_ffn_dim": number("transformer-dim-ffn"),
        "decoder_ffn_dim": number("transformer-dim-ffn"),
        "max_position_embeddings": MAX_LENGTH,
        "activation_function": settings.get("transformer-ffn-activation", "relu"),
        "scale_embedding": True,
        # Marian writes nothing on dropout into its files. The published students do not bear
        # it: a rate of 0.1 raises their loss from 1.2 to 8.5 nats a token.
        "dropout": 0.0,
        # </s>; there is no padding token, and the decoder starts from a vector of zeros.
        "eos_token_id": 0,
        "pad_token_id": 0,
        "decoder_start_token_id": -1,
    }
    return MarianWeights(file, names), raw


def _settings(text: str) -> dict[str, str]:
    """The scalars of a flat YAML mapping, as text; lists are left out."""
    pairs = re.findall(r"^([\w-]+):[ \t]*(.*?)[ \t]*$", text, re.MULTILINE)
    return {key: value.strip("\"'") for key, value in pairs}


def _names(encoder: int, decoder: int) -> dict[str, tuple[str, bool]]:
    """Our name -> (Marian's, whether to transpose it)."""
    out: dict[str, tuple[str, bool]] = {
        "model.shared.weight": (TABLE, False),
        "final_logits_bias": ("decoder_ff_logit_out_b", False),
    }

    def dense(ours: str, weight: str, bias: str | None) -> None:
        out[f"{ours}.weight"] = (weight, True)
        if bias is not None:
            out[f"{ours}.bias"] = (bias, False)

    def norm(ours: str, theirs: str) -> None:
        out[f"{ours}.weight"] = (f"{theirs}_ln_scale", False)
        out[f"{ours}.bias"] = (f"{theirs}_ln_bias", False)

    def attention(ours: str, theirs: str) -> None:
        for piece, letter in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o")):
            dense(f"{ours}.{piece}", f"{theirs}_W{letter}", f"{theirs}_b{letter}")
        norm(f"{ours}_layer_norm", f"{theirs}_Wo")

    def feed(ours: str, theirs: str) -> None:
        dense(f"{ours}.fc1", f"{theirs}_ffn_W1", f"{theirs}_ffn_b1")
        dense(f"{ours}.fc2", f"{theirs}_ffn_W2", f"{theirs}_ffn_b2")
        norm(f"{ours}.final_layer_norm", f"{theirs}_ffn_ffn")

    def encode(ours: str, theirs: str) -> None:
        attention(f"{ours}.self_attn", f"{theirs}_self")

    def decode(ours: str, theirs: str) -> None:
        dense(f"{ours}.ssru.in_proj", f"{theirs}_rnn_W", None)
        dense(f"{ours}.ssru.forget_proj", f"{theirs}_rnn_Wf", f"{theirs}_rnn_bf")
        norm(f"{ours}.ssru_layer_norm", f"{theirs}_rnn_ffn")
        attention(f"{ours}.encoder_attn", f"{theirs}_context")

    own: tuple[tuple[str, int, Callable[[str, str], None]], ...] = (
        ("encoder", encoder, encode),
        ("decoder", decoder, decode),
    )
    for part, layers, mixer in own:
        for layer in range(layers):
            ours, theirs = f"model.{part}.layers.{layer}", f"{part}_l{layer + 1}"
            mixer(ours, theirs)
            feed(ours, theirs)
    return out
