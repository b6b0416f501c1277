"""Rules put every leaf where they say, and say what is wrong when they cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from steppe.train import mesh
from steppe.train.types import TrainState

RULES = (
    (r"layers/.*/kernel", (None, "fsdp", "model")),
    (r"embed", (("fsdp", "model"), None)),
    (r".*/bias", ()),
)


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


TREE = {"embed": shaped(8, 3), "layers": {"a": {"kernel": shaped(3, 4, 6), "bias": shaped(3, 6)}}}


def test_rules_name_axes_and_absent_axes_are_dropped():
    both = mesh.plan({"fsdp": 4, "model": 2}, RULES).shardings(TREE)
    assert both["layers"]["a"]["kernel"].spec == PartitionSpec(None, "fsdp", "model")
    assert both["embed"].spec == PartitionSpec(("fsdp", "model"))
    assert both["layers"]["a"]["bias"].spec == PartitionSpec()
    data = mesh.plan({"data": 8}, RULES).shardings(TREE)
    assert {s.spec for s in jax.tree.leaves(data)} == {PartitionSpec()}
    model = mesh.plan({"data": 4, "model": 2}, RULES).shardings(TREE)
    assert model["layers"]["a"]["kernel"].spec == PartitionSpec(None, None, "model")
    assert model["embed"].spec == PartitionSpec("model")


def test_axes_are_auto_and_one_size_may_be_left_open():
    plan = mesh.plan({"data": -1, "model": 2}, RULES)
    assert dict(plan.mesh.shape) == {"data": 4, "model": 2}
    assert set(plan.mesh.axis_types) == {AxisType.Auto}
    assert mesh.plan({"data": 2}, devices=jax.devices()[:2]).data_size == 2
    # An embedding lookup, which raises on a mesh of Explicit axes.
    table = plan.place({"embed": np.ones((8, 3), np.float32)})["embed"]
    rows = plan.batch({"ids": np.zeros((4, 2), np.int32)})["ids"]
    assert jax.jit(lambda t, i: t[i])(table, rows).shape == (4, 2, 3)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"data": 3, "model": 2}, "needs 6 devices, but there are 8"),
        ({"data": 16}, "needs 16 devices, but there are 8"),
        ({"data": -1, "model": 3}, "needs a multiple of 3 devices, but there are 8"),
        ({"data": -1, "model": -1}, "only one mesh axis may be -1"),
        ({"data": 0}, "sizes must be >= 1"),
        ({}, "sizes must be >= 1"),
        ({"data": 4, "modle": 2}, "'modle' of size 2 is used by no rule"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(shape, words):
    with pytest.raises(ValueError, match=words):
        mesh.plan(shape, RULES)


def test_leaves_that_the_rules_do_not_fit_are_named():
    plan = mesh.plan({"fsdp": 4, "model": 2}, RULES)
    with pytest.raises(
        ValueError, match=r"no sharding rule covers 'head/kernel' of shape \(4, 4\)"
    ):
        plan.shardings({"head": {"kernel": shaped(4, 4)}})
    with pytest.raises(
        ValueError, match=r"dimension 1 of 'layers/a/kernel' has size 6, .* 4 devices .*'fsdp'"
    ):
        plan.shardings({"layers": {"a": {"kernel": shaped(3, 6, 6)}}})
    with pytest.raises(ValueError, match=r"names 3 axes .*'layers/a/kernel' has 2 dimensions"):
        plan.shardings({"layers": {"a": {"kernel": shaped(4, 6)}}})
    assert plan.sharding("anything", ()).spec == PartitionSpec()


def test_placing_gives_every_device_its_shard_from_host_or_device_memory():
    plan = mesh.plan({"fsdp": 4, "model": 2}, RULES)
    values = np.arange(3 * 4 * 6, dtype=np.float32).reshape(3, 4, 6)
    for leaf in (values, jnp.asarray(values)):
        placed = plan.place({"layers": {"a": {"kernel": leaf}}})["layers"]["a"]["kernel"]
        assert {s.data.shape for s in placed.addressable_shards} == {(3, 1, 3)}
        np.testing.assert_array_equal(placed, values)


def test_an_optimiser_state_lies_like_the_parameters_that_it_shadows():
    plan = mesh.plan({"fsdp": 4, "model": 2}, RULES)
    state = jax.eval_shape(
        lambda p: TrainState(
            jnp.int32(0),
            p,
            {},
            (optax.adam(1e-3).init(p), {"rows": jnp.ones(3), "mask": p}),
            {"ema": p, "score": jnp.ones((8, 3))},
            jax.random.key(0),
        ),
        TREE,
    )
    placed = plan.state(state)
    wanted = plan.shardings(TREE)
    assert placed.params == wanted
    assert placed.opt_state[0][0].mu == wanted == placed.opt_state[1]["mask"]
    assert placed.extra["ema"] == wanted
    for leaf in (placed.opt_state[0][0].count, placed.opt_state[1]["rows"], placed.rng):
        assert leaf == plan.replicated
    assert placed.extra["score"] == plan.replicated


def test_batches_are_split_over_all_data_axes():
    plan = mesh.plan({"data": 2, "fsdp": 2, "model": 2}, RULES)
    placed = plan.batch({"x": np.arange(8).reshape(8, 1), "scale": np.float32(2)})
    assert {s.data.shape for s in placed["x"].addressable_shards} == {(2, 1)}
    assert placed["scale"].sharding == plan.replicated
    assert plan.batch(placed)["x"] is placed["x"]
    with pytest.raises(ValueError, match=r"batch\['x'\] has 6 rows, not divisible by the 4 parts"):
        plan.batch({"x": np.zeros((6, 2))})
