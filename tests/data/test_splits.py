"""Splits by hash: the same on every machine and under any order or growth of the data."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from steppe.data import splits
from steppe.data.errors import DataError

IDS = [f"example/{number}" for number in range(200)]

# From `printf '\0example/0' | sha256sum`: the first 13 hex digits over 16**13.
GOLDEN_POSITION = 0.5428613298838525
GOLDEN_SIZES = {"train": 164, "valid": 16, "test": 20}
GOLDEN_TEST = [
    8,
    15,
    17,
    50,
    53,
    78,
    79,
    84,
    89,
    106,
    109,
    124,
    141,
    147,
    152,
    155,
    157,
    163,
    169,
    179,
]


def records(ids):
    return [{"id": key, "n": number} for number, key in enumerate(ids)]


def test_golden():
    assert splits.position("example/0") == pytest.approx(GOLDEN_POSITION, abs=0)
    parts = splits.by_hash(records(IDS))
    assert {name: len(part) for name, part in parts.items()} == GOLDEN_SIZES
    assert [r["n"] for r in parts["test"]] == GOLDEN_TEST


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(IDS), min_size=60, unique=True))
def test_order_and_absence_of_others_do_not_move_an_example(some):
    whole = splits.by_hash(records(IDS))
    where = {record["id"]: name for name, part in whole.items() for record in part}
    parts = splits.by_hash(records(some), {"train": 0.8, "rest": 0.2})
    for name, part in parts.items():
        assert all((where[record["id"]] == "train") == (name == "train") for record in part)


def test_shuffled_records_give_the_same_sets():
    forward = splits.by_hash(records(IDS))
    backward = splits.by_hash(list(reversed(records(IDS))))
    for name in forward:
        assert {r["id"] for r in forward[name]} == {r["id"] for r in backward[name]}
        assert [r["id"] for r in backward[name]] == [r["id"] for r in reversed(forward[name])]


def test_salt_gives_an_independent_division():
    plain = {r["id"] for r in splits.by_hash(records(IDS))["train"]}
    salted = {r["id"] for r in splits.by_hash(records(IDS), salt="other")["train"]}
    assert 100 < len(plain & salted) < 150  # 0.8 * 0.8 * 200 = 128 expected


def test_key_keeps_groups_together_and_allows_repeats():
    made = [{"id": str(i), "group": f"g{i // 4}"} for i in range(200)]
    parts = splits.by_hash(made, {"a": 0.5, "b": 0.5}, key="group")
    groups = {name: {r["group"] for r in part} for name, part in parts.items()}
    assert not groups["a"] & groups["b"]
    assert all(len(part) % 4 == 0 for part in parts.values())


@pytest.mark.parametrize(
    "fractions", [{}, {"a": 0.5}, {"a": 1.2, "b": -0.2}, {"a": 0.5, "b": 0.6}, {"a": 1.0, "b": 0.0}]
)
def test_bad_fractions(fractions):
    with pytest.raises(DataError, match="positive and sum to 1"):
        splits.by_hash(records(IDS), fractions)  # {} is not None: it is an error, not the default


def test_errors_name_rows_and_the_empty_split():
    with pytest.raises(DataError, match=r"split 'train' is empty|split 'valid' is empty") as caught:
        splits.by_hash(records(IDS[:1]))
    assert "add data, enlarge its fraction, or change the salt" in str(caught.value)
    with pytest.raises(DataError, match="rows 1 and 3 share the id 'b'"):
        splits.by_hash(records(["a", "b", "c", "b"]))
    with pytest.raises(DataError, match=r"row 0 \(id 'a'\) has no column 'group'"):
        splits.by_hash(records(["a"]), key="group")
