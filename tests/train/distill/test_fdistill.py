"""f-distill: each half of a divergence is taken on the texts of its writer."""

import functools

import jax
import numpy as np
import pytest

from steppe.train import distill
from steppe.train.distill import policies
from steppe.train.distill.fdistill import STUDENTS

from . import small

BETA = 0.3


@functools.cache
def models():
    student = small.decoder()
    return student, small.start(student), small.teacher()


def distributions(batch):
    student, params, teacher = models()
    zs = student.apply(params, batch).logits, teacher.model.apply(teacher.params, batch).logits
    zs = [np.asarray(z, np.float64) for z in zs]
    return [z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in zs]


@pytest.mark.parametrize("by_student", [True, False])
@pytest.mark.parametrize("how", [{}, {"vocab_chunk": 7}, {"token_chunk": 5}], ids=str)
def test_the_half_of_the_jsd_is_the_writers(by_student, how):
    """KL(q || m) on the student's texts, KL(p || m) on the teacher's, by float64."""
    student, params, teacher = models()
    policy = distill.written(policies.gt(), by_student)
    batch = policy(params, small.batch(), None)
    log_q, log_p = distributions(batch)
    log_m = np.log(BETA * np.exp(log_p) + (1 - BETA) * np.exp(log_q))
    log_w = log_q if by_student else log_p
    wanted = (np.exp(log_w) * (log_w - log_m)).sum(-1)[:, :-1]
    mask = batch["label_mask"][:, 1:]
    objective = distill.fdistill(student, teacher, kind="jsd", beta=BETA, **how)
    value, grad = small.value(objective, params, batch)
    np.testing.assert_allclose(value, (wanted * mask).sum() / mask.sum(), rtol=1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))


def test_both_halves_are_the_jsd():
    student, params, teacher = models()
    objective = distill.fdistill(student, teacher, kind="jsd", beta=BETA)
    batch = small.batch()
    parts = [
        float(objective(params, {**batch, STUDENTS: np.float32(by)}, None).total) for by in (1, 0)
    ]
    whole = distill.kd(student, teacher, kind="jsd", beta=BETA)(params, batch, None).total
    assert (1 - BETA) * parts[0] + BETA * parts[1] == pytest.approx(float(whole), rel=1e-5)
    # Nobody is named as the writer: all of it.
    np.testing.assert_allclose(objective(params, batch, None).total, whole, rtol=1e-6)


@pytest.mark.parametrize("kind", ["tvd", "forward_kl", "reverse_kl"])
def test_the_others_do_not_ask_who_wrote(kind):
    student, params, teacher = models()
    batch = distill.written(policies.gt(), True)(params, small.batch(), None)
    found = distill.fdistill(student, teacher, kind=kind)(params, batch, None)
    np.testing.assert_allclose(
        found.total, distill.kd(student, teacher, kind=kind)(params, batch, None).total, rtol=1e-6
    )


def test_bad_arguments():
    student, _, teacher = models()
    with pytest.raises(ValueError, match="kind must be one of tvd, jsd, .*got 'skew_forward_kl'"):
        distill.fdistill(student, teacher, kind="skew_forward_kl")
    with pytest.raises(ValueError, match=r"beta must be a number in \[0, 1\], got 2"):
        distill.fdistill(student, teacher, kind="jsd", beta=2)
    with pytest.raises(ValueError, match="beta=1 leaves one half of the JSD out"):
        distill.fdistill(student, teacher, kind="jsd", beta=1)
