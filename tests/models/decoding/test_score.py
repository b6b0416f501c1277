"""Scores of given continuations: against one row at a time, and every normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import decoding


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(5)
    sizes = [(3, 2), (20, 1), (1, 7), (5, 30), (2, 2), (9, 4), (1, 1)]
    return [[rng.integers(1, 29, n).tolist() for n in each] for each in sizes]


def alone(toy, prompt, continuation):
    """Log probabilities [U] without any padding."""
    model, params = toy
    ids = np.array([[*prompt, *continuation]])
    logp = jax.nn.log_softmax(model.apply(params, {"input_ids": ids}).logits[0])
    at = np.arange(len(prompt) - 1, len(prompt) + len(continuation) - 1)
    return np.asarray(logp[at, np.array(continuation)])


@pytest.mark.parametrize("rows", [3, 8])
def test_score_is_exact_under_padding(toy, pairs, rows):
    prompts, continuations = zip(*pairs)
    found = decoding.score(*toy, prompts, continuations, rows=rows, pad_id=11)
    assert found.lengths.tolist() == [len(c) for c in continuations]
    for i, (prompt, continuation) in enumerate(pairs):
        want = alone(toy, prompt, continuation)
        np.testing.assert_allclose(found.tokens[i, : len(want)], want, atol=1e-5)
        assert (found.tokens[i, len(want) :] == 0).all()
        np.testing.assert_allclose(found.total[i], want.sum(), atol=1e-4)


def test_what_was_generated_scores_as_it_was(toy, prompts_ids):
    out = decoding.generate(
        *toy, decoding.pad_prompts(prompts_ids), decoding.Settings(max_new_tokens=6)
    )
    found = decoding.score(*toy, prompts_ids, out.tokens.tolist())
    np.testing.assert_allclose(found.tokens, out.logprobs, atol=1e-5)
    assert found.greedy.all()
    other = decoding.score(*toy, prompts_ids, ((out.tokens + 1) % 29).tolist())
    assert not other.greedy.any()


def test_options(toy, prompts_ids):
    options = [[[1], [2, 3]], [[4, 5, 6], [7], [8, 8]], [[9], [9, 9]], [[1, 2], [3]]]
    chars = [[2, 5], [9, 1, 3], [2, 4], [3, 3]]
    totals = [
        np.array([alone(toy, p, o).sum() for o in each]) for p, each in zip(prompts_ids, options)
    ]
    prior = [np.array([alone(toy, [1], o).sum() for o in each]) for each in options]
    counts = [np.array([len(o) for o in each]) for each in options]
    for normalise, want in (
        ("sum", totals),
        ("tokens", [t / n for t, n in zip(totals, counts)]),
        ("chars", [t / np.array(n) for t, n in zip(totals, chars)]),
        ("unconditional", [t - p for t, p in zip(totals, prior)]),
    ):
        found = decoding.option_scores(
            *toy, prompts_ids, options, normalise=normalise, chars=chars, neutral=[1], rows=4
        )
        assert [len(f) for f in found] == [2, 3, 2, 2]
        for left, right in zip(found, want):
            np.testing.assert_allclose(left, right, atol=1e-4)
    each = decoding.option_scores(
        *toy, prompts_ids, options, normalise="unconditional", neutral=[[1]] * 4, rows=4
    )
    np.testing.assert_allclose(np.concatenate(each), np.concatenate(found), atol=1e-6)


def test_bad_scores(toy, toy_build):
    for args, options, message in (
        (([], []), {}, "nothing to score"),
        (([[1]], []), {}, "1 prompts, but 0 continuations"),
        (([[]], [[1]]), {}, "prompt 0 is empty"),
        (([[1]], [[]]), {}, "continuation 0 is empty"),
        (([[1]], [[1]]), {"rows": 0}, "rows must be at least 1"),
        (([[1] * 150], [[1] * 60]), {}, "210 tokens together, the model 200"),
    ):
        with pytest.raises(ValueError, match=message):
            decoding.score(*toy, *args, **options)
    for args, options, message in (
        (([[1]], [[[1]]]), {"normalise": "mean"}, "normalise must be one of"),
        (([[1]], []), {}, "1 prompts, but options for 0"),
        (([[1]], [[]]), {}, "prompt 0 has no options"),
        (([[1]], [[[1]]]), {"normalise": "chars"}, "needs chars"),
        (([[1]], [[[1]]]), {"normalise": "chars", "chars": [[0]]}, "chars must be above 0"),
        (([[1]], [[[1]]]), {"normalise": "unconditional"}, "needs neutral"),
    ):
        with pytest.raises(ValueError, match=message):
            decoding.option_scores(*toy, *args, **options)
    near = toy_build(max_length=20)
    params = near.init(jax.random.key(0))
    full = decoding.score(near, params, [[1] * 10], [[2] * 10])
    assert jnp.isfinite(full.total).all()
