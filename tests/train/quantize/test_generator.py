"""Generators: shapes, domains, gradients, and what does not fit."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import masks, tree
from steppe.train.quantize import adapters, generator, scenes

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "small.py")))
KEY = jax.random.key(3)
BERT = small.teacher(small.encoder())
TABLE = BERT.params["embed"]["word"]["table"]
B, T = 5, 6


def fed(teacher, out):
    """The teacher's logits on what a generator made."""
    run = jax.jit(lambda p, o: teacher.model.apply(p, o.batch, embeds=o.embeds).logits)
    return run(teacher.params, out)


def made(gen, params=BERT.params, key=KEY, y=None):
    y = jax.jit(gen.init)(jax.random.key(0)) if y is None else y
    return y, jax.jit(gen.apply)(y, params, key)


@pytest.mark.parametrize("adapter", ["linear", "soft_embed", "gumbel"])
@pytest.mark.parametrize("body", ["noise", "decoder"])
def test_shapes_gradients_and_randomness(body, adapter):
    if body == "noise":
        gen = generator.noise(BERT.model, rows=B, length=T, adapter=adapter, width=12)
    else:
        gen = generator.decoder(
            BERT.model, small.decoder(width=8), rows=B, length=T, adapter=adapter
        )
    y, out = made(gen)
    assert out.embeds.shape == (B, T, 16)
    assert out.batch["attention_mask"].tolist() == [[1] * T] * B

    def loss(y):
        out = gen.apply(y, BERT.params, KEY)
        return jnp.square(BERT.model.apply(BERT.params, out.batch, embeds=out.embeds).logits).sum()

    grads = jax.jit(jax.grad(loss))(y)
    flat = {p: float(jnp.abs(g).max()) for p, g in tree.flatten(grads).items()}
    if body == "decoder":  # a head that a linear adapter does not read
        flat = {p: v for p, v in flat.items() if adapter != "linear" or "head" not in p}
    assert all(np.isfinite(v) and v > 0 for v in flat.values()), flat
    again, other = made(gen, y=y)[1], made(gen, y=y, key=jax.random.key(4))[1]
    np.testing.assert_array_equal(again.embeds, out.embeds)
    assert float(jnp.abs(other.embeds - out.embeds).max()) > 1e-3


def test_soft_embeddings_stay_among_the_tokens():
    gen = generator.noise(BERT.model, rows=B, length=T, tau=0.5)
    _, out = made(gen)
    low, high = TABLE.min(0), TABLE.max(0)
    assert bool(((out.embeds >= low - 1e-5) & (out.embeds <= high + 1e-5)).all())
    # Convex: the weights that give an embedding back are a distribution.
    weights = jnp.linalg.lstsq(TABLE.T, out.embeds.reshape(-1, 16).T)[0]
    np.testing.assert_allclose(TABLE.T @ weights, out.embeds.reshape(-1, 16).T, atol=1e-3)


def test_gumbel_gives_rows_of_the_table_and_begins_and_ends_where_asked():
    gen = generator.noise(BERT.model, rows=B, length=T, adapter="gumbel", ends=(1, 2))
    _, out = made(gen)
    gaps = jnp.abs(out.embeds[:, :, None] - TABLE).max(-1)
    assert float(gaps.min(-1).max()) < 1e-5
    np.testing.assert_array_equal(gaps.argmin(-1)[:, [0, -1]], [[1, 2]] * B)


@pytest.mark.parametrize("body", ["noise", "decoder"])
def test_all_candidates_are_the_whole_vocabulary(body):
    """The pool of a text, V of V words, is the vocabulary in its order: nothing changes."""
    vocab = TABLE.shape[0]

    def build(adapter, candidates):
        sizes = {"rows": B, "length": T, "adapter": adapter, "candidates": candidates}
        if body == "noise":
            return generator.noise(BERT.model, width=12, **sizes)
        return generator.decoder(BERT.model, small.decoder(width=8), **sizes)

    def loss(gen):
        return jax.jit(jax.grad(lambda y: jnp.square(gen.apply(y, BERT.params, KEY).embeds).sum()))

    for adapter in ("soft_embed", "gumbel"):
        whole, pooled = build(adapter, 0), build(adapter, vocab)
        y, out = made(whole)
        np.testing.assert_allclose(made(pooled, y=y)[1].embeds, out.embeds, atol=1e-6)
        one, other = loss(whole)(y), loss(pooled)(y)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, other)


