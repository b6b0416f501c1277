"""DistilBERT (Sanh et al. 2019, arXiv 1910.01108): BERT without token types and pooler."""

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
    "width": "dim",
    "layers": "n_layers",
    "heads": "n_heads",
    "ffn_width": "hidden_dim",
    "positions": "max_position_embeddings",
    "act": "activation",
    "drop": "dropout",
    "attn_drop": "attention_dropout",
    "pad_id": "pad_token_id",
}
LAYER = "transformer.layer.{}"
BODY = [
    *table("embed/word", "embeddings.word_embeddings"),
    *table("embed/position", "embeddings.position_embeddings"),
    *norm("embed/norm", "embeddings.LayerNorm"),
    *dense("layers/attn/q", f"{LAYER}.attention.q_lin"),
    *dense("layers/attn/k", f"{LAYER}.attention.k_lin"),
    *dense("layers/attn/v", f"{LAYER}.attention.v_lin"),
    *dense("layers/attn/o", f"{LAYER}.attention.out_lin"),
    *norm("layers/attn_norm", f"{LAYER}.sa_layer_norm"),
    *dense("layers/ffn/in", f"{LAYER}.ffn.lin1"),
    *dense("layers/ffn/out", f"{LAYER}.ffn.lin2"),
    *norm("layers/ffn_norm", f"{LAYER}.output_layer_norm"),
]
SEQUENCE = [*dense("head/dense", "pre_classifier"), *dense("head/out", "classifier")]
MLM = [
    *dense("head/dense", "vocab_transform"),
    *norm("head/norm", "vocab_layer_norm"),
    Name("head/bias", "vocab_projector.bias"),
]

FAMILY = Family(
    name="distilbert",
    prefix="distilbert",
    base="DistilBertModel",
    body=BODY,
    heads=heads("DistilBert", SEQUENCE, MLM, sequence_transform="relu"),
    # The published class has no setting for the norms; 1e-12 is written into it.
    read=lambda config: read_common(
        {"pad_token_id": 0, **config}, KEYS, family="distilbert", epsilon=1e-12
    ),
    write=lambda config: write_common(config, KEYS),
    ignored=("position_ids", "vocab_projector.weight"),
)
