"""Hidden states, attention maps and relations, against numpy and against the model itself."""

import functools
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from steppe.models.overlays import lora
from steppe.train import distill
from steppe.train.distill import features

small = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "small.py")))


@functools.cache
def models(width=12, **options):
    student = small.encoder(head=None)
    teacher = small.encoder(width=width, layers=4, head=None, **options)
    return student, small.start(student), distill.Teacher(teacher, small.start(teacher, 3))


def states(model, params, batch):
    return np.asarray(model.apply(params, batch, all_hidden=True).hidden, np.float64)


def project(params, h, layer, name, heads):
    p = params["layers"]["attn"][name]
    y = h @ np.asarray(p["kernel"][layer], np.float64) + np.asarray(p["bias"][layer], np.float64)
    return y.reshape(*y.shape[:2], heads, -1)


def kl(log_p, log_q, real):
    where = np.isfinite(log_p)
    gap = np.where(where, log_p, 0) - np.where(where, log_q, 0)
    return ((np.exp(log_p) * gap).sum(-1).mean(1) * real).sum()


def relation(x, y, real):
    scores = np.einsum("bthd,bshd->bhts", x, y) / np.sqrt(x.shape[-1])
    return log_softmax(np.where(real[:, None, None] > 0, scores, -np.inf), -1)


def test_maps_of_layers():
    assert features.even_map(3, 12) == ((0, 0), (1, 4), (2, 8), (3, 12))
    assert features.even_map(2, 4, start=1) == ((1, 2), (2, 4))
    with pytest.raises(ValueError, match="multiple of the student's, got 4 and 3"):
        features.even_map(3, 4)


def test_hidden_states_through_learnt_projections():
    student, params, teacher = models()
    batch = small.batch()
    pairs = features.even_map(2, 4)
    make = features.projections(student, teacher.model, pairs)
    both = distill.with_teacher(student, teacher, extra=make)
    joint = {"student": params, "teacher": teacher.params, "extra": make(jax.random.key(1))}
    assert any("extra" in pattern for pattern in both.trainable)
    objective = features.hidden(student, teacher, pairs)
    out = objective(joint, batch, None)
    h_s, h_t = states(student, params, batch), states(teacher.model, teacher.params, batch)
    real = batch["attention_mask"]
    wanted = 0.0
    for i, j in pairs:
        moved = h_s[i] @ np.asarray(joint["extra"]["projections"][str(i)], np.float64)
        wanted += (((moved - h_t[j]) ** 2).mean(-1) * real).sum()
    np.testing.assert_allclose(out.total, wanted, rtol=1e-5)
    assert float(out.weight) == real.sum() * len(pairs)
    _, grads = small.value(objective, joint, batch)
    assert all(np.any(g) for g in jax.tree.leaves(grads["extra"]))
    assert not any(np.any(g) for g in jax.tree.leaves(grads["teacher"]))


@pytest.mark.parametrize("options", [{}, {"relative_buckets": 8, "relative_distance": 16}], ids=str)
def test_attention_maps_against_numpy(options):
    student, params, teacher = models(**options)
    batch = small.batch()
    out = features.attention(student, teacher, [(0, 1), (1, 3)])(params, batch, None)
    real = batch["attention_mask"]
    h_s, h_t = states(student, params, batch), states(teacher.model, teacher.params, batch)

    def attention(p, h, layer):
        q, k = (project(p, h[layer], layer, name, 2) for name in ("q", "k"))
        scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
        if "relative" in p:
            from steppe.models.encoder import relative_buckets

            index = np.asarray(relative_buckets(h.shape[2], 8, 16))
            scores = scores + np.asarray(p["relative"]["table"])[index].transpose(2, 0, 1)[None]
        return log_softmax(np.where(real[:, None, None] > 0, scores, -np.inf), -1)

    wanted = sum(
        kl(attention(teacher.params, h_t, j), attention(params, h_s, i), real)
        for i, j in [(0, 1), (1, 3)]
    )
    np.testing.assert_allclose(out.total, wanted, rtol=1e-4)
    assert float(out.weight) == 2 * real.sum()


