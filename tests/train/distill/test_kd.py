"""Distillation as an objective: sums over labelled tokens, mixtures, one state, bad input."""

import functools
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import integer, quantized
from steppe.models.overlays import lora
from steppe.train import distill, objectives

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "small.py")))


@functools.cache
def models(**options):
    student = small.decoder(**options)
    return student, small.start(student), small.teacher()


def shifted(model, params, batch):
    return model.apply(params, batch).logits[:, :-1]


@pytest.mark.parametrize("kind", distill.KINDS)
def test_it_is_the_sum_over_the_labelled_tokens(kind):
    student, params, teacher = models()
    batch = small.batch()
    how = {"temperature": 1.5, "beta": 0.3, "alpha": 0.2}
    out = jax.jit(distill.kd(student, teacher, kind=kind, **how))(params, batch, None)
    value = distill.token_divergence(
        kind, shifted(student, params, batch), shifted(teacher.model, teacher.params, batch), **how
    )
    mask = batch["label_mask"][:, 1:]
    np.testing.assert_allclose(out.total, (value * mask).sum(), rtol=1e-5)
    assert float(out.weight) == mask.sum()
    assert float(out.aux["kd"][0]) == pytest.approx(float(out.total))


def test_the_likelihood_and_the_temperature_are_mixed_in():
    student, params, teacher = models()
    batch = small.batch()
    kd = distill.kd(student, teacher, temperature=2.0)(params, batch, None)
    ce = objectives.token_ce(student, shift=True)(params, batch, None)
    for chunk in (None, 7):
        out = distill.kd(
            student, teacher, temperature=2.0, ratio=0.3, scale_tau2=True, vocab_chunk=chunk
        )(params, batch, None)
        wanted = 0.3 * 4 * kd.total + 0.7 * ce.total
        np.testing.assert_allclose(out.total, wanted, rtol=1e-5)
        np.testing.assert_allclose(out.aux["ce"][0], ce.total, rtol=1e-5)
        np.testing.assert_allclose(out.aux["kd"][0], kd.total, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"ratio": 0.5, "temperature": 2.0}], ids=str)
def test_in_pieces_of_the_vocabulary(tied, options):
    student, params, teacher = models(tied=tied)
    dense, pieces = (
        small.value(
            distill.kd(student, teacher, kind="jsd", vocab_chunk=chunk, **options),
            params,
            small.batch(),
        )
        for chunk in (None, 7)
    )
    np.testing.assert_allclose(pieces[0], dense[0], atol=1e-5)
    assert small.largest(pieces[1], dense[1]) < 1e-5


@pytest.mark.parametrize("chunk", [None, 7])
def test_padding_and_prompts_do_not_matter(chunk):
    student, params, teacher = models()
    objective = distill.kd(student, teacher, kind="reverse_kl", ratio=0.5, vocab_chunk=chunk)
    batch = small.batch()
    loss, grads = small.value(objective, params, batch)
    long = {k: np.pad(v, ((0, 0), (0, 4))) for k, v in batch.items()}
    long["input_ids"][:, -4:] = 9
    long["labels"][:, -4:] = -100
    value, others = small.value(objective, params, long)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    assert small.largest(others, grads) < 1e-6


def test_classifiers_and_masked_language_models_are_not_shifted():
    for head, batch in (("mlm", small.masked()), ("classification", small.batch())):
        student, bigger = small.encoder(head=head), small.encoder(width=12, head=head)
        params, others = small.start(student), small.start(bigger, 3)
        if head == "classification":
            batch = {
                **batch,
                "labels": np.array([0, 1, 2, 1]),
                "label_mask": np.array([1, 1, 0, 1]),
            }
        out = distill.kd(student, distill.Teacher(bigger, others))(params, batch, None)
        z_s, z_t = (m.apply(p, batch).logits for m, p in ((student, params), (bigger, others)))
        value = distill.token_divergence("forward_kl", z_s, z_t)
        np.testing.assert_allclose(out.total, (value * batch["label_mask"]).sum(), rtol=1e-5)


