"""How a token is chosen: closed forms, limits, mixed rows, the law of the samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from steppe.models.decoding import Settings, sampling
from steppe.models.decoding.sampling import NOWHERE

warp = jax.jit(sampling.warp)
draw = jax.jit(sampling.sample)


def kept(logits, **settings):
    logits = np.atleast_2d(np.asarray(logits, np.float32))
    rows = Settings(**{"temperature": 1.0, **settings}).rows(len(logits))
    return np.isfinite(warp(logits, rows))


def reference(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities of one row, by sorting, in float64."""
    x = np.asarray(logits, np.float64) / temperature
    if top_k:
        x = np.where(x < np.sort(x)[::-1][min(top_k, len(x)) - 1], -np.inf, x)
    if top_p < 1:
        order = np.argsort(x, kind="stable")
        mass = np.cumsum(softmax(x)[order])
        drop = mass <= 1 - top_p
        drop[-1] = False
        x[order[drop]] = -np.inf
    p = softmax(x)
    return softmax(np.where(p < min_p * p.max(), -np.inf, x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def test_any_mix_of_rows_equals_row_by_row():
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(64, 300))).astype(np.float32)
    each = {
        "temperature": rng.choice([0.1, 0.7, 1.0, 2.0], 64),
        "top_k": rng.choice([0, 1, 7, 280, 300, 1000], 64),
        "top_p": rng.choice([0.1, 0.5, 0.9, 0.999, 1.0], 64),
        "min_p": rng.choice([0.0, 0.05, 1.0], 64),
    }
    got = jax.nn.softmax(warp(logits, Settings(**each).rows(64)))
    for i in range(64):
        want = reference(logits[i], **{k: v[i] for k, v in each.items()})
        np.testing.assert_array_equal(np.asarray(got[i]) > 0, want > 0, err_msg=str(i))
        np.testing.assert_allclose(got[i], want, atol=2e-6)


def test_neutral_settings_change_nothing():
    x = np.random.default_rng(1).normal(size=(3, 40)).astype(np.float32)
    np.testing.assert_array_equal(warp(x, Settings(temperature=1.0).rows(3)), x)
    # Also beside a row that asks for everything.
    mixed = Settings(temperature=1.0, top_k=[0, 2, 0], top_p=[1, 0.5, 1], min_p=[0, 0.3, 0]).rows(3)
    np.testing.assert_array_equal(np.asarray(warp(x, mixed))[[0, 2]], x[[0, 2]])


def test_ties():
    # All tokens that tie with the k-th are kept.
    assert kept([3, 1, 1, 1, 0], top_k=2).tolist() == [[True, True, True, True, False]]
    assert kept([0.0, -0.0, -1], top_k=1).tolist() == [[True, True, False]]
    # Of four equal ones, those of the lower ids are the tail.
    assert kept([1, 1, 1, 1], top_p=0.5).tolist() == [[False, False, True, True]]
    assert kept([1, 1, 1, 1], top_p=0.6).tolist() == [[False, True, True, True]]
    assert kept([1, 1, 1, 1], top_p=1e-9).tolist() == [[False, False, False, True]]
    assert kept([5, 1, 1, -9], top_p=0.97).tolist() == [[True, False, True, False]]
    assert kept([5, 1, 1, -9], top_p=0.96).tolist() == [[True, False, False, False]]
    assert kept([2, 2, -50], min_p=1.0).tolist() == [[True, True, False]]


def test_one_token_is_always_kept():
    x = np.random.default_rng(2).normal(size=(4, 50)).astype(np.float32)
    x[3] = -np.inf
    x[3, 7] = -40
    for settings in ({"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}):
        assert (kept(x, **settings).sum(1) == 1).all()
        assert kept(x, **settings)[3, 7]
        assert (kept(x, **settings).argmax(1) == x.argmax(1)).all()


def test_penalties_in_closed_form():
    logits = np.array([[2.0, -2.0, 3.0, 1.0]] * 2, np.float32)
    context = np.array([[NOWHERE, 0, 1], [1, 1, 1]])
    output = np.array([[2, 2, NOWHERE], [3, NOWHERE, NOWHERE]])
    rows = Settings(
        repetition_penalty=[2.0, 1.0], presence_penalty=[0.0, 0.5], frequency_penalty=[0.25, 0]
    ).rows(2)
    both = np.ones(2, bool)
    got = jax.jit(sampling.penalise)(logits, context, output, rows, both)
    np.testing.assert_allclose(got, [[1.0, -4.0, 1.0, 1.0], [2.0, -2.0, 3.0, 0.5]], atol=1e-6)
    plain = sampling.penalise(jnp.asarray(logits), context, output, Settings().rows(2), both)
    np.testing.assert_array_equal(plain, logits)


def test_argmax_is_the_first_of_the_largest():
    x = jnp.array([[1.0, 5, 5, 0], [-jnp.inf, -jnp.inf, -jnp.inf, -jnp.inf], [jnp.nan, 1, 2, 3]])
    at, top = sampling.argmax(x)
    assert at[:2].tolist() == [1, 0]
    assert 0 <= int(at[2]) < 4
    assert jnp.isnan(top[2])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 6},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.2},
    ],
)
def test_the_law_of_the_samples(settings):
    """Chi-square of 20,000 draws at a fixed seed, over more than one block of the vocabulary."""
    rng = np.random.default_rng(4)
    logits = np.full(300, -np.inf, np.float32)
    places = rng.choice(300, 10, replace=False)
    logits[places] = rng.normal(size=10)
    count = 20_000
    keys = jax.random.split(jax.random.key(11), count)
    rows = Settings(**settings).rows(1)
    warped = warp(logits[None], rows)
    tokens = np.asarray(draw(jnp.broadcast_to(warped, (count, 300)), keys))
    want = reference(logits, **settings)
    found = np.bincount(tokens, minlength=300)
    assert found[want == 0].sum() == 0
    real = want > 0
    assert stats.chisquare(found[real], want[real] * count).pvalue > 0.001


def test_a_forbidden_token_is_never_drawn():
    """A single token in a large vocabulary, at the ends of blocks too."""
    for at in (0, 127, 128, 255, 256, 999):
        x = np.full((64, 1000), -np.inf, np.float32)
        x[:, at] = -3
        assert (np.asarray(draw(x, jax.random.split(jax.random.key(0), 64))) == at).all()


def test_the_settings_as_arrays():
    rows = Settings(top_p=np.float32(0.9), seed=[7, 8]).rows(2)
    assert {x.dtype for x in rows} == {np.dtype(d) for d in ("float32", "int32", "uint32")}
    np.testing.assert_allclose(rows.tail, 0.1, atol=1e-6)
    assert rows.seed.tolist() == [7, 8]
    assert Settings().rows(3).seed.tolist() == [0, 1, 2]