def test_every_text_chooses_from_its_own_candidates():
    few = 3
    gen = generator.noise(BERT.model, rows=B, length=16, adapter="gumbel", candidates=few)
    y, out = made(gen)
    ids = jnp.abs(out.embeds[:, :, None] - TABLE).max(-1).argmin(-1)
    said = [set(np.asarray(row).tolist()) for row in ids]
    assert all(len(words) <= few for words in said)
    assert len(set.union(*said)) > few  # not the same ones in every text
    other = jnp.abs(made(gen, y=y, key=jax.random.key(8))[1].embeds[:, :, None] - TABLE)
    assert {*np.asarray(other.max(-1).argmin(-1)[0]).tolist()} != said[0]


@pytest.mark.parametrize(("size", "count"), [(10, 4), (37, 36), (37, 37), (30522, 2)])
def test_pools_hold_no_word_twice_and_leave_none_out(size, count):
    ids = np.asarray(jax.jit(lambda k: adapters.pools(k, 4000, count, size))(KEY))
    assert ids.min() >= 0
    assert ids.max() < size
    assert all(len(set(row.tolist())) == count for row in ids[:50])
    if size < 100:
        share = np.bincount(ids.ravel(), minlength=size) / len(ids)
        assert share.min() > 0.9 / -(-size // count)


def test_straight_through_gradients_are_those_of_the_softmax():
    """Against softmax(noisy / tau) E differentiated by hand, in float64 numpy."""
    tau, rng = 0.7, np.random.default_rng(0)
    l, pull = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 4))  # noqa: E741
    table = rng.normal(size=(5, 4))

    def embeds(l):  # noqa: E741
        return adapters._drawn(l, jnp.float32(table), tau, KEY)

    found, back = jax.vjp(embeds, jnp.float32(l))
    noise = np.asarray(masks.uniform(KEY, l.shape), np.float64)
    noisy = l - np.log(-np.log(noise))
    np.testing.assert_allclose(found, table[noisy.argmax(-1)], atol=1e-6)
    share = np.exp(noisy / tau) / np.exp(noisy / tau).sum(-1, keepdims=True)
    along = pull @ table.T
    expected = share * (along - (share * along).sum(-1, keepdims=True)) / tau
    np.testing.assert_allclose(back(jnp.float32(pull))[0], expected, atol=1e-5)
    step = rng.normal(size=l.shape)
    _, ahead = jax.jvp(embeds, (jnp.float32(l),), (jnp.float32(step),))
    np.testing.assert_allclose((ahead * pull).sum(), (expected * step).sum(), rtol=1e-5)


def test_linear_starts_at_the_teachers_scale():
    gen = generator.noise(BERT.model, rows=B, length=T, adapter="linear")
    _, out = made(gen)
    rms = float(jnp.sqrt(jnp.square(out.embeds).mean()))
    assert rms == pytest.approx(float(jnp.sqrt(jnp.square(TABLE).mean())), rel=0.02)


def test_no_adapter_where_the_width_fits():
    gen = generator.noise(BERT.model, rows=B, length=T, adapter=None, width=16)
    y, out = made(gen)
    assert "adapter" not in y
    assert out.embeds.shape == (B, T, 16)


def test_random_tokens_are_tokens():
    gen = generator.random_tokens(BERT.model, rows=B, length=T, ends=(1, 2), first=5)
    y, out = made(gen)
    assert y == {}
    ids = jnp.abs(out.embeds[:, :, None] - TABLE).max(-1).argmin(-1)
    assert int(ids[:, 1:-1].min()) >= 5
    np.testing.assert_array_equal(ids[:, [0, -1]], [[1, 2]] * B)
    expected = small.logits(BERT.model, BERT.params, {"input_ids": ids, **out.batch})
    found = fed(BERT, out)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_a_vision_teacher_sees():
    vit = small.teacher(small.vision(), scale=2.0)
    gen = generator.noise(vit.model, rows=B, length=4, adapter="linear")
    _, out = made(gen, vit.params)
    assert fed(vit, out).shape == (B, 3)
    gen = generator.pixels(vit.model, rows=B)
    _, out = made(gen, vit.params)
    images = out.batch["pixel_values"]
    assert images.shape == (B, 8, 8, 3)
    np.testing.assert_allclose(images.reshape(B, -1).std(1), 1, atol=1e-2)
    assert fed(vit, out).shape == (B, 3)


