"""Reads DINOv2 from an ONNX graph that contains it, with whatever was built on top left out.

The export splits the positions: the class token's row is joined to the others after these
have been interpolated to the size of the image. Tensors outside the backbone are ignored.
"""

from __future__ import annotations

import math
import re
from typing import Any

from steppe.models.onnx_file import OnnxFile
from steppe.models.onnx_weights import OnnxWeights, Source, heads_of, named, prefix_of

CLASS = "embeddings.cls_token"
PATCHES = "embeddings.patch_embeddings.projection.weight"
POSITIONS = "embeddings.position_embeddings"


def read_dinov2(file: OnnxFile) -> tuple[OnnxWeights, dict[str, Any]]:
    """The weights and the config.json settings of the backbone.

    A graph for inference has no mask token, so the configuration has none.

    Raises:
      ValueError: the graph is of another network, or its positions are not found.
    """
    path = file.path
    prefix = prefix_of(file, CLASS)
    sources = named(file, prefix, r"encoder/layer\.\d+/.*")
    if "encoder.layer.0.layer_scale1.lambda1" not in sources or PATCHES not in sources:
        raise ValueError(f"{path} is a vision model, but not a DINOv2; only those are read")
    width, channels, patch, _ = file.tensors[sources[PATCHES].names[0]].shape
    if POSITIONS not in sources:
        sources[POSITIONS] = _positions(file, width)
    weights = OnnxWeights(file, sources)
    shapes = weights.shapes()
    layers = {int(m.group(1)) for n in sources if (m := re.match(r"encoder\.layer\.(\d+)\.", n))}
    side = math.isqrt(shapes[POSITIONS][1] - 1)
    gated = "encoder.layer.0.mlp.fc1.bias" not in sources
    inner = 4 * width if gated else shapes["encoder.layer.0.mlp.fc1.bias"][0]
    config = {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads_of(file, width, "layer.0/attention/attention"),
        "mlp_ratio": inner // width,
        "use_swiglu_ffn": gated,
        "use_mask_token": False,
        "qkv_bias": "encoder.layer.0.attention.attention.query.bias" in sources,
        "hidden_act": "gelu",
        "layer_norm_eps": _epsilon(file),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return weights, config


def _positions(file: OnnxFile, width: int) -> Source:
    """The positions of the class token and of the patches, from the nodes that use them."""
    found: dict[str, str] = {}
    for node in file.nodes:
        if node.op not in ("Concat", "Reshape") or "embeddings" not in node.name:
            continue
        for name in node.inputs:
            tensor = file.tensors.get(name)
            if tensor is None or len(tensor.shape) != 3 or tensor.shape[-1] != width:
                continue
            alone = tensor.shape[1] == 1
            if alone == (node.op == "Concat") and not name.endswith(CLASS):
                found[node.op] = name
    if set(found) != {"Concat", "Reshape"}:
        raise ValueError(f"{file.path}: the positions cannot be found in the graph")
    return Source((found["Concat"], found["Reshape"]), axis=1)


def _epsilon(file: OnnxFile) -> float:
    """Of the norms: an attribute, or the constant that is added to the variance."""
    constants = file.constants()
    for node in file.nodes:
        if node.op == "LayerNormalization" and "epsilon" in node.attributes:
            return float(f"{node.attributes['epsilon']:.6g}")  # stored in single precision
        if node.op == "Add" and "/norm1/" in node.name:
            for name in node.inputs:
                value = constants.get(name)
                if value is not None and value.size == 1:
                    return float(f"{float(value.reshape(())):.6g}")
    return 1e-6
