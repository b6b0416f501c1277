"""KID: which tokens are masked, which token a fill comes from, and what the gradient sees."""

import functools
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models.model import Model, ModelOut
from steppe.train import distill, objectives

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "small.py")))
ENDS = {"bos_id": small.BOS, "eos_id": small.EOS}
KEY = jax.random.key(0)


@functools.cache
def models():
    student = small.decoder()
    return student, small.start(student), small.teacher()


def valid(batch):
    ids = batch["input_ids"]
    return (batch["label_mask"] > 0) & (ids != small.EOS)


@pytest.mark.parametrize("strategy", ["random", "uniform", "hard", "easy"])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
def test_the_mask_has_its_size_in_every_row(strategy, alpha):
    rng = np.random.default_rng(0)
    there = rng.random((40, 25)) < rng.random((40, 1))
    there[0] = False
    entropy = jnp.asarray(rng.random((40, 25)), jnp.float32)
    mask = np.array(distill.sample_mask(KEY, there, alpha, strategy, entropy))
    assert not (mask & ~there).any()
    count = np.ceil(np.round(alpha * there.sum(1), 6))
    np.testing.assert_array_equal(mask.sum(1), count)


def test_strategies_choose_what_they_say():
    there = np.zeros((1, 12), bool)
    there[:, 2:] = True
    entropy = jnp.arange(12.0)[None]
    hard, easy = (
        np.flatnonzero(distill.sample_mask(KEY, there, 0.3, name, entropy)[0])
        for name in ("hard", "easy")
    )
    assert list(hard) == [9, 10, 11]
    assert list(easy) == [2, 3, 4]
    even = np.flatnonzero(distill.sample_mask(KEY, there, 0.5, "uniform")[0])
    assert set(np.diff(even)) == {2}
    one, same, other = (distill.sample_mask(k, there) for k in (KEY, KEY, jax.random.key(1)))
    np.testing.assert_array_equal(one, same)
    seen = sum(np.array(distill.sample_mask(jax.random.key(i), there)) for i in range(60))
    assert (seen[there] > 0).all()
    assert other.sum() == one.sum() == 2


def by_position(vocab=small.VOCAB) -> Model:
    """A student whose logits at t - 1 put all mass on the token t mod V."""

    def apply(params, batch, **_):
        b, t = batch["input_ids"].shape
        z = 50.0 * jax.nn.one_hot((jnp.arange(t) + 1) % vocab, vocab) * params["w"]
        return ModelOut(jnp.broadcast_to(z, (b, t, vocab)), None)

    return Model(None, lambda key: {"w": jnp.ones(())}, apply, ())


def test_a_fill_is_predicted_by_the_position_before_it():
    batch = small.batch(length=small.LENGTH)
    policy = distill.imperfect(by_position(), alpha=0.6, **ENDS)
    new = policy({"w": jnp.ones(())}, batch, KEY)
    mask = np.array(new["imperfect_mask"])
    assert mask.any()
    assert not (mask & ~valid(batch)).any()
    position = np.broadcast_to(np.arange(small.LENGTH) % small.VOCAB, mask.shape)
    ids = np.array(new["input_ids"])
    np.testing.assert_array_equal(ids[mask], position[mask])
    np.testing.assert_array_equal(ids[~mask], batch["input_ids"][~mask])
    for name in ("labels", "label_mask", "attention_mask"):
        np.testing.assert_array_equal(new[name], batch[name])


def test_rewriting_reads_one_position_before_and_never_fills_the_first():
    z = 9.0 * jax.nn.one_hot(jnp.array([[4, 5, 6, 7]]), 8)
    tokens = jnp.zeros((1, 4), jnp.int32)
    found = distill.rewrite(z, tokens, jnp.array([[True, False, True, True]]))
    assert found.tolist() == [[0, 0, 5, 6]]


def test_masking_only_leaves_the_mask_token():
    student, params, _ = models()
    batch = small.batch()
    new = distill.imperfect(student, fill=False, alpha=0.5, **ENDS)(params, batch, KEY)
    mask = np.array(new["imperfect_mask"])
    assert (np.array(new["input_ids"])[mask] == small.BOS).all()


def test_all_masks_are_filled_from_one_pass():
    student, params, _ = models()
    batch = small.batch()
    new = distill.imperfect(student, alpha=0.5, **ENDS)(params, batch, KEY)
    mask = np.array(new["imperfect_mask"])
    hidden = {**batch, "input_ids": np.where(mask, small.BOS, batch["input_ids"])}
    best = np.array(student.apply(params, hidden).logits.argmax(-1))
    np.testing.assert_array_equal(
        np.array(new["input_ids"])[:, 1:][mask[:, 1:]], best[:, :-1][mask[:, 1:]]
    )


