"""Tasks turn columns into labels, and name the row of whatever is wrong."""

import dataclasses

import numpy as np
import pytest

from steppe.data import tasks
from steppe.data.errors import DataError


def rows(*values, column="label"):
    return [{"id": f"k{i}", "text": "the cat", column: value} for i, value in enumerate(values)]


def test_classification(tokenizer, reviews):
    task = tasks.Classification.from_records(reviews)
    assert (task.kind, task.num_labels, task.label_names) == ("classification", 2, ("bad", "good"))
    data = task.encode(reviews, tokenizer, 32)
    assert len(data) == 40
    assert data.labels.dtype == np.int32
    assert data.labels.tolist() == [int(r["label"] == "good") for r in reviews]
    assert data.lengths.tolist() == [len(r["text"].split()) + 2 for r in reviews]
    assert data.ids[3] == "r3"
    assert data.record(3) is reviews[3]
    assert data.cut == 0
    assert task.encode(reviews, tokenizer, 8).cut == sum(length > 8 for length in data.lengths)
    example = data[0]
    assert example["input_ids"].tolist() == [2, 5, 3]
    assert example["labels"] == 0
    with pytest.raises(IndexError):
        data[40]


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([0, 2, 1], ("0", "1", "2")),
        ([True, False], ("0", "1")),
        (["1", "0"], ("0", "1")),
        (["b", "a"], ("a", "b")),
        (["b", "1"], ("1", "b")),
        ([np.int64(1), 0], ("0", "1")),
        ([5, 1, 3], ("1", "3", "5")),  # those that occur, not 0 to 5
        (["10", "9.0", " 9"], ("9", "10")),
        ([1, 3_000_000], ("1", "3000000")),
    ],
)
def test_classes_are_gathered(tokenizer, values, names):
    task = tasks.Classification.from_records(rows(*values))
    assert task.label_names == names
    assert len(task.encode(rows(*values), tokenizer, 8)) == len(values)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (2, r"row 1 \(id 'k1'\): label 2 is out of range for 2 classes \(0 to 1: bad, good\)"),
        (-1, "label -1 is out of range"),
        ("-1", "label -1 is out of range"),
        ("Good", r"row 1 \(id 'k1'\): label 'Good' is not among the classes bad, good; fix"),
        (0.5, "label 0.5 is neither a class name nor an integer"),
        (None, r"row 1 \(id 'k1'\): column 'label' is empty"),
    ],
)
def test_bad_labels_name_the_row(tokenizer, value, message):
    with pytest.raises(DataError, match=message) as caught:
        tasks.Classification(("bad", "good")).encode(rows("good", value), tokenizer, 8)
    assert "\n" not in str(caught.value)


def test_bad_classes(tokenizer):
    with pytest.raises(DataError, match="at least two distinct names, got good"):
        tasks.Classification.from_records(rows("good", "good"))
    with pytest.raises(DataError, match="at least two distinct"):
        tasks.PairClassification(("a", "a"))
    with pytest.raises(DataError, match="mixes class names with 1"):
        tasks.Classification.from_records(rows("good", 1))
    with pytest.raises(DataError, match=r"row 1 \(id 'k1'\): label \[1\] is neither"):
        tasks.Classification.from_records(rows("good", [1]))


def test_missing_and_wrong_columns_name_the_row(tokenizer):
    with pytest.raises(DataError, match=r"row 0 \(id 'k0'\) has no column 'sentence', only id, t"):
        tasks.Classification(("a", "b"), text="sentence").encode(rows("a"), tokenizer, 8)
    with pytest.raises(DataError, match="text=") as caught:
        tasks.Classification(("a", "b"), text="sentence").encode(rows("a"), tokenizer, 8)
    assert "name the right one with text=..." in str(caught.value)
    made = rows("a", "b")
    made[1]["text"] = 7
    with pytest.raises(DataError, match=r"row 1 \(id 'k1'\): column 'text' must be text, got 7"):
        tasks.Classification(("a", "b")).encode(made, tokenizer, 8)
    with pytest.raises(DataError, match="the data set is empty"):
        tasks.Classification(("a", "b")).encode([], tokenizer, 8)
    with pytest.raises(DataError, match="positions"):
        tasks.Classification(("a", "b")).encode(rows("a"), tokenizer, 64)


def test_pairs(tokenizer):
    made = [
        {"id": "1", "first": "the cat", "second": "a dog", "label": "no"},
        {"id": "2", "first": "the cat", "second": "the cat", "label": "yes"},
    ]
    task = tasks.PairClassification.from_records(made)
    data = task.encode(made, tokenizer, 16)
    assert task.kind == "classification"
    assert data[0]["input_ids"].tolist() == [2, 5, 6, 3, 23, 7, 3]
    assert data[0]["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert data.labels.tolist() == [0, 1]


def test_regression(tokenizer, reviews):
    task = tasks.Regression()
    data = task.encode(reviews, tokenizer, 32)
    assert (task.kind, task.num_labels, task.label_names) == ("regression", 1, ())
    assert data.labels.dtype == np.float32
    np.testing.assert_allclose(data.labels, [r["score"] for r in reviews], rtol=1e-6)
    assert tasks.Regression().encode(rows("0.25", column="score"), tokenizer, 8).labels[0] == 0.25
    both = [{"id": "1", "text": "a", "other": "b", "score": 1}]
    pair = tasks.Regression(second="other").encode(both, tokenizer, 8)
    assert pair[0]["token_type_ids"].sum() == 2
    for wrong in ("high", float("nan"), float("inf"), [1]):
        with pytest.raises(DataError, match=r"row 0 \(id 'k0'\): column 'score' must be a finite"):
            task.encode(rows(wrong, column="score"), tokenizer, 8)


def test_models_without_token_types_get_none(tokenizer, reviews):
    import copy

    plain = copy.copy(tokenizer)
    plain.has_token_types = False
    assert tasks.Regression().encode(reviews, plain, 32).token_type_ids is None


@pytest.mark.parametrize("task", [tasks.Classification(("a", "b")), tasks.Regression()])
def test_tasks_are_frozen_values(task):
    assert task == dataclasses.replace(task)
    assert hash(task) == hash(dataclasses.replace(task))
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.text = "x"


def test_a_label_means_the_same_however_it_is_written():
    from steppe.data.columns import class_index

    for names in (("1", "2", "3"), ("1.0", "2.0", "3.0")):
        for value in (2, 2.0, "2", "2.0", " 2 ", np.int64(2)):
            assert class_index(value, names, 0, {}) == 1
    assert class_index(1, ("bad", "good"), 0, {}) == 1  # a position, among named classes only
    with pytest.raises(DataError, match="label 0 is not among the classes 1, 2, 3"):
        class_index(0, ("1", "2", "3"), 0, {})
    with pytest.raises(DataError, match="row 7: column 'label' is empty"):
        class_index("  ", ("a", "b"), 7, {})
