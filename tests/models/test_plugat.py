"""The module that PlugAT plugs in: its size, its neutral start, what is deployed of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import tree
from steppe.models.model import Inputs
from steppe.models.overlays import compose, inside, plugat, prefix, prompt

from .conftest import TINY
from .test_decoder_decode import CONFIGS
from .test_overlays import BERT, KEY, MODEL, count, logits, plain
from .test_seq2seq import tiny as encoder_decoder


def test_its_size_on_bert_base():
    """9.0% of the classifier, where the paper reports 9.1%."""
    for length in (20, 100):
        wanted = 768 * 512 + 512 + 512 * 18_432 + 18_432 + length * 768
        assert count(plugat.overlay(length=length)) == wanted
    assert 0.089 < 9_849_344 / tree.count(BERT.build().abstract()) < 0.092
    assert count(plugat.overlay(mode="input")) == 20 * 768
    assert count(plugat.overlay(length=0)) == 0


@pytest.mark.parametrize("mode", plugat.MODES)
def test_it_begins_small_and_what_is_deployed_is_the_same(mode, tiny, batch):
    _, params = tiny
    overlay = plugat.overlay(mode=mode, length=3, hidden=6)
    delta = overlay.init(KEY, params)
    folded = plugat.materialize(delta)
    rows = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(folded)])
    np.testing.assert_allclose(rows.std(), 0.02, rtol=0.2)
    assert rows.size == (3 * 16 if mode == "input" else 4 * 2 * 3 * 16)
    got = logits(overlay, params, delta, batch)
    deployed = plugat.overlay(mode=mode, length=3, hidden=0)
    np.testing.assert_allclose(logits(deployed, params, folded, batch), got, atol=1e-6)
    assert plugat.materialize(folded) is folded
    away = np.abs(got - plain(params, batch)).max()
    assert 0 < away < 0.5
    if mode == "deep":
        wanted = logits(prefix.overlay(length=3), params, folded, batch)
        np.testing.assert_array_equal(logits(deployed, params, folded, batch), wanted)


def test_it_leaves_no_trace_of_length_0_and_fits_another_classifier(tiny, batch):
    _, params = tiny
    overlay = plugat.overlay(length=0)
    np.testing.assert_array_equal(
        logits(overlay, params, overlay.init(KEY, params), batch), plain(params, batch)
    )
    module = plugat.overlay(length=2, hidden=0)
    delta = module.init(KEY, params)
    other = jax.tree.map(lambda a: 1.5 * a, params)
    for base in (params, other):
        bound = module.bind(MODEL, frozen=base, trainable=())
        assert bound.trainable == (r"overlay/.*",)  # the deployed head stays too
        tree.same_structure(delta, bound.abstract()["overlay"], ("module", "model"))


def test_rows_at_the_input_stand_behind_the_first_token(tiny, batch):
    _, params = tiny
    overlay = plugat.overlay(mode="input", length=2)
    delta = overlay.init(KEY, params)
    bound = overlay.bind(MODEL)
    call = jax.jit(
        lambda d: bound.apply({"base": params, "overlay": d}, batch, all_hidden=True).hidden
    )
    states = call(delta)
    plain_states = jax.jit(lambda: MODEL.parts.embed(params, batch).hidden)()
    assert states.shape[2] == 11
    np.testing.assert_allclose(states[0][:, 0], plain_states[:, 0], atol=1e-6)
    text = inside.removed(states[0], 2, 1)
    assert np.abs(text[:, 1:] - plain_states[:, 1:]).max() > 1e-3  # two positions on


def test_behind_a_prompt_it_stands_behind_the_first_token_of_the_text(tiny, batch):
    """Attached last, it is nearest to the text; the head reads the text's first token."""
    _, params = tiny
    overlay = compose(prompt.overlay(length=2), plugat.overlay(mode="input", length=1))
    delta = overlay.init(KEY, params)
    bound = overlay.bind(MODEL)
    out = jax.jit(lambda d: bound.apply({"base": params, "overlay": d}, batch, all_hidden=True))(
        delta
    )
    words = params["embed"]["word"]["table"]
    rows = [delta["prompt"]["prompt"], words[batch["input_ids"][0, :1]], delta["plugat"]["prompt"]]
    own = {
        "input_ids": np.ones((1, 12), np.int32),
        "attention_mask": np.r_[1, 1, 1, 1, batch["attention_mask"][0, 1:]][None],
    }
    embeds = jnp.concatenate([*rows, words[batch["input_ids"][0, 1:]]])[None]
    types = batch["token_type_ids"][0]
    own["token_type_ids"] = np.r_[0, 0, types[0], types[1], types[1:]][None]
    wanted = jax.jit(lambda: MODEL.apply(params, own, embeds=embeds).hidden)()
    np.testing.assert_allclose(out.hidden[-1][0], wanted[0], atol=1e-5)
    head = MODEL.parts.head(params, wanted[:, 2:], Inputs(None, None, None, None))
    np.testing.assert_allclose(out.logits[0], head[0], atol=1e-5)


def together(*overlays):
    bound = compose(*overlays).bind(MODEL)
    ids = {"input_ids": np.ones((2, 4), np.int32)}
    return jax.eval_shape(lambda p: bound.apply(p, ids), bound.abstract())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: plugat.overlay(mode="prefix"), "mode must be one of deep, input"),
        (lambda: plugat.overlay(length=-1), "length and hidden must be >= 0"),
        (lambda: plugat.overlay(std=0), "std must be > 0"),
        (lambda: plugat.overlay(std=float("nan")), "std must be > 0 and finite, got nan"),
        (
            lambda: plugat.overlay(mode="input").bind(CONFIGS["llama"].build()),
            "use mode='deep' for a DecoderConfig",
        ),
        (
            lambda: together(plugat.overlay(mode="input", length=2), prompt.overlay(length=2)),
            "attach plugat last",
        ),
        (
            lambda: plugat.overlay(mode="input", length=19).init(KEY, TINY.build().abstract()),
            "leaves the text none of the model's 20 positions",
        ),
        (
            lambda: plugat.overlay().init(KEY, encoder_decoder("t5").params),
            "no attention 'attn' in this model; there are decoder.attn, decoder.cross",
        ),
        (
            lambda: plugat.overlay(length=1).bind(
                dataclasses.replace(TINY, family="bert").build(), frozen={"x": np.ones(1)}
            ),
            "frozen has a parameter",
        ),
    ],
)
def test_bad_input(call, said):
    with pytest.raises(ValueError, match=said):
        call()
