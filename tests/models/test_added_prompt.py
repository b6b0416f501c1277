"""Prompts added to hidden states: what the text is read as, what they change, decoders, files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import tree
from steppe.models.decoder import DecoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.overlays import added_prompt, compose, files, prompt

from .conftest import TINY

KEY = jax.random.key(0)
IDS = (5, 6, 7)
DECODER = DecoderConfig(
    "llama", vocab_size=40, width=16, layers=3, heads=2, ffn_width=24, positions=24, tied=True
)


def run(overlay, model, params, delta, batch, **options):
    bound = overlay.bind(model)
    full = {"base": params, "overlay": delta}
    return jax.jit(lambda p: bound.apply(p, batch, **options))(full)


def with_words(batch, ids, first=1):
    """The batch with tokens in its texts, as a tokenizer would give them."""
    rows = len(batch["input_ids"])

    def put(name, values):
        given = batch[name]
        return np.concatenate([given[:, :first], values, given[:, first:]], 1)

    words = np.tile(np.array(ids, np.int32), (rows, 1))
    return {
        "input_ids": put("input_ids", words),
        "attention_mask": put("attention_mask", np.ones_like(words)),
        "token_type_ids": put(
            "token_type_ids", np.repeat(batch["token_type_ids"][:, first : first + 1], len(ids), 1)
        ),
    }


@pytest.mark.parametrize("deep", [True, False])
def test_zero_is_the_text_with_the_words_in_it(deep, tiny, batch):
    _, params = tiny
    model = TINY.build()
    overlay = added_prompt.overlay(length=2, ids=IDS, deep=deep)
    delta = overlay.init(KEY, params)
    assert set(delta) == {"words", "layers" if deep else "prompt"}
    found = run(overlay, model, params, delta, batch)
    wanted = jax.jit(lambda p: model.apply(p, with_words(batch, IDS)))(params)
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-5)
    np.testing.assert_allclose(found.hidden, wanted.hidden, atol=1e-5)


def test_what_is_added_where(tiny, batch):
    """Layer by layer by hand: the first layer's prompt is also the shallow one."""
    _, params = tiny
    model = TINY.build()
    rows = np.random.default_rng(0).normal(size=(TINY.layers, 2, TINY.width)).astype(np.float32)
    deep = added_prompt.overlay(length=2, ids=IDS)
    delta = deep.init(KEY, params)
    delta = {**delta, "layers": {"resid": jnp.asarray(rows)}}
    found = run(deep, model, params, delta, batch)

    def by_hand(params):
        inputs = model.parts.embed(params, with_words(batch, IDS))
        x = inputs.hidden
        for layer in range(TINY.layers):
            x = x.at[:, 1:3].add(rows[layer])
            x = model.parts.layers(params, inputs._replace(hidden=x), start=layer, stop=layer + 1)
        return model.parts.head(params, x, inputs), x

    logits, hidden = jax.jit(by_hand)(params)
    # The last layer is computed at the first token only, and wholly for who reads it.
    np.testing.assert_allclose(found.logits, logits, atol=1e-5)
    np.testing.assert_allclose(found.hidden, hidden, atol=1e-5)
    shallow = added_prompt.overlay(length=2, ids=IDS, deep=False)
    only = {"words": delta["words"], "prompt": jnp.asarray(rows[0])}
    same = {**delta, "layers": {"resid": jnp.asarray(rows).at[1:].set(0.0)}}
    np.testing.assert_allclose(
        run(shallow, model, params, only, batch).logits,
        run(deep, model, params, same, batch).logits,
        atol=1e-5,
    )