def test_decoupled_distillation():
    student, params, teacher = models()
    batch = small.batch()
    found = distill.kd_decompose(
        shifted(student, params, batch),
        shifted(teacher.model, teacher.params, batch),
        jnp.asarray(batch["labels"][:, 1:]),
    )
    mask = batch["label_mask"][:, 1:]
    wanted = ((0.5 * found.tkd + 2 * found.dkd) * mask).sum()
    for chunk in (None, 7):
        objective = distill.decoupled_kd(student, teacher, alpha=0.5, beta=2.0, vocab_chunk=chunk)
        out = objective(params, batch, None)
        np.testing.assert_allclose(out.total, wanted, rtol=1e-5)
        assert set(out.aux) == {"tkd", "dkd", "unc"}
    with pytest.raises(ValueError, match="beta must be a finite number >= 0, got -1"):
        distill.decoupled_kd(student, teacher, beta=-1)


def test_a_policy_changes_the_tokens_and_not_the_loss():
    student, params, teacher = models()
    batch, other = small.batch(), small.batch(5)
    objective = distill.kd(student, teacher, policy=lambda params, batch, key: other)
    plain = distill.kd(student, teacher)
    assert float(objective(params, batch, None).total) == float(plain(params, other, None).total)


# One state of both ---------------------------------------------------------------------------


def test_the_teacher_in_the_state_is_the_teacher_outside():
    student, params, teacher = models()
    both = distill.with_teacher(student, teacher)
    made = jax.eval_shape(both.init, jax.random.key(0))
    assert set(made) == {"student"}
    joint = {"student": params, "teacher": teacher.params}
    batch = small.batch()
    outside = distill.kd(student, teacher)
    inside = distill.kd(student, distill.Teacher(teacher.model))
    loss, grads = small.value(inside, joint, batch)
    wanted, own = small.value(outside, params, batch)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert small.largest(grads["student"], own) < 1e-6
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["teacher"]))
    np.testing.assert_array_equal(
        both.apply(joint, batch).logits, student.apply(params, batch).logits
    )


def test_a_student_under_an_overlay():
    student, params, teacher = models()
    bound = lora.overlay(rank=2).bind(student, frozen=params)
    both = distill.with_teacher(bound, teacher)
    assert both.given is not None
    assert set(both.given) == {"student", "teacher"}
    full = {"base": params, "overlay": bound.init(jax.random.key(1))["overlay"]}
    batch = small.batch()
    wanted = distill.kd(student, teacher)(params, batch, None).total  # B = 0: still the base
    for chunk in (None, 7):
        found = distill.kd(bound, teacher, vocab_chunk=chunk)(full, batch, None).total
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("how", [{"vocab_chunk": 7}, {"token_chunk": 5}], ids=str)
def test_pieces_read_a_rounded_head_as_the_model_does(how):
    """Also in integers, and the one that is the table of words."""
    tied = "vocab_chunk" in how
    student, _, teacher = models(tied=tied)
    params, batch = small.start(student, scale=40.0), small.batch()
    two = quantized.QuantConfig(2, 32)
    rules = quantized.rules(two, quantize_head=not tied, quantize_embed=tied)
    rounding, whole = quantized.wrap(student, rules), integer.wrap(student, rules)
    plain, wanted, found = (
        small.value(distill.kd(model, teacher, **options), params, batch)
        for model, options in ((student, {}), (rounding, {}), (rounding, how))
    )
    assert abs(wanted[0] - plain[0]) > 1e-2
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    # Words that are rounded to zeros have large gradients behind the norm.
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted[1]))
    assert small.largest(found[1], wanted[1]) < 1e-6 * max(size, 10.0)
    grids = quantized.quantize(params, rules)
    out = jax.jit(lambda own: distill.kd(whole, teacher, **how)(own, batch, None))(grids)
    np.testing.assert_allclose(out.total / out.weight, wanted[0], rtol=1e-4)


def test_logits_that_are_masked_may_be_nan_on_either_side():
    both = [small.table(), small.table()]
    params, other = (m.init(jax.random.key(i)) for i, m in enumerate(both))
    batch = small.batch()
    counts = jnp.roll(batch["label_mask"], -1, 1).at[:, -1].set(0)[..., None] > 0

    def found(params, other):
        objective = distill.kd(both[0], distill.Teacher(both[1], other), ratio=0.5, shift=True)
        return small.value(objective, params, batch)

    bad, worse = ({"logits": jnp.where(counts, p["logits"], jnp.nan)} for p in (params, other))
    wanted, given = found(params, other), found(bad, worse)
    np.testing.assert_allclose(given[0], wanted[0], rtol=1e-6)
    assert small.largest(given[1], wanted[1]) < 1e-6


