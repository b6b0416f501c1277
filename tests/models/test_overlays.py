"""The overlays one by one: counts, closed forms, limits, merges, order, and bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import tree
from steppe.models.overlays import (
    adapter,
    bitfit,
    compacter,
    compose,
    ia3,
    lora,
    prefix,
    prompt,
    residual_prompt,
    unipelt,
)

from .conftest import TINY

LOOPED = dataclasses.replace(TINY, unroll=1)
MODEL = LOOPED.build()
BERT = dataclasses.replace(
    TINY, vocab_size=30522, width=768, layers=12, heads=12, ffn_width=3072, positions=512
)
KEY = jax.random.key(0)


def count(overlay):
    """Parameters of the delta on BERT-base."""
    abstract = BERT.build().abstract()
    return tree.count(jax.eval_shape(lambda: overlay.init(KEY, abstract)))


def logits(overlay, params, delta, batch):
    bound = overlay.bind(MODEL)
    full = {"base": params, "overlay": delta}
    return jax.jit(lambda p: bound.apply(p, batch).logits)(full)


def plain(params, batch):
    return jax.jit(lambda p: MODEL.apply(p, batch).logits)(params)


def moved(overlay, params, seed=5, by=0.1):
    """A delta away from its initial values."""
    delta = overlay.init(jax.random.key(seed), params)
    keys = iter(jax.random.split(jax.random.key(seed + 1), 60))
    return jax.tree.map(lambda x: x + by * jax.random.normal(next(keys), x.shape), delta)


@pytest.mark.parametrize(
    ("overlay", "wanted"),
    [
        (prefix.overlay(length=10), 184_320),
        (prefix.overlay(length=10, hidden=512), 9_857_024),
        (adapter.overlay(reduction=16), 894_528),
        (compacter.overlay(plus=True), 12 * 2_376 + 64),
        (compacter.overlay(), 24 * 2_376 + 64),
        (ia3.overlay(), 12 * (768 + 768 + 3072)),
        (prompt.overlay(length=20), 20 * 768),
        (unipelt.overlay(parts=("adapter", "prefix")), 1_097_304),
        (unipelt.overlay(shared=True), 1_401_444),
        (unipelt.overlay(), 1_410_672),
        (compose(lora.overlay(rank=8), prefix.overlay(length=10)), 294_912 + 184_320),
    ],
)
def test_counts_on_bert_base(overlay, wanted):
    assert count(overlay) == wanted


def test_bitfit_trains_102912_biases_of_bert_base_and_adds_none():
    overlay = bitfit.overlay()
    abstract = BERT.build().abstract()
    assert overlay.init(KEY, abstract) == {}
    bound = overlay.bind(BERT.build())
    live, _ = tree.split({"base": abstract}, bound.trainable)
    head = tree.count(live["base"].pop("head"))
    assert tree.count(live) == 102_912
    assert head == 768 * 3 + 3
    assert {path.rsplit("/", 1)[-1] for path in tree.paths(live)} == {"bias"}


def test_bitfit_gives_biases_to_layers_without(tiny, batch):
    _, params = tiny
    less = {**params, "layers": {**params["layers"], "ffn": {
        n: {"kernel": d["kernel"]} for n, d in params["layers"]["ffn"].items()
    }}}  # fmt: skip
    overlay = bitfit.overlay()
    delta = overlay.init(KEY, less)
    assert set(delta["layers"]) == {"ffn.in", "ffn.out"}
    assert delta["layers"]["ffn.in"].shape == (4, 24)
    # On the model with biases an added one is the sum of both.
    more = jax.tree.map(lambda b: b + 0.3, delta)
    by_hand = {
        f"layers/ffn/{n}/bias": params["layers"]["ffn"][n]["bias"] + 0.3 for n in ("in", "out")
    }
    got = logits(overlay, params, more, batch)
    np.testing.assert_allclose(got, plain(tree.replace(params, by_hand), batch), atol=1e-5)
    with pytest.raises(ValueError, match="bitfit added biases at ffn.in, ffn.out"):
        overlay.merge(params, more)
    assert overlay.merge(params, {}) is params


NEUTRAL = {
    "ia3": ia3.overlay(),
    "parallel adapter": adapter.overlay(kind="parallel", reduction=4),
    "lora and ia3": compose(lora.overlay(rank=2), ia3.overlay()),
    "bitfit": bitfit.overlay(),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_at_the_start_it_is_the_base_bitwise(name, tiny, batch, emitters):
    _, params = tiny
    overlay = NEUTRAL[name]
    got = logits(overlay, params, overlay.init(KEY, params), batch)
    np.testing.assert_array_equal(got, plain(params, batch))


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer"])
def test_adapters_begin_near_the_base(kind, tiny, batch):
    _, params = tiny
    overlay = adapter.overlay(kind=kind, width=4)
    got = logits(overlay, params, overlay.init(KEY, params), batch)
    away = np.abs(got - plain(params, batch)).max()
    assert 0 < away < 0.05


def one_layer(params, x, mask, change, layers=range(4)):
    """The layers of TINY in float64, with the places that adapters have."""
    for layer in layers:
        w = jax.tree.map(lambda a, i=layer: np.asarray(a[i], np.float64), params["layers"])

        def dense(x, d):
            return x @ d["kernel"] + d["bias"]

        q, k, v = (dense(x, w["attn"][n]).reshape(4, -1, 2, 8).swapaxes(1, 2) for n in "qkv")
        k, v, seen = change["prefix"](layer, k, v, mask)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(8)
        scores = np.where(seen[:, None, None, :], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = dense((weights @ v).swapaxes(1, 2).reshape(*x.shape), w["attn"]["o"])
        x = norm(x + change["attn"](layer, y), w["attn_norm"])
        f = dense(gelu(dense(x, w["ffn"]["in"])), w["ffn"]["out"])
        x = norm(x + change["ffn"](layer, f, x, w["ffn_norm"]), w["ffn_norm"])
    return x


def norm(x, p):
    y = x - x.mean(-1, keepdims=True)
    return y / np.sqrt(np.square(y).mean(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]


def gelu(x):
    erf = np.vectorize(__import__("math").erf)
    return x / 2 * (1 + erf(x / np.sqrt(2)))


SAME = {
    "prefix": lambda layer, k, v, mask: (k, v, mask),
    "attn": lambda layer, y: y,
    "ffn": lambda layer, f, x, p: f,
}


def hidden(overlay, params, delta, batch):
    bound = overlay.bind(MODEL)
    return jax.jit(lambda d: bound.apply({"base": params, "overlay": d}, batch).hidden)(delta)


def first_input(params, batch):
    return np.asarray(jax.jit(lambda p: MODEL.parts.embed(p, batch).hidden)(params), np.float64)


def reference(params, batch, **change):
    mask = batch["attention_mask"] != 0
    return one_layer(params, first_input(params, batch), mask, SAME | change)


def bottleneck(own, layer, u):
    own = jax.tree.map(lambda a: np.asarray(a[layer], np.float64), own)
    inner = np.maximum(u @ own["down"]["kernel"] + own["down"]["bias"], 0)
    return inner @ own["up"]["kernel"] + own["up"]["bias"]


def real(values, batch):
    """Rows of real tokens: padding is nobody's business."""
    return np.asarray(values)[batch["attention_mask"] != 0]


