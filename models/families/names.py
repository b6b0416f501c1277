"""Name maps between our parameter paths and the tensors of a published checkpoint.

A family is data: which config keys mean what, and which tensor is which leaf. A tensor name
with ``{}`` stands for one tensor a layer; they are stacked into one leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig


@dataclass(frozen=True)
class Name:
    """One leaf: our path, the tensor's name, and whether the file stores it transposed.

    PyTorch keeps a linear map as (out, in); ours are (in, out).
    """

    path: str
    tensor: str
    transposed: bool = False

    def tensors(self, layers: int) -> list[str]:
        """The tensor's names, one a layer for a stacked leaf."""
        if "{}" not in self.tensor:
            return [self.tensor]
        return [self.tensor.format(layer) for layer in range(layers)]


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
    names: list[Name]
    transform: str | None = None


@dataclass(frozen=True)
class Family:
    """Everything that reading and writing one family's files takes.

    Attributes:
      name: the ``model_type`` of its config.json.
      prefix: what precedes the names of the base model inside a model with a head.
      base: class of the model without a head.
      body: leaves of the base model, the pooler apart.
      pooler: leaves of the pooler; empty when the family has none.
      pooled: whether sequence-level heads read the pooler (else they hold a layer of their own).
      heads: head kind -> its names.
      read: config.json -> our config, without a head.
      write: our config -> config.json, without what all families share.
      ignored: tensors (suffixes) that carry nothing, such as stored position ids.
    """

    name: str
    prefix: str
    base: str
    body: list[Name]
    heads: Mapping[str, HeadNames]
    read: Callable[[Mapping[str, Any]], EncoderConfig]
    write: Callable[[EncoderConfig], dict[str, Any]]
    pooler: list[Name] = field(default_factory=list)
    pooled: bool = False
    ignored: tuple[str, ...] = ("position_ids", "token_type_ids")

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

    def names(self, config: EncoderConfig) -> list[Name]:
        """All leaves of ``config`` with the tensor names of a file that holds exactly it."""
        body = self.body + (self.pooler if config.pooler else [])
        if not config.types:
            body = [n for n in body if not n.path.startswith("embed/type/")]
        if config.head is None:
            return body
        prefixed = [Name(n.path, f"{self.prefix}.{n.tensor}", n.transposed) for n in body]
        return prefixed + self.heads[config.head.kind].names

    def architecture(self, config: EncoderConfig) -> str:
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
