"""ViT (Dosovitskiy et al. 2021, arXiv 2010.11929), and what image families share."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from steppe.models.families.names import Codec, Family, HeadNames, Name, dense, norm
from steppe.models.vision import IMAGENET, VisionConfig

KEYS = {
    "image_size": "image_size",
    "patch": "patch_size",
    "channels": "num_channels",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn_width": "intermediate_size",
    "act": "hidden_act",
    "epsilon": "layer_norm_eps",
    "qkv_bias": "qkv_bias",
    "drop": "hidden_dropout_prob",
    "attn_drop": "attention_probs_dropout_prob",
}
# What the publishers' own image processor uses where config.json says nothing.
MEAN = STD = (0.5, 0.5, 0.5)
LAYER = "encoder.layer.{}"


def lead(count: int) -> Codec:
    """A tensor that the file stores behind ``count`` axes of size 1."""
    return Codec(
        load=lambda stored: stored.reshape(stored.shape[count:]),
        save=lambda ours: ours.reshape((1,) * count + ours.shape),
        stored=lambda shape: (1,) * count + tuple(shape),
    )


def patches(config: VisionConfig) -> Codec:
    """Kernel of the patches: [D, C, P, P] in files, [P * P * C, D] here."""
    p, c = config.patch, config.channels
    return Codec(
        load=lambda stored: stored.transpose(2, 3, 1, 0).reshape(p * p * c, -1),
        save=lambda ours: np.ascontiguousarray(ours.reshape(p, p, c, -1).transpose(3, 2, 0, 1)),
        stored=lambda shape: (shape[1], c, p, p),
    )


def embeddings(config: VisionConfig, mask: int = 2) -> list[Name]:
    """Everything before the first layer; the mask token lies behind ``mask`` axes."""
    names = [
        Name(
            "embed/patch/kernel",
            "embeddings.patch_embeddings.projection.weight",
            codec=patches(config),
        ),
        Name("embed/patch/bias", "embeddings.patch_embeddings.projection.bias"),
        Name("embed/class", "embeddings.cls_token", codec=lead(2)),
        Name("embed/position/table", "embeddings.position_embeddings", codec=lead(1)),
    ]
    if config.mask_token:
        names.append(Name("embed/mask", "embeddings.mask_token", codec=lead(mask)))
    if config.registers:
        names.append(Name("embed/registers", "embeddings.register_tokens", codec=lead(1)))
    return names


def attention(config: VisionConfig) -> list[Name]:
    """Queries, keys, values and output of the layers."""
    inner = f"{LAYER}.attention.attention"
    names = [
        *dense("layers/attn/q", f"{inner}.query"),
        *dense("layers/attn/k", f"{inner}.key"),
        *dense("layers/attn/v", f"{inner}.value"),
    ]
    if not config.qkv_bias:
        names = [name for name in names if not name.path.endswith("/bias")]
    return [*names, *dense("layers/attn/o", f"{LAYER}.attention.output.dense")]


def values(
    config: Mapping[str, Any],
    keys: Mapping[str, str],
    defaults: Mapping[str, Any] = {},
) -> dict[str, Any]:
    """Settings of a config.json under our names.

    Args:
      keys: our field -> key of config.json.
      defaults: by key of config.json, for those that a file may leave out.

    Raises:
      ValueError: a key is missing or its value has the wrong type; images or patches that
        are not square.
    """
    out: dict[str, Any] = {}
    for ours, theirs in keys.items():
        value = config.get(theirs, defaults.get(theirs))
        if value is None:
            raise ValueError(f"config.json lacks {theirs!r}")
        if ours in ("image_size", "patch") and isinstance(value, list | tuple):
            if len(set(value)) != 1:
                raise ValueError(f"config.json: {theirs} must be square, got {value}")
            value = value[0]
        wanted = {"act": str, "qkv_bias": bool, "gated": bool, "mask_token": bool}.get(ours)
        fits = isinstance(value, wanted) if wanted else _number(value)
        if not fits:
            kind = wanted.__name__ if wanted else "a number"
            raise ValueError(f"config.json: {theirs} must be {kind}, got {value!r}")
        out[ours] = value
    if "act" in out:
        out["act"] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(
            out["act"], out["act"]
        )
    return out


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def pixels(
    config: Mapping[str, Any],
    channels: int,
    mean: tuple[float, ...] = IMAGENET[0],
    std: tuple[float, ...] = IMAGENET[1],
) -> dict[str, Any]:
    """``image_mean`` and ``image_std``: the file's, or the family's where it gives none.

    Raises:
      ValueError: a value is not one number a channel.
    """
    out = {}
    for name, family in (("image_mean", mean), ("image_std", std)):
        given = config.get(name)
        if given is None:
            given = family if channels == len(family) else (sum(family) / len(family),) * channels
        if not isinstance(given, list | tuple) or not all(_number(v) for v in given):
            raise ValueError(f"config.json: {name} must be a list of numbers, got {given!r}")
        out[name] = tuple(float(v) for v in given)
    return out


def write_pixels(config: VisionConfig) -> dict[str, Any]:
    """The reverse of :func:`pixels`."""
    return {"image_mean": list(config.image_mean), "image_std": list(config.image_std)}


def write_values(config: Any, keys: Mapping[str, str]) -> dict[str, Any]:
    """The reverse of :func:`values`."""
    out = {theirs: getattr(config, ours) for ours, theirs in keys.items()}
    if "act" in keys:
        theirs = keys["act"]
        out[theirs] = {"gelu_tanh": "gelu_new"}.get(out[theirs], out[theirs])
    return out


def classifiers(architecture: str) -> dict[str, HeadNames]:
    """The two heads of an image family, which share a class."""
    names = HeadNames(architecture, dense("head/out", "classifier"))
    return {"classification": names, "regression": names}


def body(config: VisionConfig) -> list[Name]:
    """See ``Family.body``."""
    return [
        *embeddings(config),
        *norm("layers/attn_norm", f"{LAYER}.layernorm_before"),
        *attention(config),
        *norm("layers/ffn_norm", f"{LAYER}.layernorm_after"),
        *dense("layers/ffn/in", f"{LAYER}.intermediate.dense"),
        *dense("layers/ffn/out", f"{LAYER}.output.dense"),
        *norm("norm", "layernorm"),
        *(POOLER if config.pooler else []),
    ]


def read(config: Mapping[str, Any]) -> VisionConfig:
    """See ``Family.read``."""
    out = values(config, KEYS, {"qkv_bias": True, "num_channels": 3})
    if config.get("pooler_act", "tanh") != "tanh" or (
        config.get("pooler_output_size") not in (None, out["width"])
    ):
        raise ValueError("config.json: only a tanh pooler as wide as the model is supported")
    return VisionConfig("vit", **out, **pixels(config, out["channels"], MEAN, STD))


POOLER = dense("pooler/dense", "pooler.dense")
write: Callable[[VisionConfig], dict[str, Any]] = lambda config: {  # noqa: E731
    **write_values(config, KEYS),
    **write_pixels(config),
}

FAMILY = Family(
    name="vit",
    prefix="vit",
    base="ViTModel",
    body=body,
    pooler=POOLER,
    heads=classifiers("ViTForImageClassification"),
    read=read,
    write=write,
    ignored=("mask_token",),
)
