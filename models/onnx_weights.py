"""Reads the initialisers of a network that was exported to ONNX as if they were a checkpoint.

An export keeps the names of embeddings, norms and biases, but folds every linear map into an
anonymous, transposed initialiser; the node that multiplies by it says which one it is. The
graph is never run.

Read are BERT and, in ``onnx_vision``, DINOv2.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from steppe.models.onnx_file import OnnxFile
from steppe.models.weights import Index, Weights

WORD = "embeddings.word_embeddings.weight"


class Source(NamedTuple):
    """One tensor of the checkpoint in terms of the graph's.

    Attributes:
      names: initialisers, to be joined along ``axis``.
      transposed: whether the graph stores it the other way round.
      axis: see ``names``.
    """

    names: tuple[str, ...]
    transposed: bool = False
    axis: int = 0


class OnnxWeights:
    """Named tensors of an ONNX graph, under the names of the original checkpoint."""

    def __init__(self, file: OnnxFile, sources: Mapping[str, Source]) -> None:
        self._file, self._sources = file, dict(sources)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        out = {}
        for name, source in self._sources.items():
            shapes = [self._file.tensors[part].shape for part in source.names]
            shape = list(shapes[0])
            if len(shapes) > 1:
                shape[source.axis] = sum(s[source.axis] for s in shapes)
            out[name] = tuple(shape[::-1] if source.transposed else shape)
        return out

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        source = self._sources[name]
        parts = [self._file.read(part) for part in source.names]
        tensor = parts[0] if len(parts) == 1 else np.concatenate(parts, source.axis)
        tensor = tensor.T if source.transposed else tensor
        return tensor if index is None else tensor[index]


def read(path: Path) -> tuple[Weights, dict[str, Any]]:
    """The weights and the config.json settings that a graph implies.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not an ONNX file, or of a network that is not known.
    """
    from steppe.models import onnx_vision

    file = OnnxFile(path)
    if any(name.endswith(WORD) for name in file.tensors):
        return read_bert(file)
    if any(name.endswith(onnx_vision.CLASS) for name in file.tensors):
        return onnx_vision.read_dinov2(file)
    raise ValueError(
        f"{path} has neither {WORD!r} nor {onnx_vision.CLASS!r} among its tensors; exports of "
        "BERT and of DINOv2 are read"
    )


def read_bert(file: OnnxFile) -> tuple[OnnxWeights, dict[str, Any]]:
    """The weights and the config.json settings of a BERT.

    Raises:
      ValueError: the graph is of another network.
    """
    path = file.path
    prefix = prefix_of(file, WORD)
    sources = named(file, prefix, r"(?:encoder/layer\.\d+|pooler)/.*")
    weights = OnnxWeights(file, sources)
    shapes = weights.shapes()
    layers = {int(m.group(1)) for n in sources if (m := re.match(r"encoder\.layer\.(\d+)\.", n))}
    if not layers:
        raise ValueError(f"{path} has no encoder layers below {prefix!r}")
    vocab, width = shapes[WORD]
    config = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads_of(file, width, "layer.0/attention/self"),
        "intermediate_size": shapes["encoder.layer.0.intermediate.dense.bias"][0],
        "max_position_embeddings": shapes["embeddings.position_embeddings.weight"][0],
        "type_vocab_size": shapes["embeddings.token_type_embeddings.weight"][0],
        "hidden_act": "gelu",
        "layer_norm_eps": _epsilon(file),
        # Rates are not part of an inference graph; these are BERT's.
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
    return weights, config


def prefix_of(file: OnnxFile, tensor: str) -> str:
    """What stands before the checkpoint's own names.

    Raises:
      ValueError: no name ends in ``tensor``.
    """
    name = next((name for name in file.tensors if name.endswith(tensor)), None)
    if name is None:
        raise ValueError(f"{file.path} has no {tensor!r}")
    return name.removesuffix(tensor)


def named(file: OnnxFile, prefix: str, scopes: str) -> dict[str, Source]:
    """Tensors below ``prefix``, and the linear maps of the nodes whose scope is in ``scopes``."""
    sources = {
        name.removeprefix(prefix): Source((name,))
        for name in file.tensors
        if name.startswith(prefix)
    }
    for node in file.nodes:
        if node.op == "MatMul" and len(node.inputs) > 1 and node.inputs[1] in file.tensors:
            match = re.search(rf"({scopes})/MatMul$", node.name)
            if match:
                name = match.group(1).replace("/", ".") + ".weight"
                sources[name] = Source((node.inputs[1],), transposed=True)
    return sources


def heads_of(file: OnnxFile, width: int, scope: str) -> int:
    """Number of heads, from the shape (batch, time, heads, head size) that keys are given.

    Raises:
      ValueError: no such shape is in the graph.
    """
    constants = file.constants()
    for node in file.nodes:
        if node.op == "Concat" and scope in node.name:
            tail = [constants[name].reshape(-1) for name in node.inputs if name in constants]
            values = [int(v[0]) for v in tail if v.size == 1 and v[0] > 0]
            if len(values) >= 2 and values[-2] * values[-1] == width:
                return values[-2]
    raise ValueError(f"{file.path}: the number of attention heads cannot be read from the graph")


def _epsilon(file: OnnxFile) -> float:
    for node in file.nodes:
        if node.op == "LayerNormalization" and "epsilon" in node.attributes:
            return float(f"{node.attributes['epsilon']:.6g}")  # stored in single precision
    return 1e-12
