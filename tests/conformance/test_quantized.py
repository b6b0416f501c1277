"""What quantization must do on meshes, under the scan, in bf16, saved and restored."""

import functools
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from steppe.models import integer, quantized, tree
from steppe.models.quantized import QuantConfig
from steppe.train import checkpoint, distill, mesh, objectives, quantize, step
from steppe.train.quantize import generator, zsaq

HERE = Path(__file__).parents[1] / "train" / "quantize"
small = SimpleNamespace(**runpy.run_path(str(HERE / "small.py")))
W4A8 = quantized.parse("w4a8")
MESH = {"data": 2, "fsdp": 2, "model": 2}
KERNEL = "layers/attn/q/kernel"


@functools.cache
def teacher(unroll=6):
    # A gentle network: a rounding that turns one integer must not be amplified.
    return small.teacher(small.encoder(unroll=unroll), scale=2.0)


def batch(rows=8):
    made = small.batches(1, rows)[0]
    return {**made, "labels": np.arange(rows, dtype=np.int32) % 3}


MODES = {
    "token": W4A8,
    "tensor": QuantConfig(4, 8, a_mode="tensor"),
    "group": QuantConfig(4, 8, group=8),
}


@pytest.mark.parametrize("mode", MODES)
def test_looped_layers_are_the_written_out_ones(mode):
    outs = []
    for unroll in (1, 6):
        own = teacher(unroll)
        student = quantized.wrap(own.model, MODES[mode])
        outs.append(jax.jit(lambda p, s=student: s.apply(p, batch()).logits)(own.params))
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-4)


def train(axes=None, rules=W4A8, steps=3, **options):
    own = teacher()
    objective = quantize.qat(own.model, rules, objectives.classification_ce)
    plan = None if axes is None else mesh.plan(axes, own.model.axes)
    state = step.init(jax.random.key(0), own.model, optax.sgd(0.1), plan, params=own.params)
    run = step.make(objective, optax.sgd(0.1), plan, **options)
    losses = []
    for _ in range(steps):
        state, metrics = run(state, batch())
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert run.compiles == 1
    return state, losses


