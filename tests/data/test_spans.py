"""Answers as token spans, in windows that overlap; back to text exactly."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from steppe.data import spans
from steppe.data.errors import DataError
from steppe.data.spans import SpanQA

CONTEXT = "the cat sat on the mat . a good dog ran on the film . a b c d e f g h"


def question(answer, key="q", context=CONTEXT, start=None):
    answers = []
    if answer:
        answers = [
            {"text": answer, "answer_start": context.index(answer) if start is None else start}
        ]
    return {"id": key, "question": "who ?", "context": context, "answers": answers}


def test_one_window(tokenizer):
    made = question("sat on", context="the cat sat on")
    data = SpanQA(stride=2).encode([made], tokenizer, 16)
    assert len(data) == 1
    assert data.kind == "span"
    # [CLS] who ? [SEP] the cat sat on [SEP]
    assert data.labels.tolist() == [[6, 7]]
    assert data.offsets[0].tolist() == [[0, 0]] * 4 + [[0, 3], [4, 7], [8, 11], [12, 14], [0, 0]]
    assert spans.answer_text(data, 0, 6, 7, "the cat sat on") == "sat on"
    assert spans.answer_text(data, 0, 0, 0, "the cat sat on") == ""
    assert spans.answer_text(data, 0, 7, 6, "the cat sat on") == ""
    assert spans.answer_text(data, 0, 6, 8, "the cat sat on") == ""
    assert data[0]["token_type_ids"].tolist() == [0] * 4 + [1] * 5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 22), st.integers(1, 4), st.integers(0, 5), st.integers(12, 32))
def test_windows_hold_the_whole_answer_or_point_at_the_first_token(
    vocabulary, first, count, stride, max_length
):
    words = CONTEXT.split()
    answer = " ".join(words[first : first + count])
    start = len(" ".join(words[:first])) + (first > 0)
    made = question(answer, start=start)
    data = SpanQA(stride=stride).encode([made], vocabulary, max_length)
    covered: set[int] = set()
    hits = 0
    for number in range(len(data)):
        assert data.lengths[number] <= max_length
        begin, end = (int(token) for token in data.labels[number])
        offsets = data.offsets[number]
        covered.update(offsets[offsets[:, 1] > 0][:, 0].tolist())
        if begin:
            hits += 1
            assert spans.answer_text(data, number, begin, end, CONTEXT) == answer
        else:
            assert end == 0
    assert len(covered) == len(words)  # every word is in some window
    if count - 1 <= stride:
        assert hits >= 1  # an answer no longer than the overlap is whole somewhere


@pytest.fixture(scope="session")
def vocabulary(tokenizer):
    return tokenizer


def test_unanswerable_and_both_forms_of_answers(tokenizer):
    listed = question("mat")
    mapped = {**listed, "id": "m", "answers": {"text": ["mat"], "answer_start": [19]}}
    none = question("", key="n")
    empty = {**listed, "id": "e", "answers": {"text": [], "answer_start": []}}
    data = SpanQA(stride=2).encode([listed, mapped, none, empty], tokenizer, 32)
    assert data.record_index.tolist() == [0, 1, 2, 3]
    assert data.labels.tolist() == [[9, 9], [9, 9], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (question("mat", start=3), r"row 0 \(id 'q'\): answer 'mat' is not at character 3 of its"),
        (question("mat", start=-2), "is not at character -2"),
        ({**question("mat"), "answers": "mat"}, "must hold 'text' and 'answer_start'"),
        ({**question("mat"), "answers": {"text": ["mat"], "answer_start": []}}, "equal length"),
        ({"id": "q", "question": "a", "context": "b"}, "no column 'answers'.*answers="),
        ({**question("mat"), "question": "who " * 12}, "row 0: its question takes 12 of 16 tokens"),
    ],
)
def test_errors_name_the_row(tokenizer, made, message):
    with pytest.raises(DataError, match=message) as caught:
        SpanQA(stride=4).encode([made], tokenizer, 16)
    assert "\n" not in str(caught.value)


def test_negative_stride(tokenizer):
    with pytest.raises(DataError, match="stride must be >= 0 tokens, got -1"):
        SpanQA(stride=-1).encode([question("mat")], tokenizer, 16)


def test_best_answers_takes_the_best_window_of_each_record(tokenizer):
    data = SpanQA(stride=2).encode([question("dog"), question("mat", key="p")], tokenizer, 16)
    assert len(data) > 2
    scores = np.where(data.labels[:, 0] > 0, 1.0, 0.0)
    found = spans.best_answers(data, data.labels, scores)
    assert found == {"q": "dog", "p": "mat"}
    nothing = spans.best_answers(data, np.zeros_like(data.labels), scores)
    assert nothing == {"q": "", "p": ""}


def test_other_kinds_have_no_answers(tokenizer, reviews):
    from steppe.data import tasks

    data = tasks.Regression().encode(reviews, tokenizer, 32)
    with pytest.raises(DataError, match="a 'regression' data set has no answers"):
        spans.answer_text(data, 0, 1, 1, "x")