@pytest.mark.parametrize("kind", ["houlsby", "pfeiffer", "parallel"])
def test_adapters_against_float64(kind, tiny, batch):
    _, params = tiny
    overlay = adapter.overlay(kind=kind, width=4)
    delta = moved(overlay, params)
    own = delta["layers"]
    change = {
        "houlsby": {
            "attn": lambda i, y: y + bottleneck(own["attn.o"], i, y),
            "ffn": lambda i, f, x, p: f + bottleneck(own["ffn.out"], i, f),
        },
        "pfeiffer": {"ffn": lambda i, f, x, p: f + bottleneck(own["ffn.out"], i, norm(f + x, p))},
        "parallel": {"ffn": lambda i, f, x, p: f + 4 * bottleneck(own["ffn.out"], i, x)},
    }[kind]
    wanted = reference(params, batch, **change)
    got = hidden(overlay, params, delta, batch)
    np.testing.assert_allclose(real(got, batch), real(wanted, batch), atol=2e-5)
    assert np.abs(wanted - reference(params, batch)).max() > 1e-2


def test_prefix_against_float64_and_its_network(tiny, batch):
    _, params = tiny
    made = prefix.overlay(length=3, hidden=5)
    network = moved(made, params)
    folded = prefix.fold(network)
    k, v = (np.asarray(folded["layers"]["attn.kv_prefix"][n], np.float64) for n in "kv")
    # By hand: keys and values of a layer stand one after the other in the network's output.
    own = jax.tree.map(lambda a: np.asarray(a, np.float64), network["attn"])
    rows = np.tanh(own["embedding"] @ own["in"]["kernel"] + own["in"]["bias"])
    flat = rows @ own["out"]["kernel"].reshape(5, -1) + own["out"]["bias"].reshape(-1)
    np.testing.assert_allclose(v[2], flat[:, 5 * 16 : 6 * 16], atol=1e-5)

    def in_front(layer, keys, values, mask):
        more = [
            np.broadcast_to(p[layer].reshape(3, 2, 8).swapaxes(0, 1), (4, 2, 3, 8)) for p in (k, v)
        ]
        seen = np.concatenate([np.ones((4, 3), bool), mask], 1)
        return np.concatenate([more[0], keys], 2), np.concatenate([more[1], values], 2), seen

    wanted = reference(params, batch, prefix=in_front)
    plain_prefix = prefix.overlay(length=3)
    for overlay, delta in ((made, network), (plain_prefix, folded)):
        got = hidden(overlay, params, delta, batch)
        np.testing.assert_allclose(real(got, batch), real(wanted, batch), atol=2e-5)


