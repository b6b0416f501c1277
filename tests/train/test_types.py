"""What an objective may return, and what it is told when it returns something else."""

import jax
import jax.numpy as jnp
import pytest

from steppe.train.types import LossOut, TrainState, components, rows


def test_a_scalar_loss_is_one_unnamed_component_in_float32():
    totals, weights = components(LossOut(jnp.bfloat16(6), 3))
    assert {k: float(v) for k, v in totals.items()} == {"": 6.0}
    assert {k: float(v) for k, v in weights.items()} == {"": 3.0}
    assert totals[""].dtype == weights[""].dtype == jnp.float32


def test_components_keep_their_names_and_order():
    totals, weights = components(LossOut({"ce": 1.0, "kd": 2.0}, {"kd": 4.0, "ce": 3.0}))
    assert list(totals) == list(weights) == ["ce", "kd"]
    assert float(weights["kd"]) == 4.0


@pytest.mark.parametrize(
    ("out", "error", "words"),
    [
        (jnp.float32(1), TypeError, "must return LossOut"),
        (LossOut({"ce": 1.0}, {"kd": 1.0}), ValueError, r"same keys, got \['ce'\] and \['kd'\]"),
        (LossOut({"ce": 1.0}, 2.0), ValueError, r"\['ce'\] and a scalar"),
        (LossOut(jnp.ones(3), 3.0), ValueError, r"scalar sum, got shape \(3,\)"),
    ],
)
def test_anything_else_is_refused_by_name(out, error, words):
    with pytest.raises(error, match=words):
        components(out)


def test_rows_have_the_components_of_the_loss():
    assert rows(LossOut(1.0, 2.0)) is None
    totals, weights = rows(LossOut(3.0, 2.0, {}, (jnp.array([1.0, 2.0]), jnp.ones(2, jnp.int32))))
    assert totals[""].tolist() == [1.0, 2.0]
    assert weights[""].dtype == jnp.float32
    parts = {"ce": jnp.ones(2), "kd": jnp.zeros(2)}
    named, _ = rows(LossOut({"ce": 2.0, "kd": 0.0}, {"ce": 1.0, "kd": 1.0}, {}, (parts, parts)))
    assert sorted(named) == ["ce", "kd"]


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (
            LossOut({"ce": 1.0}, {"ce": 1.0}, {}, ({"kd": jnp.ones(2)}, {"ce": jnp.ones(2)})),
            r"components of the loss, \['ce'\], got \['kd'\] for total",
        ),
        (
            LossOut({"ce": 1.0}, {"ce": 1.0}, {}, (jnp.ones(2), jnp.ones(2))),
            r"\['ce'\], got \[''\]",
        ),
        (
            LossOut(1.0, 1.0, {}, (jnp.ones(2), jnp.ones((2, 3)))),
            r"rows weight '' must have one entry a row, \[B\], got shape \(2, 3\)",
        ),
    ],
)
def test_rows_of_another_form_are_refused(out, words):
    with pytest.raises(ValueError, match=words):
        rows(out)


def test_the_state_is_one_pytree_whose_paths_are_its_fields():
    state = TrainState(jnp.int32(1), {"a": jnp.ones(2)}, {}, (), {}, jax.random.key(0))
    doubled = jax.tree.map(lambda x: x, state.replace(step=jnp.int32(2)))
    assert int(doubled.step) == 2
    names = [
        jax.tree_util.keystr(k, simple=True, separator="/")
        for k, _ in jax.tree_util.tree_flatten_with_path(state)[0]
    ]
    assert names == ["step", "params/a", "rng"]
