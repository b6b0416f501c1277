"""Buckets, padding and the arrays of a batch, for every kind of task."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from steppe.data import collate, tasks
from steppe.data.errors import DataError
from steppe.data.spans import SpanQA
from steppe.data.tokens import TokenClassification


def padded_tokens(lengths, buckets):
    return sum(min(b for b in buckets if b >= length) for length in lengths)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 4))
def test_chosen_buckets_are_the_best(lengths, count, multiple):
    chosen = collate.choose_buckets(np.asarray(lengths), count, multiple)
    assert 1 <= len(chosen) <= count
    assert list(chosen) == sorted(set(chosen))
    assert all(bucket % multiple == 0 for bucket in chosen)
    assert chosen[-1] >= max(lengths)
    top = -(-max(lengths) // multiple) * multiple
    lower = range(multiple, top, multiple)
    best = min(
        padded_tokens(lengths, (*some, top))
        for size in range(count)
        for some in itertools.combinations(lower, size)
    )
    assert padded_tokens(lengths, chosen) == best


def test_bucket_errors(tokenizer, reviews):
    data = tasks.Regression().encode(reviews, tokenizer, 32)
    longest = int(data.lengths.argmax())
    with pytest.raises(
        DataError, match=rf"example {longest} \(id 'r{longest}'\) has 22 tokens, the"
    ):
        collate.resolve_buckets(data, (8, 16))
    for wrong in ([], [0, 8], [16, 8], [8, 8]):
        with pytest.raises(DataError, match="buckets must be increasing lengths >= 1"):
            collate.resolve_buckets(data, wrong)
    assert collate.resolve_buckets(data, (8, 32)) == (8, 32)
    assert collate.resolve_buckets(data, 2)[-1] == 24
    assert len(collate.resolve_buckets(data, None)) <= 4
    with pytest.raises(DataError, match="count and multiple must be >= 1, got 0 and 8"):
        collate.resolve_buckets(data, 0)
    with pytest.raises(DataError, match="without examples"):
        collate.choose_buckets([])


def test_classification_batch_with_a_padding_row(tokenizer, reviews):
    data = tasks.Classification(("bad", "good")).encode(reviews, tokenizer, 32)
    batch = collate.collate(data, np.asarray([2, 0, -1]), 24)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "input_ids": ((3, 24), np.int32),
        "attention_mask": ((3, 24), np.int32),
        "token_type_ids": ((3, 24), np.int32),
        "labels": ((3,), np.int32),
        "label_mask": ((3,), np.float32),
        "example_index": ((3,), np.int32),
    }
    assert batch["input_ids"][0, :17].tolist() == data.input_ids[2].tolist()
    assert batch["input_ids"][0, 17:].tolist() == [0] * 7
    assert batch["attention_mask"].sum(axis=1).tolist() == [17, 3, 1]
    assert batch["labels"].tolist() == [1, 0, 0]
    assert batch["label_mask"].tolist() == [1, 1, 0]
    assert batch["example_index"].tolist() == [2, 0, -1]


def test_regression_batch(tokenizer, reviews):
    data = tasks.Regression().encode(reviews, tokenizer, 32)
    batch = collate.collate(data, np.asarray([7, -1]), 24)
    assert batch["labels"].dtype == np.float32
    np.testing.assert_allclose(batch["labels"], [0.7, 0])


def test_token_batch(tokenizer):
    made = [{"id": "1", "words": ["the", "cats"], "tags": ["a", "b"]}]
    data = TokenClassification(("a", "b")).encode(made, tokenizer, 16)
    batch = collate.collate(data, np.asarray([0, -1]), 8)
    assert batch["labels"].tolist() == [[0, 0, 1, 0, 0, 0, 0, 0], [0] * 8]
    assert batch["label_mask"].tolist() == [[0, 1, 1, 0, 0, 0, 0, 0], [0] * 8]
    assert batch["label_mask"].dtype == np.float32


def test_span_batch(tokenizer):
    answers = [{"text": "cat", "answer_start": 4}]
    made = [{"id": "1", "question": "who", "context": "the cat", "answers": answers}]
    data = SpanQA(stride=1).encode(made, tokenizer, 16)
    batch = collate.collate(data, np.asarray([0, -1]), 8)
    assert batch["labels"].tolist() == [[4, 4], [0, 0]]
    assert batch["labels"].dtype == np.int32
    assert batch["label_mask"].tolist() == [1, 0]


def test_mlm_batch(tokenizer, reviews):
    data = tasks.MaskedLM().encode(reviews, tokenizer, 32)
    batch = collate.collate(data, np.asarray([4, -1]), 24, seed=1, epoch=2)
    corrupted, labels, mask = data.masking(data.input_ids[4], seed=1, epoch=2, index=4)
    length = int(data.lengths[4])
    assert np.array_equal(batch["input_ids"][0, :length], corrupted)
    assert np.array_equal(batch["labels"][0, :length], labels)
    assert np.array_equal(batch["label_mask"][0, :length], mask)
    assert batch["label_mask"][1].sum() == 0
    assert batch["labels"].shape == (2, 24)
