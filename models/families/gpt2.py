"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, queries, keys and values in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steppe.models.decoder import DecoderConfig
from steppe.models.families import llama
from steppe.models.families.names import Family, HeadNames, Name, norm, table

LAYER = "h.{}"
NUMBERS = {
    "vocab_size": "vocab_size",
    "width": "n_embd",
    "layers": "n_layer",
    "heads": "n_head",
    "positions": "n_positions",
}


def linear(path: str, tensor: str, part: tuple[int, int] | None = None) -> list[Name]:
    """A linear map; these files hold it as (in, out)."""
    return [
        Name(f"{path}/kernel", f"{tensor}.weight", part=part),
        Name(f"{path}/bias", f"{tensor}.bias", part=part),
    ]


BODY = [
    *table("embed/word", "wte"),
    *table("embed/position", "wpe"),
    *norm("layers/attn_norm", f"{LAYER}.ln_1"),
    *linear("layers/attn/q", f"{LAYER}.attn.c_attn", (0, 3)),
    *linear("layers/attn/k", f"{LAYER}.attn.c_attn", (1, 3)),
    *linear("layers/attn/v", f"{LAYER}.attn.c_attn", (2, 3)),
    *linear("layers/attn/o", f"{LAYER}.attn.c_proj"),
    *norm("layers/ffn_norm", f"{LAYER}.ln_2"),
    *linear("layers/ffn/in", f"{LAYER}.mlp.c_fc"),
    *linear("layers/ffn/out", f"{LAYER}.mlp.c_proj"),
    *norm("norm", "ln_f"),
]


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """See ``Family.read``."""
    for key, plain in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if config.get(key, plain) is not plain:
            raise ValueError(f"config.json: {key}={config[key]!r} is not supported")
    out: dict[str, Any] = {
        ours: int(llama.number(config, theirs)) for ours, theirs in NUMBERS.items()
    }
    act = config.get("activation_function", "gelu_new")
    drop = float(llama.number(config, "resid_pdrop", 0.1))
    if float(llama.number(config, "embd_pdrop", drop)) != drop:
        raise ValueError(
            "config.json: embd_pdrop and resid_pdrop differ; one rate serves both here, so "
            "change one of them"
        )
    return DecoderConfig(
        "gpt2",
        **out,
        ffn_width=int(config.get("n_inner") or 4 * out["width"]),
        norm="layer",
        epsilon=float(llama.number(config, "layer_norm_epsilon", 1e-5)),
        act={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(act, act),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        rotary=None,
        tied=bool(config.get("tie_word_embeddings", True)),
        drop=drop,
        attn_drop=float(llama.number(config, "attn_pdrop", 0.1)),
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """See ``Family.write``."""
    return {
        **{theirs: getattr(config, ours) for ours, theirs in NUMBERS.items()},
        "n_inner": config.ffn_width,
        "layer_norm_epsilon": config.epsilon,
        "activation_function": {"gelu_tanh": "gelu_new"}.get(config.act, config.act),
        "resid_pdrop": config.drop,
        "embd_pdrop": config.drop,
        "attn_pdrop": config.attn_drop,
        "tie_word_embeddings": config.tied,
    }


FAMILY = Family(
    name="gpt2",
    prefix="transformer",
    base="GPT2Model",
    body=lambda config: list(BODY),
    heads={**llama.heads("GPT2"), "lm": HeadNames("GPT2LMHeadModel", llama.lm)},
    read=read,
    write=write,
    ignored=("attn.bias", "attn.masked_bias"),
)
