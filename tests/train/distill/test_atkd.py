"""ATKD: the decomposition, its golden numbers, the split, the loss over a mesh and in pieces."""

import functools
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from steppe.train import distill
from steppe.train.distill.atkd import threshold

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "small.py")))
STUDENT = jnp.array(
    [[1, 0.5, -0.5, 0], [0.2, 1.5, 0.1, -1], [0, 0, 2, 0.5], [-0.5, 0.3, 0.8, 1.2], [1, -1, 0, 0.5]]
)
TEACHER = jnp.array(
    [[2, 0, -1, 0.5], [0.5, 2.5, 0, -1], [0.3, -0.2, 1, 0.9], [-1, 0, 0.5, 3], [0.7, 0.2, 0.1, 0]]
)
LABELS = jnp.array([0, 1, 2, 3, 0])
VALID = jnp.ones(5)


def random(n=30, classes=7, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    z_s, z_t = (jnp.asarray(rng.normal(size=(n, classes)) * scale, jnp.float32) for _ in range(2))
    return z_s, z_t, jnp.asarray(rng.integers(0, classes, n))


def loss(z_s, z_t=TEACHER, labels=LABELS, valid=VALID, **how):
    return distill.atkd_loss(z_s, z_t, labels, valid, **how)[0]


def test_golden_parts():
    found = distill.kd_decompose(STUDENT, TEACHER, LABELS)
    unc = [0.2899001, 0.1984724, 0.6299883, 0.1305767, 0.6229158]
    tkd = [0.1330163, 0.0734681, 0.1868962, 0.3975608, 0.0190840]
    dkd = [0.1226885, 0.0178795, 0.0269039, 0.0022520, 0.2257039]
    for value, golden in zip(found, (tkd, dkd, unc), strict=True):
        np.testing.assert_allclose(value, golden, atol=1e-5)
    assert (found.tkd + found.unc * found.dkd).mean() == pytest.approx(0.2013958, abs=1e-5)


@pytest.mark.parametrize(("reverse", "golden"), [(False, 0.1924912), (True, 0.1840427)])
def test_golden_loss(reverse, golden):
    value, metrics = distill.atkd_loss(STUDENT, TEACHER, LABELS, VALID, reverse=reverse)
    assert float(value) == pytest.approx(golden, abs=1e-5)
    assert float(metrics["threshold"]) == pytest.approx(0.2899001, abs=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_parts_are_the_divergence_and_so_are_their_gradients(reverse):
    z_s, z_t, labels = random()
    kind = "reverse_kl" if reverse else "forward_kl"

    def parts(z):
        found = distill.kd_decompose(z, z_t, labels, reverse=reverse)
        unc = found.unc
        if reverse:  # the exact weight is then the student's 1 - q_y
            unc = 1 - jnp.take_along_axis(jax.nn.softmax(z), labels[:, None], 1)[:, 0]
        return (found.tkd + unc * found.dkd).sum()

    def whole(z):
        return distill.token_divergence(kind, z, z_t).sum()

    for a, b in zip(*(jax.value_and_grad(f)(z_s) for f in (parts, whole)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_equal_models_give_0_and_no_gradient(reverse):
    value, grad = jax.value_and_grad(lambda z: loss(z, reverse=reverse))(TEACHER)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_the_groups_do_not_touch_each_other():
    easy = jnp.array([False, True, False, True, False])
    only_easy = jax.grad(lambda z: loss(z, lam=1.0))(STUDENT)
    assert not only_easy[~easy].any()
    np.testing.assert_allclose(only_easy[jnp.arange(5), LABELS], 0, atol=1e-8)
    np.testing.assert_allclose(only_easy.sum(1), 0, atol=1e-7)
    only_hard = jax.grad(lambda z: loss(z, lam=0.0))(STUDENT)
    assert not only_hard[easy].any()
    assert only_hard[~easy].any(1).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_what_must_not_matter_does_not(reverse):
    z_s, z_t, labels = random()
    labels = labels * 0 + 2
    base = loss(z_s, z_t, labels, jnp.ones(30), reverse=reverse)
    order = jnp.array([6, 1, 2, 5, 0, 4, 3])
    turned = loss(z_s[:, order], z_t[:, order], labels, jnp.ones(30), reverse=reverse)
    np.testing.assert_allclose(turned, base, rtol=1e-6)
    moved = loss(z_s + 3, z_t - 2, labels, jnp.ones(30), reverse=reverse)
    np.testing.assert_allclose(moved, base, rtol=1e-5)


def test_padding_changes_nothing():
    z_s, z_t, labels = random()
    more = random(10, scale=20.0, seed=1)
    valid = jnp.ones(30)
    base, grad = jax.value_and_grad(loss)(z_s, z_t, labels, valid)
    pairs = zip((z_s, z_t, labels, valid), (*more, jnp.zeros(10)), strict=True)
    padded = [jnp.concatenate(pair) for pair in pairs]
    value, grads = jax.value_and_grad(loss)(*padded)
    np.testing.assert_allclose(value, base, atol=1e-7)
    np.testing.assert_allclose(grads[:30], grad, atol=1e-7)
    assert not grads[30:].any()


def test_certain_models_stay_numbers():
    z_s = jnp.array([[60.0, 0, 0], [-200.0, 0, 0], [0.0, 1e4, -1e4]])
    z_t = jnp.array([[-200.0, 0, 0], [120.0, 0, 0], [1e4, 0.0, 0.0]])
    for reverse in (False, True):
        value, grad = jax.value_and_grad(loss)(
            z_s, z_t, jnp.zeros(3, int), jnp.ones(3), reverse=reverse
        )
        assert np.isfinite(value)
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_the_threshold_is_the_lower_quantile_of_the_valid_ones(n, share):
    rng = np.random.default_rng(n)
    unc = rng.random(n + 3).astype(np.float32)
    valid = np.zeros(n + 3)
    valid[rng.permutation(n + 3)[:n]] = 1
    found = threshold(jnp.asarray(unc), valid, share)
    ordered = np.sort(unc[valid > 0])
    place = np.floor(round((1 - share) * (n - 1), 6))
    assert float(found) == ordered[int(place)]
    if share == 0.5:
        assert float(found) == ordered[(n - 1) // 2]


def test_one_group_may_be_empty_and_so_may_be_the_batch():
    flat = jnp.zeros((4, 3))
    value, metrics = distill.atkd_loss(flat + jnp.arange(3.0), flat, jnp.zeros(4, int), jnp.ones(4))
    assert float(metrics["easy"]) == 0
    assert float(value) > 0
    value, grad = jax.value_and_grad(loss)(STUDENT, valid=0 * VALID)
    assert float(value) == 0
    assert not grad.any()


def test_shards_find_the_threshold_and_the_groups_of_all(devices):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    z_s, z_t, labels = random(32)
    valid = jnp.asarray(np.random.default_rng(3).random(32) < 0.8, jnp.float32)
    wanted = loss(z_s, z_t, labels, valid)
    run = jax.jit(
        jax.shard_map(
            lambda *args: loss(*args, axis_name="data"),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P(),
            check_vma=False,
        )
    )
    np.testing.assert_allclose(run(z_s, z_t, labels, valid), wanted, rtol=1e-5)


# As an objective -----------------------------------------------------------------------------


@functools.cache
def models():
    student = small.decoder()
    return student, small.start(student), small.teacher()


@pytest.mark.parametrize("reverse", [False, True])
def test_the_objective_is_the_loss_of_shifted_labels(reverse):
    student, params, teacher = models()
    batch = small.batch()
    z_s = student.apply(params, batch).logits[:, :-1]
    z_t = teacher.model.apply(teacher.params, batch).logits[:, :-1]
    wanted, metrics = distill.atkd_loss(
        z_s, z_t, batch["labels"][:, 1:], batch["label_mask"][:, 1:], reverse=reverse
    )
    objective = distill.atkd(student, teacher, reverse=reverse)
    found, _ = small.value(objective, params, batch)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    out = objective(params, batch, None)
    np.testing.assert_allclose(out.aux["unc"][0] / out.aux["unc"][1], metrics["unc"], rtol=1e-5)
    assert float(out.weight["easy"] + out.weight["hard"]) == batch["label_mask"][:, 1:].sum()


@pytest.mark.parametrize("reverse", [False, True])
def test_in_pieces_of_the_vocabulary(reverse):
    student, params, teacher = models()
    dense, pieces = (
        small.value(
            distill.atkd(student, teacher, reverse=reverse, vocab_chunk=chunk),
            params,
            small.batch(),
        )
        for chunk in (None, 7)
    )
    np.testing.assert_allclose(pieces[0], dense[0], atol=1e-5)
    assert small.largest(pieces[1], dense[1]) < 1e-5


@pytest.mark.parametrize("chunk", [None, 7])
def test_the_threshold_of_a_whole_batch_goes_with_its_parts(chunk):
    student, params, teacher = models()
    batch = small.batch(rows=8)
    mark = jax.jit(
        functools.partial(distill.with_threshold, distill.Teacher(teacher.model), vocab_chunk=chunk)
    )
    marked = mark(teacher.params, batch)
    objective = distill.atkd(student, teacher)
    whole = objective(params, batch, None)
    parts = [
        objective(params, {k: v[i::2] if np.ndim(v) else v for k, v in marked.items()}, None)
        for i in range(2)
    ]
    for name in ("easy", "hard"):
        total = sum(float(p.total[name]) for p in parts)
        assert total == pytest.approx(float(whole.total[name]), rel=1e-5)
        assert sum(float(p.weight[name]) for p in parts) == float(whole.weight[name])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"lam": 1.2}, r"lam must be a number in \[0, 1\], got 1.2"),
        ({"hard_ratio": -1}, r"hard_ratio must be a number in \[0, 1\], got -1"),
    ],
)
def test_bad_numbers(how, message):
    student, _, teacher = models()
    with pytest.raises(ValueError, match=message):
        loss(STUDENT, **how)
    with pytest.raises(ValueError, match=message):
        distill.atkd(student, teacher, **how)


def test_labels_that_do_not_fit():
    with pytest.raises(ValueError, match=r"labels must have shape \(5,\), got \(4,\)"):
        loss(STUDENT, labels=LABELS[:4])


@pytest.mark.parametrize("chunk", [None, 7])
def test_a_label_beyond_the_vocabulary_is_no_other_token(chunk):
    student, params, teacher = models()
    batch = small.batch()
    labels = batch["labels"].copy()
    labels[1, 4] = small.VOCAB + 3
    bad = {**batch, "labels": labels}
    atkd, dkd = (
        f(student, teacher, vocab_chunk=chunk) for f in (distill.atkd, distill.decoupled_kd)
    )

    @jax.jit
    def run(batch):
        marked = distill.with_threshold(teacher, teacher.params, batch, vocab_chunk=chunk)
        found = jax.value_and_grad(lambda p: sum(atkd(p, batch, None).total.values()))(params)
        return found, atkd(params, batch, None), dkd(params, batch, None).total, marked

    (loss, _), parts, other, marked = run(bad)
    assert all(map(np.isnan, (loss, other, marked["atkd_threshold"])))
    assert np.isfinite(parts.total["hard"])  # nobody knows whether that token is hard
    hidden = {**bad, "label_mask": batch["label_mask"] * (labels < small.VOCAB)}
    (loss, grad), _, other, marked = run(hidden)
    assert all(map(np.isfinite, (loss, other, marked["atkd_threshold"])))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grad))


def test_logits_that_are_masked_may_be_nan():
    z_s, z_t = (jnp.concatenate([z, z[:1] * jnp.nan]) for z in (STUDENT, TEACHER))
    run = jax.jit(jax.value_and_grad(loss))
    value, grad = run(z_s, z_t, jnp.append(LABELS, 1), jnp.append(VALID, 0))
    assert float(value) == pytest.approx(0.1924912, abs=1e-5)
    assert np.isfinite(grad).all()
