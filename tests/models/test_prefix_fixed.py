"""Prefixes of several tasks on one network: how they combine, what an update leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import tree
from steppe.models.decoder import DecoderConfig
from steppe.models.overlays import (
    compacter,
    compose,
    ia3,
    lora,
    o_lora,
    prefix,
    prefix_fixed,
)

from .conftest import TINY
from .test_overlays import BERT, KEY, MODEL, hidden

LENGTHS = (2, 3, 1)


@pytest.fixture(scope="module")
def prefixes():
    """Three of different lengths, as large as the network's own keys."""
    keys = jax.random.split(KEY, 3)
    return [
        prefix.overlay(length=n, std=0.5).init(k, TINY.build().abstract())
        for n, k in zip(LENGTHS, keys, strict=True)
    ]


@pytest.fixture(scope="module")
def vectors(tiny):
    """r(x) under any prefix, one program a shape."""
    _, params = tiny
    call = jax.jit(lambda p, b: prefix_fixed.represent(MODEL, params, p, b, pool="mean"))
    return lambda prefixes, batch: np.asarray(call(prefixes, batch))


def attend(q, blocks):
    """sum_k Z_k o_k / sum_k Z_k, and every Z_k; a block is (keys, values)."""
    z = [np.exp(k @ q).sum() for k, _ in blocks]
    out = [(np.exp(k @ q)[:, None] * v).sum(0) for k, v in blocks]
    return sum(out) / sum(z), np.array(z)


def test_attention_is_the_blocks_weighted_by_themselves(prefixes):
    """The formula of the module against the site function and the softmax of the whole."""
    rng = np.random.default_rng(0)
    q, keys, values = rng.normal(size=16), rng.normal(size=(7, 16)), rng.normal(size=(7, 16))
    site = "attn.kv_prefix"
    layer = [{n: np.asarray(p["layers"][site][n][1]) for n in "kv"} for p in prefixes]
    stacked = prefix_fixed.stack_prefixes(prefixes)["layers"][site]
    none = jnp.zeros((1, 0, 1, 16))
    from steppe.models.sites import SiteContext

    k, v = prefix.in_front(
        {n: stacked[n][1] for n in "kv"}, None, lambda _: (none, none), SiteContext()
    )
    k = np.concatenate([k[0, :, 0], keys])
    v = np.concatenate([v[0, :, 0], values])
    weights = np.exp(k @ q)
    whole = (weights / weights.sum()) @ v
    blocks = [(p["k"], p["v"]) for p in layer] + [(keys, values)]
    got, z = attend(q, blocks)
    np.testing.assert_allclose(got, whole, atol=1e-5)
    # One that stands there twice counts twice.
    twice, more = attend(q, [blocks[0], *blocks])
    np.testing.assert_allclose(more, [z[0], *z])
    assert np.abs(twice - got).max() > 1e-4


def test_the_order_makes_no_difference_and_an_update_touches_its_own_rows(prefixes, vectors, batch):
    everything = vectors(prefixes, batch)
    np.testing.assert_allclose(vectors(prefixes[::-1], batch), everything, atol=1e-5)
    assert np.abs(vectors([], batch) - everything).max() > 1e-2
    stacked = prefix_fixed.stack_prefixes(prefixes)
    assert prefix_fixed.length_of(stacked) == 6
    for number, one in enumerate(prefixes):
        taken = prefix_fixed.take_prefix(stacked, number, LENGTHS)
        jax.tree.map(np.testing.assert_array_equal, taken, one)
    left = prefix_fixed.drop_prefix(stacked, 1, LENGTHS)
    pair = prefix_fixed.stack_prefixes([prefixes[0], prefixes[2]])
    jax.tree.map(np.testing.assert_array_equal, left, pair)
    np.testing.assert_array_equal(vectors([left], batch), vectors([pair], batch))


def test_more_padding_changes_nothing(prefixes, vectors, batch):
    longer = {n: np.pad(v, ((0, 0), (0, 3))) for n, v in batch.items()}
    np.testing.assert_allclose(vectors(prefixes, longer), vectors(prefixes, batch), atol=1e-5)


