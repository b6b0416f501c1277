"""What every decoder must do: on a mesh, looped or written out, recomputed, in bf16, under LoRA,
partly frozen, in micro-batches, packed."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from steppe.models import tree
from steppe.models.decoder import DecoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.overlays import lora
from steppe.models.rotary import Rotary
from steppe.train import mesh, objectives, step

LLAMA = DecoderConfig(
    "llama",
    vocab_size=40,
    width=16,
    layers=3,
    heads=4,
    kv_heads=2,
    ffn_width=32,
    positions=32,
    head=HeadConfig("lm"),
)
CONFIGS = {
    "llama": LLAMA,
    "gemma3": dataclasses.replace(
        LLAMA, norm="rms1", window=3, windowed=(True, False, True), qk_norm=True, tied=True,
        local_rotary=Rotary(base=100.0), post_norms=True, embed_scale=4.0,
    ),
    "gpt2": dataclasses.replace(
        LLAMA, rotary=None, norm="layer", gated=False, act="gelu_tanh", qkv_bias=True,
        out_bias=True, ffn_bias=True, tied=True,
    ),
}  # fmt: skip
ROWS, T = 16, 8

pytestmark = pytest.mark.parametrize("name", CONFIGS)


def batch():
    rng = np.random.default_rng(0)
    mask = (np.arange(T) < rng.integers(3, T + 1, (ROWS, 1))).astype(np.int32)
    ids = rng.integers(1, 40, (ROWS, T)).astype(np.int32) * mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids,
        "label_mask": mask.astype(np.float32) * (np.arange(T) > 0),
    }


def train(config, *, axes=None, overlay=False, trainable=None, steps=3, **options):
    """(parameters, losses, compiles) of a few SGD steps."""
    model = config.build()
    if overlay:
        params = jax.jit(model.init)(jax.random.key(0))
        sites = ("attn.q", "attn.o", "ffn.in", "ffn.out", *(("ffn.gate",) * config.gated))
        model = lora.overlay(rank=2, sites=sites).bind(model, frozen=params)
    plan = None if axes is None else mesh.plan(axes, model.axes)
    more = {} if trainable is None else {"trainable": trainable}
    tx = optax.sgd(0.1)
    state = step.init(jax.random.key(1), model, tx, plan, **more)
    run = step.make(objectives.token_ce(model, shift=True), tx, plan, **options)
    losses = []
    for _ in range(steps):
        state, metrics = run(state, batch())
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return state, losses, run.compiles


DONE = {}


def reference(name, **options):
    key = (name, *options)
    if key not in DONE:
        DONE[key] = train(CONFIGS[name], **options)
    return DONE[key]


def close(got, wanted, atol=1e-5):
    np.testing.assert_allclose(got[1], wanted[1], atol=atol)
    other = tree.flatten(wanted[0].params)
    for path, leaf in tree.flatten(got[0].params).items():
        np.testing.assert_allclose(leaf, other[path], atol=atol, err_msg=path)
    assert got[2] == 1


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "model": 2}], ids=str)
def test_on_a_mesh(name, axes):
    assert reference(name)[1][-1] < reference(name)[1][0]
    close(train(CONFIGS[name], axes=axes), reference(name))


def test_looped_recomputed_and_in_microbatches(name):
    for remat in ("none", "full"):
        config = dataclasses.replace(CONFIGS[name], unroll=1, remat=remat)
        count = 4 if remat == "full" else 1
        close(train(config, microbatches=count), reference(name))


def test_in_bf16(name):
    state, losses, _ = train(CONFIGS[name], compute_dtype="bfloat16")
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))
    np.testing.assert_allclose(losses, reference(name)[1], atol=0.05)


def test_under_lora_and_on_a_mesh_with_it(name):
    state, losses, compiles = reference(name, overlay=True)
    assert losses[-1] < losses[0]
    assert compiles == 1
    assert set(state.params) >= {"overlay"}
    assert tree.paths(state.frozen["base"])
    close(train(CONFIGS[name], overlay=True, axes={"data": 4, "model": 2}), (state, losses, 1))


def test_frozen_leaves_stay(name):
    state, losses, _ = train(CONFIGS[name], trainable=("layers/ffn/.*",))
    assert losses[-1] < losses[0]
    assert all(path.startswith("layers/ffn/") for path in tree.paths(state.params))
    first = tree.flatten(jax.jit(CONFIGS[name].build().init)(jax.random.key(1)))
    assert set(tree.paths(state.frozen)) | set(tree.paths(state.params)) == set(first)


def test_packed_texts_are_separate_texts(name):
    model = CONFIGS[name].build()
    params = jax.jit(model.init)(jax.random.key(0))
    apply = jax.jit(model.apply)
    rng = np.random.default_rng(2)
    texts = [rng.integers(1, 40, (1, n)).astype(np.int32) for n in (5, 3, 7)]
    segments = np.concatenate([np.full((1, t.shape[1]), i + 1) for i, t in enumerate(texts)], 1)
    ids = np.concatenate(texts, 1)
    packed = apply(params, {"input_ids": ids, "segment_ids": segments}).logits[0]
    for i, text in enumerate(texts):
        alone = apply(params, {"input_ids": text}).logits[0]
        np.testing.assert_allclose(packed[segments[0] == i + 1], alone, atol=1e-5)
