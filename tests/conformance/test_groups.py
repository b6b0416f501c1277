"""m-sharpness inside the training step: groups of rows that climb by themselves."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe import optim
from steppe.optim import perturbation
from steppe.train import mesh, step
from steppe.train.ascent import Ascent
from steppe.train.types import components

from .test_ascent import ADAMW, SGD, build, host, largest, toy, trained


def by_hand(size, objective=toy.ce, perturb=None, rho=0.05, steps=3):
    """m-SAM as a Python loop over the groups of consecutive rows."""
    perturb = perturb or perturbation.l2()
    params = toy.init(jax.random.split(jax.random.key(0))[0])
    opt = ADAMW.init(params)

    def loss(params, rows, weights):
        totals, own = components(objective(params, rows, None))
        weights = own if weights is None else weights
        return sum(totals[k] / jnp.where(weights[k] == 0, 1, weights[k]) for k in totals), own

    grad = jax.jit(jax.grad(loss, has_aux=True))
    for number in range(steps):
        batch = toy.batch(number)
        groups = [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, toy.ROWS, size)]
        first = [grad(params, rows, None) for rows in groups]
        weights = {k: sum(own[k] for _, own in first) for k in first[0][1]}
        total = jax.tree.map(jnp.zeros_like, params)
        for rows, (g, _) in zip(groups, first):
            there = jax.tree.map(jnp.add, params, perturb(g, params, rho))
            total = jax.tree.map(jnp.add, total, grad(there, rows, weights)[0])
        updates, opt = ADAMW.update(total, opt, params)
        params = optax.apply_updates(params, updates)
    return host(params)


LOOPS = {}


def loop(size, objective=toy.ce):
    if (size, objective) not in LOOPS:
        LOOPS[size, objective] = by_hand(size, objective)
    return LOOPS[size, objective]


DEVICES = {
    "8": ({"data": 8}, 1),
    "8, 4 micro-batches": ({"data": 8}, 4),
    "2x2x2": ({"data": 2, "fsdp": 2, "model": 2}, 1),
    "2x4": ({"data": 2, "model": 4}, 1),
}


@pytest.mark.parametrize("split", DEVICES)
def test_every_device_climbs_by_its_own_rows(split):
    """A device is a data shard, whatever lies along the model axis; micro-batches add up first."""
    shape, microbatches = DEVICES[split]
    shards = shape["data"] * shape.get("fsdp", 1)
    found, _ = trained(optim.sam(ADAMW, 0.05, ascent="device"), shape, microbatches)
    wanted = loop(toy.ROWS // shards)
    assert largest(found, wanted) < 1e-5
    assert largest(found, loop(toy.ROWS)) > 1e-4  # the ascent of the whole batch is another one


GROUPS = {
    "one device": (None, 1, 4),
    "groups in micro-batches": (None, 4, 16),
    "local groups in micro-batches": ({"data": 4, "model": 2}, 4, 4),
    "groups over devices": ({"data": 8}, 2, 16),
}


@pytest.mark.parametrize("split", GROUPS)
def test_groups_are_consecutive_rows_however_the_batch_is_split(split):
    shape, microbatches, size = GROUPS[split]
    found, _ = trained(optim.sam(ADAMW, 0.05, ascent=size), shape, microbatches)
    assert largest(found, loop(size)) < 1e-5


def test_components_of_their_own_weights_and_other_balls():
    found, _ = trained(optim.sam(ADAMW, 0.05, ascent="device"), {"data": 8}, objective=toy.two)
    assert largest(found, loop(4, toy.two)) < 1e-5
    found, _ = trained(optim.asam(ADAMW, 0.5, ascent=8))
    wanted = by_hand(8, perturb=perturbation.adaptive(), rho=0.5)
    assert largest(found, wanted) < 1e-5
    whole, _ = trained(optim.gsam(ADAMW, 0.05, ascent=toy.ROWS))
    assert largest(whole, trained(optim.gsam(ADAMW, 0.05))[0]) < 1e-6


@pytest.mark.parametrize("split", [({"data": 8}, 1), ({"data": 2, "fsdp": 4}, 4)])
def test_groups_under_one_mask(split):
    """FSAM's mask is that of the whole batch; what it masks are the perturbations of the groups."""
    state, train = build(optim.fsam(ADAMW, 0.05, keep_ratio=0.3))
    state, _ = train(state, toy.batch(0))
    mask = host(state.opt_state.mask)

    def masked(g, w, rho):
        return jax.tree.map(lambda e, m: jnp.where(m, e, 0), perturbation.l2()(g, w, rho), mask)

    tx = optim.fsam(ADAMW, 0.05, keep_ratio=0.3, ascent="device")
    state, train = build(tx, *split)
    for number in range(3):
        state, _ = train(state, toy.batch(number))
    for a, b in zip(*map(jax.tree.leaves, (host(state.opt_state.mask), mask)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert largest(host(state.params), by_hand(4, perturb=masked)) < 1e-5
    assert largest(host(state.params), loop(4)) > 1e-4
    whole, _ = trained(optim.fsam(ADAMW, 0.05, keep_ratio=1.0, ascent=4))
    assert largest(whole, loop(4)) < 1e-5


def test_one_group_is_the_whole_batch_and_devices_without_a_mesh_too():
    whole, metrics = trained(optim.sam(ADAMW, 0.05))
    for groups in (toy.ROWS, "device"):
        found, same = trained(optim.sam(ADAMW, 0.05, ascent=groups))
        assert largest(found, whole) < 1e-6
        assert same == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("shape", [None, {"data": 8}])
def test_groups_cost_two_gradients_and_report_the_clean_loss(shape):
    """Loss and norm of the whole batch come out of the groups' own first passes."""
    state, train = build(optim.sam(ADAMW, 0.05), shape)
    _, wanted = train(state, toy.batch(0))
    state, train = build(optim.sam(ADAMW, 0.05, ascent=2), shape)
    text = train.lower(state, toy.batch(0)).compile().as_text()
    _, found = train(state, toy.batch(0))
    for name, pair in wanted.items():
        np.testing.assert_allclose(found[name], pair, rtol=1e-5)
    bodies = [
        part
        for part in re.split(r"\n(?=%\S+ \(|ENTRY)", text)
        if part.split(" ")[0] in re.findall(r"body=(%[^\s,]+)", text)
    ]
    assert bodies
    # No pass over the whole batch beside those of the groups: all products are inside loops.
    assert not re.search(r" dot\(", text[text.index("ENTRY") :])
    # Local work: only the weights and the last sums are exchanged, outside of the loops.
    moves = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\("
    assert not any(re.search(moves, body) for body in bodies)
    assert shape is None or re.search(r" all-reduce(-start)?\(", text[text.index("ENTRY") :])


@pytest.mark.parametrize("groups", ["device", 4])
def test_groups_with_a_schedule_frozen_leaves_partition_and_dropout(groups):
    tx = optim.sam(ADAMW, lambda t: jnp.where(t < 1, 0.0, 0.05), ascent=groups)
    base, _ = trained(ADAMW, {"data": 8}, steps=1)
    found, _ = trained(tx, {"data": 8}, steps=1)
    assert largest(found, base) < 1e-6
    after, _ = trained(tx, {"data": 8}, steps=3)
    assert largest(after, trained(ADAMW, {"data": 8}, steps=3)[0]) > 1e-4

    def labels(params):
        return {k: jax.tree.map(lambda _, own=k == "head": own, v) for k, v in params.items()}

    inner = optim.sam(ADAMW, 0.05, ascent=groups)
    tx = optax.partition({True: inner, False: optax.set_to_zero()}, labels)
    parted, _ = trained(tx, {"data": 8})
    frozen, _ = trained(inner, {"data": 8}, trainable=("head/.*",))
    assert largest(parted["head"], frozen["head"]) < 1e-6
    # Dropout: both passes of a group draw the same, or a radius of nearly 0 would not be one.
    plain, _ = trained(optim.sam(SGD, 1e-7, ascent=groups), {"data": 8}, objective=toy.dropped)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(plain))


def test_groups_see_what_an_objective_closes_over():
    """A teacher's table that lies on the mesh, say."""
    teacher = toy.init(jax.random.key(9))

    def distilled(where):
        table = where["embed"]["table"]

        def objective(params, batch, key):
            out = toy.ce(params, batch, key)
            gap = params["embed"]["table"][batch["input_ids"]] - table[batch["input_ids"]]
            return out._replace(total=out.total + (gap.mean(-1) ** 2 * batch["label_mask"]).sum())

        return objective

    plan = mesh.plan({"data": 8}, toy.RULES)
    tx = optim.sam(ADAMW, 0.05, ascent="device")
    found, _ = trained(tx, {"data": 8}, objective=distilled(plan.place(teacher)))
    assert largest(found, by_hand(4, distilled(teacher))) < 1e-5


def test_groups_keep_the_row_losses_of_bfloat16_and_clipping():
    tx = optim.sam(SGD, 0.05, ascent="device")
    found, metrics = trained(tx, {"data": 8}, steps=1, clip_norm=0.01, compute_dtype="bfloat16")
    first = host(step.init(jax.random.key(0), toy.MODEL, tx).params)
    moved = jax.tree.map(lambda a, b: (a - b) / 0.1, first, found)
    assert float(optax.global_norm(moved)) == pytest.approx(0.01, rel=1e-3)
    assert metrics["grad_norm"] > 0.01


def test_bad_groups():
    state, train = build(optim.sam(ADAMW, 0.05, ascent=5))
    with pytest.raises(ValueError, match=r"ascent=5 does not divide the 32 rows"):
        train(state, toy.batch(0))
    state, train = build(optim.sam(ADAMW, 0.05, ascent=4), ascent=Ascent(fraction=0.5))
    with pytest.raises(ValueError, match=r"leave out ascent= of train\.step\.make"):
        train(state, toy.batch(0))
