"""What every overlay must do, table-driven: one row a method, all checks for each."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from steppe.models import tree
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.overlays import (
    adapter,
    added_prompt,
    bitfit,
    compacter,
    compose,
    ia3,
    idpg,
    lora,
    loramoe,
    lpt,
    mp2,
    o_lora,
    plugat,
    prefix,
    prefix_fixed,
    prompt,
    residual_prompt,
    unipelt,
)
from steppe.train import checkpoint, mesh, objectives, step

_RNG = np.random.default_rng(7)
# Two saved prefixes, of 2 rows and of 1, at the three layers of the network below.
SAVED = [
    {
        "layers": {
            "attn.kv_prefix": {n: _RNG.normal(size=(3, rows, 16)).astype(np.float32) for n in "kv"}
        }
    }
    for rows in (2, 1)
]
DENSE = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.in", "ffn.out")
# name -> (overlay, its neutral setting or None where there is none)
OVERLAYS = {
    "lora": (lora.overlay(rank=4), lora.overlay(rank=0)),
    "lora, all dense layers": (
        lora.overlay(rank=2, sites=DENSE, alpha=4.0),
        lora.overlay(rank=0, sites=DENSE),
    ),
    "o-lora": (o_lora.overlay(tasks=2, rank=2), None),
    "loramoe": (
        loramoe.overlay(experts=2, rank=2, drop=0.0),
        loramoe.overlay(experts=2, rank=0),
    ),
    "ia3 and bitfit": (compose(ia3.overlay(), bitfit.overlay()),) * 2,
    "prompt and prefix": (
        compose(prompt.overlay(length=2), prefix.overlay(length=2, hidden=4)),
        None,
    ),
    "residual prompt": (residual_prompt.overlay(length=2, bottleneck=4), None),
    "fixed prefixes": (prefix_fixed.overlay(lengths=(2, 1), prefixes=SAVED), None),
    "added prompt": (added_prompt.overlay(length=2, ids=(5, 6, 7)), None),
    "houlsby": (adapter.overlay(kind="houlsby", width=4), None),
    "pfeiffer": (
        adapter.overlay(kind="pfeiffer", width=4),
        adapter.overlay(kind="pfeiffer", width=4, std=0.0),
    ),
    "parallel": (adapter.overlay(kind="parallel", width=4),) * 2,
    "compacter": (compacter.overlay(n=2, reduction=4), None),
    "unipelt": (unipelt.overlay(rank=2, length=2, reduction=4), None),
    "idpg": (idpg.overlay(length=2, bottleneck=4, n=2, drop=0.0), idpg.overlay(length=0, n=2)),
    "late prompt": (lpt.overlay(layer=1, length=2, bottleneck=4, kind="appg", drop=0.0), None),
    "mp2 and plugat": (
        compose(
            mp2.overlay(modules=3, length=2, intrinsic=4, deep=True, sample=False, ids=(5, 6)),
            plugat.overlay(length=2, hidden=4),
        ),
        None,
    ),
}
CONFIG = EncoderConfig(
    "bert",
    vocab_size=40,
    width=16,
    layers=3,
    heads=2,
    ffn_width=32,
    positions=16,
    types=2,
    pooler=True,
    drop=0.0,
    attn_drop=0.0,
    head=HeadConfig("classification", 2, None, 0.0),
    unroll=1,
)
ROWS = 16

pytestmark = pytest.mark.parametrize("name", OVERLAYS)


@pytest.fixture(scope="module")
def base():
    model = CONFIG.build()
    return model, jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    mask = (np.arange(8) < rng.integers(3, 9, (ROWS, 1))).astype(np.int32)
    return {
        "input_ids": rng.integers(1, 40, (ROWS, 8)).astype(np.int32) * mask,
        "attention_mask": mask,
        "labels": rng.integers(0, 2, ROWS).astype(np.int32),
        "label_mask": np.ones(ROWS, np.float32),
    }


def pieces(name, base, *, axes=None, config=CONFIG, **options):
    """(step, a function of a seed to a first state) of AdamW on the overlay."""
    overlay, _ = OVERLAYS[name]
    model, params = base
    model = model if config is CONFIG else config.build()
    bound = overlay.bind(model, frozen=params)
    plan = None if axes is None else mesh.plan(axes, bound.axes)
    tx = optax.adamw(1e-2)
    run = step.make(objectives.for_task(bound, "classification"), tx, plan, **options)
    return run, lambda seed: step.init(jax.random.key(seed), bound, tx, plan)


def steps(run, state, batch, count):
    """(state, losses) after some steps."""
    losses = []
    for _ in range(count):
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return state, losses


def train(name, base, batch, **options):
    """(state, losses, number of compiles) of three steps."""
    run, first = pieces(name, base, **options)
    return *steps(run, first(1), batch, 3), run.compiles


@pytest.fixture(scope="module")
def plain(base):
    """Step and first state of an overlay, compiled once for all tests."""
    return functools.cache(lambda name: pieces(name, base))


@pytest.fixture(scope="module")
def reference(batch, plain):
    def get(name):
        run, first = plain(name)
        return *steps(run, first(1), batch, 3), run.compiles

    return functools.cache(get)


def close(left, right, atol):
    other = tree.flatten(right)
    for path, leaf in tree.flatten(left).items():
        np.testing.assert_allclose(leaf, other[path], atol=atol, err_msg=path)


def test_it_learns_and_leaves_the_base_alone(name, base, reference):
    state, losses, compiles = reference(name)
    assert losses[-1] < losses[0]
    assert compiles == 1
    flat = tree.flatten(base[1])
    for path, leaf in tree.flatten(state.frozen["base"]).items():
        np.testing.assert_array_equal(leaf, flat[path], err_msg=path)
    trained = set(tree.paths(state.params))
    roots = {"base"} if name == "fixed prefixes" else {"overlay", "base"}
    assert roots == {p.split("/")[0] for p in trained}
    also = tuple(f"base/(?:{p})" for p in OVERLAYS[name][0].trainable)
    own = [p for p in trained if not tree.matches(p, also)]
    assert all(p.startswith(("overlay/", "base/head/")) for p in own)
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state)) - 1
    assert moments == 2 * tree.count(state.params)


def test_the_neutral_setting_is_the_base(name, base, batch):
    neutral = OVERLAYS[name][1]
    if neutral is None:
        pytest.skip("no setting of it is the base")
    model, params = base
    full = {"base": params, "overlay": neutral.init(jax.random.key(0), params)}
    got = jax.jit(lambda p: neutral.bind(model).apply(p, batch).logits)(full)
    np.testing.assert_array_equal(got, jax.jit(lambda p: model.apply(p, batch).logits)(params))


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "model": 2}])
def test_on_a_mesh(name, base, batch, reference, axes):
    state, losses, compiles = train(name, base, batch, axes=axes)
    expected, expected_losses, _ = reference(name)
    np.testing.assert_allclose(losses, expected_losses, atol=1e-5)
    close(state.params, expected.params, 1e-4)
    assert compiles == 1


def test_under_microbatches_and_remat(name, base, batch, reference):
    """Written out, where all others loop over the layers."""
    config = dataclasses.replace(CONFIG, remat="full", unroll=6)
    state, losses, _ = train(name, base, batch, microbatches=4, config=config)
    expected, expected_losses, _ = reference(name)
    np.testing.assert_allclose(losses, expected_losses, atol=1e-5)
    close(state.params, expected.params, 1e-4)


def test_in_bf16(name, base, batch, reference):
    state, losses, _ = train(name, base, batch, compute_dtype="bfloat16")
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))
    np.testing.assert_allclose(losses, reference(name)[1], atol=0.03)


def test_saved_and_resumed(name, batch, plain, reference, tmp_path):
    run, first = plain(name)
    state, _ = steps(run, first(1), batch, 2)
    with checkpoint.Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state, {}, wait=True)
        restored, _ = checkpoints.restore(first(9))
    final, losses = steps(run, restored, batch, 1)
    expected, expected_losses, _ = reference(name)
    assert losses[0] == expected_losses[-1]
    for a, b in zip(jax.tree.leaves(final.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_merged_where_it_can_be(name, base, batch, reference):
    overlay, _ = OVERLAYS[name]
    if overlay.merge is None:
        pytest.skip("it has no merged form")
    state, _, _ = reference(name)
    full = tree.merge(state.params, state.frozen)
    inputs = {k: v for k, v in batch.items() if not k.startswith("label")}
    assert overlay.merged(base[0], full, inputs).largest_difference < 1e-5
