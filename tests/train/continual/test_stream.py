"""Streams over the house's step: one program for all tasks, what is frozen stays, any task's end
is a place to go on from."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.models import tree
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.overlays import lora, o_lora
from steppe.train import continual, objectives, step
from steppe.train.continual import classes, stream
from steppe.train.continual.o_lora import olora_loss

CONFIG = EncoderConfig(
    "bert",
    vocab_size=20,
    width=16,
    layers=2,
    heads=2,
    ffn_width=16,
    positions=8,
    drop=0.1,
    attn_drop=0.0,
    unroll=1,
    head=HeadConfig("classification", 6, None, 0.0),
)
TASKS, STEPS = 3, 3
GROUPS = (0, 0, 1, 1, 2, 2)


class Toy:
    """Endless batches of a task: the class is whether one token of its own occurs."""

    shapes = frozenset({(8, 4)})

    def __init__(self, task):
        self.task, self.number = task, 0

    def __next__(self):
        rng = np.random.default_rng((self.task, self.number))
        self.number += 1
        ids = rng.integers(1, 10, (8, 4)).astype(np.int32)
        right = rng.integers(0, 2, 8)
        ids[:, 2] = 12 + 2 * self.task + right
        labels = (2 * self.task + right).astype(np.int32)
        return {"input_ids": ids, "labels": labels, "label_mask": np.ones(8, np.float32)}

    def get_state(self):
        return {"batch": self.number}

    def set_state(self, state):
        self.number = state["batch"]


def stages():
    return [stream.Stage(f"toy {n}", classes.Tagged(Toy(n), GROUPS), STEPS) for n in range(TASKS)]


@pytest.fixture(scope="module")
def base():
    model = CONFIG.build()
    return model, jax.jit(model.init)(jax.random.key(0))


def scorer(model):
    data = [next(classes.Tagged(Toy(n), GROUPS)) for n in range(TASKS)]

    @jax.jit
    def right(params, batch):
        return (model.apply(params, batch).logits.argmax(-1) == batch["labels"]).mean()

    return lambda params: [right(params, batch) for batch in data]


@pytest.fixture(scope="module")
def olora(base):
    """(train step, everything that ``run`` needs, what a whole stream has yielded)."""
    overlay = o_lora.overlay(tasks=TASKS, rank=2, sites=("attn.q", "attn.v"))
    bound = classes.grouped(overlay.bind(base[0], frozen=base[1]), GROUPS)
    tx = optax.adamw(3e-2, weight_decay=0.0)
    objective = olora_loss(objectives.classification_ce(bound), lambda1=0.5, lambda2=0.1)
    train = step.make(objective, tx)
    params = tree.merge(jax.jit(bound.init)(jax.random.key(1)), bound.given)
    more = {
        "key": jax.random.key(2),
        "score": scorer(bound),
        "between": stream.committed(jax.random.key(3)),
    }

    def go(params, **changes):
        return list(stream.run(train, bound, tx, params, stages(), **more, **changes))

    whole = go(params)
    return train, bound, go, whole


def test_one_program_serves_all_tasks(olora):
    train, _, _, whole = olora
    assert [learnt.number for learnt in whole] == [0, 1, 2]
    assert train.compiles == 1
    assert [int(learnt.state.step) for learnt in whole] == [3, 6, 9]
    assert all(len(learnt.scores) == TASKS for learnt in whole)
    matrix = continual.continual_matrix([learnt.scores for learnt in whole])
    assert continual.average_accuracy(matrix) == pytest.approx(np.mean(whole[-1].scores))


def test_earlier_pairs_are_frozen(olora):
    _, _, _, (first, second, third) = olora
    for name in ("attn.q", "attn.v"):
        for leaf, axis in (("a", -1), ("b", -2)):
            bank = np.asarray(third.state.frozen["overlay"]["bank"]["layers"][name][leaf])
            parts = np.split(bank, TASKS, axis)
            for part, learnt in zip(parts, (first, second)):
                own = learnt.state.params["overlay"]["layers"][name][leaf]
                np.testing.assert_array_equal(part, own)
            assert np.abs(np.asarray(second.state.params["overlay"]["layers"][name]["b"])).max() > 0
    assert third.state.frozen["overlay"]["bank"]["active"].tolist() == [1, 1, 0]
    for path, leaf in tree.flatten(third.state.frozen["base"]).items():
        np.testing.assert_array_equal(leaf, tree.get(first.state.frozen["base"], path))


def test_a_task_moves_its_own_columns_of_the_head_only(olora):
    _, _, _, whole = olora
    heads = [np.asarray(learnt.state.params["base"]["head"]["out"]["kernel"]) for learnt in whole]
    for number in (1, 2):
        moved = np.abs(heads[number] - heads[number - 1]).max(0) > 0
        assert moved.tolist() == [group == number for group in GROUPS]


def test_it_goes_on_from_a_tasks_end(olora):
    """What ``kept`` keeps of the first task gives the second and third again, bit for bit."""
    train, bound, go, whole = olora
    saved = stream.kept(whole[0].state.full(), bound)
    assert set(saved) == {"overlay", "base"}
    assert set(saved["base"]) == {"head"}
    params = tree.replace(
        tree.merge(jax.jit(bound.init)(jax.random.key(7)), bound.given), tree.flatten(saved)
    )
    again = go(params, start=1)
    assert [learnt.number for learnt in again] == [1, 2]
    assert [learnt.scores for learnt in again] == [learnt.scores for learnt in whole[1:]]
    for a, b in zip(
        jax.tree.leaves(again[-1].state.full()), jax.tree.leaves(whole[-1].state.full())
    ):
        np.testing.assert_array_equal(a, b)
    assert train.compiles == 1
    assert go(params, start=TASKS) == []


def test_the_loss_is_the_sum_of_its_parts(olora, base):
    _, bound, _, whole = olora
    params = whole[1].state.full()
    batch = next(classes.Tagged(Toy(1), GROUPS))
    ce = objectives.classification_ce(bound)

    @jax.jit
    def both(params):
        return olora_loss(ce, lambda1=2.0, lambda2=0.5, p=2)(params, batch, None), ce(
            params, batch, None
        )

    out, alone = both(params)
    delta = params["overlay"]
    np.testing.assert_allclose(out.total["task"], alone.total, rtol=1e-6)
    np.testing.assert_allclose(
        out.total["orthogonality"], 2.0 * o_lora.penalty(delta, 2), rtol=1e-5
    )
    np.testing.assert_allclose(out.total["l2"], 0.5 * o_lora.l2_penalty(delta), rtol=1e-5)
    assert out.weight["orthogonality"] == out.weight["l2"] == 1.0
    assert set(olora_loss(ce, lambda1=0.0)(params, batch, None).total) == {"task"}


def test_a_large_lambda_makes_the_subspaces_orthogonal():
    """Linear: a target that lies in the first task's direction pulls A there; lambda_1 = 0 lets
    it, a large one does not (o_lora.md, 4)."""
    rng = np.random.default_rng(0)
    first = np.linalg.qr(rng.normal(size=(8, 2)))[0].astype(np.float32)
    x = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    target = x @ jnp.asarray(first @ rng.normal(size=(2, 3)) + 0.3 * rng.normal(size=(8, 3)))
    bank = {"layers": {"x": {"a": first[None], "b": jnp.zeros((1, 2, 3))}}, "active": jnp.ones(1)}
    a = jnp.asarray(rng.normal(size=(1, 8, 2)) / 3, jnp.float32)
    tx = optax.adam(0.01)

    @jax.jit
    def learn(lambda1):
        def loss(own):
            error = x @ own["a"][0] @ own["b"][0] - target
            delta = {"layers": {"x": own}, "bank": bank}
            return jnp.square(error).mean() + lambda1 * o_lora.penalty(delta)

        def one(carry, _):
            own, state = carry
            updates, state = tx.update(jax.grad(loss)(own), state)
            return (optax.apply_updates(own, updates), state), None

        own = {"a": a, "b": jnp.zeros((1, 2, 3))}
        (own, _), _ = jax.lax.scan(one, (own, tx.init(own)), length=600)
        return o_lora.largest_cosine({"layers": {"x": own}, "bank": bank})

    assert learn(0.0) > 0.5
    assert learn(20.0) < 0.05


def test_sequential_lora_is_one_long_training(base):
    """Without a bank: the same parameters go on, the optimiser begins anew."""
    overlay = lora.overlay(rank=2)
    bound = classes.grouped(overlay.bind(base[0], frozen=base[1]), GROUPS)
    tx = optax.adamw(1e-2, weight_decay=0.0)
    train = step.make(objectives.classification_ce(bound), tx)
    params = tree.merge(jax.jit(bound.init)(jax.random.key(1)), bound.given)
    seen = []
    learnt = list(
        stream.run(
            train,
            bound,
            tx,
            params,
            stages()[:2],
            key=jax.random.key(2),
            score=lambda full: [0.0, 0.0],
            between=lambda params, number: seen.append((number, params)) or params,
        )
    )
    assert train.compiles == 1
    (number, given), count = seen[0], learnt[1].state.opt_state
    assert number == 1
    np.testing.assert_array_equal(
        given["overlay"]["layers"]["attn.q"]["a"],
        learnt[0].state.params["overlay"]["layers"]["attn.q"]["a"],
    )
    counts = [x for x in jax.tree.leaves(count) if x.dtype == jnp.int32 and not x.ndim]
    assert {int(c) for c in counts} == {STEPS}


def test_errors(olora):
    _, _, go, whole = olora
    with pytest.raises(ValueError, match="start must be between 0 and the 3 tasks, got 4"):
        go(whole[0].state.full(), start=4)
    with pytest.raises(ValueError, match="at least one task, got none"):
        next(stream.run(None, None, None, {}, [], key=None, score=None))
    with pytest.raises(ValueError, match="'x' must have steps >= 1, got 0"):
        next(stream.run(None, None, None, {}, [stream.Stage("x", None, 0)], key=None, score=None))
    with pytest.raises(ValueError, match="lambda1 must be >= 0 and finite, got -1"):
        olora_loss(lambda *a: None, lambda1=-1.0)
    with pytest.raises(ValueError, match="p must be 1"):
        olora_loss(lambda *a: None, p=3)
    full = whole[-1].state.full()
    full = stream.committed(jax.random.key(0))(full, 3)
    with pytest.raises(ValueError, match="holds 3 tasks and all of its slots are taken"):
        stream.committed(jax.random.key(0))(full, 4)
