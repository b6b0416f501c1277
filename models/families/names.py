"""Name maps between our parameter paths and the tensors of a published checkpoint.

A family is data: which config keys mean what, and which tensor is which leaf. A tensor name
with ``{}`` stands for one tensor a layer; they are stacked into one leaf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from steppe.models.encoder import EncoderConfig
from steppe.models.heads import POOLED, HeadConfig
from steppe.models.model import Model

Shape = tuple[int, ...]


class Config(Protocol):
    """What every family's configuration has: a frozen dataclass that builds a model."""

    @property
    def family(self) -> str:
        """Name of the family whose files it reads and writes."""

    @property
    def head(self) -> HeadConfig | None:
        """The head, or None."""

    def with_head(self, head: HeadConfig | None) -> Any:
        """The same network under another head."""

    def build(self) -> Model:
        """The model of this configuration."""


class Codec(NamedTuple):
    """A layout that differs from ours by more than a transposition.

    Attributes:
      load: the stored tensor -> ours.
      save: ours -> the stored tensor.
      stored: our shape -> the stored one.
    """

    load: Callable[[np.ndarray], np.ndarray]
    save: Callable[[np.ndarray], np.ndarray]
    stored: Callable[[Shape], Shape]


@dataclass(frozen=True)
class Name:
    """One leaf: our path, the tensor's name, and how the file stores it.

    Attributes:
      path: our path.
      tensor: the tensor's name; ``{}`` in it is the layer's number.
      transposed: PyTorch keeps a linear map as (out, in); ours are (in, out).
      part: (i, n): ours is the i-th of n equal pieces of the tensor along its outputs, as where
        queries, keys and values are stored as one matrix.
      codec: for any other layout; the whole tensor is read then.
    """

    path: str
    tensor: str
    transposed: bool = False
    part: tuple[int, int] | None = None
    codec: Codec | None = None

    @property
    def stacked(self) -> bool:
        """Whether the leaf is made of one tensor a layer."""
        return "{}" in self.tensor

    def tensors(self, shape: Shape) -> list[str]:
        """Names of the tensors of a leaf of this shape, one a layer for a stacked leaf."""
        if not self.stacked:
            return [self.tensor]
        return [self.tensor.format(layer) for layer in range(shape[0])]

    def stored_shape(self, shape: Shape) -> Shape:
        """Shape of each tensor of a leaf of this shape."""
        inner = shape[1:] if self.stacked else shape
        if self.codec is not None:
            return self.codec.stored(inner)
        stored = inner[::-1] if self.transposed else inner
        if self.part is None:
            return stored
        axis, pieces = self._outputs(stored), self.part[1]
        return (*stored[:axis], stored[axis] * pieces, *stored[axis + 1 :])

    def region(self, inner: tuple[slice, ...], shape: Shape) -> tuple[slice, ...]:
        """Where a region of one layer's leaf of ``shape`` lies in the stored tensor."""
        stored = inner[::-1] if self.transposed else inner
        if self.part is None:
            return stored
        axis = self._outputs(stored)
        size = (shape[::-1] if self.transposed else shape)[axis]
        start = self.part[0] * size
        low, high, step = stored[axis].indices(size)
        moved = slice(start + low, start + high, step)
        return (*stored[:axis], moved, *stored[axis + 1 :])

    def join(self, pieces: list[np.ndarray]) -> np.ndarray:
        """The stored tensor of one layer from our leaves: one, or the n parts in order."""
        if self.codec is not None:
            return self.codec.save(pieces[0])
        stored = [piece.T if self.transposed else piece for piece in pieces]
        return stored[0] if len(stored) == 1 else np.concatenate(stored, self._outputs(stored[0]))

    def _outputs(self, stored: Any) -> int:
        """Axis of the outputs in the stored tensor (given it, its shape or an index)."""
        dimensions = stored.ndim if isinstance(stored, np.ndarray) else len(stored)
        return 0 if self.transposed else dimensions - 1


def dense(path: str, tensor: str) -> list[Name]:
    """A linear map with bias."""
    return [
        Name(f"{path}/kernel", f"{tensor}.weight", transposed=True),
        Name(f"{path}/bias", f"{tensor}.bias"),
    ]


def norm(path: str, tensor: str) -> list[Name]:
    """A LayerNorm."""
    return [Name(f"{path}/scale", f"{tensor}.weight"), Name(f"{path}/bias", f"{tensor}.bias")]


def table(path: str, tensor: str) -> list[Name]:
    """An embedding."""
    return [Name(f"{path}/table", f"{tensor}.weight")]


@dataclass(frozen=True)
class HeadNames:
    """A head as the family's files hold it: the class that opens it, its tensors, its layout."""

    architecture: str
    names: list[Name] | Callable[[Any], list[Name]]
    transform: str | None = None

    def of(self, config: Any) -> list[Name]:
        """The head's names under a configuration."""
        return self.names(config) if callable(self.names) else self.names


