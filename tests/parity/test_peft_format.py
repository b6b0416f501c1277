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


def test_a_head_of_two_layers_is_a_head(tmp_path):
    """peft finds what it saves by the ends of names: ``pre_classifier`` of ``classifier`` too."""
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=60, dim=24, n_layers=2, n_heads=3, hidden_dim=40, max_position_embeddings=16
    )
    base = transformers.DistilBertForSequenceClassification(config)
    base.save_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(r=2, target_modules=["q_lin"], task_type="SEQ_CLS")
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    loaded = pretrained.load(tmp_path / "base")
    found = peft_format.load(tmp_path / "adapter", loaded.model)
    assert sorted({name.split(".")[-2] for name in found.other}) == ["classifier", "pre_classifier"]
    assert set(found.delta["layers"]) == {"attn.q"}


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    config = transformers.T5Config(
        vocab_size=60, d_model=24, d_kv=8, num_heads=3, num_layers=2, num_decoder_layers=2,
        d_ff=40, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def translated(model):
    """peft's logits of targets that are not shifted, with two sources that are padded."""
    given = {n: torch.tensor(x) for n, x in PAIRS.items()}
    with torch.no_grad():
        return model(**given).logits.numpy()


PAIRS = {
    "input_ids": IDS,
    "attention_mask": (np.arange(7) < np.array([7, 7, 4, 2])[:, None]).astype(int),
    "decoder_input_ids": IDS[:, :5],
}


@pytest.mark.parametrize("submodules", [None, 1, 2])
def test_a_prompt_of_an_encoder_decoder(submodules, t5, tmp_path):
    """peft makes n rows for either stack and reads the first n, in front of the encoder's text."""
    base = transformers.AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, num_transformer_submodules=submodules
    )
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(base, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = pretrained.load(t5)
    found = peft_format.load(tmp_path / "adapter", loaded.model)
    assert found.delta["prompt"].shape == (3, 24)
    bound = found.overlay.bind(loaded.model)
    params = {"base": loaded.params, "overlay": found.delta}
    got = jax.jit(bound.apply)(params, PAIRS).logits
    np.testing.assert_allclose(got, translated(wrapped), atol=2e-5)
    plain = jax.jit(loaded.model.apply)(loaded.params, PAIRS).logits
    assert np.abs(got - plain).max() > 1e-2
    # And back.
    saved = peft_format.save(tmp_path / "own", found.overlay, found.delta, loaded.model)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    again = peft.PeftModel.from_pretrained(again, saved).eval()
    assert isinstance(again, peft.PeftModelForSeq2SeqLM)
    np.testing.assert_allclose(translated(again), got, atol=2e-5)


def test_rows_of_a_prompt_that_are_not_counted(bases, t5, tmp_path):
    rows = {"prompt_embeddings": np.zeros((6, 24), np.float32)}
    about = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    models = {n: pretrained.load(f).model for n, f in (("llama", bases / "llama"), ("t5", t5))}
    for name, more, said in (
        ("llama", {}, r"prompt_embeddings is \(6, 24\); num_virtual_tokens=3 needs 3 rows"),
        ("llama", {"num_transformer_submodules": 2}, "num_transformer_submodules=2 .* has 1"),
        ("t5", {"num_virtual_tokens": 2, "task_type": "SEQ_2_SEQ_LM"}, "=2 needs 4 rows"),
        ("t5", {"num_virtual_tokens": None}, "num_virtual_tokens=None .* must be a whole number"),
        ("t5", {"peft_type": "PREFIX_TUNING"}, "a prefix of an encoder-decoder"),
    ):
        folder = written(tmp_path, {**about, **more}, rows)
        with pytest.raises(ValueError, match=said):
            peft_format.load(folder, models[name])


def written(folder, config, tensors):
    from safetensors.numpy import save_file

    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


INITS = {
    **dict.fromkeys((True, False, "gaussian", "eva", "orthogonal", "mica"), True),
    **dict.fromkeys(("pissa", "pissa_niter_4", "olora"), False),
}


@pytest.mark.parametrize("init", INITS)
def test_initial_values_that_change_the_base(init, bases, tmp_path):
    """A file whose reload in peft changes the base is refused; any other is what it is there."""
    folder, model = base_of("lora", bases)
    task = {"r": 4, "lora_alpha": 7, "target_modules": ["query", "intermediate.dense"]}
    config = peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=init, **task)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path)
    loaded = pretrained.load(folder)
    if not INITS[init]:
        with pytest.raises(ValueError, match=f"init_lora_weights='{init}' .* has no counterpart"):
            peft_format.load(tmp_path, loaded.model)
        return
    again = peft.PeftModel.from_pretrained(base_of("lora", bases)[1], tmp_path).eval()
    found = peft_format.load(tmp_path, loaded.model)
    params = {"base": loaded.params, "overlay": found.delta}
    np.testing.assert_allclose(
        ours(found.overlay.bind(loaded.model), params), theirs(again), atol=2e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_the_installed_version_is_known(kind):
    config = KINDS[kind][0](**KINDS[kind][1]).to_dict()
    method = config["peft_type"].value
    known = f"{peft_format.COMMON} {peft_format.KEYS[method]}".split()
    assert set(config) == {*known, *peft_format.NEUTRAL.get(method, ())}
    assert not set(known) & set(peft_format.NEUTRAL.get(method, ()))


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
        ({"alora_invocation_tokens": [3, 4]}, r"alora_invocation_tokens=\[3, 4\]"),
        ({"use_qalora": True}, "use_qalora=True of the adapter has no counterpart"),
        ({"use_rslora": "yes"}, "use_rslora='yes' of the adapter has no counterpart"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"use_tomorrow": {"a": 1}}, r"use_tomorrow={'a': 1} .* setting of LORA .* not known"),
        ({"r": None}, "r=None of the adapter must be a whole number >= 1"),
        ({"r": 2.5}, "r=2.5 of the adapter must be a whole number"),
        ({"lora_alpha": "much"}, "lora_alpha='much' of the adapter must be a number"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' has no counterpart; known: LORA, IA3"),
        ({"r": 4}, "differ|shape|has"),
    ):
        change(**more)
        with pytest.raises(ValueError, match=said):
            peft_format.load(saved, loaded.model)
    change(use_tomorrow=False, tomorrow_config=None, tomorrow_names=[])
    peft_format.load(saved, loaded.model)
    (saved / "adapter_config.json").write_text(
        json.dumps({n: v for n, v in config.items() if n != "r"})
    )
    with pytest.raises(ValueError, match="r=None of the adapter must be a whole number >= 1"):
        peft_format.load(saved, loaded.model)
    change()
    with pytest.raises(ValueError, match="no layer of this|lora_A for"):
        peft_format.load(saved, pretrained.load(bases / "llama").model)
    houlsby = adapter.overlay(kind="houlsby", width=4)
    with pytest.raises(ValueError, match="'adapter-houlsby' has no place in the adapter format"):
        peft_format.save(tmp_path / "b", houlsby, {}, loaded.model)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json"):
        peft_format.load(tmp_path / "nothing", loaded.model)
