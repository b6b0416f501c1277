"""The overlay seam: every site reaches its computation; LoRA is what its paper says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import tree
from steppe.models.model import Inputs
from steppe.models.overlays import lora
from steppe.models.overlays.overlay import Overlay
from steppe.models.sites import LAYER_SITES, Site, check_sites, stack_sites

from .conftest import TINY

ALL_DENSE = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.in", "ffn.out")


def run(params, batch, sites=None, **kwargs):
    model = TINY.build()
    return jax.jit(lambda p: model.apply(p, batch, sites=sites, **kwargs).logits)(params)


@pytest.mark.parametrize("name", ALL_DENSE)
def test_a_dense_site_wraps_exactly_its_layer(tiny, batch, name):
    """Scaling the output of the site equals scaling that layer's kernel and bias."""
    _, params = tiny
    scales = jnp.array([1.0, 0.5, 1.0, 2.0])
    site = Site(lambda s, x, base, ctx: s * base(x), scales)
    path = f"layers/{name.replace('.', '/')}"
    scaled = {
        f"{path}/kernel": tree.get(params, f"{path}/kernel") * scales[:, None, None],
        f"{path}/bias": tree.get(params, f"{path}/bias") * scales[:, None],
    }
    expected = run(tree.replace(params, scaled), batch)
    np.testing.assert_allclose(run(params, batch, {name: site}), expected, atol=1e-5)
    assert np.abs(expected - run(params, batch)).max() > 1e-3


def test_resid_wraps_the_whole_layer(tiny, batch):
    """Skipping layer 2 through the site equals a model without that layer."""
    _, params = tiny
    use = jnp.array([1.0, 1.0, 0.0, 1.0])
    site = Site(lambda u, x, base, ctx: jnp.where(u > 0, base(x), x), use)
    keep = jnp.array([0, 1, 3])
    short = dataclasses.replace(TINY, layers=3).build()
    less = {**params, "layers": jax.tree.map(lambda a: a[keep], params["layers"])}
    expected = jax.jit(lambda p: short.apply(p, batch).logits)(less)
    np.testing.assert_allclose(run(params, batch, {"resid": site}), expected, atol=1e-5)


def test_logits_site(tiny, batch):
    _, params = tiny
    site = Site(lambda b, x, base, ctx: base(x) + b, jnp.array([0.0, 5.0, 0.0]))
    got = run(params, batch, {"logits": site})
    np.testing.assert_allclose(got - run(params, batch), [[0, 5, 0]] * 4, atol=1e-5)


def test_kv_prefix_against_the_closed_form(tiny, batch):
    """One zero key and value rescales attention by Z / (Z + 1): compare with an explicit sum."""
    _, params = tiny
    zero = jnp.zeros((4, 1, 2, 8))
    seen = {}

    def prefix(delta, x, base, ctx):
        assert base(x)[0].shape == (4, 0, 2, 8)
        seen["layer"] = ctx.layer
        return delta[None], delta[None]

    got = run(params, batch, {"attn.kv_prefix": Site(prefix, zero)})

    def zero_key(p):  # the same by hand: a key of zeros is a score of 0 for every query
        model = TINY.build()
        inputs = model.parts.embed(p, batch)
        x = inputs.hidden
        mask = batch["attention_mask"][:, None, None, :] != 0
        for layer in range(4):
            w = jax.tree.map(lambda a, i=layer: a[i], p["layers"])

            def dense(x, d):
                return x @ d["kernel"] + d["bias"]

            q, k, v = (
                dense(x, w["attn"][n]).reshape(4, 9, 2, 8).transpose(0, 2, 1, 3) for n in "qkv"
            )
            scores = jnp.where(mask, q @ k.swapaxes(-1, -2) / np.sqrt(8), -jnp.inf)
            weights = jnp.exp(scores)
            weights = weights / (weights.sum(-1, keepdims=True) + 1.0)
            y = (weights @ v).transpose(0, 2, 1, 3).reshape(4, 9, 16)
            x = _norm(x + dense(y, w["attn"]["o"]), w["attn_norm"])
            h = jax.nn.gelu(dense(x, w["ffn"]["in"]), approximate=False)
            x = _norm(x + dense(h, w["ffn"]["out"]), w["ffn_norm"])
        return model.parts.head(p, x, inputs)

    np.testing.assert_allclose(got, jax.jit(zero_key)(params), atol=1e-5)
    assert seen["layer"] is not None


def _norm(x, p):
    y = x - x.mean(-1, keepdims=True)
    return y / jnp.sqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]