def test_a_decoder_reads_words_in_front_and_behind():
    """The head that reads the last token, its rows those of the vocabulary, is the language model's
    next word after what stands behind the text; padding makes no difference."""
    lm = dataclasses.replace(DECODER, head=HeadConfig("lm", 1, drop=0.0)).build()
    params = jax.jit(lm.init)(KEY)
    words = (11, 12)
    table = params["embed"]["word"]["table"]
    classes = dataclasses.replace(DECODER, head=HeadConfig("classification", 2, None, 0.0)).build()
    own = {**params, "head": {"out": {"kernel": table[jnp.array(words)].T}}}
    overlay = added_prompt.overlay(length=2, ids=IDS, first=0, after=(8, 9))
    delta = jax.jit(overlay.init)(KEY, own)
    delta = {**delta, "layers": {"resid": 0.5 * jax.random.normal(KEY, (3, 2, 16))}}
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 40, (2, 6)).astype(np.int32)
    mask = np.array([[1] * 6, [1] * 4 + [0] * 2], np.int32)
    right = run(overlay, classes, own, delta, {"input_ids": ids, "attention_mask": mask}).logits
    moved = {"input_ids": np.roll(ids, 2, 1), "attention_mask": np.roll(mask, 2, 1)}
    left = run(overlay, classes, own, delta, moved).logits
    np.testing.assert_allclose(left[1], right[1], atol=1e-5)
    plain = added_prompt.overlay(length=2, ids=IDS, first=0)
    text = np.stack([[*ids[0], 8, 9], [*ids[1, :4], 8, 9, 0, 0]]).astype(np.int32)
    alone = {k: v for k, v in delta.items() if k != "after"}
    seen = np.array([[1] * 8, [1] * 6 + [0] * 2], np.int32)
    said = run(plain, lm, params, alone, {"input_ids": text, "attention_mask": seen}).logits
    assert said.shape == (2, 8, 40)  # the words in front are no tokens of the text
    for row, last in enumerate((7, 5)):
        np.testing.assert_allclose(right[row], said[row, last, np.array(words)], atol=1e-5)


def test_the_words_do_not_train_and_it_is_written_and_read(tiny, batch, tmp_path):
    _, params = tiny
    overlay = added_prompt.overlay(length=2, ids=IDS)
    bound = overlay.bind(TINY.build(), frozen=params)
    live, _ = tree.split(bound.abstract(), bound.trainable)
    assert set(live["overlay"]) == {"layers"}
    assert tree.count(live["overlay"]) == TINY.layers * 2 * TINY.width
    delta = overlay.init(KEY, params)
    files.save(tmp_path / "o", overlay, {"overlay": delta}, base="b", fingerprint="f")
    saved = files.load(tmp_path / "o")
    again = added_prompt.overlay(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in saved.settings.items()}
    )
    assert again.settings == overlay.settings
    for a, b in zip(jax.tree.leaves(saved.params["overlay"]), jax.tree.leaves(delta), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 0}, "length must be >= 1, got 0"),
        ({"first": 2}, "first must be 0 or 1, got 2"),
        ({"length": 4, "ids": IDS}, "ids must name at least length=4 tokens, got 3"),
        ({"length": 1, "ids": (99,)}, "ids must be of the vocabulary of 50 tokens, got 99"),
        ({"length": 1, "ids": (9,), "after": (-1,)}, "after must be of the vocabulary"),
        ({"length": 1, "ids": (9,) * 20}, "leave it none of the model's 20 positions"),
    ],
)
def test_mistakes(options, said, tiny):
    with pytest.raises(ValueError, match=said):
        added_prompt.overlay(**options).init(KEY, tiny[1])


@pytest.mark.parametrize("order", [1, -1])
def test_rows_in_front_are_refused_in_either_order(order, tiny):
    """What is added would land on the other overlay's rows."""
    pair = (added_prompt.overlay(length=2, ids=IDS), prompt.overlay(length=1))[::order]
    bound = compose(*pair).bind(TINY.build())
    ids = {"input_ids": np.ones((2, 4), np.int32)}
    with pytest.raises(ValueError, match="added-prompt counts columns of the text itself"):
        jax.eval_shape(lambda p: bound.apply(p, ids), bound.abstract())
    with pytest.raises(ValueError, match="use first=0 for a decoder"):
        added_prompt.overlay(length=2, ids=IDS).bind(DECODER.build())


def test_who_sees_whom_is_refused(tiny, batch):
    overlay = added_prompt.overlay(length=2, ids=IDS)
    wide = {**batch, "attention_mask": np.ones((4, 9, 9), np.int32)}
    with pytest.raises(ValueError, match="attention_mask \\[batch, tokens\\]"):
        run(overlay, TINY.build(), tiny[1], overlay.init(KEY, tiny[1]), wide)