@dataclass(frozen=True)
class Family:
    """Everything that reading and writing one family's files takes.

    Attributes:
      name: the ``model_type`` of its config.json.
      prefix: what precedes the names of the base model inside a model with a head.
      base: class of the model without a head.
      body: leaves of the base model, the pooler apart; or a function of the configuration.
      pooler: leaves of the pooler; empty when the family has none.
      pooled: whether sequence-level heads read the pooler (else they hold a layer of their own).
      heads: head kind -> its names.
      read: config.json -> our config, without a head.
      write: our config -> config.json, without what all families share.
      ignored: tensors (suffixes) that carry nothing, such as stored position ids.
      adjust: ``(config, tensors) -> config`` where the tensors that a file holds decide about
        the configuration, as for a head that may be tied.
    """

    name: str
    prefix: str
    base: str
    body: list[Name] | Callable[[Any], list[Name]]
    heads: Mapping[str, HeadNames]
    read: Callable[[Mapping[str, Any]], Any]
    write: Callable[[Any], dict[str, Any]]
    pooler: list[Name] = field(default_factory=list)
    pooled: bool = False
    ignored: tuple[str, ...] = ("position_ids", "token_type_ids")
    adjust: Callable[[Any, Collection[str]], Any] | None = None

    def head(self, kind: str, num_labels: int, drop: float) -> HeadConfig:
        """The family's head of this kind.

        Raises:
          ValueError: the family has no such head.
        """
        if kind not in self.heads:
            raise ValueError(
                f"a {self.name} model has no {kind!r} head; it has {', '.join(self.heads)}"
            )
        return HeadConfig(kind, num_labels, self.heads[kind].transform, drop)

    def names(self, config: Any) -> list[Name]:
        """All leaves of ``config`` with the tensor names of a file that holds exactly it."""
        body = self.body(config) if callable(self.body) else list(self.body)
        if isinstance(config, EncoderConfig):
            body += self.pooler if config.pooler else []
            if not config.types:
                body = [n for n in body if not n.path.startswith("embed/type/")]
        if config.head is None:
            return body
        if self.prefix:
            body = [dataclasses.replace(n, tensor=f"{self.prefix}.{n.tensor}") for n in body]
        return body + self.heads[config.head.kind].of(config)

    def settle(self, config: Any, tensors: Collection[str]) -> Any:
        """``config`` with what depends on the tensors of a file, named without the prefix."""
        if self.pooler:
            head = config.head
            held = self.pooler[0].tensor in tensors
            pooler = held if head is None else head.kind in POOLED and self.pooled
            config = dataclasses.replace(config, pooler=pooler)
        return config if self.adjust is None else self.adjust(config, tensors)

    def architecture(self, config: Any) -> str:
        """Class in ``transformers`` that opens what we write for ``config``."""
        return self.base if config.head is None else self.heads[config.head.kind].architecture

    def kind_of(self, architecture: str, config: Mapping[str, Any]) -> str | None:
        """Head kind of a class name; None for the base model or an unknown class."""
        regression = len(config.get("id2label", {0: 0, 1: 1})) == 1
        regression = regression or config.get("problem_type") == "regression"
        kinds = [k for k, h in self.heads.items() if h.architecture == architecture]
        if not kinds:
            return None
        if set(kinds) == {"classification", "regression"}:
            return "regression" if regression else "classification"
        return kinds[0]


def heads(
    prefix: str,
    sequence: list[Name],
    mlm: list[Name],
    *,
    sequence_transform: str | None = None,
    token: str = "classifier",
) -> dict[str, HeadNames]:
    """The five heads of an encoder family whose classes are named ``{prefix}For...``."""
    return {
        "classification": HeadNames(
            f"{prefix}ForSequenceClassification", sequence, sequence_transform
        ),
        "regression": HeadNames(f"{prefix}ForSequenceClassification", sequence, sequence_transform),
        "token": HeadNames(f"{prefix}ForTokenClassification", dense("head/out", token)),
        "span": HeadNames(f"{prefix}ForQuestionAnswering", dense("head/out", "qa_outputs")),
        "mlm": HeadNames(f"{prefix}ForMaskedLM", mlm),
    }


def read_common(config: Mapping[str, Any], keys: Mapping[str, str], **more: Any) -> EncoderConfig:
    """Our config from ``keys`` (our field -> key of config.json) and fixed values.

    Raises:
      ValueError: a key is missing, or a setting that we do not implement is on.
    """
    kind = config.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(f"position_embedding_type={kind!r} is not supported; only 'absolute'")
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise ValueError("config.json describes a decoder (is_decoder); only encoders are read")
    values: dict[str, Any] = dict(more)
    for ours, theirs in keys.items():
        if theirs not in config:
            raise ValueError(f"config.json lacks {theirs!r}")
        value = config[theirs]
        wanted = str if ours == "act" else (int, float)
        if not isinstance(value, wanted) or isinstance(value, bool):
            kind = "text" if wanted is str else "a number"
            raise ValueError(f"config.json: {theirs} must be {kind}, got {value!r}")
        values[ours] = value
    values["act"] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(
        values["act"], values["act"]
    )
    return EncoderConfig(**values)


def write_common(config: EncoderConfig, keys: Mapping[str, str]) -> dict[str, Any]:
    """The reverse of :func:`read_common`."""
    out = {theirs: getattr(config, ours) for ours, theirs in keys.items()}
    theirs = keys["act"]
    out[theirs] = {"gelu_tanh": "gelu_new"}.get(out[theirs], out[theirs])
    return out
