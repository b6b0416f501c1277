"""O-LoRA: the penalty is what its paper says, a task more changes no bit and compiles nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import tree
from steppe.models.overlays import lora, o_lora

from .conftest import TINY

LOOPED = dataclasses.replace(TINY, unroll=1)  # compiles faster than layers that are written out
SITES = ("attn.q", "ffn.out")


@pytest.fixture(scope="module")
def peft():
    return o_lora.overlay(tasks=3, rank=2, alpha=4.0, sites=SITES)


@pytest.fixture(scope="module")
def delta(tiny, peft):
    return peft.init(jax.random.key(0), tiny[1])


def trained(delta, seed):
    """The delta with a B that does something."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    layers = {
        name: {"a": own["a"], "b": 0.3 * jax.random.normal(next(keys), own["b"].shape)}
        for name, own in delta["layers"].items()
    }
    return {**delta, "layers": layers}


@pytest.fixture(scope="module")
def logits(tiny, peft, batch):
    """One compiled program for every delta of the bank's shape."""
    bound = peft.bind(LOOPED.build())
    call = jax.jit(lambda d: bound.apply({"base": tiny[1], "overlay": d}, batch).logits)
    yield lambda d: np.asarray(call(d))
    assert call._cache_size() == 1


@pytest.fixture(scope="module")
def two(delta):
    """After two tasks, the third about to begin; and the delta with which the second ended."""
    first = o_lora.commit_task(trained(delta, 1), jax.random.key(1))
    second = trained(first, 2)
    return second, o_lora.commit_task(second, jax.random.key(2))


def oracle(bank, active, a, p):
    """The published penalty on its own orientation, rows of A, one task after the other."""
    total = 0.0
    for layer in range(a.shape[0]):
        for column in range(bank.shape[-1]):
            for own in range(a.shape[-1]):
                dot = float(active[column]) * float(bank[layer, :, column] @ a[layer, :, own])
                total += abs(dot) if p == 1 else dot**2
    return total


def test_golden_penalties():
    """Identical orthonormal directions: r; orthogonal ones: 0; c A: c and c^2 times (o_lora.md)."""
    eye = np.eye(6, dtype=np.float32)
    a, other = eye[None, :, :2], eye[None, :, 2:4]
    bank = np.concatenate([a, other], -1)
    on, half = np.ones(4, np.float32), np.array([1, 1, 0, 0], np.float32)
    for p in (1, 2):
        assert o_lora.orthogonality_penalty(bank, half, a, p) == 2.0
        assert o_lora.orthogonality_penalty(bank, half, other, p) == 0.0
        assert o_lora.orthogonality_penalty(bank, on, eye[None, :, 4:], p) == 0.0
        assert o_lora.orthogonality_penalty(bank, 0 * on, a, p) == 0.0
        assert o_lora.orthogonality_penalty(bank, on, 3.0 * a, p) == 2.0 * 3.0**p


@pytest.mark.parametrize("p", [1, 2])
def test_penalty_equals_the_oracle(p):
    rng = np.random.default_rng(0)
    bank, a = rng.normal(size=(3, 7, 6)), rng.normal(size=(3, 7, 2))
    active = np.array([1, 1, 1, 1, 0, 0.0])
    got = o_lora.orthogonality_penalty(
        jnp.asarray(bank, jnp.float32), jnp.asarray(active), jnp.asarray(a, jnp.float32), p
    )
    np.testing.assert_allclose(got, oracle(bank, active, a, p), rtol=1e-6)


def test_the_first_task_is_plain_lora(tiny, batch, peft, delta, logits):
    own = trained(delta, 1)
    plain = lora.overlay(rank=2, alpha=4.0, sites=SITES).bind(LOOPED.build())
    full = {"base": tiny[1], "overlay": {"layers": own["layers"]}}
    expected = jax.jit(lambda p: plain.apply(p, batch).logits)(full)
    np.testing.assert_allclose(logits(own), expected, atol=1e-6)
    assert o_lora.penalty(own) == 0.0


def test_a_new_task_starts_where_the_last_one_ended(delta, logits, two):
    first = trained(delta, 1)
    again = o_lora.commit_task(first, jax.random.key(1))
    np.testing.assert_array_equal(logits(again), logits(first))
    second, third = two
    np.testing.assert_array_equal(logits(third), logits(second))
    assert np.abs(logits(second) - logits(first)).max() > 1e-3
    assert not any(np.asarray(own["b"]).any() for own in third["layers"].values())
    bound = 1.0 / np.sqrt(16)
    a = np.asarray(third["layers"]["attn.q"]["a"])
    assert 0.8 * bound < np.abs(a).max() <= bound


def test_earlier_tasks_stay_what_they_were(two):
    second, third = two
    np.testing.assert_array_equal(third["bank"]["active"], [1, 1, 0])
    for name in SITES:
        kept, before = third["bank"]["layers"][name], second["bank"]["layers"][name]
        np.testing.assert_array_equal(kept["a"][..., :2], before["a"][..., :2])
        np.testing.assert_array_equal(kept["b"][..., :2, :], before["b"][..., :2, :])
        np.testing.assert_array_equal(kept["a"][..., 2:4], second["layers"][name]["a"])
        assert not np.asarray(kept["a"][..., 4:]).any()


