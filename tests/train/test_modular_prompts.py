"""The recipe of modular prompts: two speeds, two stages, options as spans; and classes as words."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.models.model import ModelOut
from steppe.train import modular_prompts, objectives

PARAMS = {
    "overlay": {"layers": {"resid": {"router": jnp.ones((2, 1, 3)), "modules": jnp.ones((2, 3))}}},
    "base": {"head": {"out": {"kernel": jnp.ones((4, 2))}}},
}
GRADS = jax.tree.map(lambda a: 0.3 * jnp.ones_like(a), PARAMS)


def moved(tx, steps):
    """Whether (router, modules, head) moved in each of so many steps, and the first updates."""

    @jax.jit
    def update(params, state):
        updates, state = tx.update(GRADS, state, params)
        return updates, optax.apply_updates(params, updates), state

    params, state, found = PARAMS, tx.init(PARAMS), []
    for _ in range(steps):
        updates, params, state = update(params, state)
        own = updates["overlay"]["layers"]["resid"]
        leaves = (own["router"], own["modules"], updates["base"]["head"]["out"]["kernel"])
        found.append([float(jnp.abs(leaf).max()) for leaf in leaves])
    return np.array(found)


def test_a_new_task_learns_its_router_first_and_then_the_rest():
    found = moved(modular_prompts.two_stage(3, router_lr=1e-2, prompt_lr=1e-4), 5)
    np.testing.assert_array_equal(found != 0, [[1, 0, 0]] * 3 + [[0, 1, 1]] * 2)
    # Adam's first step is the rate; the second stage begins with fresh moments, and without decay
    # in the first.
    np.testing.assert_allclose(found[0, 0], 1e-2 * (1 + 1e-4), rtol=1e-4)
    np.testing.assert_allclose(found[3, 1:], 1e-4 * (1 + 1e-4), rtol=1e-4)
    with pytest.raises(ValueError, match="switch must be >= 0 steps, got -1"):
        modular_prompts.two_stage(-1)


def test_many_tasks_at_two_speeds():
    found = moved(modular_prompts.pretraining(router_lr=5e-4, prompt_lr=1e-4, weight_decay=0.0), 1)
    np.testing.assert_allclose(found[0], [5e-4, 1e-4, 1e-4], rtol=1e-4)
    assert modular_prompts.labels(PARAMS) == {
        "overlay": {"layers": {"resid": {"router": "router", "modules": "prompt"}}},
        "base": {"head": {"out": {"kernel": "prompt"}}},
    }


def test_orders_of_tasks():
    rounds = np.array(list(itertools.islice(modular_prompts.task_order(5, seed=3), 50)))
    np.testing.assert_array_equal(np.sort(rounds.reshape(10, 5)), [range(5)] * 10)
    assert len({tuple(r) for r in rounds.reshape(10, 5)}) > 1
    again = list(itertools.islice(modular_prompts.task_order(5, seed=3), 50))
    assert again == rounds.tolist()
    drawn = list(itertools.islice(modular_prompts.task_order(4, how="uniform"), 4000))
    assert (np.abs(np.bincount(drawn) - 1000) < 100).all()
    for call, said in (
        (lambda: modular_prompts.task_order(0), "tasks must be >= 1, got 0"),
        (lambda: modular_prompts.task_order(2, how="random"), "round-robin or uniform"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_scores_of_options():
    """Where both logits are negative their product prefers the worse option."""
    logits = np.zeros((2, 6, 2), np.float32)
    logits[0, 1, 0], logits[0, 2, 1] = -3, -2  # option 0, of two tokens
    logits[0, 3, 0], logits[0, 3, 1] = 1, 2
    logits[1, 4, 0], logits[1, 5, 1] = 2, -1
    options = np.array([[[1, 2], [3, 3], [-1, -1]], [[4, 5], [0, 0], [2, 2]]])
    got = modular_prompts.option_scores(logits, options)
    np.testing.assert_array_equal(got, [[-5, 3, -np.inf], [1, 0, 0]])
    product = modular_prompts.option_scores(logits, options, how="product")
    np.testing.assert_array_equal(product[0], [6, 2, -np.inf])
    with pytest.raises(ValueError, match="how must be sum or product"):
        modular_prompts.option_scores(logits, options, how="max")
    with pytest.raises(ValueError, match=r"are not \[B, T, 2\] and \[B, C, 2\]"):
        modular_prompts.option_scores(logits[..., 0], options)


def test_classes_as_words():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 5, 11)).astype(np.float32)
    model = SimpleNamespace(apply=lambda *_, **__: ModelOut(jnp.asarray(logits), None))
    ids = np.full((4, 5), 3)
    ids[0, 2] = ids[1, 4] = ids[1, 1] = ids[2, 0] = 9  # row 1 has two masks, row 3 none
    batch = {"input_ids": ids, "labels": np.array([1, 0, -1, 1])}
    words = (7, 5)
    at = logits[[0, 1], [2, 1]].astype(np.float64)
    whole = np.log(np.exp(at).sum(-1)) - at[[0, 1], [5, 7]]
    two = at[:, [7, 5]]
    among = np.log(np.exp(two).sum(-1)) - two[[0, 1], [1, 0]]
    right = (two.argmax(-1) == [1, 0]).sum()
    for full, wanted in ((True, whole), (False, among)):
        out = objectives.verbalizer_ce(model, words, 9, full=full)({}, batch, None)
        np.testing.assert_allclose(out.total, wanted.sum(), rtol=1e-5)
        assert out.weight == 2
        assert out.aux["accuracy"] == (right, 2)
    large = {**batch, "labels": np.array([2, 0, -1, 1])}
    for full in (True, False):
        assert np.isnan(objectives.verbalizer_ce(model, words, 9, full=full)({}, large, None).total)
    with pytest.raises(ValueError, match="at least two tokens, each once"):
        objectives.verbalizer_ce(model, (7, 7), 9)
    with pytest.raises(ValueError, match="use an mlm head"):
        objectives.verbalizer_ce(model, words, 9)({}, {**batch, "input_ids": ids[:, :4]}, None)
