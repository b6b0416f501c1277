"""LoRA against the ``peft`` package: the same random weights give the same logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import pretrained
from steppe.models.overlays import lora

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # peft with transformers 5
]

MODULES = {"attn.q": "query", "attn.v": "value", "ffn.in": "intermediate.dense"}


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_logits_and_merge(tmp_path, rank_stabilised):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=16,
        num_labels=3,
    )
    base = transformers.BertForSequenceClassification(config).eval()
    base.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=5, lora_alpha=7, target_modules=list(MODULES.values()), use_rslora=rank_stabilised
    )
    wrapped = peft.get_peft_model(base, settings).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))

    ours = lora.overlay(rank=5, alpha=7, sites=tuple(MODULES), rank_stabilised=rank_stabilised)
    state = dict(wrapped.named_parameters())

    def stacked(site, letter):
        where = "attention.self." if site.startswith("attn") else ""
        name = f"base_model.model.bert.encoder.layer.{{}}.{where}{MODULES[site]}.lora_{letter}"
        return jnp.stack(
            [state[f"{name.format(i)}.default.weight"].detach().numpy().T for i in range(2)]
        )

    delta = {"layers": {s: {"a": stacked(s, "A"), "b": stacked(s, "B")} for s in MODULES}}
    loaded = pretrained.load(tmp_path / "base")
    params = {"base": loaded.params, "overlay": delta}
    ids = np.random.default_rng(0).integers(1, 60, (4, 10))
    batch = {"input_ids": ids}
    with torch.no_grad():
        expected = wrapped(input_ids=torch.tensor(ids)).logits.numpy()
    bound = ours.bind(loaded.model)
    np.testing.assert_allclose(
        jax.jit(lambda p: bound.apply(p, batch).logits)(params), expected, atol=1e-5
    )
    merged = wrapped.merge_and_unload()
    with torch.no_grad():
        expected = merged(input_ids=torch.tensor(ids)).logits.numpy()
    report = ours.merged(loaded.model, params, batch)
    assert report.largest_difference < 1e-5
    np.testing.assert_allclose(loaded.model.apply(report.params, batch).logits, expected, atol=1e-5)
