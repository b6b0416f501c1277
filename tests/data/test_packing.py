"""Packing: every token once, boundaries kept, few rows, the same each time."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from steppe.data import packing
from steppe.data.errors import DataError
from steppe.data.packing import long_sft_mask, pack, pack_documents, rows_of

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)


def documents(lengths):
    """Tokens that tell their document and place."""
    return [np.arange(n, dtype=np.int32) + 1000 * (i + 1) for i, n in enumerate(lengths)]


def loads(packed):
    sizes = packed.stop - packed.start
    return np.add.reduceat(sizes, packed.row_starts[:-1])


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(2, 20), st.sampled_from(["best_fit", "concat"]))
def test_every_token_is_in_one_row_and_documents_that_fit_stay_whole(lengths, row_length, method):
    packed = pack(lengths, row_length, method=method)
    assert (loads(packed) <= row_length).all()
    assert (np.diff(packed.row_starts) > 0).all()
    found = np.zeros((len(lengths), max(lengths)), int)
    for document, start, stop in zip(packed.document, packed.start, packed.stop):
        found[document, start:stop] += 1
    for document, length in enumerate(lengths):
        # A last piece of one token would predict nothing.
        odd = method == "best_fit" and length > row_length and length % row_length == 1
        assert found[document, : length - odd].tolist() == [1] * (length - odd)
        assert found[document, length - odd :].sum() == 0
    assert packed.lost == sum(lengths) - found.sum()
    assert packed.tokens == found.sum()
    if method == "best_fit":
        assert packed.cut == sum(n > row_length for n in lengths)
        # Of any two rows the pieces would not fit in one: at most twice the rows needed.
        load = np.sort(loads(packed))
        assert len(load) == 1 or load[0] + load[1] > row_length
        assert all(
            packed.documents_of(r).tolist() == sorted(packed.documents_of(r))
            for r in range(packed.rows)
        )
    else:
        assert packed.rows == -(-sum(lengths) // row_length)
        assert (loads(packed)[:-1] == row_length).all()
        pieces = np.bincount(packed.document, minlength=len(lengths))
        assert packed.cut == (pieces > 1).sum()


def test_best_fit_prefers_the_fullest_row():
    packed = pack([5, 6, 3, 4, 2], 9)
    rows = [packed.documents_of(row).tolist() for row in range(packed.rows)]
    assert rows == [[0, 3], [1, 2], [4]]
    assert str(packed) == "5 documents in 3 rows of 9 tokens, 25.9% padding"


def test_packing_is_dense_and_depends_on_the_lengths_only():
    lengths = np.random.default_rng(0).lognormal(4, 1, 3000).astype(int).clip(1, 500)
    first, again = pack(lengths, 512), pack(lengths.tolist(), 512)
    assert first.padding < 0.005
    assert np.array_equal(first.document, again.document)
    assert np.array_equal(first.row_starts, again.row_starts)
    unpacked = 1 - lengths.sum() / (len(lengths) * 512)
    assert unpacked > 0.8


@pytest.mark.parametrize(
    ("overlap", "places"),
    [
        (0, [(0, 8, 0), (8, 16, 8), (16, 20, 16)]),
        (1, [(0, 8, 0), (7, 15, 8), (14, 20, 15)]),
        (
            6,
            [
                (0, 8, 0),
                (2, 10, 8),
                (4, 12, 10),
                (6, 14, 12),
                (8, 16, 14),
                (10, 18, 16),
                (12, 20, 18),
            ],
        ),
    ],
)
def test_long_documents_are_read_in_windows(overlap, places):
    packed = pack([20], 8, overlap=overlap)
    assert list(zip(packed.start, packed.stop, packed.fresh)) == places
    rows = rows_of(documents([20]), packed)
    targets = rows.input_ids.flat[rows.label_mask.flat > 0] - 1000
    missed = set(range(1, 20)) - set(targets.tolist())
    assert len(targets) == len(set(targets.tolist()))  # none counts twice
    assert missed == (set() if overlap else {8, 16})


def test_overflow_and_its_counts():
    cut = pack([3, 20, 5, 17], 8, overflow="cut")
    assert (cut.cut, cut.dropped, cut.lost, cut.tokens) == (2, 0, 21, 24)
    dropped = pack([3, 20, 5, 17], 8, overflow="drop")
    assert (dropped.cut, dropped.dropped, dropped.rows) == (0, 2, 1)
    assert "2 left out" in str(dropped)
    split = pack([3, 20, 5, 17], 8)
    assert (split.cut, split.lost) == (2, 1)
    assert str(split).endswith("; 2 documents cut (7 pieces in all); 1 tokens in no row")


def test_alone_shares_with_no_other():
    packed = pack([2, 2, 2, 20], 8, alone=[False, True, False, True])
    rows = [packed.documents_of(row).tolist() for row in range(packed.rows)]
    assert sorted(rows) == [[0, 2], [1], [3], [3], [3]]


def test_packed_batch_by_hand():
    batch = pack_documents(
        [[7, 8, 2], [9, 2], [5, 6, 4, 3, 2]],
        6,
        pad_id=1,
        masks=[[1, 1, 1], [1, 1], [0, 0, 0, 1, 1]],
    )
    assert {name: array.tolist() for name, array in batch.items()} == {
        "input_ids": [[7, 8, 2, 9, 2, 1], [5, 6, 4, 3, 2, 1]],
        "attention_mask": [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]],
        "segment_ids": [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 0]],
        "position_ids": [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 0]],
        "labels": [[7, 8, 2, 9, 2, 0], [5, 6, 4, 3, 2, 0]],
        "label_mask": [[0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 1, 0]],
    }
    assert batch["label_mask"].dtype == np.float32
    assert {a.dtype for n, a in batch.items() if n != "label_mask"} == {np.dtype(np.int32)}


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(2, 20), st.sampled_from(["best_fit", "concat"]))
def test_segments_hold_one_document_and_positions_restart(lengths, row_length, method):
    batch = pack_documents(documents(lengths), row_length, method=method)
    ids, segments, places = batch["input_ids"], batch["segment_ids"], batch["position_ids"]
    for row in range(len(ids)):
        top = segments[row].max()
        assert sorted(set(segments[row].tolist()) - {0}) == list(range(1, top + 1))
        for number in range(1, top + 1):
            inside = segments[row] == number
            assert len(set((ids[row][inside] // 1000).tolist())) == 1
            assert np.array_equal(np.diff(ids[row][inside]), np.ones(inside.sum() - 1))
            assert places[row][inside].tolist() == list(range(inside.sum()))
            assert batch["label_mask"][row][inside].tolist() == [0] + [1] * (inside.sum() - 1)
    assert (batch["label_mask"][segments == 0] == 0).all()
    assert (places[segments == 0] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": []}, "cannot pack without documents"),
        ({"lengths": [3, 0]}, "document 1 is empty; drop it"),
        ({"row_length": 1}, "row_length must be >= 2 tokens, got 1"),
        ({"method": "first"}, "method must be 'best_fit' or 'concat', got 'first'"),
        ({"overflow": "wrap"}, "overflow must be 'split', 'cut' or 'drop', got 'wrap'"),
        ({"overlap": 8}, "overlap must be less than the 8 tokens of a row, got 8"),
        ({"overlap": -1}, "overlap must be >= 0 tokens, got -1"),
        ({"method": "concat", "overflow": "cut"}, "it takes no overflow, overlap, rows"),
        ({"method": "concat", "overlap": 1}, "it takes no overflow, overlap, rows"),
        ({"lengths": [9, 10], "overflow": "drop"}, "all 2 documents are longer than the row of 8"),
    ],
)
def test_errors(change, message):
    arguments = {"lengths": [3, 4], "row_length": 8, **change}
    with pytest.raises(DataError, match=message):
        pack(**arguments)


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="masks must be as many and as long"):
        pack_documents([[1, 2], [3]], 4, masks=[[1, 1], [1, 0]])


def test_long_samples_learn_the_prompt_too():
    prompt = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])
    answer = np.array([[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0]])
    padding = np.array([[0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1]])  # also over an answer: never
    mask = long_sft_mask(np.array([1, 0]), prompt, answer, padding)
    assert mask.dtype == np.float32
    assert mask.tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0]]
    assert long_sft_mask([True, False], prompt.tolist(), answer, padding).tolist() == mask.tolist()
    with pytest.raises(DataError, match=r"is_long \(3,\) \[B\]"):
        long_sft_mask(np.zeros(3), prompt, answer, padding)


def test_the_mask_also_works_on_device_arrays():
    import jax
    import jax.numpy as jnp

    prompt = jnp.array([[1, 1, 0, 0]])
    mask = jax.jit(long_sft_mask)(jnp.array([1]), prompt, 1 - prompt, jnp.array([[0, 0, 0, 1]]))
    assert isinstance(mask, jax.Array)
    assert mask.tolist() == [[1, 1, 1, 0]]


def test_positions_restart():
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0], [0, 0, 0, 0, 0, 0]])
    expected = [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 0, 0], [0] * 6]
    assert packing.restarting_positions(segments).tolist() == expected
