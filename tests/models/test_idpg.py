"""Prompts that a network makes of each text: counts, equations in float64, places, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import tree
from steppe.models.heads import HeadConfig
from steppe.models.model import Inputs
from steppe.models.overlays import compose, idpg, inside, prompt

from .conftest import TINY
from .test_decoder_decode import CONFIGS
from .test_overlays import (
    BERT,
    KEY,
    LOOPED,
    MODEL,
    SAME,
    first_input,
    gelu,
    moved,
    norm,
    one_layer,
)

T = 3


@pytest.mark.parametrize(
    ("overlay", "wanted"),
    [
        (idpg.overlay(kind="dnn"), 221_200),
        (idpg.overlay(), 137_232),
        (idpg.overlay(n=4, mode="first", feature="batch", width=300), 144_704),
        (
            idpg.overlay(multi=False, bottleneck=256),
            (1024 * 256 + 256 * 5120) // 16 + 2 * 16**3 + 256 + 5120,
        ),
        (idpg.overlay(kind="dnn", share="S"), 221_200 - 23 * 5 * 1024),
        (idpg.overlay(kind="dnn", share="L"), 24 * (1024 * 16 + 16 + 16 * 5120 + 5120)),
        (idpg.overlay(length=0), 0),
    ],
)
def test_counts_on_roberta_large(overlay, wanted):
    shapes = dataclasses.replace(BERT, width=1024, heads=16, layers=24).build().abstract()
    assert tree.count(jax.eval_shape(lambda: overlay.init(KEY, shapes))) == wanted


def test_initial_values():
    """A random prompt, and a small term that depends on the text."""
    shapes = dataclasses.replace(BERT, layers=2).build().abstract()
    delta = idpg.overlay(n=4).init(KEY, shapes)
    own = delta["generator"]
    for leaf in (own["down"]["a"], own["down"]["b"], own["up"]["a"], own["up"]["b"]):
        np.testing.assert_allclose(np.std(leaf), 0.05, rtol=0.2)
    assert not np.array_equal(own["down"]["a"], own["up"]["a"])
    rows = np.asarray(delta["layers"]["resid"])
    assert rows.shape == (2, 5, 768)
    assert -0.5 <= rows.min() < -0.49
    assert 0.49 < rows.max() <= 0.5
    dense = idpg.overlay(kind="dnn").init(KEY, shapes)["generator"]
    np.testing.assert_allclose(np.std(dense["up"]), 0.02, rtol=0.05)
    assert not dense["bias"].any()


def kron(own):
    if not isinstance(own, dict):
        return own
    return sum(np.kron(a, b) for a, b in zip(own["a"], own["b"], strict=True))


def made(own, rows, f):
    inner = gelu(f @ kron(own["down"]) + own["bias"])
    return (inner @ kron(own["up"])).reshape(len(f), *rows.shape) + rows


def layer_of(delta, layer):
    """(generator, b_2) of layer 0 (the input) to 3, in float64."""
    delta = jax.tree.map(lambda a: np.asarray(a, np.float64), delta)
    if "generator" not in delta:
        own = jax.tree.map(lambda a: a[layer], delta["layers"]["resid"])
        return own, own["rows"]
    rows = delta["prompt"] if "prompt" in delta else delta["layers"]["resid"][layer]
    return delta["generator"], rows


CASES = {
    "M, Kronecker, <s> of every layer": {"n": 2},
    "S, dense, words": {"kind": "dnn", "share": "S", "mode": "first", "feature": "words"},
    "L, Kronecker, features of the batch": {
        "n": 4,
        "share": "L",
        "mode": "first",
        "feature": "batch",
        "width": 12,
    },
    "the input alone": {"kind": "dnn", "multi": False},
}


@pytest.mark.parametrize("case", CASES)
def test_against_float64(case, tiny, batch):
    _, params = tiny
    options = CASES[case]
    overlay = idpg.overlay(length=T, bottleneck=8, **options)
    delta = moved(overlay, params, by=0.2)
    features = np.random.default_rng(1).normal(size=(4, 12)).astype(np.float32)
    given = {**batch, "features": features}
    bound = overlay.bind(MODEL)

    @jax.jit
    def run(delta):
        out = bound.apply({"base": params, "overlay": delta}, given)
        return out.logits, out.hidden

    logits, hidden = run(delta)
    mask = batch["attention_mask"] != 0
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["embed"])
    words = p["word"]["table"][batch["input_ids"]]
    f = {
        "pass": lambda: one_layer(params, first_input(params, batch), mask, SAME)[:, 0],
        "words": lambda: (words * mask[..., None]).sum(1) / mask.sum(1, keepdims=True),
        "batch": lambda: features.astype(np.float64),
    }[options.get("feature", "pass")]()
    words = np.concatenate([words[:, :1], made(*layer_of(delta, 0), f), words[:, 1:]], axis=1)
    types = batch["token_type_ids"]
    types = np.concatenate([types[:, :1], *[types[:, 1:2]] * T, types[:, 1:]], axis=1)
    x = norm(words + p["position"]["table"][:12] + p["type"]["table"][types], p["norm"])
    seen = np.concatenate([mask[:, :1], np.ones((4, T), bool), mask[:, 1:]], axis=1)
    for layer in range(4):
        if layer and options.get("multi", True):
            read = x[:, 0] if options.get("mode") != "first" else f
            x = x.copy()
            x[:, 1 : 1 + T] += made(*layer_of(delta, layer), read)
        x = one_layer(params, x, seen, SAME, [layer])
    np.testing.assert_allclose(np.asarray(hidden)[seen], x[seen], atol=3e-5)
    head = MODEL.parts.head(params, jnp.asarray(x, jnp.float32), Inputs(None, None, None, None))
    np.testing.assert_allclose(logits, head, atol=3e-5)


def test_a_generator_that_ends_in_nothing_is_a_static_prompt():
    own = {"down": jnp.ones((6, 4)), "bias": jnp.ones(4), "up": {
        "a": jnp.zeros((2, 2, 2)), "b": jnp.ones((2, 2, 3 * 8))
    }}  # fmt: skip
    rows = jax.random.normal(KEY, (6, 8))
    got = idpg.generate(own, rows, jax.random.normal(KEY, (5, 6)))
    np.testing.assert_array_equal(got, np.broadcast_to(rows, (5, 6, 8)))


def test_rows_inside_a_text():
    """At a column of all texts or of each, with positions, types and mask; and out again."""
    hidden = np.arange(2 * 4 * 1, dtype=np.float32).reshape(2, 4, 1)
    rows = -np.ones((2, 2, 1), np.float32)
    x = Inputs(
        jnp.asarray(hidden),
        np.array([[2, 3, 4, 5], [2, 3, 4, 1]]),  # RoBERTa counts from 2 on, padding has 1
        np.array([[0, 0, 1, 1], [0, 1, 1, 0]]),
        np.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
    )
    same = inside.inserted(x, rows, 1)
    each = inside.inserted(x, rows, jnp.array([1, 1]))
    for left, right in zip(same, each, strict=True):
        np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(same.positions[0], [2, 3, 4, 5, 6, 7])
    np.testing.assert_array_equal(same.hidden[0, :, 0], [0, -1, -1, 1, 2, 3])
    np.testing.assert_array_equal(same.types, [[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(same.mask, [[1] * 6, [1] * 5 + [0]])
    own = inside.inserted(x, rows, jnp.array([2, 4]))
    np.testing.assert_array_equal(own.hidden[..., 0], [[0, 1, -1, -1, 2, 3], [4, 5, 6, 7, -1, -1]])
    np.testing.assert_array_equal(own.positions, [[2, 3, 4, 5, 6, 7], [2, 3, 4, 1, 2, 3]])
    for at in (1, jnp.array([2, 4])):
        put = inside.inserted(x, rows, at)
        np.testing.assert_array_equal(inside.removed(put.hidden, 2, at), hidden)
        np.testing.assert_array_equal(inside.removed(put.mask, 2, at), x.mask)
        more = inside.added(put.hidden, jnp.full((2, 2, 1), 5.0), at)
        np.testing.assert_array_equal(inside.removed(more, 2, at), hidden)
        assert float(more.sum() - put.hidden.sum()) == 20
    with pytest.raises(ValueError, match=r"need an attention_mask \[batch, tokens\]"):
        inside.inserted(x._replace(mask=np.ones((2, 4, 4))), rows, 1)


def test_padding_behind_a_text_says_nothing_about_rows_that_follow_it():
    """Positions are counted on from the text's last token, whose type the rows have."""
    rows, types, mask = np.ones((1, 2, 1), np.float32), [[0, 1, 1, 0]], [[1, 1, 1, 0]]
    texts = [
        Inputs(jnp.zeros((1, n, 1)), *(np.array(a)[:, :n] for a in (positions, types, mask)))
        for positions in ([[2, 3, 4, 1]], [[0, 1, 2, 3]])  # RoBERTa's and BERT's
        for n in (3, 4)
    ]

    @jax.jit
    def run():
        return [[inside.inserted(x, rows, at) for at in (3, jnp.array([3]))] for x in texts]

    for text, both in zip(texts, run(), strict=True):
        for got in both:
            first = text.positions[0, 0]
            np.testing.assert_array_equal(got.positions[0, :5], first + np.arange(5))
            np.testing.assert_array_equal(got.types[0, :5], [0, 1, 1, 1, 1])
            np.testing.assert_array_equal(got.mask[0, :5], 1)


