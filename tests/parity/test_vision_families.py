"""Vision families and CLIP against PyTorch: tiny random configs, outputs, gradients, both ways."""

import dataclasses
import functools
import json
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import clip, pretrained, tree
from steppe.models.clip_text import ending
from steppe.models.heads import HeadConfig
from steppe.models.vision import VisionConfig, pooled

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 4,
}
TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 60,
    "max_position_embeddings": 12,
    "bos_token_id": 57,
    "eos_token_id": 58,
    "projection_dim": 16,
}
CLIP_IMAGE = {**IMAGE, "intermediate_size": 48, "projection_dim": 16}
SMALL, CLASSES = {**IMAGE, "num_labels": 5}, 5
# name -> (configuration class, its settings, model class)
MODELS = {
    "vit": ("ViTConfig", {**SMALL, "intermediate_size": 48}, "ViTModel"),
    "vit head": (
        "ViTConfig",
        {**SMALL, "intermediate_size": 48, "qkv_bias": False},
        "ViTForImageClassification",
    ),
    "vit regression": (
        "ViTConfig",
        {**SMALL, "intermediate_size": 48, "num_labels": 1},
        "ViTForImageClassification",
    ),
    "dinov2": ("Dinov2Config", SMALL, "Dinov2Model"),
    "dinov2 swiglu": ("Dinov2Config", {**SMALL, "use_swiglu_ffn": True}, "Dinov2Model"),
    "dinov2 head": ("Dinov2Config", SMALL, "Dinov2ForImageClassification"),
    "dinov2 registers": (
        "Dinov2WithRegistersConfig",
        {**SMALL, "num_register_tokens": 2},
        "Dinov2WithRegistersForImageClassification",
    ),
    "clip image": ("CLIPVisionConfig", CLIP_IMAGE, "CLIPVisionModel"),
    "clip image projected": ("CLIPVisionConfig", CLIP_IMAGE, "CLIPVisionModelWithProjection"),
    "clip text": ("CLIPTextConfig", TEXT, "CLIPTextModel"),
    "clip text legacy": ("CLIPTextConfig", {**TEXT, "eos_token_id": 2}, "CLIPTextModel"),
    "clip text projected": ("CLIPTextConfig", TEXT, "CLIPTextModelWithProjection"),
    "clip": (
        "CLIPConfig",
        {"text_config": TEXT, "vision_config": CLIP_IMAGE, "projection_dim": 16},
        "CLIPModel",
    ),
}
SIZES = [(24, 24), (16, 36)]  # of 6 x 6 patches, as the positions; of 4 x 9
ON_IMAGES = [name for name in MODELS if "text" not in name]


@functools.cache
def pair(name: str, directory: str):
    config, settings, model = MODELS[name]
    torch.manual_seed(0)
    reference = getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # nothing at its neutral initial value
            parameter.add_(0.1 * torch.randn_like(parameter))
    reference.save_pretrained(directory)
    return reference, pretrained.load(directory)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return lambda name: pair(name, str(folder / name.replace(" ", "-")))


