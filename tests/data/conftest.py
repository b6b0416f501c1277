"""A tiny tokenizer and tiny records, made here so that the tests need no download."""

import json
from pathlib import Path

import pytest

from steppe.data.text import Tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "dog", "sat", "ran", "on"]
WORDS += ["mat", "good", "bad", "film", "very", "##s", "##ing", "who", "where", "?", ".", ","]
WORDS += [*"abcdefghijk", "##a", "##b", "##c"]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A directory as of a tiny BERT: vocab.txt and config.json, 32 positions."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    config = {"model_type": "bert", "max_position_embeddings": 32, "type_vocab_size": 2}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_dir) -> Tokenizer:
    return Tokenizer.from_dir(model_dir)


@pytest.fixture(scope="session")
def reviews() -> list[dict]:
    """40 records of 1 to 20 words."""
    words = ["the", "cat", "sat", "on", "mat", "good", "bad", "film", "very", "dog"]
    return [
        {
            "id": f"r{number}",
            "text": " ".join(words[(number + i) % len(words)] for i in range(number * 7 % 20 + 1)),
            "label": "good" if number % 3 else "bad",
            "score": number / 10,
        }
        for number in range(40)
    ]
