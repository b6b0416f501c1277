"""Prompts in the source of an encoder-decoder: late ones, added ones, modular ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import tree
from steppe.models.overlays import added_prompt, bitfit, compose, lora, lpt, mp2, prompt
from steppe.models.overlays.overlay import Overlay
from steppe.models.seq2seq_net import Network
from steppe.models.sites import LateSite

from .test_lpt import generated
from .test_overlays import KEY, MODEL, moved
from .test_seq2seq import STYLES, B, U, close, source, target, tiny


def outputs(overlay, net, delta, batch, **options):
    """Logits of the whole forward pass, and of reading it token by token."""
    bound, params = overlay.bind(net.model), {"base": net.params, "overlay": delta}
    whole = jax.jit(lambda p, b: bound.apply(p, b, **options).logits)(params, batch)
    ids = batch["decoder_input_ids"]
    given = {n: v for n, v in batch.items() if n != "decoder_input_ids"}
    logits, state = jax.jit(lambda p, b: bound.decode.start(p, b, U))(params, given)
    step = jax.jit(bound.decode.step)
    for t in range(U):
        close(logits, whole[:, t], 2e-5)
        if t + 1 < U:
            logits, state = step(params, jnp.asarray(ids[:, t + 1]), state)
    return np.asarray(whole)


def at(layer, rows, stop=True):
    """An overlay that puts these rows [B, t, D] in front of the states after ``layer``."""

    def attach(delta):
        return {"encoder.late": LateSite(prompt.prepend, delta["rows"], layer=layer, stop=stop)}

    return Overlay("rows", lambda key, params: {"rows": rows}, attach)


@pytest.mark.parametrize(
    ("style", "kind"), [("t5", "npg"), ("t5", "mppg"), ("bart", "appg"), ("bart", "free")]
)
def test_a_late_prompt_in_the_encoder(style, kind):
    net = tiny(style)
    batch = {**source(), "decoder_input_ids": target(style)}
    overlay = lpt.overlay(layer=1, length=3, kind=kind, bottleneck=5, stack="encoder")
    delta = moved(overlay, net.params)
    got = outputs(overlay, net, delta, batch)
    # The rows by numpy, of what the first layer alone gives; u is the source's last token.
    inner = Network(STYLES[style])
    inputs = inner.embed(net.params, "encoder", batch["input_ids"], batch["attention_mask"])
    states = np.asarray(inner.stack(net.params, "encoder", inputs, stop=1))
    reads = batch["attention_mask"].sum(1) - 1
    rows = rows_of(kind, delta, states, batch["attention_mask"], reads)
    close(got, outputs(at(1, rows), net, {"rows": jnp.asarray(rows)}, batch), 2e-5)
    assert np.abs(got - net.apply(batch)).max() > 1e-3
    # Nothing of the padding is read.
    other = {**batch, "input_ids": np.where(batch["attention_mask"] == 0, 7, batch["input_ids"])}
    close(outputs(overlay, net, delta, other), got, 2e-5)


def rows_of(kind, delta, states, mask, reads):
    own = jax.tree.map(lambda a: np.asarray(a, np.float64), delta)
    if kind == "free":
        return np.broadcast_to(own["prompt"], (B, *own["prompt"].shape)).astype(np.float32)
    if kind == "npg":
        u = states[np.arange(B), reads]
        inner = np.maximum(u @ own["down"]["kernel"] + own["down"]["bias"], 0)
        made = (inner @ own["up"]["kernel"] + own["up"]["bias"]).reshape(B, 3, -1)
    else:
        made = generated(kind, delta, states, {"attention_mask": mask})
    return np.asarray(made, np.float32)


def test_at_the_bottom_of_t5_it_is_a_prompt_in_front():
    """Positions are distances there: words in front and rows in front are the same."""
    net = tiny("t5")
    batch = {**source(), "decoder_input_ids": target("t5")}
    rows = {"prompt": jax.random.normal(KEY, (3, 16))}
    late = lpt.overlay(layer=0, length=3, kind="free", stack="encoder")
    front = prompt.overlay(length=3, site="encoder.embed")
    close(outputs(late, net, rows, batch), outputs(front, net, rows, batch), 2e-5)


@pytest.mark.parametrize("style", ["t5", "bart"])
def test_the_gradient_ends_below_it(style):
    net = tiny(style)
    batch = {**source(), "decoder_input_ids": target(style)}
    alone = lpt.overlay(layer=1, length=2, kind="appg", bottleneck=4, stack="encoder")
    free = lpt.overlay(**{**dict(alone.settings), "stop": False})
    delta = moved(alone, net.params)
    leaf = "encoder/layers/ffn/in/kernel"

    def grads(overlay):
        bound = overlay.bind(net.model)

        def loss(delta, value):
            base = tree.replace(net.params, {leaf: value})
            return jnp.square(bound.apply({"base": base, "overlay": delta}, batch).logits).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(delta, tree.get(net.params, leaf))

    (own, base), (other, whole) = grads(alone), grads(free)
    assert not np.asarray(base[0]).any()
    assert np.abs(whole[0]).max() > 0
    np.testing.assert_allclose(base[1], whole[1], rtol=1e-3, atol=1e-4)
    for path, value in tree.flatten(own).items():
        wanted = tree.get(other, path)
        np.testing.assert_allclose(value, wanted, rtol=1e-3, atol=1e-4, err_msg=path)
        assert np.abs(value).max() > 0, path


def test_it_composes_with_what_trains_above_and_below():
    net = tiny("t5")
    batch = {**source(), "decoder_input_ids": target("t5")}
    above = compose(lora.overlay(rank=2, sites=("decoder.attn.q",)), lpt.overlay(stack="encoder"))
    outputs(above, net, moved(above, net.params), batch)
    below = {"rank": 2, "sites": ("encoder.attn.q",)}
    refused = compose(lora.overlay(**below), lpt.overlay(stack="encoder"))
    params = {"base": net.params, "overlay": moved(refused, net.params)}
    with pytest.raises(ValueError, match=r"are attached \(encoder.attn.q\); use stop=False"):
        refused.bind(net.model).apply(params, batch)
    allowed = compose(lora.overlay(**below), lpt.overlay(stack="encoder", stop=False))
    outputs(allowed, net, params["overlay"], batch)


@pytest.mark.parametrize(
    ("style", "first", "deep"), [("t5", 0, True), ("bart", 1, True), ("bart", 0, False)]
)
def test_added_and_modular_prompts_begin_as_words_of_the_source(style, first, deep):
    net = tiny(style)
    plain = {**source(), "decoder_input_ids": target(style)}
    ids = (9, 4, 11)

    def put(values, new):
        new = np.broadcast_to(np.asarray(new, np.int32), (B, 3))
        return np.concatenate([values[:, :first], new, values[:, first:]], axis=1)

    words = {
        **plain,
        "input_ids": put(plain["input_ids"], ids),
        "attention_mask": put(plain["attention_mask"], 1),
    }
    wanted = net.apply(words)
    common = {"length": 3, "deep": deep, "first": first, "ids": ids, "stack": "encoder"}
    added = added_prompt.overlay(**common)
    close(outputs(added, net, added.init(KEY, net.params), plain), wanted, 2e-5)
    modular = mp2.overlay(modules=2, intrinsic=4, **common)
    delta = modular.init(KEY, net.params)
    own = delta["layers"]["resid"] if deep else delta["prompt"]
    own["z"] = jnp.zeros_like(own["z"])
    close(outputs(modular, net, delta, plain), wanted, 2e-5)
    # What is added moves them, and of both it is the same.
    rows = 0.3 * np.random.default_rng(3).normal(size=(2, 3, 16) if deep else (3, 16))
    delta = added.init(KEY, net.params)
    if deep:
        delta["layers"]["resid"] = jnp.asarray(rows, jnp.float32)
    else:
        delta["prompt"] = jnp.asarray(rows, jnp.float32)
    got = outputs(added, net, delta, plain)
    assert np.abs(got - wanted).max() > 1e-3
    fixed = mp2.overlay(modules=2, intrinsic=0, **common)
    delta = fixed.init(KEY, net.params)
    own = delta["layers"]["resid"] if deep else delta["prompt"]
    modules = np.stack([rows, rows], axis=1 if deep else 0)  # whatever the router says
    own["modules"] = jnp.asarray(modules, jnp.float32)
    close(outputs(fixed, net, delta, plain), got, 2e-5)


def test_rows_of_another_prompt_are_no_text():
    net = tiny("t5")
    batch = {**source(), "decoder_input_ids": target("t5")}
    late = lpt.overlay(layer=0, length=3, kind="appg", bottleneck=4, stack="encoder", stop=False)
    both = compose(prompt.overlay(length=2, site="encoder.embed"), late)
    delta = moved(both, net.params)
    # At the bottom, without positions: the pooled rows are those of the late prompt alone.
    words = tree.get(net.params, "embed/word/table")[batch["input_ids"]]
    rows = rows_of("appg", delta["lpt"], words, batch["attention_mask"], None)
    fixed = compose(prompt.overlay(length=2, site="encoder.embed"), at(0, rows, stop=False))
    wanted = {"prompt": delta["prompt"], "rows": {"rows": jnp.asarray(rows)}}
    close(outputs(both, net, delta, batch), outputs(fixed, net, wanted, batch), 2e-5)


def test_a_mask_of_the_source_that_says_who_sees_whom():
    net = tiny("t5")
    batch = {**source(), "decoder_input_ids": target("t5")}
    mask = batch["attention_mask"]
    wide = {**batch, "attention_mask": np.broadcast_to(mask[:, None], (B, *2 * mask.shape[1:]))}
    nothing = lora.overlay(rank=0, sites=("encoder.attn.q",))
    delta = nothing.init(KEY, net.params)
    close(outputs(nothing, net, delta, wide), net.apply(batch), 2e-5)
    # Rows in front see one another alone then; the decoder sees them all the same.
    late = lpt.overlay(layer=1, kind="mppg", bottleneck=4, stack="encoder")
    got = outputs(late, net, moved(late, net.params), wide)
    assert np.isfinite(got).all()
    assert np.abs(got - net.apply(batch)).max() > 1e-3


def test_what_trains_below_a_late_prompt_is_refused():
    """Biases of BART train by themselves; those of T5, which has none, as sites."""
    for style in ("bart", "t5"):
        net = tiny(style)
        late = {"layer": 1, "kind": "free", "stack": "encoder"}
        both = compose(bitfit.overlay(), lpt.overlay(**late))
        if style == "bart":
            with pytest.raises(ValueError, match=r"encoder/.*bias of the base is to train, but .*"):
                both.bind(net.model)
        compose(bitfit.overlay(), lpt.overlay(**late, stop=False)).bind(net.model)
        with pytest.raises(ValueError, match=r"encoder/.* use stop=False, or leave what trains"):
            lpt.overlay(**late).bind(net.model, trainable=("encoder/layers/.*",))
        lpt.overlay(**late).bind(net.model, trainable=("decoder/.*", "encoder/norm/.*"))


def test_bad_input():
    t5, bart = tiny("t5"), tiny("bart")
    batch = {**source(), "decoder_input_ids": target("t5")}
    for build in (lpt.overlay, mp2.overlay, added_prompt.overlay):
        with pytest.raises(ValueError, match="stack must be 'encoder', or empty .* got 'decoder'"):
            build(stack="decoder")
        with pytest.raises(ValueError, match=r"one stack of layers; .* use stack=encoder"):
            build().init(KEY, t5.params)
    with pytest.raises(ValueError, match="with stack=encoder"):
        lpt.overlay().bind(t5.model)
    with pytest.raises(ValueError, match="two stacks of layers; .* leave stack out"):
        lpt.overlay(stack="encoder").init(KEY, MODEL.abstract())
    deep = lpt.overlay(layer=3, kind="free", stack="encoder")
    params = {"base": t5.params, "overlay": {"prompt": jnp.zeros((5, 16))}}
    with pytest.raises(ValueError, match=r"in 0..2 for 2 layers, got 3"):
        deep.init(KEY, t5.params)
    with pytest.raises(ValueError, match=r"in 0..2 for 2 layers, got 3"):
        deep.bind(t5.model)
    above = at(3, np.zeros((B, 2, 16)))
    with pytest.raises(ValueError, match=r"in 0..2 for an encoder of 2, -1 for half, got 3"):
        above.bind(t5.model).apply({**params, "overlay": above.init(KEY, t5.params)}, batch)
    twice = compose(at(1, np.zeros((B, 2, 16))), lpt.overlay(kind="free", stack="encoder"))
    params["overlay"] = moved(twice, t5.params)
    with pytest.raises(ValueError, match=r"'encoder.late' must be a LateSite, and one alone"):
        twice.bind(t5.model).apply(params, batch)
    with pytest.raises(ValueError, match="none of the model's 22 positions"):
        mp2.overlay(length=30, intrinsic=2, first=0, ids=range(30), stack="encoder").init(
            KEY, bart.params
        )
