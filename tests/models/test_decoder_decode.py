"""The cache of decoders: at every step the logits of the full forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models.decoder import DecoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.model import Masks
from steppe.models.overlays import lora
from steppe.models.rotary import Rotary
from steppe.models.sites import Site

TINY = DecoderConfig(
    "llama",
    vocab_size=40,
    width=16,
    layers=3,
    heads=4,
    kv_heads=2,
    ffn_width=24,
    positions=24,
    head=HeadConfig("lm"),
)
CONFIGS = {
    "llama": TINY,
    "mistral": dataclasses.replace(TINY, window=3),
    "gemma3": dataclasses.replace(
        TINY, norm="rms1", window=3, windowed=(True, False, True), qk_norm=True, tied=True,
        local_rotary=Rotary(base=100.0), post_norms=True, embed_scale=4.0, softcap=3.0,
    ),
    "gpt2": dataclasses.replace(
        TINY, rotary=None, norm="layer", gated=False, act="gelu_tanh", qkv_bias=True,
        out_bias=True, ffn_bias=True, tied=True, kv_heads=None,
    ),
    "xpos": dataclasses.replace(TINY, rotary=Rotary(xpos=True, fraction=0.5)),
}  # fmt: skip
P, MORE = 6, 7
PAD = np.array([0, 2, 5])


def made(config):
    model = config.build()
    params = jax.jit(model.init)(jax.random.key(0))
    return model, jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), params
    )


def texts():
    ids = np.random.default_rng(0).integers(1, 40, (3, P + MORE)).astype(np.int32)
    mask = (np.arange(P + MORE) >= PAD[:, None]).astype(np.int32)
    return ids * mask, mask


def prefix_site(columns=2):
    """Keys and values in front, different in every layer."""
    delta = jax.random.normal(jax.random.key(5), (3, 2, 1, columns, 2, 4))

    def fn(delta, x, base, context):
        return delta[0], delta[1]

    return Site(fn, delta)


def prompt_site(rows=2):
    """A soft prompt: rows in front of the words, none when a token is read after the prompt."""
    delta = jax.random.normal(jax.random.key(6), (rows, 16))

    def fn(delta, x, base, context):
        if not context.step:
            front = jnp.broadcast_to(delta, (x.hidden.shape[0], *delta.shape))
            x = x._replace(hidden=jnp.concatenate([front, x.hidden], axis=1))
        return base(x)

    return Site(fn, delta)


def check(model, params, sites=None, masks=None, atol=1e-5):
    ids, mask = texts()
    full = jax.jit(lambda p, b: model.apply(p, b, sites=sites, masks=masks).logits)(
        params, {"input_ids": ids, "attention_mask": mask}
    )
    start = jax.jit(lambda p, b: model.decode.start(p, b, MORE, sites=sites, masks=masks))
    step = jax.jit(lambda p, t, s: model.decode.step(p, t, s, sites=sites, masks=masks))
    logits, state = start(params, {"input_ids": ids[:, :P], "attention_mask": mask[:, :P]})
    assert logits.dtype == jnp.float32
    kinds = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    for column in range(P, P + MORE):
        np.testing.assert_allclose(
            logits, full[:, column - 1], atol=atol, rtol=1e-5, err_msg=f"token {column}"
        )
        logits, state = step(params, jnp.asarray(ids[:, column]), state)
    np.testing.assert_allclose(logits, full[:, -1], atol=atol, rtol=1e-5)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == kinds
    return full


@pytest.mark.parametrize("name", CONFIGS)
def test_every_step(name):
    plain = check(*made(CONFIGS[name]))
    model, params = made(CONFIGS[name])
    sites = {"attn.kv_prefix": prefix_site(), "embed": prompt_site()}
    if name == "gpt2":
        sites["attn.kv_prefix"] = Site(
            sites["attn.kv_prefix"].fn, jnp.repeat(sites["attn.kv_prefix"].delta, 2, axis=4)
        )
    both = check(model, params, sites=sites)
    assert np.abs(both - plain).max() > 1e-3


def test_with_masks_and_lora():
    model, params = made(TINY)
    masks = Masks(np.array([[1, 0, 1, 1]] * 3), None, np.array([1.0, 0.5, 1.0]))
    check(model, params, masks=masks)
    overlay = lora.overlay(rank=2, sites=("attn.q", "attn.v", "ffn.gate"))
    bound = overlay.bind(model, frozen=params)
    delta = bound.init(jax.random.key(1))["overlay"]
    delta = jax.tree.map(lambda x: x + 0.1, delta)
    check(bound, {"base": params, "overlay": delta})


def test_rows_are_taken_and_a_loop_carries_the_state():
    model, params = made(CONFIGS["gemma3"])
    ids, mask = texts()

    @jax.jit
    def greedy(batch, rows):
        logits, state = model.decode.start(params, batch, MORE)
        logits, state = logits[rows], state.take(rows)

        def body(carry):
            i, logits, state, out = carry
            token = jnp.argmax(logits, -1).astype(jnp.int32)
            logits, state = model.decode.step(params, token, state)
            return i + 1, logits, state, out.at[:, i].set(token)

        out = jnp.zeros((len(rows), MORE), jnp.int32)
        carry = (jnp.int32(0), logits, state, out)
        return jax.lax.while_loop(lambda c: c[0] < MORE, body, carry)[3]

    batch = {"input_ids": ids[:, :P], "attention_mask": mask[:, :P]}
    every = greedy(batch, np.arange(3))
    some = greedy(batch, np.array([2, 2, 0, 1, 2]))
    np.testing.assert_array_equal(some, every[np.array([2, 2, 0, 1, 2])])


def test_all_logits_of_the_prompt():
    model, params = made(TINY)
    ids, mask = texts()
    batch = {"input_ids": ids, "attention_mask": mask}
    site = {"embed": prompt_site()}
    got, _ = jax.jit(lambda: model.decode.start(params, batch, 0, sites=site, last_only=False))()
    want = jax.jit(lambda: model.apply(params, batch, sites=site).logits)()
    real = mask[..., None]
    np.testing.assert_allclose(got * real, want * real, atol=1e-5)


def test_what_start_refuses():
    model, params = made(TINY)
    ids, mask = texts()
    batch = {"input_ids": ids, "attention_mask": mask}
    for batch_, more, message in (
        (batch, 12, "13 tokens and more=12 exceed max_length=24"),
        (batch, -1, "more must be >= 0"),
        ({**batch, "attention_mask": mask[:, ::-1]}, 2, "row 1 ends in padding"),
        ({**batch, "segment_ids": mask}, 2, "packed"),
        ({"input_ids": ids[:, :0]}, 2, "empty"),
        ({**batch, "attention_mask": np.ones((3, 13, 13), int)}, 2, r"\[batch, tokens\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.decode.start(params, batch_, more)
    headless = TINY.with_head(None).build()
    with pytest.raises(ValueError, match="scores no tokens"):
        headless.decode.start({}, batch, 2)