def test_other_ways_to_combine(tiny, prefixes, vectors, batch):
    _, params = tiny
    pair = [prefixes[1], jax.tree.map(lambda a: 2 * a, prefixes[1])]
    mean = prefix_fixed.mean_prefixes(pair)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 1.5 * b), mean, prefixes[1])
    each = [vectors([one], batch) for one in pair]
    call = jax.jit(
        lambda how: [
            prefix_fixed.represent(MODEL, params, pair, batch, combine=how) for how in how
        ],
        static_argnums=0,
    )
    apart, side, means = call(("mean_repr", "concat_repr", "mean_kv"))
    np.testing.assert_allclose(apart, (each[0] + each[1]) / 2, atol=1e-6)
    np.testing.assert_allclose(side, np.concatenate(each, axis=1), atol=1e-6)
    np.testing.assert_allclose(means, vectors([mean], batch), atol=1e-6)


def test_the_overlay_is_fixed_and_is_the_representation(tiny, prefixes, vectors, batch):
    _, params = tiny
    overlay = prefix_fixed.overlay(lengths=LENGTHS, prefixes=prefixes)
    bound = overlay.bind(MODEL, frozen=params)
    assert bound.trainable == (r"base/(?:head/.*)",)
    delta = overlay.init(KEY, params)
    states = np.asarray(hidden(overlay, params, delta, batch))
    mask = batch["attention_mask"][..., None]
    wanted = (states * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(wanted, vectors(prefixes, batch), atol=1e-5)
    first = jax.jit(lambda: prefix_fixed.represent(MODEL, params, prefixes, batch, pool="first"))()
    np.testing.assert_allclose(first, states[:, 0], atol=1e-5)
    # Saved without its prefixes it is rebuilt by its lengths; beside others it stays fixed.
    again = prefix_fixed.overlay(**dict(overlay.settings))
    tree.same_structure(again.init(KEY, params), delta, ("rebuilt", "saved"))
    both = compose(overlay, lora.overlay(rank=2)).bind(MODEL, frozen=params)
    live, _ = tree.split(both.abstract(), both.trainable)
    assert set(live["overlay"]) == {"lora"}


def test_two_prefixes_in_one_mapped_run_are_those_of_two_runs(tiny, batch):
    """What ``stage 1`` is made of: a few steps on tasks of their own, heads thrown away."""
    _, params = tiny
    params = {**params, "layers": jax.tree.map(lambda a: a[:1], params["layers"])}
    plain = prefix.overlay(length=2)
    bound = plain.bind(dataclasses.replace(TINY, layers=1).build())

    def run(key, labels):
        def loss(delta):
            logits = bound.apply({"base": params, "overlay": delta}, batch).logits
            return -jax.nn.log_softmax(logits)[jnp.arange(4), labels].mean()

        def step(delta, _):
            return jax.tree.map(lambda p, g: p - 0.5 * g, delta, jax.grad(loss)(delta)), loss(delta)

        return jax.lax.scan(step, plain.init(key, params), length=3)

    keys = jax.random.split(KEY, 2)
    labels = jnp.array([[0, 1, 2, 0], [2, 2, 1, 0]])
    mapped, losses = jax.jit(jax.vmap(run))(keys, labels)
    assert (losses[:, -1] < losses[:, 0]).all()
    alone = jax.jit(run)
    for number in range(2):
        one, _ = alone(keys[number], labels[number])
        jax.tree.map(
            lambda a, b, n=number: np.testing.assert_allclose(a[n], b, atol=1e-5), mapped, one
        )


def test_what_an_update_costs():
    shapes = BERT.build().abstract()
    one = jax.eval_shape(lambda: prefix.overlay(length=10).init(KEY, shapes))
    ours, theirs = prefix_fixed.update_cost(one, shapes, (500, 300, 200), 1)
    assert ours == (12 * 2 * 10 * 768, 300)
    assert theirs == (tree.count(shapes), 1000)


def shapes():
    return TINY.build().abstract()


def one(length, model=TINY, **options):
    return prefix.overlay(length=length, **options).init(KEY, model.build().abstract())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: prefix_fixed.overlay(lengths=()), "lengths must be given, each >= 1"),
        (
            lambda: prefix_fixed.overlay(lengths=(3,), prefixes=[one(2)]),
            r"lengths=\(3,\) are not those of the prefixes, \(2,\)",
        ),
        (
            lambda: prefix_fixed.overlay(lengths=(2,), prefixes=[one(2)]).init(
                KEY, BERT.build().abstract()
            ),
            "shape mismatch at 'layers/attn.kv_prefix/k': the prefixes has",
        ),
        (
            lambda: prefix_fixed.overlay(attentions=("self",)).init(KEY, shapes()),
            "no attention 'self' in this model; there are attn",
        ),
        (lambda: prefix_fixed.stack_prefixes([]), "at least one, got none"),
        (lambda: prefix_fixed.stack_prefixes([one(2, hidden=3)]), "fold the network"),
        (lambda: prefix_fixed.length_of({}), "got nothing"),
        (
            lambda: prefix_fixed.stack_prefixes([one(1), jax.tree.map(lambda a: a[:2], one(1))]),
            "prefix 1 does not fit prefix 0",
        ),
        (lambda: prefix_fixed.mean_prefixes([one(1), one(2)]), r"of one length, got \[1, 2\]"),
        (lambda: prefix_fixed.drop_prefix(one(3), 0, (2, 2)), "add up to 4 rows, the stack has 3"),
        (lambda: prefix_fixed.take_prefix(one(3), 2, (2, 1)), "number must be in 0..1, got 2"),
        (
            lambda: prefix_fixed.represent(MODEL, {}, [], {}, combine="sum"),
            "combine must be one of concat, mean_kv",
        ),
        (
            lambda: prefix_fixed.represent(MODEL, {}, [], {}, pool="max"),
            "pool must be 'mean' or 'first'",
        ),
    ],
)
def test_bad_input(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_prefixes_of_another_width_are_refused(tiny, prefixes, batch):
    model, params = tiny
    half = jax.tree.map(lambda leaf: leaf[..., ::2], prefixes[0])
    with pytest.raises(ValueError, match="rows of"):
        prefix_fixed.represent(model, params, [half], batch)
    short = jax.tree.map(lambda leaf: leaf, prefixes[0])
    for site in short["layers"].values():
        site["v"] = site["v"][:, :-1]
    with pytest.raises(ValueError, match="as many keys as values"):
        prefix_fixed.represent(model, params, [short], batch)


def test_the_first_token_of_a_text_that_is_padded_in_front():
    config = DecoderConfig(
        "llama", vocab_size=20, width=8, layers=2, heads=2, ffn_width=16, positions=12
    )
    model = config.build()
    params = model.init(jax.random.key(0))
    text = {"input_ids": jnp.array([[5, 6, 7]]), "attention_mask": jnp.ones((1, 3), jnp.int32)}
    padded = {name: jnp.pad(column, ((0, 0), (2, 0))) for name, column in text.items()}
    one = prefix.overlay(length=2).init(jax.random.key(1), params)
    for pool in ("mean", "first"):
        plain, moved = (
            prefix_fixed.represent(model, params, [one], b, pool=pool) for b in (text, padded)
        )
        np.testing.assert_allclose(plain, moved, atol=1e-5)


def test_names_with_signs_keep_their_rules(tiny):
    """Composed once more, what is fixed stays fixed, and every leaf keeps its sharding rule."""
    model, params = tiny
    bank = compose(compose(lora.overlay(rank=2), o_lora.overlay(tasks=2, rank=2)), ia3.overlay())
    bound = bank.bind(model, frozen=params)
    paths = tree.paths({"overlay": jax.eval_shape(bank.init, jax.random.key(0), params)})
    live = [path for path in paths if tree.matches(path, bound.trainable)]
    assert any("/o-lora/" in path for path in live)
    assert not any("/bank/" in path for path in live)
    two = compose(lora.overlay(rank=2), compacter.overlay(plus=True, n=2, reduction=2))
    rules = two.bind(model, frozen=params).axes
    for path in tree.paths({"overlay": jax.eval_shape(two.init, jax.random.key(0), params)}):
        assert any(tree.matches(path, (pattern,)) for pattern, _ in rules)
