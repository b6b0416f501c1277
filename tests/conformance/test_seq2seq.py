"""What every encoder-decoder must do in training, table-driven: one row a style."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from steppe.models import tree
from steppe.models.heads import HeadConfig
from steppe.models.overlays import added_prompt, lora, lpt, mp2
from steppe.models.seq2seq import Seq2SeqConfig
from steppe.train import mesh, objectives, step

TINY = {
    "vocab_size": 40,
    "width": 16,
    "heads": 2,
    "ffn_width": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "positions": 16,
    "head": HeadConfig("lm"),
    "drop": 0.0,
    "unroll": 1,
}
POST = {"pre_norm": False, "rms": False, "use_bias": True, "head_bias": "fixed", "epsilon": 1e-5}
STYLES = {
    "t5": Seq2SeqConfig("t5", **TINY, scale=1.0, gated=True, act="gelu_tanh", tied=False),
    "bart": Seq2SeqConfig("bart", **TINY, **POST, position_kind="learned", embed_norm=True),
    "student": Seq2SeqConfig(
        "marian_ssru", **TINY, **POST, position_kind="timing", cell="ssru", start_id=-1
    ),
}
SITES = ("encoder.attn.q", "decoder.cross.v")
# Prompts in the source, one a style.
PROMPTS = {
    "t5": lpt.overlay(length=2, bottleneck=4, kind="appg", drop=0.0, stack="encoder"),
    "bart": mp2.overlay(
        modules=3, length=2, intrinsic=4, deep=True, sample=False, ids=(5, 6), stack="encoder"
    ),
    "student": added_prompt.overlay(length=2, ids=(5, 6, 7), first=0, stack="encoder"),
}
ROWS, T, U = 16, 7, 6

pytestmark = pytest.mark.parametrize("style", STYLES)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    mask = (np.arange(T) < rng.integers(2, T + 1, (ROWS, 1))).astype(np.int32)
    label_mask = (np.arange(U) < rng.integers(1, U + 1, (ROWS, 1))).astype(np.float32)
    return {
        "input_ids": rng.integers(2, 40, (ROWS, T)).astype(np.int32) * mask,
        "attention_mask": mask,
        "labels": rng.integers(2, 40, (ROWS, U)).astype(np.int32),
        "label_mask": label_mask,
    }


def train(style, batch, *, axes=None, overlay=None, base=None, tx=None, **changes):
    """(parameters, losses, compiles) of three steps, of SGD; ``changes`` of config and step."""
    of_step = {k: changes.pop(k) for k in ("microbatches", "compute_dtype") if k in changes}
    model = dataclasses.replace(STYLES[style], **changes).build()
    if overlay is not None:
        model = overlay.bind(model, frozen=base)
    plan = None if axes is None else mesh.plan(axes, model.axes)
    tx = optax.sgd(0.3) if tx is None else tx
    run = step.make(objectives.token_ce(model, shift=False), tx, plan, **of_step)
    state = step.init(jax.random.key(0), model, tx, plan)
    losses = []
    for _ in range(3):
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return state, losses, run.compiles


@pytest.fixture(scope="module")
def reference(batch):
    done = {}

    def get(style):
        if style not in done:
            done[style] = train(style, batch)
        return done[style]

    return get


def same(got, expected, losses=1e-5, params=1e-4):
    np.testing.assert_allclose(got[1], expected[1], atol=losses)
    flat = tree.flatten(expected[0].params)
    for path, leaf in tree.flatten(got[0].params).items():
        np.testing.assert_allclose(leaf, flat[path], atol=params, err_msg=path)


def test_it_learns_in_one_program(style, reference):
    state, losses, compiles = reference(style)
    assert losses[-1] < losses[0] - 0.01
    assert compiles == 1
    frozen = [] if style == "t5" else ["head/bias"]
    assert tree.paths(state.frozen) == frozen


def test_on_a_mesh(style, batch, reference):
    got = train(style, batch, axes={"data": 2, "fsdp": 2, "model": 2})
    same(got, reference(style))
    assert got[2] == 1


def test_unrolled_under_remat_and_microbatches(style, batch, reference):
    """The reference is one batch, looped over layers, with remat "dots"."""
    same(train(style, batch, microbatches=4, remat="full", unroll=4), reference(style))


def test_in_bf16(style, batch, reference):
    state, losses, _ = train(style, batch, compute_dtype="bfloat16")
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))
    np.testing.assert_allclose(losses, reference(style)[1], atol=0.05)


def test_lora_in_both_stacks(style, batch):
    model = STYLES[style].build()
    base = jax.jit(model.init)(jax.random.key(3))
    overlay = lora.overlay(rank=2, sites=SITES, alpha=8.0)
    state, losses, compiles = train(style, batch, overlay=overlay, base=base)
    assert losses[-1] < losses[0]
    assert compiles == 1
    flat = tree.flatten(base)
    for path, leaf in tree.flatten(state.frozen["base"]).items():
        np.testing.assert_array_equal(leaf, flat[path], err_msg=path)
    assert set(state.params["overlay"]["layers"]) == set(SITES)
    sharded = train(style, batch, overlay=overlay, base=base, axes={"fsdp": 4, "model": 2})
    same(sharded, (state, losses))
    full = tree.merge(state.params, state.frozen)
    inputs = {k: v for k, v in batch.items() if k != "label_mask"}
    merged = overlay.merged(model, full, inputs)
    assert merged.largest_difference < 1e-5
    changed = {
        path
        for path, leaf in tree.flatten(merged.params).items()
        if path.startswith(("encoder/", "decoder/")) and np.abs(leaf - flat[path]).max() > 0
    }
    assert changed == {"encoder/layers/attn/q/kernel", "decoder/layers/cross/v/kernel"}


def test_prompts_in_the_source(style, batch):
    base = jax.jit(STYLES[style].build().init)(jax.random.key(3))
    # What they move is little, as is an untrained encoder's part in its decoder.
    options = {"overlay": PROMPTS[style], "base": base, "tx": optax.adam(0.1, eps=1e-12)}
    state, losses, compiles = train(style, batch, **options)
    assert losses[-1] < losses[0]
    assert compiles == 1
    assert all(path.startswith("overlay/") for path in tree.paths(state.params))
    everywhere = {"axes": {"data": 2, "fsdp": 2, "model": 2}, "microbatches": 2}
    same(train(style, batch, **everywhere, remat="full", unroll=4, **options), (state, losses))
    rough = train(style, batch, compute_dtype="bfloat16", **options)
    np.testing.assert_allclose(rough[1], losses, atol=0.05)