def test_embed_site_can_prepend_a_prompt(tiny, batch):
    """The mask and positions grow, and the head still reads the first real token."""
    _, params = tiny
    prompt = 0.1 * jax.random.normal(jax.random.key(3), (2, 16))

    def prepend(p, x: Inputs, base, ctx):
        rows = jnp.broadcast_to(p, (x.hidden.shape[0], *p.shape))
        length = x.hidden.shape[1] + 2
        return base(
            Inputs(
                jnp.concatenate([rows, x.hidden], 1),
                jnp.arange(length),
                jnp.pad(x.types, ((0, 0), (2, 0))),
                jnp.pad(x.mask, ((0, 0), (2, 0)), constant_values=1),
                prompt=2,
            )
        )

    got = run(params, batch, {"embed": Site(prepend, prompt)})
    table = params["embed"]["word"]["table"]
    words = jnp.concatenate([jnp.broadcast_to(prompt, (4, 2, 16)), table[batch["input_ids"]]], 1)
    model = TINY.build()
    longer = {
        "attention_mask": np.pad(batch["attention_mask"], ((0, 0), (2, 0)), constant_values=1),
        "token_type_ids": np.pad(batch["token_type_ids"], ((0, 0), (2, 0))),
    }
    hidden = jax.jit(lambda p, w: model.apply(p, longer, embeds=w).hidden)(params, words)
    pooled = jnp.tanh(
        hidden[:, 2] @ params["pooler"]["dense"]["kernel"] + params["pooler"]["dense"]["bias"]
    )
    expected = pooled @ params["head"]["out"]["kernel"] + params["head"]["out"]["bias"]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_two_overlays_at_one_site_nest(tiny, batch):
    _, params = tiny
    double = {"attn.q": Site(lambda d, x, base, ctx: 2.0 * base(x), jnp.zeros(4))}
    plus = {"attn.q": Site(lambda d, x, base, ctx: base(x) + 1.0, jnp.zeros(4))}
    q = params["layers"]["attn"]["q"]
    by_hand = {"layers/attn/q/kernel": 2 * q["kernel"], "layers/attn/q/bias": 2 * q["bias"] + 1}
    expected = run(tree.replace(params, by_hand), batch)
    np.testing.assert_allclose(run(params, batch, stack_sites(double, plus)), expected, atol=1e-5)


def test_site_errors():
    with pytest.raises(ValueError, match="has no site 'attn.qq'; its sites are attn.q, "):
        check_sites({"attn.qq": Site(lambda *a: None, ())}, LAYER_SITES, 4)
    with pytest.raises(
        ValueError, match=r"stacked over the 4 layers on axis 0, got shape \(3, 2\)"
    ):
        check_sites({"attn.q": Site(lambda *a: None, jnp.ones((3, 2)))}, LAYER_SITES, 4)


# --- LoRA -------------------------------------------------------------------------------


def trained(peft, model, params, seed=5):
    """Bound parameters with a delta that does something (B is 0 at the start)."""
    delta = peft.init(jax.random.key(seed), params)
    keys = iter(jax.random.split(jax.random.key(seed), 50))
    delta = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), delta)
    return {"base": params, "overlay": delta}


def test_at_the_start_it_is_the_base_bitwise(tiny, batch):
    """Adding x A 0 changes no bit. (Looped layers: written-out ones may be fused otherwise.)"""
    _, params = tiny
    looped = dataclasses.replace(TINY, unroll=1).build()
    bound = lora.overlay(rank=4, sites=ALL_DENSE).bind(looped, frozen=params)
    full = tree.merge(bound.init(jax.random.key(0)), bound.given)
    got = jax.jit(lambda p: bound.apply(p, batch).logits)(full)
    expected = jax.jit(lambda p: looped.apply(p, batch).logits)(params)
    np.testing.assert_array_equal(got, expected)


def test_rank_zero_is_the_base(tiny, batch):
    _, params = tiny
    peft = lora.overlay(rank=0)
    full = {"base": params, "overlay": peft.init(jax.random.key(0), params)}
    bound = peft.bind(TINY.build())
    np.testing.assert_array_equal(
        jax.jit(lambda p: bound.apply(p, batch).logits)(full), run(params, batch)
    )


def test_count_on_bert_base():
    """r = 8 on q and v of BERT-base: 294,912 (pelt.md)."""
    base = dataclasses.replace(
        TINY, vocab_size=30522, width=768, layers=12, heads=12, ffn_width=3072, positions=512
    ).build()
    peft = lora.overlay(rank=8)
    delta = jax.eval_shape(lambda: peft.init(jax.random.key(0), base.abstract()))
    assert tree.count(delta) == 294_912


