"""MPNet (Song et al. 2020, arXiv 2004.09297): one relative-position bias for all layers."""

from collections.abc import Mapping
from typing import Any

from steppe.models.encoder import EncoderConfig
from steppe.models.families import bert
from steppe.models.families.names import (
    Family,
    Name,
    dense,
    heads,
    norm,
    read_common,
    table,
    write_common,
)

KEYS = {
    **{ours: theirs for ours, theirs in bert.KEYS.items() if ours != "types"},
    "relative_buckets": "relative_attention_num_buckets",
}
LAYER = "encoder.layer.{}"
BODY = [
    *table("embed/word", "embeddings.word_embeddings"),
    *table("embed/position", "embeddings.position_embeddings"),
    *norm("embed/norm", "embeddings.LayerNorm"),
    *table("relative", "encoder.relative_attention_bias"),
    *dense("layers/attn/q", f"{LAYER}.attention.attn.q"),
    *dense("layers/attn/k", f"{LAYER}.attention.attn.k"),
    *dense("layers/attn/v", f"{LAYER}.attention.attn.v"),
    *dense("layers/attn/o", f"{LAYER}.attention.attn.o"),
    *norm("layers/attn_norm", f"{LAYER}.attention.LayerNorm"),
    *dense("layers/ffn/in", f"{LAYER}.intermediate.dense"),
    *dense("layers/ffn/out", f"{LAYER}.output.dense"),
    *norm("layers/ffn_norm", f"{LAYER}.output.LayerNorm"),
]
SEQUENCE = [*dense("head/dense", "classifier.dense"), *dense("head/out", "classifier.out_proj")]
MLM = [
    *dense("head/dense", "lm_head.dense"),
    *norm("head/norm", "lm_head.layer_norm"),
    Name("head/bias", "lm_head.bias"),
]


def read(config: Mapping[str, Any]) -> EncoderConfig:
    """See ``Family.read``."""
    config = {"pad_token_id": 1, **config}
    return read_common(config, KEYS, family="mpnet", position_offset=config["pad_token_id"] + 1)


FAMILY = Family(
    name="mpnet",
    prefix="mpnet",
    base="MPNetModel",
    body=BODY,
    pooler=bert.POOLER,
    heads=heads("MPNet", SEQUENCE, MLM, sequence_transform="tanh"),
    read=read,
    write=lambda config: write_common(config, KEYS),
    ignored=("position_ids", "lm_head.decoder.weight", "lm_head.decoder.bias"),
)
