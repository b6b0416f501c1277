"""Every encoder family against PyTorch: tiny random configs, logits, gradients, both ways."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import pretrained, tree

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

B, T, V, C = 3, 11, 97, 3
COMMON = {"vocab_size": V, "num_labels": C}
SHAPES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
}
CONFIGS = {
    "bert": ("Bert", {**SHAPES, "type_vocab_size": 2}),
    "roberta": ("Roberta", {**SHAPES, "type_vocab_size": 1, "pad_token_id": 1}),
    "distilbert": (
        "DistilBert",
        {
            "dim": 32,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 24,
        },
    ),
    "mpnet": ("MPNet", {**SHAPES, "pad_token_id": 1}),
}
HEADS = {
    None: "Model",
    "classification": "ForSequenceClassification",
    "regression": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "span": "ForQuestionAnswering",
    "mlm": "ForMaskedLM",
}


def torch_model(family: str, head: str | None):
    prefix, settings = CONFIGS[family]
    settings = {**COMMON, **settings}
    if head == "regression":
        settings["num_labels"] = 1
    elif head == "span":
        settings["num_labels"] = 2
    config = getattr(transformers, f"{prefix}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, prefix + HEADS[head])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing at its neutral initial value
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@functools.cache
def pair(family: str, head: str | None, directory: str):
    reference = torch_model(family, head)
    reference.save_pretrained(directory)
    return reference, pretrained.load(directory)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return lambda family, head: pair(family, head, str(folder / f"{family}-{head}"))


def inputs(family: str, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    pad = 0 if family in ("bert", "distilbert") else 1
    ids = rng.integers(5, V, (B, T))
    mask = np.ones((B, T), int)
    mask[1, 7:] = 0
    mask[2, 3:] = 0
    batch = {"input_ids": np.where(mask, ids, pad), "attention_mask": mask}
    if family == "bert":
        batch["token_type_ids"] = rng.integers(0, 2, (B, T))
    return batch


def torch_forward(model, batch):
    out = model(**{k: torch.tensor(v) for k, v in batch.items()})
    if hasattr(out, "start_logits"):
        return torch.stack([out.start_logits, out.end_logits], -1)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def real(logits: np.ndarray, batch) -> np.ndarray:
    """Zero at padding, where nobody reads and implementations may differ."""
    if logits.ndim < 3:
        return logits
    return logits * batch["attention_mask"][..., None]


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_logits(models, family, head):
    reference, loaded = models(family, head)
    assert not loaded.fresh
    batch = inputs(family)
    with torch.no_grad():
        expected = torch_forward(reference, batch).numpy()
    out = jax.jit(loaded.model.apply)(loaded.params, batch)
    ours = np.asarray(out.hidden if head is None else out.logits)
    if head == "regression":
        expected = expected[:, 0]
    np.testing.assert_allclose(real(ours, batch), real(expected, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients(models, family):
    reference, loaded = models(family, "classification")
    batch, labels = inputs(family), np.array([0, 2, 1])
    reference.zero_grad()
    logits = torch_forward(reference, batch)
    torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()

    def loss(params):
        log_p = jax.nn.log_softmax(loaded.model.apply(params, batch).logits)
        return -log_p[jnp.arange(B), labels].mean()

    ours = tree.flatten(jax.jit(jax.grad(loss))(loaded.params))
    names = {n.path: n for n in pretrained.family_of(family).names(loaded.model.config)}
    theirs = dict(reference.named_parameters())
    for path, gradient in ours.items():
        name = names[path]
        parts = [theirs[t].grad.numpy() for t in name.tensors((3,))]
        parts = [p.T if name.transposed else p for p in parts]
        expected = np.stack(parts) if "{}" in name.tensor else parts[0]
        np.testing.assert_allclose(gradient, expected, atol=1e-4, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize("family", CONFIGS)
def test_all_hidden_states_and_full_masks(models, family):
    """Hidden states of every layer; an arbitrary [B, T, S] mask; embeddings as input."""
    reference, loaded = models(family, None)
    batch = inputs(family)
    with torch.no_grad():
        out = reference(**{k: torch.tensor(v) for k, v in batch.items()}, output_hidden_states=True)
    ours = loaded.model.apply(loaded.params, batch, all_hidden=True).hidden
    assert ours.shape == (4, B, T, 32)
    for layer, (a, b) in enumerate(zip(ours, out.hidden_states, strict=True)):
        np.testing.assert_allclose(
            real(np.asarray(a), batch),
            real(b.numpy(), batch),
            atol=1e-5,
            rtol=1e-5,
            err_msg=f"layer {layer}",
        )
    causal = np.tril(np.ones((T, T), int))[None] * batch["attention_mask"][:, None, :]
    additive = torch.tensor((1.0 - causal[:, None]) * np.finfo(np.float32).min).float()
    with torch.no_grad():
        expected = reference(
            **{k: torch.tensor(v) for k, v in batch.items() if k != "attention_mask"},
            attention_mask=additive,
        ).last_hidden_state.numpy()
    full = {**batch, "attention_mask": causal}
    got = np.asarray(loaded.model.apply(loaded.params, full).hidden)
    np.testing.assert_allclose(real(got, batch), real(expected, batch), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_saved_opens_in_transformers(models, family, head, tmp_path):
    _, loaded = models(family, head)
    config = loaded.model.config
    params = loaded.model.init(jax.random.key(7))
    pretrained.save(tmp_path / "out", loaded.model, params)
    prefix, _ = CONFIGS[family]
    opened, info = getattr(transformers, prefix + HEADS[head]).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    missing = [k for k in info["missing_keys"] if "pooler" not in k]
    assert not missing
    assert not info["unexpected_keys"]
    batch = inputs(family, 1)
    with torch.no_grad():
        expected = torch_forward(opened.eval(), batch).numpy()
    out = jax.jit(loaded.model.apply)(params, batch)
    ours = np.asarray(out.hidden if head is None else out.logits)
    expected = expected[:, 0] if head == "regression" else expected
    np.testing.assert_allclose(real(ours, batch), real(expected, batch), atol=1e-5, rtol=1e-5)
    again = pretrained.load(tmp_path / "out")
    assert again.model.config == dataclasses.replace(config, head=again.model.config.head)
    assert again.model.config.head == config.head
    tree.same_structure(params, again.params, ("saved", "loaded"))
    loaded_again = tree.flatten(again.params)
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(leaf, loaded_again[path], err_msg=path)
