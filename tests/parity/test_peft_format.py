"""Adapters of the ``peft`` package: what it saves we read, what we save it reads, equal logits."""

import json

import jax
import numpy as np
import pytest

from steppe.models import pretrained
from steppe.models.overlays import adapter, ia3, lora, peft_format, prefix, prompt

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

IDS = np.random.default_rng(0).integers(1, 60, (4, 7))
SHAPES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
}
KINDS = {
    "lora": (
        peft.LoraConfig,
        {"r": 5, "lora_alpha": 7, "target_modules": ["query", "intermediate.dense"]},
        lora.overlay(rank=5, alpha=7.0, sites=("attn.q", "ffn.in")),
    ),
    "ia3": (
        peft.IA3Config,
        {
            "target_modules": ["key", "value", "layer.0.output.dense", "layer.1.output.dense"],
            "feedforward_modules": ["layer.0.output.dense", "layer.1.output.dense"],
        },
        ia3.overlay(),
    ),
    "prompt": (peft.PromptTuningConfig, {"num_virtual_tokens": 3}, prompt.overlay(length=3)),
    "prefix": (peft.PrefixTuningConfig, {"num_virtual_tokens": 3}, prefix.overlay(length=3)),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A classifier for LoRA and (IA)^3; a language model for prompts and prefixes."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(**SHAPES, num_labels=3)
    ).eval()
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SHAPES, num_key_value_heads=3, tie_word_embeddings=False)
    ).eval()
    for name, model in (("bert", bert), ("llama", llama)):
        model.save_pretrained(root / name)
    return root


def base_of(kind, bases):
    folder = bases / ("bert" if kind in ("lora", "ia3") else "llama")
    classes = {"bert": "AutoModelForSequenceClassification", "llama": "AutoModelForCausalLM"}
    model = getattr(transformers, classes[folder.name]).from_pretrained(folder).eval()
    return folder, model


def theirs(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.numpy()[:, -IDS.shape[1] :]


def ours(bound, params):
    return jax.jit(lambda p: bound.apply(p, {"input_ids": IDS}).logits)(params)


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves(kind, bases, tmp_path):
    folder, model = base_of(kind, bases)
    config, settings, _ = KINDS[kind]
    task = "SEQ_CLS" if folder.name == "bert" else "CAUSAL_LM"
    wrapped = peft.get_peft_model(model, config(task_type=task, **settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if any(mark in name for mark in ("lora_", "ia3_", "prompt_encoder")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = pretrained.load(folder)
    found = peft_format.load(tmp_path / "adapter", loaded.model)
    assert found.overlay.name == kind
    params = {"base": loaded.params, "overlay": found.delta}
    got = ours(found.overlay.bind(loaded.model), params)
    np.testing.assert_allclose(got, theirs(wrapped), atol=2e-5)
    assert np.abs(got - ours(loaded.model, loaded.params)).max() > 2e-5
    if kind in ("lora", "ia3"):  # its head was saved along, as peft does for classifiers
        assert {name.rsplit(".", 1)[-1] for name in found.other} == {"weight", "bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_save(kind, bases, tmp_path):
    folder, model = base_of(kind, bases)
    overlay = KINDS[kind][2]
    loaded = pretrained.load(folder)
    delta = overlay.init(jax.random.key(0), loaded.params)
    noise = np.random.default_rng(2)
    delta = jax.tree.map(
        lambda x: np.asarray(x + 0.3 * noise.normal(size=x.shape), np.float32), delta
    )
    saved = peft_format.save(tmp_path / "adapter", overlay, delta, loaded.model, base=str(folder))
    wrapped = peft.PeftModel.from_pretrained(model, saved).eval()
    got = ours(overlay.bind(loaded.model), {"base": loaded.params, "overlay": delta})
    np.testing.assert_allclose(got, theirs(wrapped), atol=2e-5)
    # And back.
    again = peft_format.load(saved, loaded.model)
    assert jax.tree.map(np.shape, again.delta) == jax.tree.map(np.shape, delta)
    for a, b in zip(jax.tree.leaves(again.delta), jax.tree.leaves(delta), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 if kind == "prefix" else 0)  # turned twice


def test_what_has_no_counterpart_is_named(bases, tmp_path):
    loaded = pretrained.load(bases / "bert")
    overlay = KINDS["lora"][2]
    delta = overlay.init(jax.random.key(0), loaded.params)
    saved = peft_format.save(tmp_path / "a", overlay, delta, loaded.model)
    config = json.loads((saved / "adapter_config.json").read_text())

    def change(**more):
        (saved / "adapter_config.json").write_text(json.dumps({**config, **more}))

    for more, said in (
        ({"use_dora": True}, "use_dora=True of the adapter has no counterpart"),
        ({"bias": "all"}, "bias='all'"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' has no counterpart; known: LORA, IA3"),
        ({"r": 4}, "differ|shape|has"),
    ):
        change(**more)
        with pytest.raises(ValueError, match=said):
            peft_format.load(saved, loaded.model)
    change()
    with pytest.raises(ValueError, match="no layer of this|lora_A for"):
        peft_format.load(saved, pretrained.load(bases / "llama").model)
    houlsby = adapter.overlay(kind="houlsby", width=4)
    with pytest.raises(ValueError, match="'adapter-houlsby' has no place in the adapter format"):
        peft_format.save(tmp_path / "b", houlsby, {}, loaded.model)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json"):
        peft_format.load(tmp_path / "nothing", loaded.model)
