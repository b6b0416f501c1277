"""RoBERTa (Liu et al. 2019, arXiv 1907.11692): BERT's body, positions from pad id + 1."""

from collections.abc import Mapping
from typing import Any

from steppe.models.encoder import EncoderConfig
from steppe.models.families import bert
from steppe.models.families.names import Family, Name, dense, heads, norm, read_common, write_common

SEQUENCE = [*dense("head/dense", "classifier.dense"), *dense("head/out", "classifier.out_proj")]
MLM = [
    *dense("head/dense", "lm_head.dense"),
    *norm("head/norm", "lm_head.layer_norm"),
    Name("head/bias", "lm_head.bias"),
]


def read(config: Mapping[str, Any]) -> EncoderConfig:
    """See ``Family.read``."""
    config = {"pad_token_id": 1, **config}
    return read_common(
        config, bert.KEYS, family="roberta", position_offset=config["pad_token_id"] + 1
    )


FAMILY = Family(
    name="roberta",
    prefix="roberta",
    base="RobertaModel",
    body=bert.BODY,
    pooler=bert.POOLER,
    heads=heads("Roberta", SEQUENCE, MLM, sequence_transform="tanh"),
    read=read,
    write=lambda config: write_common(config, bert.KEYS),
    ignored=("position_ids", "token_type_ids", "lm_head.decoder.weight", "lm_head.decoder.bias"),
)