def test_phm_is_its_kronecker_sum():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 3, 3)), rng.normal(size=(3, 2, 4))
    x, bias = rng.normal(size=(5, 6)), rng.normal(size=12)
    h = sum(np.kron(a[i], b[i]) for i in range(3))
    got = compacter.phm(*(jnp.asarray(v, jnp.float32) for v in (x, a, b, bias)))
    np.testing.assert_allclose(got, x @ h + bias, atol=1e-5)
    s, t = rng.normal(size=(3, 2)), rng.normal(size=(3, 4))
    low = compacter.phm_low_rank(*(jnp.asarray(v, jnp.float32) for v in (x, a, s, t, bias)))
    h = sum(np.kron(a[i], np.outer(s[i], t[i])) for i in range(3))
    np.testing.assert_allclose(low, x @ h + bias, atol=1e-5)
    dense = compacter.phm(jnp.asarray(x, jnp.float32), jnp.ones((1, 1, 1)), jnp.ones((1, 6, 2)))
    np.testing.assert_allclose(dense, x @ np.ones((6, 2)), atol=1e-5)  # n = 1 is a dense layer


def test_compacter_against_float64(tiny, batch):
    _, params = tiny
    overlay = compacter.overlay(n=2, reduction=4)
    delta = moved(overlay, params, by=0.3)
    a = np.asarray(delta["shared"]["a"], np.float64)

    def run(site, layer, y):
        for name in ("down", "up"):
            own = jax.tree.map(
                lambda v: np.asarray(v[layer], np.float64), delta["layers"][site][name]
            )
            h = sum(np.kron(a[i], np.outer(own["s"][i], own["t"][i])) for i in range(2))
            y = y @ h + own["bias"]
            if name == "down":
                y = np.asarray(jax.nn.gelu(jnp.asarray(y, jnp.float32)), np.float64)
        return y

    wanted = reference(
        params,
        batch,
        attn=lambda i, y: y + run("attn.o", i, y),
        ffn=lambda i, f, x, p: f + run("ffn.out", i, f),
    )
    got = hidden(overlay, params, delta, batch)
    np.testing.assert_allclose(real(got, batch), real(wanted, batch), atol=5e-5)
    assert overlay.trainable == adapter.NORMS


