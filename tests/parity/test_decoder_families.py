"""Every decoder family against PyTorch: tiny random configs, logits, gradients, both ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import pretrained, tree

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

B, T, V = 3, 13, 97
SHAPES = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# name -> (prefix of the classes, settings)
CONFIGS = {
    "llama": ("Llama", SHAPES),
    "llama tied, biases": (
        "Llama",
        {**SHAPES, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama base 5e5": ("Llama", {**SHAPES, "rope_theta": 5e5}),
    "llama linear": ("Llama", {**SHAPES, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama llama3": ("Llama", {**SHAPES, "head_dim": 16, "rope_scaling": LLAMA3}),
    "llama yarn": ("Llama", {**SHAPES, "head_dim": 16, "rope_scaling": YARN}),
    "qwen2": ("Qwen2", {**SHAPES, "tie_word_embeddings": True}),
    "qwen2 window": (
        "Qwen2",
        {**SHAPES, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "mistral": ("Mistral", {**SHAPES, "sliding_window": 4, "num_key_value_heads": 1}),
    "gemma3": (
        "Gemma3",
        {
            **SHAPES,
            "head_dim": 16,
            "sliding_window": 4,
            "query_pre_attn_scalar": 20,
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": V,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "pad_token_id": 0,
            "num_labels": 3,
        },
    ),
}


def torch_class(prefix: str, head: str | None):
    name = {
        "lm": "GPT2LMHeadModel" if prefix == "GPT2" else f"{prefix}ForCausalLM",
        "classification": ("Gemma3Text" if prefix == "Gemma3" else prefix)
        + "ForSequenceClassification",
        None: "Gemma3TextModel" if prefix == "Gemma3" else f"{prefix}Model",
    }[head]
    return getattr(transformers, name)


def torch_model(family: str, head: str | None):
    prefix, settings = CONFIGS[family]
    name = "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    config = getattr(transformers, name)(**settings, attn_implementation="eager")
    torch.manual_seed(0)
    model = torch_class(prefix, head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing at its neutral initial value
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@functools.cache
def pair(family: str, head: str | None, directory: str):
    reference = torch_model(family, head)
    reference.save_pretrained(directory)
    return reference, pretrained.load(directory, drop=0.0, attn_drop=0.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoders")
    return lambda family, head: pair(family, head, str(folder / f"{family}-{head}"))


def inputs(left: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = np.ones((B, T), int)
    for row, pad in enumerate((0, 4, 9)):
        where = slice(0, pad) if left else slice(T - pad, T)
        mask[row, where] = 0
    return {"input_ids": rng.integers(5, V, (B, T)) * mask, "attention_mask": mask}


def torch_forward(model, batch):
    positions = np.maximum(batch["attention_mask"].cumsum(1) - 1, 0)
    out = model(**{k: torch.tensor(v) for k, v in {**batch, "position_ids": positions}.items()})
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def real(logits, batch) -> np.ndarray:
    """Zero at padding, where nobody reads and implementations may differ."""
    logits = np.asarray(logits)
    return logits if logits.ndim < 3 else logits * batch["attention_mask"][..., None]


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits(models, family, left):
    reference, loaded = models(family, "lm")
    assert not loaded.fresh
    assert not loaded.unused
    batch = inputs(left)
    with torch.no_grad():
        expected = torch_forward(reference, batch).numpy()
    ours = jax.jit(loaded.model.apply)(loaded.params, batch).logits
    np.testing.assert_allclose(real(ours, batch), real(expected, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients(models, family):
    reference, loaded = models(family, "lm")
    batch = inputs()
    weight = np.random.default_rng(1).normal(size=(B, T, V)).astype(np.float32)
    weight = weight * batch["attention_mask"][..., None] / 50
    reference.zero_grad()
    (torch_forward(reference, batch) * torch.tensor(weight)).sum().backward()

    def loss(params):
        return (loaded.model.apply(params, batch).logits * weight).sum()

    ours = tree.flatten(jax.jit(jax.grad(loss))(loaded.params))
    names = {n.path: n for n in pretrained.family_of(loaded.model.config.family).names(
        loaded.model.config)}  # fmt: skip
    theirs = dict(reference.named_parameters())
    for path, gradient in ours.items():
        name = names[path]
        parts = [theirs[t].grad.numpy() for t in name.tensors((3,))]
        if name.part is not None:
            parts = [np.split(p, name.part[1], axis=-1)[name.part[0]] for p in parts]
        parts = [p.T if name.transposed else p for p in parts]
        expected = np.stack(parts) if name.stacked else parts[0]
        np.testing.assert_allclose(gradient, expected, atol=1e-4, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "gemma3", "gpt2"])
def test_hidden_states_of_all_layers(models, family):
    reference, loaded = models(family, None)
    batch = inputs()
    positions = np.maximum(batch["attention_mask"].cumsum(1) - 1, 0)
    with torch.no_grad():
        out = reference(
            **{k: torch.tensor(v) for k, v in {**batch, "position_ids": positions}.items()},
            output_hidden_states=True,
        )
    ours = loaded.model.apply(loaded.params, batch, all_hidden=True).hidden
    for a, b in zip(ours, out.hidden_states, strict=True):
        np.testing.assert_allclose(real(a, batch), real(b, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_classification_reads_the_last_real_token(models, family):
    reference, loaded = models(family, "classification")
    for left in (True, False):
        batch = inputs(left)
        with torch.no_grad():
            expected = torch_forward(reference, batch).numpy()
        ours = jax.jit(loaded.model.apply)(loaded.params, batch).logits
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", ["lm", "classification"])
@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_saved_opens_in_transformers(models, family, head, tmp_path):
    if head == "classification" and family not in ("llama", "gpt2", "mistral", "qwen2"):
        pytest.skip("the same tensors as in another row")
    _, loaded = models(family, head)
    params = loaded.model.init(jax.random.key(7))
    pretrained.save(tmp_path / "out", loaded.model, params)
    opened, info = torch_class(CONFIGS[family][0], head).from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    opened.config.pad_token_id = 0
    batch = inputs(seed=1)
    with torch.no_grad():
        expected = torch_forward(opened.eval(), batch).numpy()
    ours = jax.jit(loaded.model.apply)(params, batch).logits
    np.testing.assert_allclose(real(ours, batch), real(expected, batch), atol=1e-5, rtol=1e-5)
    again = pretrained.load(tmp_path / "out", drop=0.0, attn_drop=0.0)
    assert again.model.config == loaded.model.config
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_greedy_text_is_that_of_transformers(models, family):
    reference, loaded = models(family, "lm")
    batch, more = inputs(), 12
    with torch.no_grad():
        expected = reference.generate(
            **{k: torch.tensor(v) for k, v in batch.items()},
            max_new_tokens=more,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        ).numpy()[:, T:]
    logits, state = jax.jit(loaded.model.decode.start, static_argnums=2)(loaded.params, batch, more)
    step = jax.jit(loaded.model.decode.step)
    tokens = [jnp.argmax(logits, -1)]
    for _ in range(more - 1):
        logits, state = step(loaded.params, tokens[-1], state)
        tokens.append(jnp.argmax(logits, -1))
    np.testing.assert_array_equal(np.stack(tokens, 1), expected)
