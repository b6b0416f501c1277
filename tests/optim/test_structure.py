"""Masks of whole layers and heads against loops over a small model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe import optim
from steppe.models.tree import path_of
from steppe.optim import fisher, structure

L, D, HEADS = 3, 8, 4
RNG = np.random.default_rng(0)


def make(kv: int = D) -> Any:
    shapes = {
        "embed": {"word": {"table": (11, D)}},
        "layers": {
            "attn": {
                "q": {"kernel": (L, D, D), "bias": (L, D)},
                "k": {"kernel": (L, D, kv), "bias": (L, kv)},
                "v": {"kernel": (L, D, kv), "bias": (L, kv)},
                "o": {"kernel": (L, D, D), "bias": (L, D)},
            },
            "ffn": {"kernel": (L, D, 16), "bias": (L, 16)},
        },
        "head": {"kernel": (D, 2), "bias": (2,)},
    }
    return jax.tree.map(
        lambda s: jnp.asarray(RNG.random(s), jnp.float32),
        shapes,
        is_leaf=lambda x: type(x) is tuple,
    )


SCORES = make()
ALL = fisher.candidates(SCORES)


def share(mask: Any) -> float:
    leaves = jax.tree.leaves(mask)
    return sum(int(m.sum()) for m in leaves) / sum(m.size for m in leaves)


def test_whole_layers() -> None:
    scores = jax.tree.map(jnp.asarray, SCORES)
    scores["layers"] = jax.tree.map(
        lambda x: x * jnp.array([1.0, 3.0, 2.0]).reshape(L, *(1,) * (x.ndim - 1)), scores["layers"]
    )
    one = sum(x.size for x in jax.tree.leaves(scores["layers"])) // L
    total = sum(x.size for x in jax.tree.leaves(scores))
    for layers, wanted in ((1, [0, 1, 0]), (2, [0, 1, 1])):
        mask = structure.layerwise(scores, layers * one / total, ALL, False)
        for leaf in jax.tree.leaves(mask["layers"]):
            rows = np.asarray(leaf).reshape(L, -1)
            np.testing.assert_array_equal(
                rows, np.array(wanted, bool)[:, None] * np.ones_like(rows)
            )
        assert not mask["embed"]["word"]["table"].any()
        assert not mask["head"]["kernel"].any()
        assert not mask["head"]["bias"].any()
    assert share(structure.layerwise(scores, 0.0, ALL, False)) == 0
    assert share(structure.layerwise(scores, 1.0, ALL, False)) == 1


def test_what_is_outside_of_a_stack_is_grouped_by_its_first_name() -> None:
    scores = jax.tree.map(jnp.zeros_like, SCORES)
    scores["head"]["bias"] = jnp.ones(2)
    mask = structure.layerwise(scores, 1e-6, ALL, False)
    assert mask["head"]["kernel"].all()
    assert mask["head"]["bias"].all()
    assert share(mask) == 18 / sum(x.size for x in jax.tree.leaves(scores))


@pytest.mark.parametrize("kv", [D, D // 2])
def test_whole_heads(kv: int) -> None:
    groups = HEADS * kv // D
    scores = jax.tree.map(jnp.zeros_like, make(kv))
    # One entry of k, in head group 1 of layer 2, lifts the whole of it.
    scores["layers"]["attn"]["k"]["kernel"] = (
        scores["layers"]["attn"]["k"]["kernel"].at[2, 0, kv // groups].set(1.0)
    )
    kept = structure.headwise(
        scores, 1e-6, HEADS, fisher.candidates(scores), False, kv_heads=groups
    )
    attn = kept["layers"]["attn"]
    for name, axis in (("q", 2), ("k", 2), ("v", 2), ("o", 1)):
        mask = np.asarray(attn[name]["kernel"])
        wide = mask.shape[axis] // groups
        wanted = np.zeros_like(mask)
        if axis == 2:
            wanted[2, :, wide : 2 * wide] = True
        else:
            wanted[2, wide : 2 * wide] = True
        np.testing.assert_array_equal(mask, wanted)
        if name != "o":
            bias = np.zeros_like(attn[name]["bias"])
            bias[2, wide : 2 * wide] = True
            np.testing.assert_array_equal(attn[name]["bias"], bias)
    assert not attn["o"]["bias"].any()
    others = [m for path, m in jax.tree_util.tree_flatten_with_path(kept)[0]
              if "attn" not in path_of(path)]  # fmt: skip
    assert not any(m.any() for m in others)


def test_tensors_beside_the_heads_are_groups_a_layer_and_means_decide() -> None:
    scores = jax.tree.map(jnp.zeros_like, SCORES)
    scores["layers"]["ffn"]["kernel"] = scores["layers"]["ffn"]["kernel"].at[1].set(0.5)
    # One large entry of a large tensor has the smaller mean.
    scores["embed"]["word"]["table"] = scores["embed"]["word"]["table"].at[0, 0].set(9.0)
    mask = structure.headwise(scores, 1e-6, HEADS, ALL, False)
    assert mask["layers"]["ffn"]["kernel"][1].all()
    assert sum(int(m.sum()) for m in jax.tree.leaves(mask)) == D * 16


def test_candidates_and_the_value_of_the_others() -> None:
    chosen = fisher.candidates(SCORES, ("embed/.*", ".*/bias"))
    mask = jax.jit(lambda s: structure.headwise(s, 0.3, HEADS, chosen, True))(SCORES)
    assert mask["embed"]["word"]["table"].all()
    assert mask["layers"]["attn"]["q"]["bias"].all()
    sizes = [m.size for m, c in zip(jax.tree.leaves(mask), jax.tree.leaves(chosen)) if c]
    kept = [int(m.sum()) for m, c in zip(jax.tree.leaves(mask), jax.tree.leaves(chosen)) if c]
    assert 0.3 <= sum(kept) / sum(sizes) < 0.3 + D * 16 / sum(sizes)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: structure.headwise(SCORES, 0.5, 0, ALL, False), "heads must be a whole number"),
        (lambda: structure.headwise(SCORES, 0.5, 3, ALL, False), "cannot be cut into 3 heads"),
        (
            lambda: structure.headwise(SCORES, 0.5, 4, ALL, False, kv_heads=3),
            "kv_heads must divide heads=4, got 3",
        ),
        (
            lambda: structure.headwise({"a": jnp.ones((2, 2))}, 0.5, 1, {"a": True}, False),
            "no parameter of an attention block matches",
        ),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("chosen", "mask"),
    [
        ("layer", lambda scores: structure.layerwise(scores, 0.3, ALL, False)),
        (("head", HEADS), lambda scores: structure.headwise(scores, 0.3, HEADS, ALL, False)),
    ],
    ids=["layer", "head"],
)
def test_fsam_perturbs_whole_groups(chosen: Any, mask: Any) -> None:
    def grad_fn(params: Any) -> Any:
        seen.append(params)
        return params

    seen: list[Any] = []
    tx = optim.fsam(optax.sgd(0.1), 0.5, keep_ratio=0.3, structure=chosen)
    _, state = tx.update(SCORES, tx.init(SCORES), SCORES, grad_fn=grad_fn)
    expected = mask(fisher.square(SCORES))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), state.mask, expected))
    moved = jax.tree.map(lambda a, b: a != b, seen[0], SCORES)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), moved, expected))


@pytest.mark.parametrize("wrong", ["layers", ("head",), ("head", 0), ("head", 2, 1.5), ("x", 2)])
def test_unknown_structures_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="structure must be"):
        optim.fsam(optax.sgd(0.1), 0.5, structure=wrong)