def test_places_of_the_prompt():
    ids = {"input_ids": np.array([[0, 5, 2, 2, 6, 2, 1], [0, 5, 5, 2, 1, 1, 1], [0] * 7])}
    assert idpg._column(ids, 0, 2) == 1
    for position, wanted in ((1, [2, 3, 1]), (2, [3, 4, 1]), (3, [5, 3, 1])):
        np.testing.assert_array_equal(idpg._column(ids, position, 2), wanted)


def test_heads_of_one_label_a_token_skip_the_prompt(tiny, batch):
    """With a prompt that nobody sees or hears, the logits are the base's, column by column."""
    config = dataclasses.replace(LOOPED, layers=1, types=0, head=HeadConfig("mlm"))
    model = config.build()
    params = jax.jit(model.init)(KEY)
    overlay = idpg.overlay(length=2, n=2, bottleneck=4, feature="words", position=1, separator=7)
    bound = overlay.bind(model)
    ids = {"input_ids": np.array([[1, 5, 7, 3], [1, 5, 3, 7]], np.int32)}
    full = {"base": params, "overlay": moved(overlay, params)}
    out = jax.jit(lambda p: bound.apply(p, ids))(full)
    assert out.logits.shape == (2, 4, 50)
    states = inside.removed(out.hidden, 2, jnp.array([2, 3]))
    head = model.parts.head(params, states, Inputs(None, None, None, None))
    np.testing.assert_allclose(out.logits, head, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: idpg.overlay(length=-1), "length must be >= 0"),
        (lambda: idpg.overlay(kind="mlp"), "kind must be one of phm, dnn"),
        (lambda: idpg.overlay(share="XL"), "share must be one of S, M, L"),
        (lambda: idpg.overlay(mode="last"), "mode must be one of previous, first"),
        (lambda: idpg.overlay(feature="glove"), "feature must be one of pass, words, batch"),
        (lambda: idpg.overlay(position=4), "position must be one of 0 behind the first token"),
        (lambda: idpg.overlay(position=1), "needs the separator's id"),
        (lambda: idpg.overlay(feature="batch"), "width must be that of feature='batch'"),
        (lambda: idpg.overlay(width=-1), "width must be that of feature='batch', else 0, got -1"),
        (lambda: idpg.overlay(drop=1.0), r"drop must be in \[0, 1\)"),
        (lambda: idpg.overlay(n=3).init(KEY, shapes()), "n=3 must divide the feature of 16"),
        (lambda: idpg.overlay(n=8, bottleneck=12).init(KEY, shapes()), "the bottleneck of 12"),
        (lambda: idpg.overlay(length=19).init(KEY, shapes()), "none of the model's 20 positions"),
        (
            lambda: idpg.overlay(feature="batch", width=300, n=4).init(KEY, shapes()),
            "use mode='first'",
        ),
        (lambda: idpg.overlay().bind(CONFIGS["llama"].build()), "the first token of an encoder"),
        (lambda: run(), r"must hold 'features' of shape \[batch, 12\], got None"),
        (lambda: run(features=np.ones((2, 3))), r"got \(2, 3\)"),
        (lambda: run(features=np.ones((3, 12))), r"got \(3, 12\)"),
        (lambda: twice(idpg.overlay(n=2)), "one overlay can be attached at 'idpg'"),
        (lambda: twice(prompt.overlay(length=1)), "another overlay puts rows there"),
    ],
)
def test_bad_input(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def run(**more):
    overlay = idpg.overlay(n=2, mode="first", feature="batch", width=12)
    return abstract(overlay, {"input_ids": np.ones((2, 4), np.int32), **more})


def twice(other):
    return abstract(compose(idpg.overlay(n=2), other), {"input_ids": np.ones((2, 4), np.int32)})


def abstract(overlay, ids):
    bound = overlay.bind(MODEL)
    return jax.eval_shape(lambda p: bound.apply(p, ids), bound.abstract())


def shapes():
    return TINY.build().abstract()
