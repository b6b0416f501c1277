"""Vision models by themselves: what they accept, refuse and compute; CLIP's texts and pair."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import clip
from steppe.models.clip_text import ClipTextConfig, ending
from steppe.models.heads import HeadConfig
from steppe.models.model import Masks
from steppe.models.patches import bicubic, interpolated, patches
from steppe.models.sites import Site
from steppe.models.vision import VisionConfig, pooled

TINY = VisionConfig(
    "dinov2",
    image_size=12,
    patch=4,
    width=16,
    layers=2,
    heads=2,
    ffn_width=24,
    mask_token=True,
    layer_scale=0.5,
    registers=2,
    head=HeadConfig("classification", 3, None, 0.0),
    unroll=1,
)
TEXT = ClipTextConfig(
    vocab_size=20, width=8, layers=1, heads=2, ffn_width=12, positions=6, end_id=9, projection=5
)


def built(config):
    model = config.build()
    return dataclasses.replace(model, apply=jax.jit(model.apply, static_argnames="train"))


@pytest.fixture(scope="module")
def tiny():
    model = built(TINY)
    params = jax.jit(model.init)(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    return model, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3)).astype(np.uint8)


def test_bytes_are_scaled_and_normalised(tiny, images):
    model, params = tiny
    mean, std = np.array(TINY.image_mean), np.array(TINY.image_std)
    floats = ((images / 255.0 - mean) / std).astype(np.float32)
    left = model.apply(params, {"pixel_values": images})
    right = model.apply(params, {"pixel_values": floats})
    np.testing.assert_allclose(left.hidden, right.hidden, atol=1e-5)
    assert left.hidden.shape == (2, 1 + 2 + 9, 16)
    assert left.logits.shape == (2, 3)
    assert pooled(model, params, left.hidden).shape == (2, 16)


def test_patches_are_those_of_a_convolution(images):
    x = images.astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(4 * 4 * 3, 5)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        x, kernel.reshape(4, 4, 3, 5), (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    got = patches(jnp.asarray(x), 4) @ kernel
    np.testing.assert_allclose(got, expected.reshape(2, 9, 5), rtol=2e-4, atol=1e-3)


@pytest.mark.parametrize("antialias", [False, True])
def test_interpolation_keeps_constants_and_the_grid_itself(antialias):
    for new in (1, 3, 4, 7, 11):
        matrix = bicubic(5, new, antialias)
        assert matrix.shape == (new, 5)
        np.testing.assert_allclose(matrix.sum(1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(bicubic(5, 5, antialias), np.eye(5))
    table = jnp.arange(18.0).reshape(9, 2)
    assert interpolated(table, (3, 3), antialias=antialias) is table
    assert interpolated(table, (2, 5), antialias=antialias).shape == (10, 2)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 12, 12), r"channels last.*transpose\(0, 2, 3, 1\)"),
        ((2, 12, 12, 1), "has 1 channels.*repeat the grey channel"),
        ((2, 12, 12, 4), "has 4 channels"),
        ((12, 12, 3), r"pixel_values\[None\]"),
        ((0, 12, 12, 3), "empty"),
        ((2, 13, 12, 3), "13 x 12.*height to 12 or 16 and the width to 12"),
        ((2, 2, 12, 3), "height to 4"),
        ((2, 0, 12, 3), "height to 4"),
    ],
)
def test_wrong_images_are_refused(tiny, shape, message):
    model, params = tiny
    with pytest.raises(ValueError, match=message):
        model.apply(params, {"pixel_values": np.zeros(shape, np.float32)})


def test_other_wrong_inputs_are_refused(tiny, images):
    model, params = tiny
    batch = {"pixel_values": images}
    with pytest.raises(ValueError, match="no pixel_values"):
        model.apply(params, {})
    with pytest.raises(ValueError, match="uint8"):
        model.apply(params, {"pixel_values": images.astype(np.int32)})
    with pytest.raises(ValueError, match="attention_mask"):
        model.apply(params, {**batch, "attention_mask": np.ones((2, 10), int)})
    with pytest.raises(ValueError, match="bool_masked_pos"):
        model.apply(params, {**batch, "bool_masked_pos": np.ones((2, 10), bool)})
    with pytest.raises(ValueError, match="5 patches are not a square"):
        model.apply(params, {}, embeds=jnp.zeros((2, 5, 16)))
    with pytest.raises(ValueError, match="embeds holds 4 patches"):
        model.apply(params, batch, embeds=jnp.zeros((2, 4, 16)))
    with pytest.raises(ValueError, match="needs rng"):
        dataclasses.replace(TINY, drop=0.1).build().apply(params, batch, train=True)
    bare = dataclasses.replace(TINY, mask_token=False).build()
    stripped = {**params, "embed": {k: v for k, v in params["embed"].items() if k != "mask"}}
    with pytest.raises(ValueError, match="mask_token=False"):
        bare.apply(stripped, {**batch, "bool_masked_pos": np.ones((2, 9), bool)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 13}, "multiple of the patch"),
        ({"heads": 3}, "not divisible"),
        ({"reads": "all"}, "reads must be"),
        ({"image_mean": (0.5,)}, "one a channel"),
        ({"image_std": (1.0, 0.0, 1.0)}, "image_std must be > 0"),
        ({"head": HeadConfig("token", 3)}, "vision model has heads"),
        ({"projection": 4}, "projection=0"),
        ({"act": "none"}, "activation must be"),
        ({"remat": "some"}, "remat must be"),
        ({"layers": 0}, "layers must be >= 1"),
    ],
)
def test_wrong_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_embeds_stand_for_the_patches(tiny, images):
    model, params = tiny
    kernel, bias = params["embed"]["patch"]["kernel"], params["embed"]["patch"]["bias"]
    mean, std = np.array(TINY.image_mean), np.array(TINY.image_std)
    floats = ((images / 255.0 - mean) / std).astype(np.float32)
    embeds = patches(jnp.asarray(floats), 4) @ kernel + bias
    left = model.apply(params, {}, embeds=embeds)
    right = model.apply(params, {"pixel_values": images})
    np.testing.assert_allclose(left.logits, right.logits, atol=1e-5)


def test_parts_compose_to_apply(tiny, images):
    model, params = tiny
    embed, layers, head = model.parts
    batch = {"pixel_values": images}
    inputs = embed(params, batch)
    below = inputs._replace(hidden=layers(params, inputs, stop=1))
    hidden = layers(params, below, start=1)
    out = model.apply(params, batch)
    np.testing.assert_allclose(head(params, hidden, inputs), out.logits, atol=1e-5)


def test_a_head_that_reads_the_class_token_needs_the_last_layer_there_only(images):
    """The short cut changes nothing, and the hidden states stay whole."""
    config = dataclasses.replace(TINY, reads="class", registers=0)
    model = built(config)
    params = jax.jit(model.init)(jax.random.key(0))
    out = model.apply(params, {"pixel_values": images})
    whole = Site(lambda delta, x, base, context: base(x), jnp.zeros(2))
    slow = jax.jit(lambda p, x: config.build().apply(p, x, sites={"resid": whole}))
    slow = slow(params, {"pixel_values": images})
    np.testing.assert_allclose(out.logits, slow.logits, atol=1e-6)
    np.testing.assert_allclose(out.hidden, slow.hidden, atol=1e-6)


def test_prompts_in_front_have_no_position_and_are_not_read(tiny, images):
    """A prompt that nobody attends to leaves the logits alone."""
    model, params = tiny
    batch = {"pixel_values": images, "attention_mask": np.ones((2, 12), int)}

    def put(delta, x, base, context):
        rows = jnp.broadcast_to(delta, (2, 3, 16))
        mask = jnp.pad(x.mask, ((0, 0), (3, 0)))
        hidden = jnp.concatenate([rows, x.hidden], axis=1)
        return base(x._replace(hidden=hidden, mask=mask, prompt=3))

    sites = {"embed": Site(put, jnp.ones((3, 16)))}
    got = jax.jit(lambda p: TINY.build().apply(p, batch, sites=sites))(params)
    np.testing.assert_allclose(got.logits, model.apply(params, batch).logits, atol=1e-5)
    assert got.hidden.shape == (2, 15, 16)


def test_structure_masks(tiny, images):
    """A masked layer is skipped; masked heads and units change the output."""
    model, params = tiny
    batch = {"pixel_values": images}
    masks = Masks(jnp.ones((2, 2)), jnp.ones((2, 24)), jnp.ones(2))
    full = model.apply(params, batch).logits
    np.testing.assert_allclose(model.apply(params, batch, masks=masks).logits, full, atol=1e-6)
    off = masks._replace(layer=jnp.zeros(2))
    skipped = model.apply(params, batch, masks=off).hidden
    embedded = model.parts.embed(params, batch)
    straight = model.parts.head(params, embedded.hidden, embedded)
    np.testing.assert_allclose(model.apply(params, batch, masks=off).logits, straight, atol=1e-5)
    assert skipped.shape == (2, 12, 16)
    off = masks._replace(head=jnp.zeros((2, 2)), ffn=jnp.zeros((2, 24)))
    assert np.abs(model.apply(params, batch, masks=off).logits - full).max() > 1e-3


def test_dropping_paths_drops_whole_examples(tiny, images):
    config = dataclasses.replace(TINY, drop_path=0.5)
    model = built(config)
    params = tiny[1]
    batch = {"pixel_values": np.repeat(images[:1], 64, axis=0)}
    out = model.apply(params, batch, rng=jax.random.key(0), train=True).logits
    assert len(np.unique(np.asarray(out).round(4), axis=0)) in range(2, 17)  # 2^4 at most
    calm = model.apply(params, {"pixel_values": images}).logits
    np.testing.assert_allclose(calm, tiny[0].apply(params, {"pixel_values": images}).logits)


def test_a_text_is_read_where_it_ends():
    hidden = jnp.arange(8.0).reshape(2, 4, 1)
    ids = jnp.array([[1, 9, 9, 0], [3, 4, 12, 9]])
    np.testing.assert_array_equal(ending(hidden, ids, 9)[:, 0], [1, 7])
    np.testing.assert_array_equal(ending(hidden, ids, 2)[:, 0], [1, 6])
    np.testing.assert_array_equal(ending(hidden, ids, 15)[:, 0], [0, 4])


def test_texts_are_causal_and_checked():
    model = built(TEXT)
    params = jax.jit(model.init)(jax.random.key(0))
    ids = np.array([[1, 5, 9, 0], [2, 9, 3, 3]])
    left = model.apply(params, {"input_ids": ids})
    ids[1, 2:] = 7
    right = model.apply(params, {"input_ids": ids})
    np.testing.assert_allclose(left.logits, right.logits, atol=1e-6)
    assert left.logits.shape == (2, 5)
    with pytest.raises(ValueError, match="longer than the model's 6 positions"):
        model.apply(params, {"input_ids": np.ones((1, 7), int)})
    with pytest.raises(ValueError, match="empty"):
        model.apply(params, {"input_ids": np.ones((0, 4), int)})
    with pytest.raises(ValueError, match="say where a text ends"):
        model.apply(params, {}, embeds=jnp.zeros((1, 4, 8)))
    with pytest.raises(ValueError, match="attention_mask"):
        model.apply(params, {"input_ids": ids, "attention_mask": np.ones((2, 3), int)})


def test_the_pair():
    image = dataclasses.replace(TINY, head=None, projection=5, embed_norm=True)
    with pytest.raises(ValueError, match="same width"):
        clip.ClipConfig(dataclasses.replace(image, projection=4), TEXT)
    config = clip.ClipConfig(image, TEXT)
    model = built(config)
    params = jax.jit(model.init)(jax.random.key(0))
    batch = {
        "pixel_values": np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32),
        "input_ids": np.array([[1, 5, 9], [2, 9, 9], [4, 4, 9]]),
        "attention_mask": np.ones((3, 3), int),
    }
    out = model.apply(params, batch)
    assert out.logits.shape == (2, 3)
    np.testing.assert_allclose(
        out.logits, np.exp(params["logit_scale"]) * out.state.image @ out.state.text.T, rtol=1e-5
    )
    np.testing.assert_allclose(np.linalg.norm(out.state.image, axis=-1), 1.0, rtol=1e-5)
    with pytest.raises(ValueError, match=r"no site 'attn\.q'; its sites are vision\.embed"):
        config.build().apply(params, batch, sites={"attn.q": Site(lambda *a: a[1], jnp.zeros(2))})
    with pytest.raises(ValueError, match="belong to one tower"):
        config.build().apply(params, batch, masks=Masks())
    with pytest.raises(ValueError, match="name must be one of"):
        clip.tower(model, params, "audio")
    with pytest.raises(ValueError, match="no heads"):
        config.with_head(HeadConfig("classification", 2))

    def double(delta, x, base, context):
        return 2 * base(x)

    sites = {"text.logits": Site(double, ()), "vision.logits": Site(double, ())}
    same = jax.jit(lambda p: config.build().apply(p, batch, sites=sites).logits)(params)
    np.testing.assert_allclose(same, out.logits, rtol=1e-4)