def test_merge_equals_attached(tiny, batch):
    _, params = tiny
    model = TINY.build()
    peft = lora.overlay(rank=3, alpha=6.0, sites=ALL_DENSE)
    full = trained(peft, model, params)
    report = peft.merged(model, full, batch)
    assert 0.0 <= report.largest_difference < 1e-5
    attached = jax.jit(lambda p: peft.bind(model).apply(p, batch).logits)(full)
    np.testing.assert_allclose(run(report.params, batch), attached, atol=1e-5)
    assert np.abs(attached - run(params, batch)).max() > 1e-2
    tree.same_structure(report.params, params, ("merged", "base"))


def test_merge_is_in_float32_even_from_bf16(tiny, batch):
    _, params = tiny
    peft = lora.overlay(rank=2)
    full = trained(peft, TINY.build(), params)
    half = tree.cast(full, jnp.bfloat16)
    kernel = peft.merged(TINY.build(), half).params["layers"]["attn"]["q"]["kernel"]
    low = half["overlay"]["layers"]["attn.q"]
    exact = half["base"]["layers"]["attn"]["q"]["kernel"].astype(jnp.float32) + 8.0 * jnp.einsum(
        "lir,lro->lio", low["a"].astype(jnp.float32), low["b"].astype(jnp.float32)
    )
    np.testing.assert_array_equal(kernel, exact.astype(jnp.bfloat16))


def test_full_rank_reproduces_any_update(tiny, batch):
    _, params = tiny
    model, peft = TINY.build(), lora.overlay(rank=16, alpha=16.0, sites=("attn.o",))
    target = 0.3 * jax.random.normal(jax.random.key(9), (4, 16, 16))
    eye = jnp.broadcast_to(jnp.eye(16), (4, 16, 16))
    delta = {"layers": {"attn.o": {"a": eye, "b": target}}}
    kernel = params["layers"]["attn"]["o"]["kernel"] + target
    expected = run(tree.replace(params, {"layers/attn/o/kernel": kernel}), batch)
    got = jax.jit(lambda p: peft.bind(model).apply(p, batch).logits)(
        {"base": params, "overlay": delta}
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_first_gradient_is_zero_for_a_and_not_for_b(tiny, batch):
    _, params = tiny
    peft = lora.overlay(rank=2)
    bound = peft.bind(TINY.build(), frozen=params)
    made = bound.init(jax.random.key(0))
    live, _ = tree.split(tree.merge(made, bound.given), bound.trainable)
    assert set(live) == {"overlay", "base"}
    assert set(live["base"]) == {"head"}
    grad = jax.jit(
        jax.grad(lambda d: jnp.square(bound.apply({**bound.given, **d}, batch).logits).sum())
    )(made)
    q = grad["overlay"]["layers"]["attn.q"]
    assert not np.asarray(q["a"]).any()
    assert np.abs(q["b"]).max() > 1e-4


def test_dropout_is_on_the_branch_only(tiny, batch):
    _, params = tiny
    quiet = dataclasses.replace(
        TINY, drop=0.0, attn_drop=0.0, head=TINY.head.__class__("classification", 3, None, 0.0)
    ).build()
    peft = lora.overlay(rank=2, drop=0.5)
    bound = peft.bind(quiet)
    full = trained(peft, quiet, params)
    start = {"base": params, "overlay": peft.init(jax.random.key(0), params)}
    call = jax.jit(lambda p, k: bound.apply(p, batch, rng=k, train=True).logits)
    np.testing.assert_allclose(call(start, jax.random.key(0)), run(params, batch), atol=1e-6)
    a, b = call(full, jax.random.key(0)), call(full, jax.random.key(1))
    assert np.abs(a - b).max() > 1e-3


def test_lora_errors(tiny):
    model, params = TINY.build(), tiny[1]
    with pytest.raises(ValueError, match="rank must be >= 0, got -1"):
        lora.overlay(rank=-1)
    with pytest.raises(ValueError, match="rank must be <= 16 at site 'attn.q'"):
        lora.overlay(rank=17).init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="no dense layer at site 'attn.z'; there are attn.k"):
        lora.overlay(sites=("attn.z",)).init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="each once"):
        lora.overlay(sites=("attn.q", "attn.q"))
    with pytest.raises(ValueError, match="has no merged form"):
        Overlay("prompt", lambda k, p: {}, lambda d: {}).merged(model, {})
    other = tree.replace(params, {"head/out/bias": jnp.zeros(7)})
    with pytest.raises(
        ValueError, match=r"'head/out/bias': frozen has \(7,\), the model has \(3,\)"
    ):
        lora.overlay().bind(model, frozen=other)
    bound = lora.overlay().bind(model, frozen=params)
    with pytest.raises(ValueError, match="bound already"):
        lora.overlay().bind(bound, frozen=params)
