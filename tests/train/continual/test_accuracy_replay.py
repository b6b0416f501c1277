"""The matrix of a stream, the memory of replay, the head that several tasks share: in numpy."""

import numpy as np
import pytest

from steppe.data.dataset import Dataset, Ragged
from steppe.train import continual
from steppe.train.continual import classes, replay

# a[t, i], accuracy on task i after task t
MATRIX = [[0.9, 0.5, 0.4], [0.7, 0.8, 0.5], [0.6, 0.75, 0.85]]


def test_golden_order_1():
    """O-LoRA's released log of order 1: 97.7, 56.1, 71.0, 88.6 average to 78.4 (o_lora.md)."""
    rows = [[0.0] * 4] * 3 + [[97.7, 56.1, 71.0, 88.6]]
    assert round(continual.average_accuracy(continual.continual_matrix(rows)) + 1e-9, 1) == 78.4


def test_definitions_by_hand():
    matrix = continual.continual_matrix(MATRIX)
    assert continual.average_accuracy(matrix) == pytest.approx((0.6 + 0.75 + 0.85) / 3)
    assert continual.learning_accuracy(matrix) == pytest.approx((0.9 + 0.8 + 0.85) / 3)
    assert continual.backward_transfer(matrix) == pytest.approx((-0.3 - 0.05) / 2)
    assert continual.forgetting(matrix) == pytest.approx((0.3 + 0.05) / 2)
    # A task that was best before its own training is forgotten from there.
    other = continual.continual_matrix([[0.9, 0.95, 0.4], *MATRIX[1:]])
    assert continual.forgetting(other) == pytest.approx((0.3 + 0.2) / 2)
    assert continual.backward_transfer(other) == pytest.approx((-0.3 - 0.05) / 2)
    one = continual.continual_matrix([[0.5]])
    assert continual.average_accuracy(one) == 0.5
    assert np.isnan(continual.backward_transfer(one))
    assert np.isnan(continual.forgetting(one))


def test_matrix_errors():
    with pytest.raises(ValueError, match="at least one task, got none"):
        continual.continual_matrix([])
    with pytest.raises(ValueError, match="row 1 has accuracies of 1 tasks, but 2 were trained on"):
        continual.continual_matrix([[1.0, 2.0], [1.0]])
    with pytest.raises(ValueError, match=r"must be \[T, T\], got shape \(2, 3\)"):
        continual.forgetting(np.ones((2, 3)))


def examples(name, count, first):
    rows = [[first + n] * (n % 3 + 1) for n in range(count)]
    return Dataset(
        kind="classification",
        input_ids=Ragged.pack(rows, np.int32),
        labels=np.arange(count, dtype=np.int32) % 2,
        ids=[f"{name}{n}" for n in range(count)],
        records=[{"id": f"{name}{n}", "text": name} for n in range(count)],
        record_index=np.arange(count),
        pad_id=0,
    )


def test_a_memory_is_a_function_of_ids_and_seed():
    data = examples("a", 20, 100)
    memory = replay.remember(data, 5, seed=1)
    assert len(memory) == 5
    assert memory.ids == replay.remember(data, 5, seed=1).ids
    assert memory.ids != replay.remember(data, 5, seed=2).ids
    larger = replay.remember(data, 8, seed=1)
    assert set(memory.ids) < set(larger.ids)  # what is remembered first stays remembered
    assert replay.remember(data, 99).ids == data.ids
    for row, name in enumerate(memory.ids):
        number = int(name[1:])
        np.testing.assert_array_equal(memory.input_ids[row], data.input_ids[number])
        assert memory.labels[row] == number % 2
        assert memory.record(row)["id"] == name


def test_joined_data_keeps_every_example():
    a, b = examples("a", 4, 100), examples("b", 3, 200)
    both = replay.joined([a, replay.taken(b, [2, 0])])
    assert both.ids == ["a0", "a1", "a2", "a3", "b2", "b0"]
    assert [both.record(row)["id"] for row in range(6)] == both.ids
    np.testing.assert_array_equal(both.input_ids[4], [202] * 3)
    np.testing.assert_array_equal(both.input_ids[5], [200])
    np.testing.assert_array_equal(both.labels, [0, 1, 0, 1, 0, 0])


def test_replay_errors():
    with pytest.raises(ValueError, match="count must be >= 1, got 0"):
        replay.remember(examples("a", 2, 1), 0)
    with pytest.raises(ValueError, match="parts must hold at least one"):
        replay.joined([])
    import dataclasses

    odd = dataclasses.replace(examples("a", 2, 1), pad_id=7)
    with pytest.raises(ValueError, match="different tokenizers"):
        replay.joined([examples("a", 2, 1), odd])
    with pytest.raises(ValueError, match="one label each, got examples of kind 'lm'"):
        replay.taken(dataclasses.replace(odd, kind="lm"), [0])


def test_a_task_sees_its_own_classes():
    from steppe.models.model import Model, ModelOut

    def apply(params, batch, **options):
        return ModelOut(params["z"], params["z"])

    model = classes.grouped(Model(None, None, apply, ()), (0, 0, 1))
    z = {"z": np.array([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0]], np.float32)}
    got = np.asarray(model.apply(z, {"task": np.array([0, 1])}).logits)
    np.testing.assert_array_equal(got, [[1.0, 2.0, -1e9], [-1e9, -1e9, 5.0]])
    np.testing.assert_array_equal(model.apply(z, {}).logits, z["z"])
    with pytest.raises(ValueError, match=r"names the task of 2 classes, .* shape \(2, 3\)"):
        classes.grouped(Model(None, None, apply, ()), (0, 1)).apply(z, {"task": np.zeros(2)})
