"""Reads the initialisers of a BERT that was exported to ONNX as if they were a checkpoint.

An export keeps the names of embeddings, norms and biases, but folds every linear map into an
anonymous, transposed initialiser; the node that multiplies by it says which one it is. The
graph is never run. Needs ``onnx`` (``pip install 'steppe[onnx]'``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from steppe.models.weights import Index

WORD = "embeddings.word_embeddings.weight"


class OnnxWeights:
    """Named tensors of an ONNX graph, under the names of the original checkpoint."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self._tensors = tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        tensor = self._tensors[name]
        return tensor if index is None else tensor[index]


def read_bert(path: Path) -> tuple[OnnxWeights, dict[str, Any]]:
    """The weights and the config.json settings that the graph implies.

    Raises:
      FileNotFoundError: no such file.
      ImportError: ``onnx`` is not installed.
      ValueError: not an ONNX file, or not a BERT.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError("reading .onnx needs onnx: pip install 'steppe[onnx]'") from error
    try:
        # Data in other files stays unread: a graph must not make us open any path it names.
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf raises a class of its own
        raise ValueError(f"{path} is not an ONNX file, or truncated ({error})") from error
    stored = {}
    for init in graph.initializer:
        if init.external_data:
            raise ValueError(f"{path} keeps tensor {init.name!r} in another file; not supported")
        stored[init.name] = numpy_helper.to_array(init)
    word = next((name for name in stored if name.endswith(WORD)), None)
    if word is None:
        raise ValueError(f"{path} has no {WORD!r}; only exports of a BERT are read")
    prefix = word.removesuffix(WORD)

    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in stored.items()
        if name.startswith(prefix)
    }
    scope = "/" + prefix.strip(".").replace(".", "/")
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            match = re.search(r"((?:encoder/layer\.\d+|pooler)/.*)/MatMul$", node.name)
            if match:
                name = match.group(1).replace("/", ".") + ".weight"
                tensors[name] = stored[node.input[1]].T
    layers = {int(m.group(1)) for n in tensors if (m := re.match(r"encoder\.layer\.(\d+)\.", n))}
    if not layers:
        raise ValueError(f"{path} has no encoder layers below {scope}")
    vocab, width = tensors[WORD].shape
    positions = tensors["embeddings.position_embeddings.weight"].shape[0]
    config = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": _heads(graph, width, path),
        "intermediate_size": tensors["encoder.layer.0.intermediate.dense.bias"].shape[0],
        "max_position_embeddings": positions,
        "type_vocab_size": tensors["embeddings.token_type_embeddings.weight"].shape[0],
        "hidden_act": "gelu",
        "layer_norm_eps": _epsilon(graph),
        # Rates are not part of an inference graph; these are BERT's.
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
    return OnnxWeights(tensors), config


def _heads(graph: Any, width: int, path: Path) -> int:
    """Number of heads, from the shape (batch, time, heads, head size) that keys are given."""
    from onnx import numpy_helper

    constants = {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t)
        for node in graph.node
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value"
    }
    for node in graph.node:
        if node.op_type == "Concat" and "layer.0/attention/self" in node.name:
            tail = [constants[name].reshape(-1) for name in node.input if name in constants]
            values = [int(v[0]) for v in tail if v.size == 1 and v[0] > 0]
            if len(values) >= 2 and values[-2] * values[-1] == width:
                return values[-2]
    raise ValueError(f"{path}: the number of attention heads cannot be read from the graph")


def _epsilon(graph: Any) -> float:
    for node in graph.node:
        if node.op_type == "LayerNormalization":
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    return float(f"{attribute.f:.6g}")  # stored in single precision
    return 1e-12