def test_ia3_merges_and_is_scaled_columns_and_rows(tiny, batch):
    _, params = tiny
    overlay = ia3.overlay()
    delta = moved(overlay, params, by=0.3)
    report = overlay.merged(MODEL, {"base": params, "overlay": delta}, batch)
    assert report.largest_difference < 1e-5
    wanted = params["layers"]["attn"]["k"]["bias"] * delta["layers"]["attn.k"]
    np.testing.assert_allclose(report.params["layers"]["attn"]["k"]["bias"], wanted, atol=1e-6)
    assert np.abs(plain(report.params, batch) - plain(params, batch)).max() > 1e-2


def test_two_that_share_a_site_compose_in_order_and_merge(tiny, batch):
    _, params = tiny
    low, scale = lora.overlay(rank=2, sites=("attn.k", "ffn.out")), ia3.overlay()
    ends = []
    for both in (compose(low, scale), compose(scale, low)):
        delta = moved(both, params, by=0.3)
        assert set(delta) == {"lora", "ia3"}
        report = both.merged(MODEL, {"base": params, "overlay": delta}, batch)
        assert report.largest_difference < 2e-5
        ends.append(plain(report.params, batch))
    twice = compose(low, low)
    delta = moved(twice, params, by=0.3)
    assert set(delta) == {"lora", "lora-2"}
    assert twice.merged(MODEL, {"base": params, "overlay": delta}, batch).largest_difference < 1e-5
    assert compose(low) is low
    assert compose(low, prefix.overlay()).merge is None
    assert compose(bitfit.overlay(), adapter.overlay(kind="houlsby")).trainable == (
        *bitfit.BIASES,
        *adapter.NORMS,
    )


def test_a_prompt_and_a_prefix_compose_with_themselves(tiny, batch):
    """Two prompts of 2 and 3 rows are one of 5: the first one stands in front."""
    _, params = tiny
    rows = 0.3 * jax.random.normal(KEY, (5, 16))
    both = compose(prompt.overlay(length=2), prompt.overlay(length=3))
    delta = {"prompt": {"prompt": rows[:2]}, "prompt-2": {"prompt": rows[2:]}}
    got = logits(both, params, delta, batch)
    one = prompt.overlay(length=5)
    np.testing.assert_allclose(got, logits(one, params, {"prompt": rows}, batch), atol=1e-5)
    k, v = 0.3 * jax.random.normal(KEY, (2, 4, 5, 16))

    def part(rows):
        return {"layers": {"attn.kv_prefix": {"k": k[:, rows], "v": v[:, rows]}}}

    both = compose(prefix.overlay(length=3), prefix.overlay(length=2))
    delta = {"prefix": part(slice(2, 5)), "prefix-2": part(slice(0, 2))}
    got = logits(both, params, delta, batch)
    one = prefix.overlay(length=5)
    np.testing.assert_allclose(got, logits(one, params, part(slice(0, 5)), batch), atol=1e-5)


def test_a_prompt_is_embeddings_in_front(tiny, batch):
    """The same through ``embeds`` with a longer mask; the initial rows are words."""
    _, params = tiny
    overlay = prompt.overlay(length=3, ids=(7, 9))
    delta = overlay.init(KEY, params)
    table = params["embed"]["word"]["table"]
    np.testing.assert_array_equal(delta["prompt"], table[np.array([7, 9, 7])])
    got = hidden(overlay, params, delta, batch)
    words = jnp.concatenate(
        [jnp.broadcast_to(delta["prompt"], (4, 3, 16)), table[batch["input_ids"]]], 1
    )
    longer = {
        "attention_mask": np.pad(batch["attention_mask"], ((0, 0), (3, 0)), constant_values=1),
        "token_type_ids": np.pad(batch["token_type_ids"], ((0, 0), (3, 0))),
    }
    wanted = jax.jit(lambda p: MODEL.apply(p, longer, embeds=words).hidden)(params)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    drawn = prompt.overlay(length=4).init(KEY, params)["prompt"]
    assert all(any(np.array_equal(row, word) for word in table) for row in np.asarray(drawn))
    flat = prompt.overlay(length=4, start="uniform").init(KEY, params)["prompt"]
    assert np.abs(flat).max() <= 0.5