def test_images_from_dead_leaves():
    vit = small.teacher(small.vision(), scale=2.0)
    gen = generator.leaves(vit.model, rows=B, size=8)
    y, out = made(gen, vit.params)
    assert y == {}
    np.testing.assert_allclose(
        out.batch["pixel_values"], scenes.dead_leaves(KEY, (B, 8, 8, 3)), atol=1e-5
    )
    gen = generator.pixels(vit.model, rows=B, size=8, scenes=True)
    y, out = made(gen, vit.params)
    drawn = scenes.dead_leaves(jax.random.fold_in(KEY, 1), (B, 8, 8, 3))
    images = out.batch["pixel_values"]
    # A little is added, and what is added is learned.
    assert 0.9 < float(jnp.corrcoef(images.ravel(), drawn.ravel())[0, 1]) < 0.9999
    grads = jax.grad(lambda y: fed(vit, gen.apply(y, vit.params, KEY)).sum())(y)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_batches_feed_a_model():
    gen = generator.noise(BERT.model, rows=B, length=T)
    y = jax.jit(gen.init)(KEY)
    data = generator.batches(gen, y, BERT.params, KEY, 2)
    model = generator.feeding(BERT.model)
    assert small.logits(model, BERT.params, data[0]).shape == (B, 3)
    assert float(jnp.abs(data[0]["embeds"] - data[1]["embeds"]).max()) > 0


def test_bad_input():
    sizes = {"rows": B, "length": T}
    with pytest.raises(ValueError, match="is 8 wide and the teacher's embeddings 16: choose an"):
        generator.noise(BERT.model, **sizes, adapter=None, width=8)
    with pytest.raises(ValueError, match="is 8 wide and the teacher's embeddings 16"):
        generator.decoder(BERT.model, small.decoder(width=8), **sizes, adapter=None)
    with pytest.raises(ValueError, match="adapter must be one of 'linear', .*got 'mlp'"):
        generator.noise(BERT.model, **sizes, adapter="mlp")
    with pytest.raises(ValueError, match="tau must be a finite number > 0, got 0"):
        generator.noise(BERT.model, **sizes, tau=0)
    with pytest.raises(ValueError, match="rows must be a whole number >= 1, got 0"):
        generator.noise(BERT.model, rows=0, length=T)
    with pytest.raises(ValueError, match="length must be <= 16, the positions, got 17"):
        generator.noise(BERT.model, rows=B, length=17)
    with pytest.raises(ValueError, match="24 tokens, got 30: use adapter='linear'"):
        generator.decoder(BERT.model, small.decoder(vocab=30), **sizes, adapter="soft_embed")
    with pytest.raises(ValueError, match="reads must be 'tokens' or 'normal'"):
        generator.decoder(BERT.model, small.decoder(), **sizes, reads="ids")
    for count, said in ((-1, "whole number >= 0, got -1"), (True, "got True"), (2.0, "got 2.0")):
        with pytest.raises(ValueError, match=f"candidates must be a.*{said}"):
            generator.noise(BERT.model, **sizes, candidates=count)
    for count in (1, 25):
        with pytest.raises(ValueError, match=f"0, or from 2 to the 24 words .* got {count}"):
            generator.noise(BERT.model, **sizes, candidates=count)
    for kind in ("linear", None):
        with pytest.raises(ValueError, match="candidates must be 0 where the adapter chooses no"):
            generator.noise(BERT.model, **sizes, adapter=kind, width=16, candidates=4)
    vit = small.vision()
    with pytest.raises(ValueError, match="has no word table.*use adapter='linear'"):
        generator.noise(vit, rows=B, length=4)
    with pytest.raises(ValueError, match="length must be a square number of patches, got 5"):
        generator.noise(vit, rows=B, length=5, adapter="linear")
    with pytest.raises(ValueError, match="images need a vision teacher, got EncoderConfig"):
        generator.pixels(BERT.model, rows=B)
    with pytest.raises(ValueError, match="size must be a multiple of the patch 4, got 6"):
        generator.pixels(vit, rows=B, size=6)
