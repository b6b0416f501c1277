"""What an objective may return, and what it is told when it returns something else."""

import jax
import jax.numpy as jnp
import pytest

from steppe.train.types import LossOut, TrainState, components


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


def test_the_state_is_one_pytree_whose_paths_are_its_fields():
    state = TrainState(jnp.int32(1), {"a": jnp.ones(2)}, {}, (), {}, jax.random.key(0))
    doubled = jax.tree.map(lambda x: x, state.replace(step=jnp.int32(2)))
    assert int(doubled.step) == 2
    names = [
        jax.tree_util.keystr(k, simple=True, separator="/")
        for k, _ in jax.tree_util.tree_flatten_with_path(state)[0]
    ]
    assert names == ["step", "params/a", "rng"]
