"""Modular prompts: how they mix, where they act, what a new task takes over."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import tree
from steppe.models.overlays import added_prompt, compose, mp2, plugat, prompt
from steppe.models.sites import SiteContext

from .conftest import TINY
from .test_decoder_decode import CONFIGS, check, made
from .test_overlays import BERT, KEY, MODEL, moved, plain
from .test_seq2seq import tiny as encoder_decoder

WORDS = (7, 9, 11)


def small(**options):
    known = {"modules": 4, "length": 3, "intrinsic": 5, "ids": WORDS}
    return mp2.overlay(**{**known, **options})


def test_counts_on_a_large_encoder():
    shapes = dataclasses.replace(BERT, width=1024, heads=16, layers=24).build().abstract()
    for deep, layers in ((False, 1), (True, 24)):
        overlay = mp2.overlay(deep=deep, tasks=38)
        delta = jax.eval_shape(lambda o=overlay: o.init(KEY, shapes))
        own = 8 * 300 + 300 * 50 * 1024 + 38 * 8
        assert tree.count(delta) == layers * own + 50 * 1024  # and the words, which never train
    adapted = jax.eval_shape(lambda: mp2.overlay(intrinsic=0).init(KEY, shapes))
    assert tree.count(adapted["prompt"]["router"]) == 8


def test_gates():
    rng = np.random.default_rng(0)
    p = rng.normal(size=(4, 3, 2)).astype(np.float32)
    own = {"modules": jnp.asarray(p)}
    only = mp2.gates(jnp.array([[-np.inf, np.inf, -np.inf, -np.inf]]))
    np.testing.assert_array_equal(mp2.mix(only, own, 3)[0], p[1])
    equal = mp2.gates(jnp.full((1, 4), 0.7))
    np.testing.assert_allclose(mp2.mix(equal, own, 3)[0], p.mean(0), atol=1e-6)
    w = rng.normal(size=(5, 4))
    g = 1 / (1 + np.exp(-w))
    got = mp2.gates(jnp.asarray(w, jnp.float32))
    np.testing.assert_allclose(got, g / g.sum(-1, keepdims=True), atol=1e-6)
    z, a = rng.normal(size=(4, 5)), rng.normal(size=(5, 6))
    own = {"z": jnp.asarray(z, jnp.float32), "a": jnp.asarray(a, jnp.float32)}
    wanted = np.einsum("bk,knd->bnd", got, (z @ a).reshape(4, 3, 2))
    np.testing.assert_allclose(mp2.mix(got, own, 3), wanted, atol=1e-5)


def test_relaxed_coins():
    w = jnp.array([-1.0, 0.0, 2.0])
    logits = jnp.broadcast_to(w, (100_000, 3))
    cold = np.asarray(mp2.relaxed_bernoulli(KEY, logits, 1e-4))
    chance = 1 / (1 + np.exp(-np.asarray(w)))
    error = 3 * np.sqrt(chance * (1 - chance) / len(cold))
    assert (np.abs((cold > 0.5).mean(0) - chance) < error).all()
    assert ((cold < 1e-3) | (cold > 1 - 1e-3)).mean() > 0.99
    # At tau = 1, by quadrature over u in place of draws.
    u = (np.arange(200_000) + 0.5) / 200_000
    mean = (1 / (1 + np.exp(-(np.asarray(w)[:, None] + np.log(u) - np.log1p(-u))))).mean(1)
    warm = np.asarray(mp2.relaxed_bernoulli(KEY, logits, 1.0))
    assert (np.abs(warm.mean(0) - mean) < 3 * warm.std(0) / np.sqrt(len(warm))).all()

    def total(x):  # through fixed noise
        return mp2.relaxed_bernoulli(KEY, x, 0.5).sum()

    step = 1e-2
    difference = [(total(w.at[i].add(step)) - total(w.at[i].add(-step))) / step / 2 for i in (0, 2)]
    np.testing.assert_allclose(jax.grad(total)(w)[jnp.array([0, 2])], difference, rtol=2e-2)


@pytest.mark.parametrize("deep", [False, True])
def test_prompts_of_nothing_are_words_in_the_text(deep, tiny, batch):
    _, params = tiny
    overlay = small(deep=deep)
    delta = overlay.init(KEY, params)
    table = np.asarray(params["embed"]["word"]["table"])
    np.testing.assert_array_equal(delta["words"], table[list(WORDS)])
    none = mp2.with_intrinsic(delta, jnp.zeros((4, 5) if deep else 5))
    longer = {
        "input_ids": np.insert(batch["input_ids"], [1, 1, 1], WORDS, axis=1),
        "attention_mask": np.insert(batch["attention_mask"], [1, 1, 1], 1, axis=1),
        "token_type_ids": np.insert(
            batch["token_type_ids"], [1, 1, 1], batch["token_type_ids"][:, 1:2], axis=1
        ),
    }
    bound = overlay.bind(MODEL)
    call = jax.jit(
        lambda d: bound.apply({"base": params, "overlay": d}, batch, all_hidden=True).hidden
    )
    wanted = jax.jit(lambda: MODEL.apply(params, longer, all_hidden=True).hidden)()
    first = call(none)
    np.testing.assert_allclose(first, wanted, atol=1e-6)
    # The prompt of one layer moves what comes after its input, at its own columns first.
    layer = 2 if deep else 0
    zeros = jnp.zeros((4, 5)).at[layer].set(200.0) if deep else jnp.full(5, 200.0)
    second = call(mp2.with_intrinsic(none, zeros))
    if deep:
        np.testing.assert_array_equal(second[: layer + 1], first[: layer + 1])
        assert np.abs(second[layer + 1] - first[layer + 1]).max() > 1e-4
    else:
        changed = np.abs(np.asarray(second[0] - first[0])).max((0, 2)) > 0
        np.testing.assert_array_equal(np.flatnonzero(changed), [1, 2, 3])


def test_where_all_rows_are_one_the_router_makes_no_difference(tiny, batch):
    _, params = tiny
    overlay = small(deep=True, tasks=3)
    delta = moved(overlay, params, by=0.7)
    start = mp2.intrinsic_start(delta, 1)
    own = delta["layers"]["resid"]
    weights = mp2.gates(own["router"][:, 1])
    np.testing.assert_allclose(start, np.einsum("lk,lkr->lr", weights, own["z"]), atol=1e-6)
    flat = mp2.with_intrinsic(delta, start)
    bound = overlay.bind(MODEL)
    call = jax.jit(
        lambda d, ids: (
            bound.apply({"base": params, "overlay": d}, {**batch, "task_ids": ids}).logits
        )
    )
    mixed = call(delta, jnp.array([0, 1, 2, 1]))
    one = call(delta, jnp.array([1, 1, 1, 1]))
    np.testing.assert_allclose(mixed[jnp.array([1, 3])], one[jnp.array([1, 3])], atol=1e-6)
    assert np.abs(mixed[0] - one[0]).max() > 1e-5
    np.testing.assert_allclose(call(flat, jnp.array([0, 1, 2, 1])), one, atol=1e-5)
    assert np.isnan(call(delta, jnp.array([3, -1, 0, 0]))[:2]).all()
    # A new task that copies a router begins as that task, its prompts free.
    adapted = mp2.adapt(delta, KEY, task=1)
    assert adapted["layers"]["resid"]["router"].shape == (4, 1, 4)
    alone = small(deep=True, intrinsic=0).bind(MODEL)
    got = jax.jit(lambda d: alone.apply({"base": params, "overlay": d}, batch).logits)(adapted)
    np.testing.assert_allclose(got, one, atol=1e-5)
    fresh = mp2.adapt(delta, KEY)["layers"]["resid"]["router"]
    assert 0 < np.abs(fresh).max() <= 1e-3
    with pytest.raises(ValueError, match=r"task must be in 0..2, got 3"):
        mp2.adapt(delta, KEY, task=3)


def test_gates_are_drawn_in_training_alone(tiny):
    _, params = tiny
    own = jax.tree.map(lambda a: 100 * a[0], small(deep=True).init(KEY, params)["layers"]["resid"])
    x = jnp.zeros((2, 6, 16))

    def run(sample, **options):
        site = small(deep=True, sample=sample).sites({"words": None, "layers": {"resid": own}})
        context = SiteContext(**options)
        return site["resid"].fn(own, x, lambda y: y, context)

    drawn = {"rng": jax.random.key(1), "train": True}
    found = jax.jit(
        lambda: [
            run(True),
            run(True, **{**drawn, "train": False}),
            run(False, **drawn),
            run(True, **drawn),
            run(True, **{**drawn, "rng": jax.random.key(2)}),
        ]
    )()
    still, evaluated, never, first, second = map(np.asarray, found)
    for same in (evaluated, never):
        np.testing.assert_array_equal(same, still)
    assert np.abs(first - still).max() > 1e-3
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(first[0], first[1])  # one draw for all rows of a task
    assert not first[:, [0, 4, 5]].any()


def test_its_words_never_train(tiny):
    _, params = tiny
    bound = small(deep=True).bind(MODEL, frozen=params)
    live, still = tree.split(bound.abstract(), bound.trainable)
    assert set(live["overlay"]) == {"layers"}
    assert set(still["overlay"]) == {"words"}


def test_in_a_decoder_that_generates():
    model, params = made(CONFIGS["gpt2"])
    overlay = small(deep=True, first=0)
    delta = jax.tree.map(lambda a: 20 * a, moved(overlay, params))
    check(overlay.bind(model), {"base": params, "overlay": delta}, atol=5e-5)


def test_without_anything_attached_nothing_changes(tiny, batch):
    _, params = tiny
    host = small(tasks=2).around(MODEL)
    got = jax.jit(lambda p: host.apply(p, batch).logits)(params)
    np.testing.assert_array_equal(got, plain(params, batch))
    assert "mp2" in host.sites
    assert host.decode is None


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: mp2.overlay(modules=0), "modules, length and tasks must be >= 1"),
        (lambda: mp2.overlay(temperature=0), "temperature must be > 0"),
        (lambda: mp2.overlay(temperature=float("nan")), "must be > 0 and finite, got nan"),
        (lambda: small().bind(CONFIGS["gpt2"].build()), "use first=0 for a decoder"),
        (lambda: abstract(small(tasks=2), [0, 2]), r"'task_ids'\] names task 2, but tasks=2"),
        (lambda: abstract(small(tasks=2), [0, -1]), "names task -1"),
        (
            lambda: abstract(compose(plugat.overlay(mode="input", length=1), small())),
            "another overlay puts rows in front",
        ),
        (
            lambda: abstract(compose(added_prompt.overlay(length=1, ids=(3,)), small())),
            "another overlay puts rows in front",
        ),
        (lambda: mp2.overlay(first=2), "first must be 0 or 1, got 2"),
        (lambda: mp2.overlay(length=2, ids=WORDS), "ids must name length=2 tokens, got 3"),
        (lambda: mp2.overlay().init(KEY, shapes()), "vocabulary of 50 tokens, got 1000"),
        (
            lambda: mp2.overlay(length=19, ids=range(19)).init(KEY, shapes()),
            "length=19 leaves the text none of the model's 20 positions",
        ),
        (lambda: small().init(KEY, encoder_decoder("t5").params), "of one stack of layers"),
        (lambda: abstract(small(tasks=2)), "must hold 'task_ids', integers"),
        (
            lambda: abstract(compose(small(), prompt.overlay(length=1))),
            "another overlay puts rows in front",
        ),
        (
            lambda: abstract(compose(prompt.overlay(length=1), small())),
            "another overlay puts rows in front",
        ),
    ],
)
def test_bad_input(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def abstract(overlay, tasks=None):
    bound = overlay.bind(MODEL)
    ids = {"input_ids": np.ones((2, 4), np.int32)}
    if tasks is not None:
        ids["task_ids"] = np.array(tasks, np.int32)
    return jax.eval_shape(lambda p: bound.apply(p, ids), bound.abstract())


def shapes():
    return TINY.build().abstract()
