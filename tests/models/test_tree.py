"""Paths, splits and the per-tensor view of stacked leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steppe.models import tree

TREE = {
    "embed": {"word": {"table": jnp.arange(6.0).reshape(3, 2)}},
    "layers": {"attn": {"q": {"kernel": jnp.arange(12.0).reshape(3, 2, 2)}}},
    "head": {"bias": jnp.ones(2)},
}


def test_flatten_and_back():
    flat = tree.flatten(TREE)
    assert list(flat) == ["embed/word/table", "layers/attn/q/kernel", "head/bias"]
    assert jax.tree.structure(tree.unflatten(flat)) == jax.tree.structure(TREE)


keys = st.text("abc", min_size=1, max_size=2)
trees = st.recursive(
    st.integers(), lambda t: st.dictionaries(keys, t, min_size=1, max_size=3), max_leaves=8
).filter(lambda t: isinstance(t, dict))


@settings(deadline=None, max_examples=50)
@given(trees)
def test_round_trip_of_any_tree(value):
    assert tree.unflatten(tree.flatten(value)) == value


@settings(deadline=None, max_examples=50)
@given(trees, st.randoms())
def test_split_and_merge_are_inverse(value, random):
    paths = tree.paths(value)
    chosen = [p for p in paths if random.random() < 0.5]
    picked, rest = tree.split(value, chosen)
    assert sorted(tree.paths(picked)) == sorted(chosen)
    assert tree.flatten(tree.merge(picked, rest)) == tree.flatten(value)


def test_bad_keys():
    with pytest.raises(ValueError, match=r"without '/', got 'a/b' below x"):
        tree.flatten({"x": {"a/b": 1}})
    with pytest.raises(ValueError, match="given twice"):
        tree.unflatten({"a/b": 1, "a": 2})
    with pytest.raises(ValueError, match="runs through the leaf"):
        tree.unflatten({"a": 1, "a/b": 2})


def test_split_refuses_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match=r"'heads/.\*' matches no parameter; paths look like"):
        tree.split(TREE, [r"heads/.*"])


def test_merge_refuses_a_clash():
    with pytest.raises(ValueError, match="both trees hold a parameter at 'head/bias'"):
        tree.merge(TREE, {"head": {"bias": 0}})


def test_get_and_replace():
    assert tree.get(TREE, "head/bias").shape == (2,)
    with pytest.raises(KeyError, match=r"at 'bia' there is \['bias'\]"):
        tree.get(TREE, "head/bia")
    new = tree.replace(TREE, {"head/bias": jnp.zeros(2)})
    assert not new["head"]["bias"].any()
    assert TREE["head"]["bias"].all()
    with pytest.raises(KeyError, match="to replace"):
        tree.replace(TREE, {"head/x": 0})


def test_a_stacked_leaf_is_as_many_tensors():
    names = [name for name, _ in tree.tensors(TREE)]
    assert names[1:4] == [f"layers.{i}/attn/q/kernel" for i in range(3)]
    norms = tree.map_tensors(lambda t: jnp.linalg.norm(t), TREE)
    per_layer = norms["layers"]["attn"]["q"]["kernel"]
    expected = [np.linalg.norm(t) for n, t in tree.tensors(TREE) if n.startswith("layers.")]
    np.testing.assert_allclose(per_layer, expected, rtol=1e-6)
    assert norms["head"]["bias"].shape == ()


def test_count_bytes_and_cast():
    assert tree.count(TREE) == 6 + 12 + 2
    assert tree.nbytes(TREE) == 80
    mixed = {"w": jnp.ones(2), "n": jnp.ones(2, jnp.int32)}
    half = tree.cast(mixed, "bfloat16")
    assert half["w"].dtype == jnp.bfloat16
    assert half["n"].dtype == jnp.int32


def test_same_structure_names_the_first_difference():
    other = tree.replace(TREE, {"head/bias": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"'head/bias': a has \(2,\), b has \(3,\)"):
        tree.same_structure(TREE, other, ("a", "b"))
    with pytest.raises(ValueError, match="a has a parameter at 'head/bias' that b lacks"):
        tree.same_structure(TREE, {k: v for k, v in TREE.items() if k != "head"}, ("a", "b"))
