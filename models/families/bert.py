"""BERT (Devlin et al. 2019, arXiv 1810.04805) and the MiniLM models in its format."""

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
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn_width": "intermediate_size",
    "positions": "max_position_embeddings",
    "types": "type_vocab_size",
    "act": "hidden_act",
    "epsilon": "layer_norm_eps",
    "drop": "hidden_dropout_prob",
    "attn_drop": "attention_probs_dropout_prob",
    "pad_id": "pad_token_id",
}
LAYER = "encoder.layer.{}"
BODY = [
    *table("embed/word", "embeddings.word_embeddings"),
    *table("embed/position", "embeddings.position_embeddings"),
    *table("embed/type", "embeddings.token_type_embeddings"),
    *norm("embed/norm", "embeddings.LayerNorm"),
    *dense("layers/attn/q", f"{LAYER}.attention.self.query"),
    *dense("layers/attn/k", f"{LAYER}.attention.self.key"),
    *dense("layers/attn/v", f"{LAYER}.attention.self.value"),
    *dense("layers/attn/o", f"{LAYER}.attention.output.dense"),
    *norm("layers/attn_norm", f"{LAYER}.attention.output.LayerNorm"),
    *dense("layers/ffn/in", f"{LAYER}.intermediate.dense"),
    *dense("layers/ffn/out", f"{LAYER}.output.dense"),
    *norm("layers/ffn_norm", f"{LAYER}.output.LayerNorm"),
]
POOLER = dense("pooler/dense", "pooler.dense")
MLM = [
    *dense("head/dense", "cls.predictions.transform.dense"),
    *norm("head/norm", "cls.predictions.transform.LayerNorm"),
    Name("head/bias", "cls.predictions.bias"),
]

FAMILY = Family(
    name="bert",
    prefix="bert",
    base="BertModel",
    body=BODY,
    pooler=POOLER,
    pooled=True,
    heads=heads("Bert", dense("head/out", "classifier"), MLM),
    read=lambda config: read_common({"pad_token_id": 0, **config}, KEYS, family="bert"),
    write=lambda config: write_common(config, KEYS),
    ignored=("position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
)
