"""Every overlay under FSAM: only the overlay climbs, by its own gradient, and the base stays."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from steppe import optim
from steppe.launch.overlays import KNOWN
from steppe.models import tree
from steppe.models.overlays import (
    adapter,
    added_prompt,
    bitfit,
    compacter,
    ia3,
    idpg,
    lora,
    loramoe,
    lpt,
    mp2,
    o_lora,
    plugat,
    prefix,
    prompt,
    residual_prompt,
    unipelt,
)
from steppe.train import mesh, objectives, step

from .test_overlays import CONFIG

# By the names of `steppe overlays list`, without whatever is drawn anew in every step.
OVERLAYS = {
    "lora": lora.overlay(rank=2),
    "o-lora": o_lora.overlay(tasks=2, rank=2),
    "loramoe": loramoe.overlay(experts=2, rank=2, drop=0.0),
    "prefix": prefix.overlay(length=2, hidden=4),
    "prompt": prompt.overlay(length=2),
    "added-prompt": added_prompt.overlay(length=2, ids=(5, 6, 7)),
    "residual-prompt": residual_prompt.overlay(length=2, bottleneck=4),
    "houlsby": adapter.overlay(kind="houlsby", width=4),
    "pfeiffer": adapter.overlay(kind="pfeiffer", width=4),
    "parallel": adapter.overlay(kind="parallel", width=4),
    "ia3": ia3.overlay(),
    "bitfit": bitfit.overlay(),
    "compacter": compacter.overlay(n=2, reduction=4),
    "unipelt": unipelt.overlay(rank=2, length=2, reduction=4),
    "idpg": idpg.overlay(length=2, bottleneck=4, n=2, drop=0.0),
    "lpt": lpt.overlay(layer=1, length=2, bottleneck=4, kind="appg", drop=0.0),
    "mp2": mp2.overlay(modules=3, length=2, intrinsic=4, deep=True, sample=False, ids=(5, 6)),
    "plugat": plugat.overlay(length=2, hidden=4),
}
MODEL = dataclasses.replace(CONFIG, layers=2).build()
# Where LoRA's loss bends most, a weight's last bit moves a gradient by 1e-5: small steps.
ROWS, RATE, RHO, SHARE = 16, 0.1, 0.5, 0.3
SGD = optax.sgd(RATE)
FSAM = optim.fsam(SGD, RHO, keep_ratio=SHARE)
SPLITS = {
    "4 micro-batches": {"microbatches": 4},
    "8 devices": {"axes": {"data": 2, "fsdp": 2, "model": 2}},
}


def away(params, seed, by):
    """Every parameter away from its neutral initial value, where half of the gradients are 0."""
    keys = iter(jax.random.split(jax.random.key(seed), 200))
    return jax.tree.map(lambda x: x + by * jax.random.normal(next(keys), x.shape), params)


@functools.cache
def base():
    return away(jax.jit(MODEL.init)(jax.random.key(0)), 1, 0.4)


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    mask = (np.arange(8) < rng.integers(3, 9, (ROWS, 1))).astype(np.int32)
    return {
        "input_ids": rng.integers(1, 40, (ROWS, 8)).astype(np.int32) * mask,
        "attention_mask": mask,
        "labels": rng.integers(0, 2, ROWS).astype(np.int32),
    }


def host(params):
    return {path: np.array(leaf) for path, leaf in tree.flatten(params).items()}


@functools.cache
def start(name, head=False):
    """(bound model, all its parameters): what an overlay names trains, and the head if asked."""
    overlay = OVERLAYS[name]
    trains = (*overlay.trainable, *(("head/.*",) if head else ()))
    bound = overlay.bind(MODEL, frozen=base(), trainable=trains)
    delta = jax.jit(bound.init)(jax.random.key(2)).get("overlay", {})
    flat = tree.flatten(away(delta, 3, 0.1))
    fixed = {p: x for p, x in tree.flatten(delta).items() if tree.matches(p, overlay.fixed)}
    return bound, {"base": base(), "overlay": tree.unflatten({**flat, **fixed})}


def train(name, tx=FSAM, *, head=False, axes=None, **options):
    """The state after one step of the library."""
    bound, params = start(name, head)
    plan = None if axes is None else mesh.plan(axes, bound.axes)
    state = step.init(jax.random.key(4), bound, tx, plan, params=params)
    run = step.make(objectives.for_task(bound, "classification"), tx, plan, **options)
    return run(state, batch())[0]


@functools.cache
def one(name):
    return train(name)


@functools.cache
def slope(name, head=False):
    """(what trains, its gradient of the mean cross entropy anywhere), both by path."""
    bound, params = start(name, head)
    own, frozen = tree.split(params, bound.trainable)
    labels = batch()["labels"]

    @jax.jit
    def gradient(own):
        def loss(own):
            logits = bound.apply(tree.merge(own, frozen), batch()).logits
            return -jax.nn.log_softmax(logits)[np.arange(ROWS), labels].mean()

        return jax.grad(loss)(own)

    return host(own), lambda flat: host(gradient(tree.unflatten(flat)))


def climbed(own, gradient, rho=RHO, share=SHARE):
    """(mask, gradient at w + e) of FSAM over all of ``own``, written out."""
    g = gradient(own)
    scores = np.concatenate([x.ravel() ** 2 for x in g.values()])
    falling = np.sort(scores)[::-1]
    count = int(share * scores.size)
    # The share must end between two scores that no rounding can turn round.
    assert share == 1 or falling[count - 1] > (1 + 1e-4) * falling[count]
    mask = {path: x**2 >= falling[count - 1] for path, x in g.items()}
    assert sum(m.sum() for m in mask.values()) == count
    norm = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in g.values()))
    there = {p: (w + mask[p] * rho * g[p] / norm).astype(np.float32) for p, w in own.items()}
    return mask, gradient(there)


def descended(own, g):
    return {path: w - RATE * g[path] for path, w in own.items()}


def largest(a, b):
    assert a.keys() == b.keys()
    return max(np.abs(a[path] - b[path]).max() for path in a)


def test_every_overlay_that_trains_has_a_row():
    assert set(OVERLAYS) == set(KNOWN) - {"prefix-fixed"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_step_climbs_on_the_largest_scores_of_the_overlay_alone(name):
    state = one(name)
    own, gradient = slope(name)
    mask, g = climbed(own, gradient)
    found = host(state.params)
    apart = largest(found, descended(own, g))
    assert apart < 1e-5
    for path, leaf in tree.flatten(state.opt_state.mask).items():
        np.testing.assert_array_equal(leaf, mask[path], err_msg=path)
    # What is compared differs from a plain step and from one that perturbs everything.
    for other in (gradient(own), climbed(own, gradient, share=1)[1]):
        apart = largest(found, descended(own, other))
        assert apart > 1e-4


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_base_stays_to_the_bit(name):
    state = one(name)
    _, params = start(name)
    also = [f"base/(?:{p})" for p in OVERLAYS[name].trainable]
    kept = {p: x for p, x in host(params).items() if p.startswith("base/")}
    kept = {p: x for p, x in kept.items() if not tree.matches(p, also)}
    assert {"base/layers/attn/q/kernel", "base/head/out/kernel"} <= set(kept)
    after = host(tree.merge(state.params, state.frozen))
    assert set(after) == set(host(params))
    for path, leaf in kept.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["lora", "unipelt"])
def test_every_split_of_the_batch_is_the_batch(name, split):
    state = train(name, **SPLITS[split])
    wanted = one(name)
    apart = largest(host(state.params), host(wanted.params))
    assert apart < 1e-5
    masks = host(wanted.opt_state.mask)
    for path, leaf in tree.flatten(state.opt_state.mask).items():
        np.testing.assert_array_equal(leaf, masks[path], err_msg=path)


@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_a_head_that_trains_beside_it_is_not_perturbed(name):
    """``optax.partition``: norm, share and displacement are those of the overlay's leaves."""

    def labels(params):
        return {k: jax.tree.map(lambda _, k=k: k, v) for k, v in params.items()}

    tx = optax.partition({"overlay": FSAM, "base": SGD}, labels)
    own, gradient = slope(name, head=True)
    head = {p: w for p, w in own.items() if p.startswith("base/")}
    delta = {p: w for p, w in own.items() if p.startswith("overlay/")}
    assert set(head) == {"base/head/out/kernel", "base/head/out/bias"}
    _, g = climbed(delta, lambda at: {p: x for p, x in gradient({**head, **at}).items() if p in at})
    plain = gradient(own)
    wanted = descended(own, {**{p: plain[p] for p in head}, **g})
    found = host(train(name, tx, head=True).params)
    apart, other = largest(found, wanted), largest(found, descended(own, climbed(own, gradient)[1]))
    assert apart < 1e-5
    assert other > 1e-4
