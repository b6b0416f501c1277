"""Split parameters: fsdp, tensor and sequence parallel steps are those of one device.

A small decoder under the rules of its family for AdamW and distillation; for the methods that take
two gradients a smaller network, under rules that split every matrix over both axes. Data parallel,
micro-batches and a 2 x 2 x 2 mesh stand in the tables of each method.
"""

import functools
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from steppe import optim
from steppe.models import tree
from steppe.models.decoder import DecoderConfig
from steppe.models.heads import HeadConfig
from steppe.train import distill, mesh, objectives, step

PROGRAMS = Path(__file__).parents[1] / "train" / "programs"
toy = SimpleNamespace(**runpy.run_path(str(PROGRAMS / "toy.py")))
ROWS, T = 16, 8
SIZES = {"vocab_size": 32, "heads": 8, "kv_heads": 8, "ffn_width": 32, "positions": 16}
SIZES |= {"head": HeadConfig("lm"), "layers": 1}
STUDENT = DecoderConfig("llama", width=16, **SIZES).build()
TEACHER = DecoderConfig("llama", width=24, **SIZES | {"head_dim": 4}).build()
# A large epsilon: where a gradient is rounding, Adam would make a whole step of it.
ADAMW = optax.adamw(1e-2, eps=1e-3)


@functools.cache
def start():
    return tuple(
        jax.tree.map(np.asarray, jax.jit(m.init)(jax.random.key(i)))
        for i, m in enumerate((STUDENT, TEACHER))
    )


def batch():
    rng = np.random.default_rng(0)
    mask = (np.arange(T) < rng.integers(3, T + 1, (ROWS, 1))).astype(np.int32)
    ids = rng.integers(1, 32, (ROWS, T)).astype(np.int32) * mask
    counted = mask.astype(np.float32) * (np.arange(T) > 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids, "label_mask": counted}


def train(name, axes=None, steps=3):
    own, taught = start()
    model, params = STUDENT, own
    objective = objectives.token_ce(model, shift=True)
    if name == "kd":
        model = distill.with_teacher(STUDENT, distill.Teacher(TEACHER, taught))
        objective = distill.kd(STUDENT, distill.Teacher(TEACHER), ratio=0.5)
        params = {"student": own, "teacher": taught}
    plan = None if axes is None else mesh.plan(axes, model.axes)
    state = step.init(jax.random.key(1), model, ADAMW, plan, params=params)
    run = step.make(objective, ADAMW, plan)
    losses = []
    for _ in range(steps):
        state, metrics = run(state, batch())
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert run.compiles == 1
    return state, losses


@functools.cache
def reference(name):
    state, losses = train(name)
    assert losses[-1] < losses[0]
    return jax.tree.map(np.asarray, state.params), losses


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("adamw", {"fsdp": 8}),
        ("adamw", {"model": 8}),
        ("adamw", {"data": 2, "seq": 4}),
        ("kd", {"fsdp": 8}),
    ],
    ids=str,
)
def test_a_step_is_that_of_one_device(name, axes):
    params, losses = reference(name)
    state, found = train(name, axes)
    np.testing.assert_allclose(found, losses, atol=1e-5)
    for path, leaf in tree.flatten(state.params).items():
        np.testing.assert_allclose(leaf, tree.get(params, path), atol=1e-5, err_msg=path)
    split = set(axes) & {"fsdp", "model"}
    for whose in (state.params, state.frozen):
        for path, leaf in tree.flatten(whose).items():
            if path.endswith("layers/ffn/in/kernel"):
                assert {a for a in leaf.sharding.spec if a} == split, path


RULES = (
    ("embed/table", ("fsdp", "model")),
    ("layers/kernel", (None, "fsdp", "model")),
    ("layers/bias", (None, "model")),
    ("head/kernel", ("model", "fsdp")),
    ("head/bias", ()),
)
# (on the mesh, on one device): four parts of the data, so that a device has a quarter of the rows.
METHODS = {
    "sam": (optim.sam(ADAMW, 0.05),) * 2,
    "sam, device": (
        optim.sam(ADAMW, 0.05, ascent="device"),
        optim.sam(ADAMW, 0.05, ascent=toy.ROWS // 4),
    ),
    "fsam": (optim.fsam(ADAMW, 0.05, keep_ratio=0.5, refresh_every=2),) * 2,
}


@pytest.mark.parametrize("name", METHODS)
def test_a_second_gradient_at_split_parameters_is_that_of_one_device(name):
    found = []
    for tx, axes in zip(METHODS[name], ({"fsdp": 4, "model": 2}, None), strict=True):
        plan = None if axes is None else mesh.plan(axes, RULES)
        state = step.init(jax.random.key(0), toy.MODEL, tx, plan)
        run = step.make(toy.ce, tx, plan)
        for number in range(3):
            state, _ = run(state, toy.batch(number))
        assert run.compiles == 1
        found.append(state.params)
    assert found[0]["layers"]["kernel"].sharding.spec == PartitionSpec(None, "fsdp", "model")
    for path, leaf in tree.flatten(found[0]).items():
        np.testing.assert_allclose(leaf, tree.get(found[1], path), atol=1e-5, err_msg=path)


def test_tokens_are_split_between_layers_where_the_mesh_says_so():
    plan = mesh.plan({"data": 2, "seq": 4}, STUDENT.axes)
    state = step.abstract(STUDENT, ADAMW, plan)
    run = step.make(objectives.token_ce(STUDENT, shift=True), ADAMW, plan)
    text = run.lower(state, batch()).as_text()
    assert "sharding_constraint" in text
    assert '{"data"}, {"seq"}' in text