def test_the_attention_is_the_models_own():
    """Values replaced by one-hot positions make a layer's context the attention map itself."""
    model = small.encoder(width=16, heads=2, layers=1, head=None)
    params = small.start(model)
    batch = small.batch()
    h = model.apply(params, batch, all_hidden=True).hidden
    seen = features._attention(model, params, h[0], 0, batch)
    from steppe.models.attention import attend, attention_mask

    p = params["layers"]["attn"]
    q, k = (
        (h[0] @ p[n]["kernel"][0] + p[n]["bias"][0]).reshape(small.ROWS, small.LENGTH, 2, 8)
        for n in ("q", "k")
    )
    v = jnp.broadcast_to(jnp.eye(8)[None, :, None], q.shape)
    out = attend(q, k, v, mask=attention_mask(jnp.asarray(batch["attention_mask"])))
    np.testing.assert_allclose(jnp.exp(seen).transpose(0, 2, 1, 3), out, atol=1e-5)


@pytest.mark.parametrize("heads", [2, 4])
def test_relations_of_different_widths(heads):
    student, params, teacher = models()
    batch = small.batch()
    out = features.relation(student, teacher, heads=heads)(params, batch, None)
    real = batch["attention_mask"]
    h_s, h_t = states(student, params, batch), states(teacher.model, teacher.params, batch)
    wanted = 0.0
    for name in ("q", "k", "v"):
        x, y = (
            project(p, h[layer], layer, name, heads)
            for p, h, layer in ((params, h_s, 1), (teacher.params, h_t, 3))
        )
        wanted += kl(relation(y, y, real), relation(x, x, real), real)
    np.testing.assert_allclose(out.total, wanted, rtol=1e-4)
    assert float(out.weight) == 3 * real.sum()


def make(name, student, teacher):
    return {
        "hidden": lambda: features.hidden(student, teacher, [(0, 0), (2, 2)]),
        "attention": lambda: features.attention(student, teacher, [(0, 0), (1, 1)]),
        "relation": lambda: features.relation(student, teacher, heads=2),
    }[name]()


@pytest.mark.parametrize("name", ["hidden", "attention", "relation"])
def test_twins_differ_by_nothing_and_padding_does_not_count(name):
    student, params, teacher = models()
    twin = distill.Teacher(student, jax.tree.map(jnp.copy, params))
    batch = small.batch()
    loss, grads = small.value(make(name, student, twin), params, batch)
    np.testing.assert_allclose(loss, 0, atol=1e-6)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) < 1e-5
    if name == "hidden":  # widths differ
        teacher = distill.Teacher(student, small.start(student, 9))
    objective = make(name, student, teacher)
    loss, grads = small.value(objective, params, batch)
    long = {k: np.pad(v, ((0, 0), (0, 3))) for k, v in batch.items()}
    long["input_ids"][:, -3:] = 9
    value, others = small.value(objective, params, long)
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    assert small.largest(others, grads) < 1e-5


def test_bad_input():
    student, params, teacher = models()
    with pytest.raises(ValueError, match="heads must divide the widths 8 and 12, got 5"):
        features.relation(student, teacher, heads=5)
    with pytest.raises(ValueError, match="of must name relations out of q, k, v"):
        features.relation(student, teacher, heads=2, of=("o",))
    with pytest.raises(ValueError, match=r"layer 5 of the teacher, which has 0\.\.4"):
        features.hidden(student, teacher, [(2, 5)])
    with pytest.raises(ValueError, match=r"layer 2 of the student, which has 0\.\.1"):
        features.attention(student, teacher, [(2, 3)])
    with pytest.raises(ValueError, match="layer_map must hold at least one pair"):
        features.hidden(student, teacher, [])
    with pytest.raises(ValueError, match="width 8 here, 2 of the teacher 12: give extra="):
        features.hidden(student, teacher, [(1, 2)])(params, small.batch(), None)
    other = small.encoder(width=12, heads=3, head=None)
    with pytest.raises(ValueError, match="student has 2 heads and the teacher 3: .* use relation"):
        features.attention(student, distill.Teacher(other, None), [(0, 0)])
    with pytest.raises(ValueError, match="are for encoders, got a DecoderConfig"):
        features.relation(small.decoder(), teacher, heads=2)
    bound = lora.overlay(rank=2).bind(student, frozen=params)
    full = {"base": params, "overlay": bound.init(jax.random.key(1))["overlay"]}
    with pytest.raises(ValueError, match="which an overlay changes"):
        features.relation(bound, teacher, heads=2)(full, small.batch(), None)
