"""What every vision model must do, table-driven: one row a configuration, all checks for each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.models import clip, tree
from steppe.models.clip_text import ClipTextConfig
from steppe.models.heads import HeadConfig
from steppe.models.overlays import lora
from steppe.models.vision import VisionConfig
from steppe.train import mesh, objectives, step

HEAD = HeadConfig("classification", 3, None, 0.0)
VIT = VisionConfig(
    "vit", image_size=12, patch=4, width=16, layers=3, heads=2, ffn_width=32, head=HEAD, unroll=1
)
CONFIGS = {
    "vit": VIT,
    "dinov2": dataclasses.replace(
        VIT,
        family="dinov2_with_registers",
        layer_scale=0.5,
        gated=True,
        act="silu",
        registers=2,
        antialias=True,
        mask_token=True,
        reads="class+mean",
    ),
}
ROWS = 16
DENSE = ("attn.q", "attn.v", "attn.o", "ffn.in", "ffn.out")

each = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "pixel_values": rng.integers(0, 256, (ROWS, 16, 12, 3)).astype(np.uint8),
        "labels": rng.integers(0, 3, ROWS).astype(np.int32),
        "label_mask": np.ones(ROWS, np.float32),
    }


@pytest.fixture(scope="module")
def params():
    made = {name: jax.jit(c.build().init)(jax.random.key(0)) for name, c in CONFIGS.items()}
    return lambda name: made[name]


def train(name, params, batch, *, axes=None, overlay=None, trainable=None, **options):
    """(state, losses, number of compiles) of two AdamW steps from ``params``."""
    changes = {k: options.pop(k) for k in ("remat", "unroll") if k in options}
    model = dataclasses.replace(CONFIGS[name], **changes).build()
    start = {"params": params(name), "trainable": trainable}
    if overlay is not None:
        model, start = overlay.bind(model, frozen=params(name)), {}
    plan = None if axes is None else mesh.plan(axes, model.axes)
    tx = optax.adamw(1e-2)
    run = step.make(objectives.classification_ce(model), tx, plan, **options)
    state = step.init(jax.random.key(1), model, tx, plan, **start)
    losses = []
    for _ in range(2):
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return state, losses, run.compiles


@pytest.fixture(scope="module")
def reference(params, batch):
    done = {}

    def get(name):
        if name not in done:
            done[name] = train(name, params, batch)
        return done[name]

    return get


def close(left, right, atol):
    other = tree.flatten(right)
    for path, leaf in tree.flatten(left).items():
        np.testing.assert_allclose(leaf, other[path], atol=atol, err_msg=path)


@each
def test_it_learns_in_one_compile(name, reference):
    state, losses, compiles = reference(name)
    assert losses[-1] < losses[0]
    assert compiles == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@each
@pytest.mark.parametrize(
    "axes", [{"data": 8}, {"fsdp": 4, "model": 2}, {"data": 2, "fsdp": 2, "model": 2}]
)
def test_eight_devices_are_one(name, params, batch, reference, axes):
    state, losses, compiles = train(name, params, batch, axes=axes)
    np.testing.assert_allclose(losses, reference(name)[1], atol=1e-5)
    # Adam divides by the root of a squared gradient: 1e-7 beside 0 may become 1e-3.
    assert compiles == 1
    close(state.params, reference(name)[0].params, 2e-3)


@each
@pytest.mark.parametrize(
    "options", [{"unroll": 3}, {"remat": "full"}, {"remat": "none"}, {"microbatches": 4}], ids=str
)
def test_how_it_is_computed_does_not_matter(name, params, batch, reference, options):
    """Written out or looped over, recomputed or kept, in one batch or in four."""
    state, losses, _ = train(name, params, batch, **options)
    np.testing.assert_allclose(losses, reference(name)[1], atol=1e-5)
    close(state.params, reference(name)[0].params, 2e-3)


@each
def test_in_bf16(name, params, batch, reference):
    state, losses, _ = train(name, params, batch, compute_dtype="bfloat16")
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))
    np.testing.assert_allclose(losses, reference(name)[1], atol=0.05)
    low = tree.cast(params(name), "bfloat16")
    out = jax.jit(CONFIGS[name].build().apply)(low, batch)
    assert out.logits.dtype == out.hidden.dtype == jnp.bfloat16


@each
def test_frozen_leaves_stay(name, params, batch):
    state, losses, _ = train(name, params, batch, trainable=("head/.*",))
    assert set(tree.paths(state.params)) == {"head/out/kernel", "head/out/bias"}
    close(state.frozen, {k: v for k, v in params(name).items() if k != "head"}, 0)
    assert losses[-1] < losses[0]


@each
def test_lora_trains_and_merges(name, params, batch):
    overlay = lora.overlay(rank=2, sites=DENSE, alpha=4.0)
    state, losses, _ = train(name, params, batch, overlay=overlay)
    assert losses[-1] < losses[0]
    meshed, meshed_losses, _ = train(
        name, params, batch, overlay=overlay, axes={"data": 4, "model": 2}
    )
    np.testing.assert_allclose(meshed_losses, losses, atol=1e-5)
    close(meshed.params, state.params, 2e-3)
    full = tree.merge(state.params, state.frozen)
    inputs = {"pixel_values": batch["pixel_values"]}
    merged = overlay.merged(CONFIGS[name].build(), full, inputs)
    assert merged.largest_difference < 1e-5


def test_the_pair_on_eight_devices():
    """Rows over the data axes, parameters over both; and adapters on each tower."""
    text = ClipTextConfig(
        vocab_size=32, width=16, layers=2, heads=2, ffn_width=32, positions=6, end_id=9,
        projection=8, unroll=1,
    )  # fmt: skip
    image = dataclasses.replace(VIT, head=None, projection=8, embed_norm=True, patch_bias=False)
    model = clip.ClipConfig(image, text).build()
    rng = np.random.default_rng(0)
    batch = {
        "pixel_values": rng.normal(size=(8, 12, 12, 3)).astype(np.float32),
        "input_ids": rng.integers(0, 32, (8, 5)).astype(np.int32),
    }
    params = jax.jit(model.init)(jax.random.key(0))
    expected = jax.jit(model.apply)(params, batch).logits
    plan = mesh.plan({"fsdp": 4, "model": 2}, model.axes)
    got = jax.jit(model.apply)(plan.place(params), plan.batch(batch)).logits
    np.testing.assert_allclose(got, expected, atol=1e-5)
    overlay = lora.overlay(rank=2, sites=("vision.attn.q", "text.ffn.out"))
    bound = overlay.bind(model, frozen=params)
    start = bound.init(jax.random.key(1))["overlay"]
    delta = jax.tree.map(lambda x: jax.random.normal(jax.random.key(2), x.shape), start)
    full = {"base": params, "overlay": delta}
    assert np.abs(jax.jit(bound.apply)(full, batch).logits - expected).max() > 1e-2
    assert overlay.merged(model, full, batch).largest_difference < 1e-5