def test_a_residual_prompt_against_float64_folds_and_counts(tiny, batch):
    _, params = tiny
    overlay = residual_prompt.overlay(length=3, bottleneck=5, blocks=2)
    delta = moved(overlay, params)
    rows = np.asarray(delta["prompt"], np.float64)
    for number in "01":
        own = jax.tree.map(lambda a: np.asarray(a, np.float64), delta["blocks"][number])
        inner = np.maximum(rows @ own["down"]["kernel"] + own["down"]["bias"], 0)
        y = inner @ own["up"]["kernel"] + own["up"]["bias"]
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        rows = rows + y * own["norm"]["scale"] + own["norm"]["bias"]
    folded = residual_prompt.fold(delta)
    np.testing.assert_allclose(folded["prompt"], rows, atol=1e-5)
    got = logits(overlay, params, delta, batch)
    wanted = logits(prompt.overlay(length=3), params, folded, batch)
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    # A branch that ends in nothing leaves the prompt as it is.
    still = jax.tree.map(jnp.copy, delta)
    for block in still["blocks"].values():
        block["up"] = jax.tree.map(jnp.zeros_like, block["up"])
        block["norm"]["bias"] = jnp.zeros(16)
    np.testing.assert_array_equal(residual_prompt.fold(still)["prompt"], delta["prompt"])
    # A network a row: the same where all rows have the same one.
    own = residual_prompt.overlay(length=3, bottleneck=5, separate=True)
    many = own.init(KEY, params)
    one = jax.tree.map(lambda a: a[0], many["blocks"])
    same = jax.tree.map(lambda a: jnp.broadcast_to(a, (3, *a.shape)), one)
    left = residual_prompt.fold({"prompt": many["prompt"], "blocks": same})
    right = residual_prompt.fold({"prompt": many["prompt"], "blocks": one})
    np.testing.assert_allclose(left["prompt"], right["prompt"], atol=1e-6)
    # T5-Large, n = 100, m = 400.
    wide = dataclasses.replace(BERT, width=1024, heads=16).build().abstract()
    big = residual_prompt.overlay(length=100, bottleneck=400)
    assert tree.count(jax.eval_shape(lambda: big.init(KEY, wide))) == 925_072
    with pytest.raises(ValueError, match="bottleneck and blocks must be >= 1"):
        residual_prompt.overlay(bottleneck=0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: compose(), "at least one overlay"),
        (lambda: prefix.overlay(length=0), "length must be >= 1, got 0"),
        (lambda: prefix.overlay(attentions=("attn", "attn")), "each once"),
        (lambda: prefix.overlay(attentions=("self",)).init(KEY, shapes()), "there are attn"),
        (lambda: prompt.overlay(length=20).init(KEY, shapes()), "none of the model's 20 positions"),
        (lambda: prompt.overlay(ids=(50,), length=2).init(KEY, shapes()), "50 tokens, got 50"),
        (lambda: prompt.overlay(start="zeros"), "words, uniform or normal, got 'zeros'"),
        (lambda: prompt.overlay(site="attn.q"), "must be an embed site"),
        (lambda: adapter.overlay(kind="lora"), "kind must be one of houlsby, pfeiffer, parallel"),
        (lambda: adapter.overlay(reduction=17).init(KEY, shapes()), "reduction=17 leaves nothing"),
        (lambda: adapter.overlay(act="swish2"), "activation must be one of"),
        (
            lambda: compacter.overlay(n=3).init(KEY, shapes()),
            "n=3 must divide the model's width",
        ),
        (lambda: compacter.overlay(n=4, reduction=8).init(KEY, shapes()), "bottleneck 2"),
        (lambda: ia3.overlay(sites=("attn.z",)).init(KEY, shapes()), "there are attn.k"),
        (lambda: ia3.overlay(sites=()), "at least one site"),
        (lambda: unipelt.overlay(parts=("lora", "ia3")), "parts must be some of adapter"),
        (lambda: unipelt.overlay(pool="max"), "pool must be 'mask' or 'all'"),
    ],
)
def test_bad_input(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def shapes():
    return TINY.build().abstract()
