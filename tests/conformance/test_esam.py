"""ESAM inside the training step: the same however the batch is split and on every mesh, in bf16,
with frozen leaves; saved, restored and never recompiled. And flooding inside of SAM."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe import optim
from steppe.optim.esam import esam
from steppe.optim.flooding import flooding
from steppe.optim.selective import selective_gradient
from steppe.train import checkpoint, mesh, step
from steppe.train.ascent import Ascent

PROGRAMS = Path(__file__).parents[1] / "train" / "programs"
toy = SimpleNamespace(**runpy.run_path(str(PROGRAMS / "toy.py")))
ADAMW = optax.adamw(1e-2)
STEPS = 4

METHODS = {
    "esam": lambda: esam(ADAMW, 0.05),
    "esam, all rows": lambda: esam(ADAMW, 0.05, gamma=1.0),
    "flooded sam": lambda: optim.sam(optax.chain(flooding(1.9), ADAMW), 0.05),
    "selective": lambda: optax.chain(
        selective_gradient(0.5, 5.0, lambda path: path.startswith("layers/"), resample=2), ADAMW
    ),
}
SPLITS = {
    "8 devices": ({"data": 8}, 1),
    "2x2x2, 4 micro-batches": ({"data": 2, "fsdp": 2, "model": 2}, 4),
}


def host(tree_):
    return jax.tree.map(np.array, tree_)


def largest(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


def build(tx, shape=None, microbatches=1, **options):
    plan = None if shape is None else mesh.plan(shape, toy.RULES)
    start = {k: options.pop(k) for k in ("trainable",) if k in options}
    state = step.init(jax.random.key(0), toy.MODEL, tx, plan, **start)
    return state, step.make(toy.ce, tx, plan, microbatches=microbatches, **options)


def trained(tx, shape=None, microbatches=1, **options):
    state, train = build(tx, shape, microbatches, **options)
    for number in range(STEPS):
        state, _ = train(state, toy.batch(number))
    assert train.compiles == 1
    return state


WHOLE = {}


def whole(name):
    """Parameters after training on one device with whole batches."""
    if name not in WHOLE:
        WHOLE[name] = host(trained(METHODS[name]()).params)
    return WHOLE[name]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", METHODS)
def test_every_split_gives_the_same_parameters_and_one_program(name, split):
    assert largest(host(trained(METHODS[name](), *SPLITS[split]).params), whole(name)) < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_it_differs_from_the_base_and_bf16_stays_near(name):
    assert largest(whole(name), host(trained(ADAMW).params)) > 1e-4
    state = trained(METHODS[name](), compute_dtype="bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    assert largest(host(state.params), whole(name)) < 2 * STEPS * 1e-2


def test_frozen_leaves_are_neither_perturbed_nor_moved():
    state = trained(METHODS["esam"](), trainable=("head/.*",))
    first = step.init(jax.random.key(0), toy.MODEL, ADAMW)
    assert set(state.params) == {"head"}
    assert largest(host(state.frozen["layers"]), host(first.params["layers"])) == 0
    assert largest(host(state.params["head"]), host(first.params["head"])) > 1e-3


def test_inside_partition_only_its_own_leaves_are_perturbed():
    def labels(params):
        return {k: jax.tree.map(lambda _, own=k == "head": own, v) for k, v in params.items()}

    tx = optax.partition({True: METHODS["esam"](), False: optax.set_to_zero()}, labels)
    frozen = trained(METHODS["esam"](), trainable=("head/.*",))
    state = trained(tx)
    assert largest(host(state.params["head"]), host(frozen.params["head"])) < 1e-5


@pytest.mark.parametrize("name", ["esam", "selective"])
def test_saved_and_restored_it_goes_on_bitwise(name, tmp_path):
    tx, shape = METHODS[name](), {"data": 4, "model": 2}
    state, train = build(tx, shape)
    for number in range(2):
        state, _ = train(state, toy.batch(number))
    with checkpoint.Checkpoints(tmp_path / "c", manifest={}) as saved:
        saved.save(state, {"batch": 2})
        saved.wait()
        restored, _ = saved.restore(step.abstract(toy.MODEL, tx, mesh.plan(shape, toy.RULES)))
    ends = []
    for start in (restored, state):
        for number in (2, 3):
            start, _ = train(start, toy.batch(number))
        ends.append(host(start.params))
    assert largest(*ends) == 0


def test_selective_masks_lie_where_their_parameters_do():
    state, train = build(METHODS["selective"](), {"data": 4, "model": 2})
    state, _ = train(state, toy.batch(0))
    masks = state.opt_state[0].mask["layers"]
    for mask, leaf in zip(
        jax.tree.leaves(masks), jax.tree.leaves(state.params["layers"]), strict=True
    ):
        assert mask.dtype == bool
        assert mask.sharding == leaf.sharding


def test_a_cheaper_first_gradient_is_climbed_by():
    half = host(trained(METHODS["esam"](), ascent=Ascent(fraction=0.5)).params)
    assert 1e-5 < largest(half, whole("esam")) < 2 * STEPS * 1e-2
    same = host(trained(METHODS["esam"](), ascent=Ascent()).params)
    assert largest(same, whole("esam")) < 1e-5


def test_the_second_gradient_costs_its_share():
    """FLOPs of one program: a quarter of the rows, and the forward passes for the choice: two, or
    one where the first pass tells its rows apart."""

    flops = {}
    for name, tx in {
        "adamw": ADAMW,
        "sam": optim.sam(ADAMW, 0.05),
        "esam": esam(ADAMW, 0.05, gamma=0.25),
    }.items():
        state, train = build(tx)
        flops[name] = train.compile(state, toy.batch(0)).cost_analysis()["flops"]
    assert flops["adamw"] < flops["esam"] < flops["adamw"] + 1.4 * (flops["sam"] - flops["adamw"])

    def made(objective):
        tx = esam(ADAMW, 0.05, gamma=0.25)
        state = step.init(jax.random.key(0), toy.MODEL, tx)
        train = step.make(objective, tx)
        return train.compile(state, toy.batch(0)).cost_analysis()["flops"]

    forward = (made(toy.dropped) - made(toy.told)) / (flops["sam"] - flops["adamw"])
    assert 0.2 < forward < 0.5