def inputs(name: str, size=(24, 24)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    batch = {}
    if "text" not in name:
        batch["pixel_values"] = rng.normal(size=(2, *size, 3)).astype(np.float32)
    if name == "clip" or "text" in name:
        ids = rng.integers(3, 57, (3, 9))
        ids[:, 0] = 57
        mask = np.ones((3, 9), int)
        for row, end in enumerate((8, 5, 2)):
            ids[row, end:] = 58
            mask[row, end + 1 :] = 0
        batch |= {"input_ids": ids, "attention_mask": mask}
    return batch


def forward(reference, name: str, batch):
    """The reference's outputs; its images are [B, C, H, W]."""
    more = {n: torch.tensor(v) for n, v in batch.items() if n != "pixel_values"}
    if "pixel_values" in batch:
        more["pixel_values"] = torch.tensor(batch["pixel_values"].transpose(0, 3, 1, 2).copy())
        if "dinov2" not in name:
            more["interpolate_pos_encoding"] = True
    return reference(**more)


def answer(name: str, out) -> "torch.Tensor":
    """What our logits are, or the hidden states of a model without any."""
    for field in ("logits", "logits_per_image", "image_embeds", "text_embeds"):
        if getattr(out, field, None) is not None:
            value = getattr(out, field)
            return value[:, 0] if "regression" in name else value
    return out.last_hidden_state


def ours(loaded, out):
    return out.hidden if out.logits is None else out.logits


def expected(reference, name: str, batch) -> np.ndarray:
    with torch.no_grad():
        out = forward(reference, name, batch)
        value = answer(name, out)
        if name == "clip image":  # the norm is applied to the class token only there
            value = reference.post_layernorm(value)
    return value.numpy()


@pytest.mark.parametrize("name", MODELS)
def test_outputs(models, name):
    """Also at sizes that the positions were not learnt on."""
    reference, loaded = models(name)
    assert loaded.fresh == ()
    assert loaded.unused == ()
    apply = jax.jit(loaded.model.apply)
    for size in SIZES if name in ON_IMAGES else SIZES[:1]:
        batch = inputs(name, size)
        got = np.asarray(ours(loaded, apply(loaded.params, batch)))
        np.testing.assert_allclose(
            got, expected(reference, name, batch), atol=1e-5, rtol=1e-5, err_msg=str(size)
        )


@pytest.mark.parametrize("name", ["vit", "clip image", "clip text", "clip text legacy"])
def test_pooled_outputs(models, name):
    reference, loaded = models(name)
    batch = inputs(name)
    with torch.no_grad():
        theirs = forward(reference, name, batch).pooler_output.numpy()
    hidden = loaded.model.apply(loaded.params, batch).hidden
    if "text" in name:
        got = ending(hidden, batch["input_ids"], loaded.model.config.end_id)
    else:
        got = pooled(loaded.model, loaded.params, hidden)
    np.testing.assert_allclose(got, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip image", "clip text"])
def test_all_hidden_states(models, name):
    reference, loaded = models(name)
    batch = inputs(name)
    more = {n: torch.tensor(v) for n, v in batch.items() if n != "pixel_values"}
    if "pixel_values" in batch:
        more["pixel_values"] = torch.tensor(batch["pixel_values"].transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        theirs = reference(**more, output_hidden_states=True).hidden_states
    got = loaded.model.apply(loaded.params, batch, all_hidden=True).hidden
    assert len(got) == len(theirs)
    for layer, (a, b) in enumerate(zip(got[:-1], theirs[:-1], strict=True)):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-5, rtol=1e-5, err_msg=f"layer {layer}")
    np.testing.assert_allclose(
        got[-1], loaded.model.apply(loaded.params, batch).hidden, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(
    "name", [n for n in MODELS if n not in ("vit regression", "clip text legacy")]
)
def test_gradients(models, name):
    """Of a weighted sum of the outputs, at another image size than the positions'."""
    reference, loaded = models(name)
    batch = inputs(name, SIZES[1])
    weights = np.random.default_rng(1).normal(size=expected(reference, name, batch).shape)
    reference.zero_grad()
    value = answer(name, forward(reference, name, batch))
    if name == "clip image":
        value = reference.post_layernorm(value)
    (value * torch.tensor(weights).float()).mean().backward()

    def loss(params):
        return (ours(loaded, loaded.model.apply(params, batch)) * weights).mean()

    got = tree.flatten(jax.jit(jax.grad(loss))(loaded.params))
    stored = dict(reference.named_parameters())
    gradients = reference_gradients(reference, loaded, stored)
    for path, gradient in got.items():
        np.testing.assert_allclose(
            gradient, gradients.get(path, 0.0), atol=1e-4, rtol=1e-4, err_msg=path
        )
    assert len(gradients) > 10


def reference_gradients(reference, loaded, stored):
    """The reference's gradients in our layout: written to a folder, then read as weights."""
    with torch.no_grad():
        for parameter in stored.values():
            kept = parameter.grad
            parameter.kept = parameter.clone()
            parameter.copy_(torch.zeros_like(parameter) if kept is None else kept)
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        flat = tree.flatten(pretrained.load(folder).params)
    with torch.no_grad():
        for parameter in stored.values():
            parameter.copy_(parameter.kept)
    return flat


def test_masked_patches(models):
    reference, loaded = models("dinov2")
    batch = inputs("dinov2")
    masked = np.random.default_rng(2).random((2, 36)) < 0.4
    pixels = torch.tensor(batch["pixel_values"].transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        theirs = reference(pixels, bool_masked_pos=torch.tensor(masked)).last_hidden_state
    got = loaded.model.apply(loaded.params, {**batch, "bool_masked_pos": masked}).hidden
    np.testing.assert_allclose(got, theirs.numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_opens_in_transformers(models, name, tmp_path):
    _, loaded = models(name)
    model = loaded.model
    params = jax.jit(model.init)(jax.random.key(7))
    pretrained.save(tmp_path / "out", model, params)
    opened, info = getattr(transformers, MODELS[name][2]).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = inputs(name)
    got = np.asarray(ours(loaded, jax.jit(model.apply)(params, batch)))
    np.testing.assert_allclose(got, expected(opened.eval(), name, batch), atol=1e-5, rtol=1e-5)
    again = pretrained.load(tmp_path / "out")
    assert again.model.config == dataclasses.replace(model.config, head=again.model.config.head)
    assert again.model.config.head == model.config.head
    read = tree.flatten(again.params)
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(leaf, read[path], err_msg=path)


def test_a_tower_of_the_pair_by_itself(models):
    reference, loaded = models("clip")
    batch = inputs("clip")
    with torch.no_grad():
        out = forward(reference, "clip", batch)
    for name, theirs in (("vision", out.image_embeds), ("text", out.text_embeds)):
        model, params = clip.tower(loaded.model, loaded.params, name)
        embedded = model.apply(params, batch if name == "text" else inputs("clip image")).logits
        embedded = embedded / jnp.linalg.norm(embedded, axis=-1, keepdims=True)
        np.testing.assert_allclose(embedded, theirs.numpy(), atol=1e-5, rtol=1e-5)
    state = loaded.model.apply(loaded.params, batch).state
    np.testing.assert_allclose(state.text, out.text_embeds.numpy(), atol=1e-5, rtol=1e-5)
    assert out.logits_per_image.shape == (2, 3)


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 98])
def test_dinov2_small(asset, tmp_path, size):
    """The real backbone, read from its graph, against the reference filled with it."""
    loaded = pretrained.load(asset("dinov2-s") / "vit_s_focus.onnx")
    assert tree.count(loaded.params) == 22_056_192
    pretrained.save(tmp_path / "out", loaded.model, loaded.params)
    reference = transformers.Dinov2Model.from_pretrained(tmp_path / "out").eval()
    pixels = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = reference(torch.tensor(pixels.transpose(0, 3, 1, 2).copy())).last_hidden_state
    got = jax.jit(loaded.model.apply)(loaded.params, {"pixel_values": pixels}).hidden
    np.testing.assert_allclose(got, theirs.numpy(), atol=1e-4, rtol=1e-4)


def test_an_export_says_how_pixels_are_prepared(tmp_path):
    """The image processor that transformers opens gives its model what ours sees."""
    config = VisionConfig(
        "vit", 32, 8, 16, 2, 2, 32,
        head=HeadConfig("classification", 3, drop=0.0),
        image_mean=(0.4, 0.5, 0.6),
        image_std=(0.2, 0.3, 0.4),
    )  # fmt: skip
    model = config.build()
    params = model.init(jax.random.key(0))
    pretrained.save(tmp_path / "m", model, params)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "m")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "m").eval()
    pixels = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3)).astype(np.uint8)
    with torch.no_grad():
        wanted = theirs(**processor(list(pixels), return_tensors="pt")).logits.numpy()
    loaded = pretrained.load(tmp_path / "m")
    assert loaded.model.config.image_mean == (0.4, 0.5, 0.6)
    found = loaded.model.apply(loaded.params, {"pixel_values": pixels}).logits
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    # Values of the folder count where config.json has none.
    config_file = tmp_path / "m" / "config.json"
    raw = json.loads(config_file.read_text())
    del raw["image_mean"]
    config_file.write_text(json.dumps(raw))
    assert pretrained.load_config(tmp_path / "m").image_mean == (0.4, 0.5, 0.6)
