"""Logits processors: each against a direct reading of its rule, alone and composed."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import decoding
from steppe.models.decoding import Settings, Start, processors
from steppe.models.decoding.sampling import NOWHERE

VOCAB = 29


def start(context, room=8, vocab=VOCAB):
    return Start(jnp.asarray(context, jnp.int32), vocab, room, jnp.zeros(0, jnp.int32))


def after(processor, context, tokens, logits):
    """Logits after a prompt and generated tokens [B, N]."""
    state = processor.init(processor.values, start(context))
    for column in np.asarray(tokens, np.int32).T:
        state, _ = processor.apply(state, jnp.asarray(logits))
        state = processor.observe(state, jnp.asarray(column))
    return np.asarray(processor.apply(state, jnp.asarray(logits))[1])


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(2, VOCAB)).astype(np.float32)


CONTEXT = [[NOWHERE, 1, 2, 3], [5, 6, 5, 6]]


def test_repetition_penalty(logits):
    got = after(processors.repetition_penalty([2.0, 1.0]), CONTEXT, [[9], [9]], logits)
    want = logits.copy()
    for v in (1, 2, 3, 9):
        want[0, v] = want[0, v] * 2 if want[0, v] < 0 else want[0, v] / 2
    np.testing.assert_allclose(got, want, rtol=1e-6)
    again = after(processors.repetition_penalty(2.0), CONTEXT, [[9, 9], [9, 9]], logits)
    np.testing.assert_allclose(again[0], got[0], rtol=1e-6)  # once a distinct token


def test_repetition_penalty_equals_the_setting(toy, prompts_ids):
    batch = decoding.pad_prompts(prompts_ids)
    one = decoding.generate(*toy, batch, Settings(max_new_tokens=12, repetition_penalty=1.5))
    two = decoding.generate(
        *toy, batch, Settings(max_new_tokens=12), processors=[processors.repetition_penalty(1.5)]
    )
    np.testing.assert_array_equal(one.tokens, two.tokens)
    plain = decoding.generate(*toy, batch, Settings(max_new_tokens=12))
    assert (plain.tokens != one.tokens).any()


def test_no_repeat_ngram(logits):
    # Row 1 holds 5 6 5 6 and then 5: after "6 5" came 6, after "5" came 6.
    got = after(processors.no_repeat_ngram(3), CONTEXT, [[4], [5]], logits)
    assert np.flatnonzero(np.isneginf(got[1])).tolist() == [6]
    assert np.isfinite(got[0]).all()
    got = after(processors.no_repeat_ngram(1), CONTEXT, [[4], [5]], logits)
    assert np.flatnonzero(np.isneginf(got[0])).tolist() == [1, 2, 3, 4]
    got = after(processors.no_repeat_ngram(9), CONTEXT, [[4], [5]], logits)
    assert np.isfinite(got).all()


def test_no_repeat_ngram_in_the_loop(toy, prompts_ids):
    out = decoding.generate(
        *toy,
        decoding.pad_prompts(prompts_ids),
        Settings(max_new_tokens=40),
        processors=[processors.no_repeat_ngram(2)],
    )
    for prompt, tokens in zip(prompts_ids, out.tokens.tolist()):
        row = prompt + tokens
        pairs = list(itertools.pairwise(row))
        new = pairs[len(prompt) - 1 :]
        assert len(set(new)) == len(new)


def test_bad_words_and_sequence_bias(logits):
    words = processors.bad_words([[7], [2, 3, 4], [6, 8]])
    got = after(words, CONTEXT, np.zeros((2, 0)), logits)
    assert np.flatnonzero(np.isneginf(got[0])).tolist() == [4, 7]
    assert np.flatnonzero(np.isneginf(got[1])).tolist() == [7, 8]
    got = after(words, CONTEXT, [[1], [2]], logits)
    assert np.flatnonzero(np.isneginf(got[0])).tolist() == [7]
    bias = processors.sequence_bias({(3, 1): 2.5, (1,): -1.0})
    got = after(bias, CONTEXT, np.zeros((2, 0)), logits)
    np.testing.assert_allclose(got[:, 1] - logits[:, 1], [1.5, -1.0], atol=1e-6)


def test_tables(logits):
    got = after(processors.logit_bias({3: 1.0, 4: -2.0}, VOCAB), CONTEXT, [[1], [1]], logits)
    np.testing.assert_allclose(got[:, 3] - logits[:, 3], 1.0, atol=1e-6)
    got = after(processors.allowed_tokens([3, 5], VOCAB), CONTEXT, [[1], [1]], logits)
    assert (np.isfinite(got).nonzero()[1] == [3, 5, 3, 5]).all()
    mask = np.zeros((2, VOCAB), bool)
    mask[0, 1] = mask[1, 2] = True
    got = after(processors.allowed_tokens(mask), CONTEXT, [[1], [1]], logits)
    assert np.isfinite(got).nonzero()[1].tolist() == [1, 2]
    got = after(processors.forbidden_tokens([0], VOCAB), CONTEXT, [[1], [1]], logits)
    assert np.isneginf(got).nonzero()[1].tolist() == [0, 0]
    got = after(processors.temperature([2.0, 1.0]), CONTEXT, [[1], [1]], logits)
    np.testing.assert_allclose(got, logits / [[2], [1]], rtol=1e-6)


def test_forced_tokens_and_min_length(toy, prompts_ids, logits):
    forced = np.array([[3, 4, -1], [5, -1, -1], [-1, -1, 9], [1, 2, 3]])
    out = decoding.generate(
        *toy,
        decoding.pad_prompts(prompts_ids),
        Settings(max_new_tokens=6),
        processors=[processors.forced_tokens(forced)],
    )
    assert out.tokens[0, :2].tolist() == [3, 4]
    assert out.tokens[1, 0] == 5
    assert out.tokens[2, 2] == 9
    assert out.tokens[3, :3].tolist() == [1, 2, 3]
    least = processors.min_length([2, 0], [7, 8])
    assert np.isneginf(after(least, CONTEXT, [[1], [1]], logits)[0, [7, 8]]).all()
    assert np.isfinite(after(least, CONTEXT, [[1], [1]], logits)[1]).all()
    assert np.isfinite(after(least, CONTEXT, [[1, 1], [1, 1]], logits)).all()


def test_a_chain_is_its_processors_in_order(logits):
    double = processors.temperature(0.5)
    plus = processors.logit_bias(np.ones(VOCAB))
    one = after(processors.chain(double, plus), CONTEXT, [[1], [1]], logits)
    two = after(processors.chain(plus, double), CONTEXT, [[1], [1]], logits)
    np.testing.assert_allclose(one, 2 * logits + 1, rtol=1e-5)
    np.testing.assert_allclose(two, 2 * logits + 2, rtol=1e-5, atol=1e-6)
    nested = processors.chain(processors.chain(double), processors.chain(), plus)
    np.testing.assert_allclose(after(nested, CONTEXT, [[1], [1]], logits), one)


def test_all_processors_in_one_program(toy, prompts_ids):
    """Every kind at once, in generate and in a beam search."""
    many = [
        processors.no_repeat_ngram(3),
        processors.bad_words([[1], [2, 3]]),
        processors.repetition_penalty(1.2),
        processors.logit_bias({3: 1.0}, VOCAB),
        processors.allowed_tokens(range(1, 20), VOCAB),
        processors.min_length(3, 4),
        processors.forced_tokens([-1, 6]),
    ]
    batch = decoding.pad_prompts(prompts_ids)
    out = decoding.generate(*toy, batch, Settings(max_new_tokens=9), processors=many, eos_id=4)
    assert (out.tokens[:, 1] == 6).all()
    assert set(out.tokens.ravel()) <= {0, *range(2, 20)}
    found = decoding.beam_search(*toy, batch, beams=2, max_new_tokens=9, processors=many, eos_id=4)
    assert (found.tokens[:, 0, 1] == 6).all()
    assert set(found.tokens.ravel()) <= {0, *range(2, 20)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: processors.no_repeat_ngram(0), "n must be at least 1"),
        (lambda: processors.bad_words([]), "biases is empty"),
        (lambda: processors.bad_words([[]]), "token ids >= 0"),
        (lambda: processors.repetition_penalty(0), "repetition_penalty must be above 0"),
        (lambda: processors.logit_bias({1: 1.0}), "need vocab"),
        (lambda: processors.logit_bias({99: 1.0}, VOCAB), "outside the vocabulary"),
        (lambda: processors.allowed_tokens([], VOCAB), "allows no token"),
        (lambda: processors.forced_tokens([]), "must be"),
        (
            lambda: (p := processors.logit_bias(np.ones(3))).init(p.values, start(CONTEXT)),
            "has 3 entries, the model scores 29",
        ),
        (
            lambda: (p := processors.temperature([1, 2, 3])).init(p.values, start(CONTEXT)),
            r"shape \(3,\), the batch 2 rows",
        ),
    ],
)
def test_bad_processors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
