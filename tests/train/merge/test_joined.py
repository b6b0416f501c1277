"""Heads of several tasks as columns of one: the same answers, in every form that they take."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import pretrained
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.train import distill
from steppe.train.continual import classes
from steppe.train.merge import heads, joined

TINY = EncoderConfig(
    family="bert", vocab_size=30, width=8, layers=2, heads=2, ffn_width=12, positions=10, types=2,
    pooler=True,
)  # fmt: skip
BATCH = {
    "input_ids": np.array([[2, 5, 6, 3], [2, 7, 8, 3], [2, 9, 4, 3]], np.int32),
    "attention_mask": np.ones((3, 4), np.int32),
}


def random(config, seed):
    rng = np.random.default_rng(seed)
    shapes = config.build().abstract()
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), shapes)


def said(model, params):
    return np.asarray(jax.jit(lambda p: model.apply(p, BATCH).logits)(params))


@pytest.fixture(scope="module")
def merged():
    """A trunk with the heads of two tasks, of two and of three classes."""
    models = {}
    for number, (task, count) in enumerate((("mood", 2), ("topic", 3))):
        config = TINY.with_head(HeadConfig("classification", count))
        models[task] = (config, random(config, number))
    trunk = heads.split(models["mood"][1])[0]
    names = {"mood": ("bad", "good"), "topic": ("a", "b", "c")}
    return heads.gather(TINY, trunk, models, names)


@pytest.fixture(scope="module")
def made(merged):
    what, params = joined.join(merged)
    return what, params, what.config.build()


def test_columns_are_the_heads(merged, made):
    what, params, model = made
    logits = said(model, params)
    assert logits.shape == (3, 5)
    assert what.labels == ("mood/bad", "mood/good", "topic/a", "topic/b", "topic/c")
    assert what.groups == (0, 0, 1, 1, 1)
    for task in ("mood", "topic"):
        own, own_params = merged.model(task)
        wanted = said(own, own_params)
        np.testing.assert_allclose(logits[:, what.columns(task)], wanted, atol=1e-5)
        alone = what.alone(task, params)
        assert what.config_of(task) == own.config
        np.testing.assert_array_equal(said(own, alone), wanted)
        assert alone["layers"] is params["layers"]  # shared, not copied


def test_a_folder_says_what_its_columns_are(made, tmp_path):
    what, params, model = made
    pretrained.save(tmp_path / "m", model, params, labels=what.labels)
    loaded = pretrained.load(tmp_path / "m")
    assert loaded.fresh == ()
    again = joined.read(loaded.model, loaded.labels)
    assert again.classes == what.classes
    np.testing.assert_array_equal(said(loaded.model, loaded.params), said(model, params))


def test_distillation_compares_each_row_on_its_own_task(made):
    """The divergence of a row is that of its task's classes, and only its columns move."""
    what, params, model = made
    other = random(what.config, 7)
    student = classes.grouped(model, what.groups)
    teacher = distill.Teacher(classes.grouped(model, what.groups), params)
    labels = np.array([1, 0, 1], np.int32)  # mood, all of them
    batch = {**BATCH, "labels": labels, classes.TASK: np.zeros(3, np.int32)}
    for kind in ("forward_kl", "jsd"):
        objective = distill.kd(student, teacher, kind=kind)
        loss = jax.value_and_grad(lambda p, o=objective: o(p, batch, None).total)
        out, grads = jax.jit(loss)(other)
        at = what.columns("mood")
        p = said(model, params).astype(np.float64)[:, at]
        q = said(model, other).astype(np.float64)[:, at]
        p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (p, q))
        m = p if kind == "forward_kl" else 0.5 * (p + q)
        first = (p * np.log(p / (q if kind == "forward_kl" else m))).sum()
        wanted = first if kind == "forward_kl" else 0.5 * (first + (q * np.log(q / m)).sum())
        np.testing.assert_allclose(out, wanted, rtol=1e-3)
        kernel = np.asarray(grads["head"]["out"]["kernel"])
        assert np.abs(kernel[:, at]).max() > 0
        np.testing.assert_array_equal(kernel[:, what.columns("topic")], 0)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_what_cannot_be_joined(merged, made):
    what, _, model = made
    with pytest.raises(ValueError, match="no head for 'x'; there are mood, topic"):
        what.columns("x")
    with pytest.raises(ValueError, match="there is no head to join"):
        joined.join(dataclasses.replace(merged, heads={}))
    for config, reason in (
        (HeadConfig("token", 2), "'mood' has a token head"),
        (HeadConfig("classification", 2, transform="tanh"), "'mood' has a hidden layer"),
    ):
        head = dataclasses.replace(merged.heads["mood"], config=config)
        with pytest.raises(ValueError, match=reason):
            joined.join(dataclasses.replace(merged, heads={**merged.heads, "mood": head}))
    slash = dataclasses.replace(merged.heads["mood"], labels=("a/b", "c"))
    with pytest.raises(ValueError, match="must hold no slash"):
        joined.join(dataclasses.replace(merged, heads={**merged.heads, "mood": slash}))
    for labels in (None, ("a", "b", "c", "d", "e"), ("m/a", "m/b")):
        with pytest.raises(ValueError, match="one TASK/CLASS for every column"):
            joined.read(model, labels)
    with pytest.raises(ValueError, match="'m' must stand side by side"):
        joined.read(model, ("m/a", "t/a", "t/b", "t/c", "m/b"))


def test_labels_that_a_head_lacks_are_numbers(merged):
    bare = {task: dataclasses.replace(head, labels=None) for task, head in merged.heads.items()}
    what, _ = joined.join(dataclasses.replace(merged, heads=bare))
    assert what.classes == {"mood": ("0", "1"), "topic": ("0", "1", "2")}