@pytest.mark.parametrize("strategy", ["random", "hard"])
def test_in_pieces_of_the_vocabulary(strategy):
    student, params, teacher = models()
    batch = small.batch()
    found = [
        small.value(
            distill.kid(student, teacher, strategy=strategy, vocab_chunk=chunk, **ENDS),
            params,
            batch,
            KEY,
        )
        for chunk in (None, 7)
    ]
    np.testing.assert_allclose(found[1][0], found[0][0], atol=1e-5)
    assert small.largest(found[1][1], found[0][1]) < 1e-5


def test_without_masks_it_is_reverse_distillation_and_likelihood():
    student, params, teacher = models()
    batch = small.batch()
    out = distill.kid(student, teacher, alpha=0.0, **ENDS)(params, batch, KEY)
    kd = distill.kd(student, teacher, kind="reverse_kl")(params, batch, KEY)
    ce = objectives.token_ce(student, shift=True)(params, batch, KEY)
    np.testing.assert_allclose(out.total["kd"], kd.total, rtol=1e-6)
    np.testing.assert_allclose(out.total["mle"], ce.total, rtol=1e-6)
    assert float(out.aux["wrong"][1]) == 0


def test_the_targets_are_gold_and_the_context_is_not():
    student, params, teacher = models()
    batch = small.batch()
    options = {"alpha": 0.5, "mle": 2.0, **ENDS}
    new = distill.imperfect(student, alpha=0.5, **ENDS)(params, batch, KEY)
    plain = objectives.token_ce(student, shift=True)
    out = distill.kid(student, teacher, **options)(params, batch, KEY)
    np.testing.assert_allclose(out.total["mle"], 2 * plain(params, new, None).total, rtol=1e-6)
    kd = distill.kd(student, teacher, kind="reverse_kl")(params, new, None)
    np.testing.assert_allclose(out.total["kd"], kd.total, rtol=1e-6)
    for chunk in (None, 7):
        clean = distill.kid(student, teacher, mle_context="clean", vocab_chunk=chunk, **options)
        np.testing.assert_allclose(
            clean(params, batch, KEY).total["mle"], 2 * plain(params, batch, None).total, rtol=1e-5
        )


def test_no_gradient_runs_through_the_fills_nor_to_the_teacher():
    student, params, teacher = models()
    batch = small.batch()
    joint = {"student": params, "teacher": teacher.params}
    objective = distill.kid(student, distill.Teacher(teacher.model), alpha=0.5, **ENDS)
    loss, grads = small.value(objective, joint, batch, KEY)
    fixed = distill.imperfect(student, alpha=0.5, **ENDS)(params, batch, KEY)

    def given(params, batch, key):
        kd = distill.kd(student, teacher, kind="reverse_kl")(params, fixed, key)
        ce = objectives.token_ce(student, shift=True)(params, fixed, key)
        return kd._replace(total=kd.total + ce.total)

    value, others = small.value(given, params, batch, KEY)
    np.testing.assert_allclose(loss, value, rtol=1e-6)
    assert small.largest(grads["student"], others) < 1e-6
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["teacher"]))


def test_the_policy_serves_other_divergences():
    student, params, teacher = models()
    batch = small.batch()
    policy = distill.policies.imperfect(student, alpha=0.5, **ENDS)
    new = policy(params, batch, KEY)
    found = distill.kd(student, teacher, kind="tvd", policy=policy)(params, batch, KEY)
    wanted = distill.kd(student, teacher, kind="tvd")(params, new, KEY)
    np.testing.assert_allclose(found.total, wanted.total, rtol=1e-6)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"alpha": 1.5}, r"alpha must be a number in \[0, 1\], got 1.5"),
        ({"strategy": "hardest"}, "strategy must be one of random, .*, got 'hardest'"),
        ({"mle": -1}, "mle must be a finite number >= 0, got -1"),
        ({"mle_context": "gold"}, "mle_context must be one of imperfect, clean, got 'gold'"),
        ({"bos_id": 99}, r"bos_id must be a token of the student, 0..23, got 99"),
    ],
)
def test_bad_numbers(how, message):
    student, _, teacher = models()
    with pytest.raises(ValueError, match=message):
        distill.kid(student, teacher, **{**ENDS, **how})


def test_entropy_must_be_given():
    with pytest.raises(ValueError, match="strategy='hard' needs entropy"):
        distill.sample_mask(KEY, jnp.ones((1, 3)), strategy="hard")


@pytest.mark.parametrize("strategy", ["random", "uniform"])
def test_the_least_share_still_masks_one_token_of_a_row(strategy):
    valid = np.array([[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
    mask = distill.sample_mask(jax.random.key(0), valid, 1e-5, strategy)
    np.testing.assert_array_equal(mask.sum(1), [1, 1, 0])