def test_only_the_current_pair_trains(tiny, peft):
    bound = peft.bind(LOOPED.build(), frozen=tiny[1])
    live, _ = tree.split(bound.abstract(), bound.trainable)
    assert set(live["overlay"]) == {"layers"}
    assert tree.count(live["overlay"]) == 4 * 2 * ((16 + 16) + (24 + 16))


def test_merged_equals_attached(tiny, peft, batch, logits, two):
    full = {"base": tiny[1], "overlay": two[0]}
    found = peft.merged(LOOPED.build(), full, batch)
    assert found.largest_difference < 1e-5
    kernel = np.asarray(tiny[1]["layers"]["attn"]["q"]["kernel"], np.float64)
    bank, own = two[0]["bank"]["layers"]["attn.q"], two[0]["layers"]["attn.q"]
    for low in (bank, own):
        a, b = (np.asarray(low[n], np.float64) for n in "ab")
        kernel = kernel + 2.0 * np.einsum("lir,lro->lio", a, b)
    np.testing.assert_allclose(found.params["layers"]["attn"]["q"]["kernel"], kernel, atol=1e-5)


def test_a_slot_that_is_not_active_counts_nowhere(two, logits):
    second, _ = two
    off = {**second, "bank": {**second["bank"], "active": jnp.zeros(3)}}
    empty = jax.tree.map(jnp.zeros_like, second["bank"])
    np.testing.assert_allclose(logits(off), logits({**second, "bank": empty}), atol=1e-6)
    assert o_lora.penalty(off) == 0.0
    assert o_lora.penalty(second) > 0.0


def test_orthogonal_tasks_do_not_interfere():
    """Inputs in span(A_1), A_1^T A_t = 0: whatever B_t is, their outputs stay (o_lora.md, 5)."""
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    first, second = basis[:, :3], basis[:, 3:5]
    x = rng.normal(size=(5, 3)) @ first.T
    for _ in range(3):
        b = 100 * rng.normal(size=(2, 6))
        assert np.abs(x @ second @ b).max() < 1e-6
    gradient = rng.normal(size=(1, 8, 2)).astype(np.float32)
    bank = np.zeros((1, 8, 6), np.float32)
    bank[0, :, :3] = first
    left = o_lora.project_gradient(gradient, bank, np.array([1, 1, 1, 0, 0, 0], np.float32))
    assert np.abs(np.einsum("lda,ldb->lab", bank, left)).max() < 1e-6
    np.testing.assert_allclose(gradient - left, first @ (first.T @ gradient), atol=1e-6)


def test_l2_and_cosine(two):
    second, _ = two
    norms = [
        np.sqrt(np.square(np.asarray(leaf)).sum((-2, -1))).sum()
        for own in second["layers"].values()
        for leaf in own.values()
    ]
    np.testing.assert_allclose(o_lora.l2_penalty(second), sum(norms), rtol=1e-6)
    zero = {"layers": {"x": {"a": jnp.ones((1, 2, 2)), "b": jnp.zeros((1, 2, 2))}}}
    slope = jax.grad(o_lora.l2_penalty)(zero)["layers"]["x"]
    np.testing.assert_array_equal(slope["b"], 0.0)
    np.testing.assert_allclose(slope["a"], 0.5)
    same = {
        "layers": {"x": {"a": jnp.ones((1, 4, 1))}},
        "bank": {"layers": {"x": {"a": jnp.full((1, 4, 2), -3.0)}}, "active": jnp.ones(2)},
    }
    np.testing.assert_allclose(o_lora.largest_cosine(same), 1.0, rtol=1e-6)


def test_errors(tiny, delta):
    with pytest.raises(ValueError, match="alpha must be finite, got inf"):
        o_lora.overlay(alpha=float("inf"))
    with pytest.raises(ValueError, match="tasks must be >= 1, got 0"):
        o_lora.overlay(tasks=0)
    with pytest.raises(ValueError, match="rank must be >= 1, got 0"):
        o_lora.overlay(rank=0)
    with pytest.raises(ValueError, match="rank must be <= 16 at site 'attn.q'"):
        o_lora.overlay(rank=17, tasks=1).init(jax.random.key(0), tiny[1])
    with pytest.raises(ValueError, match=r"tasks \* rank must be <= 16 .* got 5 \* 4 = 20"):
        o_lora.overlay(rank=4, tasks=5).init(jax.random.key(0), tiny[1])
    with pytest.raises(ValueError, match=r"p must be 1 .*, got 3"):
        o_lora.penalty(delta, p=3)
    full = delta
    for number in range(3):
        full = o_lora.commit_task(full, jax.random.key(number))
    with pytest.raises(ValueError, match="holds 3 tasks and all of its slots are taken.*tasks=4"):
        o_lora.commit_task(full, jax.random.key(9))
    beyond = jax.jit(o_lora.commit_task)(full, jax.random.key(9))
    assert np.isnan(beyond["bank"]["layers"]["attn.q"]["a"]).any()