@functools.cache
def reference(mode="token"):
    return train(rules=MODES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_eight_devices_are_one(mode):
    """Also a range over the batch: it is that of all devices' tokens."""
    state, losses = train(MESH, MODES[mode])
    np.testing.assert_allclose(losses, reference(mode)[1], atol=2e-3)
    assert small.largest(state.params, reference(mode)[0].params) < 5e-3


def test_micro_batches_and_bf16():
    np.testing.assert_allclose(train(microbatches=4)[1], reference()[1], atol=2e-3)
    state, losses = train(compute_dtype="bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    np.testing.assert_allclose(losses, reference()[1], rtol=0.1)


def test_integers_and_their_steps_lie_as_their_kernels_do():
    own = teacher()
    model = integer.wrap(own.model, W4A8)
    grids = jax.tree.map(np.asarray, quantize.rtn(own.params, W4A8))
    plan = mesh.plan(MESH, model.axes)
    placed = plan.place(grids)
    held = tree.get(placed, KERNEL)
    assert held["q"].sharding.spec == P(None, "fsdp", "model")
    assert held["scale"].sharding.spec == P(None, None, "model")
    data = plan.batch(batch())
    run = jax.jit(lambda p, b: model.apply(p, b).logits)
    with jax.set_mesh(plan.mesh):
        found = plan.settle(run(placed, data))
    np.testing.assert_allclose(found, run(grids, batch()), atol=5e-3)


def test_steps_made_on_a_mesh_are_split_like_their_kernels():
    own = teacher()
    plan = mesh.plan(MESH, own.model.axes)
    made = jax.jit(lambda p: quantized.quantize(p, W4A8))(plan.place(own.params))
    plain = quantized.quantize(own.params, W4A8)
    held = tree.get(plan.settle(made), KERNEL)
    assert held["scale"].sharding.is_equivalent_to(
        jax.sharding.NamedSharding(plan.mesh, P(None, None, "model")), 3
    )
    assert small.largest(made, plain) == 0


# The game ------------------------------------------------------------------------------------

OPT = zsaq.players(0.05, 2, student_lr=1e-3, generator_lr=1e-3)


WORDS = {"adapter": "gumbel", "candidates": 5}


@functools.cache
def players(words=False):
    own = teacher()
    sizes = {"rows": 8, "length": 6, "width": 8, "hidden": 16, **(WORDS if words else {})}
    return quantized.wrap(own.model, W4A8), generator.noise(own.model, **sizes)


@functools.cache
def runner(on_mesh, compute_dtype=None, words=False):
    """(step, plan); each is compiled once for all tests."""
    own, (student, gen) = teacher(), players(words)
    plan = mesh.plan(MESH, zsaq.rules(student, own.model, gen)) if on_mesh else None
    options = {"judge_every": 2, "compute_dtype": compute_dtype}
    return zsaq.make_zsaq_step(student, own.model, gen, OPT, plan, **options), plan


def fresh(on_mesh, seed=0, words=False):
    own, (student, gen) = teacher(), players(words)
    plan = runner(on_mesh, words=words)[1]
    return zsaq.init(jax.random.key(seed), student, own, gen, OPT, plan)


def play(on_mesh=False, steps=3, state=None, compute_dtype=None, words=False):
    run, _ = runner(on_mesh, compute_dtype, words=words)
    state = fresh(on_mesh, words=words) if state is None else state
    losses = []
    for _ in range(steps):
        state, metrics = run(state, {})
        losses.append(float(metrics["loss"][0]))
    assert run.compiles == 1
    return state, losses


@functools.cache
def game_reference():
    return play()


def test_the_game_on_eight_devices():
    state, losses = play(on_mesh=True)
    np.testing.assert_allclose(losses, game_reference()[1], rtol=0.02)
    kernel = state.params["student"]["layers"]["attn"]["q"]["kernel"]
    assert kernel.sharding.spec == P(None, "fsdp", "model")
    best = state.extra["best"]["student"]["layers"]["attn"]["q"]["kernel"]
    assert best.sharding == kernel.sharding
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert moments
    assert all(
        leaf.sharding.spec in (P(None, "fsdp", "model"), P(None, "model", "fsdp"))
        for leaf in moments
    )


def test_a_generator_that_chooses_words_on_eight_devices_and_in_bf16():
    _, losses = play(words=True)
    sharded, others = play(on_mesh=True, words=True)
    np.testing.assert_allclose(losses, others, rtol=0.02)
    before, after = (s.params["generator"]["adapter"] for s in (fresh(True, words=True), sharded))
    assert small.largest(before, after) > 0
    narrow, rounded = play(compute_dtype="bfloat16", words=True)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(narrow.params))
    assert all(0.2 < a / b < 5 for a, b in zip(rounded, losses, strict=True))


def test_the_game_in_bf16_keeps_its_players_in_float32():
    state, losses = play(compute_dtype="bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    # f is a small difference of two networks that bf16 rounds: its size stays.
    assert all(0.2 < a / b < 5 for a, b in zip(losses, game_reference()[1], strict=True))


@pytest.mark.parametrize("on_mesh", [False, True])
def test_both_players_are_saved_and_go_on_bitwise(on_mesh, tmp_path):
    state, _ = play(on_mesh)
    with checkpoint.Checkpoints(tmp_path / "c", manifest={}) as saved:
        saved.save(state, zsaq.Noise().get_state())
        saved.wait()
        restored, data = saved.restore(fresh(on_mesh, seed=9))
    assert data == {"count": 0}
    for name in ("params", "opt_state", "extra"):
        assert small.largest(getattr(state, name), getattr(restored, name)) == 0
    ends = [play(on_mesh, 2, start)[0] for start in (state, restored)]
    assert small.largest(ends[0].params, ends[1].params) == 0
    assert int(ends[1].step) == 5


def test_the_teacher_is_no_constant_of_the_program():
    text = runner(False)[0].lower(fresh(False), {}).as_text()
    width = "x".join(map(str, teacher().params["layers"]["ffn"]["in"]["kernel"].shape))
    constants = [line for line in text.splitlines() if 'stablehlo.constant dense<"' in line]
    assert f"tensor<{width}xf32>" in text
    assert not [line for line in constants if f"tensor<{width}xf32>" in line]


def test_a_minimax_iteration_costs_what_it_should():
    """FLOPs per step of the student at K_x = 5: below 3.2 times a step of plain distillation."""
    own, (student, gen) = teacher(), players()

    def flops(freeze):
        opt = zsaq.players(0.05, 1, freeze_generator=freeze)
        run = zsaq.make_zsaq_step(student, own.model, gen, opt, judge_every=0)
        state = zsaq.init(jax.random.key(0), student, own, gen, opt)
        return run.compile(state, {}).cost_analysis()["flops"]

    # A loop counts once, so that K_x = 1 is compiled, with the generator's step and without.
    step_of_x = flops(True)
    step_of_y = flops(False) - step_of_x
    objective = distill.kd(student, distill.Teacher(own.model), kind="forward_kl", ratio=1.0)
    tx = optax.adam(1e-3)
    state = step.init(
        jax.random.key(1),
        distill.with_teacher(student, own),
        tx,
        params={"student": own.params, "teacher": own.params},
    )
    rows = {
        "input_ids": np.ones((8, 6), np.int32),
        "attention_mask": np.ones((8, 6), np.int32),
        "labels": np.zeros(8, np.int32),
        "label_mask": np.ones(8, np.float32),
    }
    plain = step.make(objective, tx).compile(state, rows).cost_analysis()["flops"]
    assert 1.5 < step_of_x / plain < 2.2
    assert (step_of_x + step_of_y / 5) / plain < 3.2
