"""The exposure-bias measure and agreement against chains whose errors are known by hand."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from steppe.models.model import Model, ModelOut
from steppe.train.evaluate import exposure

V = 4


def bigram() -> Model:
    def apply(params, batch, **_):
        return ModelOut(params["table"][batch["input_ids"]], None)

    return Model(config=None, init=lambda key: {}, apply=apply, axes=())


def kl(p, q):
    return float((np.exp(p) * (p - q)).sum())


@pytest.fixture(scope="module")
def tables():
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=(V, V)).astype(np.float32)
    return teacher + rng.normal(size=(V, V)).astype(np.float32), teacher


@pytest.fixture(scope="module")
def logits():
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(rng.normal(size=(3, 6, V)), jnp.float32) for _ in range(2))


MASK = np.array([[0, 0, 1, 1, 1, 0], [1, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], np.float32)


def test_sums_by_step(logits):
    student, teacher = logits
    found = exposure.step_errors(student, teacher, MASK, length=4)
    q, p = (log_softmax(np.asarray(z, np.float64), axis=-1) for z in logits)
    error, count, agree = np.zeros(4), np.zeros(4), np.zeros(4)
    for row in range(3):
        for step, at in enumerate(np.flatnonzero(MASK[row])[:4]):
            error[step] += kl(p[row, at], q[row, at])
            count[step] += 1
            agree[step] += p[row, at].argmax() == q[row, at].argmax()
    np.testing.assert_allclose(found.error, error, atol=1e-5)
    np.testing.assert_array_equal(found.rows, count)
    np.testing.assert_array_equal(found.agree, agree)
    assert count.tolist() == [2, 2, 2, 1]


def test_sums_add_up_and_padding_does_not_count(logits):
    student, teacher = logits
    whole = exposure.step_errors(student, teacher, MASK, length=5)
    parts = [
        exposure.step_errors(student[i : i + 1], teacher[i : i + 1], MASK[i : i + 1], length=5)
        for i in range(3)
    ]
    added = parts[0].add(parts[1]).add(parts[2])
    off = jnp.asarray(MASK)[..., None] == 0
    noisy = exposure.step_errors(
        jnp.where(off, jnp.nan, student), jnp.where(off, 1e30, teacher), MASK, length=5
    )
    for a, b, c in zip(whole, added, noisy, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        np.testing.assert_allclose(a, c, atol=1e-6)


def test_tokens_that_cannot_occur(logits):
    student, teacher = (z.at[..., 0].set(-jnp.inf) for z in logits)
    masked = exposure.step_errors(student, teacher, MASK, length=5)
    left = exposure.step_errors(student[..., 1:], teacher[..., 1:], MASK, length=5)
    np.testing.assert_allclose(masked.error, left.error, atol=1e-6)


def test_agreement_is_two_sums(logits):
    student, teacher = logits
    same, tokens = jax.jit(exposure.agreement)(student, teacher, MASK)
    by_step = exposure.step_errors(student, teacher, MASK, length=6)
    assert float(tokens) == MASK.sum() == float(by_step.rows.sum())
    assert float(same) == float(by_step.agree.sum())
    assert float(exposure.agreement(teacher, teacher, MASK)[0]) == MASK.sum()
    assert float(exposure.agreement(teacher, -teacher, MASK)[0]) == 0


def expected(q_table, p_table, starts, length, writer):
    """k_t over all continuations of ``length`` tokens, weighted by who writes them."""
    q, p, w = (log_softmax(np.asarray(t, np.float64), axis=-1) for t in (q_table, p_table, writer))
    out = np.zeros(length)
    for start in starts:
        for path in itertools.product(range(V), repeat=length - 1):
            tokens = (start, *path)
            log_weight = sum(w[a, b] for a, b in itertools.pairwise(tokens))
            for t, token in enumerate(tokens):
                out[t] += math.exp(log_weight) * kl(p[token], q[token]) / len(starts)
    return out


def test_ex_acc_err_of_a_chain(tables):
    """Sampled texts of a Markov chain come near the exact expectation over all of them."""
    q_table, p_table = tables
    rng = np.random.default_rng(2)
    length, rows = 4, 4000

    def write(table, seed):
        probs = np.exp(log_softmax(np.asarray(table, np.float64), axis=-1))
        tokens = np.zeros((rows, length + 1), np.int32)
        tokens[:, 0] = np.arange(rows) % V
        for t in range(length):
            u = rng.random((rows, 1))
            drawn = (u > probs[tokens[:, t]].cumsum(-1)).sum(-1)
            tokens[:, t + 1] = np.minimum(drawn, V - 1)
        mask = np.ones_like(tokens)
        mask[:, 0] = 0
        return {"input_ids": tokens, "label_mask": mask}

    errors = exposure.measure(bigram(), bigram(), length=8)
    params = [{"table": jnp.asarray(t)} for t in tables]
    generated = errors(*params, write(q_table, 0))
    reference = errors(*params, write(p_table, 1))
    found = exposure.exposure_bias(generated, reference)
    regret = expected(q_table, p_table, range(V), length, q_table).sum()
    given = expected(q_table, p_table, range(V), length, p_table).sum()
    assert found.length == length
    assert found.regret == pytest.approx(regret, rel=0.03)
    assert found.per_step == pytest.approx(given / length, rel=0.03)
    assert found.ex_acc_err == pytest.approx(100 * (regret / given - 1), abs=5)
    assert found.acc_err == pytest.approx(length * (1 + found.ex_acc_err / 100), rel=1e-6)
    same = exposure.exposure_bias(reference, reference, 2)
    assert (same.ex_acc_err, same.acc_err, same.length) == (0.0, 2.0, 2)


def test_a_shift_reads_the_logits_before(tables):
    tokens = np.array([[0, 1, 2, 3]], np.int32)
    batch = {"input_ids": tokens, "label_mask": np.array([[0, 0, 1, 1]])}
    params = [{"table": jnp.asarray(t)} for t in tables]
    q, p = (log_softmax(np.asarray(t, np.float64), axis=-1) for t in tables)
    found = exposure.measure(bigram(), bigram(), length=2)(*params, batch)
    np.testing.assert_allclose(found.error, [kl(p[1], q[1]), kl(p[2], q[2])], atol=1e-5)
    found = exposure.measure(bigram(), bigram(), length=2, shift=False)(*params, batch)
    np.testing.assert_allclose(found.error, [kl(p[2], q[2]), kl(p[3], q[3])], atol=1e-5)


def test_what_cannot_work_says_so(logits):
    student, teacher = logits
    sums = exposure.step_errors(student, teacher, MASK, length=6)
    zero = exposure.step_errors(teacher, teacher, MASK, length=6)
    for call, message in (
        (lambda: exposure.agreement(student[..., 1:], teacher, MASK), "one vocabulary"),
        (lambda: exposure.agreement(student, teacher, MASK[:2]), r"mask must have shape \(3, 6\)"),
        (lambda: exposure.step_errors(student, teacher, MASK, length=0), "length must be >= 1"),
        (lambda: exposure.measure(bigram(), bigram(), length=0), "length must be >= 1"),
        (lambda: exposure.exposure_bias(sums, sums, 6), r"length must lie in 1\.\.5, .* got 6"),
        (lambda: exposure.exposure_bias(sums, zero), "excess over nothing is undefined"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