# Bad input -----------------------------------------------------------------------------------


def test_top_k_of_a_classifier_counts_its_classes():
    student = small.encoder(head="classification")
    with pytest.raises(ValueError, match=r"top_k must be a whole number in 1\.\.3 .*, got 5"):
        distill.kd(student, distill.Teacher(student, small.start(student)), top_k=5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"kind": "kl"}, "kind must be one of .*, got 'kl'"),
        ({"ratio": 2}, r"ratio must be a number in \[0, 1\], got 2"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
        ({"top_k": 0}, "k must be a whole number in 1..24"),
        ({"top_k": 25}, "top_k must be a whole number in 1..24"),
        ({"token_chunk": 0}, "token_chunk must be a whole number >= 1, or None, got 0"),
        ({"vocab": 25}, "vocab=25 is more than the smaller vocabulary, 24"),
        ({"vocab": 1}, "vocab must be a whole number >= 2, or None, got 1"),
    ],
)
def test_bad_numbers(how, message):
    student, _, teacher = models()
    with pytest.raises(ValueError, match=message):
        distill.kd(student, teacher, **how)


def test_vocabularies_that_differ_and_the_cure():
    student, params, _ = models()
    wide = small.decoder(width=12, vocab=small.VOCAB + 8)
    teacher = distill.Teacher(wide, small.start(wide, 7))
    with pytest.raises(ValueError, match="student has 24 classes and the teacher 32: .* vocab="):
        distill.kd(student, teacher)
    batch = small.batch()
    z_s, z_t = shifted(student, params, batch), shifted(wide, teacher.params, batch)
    value = distill.token_divergence("forward_kl", z_s, z_t[..., : small.VOCAB])
    for chunk in (None, 7):
        objective = distill.kd(student, teacher, vocab=small.VOCAB, vocab_chunk=chunk)
        np.testing.assert_allclose(
            objective(params, batch, None).total,
            (value * batch["label_mask"][:, 1:]).sum(),
            rtol=1e-5,
        )


def test_nothing_to_learn_from_is_an_error_outside_and_0_inside_a_program():
    student, params, teacher = models()
    batch = small.batch()
    objective = distill.kd(student, teacher)
    for empty in (
        {**batch, "label_mask": 0 * batch["label_mask"]},
        {**batch, "labels": 0 * batch["labels"] - 100},
        {**batch, "label_mask": (np.arange(small.LENGTH) == 0) * np.ones_like(batch["label_mask"])},
    ):
        with pytest.raises(ValueError, match="no label counts: .* nothing to learn from"):
            objective(params, empty, None)
        with pytest.raises(ValueError, match="no label counts"):
            distill.check_batch(empty)
        out = jax.jit(objective)(params, empty, None)
        assert (float(out.total), float(out.weight)) == (0, 0)
    distill.check_batch(batch)
    del batch["labels"]
    with pytest.raises(ValueError, match="batch has no 'labels'"):
        objective(params, batch, None)


def test_models_that_do_not_fit_the_batch():
    student, params, teacher = models()
    long = {k: np.pad(v, ((0, 0), (0, 12))) for k, v in small.batch().items()}
    with pytest.raises(ValueError, match="rows of 20 tokens, the student 16 positions"):
        distill.kd(student, teacher)(params, long, None)
    with pytest.raises(TypeError, match=r"teacher must be Teacher\(model, params\) .*, got Model"):
        distill.kd(student, teacher.model)
    with pytest.raises(ValueError, match="params hold no 'teacher' .* with_teacher"):
        distill.kd(student, distill.Teacher(teacher.model))(params, small.batch(), None)
    with pytest.raises(ValueError, match="with_teacher needs the teacher's parameters"):
        distill.with_teacher(student, distill.Teacher(teacher.model))
    headless = small.encoder(head=None)
    with pytest.raises(ValueError, match="the student has no head"):
        distill.kd(headless, teacher)(small.start(headless), small.batch(), None)


def test_pieces_are_for_decoders():
    student = small.encoder()
    params = small.start(student)
    objective = distill.kd(student, distill.Teacher(student, params), vocab_chunk=7)
    with pytest.raises(ValueError, match="decoders with head 'lm' only; this is a EncoderConfig"):
        objective(params, small.masked(), None)
