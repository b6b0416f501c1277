"""Options that stand in the text, and vectors of texts without a network."""

import numpy as np
import pytest

from steppe.data import mrc, word_features

IDS = {"first": 1, "last": 2, "between": 3}
OPTIONS = [[10, 11], [12], [13, 14, 15]]


def test_an_example_and_its_batch():
    example = mrc.classification_example([20, 21, 22, 23], OPTIONS, 2, **IDS, max_length=13)
    wanted = [1, 20, 21, 22, 10, 11, 3, 12, 3, 13, 14, 15, 2]  # the text is cut, no option is
    assert example.ids.tolist() == wanted
    for (begin, end), option in zip(example.options, OPTIONS, strict=True):
        assert example.ids[begin : end + 1].tolist() == option
    other = mrc.classification_example([20], OPTIONS[:2], **IDS, max_length=13)
    batch = mrc.collate([example, other], pad_id=0, task=4)
    assert batch["labels"].tolist() == [[9, 11], [2, 3]]
    assert batch["label_mask"].tolist() == [1, 0]
    assert batch["options"][1].tolist() == [[2, 3], [5, 5], [-1, -1]]
    assert batch["input_ids"][1].tolist() == [1, 20, 10, 11, 3, 12, 2] + [0] * 6
    assert batch["attention_mask"].sum(1).tolist() == [13, 7]
    assert batch["task_ids"].tolist() == [4, 4]
    assert mrc.collate([other], pad_id=0, length=9)["input_ids"].shape == (1, 9)


def test_vectors_of_texts(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text("good 1 2\nbad -1 0.5\n. 9 9\n", "utf-8")
    table = word_features.read_table(path)
    texts = ["Good, bad; GOOD!", "nothing known", "nor here .", "Good..."]
    found = word_features.average_words(texts, table)
    np.testing.assert_allclose(found[0], [1 / 3, 4.5 / 3], rtol=1e-6)
    np.testing.assert_array_equal(found[3], [1, 2])
    assert not np.array_equal(found[1], found[2])
    again = word_features.average_words(texts, table)
    np.testing.assert_array_equal(found, again)
    many = word_features.average_words([""] * 4000, table, seed=1)
    np.testing.assert_allclose(many.std(), 0.6, rtol=0.05)
    assert list(word_features.read_table(path, words=["bad"])) == ["bad"]
    path.write_text("good 1 2\nat NAME.com 3 4\n. . . 5 6\n", "utf-8")
    spaced = word_features.read_table(path)
    assert list(spaced) == ["good", "at NAME.com", ". . ."]
    np.testing.assert_array_equal(spaced[". . ."], [5, 6])
    for line in ("bad 1", "bad 1 2 3", "bad 1 x", "bad"):
        path.write_text(f"good 1 2\n{line}\n", "utf-8")
        with pytest.raises(ValueError, match="line 2: not a word and 2 numbers"):
            word_features.read_table(path)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: example(OPTIONS[:1]), r"at least two, none empty, got \[2\]"),
        (lambda: example([[1], []]), r"got \[1, 0\]"),
        (lambda: example(OPTIONS, 3), "label must be in 0..2, or -1, got 3"),
        (lambda: example(OPTIONS, max_length=10), "3 options leave the text no room"),
        (lambda: mrc.collate([], pad_id=0), "at least one, got none"),
        (lambda: mrc.collate([example(OPTIONS)], pad_id=0, length=4), "more than length=4"),
        (lambda: word_features.average_words(["a"], {}), "at least one word"),
    ],
)
def test_bad_input(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def example(options, label=-1, max_length=20):
    return mrc.classification_example([5, 6], options, label, **IDS, max_length=max_length)
