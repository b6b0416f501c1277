"""Overlays while decoding: token by token the logits of the whole forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models.overlays import (
    adapter,
    bitfit,
    compacter,
    compose,
    ia3,
    lora,
    loramoe,
    o_lora,
    prefix,
    prompt,
    residual_prompt,
    unipelt,
)

from .test_decoder_decode import CONFIGS, check, made
from .test_seq2seq import U, close, source, target, tiny

DECODER = {
    "prompt and prefix": compose(prompt.overlay(length=2), prefix.overlay(length=3)),
    "adapters": compose(
        ia3.overlay(),
        adapter.overlay(kind="pfeiffer", width=4),
        adapter.overlay(kind="parallel", width=4),
        compacter.overlay(n=2, reduction=4),
    ),
}


def away(overlay, params, by=0.2):
    delta = overlay.init(jax.random.key(3), params)
    keys = iter(jax.random.split(jax.random.key(4), 60))
    return jax.tree.map(lambda x: x + by * jax.random.normal(next(keys), x.shape), delta)


@pytest.mark.parametrize("overlay", DECODER)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_decoders(name, overlay):
    model, params = made(CONFIGS[name])
    chosen = DECODER[overlay]
    full = check(chosen.bind(model), {"base": params, "overlay": away(chosen, params)}, atol=3e-5)
    assert np.abs(full - check_plain(name)).max() > 1e-3


MORE = {
    "lora": lora.overlay(rank=2),
    "o-lora": o_lora.overlay(tasks=2, rank=2),
    "loramoe": loramoe.overlay(experts=3, rank=2, drop=0.0),
    "residual prompt": residual_prompt.overlay(length=2, bottleneck=4),
}


@pytest.mark.parametrize("overlay", MORE)
def test_one_decoder_under_the_others(overlay):
    model, params = made(CONFIGS["llama"])
    chosen = MORE[overlay]
    full = check(chosen.bind(model), {"base": params, "overlay": away(chosen, params)}, atol=3e-5)
    assert np.abs(full - check_plain("llama")).max() > 1e-3


PLAIN = {}


def check_plain(name):
    if name not in PLAIN:
        PLAIN[name] = check(*made(CONFIGS[name]))
    return PLAIN[name]


@pytest.mark.parametrize("style", ["t5", "bart"])
def test_encoder_decoders(style):
    net, ids = tiny(style), target(style)
    attentions = ("encoder.attn", "decoder.attn", "decoder.cross")
    overlay = compose(
        prompt.overlay(length=2, site="encoder.embed"),
        prefix.overlay(length=2, attentions=attentions, hidden=3),
        ia3.overlay(sites=("decoder.cross.k", "decoder.cross.v", "decoder.ffn.out")),
        adapter.overlay(kind="houlsby", width=4),
        bitfit.overlay(),
    )
    delta = away(overlay, net.params)
    assert bool(delta["bitfit"]) == (style == "t5")
    params = {"base": net.params, "overlay": delta}
    bound = overlay.bind(net.model)
    whole = jax.jit(bound.apply)(params, {**source(), "decoder_input_ids": ids}).logits
    assert np.abs(whole - net.apply({**source(), "decoder_input_ids": ids})).max() > 0.01
    logits, state = jax.jit(lambda p, b: bound.decode.start(p, b, U))(params, source())
    step = jax.jit(bound.decode.step)
    for t in range(U):
        close(logits, whole[:, t], 2e-5)
        if t + 1 < U:
            logits, state = step(params, jnp.asarray(ids[:, t + 1]), state)


def test_gates_over_a_text_that_is_not_there_yet_are_refused():
    model, params = made(CONFIGS["llama"])
    overlay = unipelt.overlay(rank=2, length=2, reduction=4)
    bound = overlay.bind(model)
    full = {"base": params, "overlay": overlay.init(jax.random.key(0), params)}
    ids = np.ones((1, 3), np.int32)
    _, state = bound.decode.start(full, {"input_ids": ids}, 2)
    with pytest.raises(ValueError, match="not known while it is written; use gated=False"):
        bound.decode.step(full, jnp.ones(1, jnp.int32), state)
