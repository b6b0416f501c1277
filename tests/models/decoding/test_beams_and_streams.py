"""Beam search against all sequences and a plain loop; streams against a loop over steps."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import decoding
from steppe.models.decoding import Settings
from steppe.models.sites import Site


@pytest.fixture(scope="module")
def small(toy_build):
    """A vocabulary so small that all sequences can be tried."""
    model = toy_build(vocab=5)
    return model, model.init(jax.random.key(1))


@pytest.fixture(scope="module")
def batch():
    return decoding.pad_prompts([[1, 2, 3], [4], [2, 2]])


def log_probabilities(model, params, prompt, sequences):
    rows = np.array([[*prompt, *s] for s in sequences])
    logits = model.apply(params, {"input_ids": rows}).logits
    logp = jax.nn.log_softmax(logits[:, len(prompt) - 1 : -1])
    taken = jnp.take_along_axis(logp, rows[:, len(prompt) :, None], axis=2)
    return np.asarray(taken[..., 0].sum(1))


def test_wide_enough_it_finds_the_best_of_all(small, batch):
    """With as many beams as there are prefixes the search is exhaustive."""
    found = decoding.beam_search(*small, batch, beams=30, best=3, max_new_tokens=3)
    sequences = list(itertools.product(range(5), repeat=3))
    for i, prompt in enumerate(([1, 2, 3], [4], [2, 2])):
        scores = log_probabilities(*small, prompt, sequences) / 3
        order = np.argsort(-scores)[:3]
        np.testing.assert_allclose(found.scores[i], scores[order], atol=1e-5)
        assert [tuple(t) for t in found.tokens[i].tolist()] == [sequences[k] for k in order]


def test_one_beam_is_greedy(toy, prompts_ids):
    batch = decoding.pad_prompts(prompts_ids)
    found = decoding.beam_search(*toy, batch, beams=1, max_new_tokens=9)
    plain = decoding.generate(*toy, batch, Settings(max_new_tokens=9))
    np.testing.assert_array_equal(found.tokens[:, 0], plain.tokens)
    np.testing.assert_allclose(found.scores[:, 0], plain.logprobs.sum(1) / 9, atol=1e-5)


def test_the_end_token_ends_a_beam(toy, prompts_ids):
    batch = decoding.pad_prompts(prompts_ids)
    options = {"beams": 3, "best": 3, "max_new_tokens": 10, "eos_id": [4, 11], "pad_id": 2}
    for stopping in (True, False, "never"):
        found = decoding.beam_search(*toy, batch, early_stopping=stopping, **options)
        for i, k in itertools.product(range(4), range(3)):
            n = found.lengths[i, k]
            row = found.tokens[i, k]
            assert not set(row[: n - 1]) & {4, 11}
            assert n == 10 or row[n - 1] in (4, 11)
            assert (row[n:] == 2).all()
            total = log_probabilities(*toy, prompts_ids[i], [row[:n].tolist()])[0]
            np.testing.assert_allclose(found.scores[i, k], total / n, atol=1e-5)
        assert (np.diff(found.scores, axis=1) <= 0).all()


def test_a_row_does_not_depend_on_the_others(toy, prompts_ids):
    options = {"beams": 3, "max_new_tokens": 10, "eos_id": 4}
    both = decoding.beam_search(*toy, decoding.pad_prompts(prompts_ids), **options)
    alone = decoding.beam_search(*toy, decoding.pad_prompts(prompts_ids[2:3]), **options)
    n = alone.lengths[0, 0]
    np.testing.assert_array_equal(both.tokens[2, 0, :n], alone.tokens[0, 0])
    np.testing.assert_allclose(both.scores[2], alone.scores[0], atol=1e-5)


def test_bad_beams(toy, batch):
    for options, message in (
        ({"beams": 0}, "beams must be at least 1"),
        ({"best": 5}, "best must be from 1 to beams = 4"),
        ({"early_stopping": "often"}, "early_stopping must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            decoding.beam_search(*toy, batch, **options)


def contrast(z):
    return jax.nn.log_softmax(z["expert"]) - 0.5 * jax.nn.log_softmax(z["amateur"])


def scaled(z, alpha):
    return z["good"] - alpha * z["bad"]


@pytest.fixture(scope="module")
def two(toy_build):
    model = toy_build()
    return model, model.init(jax.random.key(8)), model.init(jax.random.key(9))


def by_hand(toy_steps, first, second, weight, count):
    """Greedy tokens of log p_first - weight * log p_second, one step at a time."""
    (one, push_one), (other, push_other) = toy_steps(*first), toy_steps(*second)
    tokens = []
    for _ in range(count):
        z = jax.nn.log_softmax(jnp.asarray(one)) - weight * jax.nn.log_softmax(jnp.asarray(other))
        tokens.append(int(z.argmax()))
        one, other = push_one(tokens[-1]), push_other(tokens[-1])
    return tokens


def test_two_models_in_step(two, toy_steps, prompts_ids):
    model, expert, amateur = two
    batch = decoding.pad_prompts(prompts_ids)
    joint = decoding.streams(
        {"expert": (model, expert, batch), "amateur": (model, amateur, batch)}, contrast
    )
    out = decoding.generate(*joint, Settings(max_new_tokens=10))
    for prompt, tokens in zip(prompts_ids, out.tokens.tolist()):
        wanted = by_hand(toy_steps, (model, expert, prompt), (model, amateur, prompt), 0.5, 10)
        assert tokens == wanted


def test_one_model_under_two_prompts(two, toy_steps, prompts_ids):
    """One batch of twice the rows; other strengths compile nothing."""
    model, params, _ = two
    reverse = [[7, *p, 8, 9] for p in prompts_ids]
    parts = {
        "good": (model, params, decoding.pad_prompts(prompts_ids)),
        "bad": (model, params, decoding.pad_prompts(reverse)),
    }
    compiles = []
    for alpha in (0.0, 0.3, 0.7):
        joint = decoding.streams(parts, scaled, jnp.float32(alpha))
        assert len(joint.params) == 2  # the model once, and the strength
        out = decoding.generate(*joint, Settings(max_new_tokens=8))
        compiles.append(decoding.shared(joint.model).compiles)
        for i in range(4):
            wanted = by_hand(
                toy_steps, (model, params, prompts_ids[i]), (model, params, reverse[i]), alpha, 8
            )
            assert out.tokens[i].tolist() == wanted
        if alpha == 0:
            plain = decoding.generate(model, params, parts["good"][2], Settings(max_new_tokens=8))
            np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert compiles == compiles[:1] * 3


def test_streams_in_a_beam_search(two, prompts_ids):
    model, expert, amateur = two
    batch = decoding.pad_prompts(prompts_ids)
    joint = decoding.streams(
        {"expert": (model, expert, batch), "amateur": (model, amateur, batch)}, contrast
    )
    one = decoding.beam_search(*joint, beams=1, max_new_tokens=6)
    greedy = decoding.generate(*joint, Settings(max_new_tokens=6))
    np.testing.assert_array_equal(one.tokens[:, 0], greedy.tokens)
    same = decoding.streams(
        {"good": (model, expert, batch), "bad": (model, expert, batch)}, scaled, jnp.float32(0.5)
    )
    wide = decoding.beam_search(*same, beams=3, max_new_tokens=6)
    halved = {**expert, "out": expert["out"] / 2}
    plain = decoding.beam_search(model, halved, batch, beams=3, max_new_tokens=6)
    np.testing.assert_array_equal(wide.tokens, plain.tokens)
    np.testing.assert_allclose(wide.scores, plain.scores, atol=1e-4)


def test_bad_streams(two, prompts_ids):
    model, params, _ = two
    batch = decoding.pad_prompts(prompts_ids)
    with pytest.raises(ValueError, match="parts is empty"):
        decoding.streams({}, contrast)
    with pytest.raises(ValueError, match="the same number of rows"):
        decoding.streams(
            {"a": (model, params, batch), "b": (model, params, decoding.pad_prompts([[1]]))},
            contrast,
        )
    with pytest.raises(ValueError, match="choose another name"):
        decoding.streams({"combine": (model, params, batch)}, contrast)
    joint = decoding.streams({"a": (model, params, batch)}, lambda z: z["a"])
    with pytest.raises(ValueError, match="bind overlays"):
        decoding.generate(*joint, sites={"logits": Site(lambda d, x, base, c: base(x), None)})
