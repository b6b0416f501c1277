"""Every sharpness-aware transform inside the training step: exact however the batch is split,
on every mesh, in bf16, with frozen leaves; its state is saved, restored and never recompiles."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe import optim
from steppe.train import checkpoint, fisher, mesh, step

PROGRAMS = Path(__file__).parents[1] / "train" / "programs"
toy = SimpleNamespace(**runpy.run_path(str(PROGRAMS / "toy.py")))
ADAMW = optax.adamw(1e-2)

METHODS = {
    "sam": lambda base=ADAMW: optim.sam(base, 0.05),
    "asam": lambda base=ADAMW: optim.asam(base, 0.5),
    "gsam": lambda base=ADAMW: optim.gsam(base, 0.05),
    "looksam": lambda base=ADAMW: optim.looksam(base, 0.05, every=2),
    "fsam": lambda base=ADAMW: optim.fsam(base, 0.05, keep_ratio=0.5, refresh_every=2),
    "fsam per sample": lambda base=ADAMW: optim.fsam(
        base, 0.05, keep_ratio=0.5, refresh_every=2, fisher="per_sample"
    ),
    "fsam tensor": lambda base=ADAMW: optim.fsam(base, 0.05, keep_ratio=0.5, structure="tensor"),
    "fsam 2:4": lambda base=ADAMW: optim.fsam(base, 0.05, structure=(2, 4)),
}
SPLITS = {
    "8 devices": ({"data": 8}, 1),
    "2x2x2, 4 micro-batches": ({"data": 2, "fsdp": 2, "model": 2}, 4),
}
STEPS = 4


def host(tree_):
    return jax.tree.map(np.array, tree_)


def largest(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


def distance(a, b):
    leaves = jax.tree.leaves(jax.tree.map(lambda x, y: float(np.square(x - y).sum()), a, b))
    return float(np.sqrt(sum(leaves)))


def build(tx, shape=None, microbatches=1, **options):
    plan = None if shape is None else mesh.plan(shape, toy.RULES)
    state = step.init(jax.random.key(0), toy.MODEL, tx, plan, **{
        k: options.pop(k) for k in ("trainable",) if k in options
    })  # fmt: skip
    return state, step.make(toy.ce, tx, plan, microbatches=microbatches, **options)


def trained(tx, shape=None, microbatches=1, steps=STEPS, **options):
    state, train = build(tx, shape, microbatches, **options)
    for number in range(steps):
        state, _ = train(state, toy.batch(number))
    return state, train


WHOLE = {}


def whole(name):
    """Parameters after training on one device with whole batches."""
    if name not in WHOLE:
        WHOLE[name] = host(trained(METHODS[name]())[0].params)
    return WHOLE[name]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", METHODS)
def test_every_split_gives_the_same_parameters_and_one_program(name, split):
    state, train = trained(METHODS[name](), *SPLITS[split])
    assert largest(host(state.params), whole(name)) < 1e-5
    assert train.compiles == 1


@pytest.mark.parametrize("name", METHODS)
def test_it_differs_from_the_base_and_bf16_stays_near(name):
    base = host(trained(ADAMW)[0].params)
    assert largest(whole(name), base) > 1e-4
    state, _ = trained(METHODS[name](), compute_dtype="bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    # Adam normalises: where bf16 turns the sign of a small gradient a step differs by 2 lr, which
    # few entries do.
    found = host(state.params)
    assert largest(found, whole(name)) < 2 * STEPS * 1e-2
    assert distance(found, whole(name)) < distance(whole(name), base)


@pytest.mark.parametrize("name", METHODS)
def test_frozen_leaves_are_neither_perturbed_nor_moved(name):
    state, _ = trained(METHODS[name](), trainable=("head/.*",))
    first = step.init(jax.random.key(0), toy.MODEL, ADAMW)
    assert set(state.params) == {"head"}
    assert largest(host(state.frozen["layers"]), host(first.params["layers"])) == 0
    assert largest(host(state.params["head"]), host(first.params["head"])) > 1e-3


@pytest.mark.parametrize("name", ["sam", "looksam", "fsam", "fsam per sample"])
def test_inside_partition_only_its_own_leaves_are_perturbed(name):
    """``optax.partition`` shows the transform a part of the tree; freezing is the same."""

    def labels(params):
        return {k: jax.tree.map(lambda _, own=k == "head": own, v) for k, v in params.items()}

    tx = optax.partition({True: METHODS[name](), False: optax.set_to_zero()}, labels)
    state, _ = trained(tx)
    frozen, _ = trained(METHODS[name](), trainable=("head/.*",))
    assert largest(host(state.params["head"]), host(frozen.params["head"])) < 1e-5
    first = step.init(jax.random.key(0), toy.MODEL, ADAMW)
    assert largest(host(state.params["layers"]), host(first.params["layers"])) == 0


@pytest.mark.parametrize("name", ["sam", "looksam", "fsam"])
def test_saved_and_restored_it_goes_on_bitwise_mask_included(name, tmp_path):
    tx = METHODS[name]()
    shape = {"data": 4, "model": 2}
    state, train = build(tx, shape)
    for number in range(2):
        state, _ = train(state, toy.batch(number))
    with checkpoint.Checkpoints(tmp_path / "c", manifest={}) as saved:
        saved.save(state, {"batch": 2})
        saved.wait()
        plan = mesh.plan(shape, toy.RULES)
        like = step.abstract(toy.MODEL, tx, plan)
        restored, _ = saved.restore(like)
    for before, after in zip(
        jax.tree.leaves(state.opt_state), jax.tree.leaves(restored.opt_state), strict=True
    ):
        np.testing.assert_array_equal(before, after)
    ends = []
    for start in (restored, state):
        for number in (2, 3):
            start, _ = train(start, toy.batch(number))
        ends.append(host(start.params))
    assert largest(*ends) == 0


def test_masks_lie_where_their_parameters_do():
    state, _ = trained(METHODS["fsam"](), {"data": 4, "model": 2}, steps=1)
    masks = state.opt_state.mask
    for mask, leaf in zip(jax.tree.leaves(masks), jax.tree.leaves(state.params), strict=True):
        assert mask.dtype == bool
        assert mask.sharding == leaf.sharding


def test_the_fisher_diagonal_of_the_step_against_a_loop():
    params = toy.init(jax.random.key(1))
    batch = {k: jnp.asarray(v) for k, v in toy.batch(0).items()}
    batch["label_mask"] = batch["label_mask"].at[3].set(0.0)  # a row that counts for nothing
    plan = mesh.plan({"data": 8}, toy.RULES)
    grad = jax.jit(jax.grad(lambda p, row: toy.ce(p, row, None).total))
    wanted = jax.tree.map(jnp.zeros_like, params)
    rows = [i for i in range(toy.ROWS) if batch["label_mask"][i].sum() > 0]
    assert 3 not in rows
    for i in rows:
        g = grad(params, {k: v[i : i + 1] for k, v in batch.items()})
        wanted = jax.tree.map(lambda t, g: t + g**2 / len(rows), wanted, g)
    for where in (None, plan):
        found = jax.jit(lambda p, b, w=where: fisher.diagonal(toy.ce, p, {}, b, w))(params, batch)
        # Entries of up to 4.6: 1e-6 alone would be two roundings of the largest.
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), found, wanted
        )


def test_no_second_gradient_where_none_is_asked_for():
    """FLOPs beside AdamW's: twice, and the same at a radius of 0 (memory: see test_ascent)."""
    batch = toy.batch(0)
    sizes = {}
    for name, tx in {
        "adamw": ADAMW,
        "sam": optim.sam(ADAMW, 0.05),
        "zero": optim.sam(ADAMW, 0),
    }.items():
        state, train = build(tx)
        sizes[name] = train.compile(state, batch).cost_analysis()["flops"]
    assert sizes["zero"] == pytest.approx(sizes["adamw"], rel=0.01)
    assert 1.5 < sizes["sam"] / sizes["adamw"] < 2.5


def test_looksam_without_a_radius_trains_as_its_base_does():
    """Clipped and in micro-batches, where both gradients round differently."""
    options = {"microbatches": 2, "clip_norm": 0.5}
    sgd = optax.sgd(0.3)
    plain = host(trained(sgd, **options)[0].params)
    tx = optim.looksam(sgd, optax.constant_schedule(0.0), every=2)
    assert largest(host(trained(tx, **options)[0].params), plain) < 1e-5
