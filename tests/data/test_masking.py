"""Masked-language-model corruption: the published rates, reproducible from three integers."""

import numpy as np
import pytest

from steppe.data import batches, tasks
from steppe.data.errors import DataError
from steppe.data.masking import Masking

SPECIAL = (0, 1, 2, 3, 4)
MASKING = Masking(mask_id=4, vocab_size=1000, special=SPECIAL)


def test_rates_over_many_tokens():
    ids = np.concatenate([[2], np.arange(5, 905), [3]]).astype(np.int32)
    chosen = masked = changed = kept = 0
    for index in range(300):
        corrupted, labels, mask = MASKING(ids, seed=0, epoch=0, index=index)
        picked = mask > 0
        assert np.array_equal(labels, ids)
        assert np.array_equal(corrupted[~picked], ids[~picked])
        assert not picked[[0, -1]].any()
        assert not np.isin(corrupted[1:-1], (0, 1, 2, 3)).any()
        chosen += picked.sum()
        masked += (corrupted[picked] == 4).sum()
        kept += (corrupted[picked] == ids[picked]).sum()
        changed += ((corrupted[picked] != 4) & (corrupted[picked] != ids[picked])).sum()
    assert chosen / (300 * 900) == pytest.approx(0.15, abs=0.003)
    assert masked / chosen == pytest.approx(0.8, abs=0.01)
    assert changed / chosen == pytest.approx(0.1, abs=0.006)
    assert kept / chosen == pytest.approx(0.1, abs=0.006)


def test_a_pure_function_of_seed_epoch_and_index():
    ids = np.arange(5, 105, dtype=np.int32)
    first = MASKING(ids, seed=3, epoch=2, index=7)
    assert all(np.array_equal(a, b) for a, b in zip(first, MASKING(ids, seed=3, epoch=2, index=7)))
    for other in ((4, 2, 7), (3, 3, 7), (3, 2, 8)):
        seed, epoch, index = other
        again = MASKING(ids, seed=seed, epoch=epoch, index=index)
        assert not np.array_equal(first[2], again[2])


def test_golden():
    ids = np.arange(5, 25, dtype=np.int32)
    corrupted, _, mask = MASKING(ids, seed=1, epoch=0, index=0)
    assert np.flatnonzero(mask).tolist() == GOLDEN_PLACES
    assert corrupted[mask > 0].tolist() == GOLDEN_IDS


def test_short_texts_always_have_a_target():
    for index in range(50):
        _, _, mask = MASKING(np.asarray([2, 9, 3], np.int32), seed=0, epoch=0, index=index)
        assert mask.tolist() == [0, 1, 0]
    _, _, mask = MASKING(np.asarray([2, 3], np.int32), seed=0, epoch=0, index=0)
    assert mask.sum() == 0


def test_random_tokens_cover_all_ordinary_ids_and_no_special_one():
    masking = Masking(mask_id=5, vocab_size=12, special=(0, 5, 7, 11), replaced=0.0, random=1.0)
    drawn = masking._ordinary_ids(np.linspace(0, 1, 10_000, endpoint=False))
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [1, 2, 3, 4, 6, 8, 9, 10]
    assert counts.tolist() == [1250] * 8


def test_the_task_masks_at_batch_time(tokenizer, reviews):
    task = tasks.MaskedLM()
    data = task.encode(reviews, tokenizer, 32)
    assert (task.kind, task.num_labels, data.labels) == ("mlm", 0, None)
    first = batches.train(data, 8, seed=0)
    epoch_0 = [next(first) for _ in range(first.steps_per_epoch)]
    epoch_1 = [next(first) for _ in range(first.steps_per_epoch)]

    def masks(epoch):
        rows = {}
        for batch in epoch:
            for place, index in enumerate(batch["example_index"]):
                if index >= 0:
                    length = data.lengths[index]
                    rows[int(index)] = batch["label_mask"][place, :length].tolist()
                    assert (
                        batch["labels"][place, :length].tolist() == data.input_ids[index].tolist()
                    )
                    assert batch["label_mask"][place, length:].sum() == 0
                else:
                    assert batch["label_mask"][place].sum() == 0
        return rows

    # A new mask each epoch, wherever the example falls; the same one when run again.
    assert sorted(masks(epoch_0)) == list(range(40))
    assert masks(epoch_0) != masks(epoch_1)
    other_size = batches.train(data, 5, seed=0)
    again = [next(other_size) for _ in range(other_size.steps_per_epoch)]
    assert masks(again) == masks(epoch_0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_id": -1}, "no mask token"),
        ({"share": 0.0}, "share must be between 0 and 1, got 0.0"),
        ({"replaced": 0.8, "random": 0.3}, "sum to at most 1, got 0.8 and 0.3"),
        ({"random": -0.1}, "must be >= 0"),
    ],
)
def test_errors(change, message):
    with pytest.raises(DataError, match=message):
        Masking(**{"mask_id": 4, "vocab_size": 10, "special": SPECIAL, **change})


# Recorded once: a change here breaks the exact resume of saved runs.
GOLDEN_PLACES = [0, 1, 2, 11, 19]
GOLDEN_IDS = [4, 4, 4, 554, 4]
