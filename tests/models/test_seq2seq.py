"""Encoder-decoders of every style: decoding, sites, masks, padding, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import tree
from steppe.models.heads import HeadConfig
from steppe.models.model import Masks
from steppe.models.seq2seq import Seq2SeqConfig, Seq2SeqMasks
from steppe.models.sites import Site

B, T, U, V, P = 3, 7, 6, 50, 2
TINY = {
    "vocab_size": V,
    "width": 16,
    "heads": 2,
    "ffn_width": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "positions": 20,
    "head": HeadConfig("lm"),
    "unroll": 1,
}
POST = {"pre_norm": False, "rms": False, "use_bias": True, "head_bias": "fixed", "epsilon": 1e-5}
STYLES = {
    "t5": Seq2SeqConfig(
        "t5", **TINY, scale=1.0, gated=True, act="gelu_tanh", head_scale=0.25, buckets=8, distance=9
    ),
    "bart": Seq2SeqConfig(
        "bart",
        **TINY,
        **POST,
        position_kind="learned",
        position_offset=2,
        embed_norm=True,
        act="gelu",
        decoder_heads=4,
        decoder_ffn_width=20,
    ),
    "student": Seq2SeqConfig(
        "marian_ssru", **TINY, **POST, position_kind="timing", cell="ssru", start_id=-1
    ),
}
every_style = pytest.mark.parametrize("style", STYLES)


class Jitted:
    """A model with its functions compiled, and parameters away from their initial values."""

    def __init__(self, config):
        self.model = model = config.build()
        rng = np.random.default_rng(0)
        self.params = jax.tree.map(
            lambda x: np.asarray(x + 0.15 * rng.normal(size=x.shape), np.float32),
            jax.jit(model.init)(jax.random.key(0)),
        )
        self.apply = jax.jit(lambda batch: model.apply(self.params, batch).logits)
        self.start = jax.jit(
            lambda batch, more, last_only=True: model.decode.start(
                self.params, batch, more, last_only=last_only
            ),
            static_argnums=(1, 2),
        )
        self.step = jax.jit(lambda tokens, state: model.decode.step(self.params, tokens, state))


@functools.cache
def tiny(style):
    return Jitted(STYLES[style])


def source():
    rng = np.random.default_rng(0)
    mask = (np.arange(T) < np.array([T, 4, 2])[:, None]).astype(np.int32)
    return {
        "input_ids": rng.integers(2, V, (B, T)).astype(np.int32) * mask,
        "attention_mask": mask,
    }


def target(style):
    ids = np.random.default_rng(1).integers(2, V, (B, U)).astype(np.int32)
    ids[:, 0] = STYLES[style].start_id
    return ids


def close(left, right, atol=2e-6):
    np.testing.assert_allclose(left, right, atol=atol, rtol=1e-5)


@every_style
def test_every_step_equals_the_whole_forward_pass(style):
    net, ids = tiny(style), target(style)
    whole = net.apply({**source(), "decoder_input_ids": ids})
    logits, state = net.start(source(), U - 1)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for t in range(U):
        assert logits.dtype == jnp.float32
        close(logits, whole[:, t])
        if t + 1 < U:
            logits, state = net.step(ids[:, t + 1], state)
            assert jax.tree.structure(state) == jax.tree.structure(shapes, is_leaf=_is_shape)
            assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes


def _is_shape(node):
    return (
        isinstance(node, tuple)
        and len(node) == 2
        and isinstance(node[0], tuple)
        and (not node[0] or isinstance(node[0][0], int))
    )


@every_style
def test_a_forced_prefix_and_rows_taken_from_a_state(style):
    """Prefixes of 4, 3 and 1 tokens, padded on the left; then rows 2, 0, 2 go on."""
    net, ids = tiny(style), target(style)
    whole = np.asarray(net.apply({**source(), "decoder_input_ids": ids}))
    lengths = np.array([4, 3, 1])
    prefix, mask = np.full((B, 4), 7, np.int32), np.zeros((B, 4), np.int32)
    for row, n in enumerate(lengths):
        prefix[row, 4 - n :], mask[row, 4 - n :] = ids[row, :n], 1
    forced = {**source(), "decoder_input_ids": prefix, "decoder_attention_mask": mask}
    logits, state = net.start(forced, 3)
    close(logits, whole[np.arange(B), lengths - 1])
    logits, state = net.step(ids[np.arange(B), lengths], state)
    close(logits, whole[np.arange(B), lengths])
    rows = np.array([2, 0, 2])
    logits, _ = net.step(ids[rows, lengths[rows] + 1], state.take(jnp.asarray(rows)))
    close(logits, whole[rows, lengths[rows] + 1])
    every, _ = net.start(forced, 3, False)
    close(every[0], whole[0, :4])
    # The same prefix through apply, whose positions count the tokens of the mask too.
    close(net.apply(forced)[:, -1], whole[np.arange(B), lengths - 1])


@every_style
def test_labels_are_shifted_right(style):
    net, ids = tiny(style), target(style)
    labels = np.concatenate([ids[:, 1:], np.full((B, 1), 9)], axis=1)
    labels[1, 3:] = -100
    shifted = np.concatenate([ids[:, :1], labels[:, :-1]], axis=1)
    shifted[shifted == -100] = STYLES[style].pad_id
    a = net.apply({**source(), "labels": labels})
    close(a, net.apply({**source(), "decoder_input_ids": shifted}), 0)


@every_style
def test_padding_and_the_future_are_not_seen(style):
    net, ids = tiny(style), target(style)
    batch = {**source(), "decoder_input_ids": ids}
    base = net.apply(batch)
    other = {**batch, "input_ids": np.where(batch["attention_mask"], batch["input_ids"], 33)}
    close(net.apply(other), base)
    later = ids.copy()
    later[:, 4:] = 11
    close(net.apply({**batch, "decoder_input_ids": later})[:, :4], base[:, :4])


def prefix_sites(style, seed=5):
    """A key-value prefix in front of every attention that the style has."""
    config = STYLES[style]
    net = config.build()
    names = [n for n in net.sites if n.endswith("kv_prefix")]
    keys = iter(jax.random.split(jax.random.key(seed), 2 * len(names)))

    def fn(delta, x, base, context):
        return tuple(a[None] for a in delta)

    out = {}
    for name in names:
        part = name.split(".")[0]
        layer = config.layer(part)
        shape = (config.depth(part), P, layer.heads, layer.head_dim)
        out[name] = Site(fn, tuple(jax.random.normal(next(keys), shape) for _ in "kv"))
    return out


def prompt_sites(style):
    """Two vectors in front of the source and of the target."""
    width = STYLES[style].width

    def fn(delta, x, base, context):
        if context.step:
            return base(x)
        rows = x.hidden.shape[0]
        front = jnp.broadcast_to(delta, (rows, *delta.shape)).astype(x.hidden.dtype)
        hidden = jnp.concatenate([front, x.hidden], axis=1)
        mask = x.mask if x.mask is None else jnp.pad(x.mask, ((0, 0), (P, 0)), constant_values=1)
        positions = None if x.positions is None else jnp.arange(hidden.shape[1])
        return base(x._replace(hidden=hidden, mask=mask, positions=positions, prompt=P))

    return {
        f"{part}.embed": Site(fn, jax.random.normal(jax.random.key(n), (P, width)))
        for n, part in enumerate(("encoder", "decoder"))
    }


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@every_style
def test_prefixes_and_prompts_while_decoding(style, kind):
    net, ids = tiny(style), target(style)
    sites = prefix_sites(style) if kind == "prefix" else prompt_sites(style)
    decode, params = net.model.decode, net.params
    batch = {**source(), "decoder_input_ids": ids}
    whole = jax.jit(lambda b: net.model.apply(params, b, sites=sites).logits)(batch)
    assert whole.shape == (B, U, V)
    assert np.abs(whole - net.apply(batch)).max() > 0.01
    logits, state = jax.jit(lambda b: decode.start(params, b, U, sites=sites))(source())
    step = jax.jit(lambda t, s: decode.step(params, t, s, sites=sites))
    for t in range(U):
        close(logits, whole[:, t], 5e-6)
        if t + 1 < U:
            logits, state = step(ids[:, t + 1], state)


@every_style
def test_every_site_is_called(style):
    """Each dense site scaled by two changes the logits, in apply and in step alike."""
    net, ids = tiny(style), target(style)
    batch = {**source(), "decoder_input_ids": ids}
    skipped = ("kv_prefix", "embed", "late")
    names = [n for n in net.model.sites if not n.endswith(skipped)]

    def make(factors):
        def fn(delta, x, base, context):
            return base(x) * delta

        out = {}
        for name in names:
            depth = () if name == "logits" else (STYLES[style].depth(name.split(".")[0]),)
            out[name] = Site(fn, jnp.broadcast_to(factors[name], depth))
        return out

    @jax.jit
    def run(factors):
        sites = make(factors)
        whole = net.model.apply(net.params, batch, sites=sites).logits[:, 1]
        decode = net.model.decode
        _, state = decode.start(net.params, source(), 1, sites=sites)
        logits, _ = decode.step(net.params, ids[:, 1], state, sites=sites)
        return whole, logits

    ones = dict.fromkeys(names, np.float32(1.0))
    base, _ = run(ones)
    for name in names:
        whole, stepped = run({**ones, name: np.float32(1.7)})
        # Scaling all keys' biases or a norm's input may cancel; nothing else may.
        assert np.abs(whole - base).max() > 1e-5, name
        close(stepped, whole, 1e-5)


@every_style
def test_masks(style):
    """Masks of ones change nothing; a masked-out branch does; decoding agrees."""
    config, net, ids = STYLES[style], tiny(style), target(style)
    batch = {**source(), "decoder_input_ids": ids}
    heads = {p: config.layer(p).heads for p in ("encoder", "decoder")}
    own = None if config.cell == "ssru" else jnp.ones((3, heads["decoder"])).at[1, 0].set(0.0)

    def build(on):
        def m(x):
            return None if x is None else jnp.where(on, jnp.ones_like(x), x)

        return Seq2SeqMasks(
            Masks(m(jnp.ones((2, heads["encoder"])).at[0, 1].set(0.0)), m(jnp.zeros((2, 24)))),
            Masks(m(own), None, m(jnp.array([1.0, 0.0, 1.0]))),
            m(jnp.ones((3, heads["decoder"])).at[2, 0].set(0.0)),
        )

    @jax.jit
    def run(on):
        masks = build(on)
        whole = net.model.apply(net.params, batch, masks=masks).logits[:, 1]
        decode = net.model.decode
        _, state = decode.start(net.params, source(), 1, masks=masks)
        return whole, decode.step(net.params, ids[:, 1], state, masks=masks)[0]

    ones, stepped = run(True)
    close(ones, net.apply(batch)[:, 1])
    masked, stepped = run(False)
    assert np.abs(masked - ones).max() > 1e-3
    close(masked, stepped)


def test_dropout_is_seeded_and_needs_a_key():
    net = tiny("t5")
    batch = {**source(), "decoder_input_ids": target("t5")}
    model = net.model
    run = jax.jit(lambda key: model.apply(net.params, batch, rng=key, train=True).logits)
    a, b, c = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3
    with pytest.raises(ValueError, match="needs rng"):
        model.apply(net.params, batch, train=True)


def test_embeddings_in_place_of_ids():
    net = tiny("bart")
    batch = {**source(), "decoder_input_ids": target("bart")}
    words = net.params["embed"]["word"]["table"][batch["input_ids"]]
    mute = {k: v for k, v in batch.items() if k != "input_ids"}
    got = jax.jit(lambda b, w: net.model.apply(net.params, b, embeds=w).logits)(mute, words)
    close(got, net.apply(batch))


def test_bad_input_is_named():
    net = tiny("bart")
    model, params = net.model, net.params
    batch = {**source(), "decoder_input_ids": target("bart")}

    def rejects(match, batch=batch, **options):
        with pytest.raises(ValueError, match=match):
            model.apply(params, batch, **options)

    rejects("neither decoder_input_ids nor labels", source())
    rejects("no input_ids", {"decoder_input_ids": target("bart")})
    rejects("must be Seq2SeqMasks, got Masks", masks=Masks())
    rejects("no site 'attn.q'", sites={"attn.q": Site(None, ())})
    rejects("no site 'encoder.ffn.gate'", sites={"encoder.ffn.gate": Site(None, ())})
    stacked = {"decoder.attn.q": Site(None, np.zeros((2, 4)))}
    rejects("stacked over the 3 layers", sites=stacked)
    long = np.ones((1, 21), np.int32)
    rejects("21 tokens is longer than the model's 20", {"input_ids": long, "labels": long[:, :2]})
    rejects("attention mask must have shape", {**batch, "attention_mask": np.ones((B, 3), int)})
    rejects("masks.cross must be", masks=Seq2SeqMasks(cross=jnp.ones((3, 5))))
    with pytest.raises(ValueError, match=r"prefix of 1 tokens and more=20 exceed max_length=20"):
        model.decode.start(params, source(), 20)
    with pytest.raises(ValueError, match="more must be >= 0"):
        model.decode.start(params, source(), -1)
    student = tiny("student")
    heads = Seq2SeqMasks(decoder=Masks(head=jnp.ones((3, 2))))
    with pytest.raises(ValueError, match="SSRU decoder has no own heads"):
        student.model.apply(student.params, batch, masks=heads)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": 15}, "width 15 is not divisible by heads 2"),
        ({"position_kind": "none"}, "position_kind must be one of relative"),
        ({"cell": "gru"}, "cell must be one of attention, ssru"),
        ({"decoder_layers": 0}, "decoder_layers must be >= 1"),
        ({"head": HeadConfig("classification")}, "head 'lm' only, got 'classification'"),
        ({"act": "swoosh"}, "activation must be one of"),
    ],
)
def test_bad_configs(change, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(STYLES["t5"], **change)


@every_style
def test_what_trains_and_what_there_is(style):
    model = STYLES[style].build()
    paths = tree.paths(model.abstract())
    _, fixed = tree.split(model.abstract(), model.trainable)
    assert tree.paths(fixed) == ["head/bias"] if style != "t5" else not tree.paths(fixed)
    assert ("decoder/layers/ssru/in/kernel" in paths) == (style == "student")
    assert ("decoder/relative/table" in paths) == (style == "t5")
    assert all(tree.is_stacked(p) == ("/layers/" in p) for p in paths)
    headless = STYLES[style].with_head(None).build()
    assert headless.decode is None
    assert not [p for p in tree.paths(headless.abstract()) if p.startswith("head/")]
