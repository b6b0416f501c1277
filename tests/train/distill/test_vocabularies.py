"""Two tokenizers are compared id by id, and the first difference is named."""

from types import SimpleNamespace

import pytest

from steppe.train import distill

TOKENS = {"<s>": 0, "</s>": 1, "the": 2, "a": 3}


def backend(table):
    return SimpleNamespace(backend=SimpleNamespace(get_vocab=lambda: table))


@pytest.mark.parametrize("form", [dict, backend, lambda t: SimpleNamespace(get_vocab=lambda: t)])
def test_equal_ones_and_one_that_goes_on(form):
    assert distill.check_tokenizers(form(TOKENS), form(dict(reversed(TOKENS.items())))) == 4
    assert distill.check_tokenizers(form(TOKENS), form({**TOKENS, "<pad>": 4})) == 4
    assert distill.check_tokenizers(form({**TOKENS, "far": 9}), form(TOKENS)) == 4


def test_the_first_difference_is_named_with_the_cure():
    other = {"<s>": 0, "</s>": 1, "a": 2, "the": 3}
    message = "id 2 is 'the' to the student and 'a' to the teacher.*sequence-level distillation"
    with pytest.raises(ValueError, match=message):
        distill.check_tokenizers(TOKENS, other)
    with pytest.raises(ValueError, match="share 0 ids from 0 on"):
        distill.check_tokenizers(TOKENS, {"x": 7, "y": 8})
    with pytest.raises(TypeError, match="teacher must be a tokenizer .*, got int"):
        distill.check_tokenizers(TOKENS, 3)


def test_what_only_the_student_knows():
    teacher = {"a": 0, "b": 1, "d": 3}
    assert distill.first_unknown(teacher, teacher) is None
    assert distill.first_unknown({"a": 0}, teacher) is None
    assert distill.first_unknown({**teacher, "z": 9, "c": 2}, teacher) == (2, "c")
