"""Tokenizers: the files of a directory, the WordPiece fallback, limits, export."""

import json

import pytest

from steppe.data.errors import DataError
from steppe.data.text import Tokenizer


def test_wordpiece_fallback(tokenizer):
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (0, 2, 3, 4)
    assert tokenizer.vocab_size == 37
    assert tokenizer.has_token_types
    assert tokenizer.max_positions == 32
    one, two = tokenizer.encode_batch(["The cats SAT.", "zebra"])
    assert one["input_ids"] == [2, 5, 6, 16, 8, 21, 3]
    assert one["offsets"] == [(0, 0), (0, 3), (4, 7), (7, 8), (9, 12), (12, 13), (0, 0)]
    assert one["sequence_ids"] == [None, 0, 0, 0, 0, 0, None]
    assert two["input_ids"] == [2, 1, 3]
    assert tokenizer.decode(one["input_ids"]) == "the cats sat."
    assert tokenizer.decode(one["input_ids"], skip_special=False).startswith("[CLS]")


def test_pairs_and_cutting(tokenizer):
    (pair,) = tokenizer.encode_batch(["the cat"], ["a dog sat"])
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert not pair["cut"]
    (cut,) = tokenizer.encode_batch(["the cat"], ["a dog sat on the mat"], max_length=8)
    assert len(cut["input_ids"]) == 8
    assert cut["input_ids"][:4] == [2, 5, 6, 3]  # the longer text is cut
    assert cut["cut"]
    assert not tokenizer.encode_batch(["the cat"])[0]["cut"]  # cutting does not linger


def test_errors(tokenizer, tmp_path):
    with pytest.raises(DataError, match="max_length 33 is more than the 32 positions") as caught:
        tokenizer.encode_batch(["a"], max_length=33)
    assert "give max_length <= 32" in str(caught.value)
    with pytest.raises(DataError, match="max_length must be >= 4 tokens, got 2"):
        tokenizer.encode_batch(["a"], max_length=2)
    with pytest.raises(DataError, match="2 texts but 1 second texts"):
        tokenizer.encode_batch(["a", "b"], ["c"])
    with pytest.raises(FileNotFoundError, match="no such directory"):
        Tokenizer.from_dir(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor vocab\.txt, only"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"lacks \[UNK\], \[CLS\], \[SEP\]"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n")
    with pytest.raises(DataError, match="no padding token"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json: damaged"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: damaged JSON"):
        Tokenizer.from_dir(tmp_path)


def test_save_round_trip(tokenizer, model_dir, tmp_path):
    tokenizer.save(tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (model_dir / "vocab.txt").read_bytes()
    again = Tokenizer.from_dir(tmp_path / "out")  # now through tokenizer.json
    texts = ["The cats sat on the mat.", "who?"]
    assert again.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert again.special == tokenizer.special
    assert again.max_positions is None
    again.save(tmp_path / "out")  # onto itself: keeps the files
    assert Tokenizer.from_dir(tmp_path / "out").encode_batch(texts) == tokenizer.encode_batch(texts)


@pytest.mark.parametrize(
    ("config", "positions", "types"),
    [
        ({"model_type": "bert", "max_position_embeddings": 32, "type_vocab_size": 2}, 32, True),
        ({"model_type": "distilbert", "max_position_embeddings": 32}, 32, False),
        (
            {
                "model_type": "roberta",
                "max_position_embeddings": 34,
                "pad_token_id": 1,
                "type_vocab_size": 1,
            },
            32,
            False,
        ),
        ({"model_type": "mpnet", "max_position_embeddings": 34, "pad_token_id": 1}, 32, False),
    ],
)
def test_limits_come_from_the_models_config(model_dir, tmp_path, config, positions, types):
    (tmp_path / "vocab.txt").write_bytes((model_dir / "vocab.txt").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    held = Tokenizer.from_dir(tmp_path)
    assert held.max_positions == positions
    assert held.has_token_types == types


def test_limits_without_a_config(model_dir, tmp_path):
    (tmp_path / "vocab.txt").write_bytes((model_dir / "vocab.txt").read_bytes())
    settings = {"model_max_length": int(1e30), "model_input_names": ["input_ids"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    held = Tokenizer.from_dir(tmp_path)
    assert held.max_positions is None
    assert not held.has_token_types
    settings = {"model_max_length": 77, "do_lower_case": False, "mask_token": {"content": "[MASK]"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    held = Tokenizer.from_dir(tmp_path)
    assert held.max_positions == 77
    assert held.has_token_types  # told by what a pair gives
    assert held.encode_batch(["The"])[0]["input_ids"] == [2, 1, 3]  # cased: unknown


@pytest.mark.assets
def test_minilm_json_and_vocabulary_agree_and_stored_truncation_is_dropped(asset, tmp_path):
    folder = asset("minilm-l6")
    whole = Tokenizer.from_dir(folder)
    for name in ("vocab.txt", "config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    fallback = Tokenizer.from_dir(tmp_path)
    texts = ["Naïve café-goers DON'T like 東京's   tokenisation!", "word " * 300, ""]
    assert whole.encode_batch(texts) == fallback.encode_batch(texts)
    assert len(whole.encode_batch(texts)[1]["input_ids"]) == 302  # the file asks for 128
    assert (whole.vocab_size, whole.max_positions, whole.mask_id) == (30522, 512, 103)


@pytest.mark.assets
def test_mpnet(asset):
    held = Tokenizer.from_dir(asset("mpnet"))
    assert held.special == (1, 0, 2, 30526, 104)
    assert held.max_positions == 512
    assert not held.has_token_types
    assert held.encode_batch(["hello world"])[0]["input_ids"] == [0, 7596, 2092, 2]


@pytest.mark.parity
@pytest.mark.assets
@pytest.mark.parametrize("name", ["minilm-l6", "mpnet"])
def test_same_ids_as_transformers(asset, name):
    transformers = pytest.importorskip("transformers")
    folder = asset(name)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_dir(folder)
    texts = ["Hello, world!", "It's naïve; <b>東京</b> 😀", "a " * 400]
    expected = theirs(texts, truncation=True, max_length=64)["input_ids"]
    assert [e["input_ids"] for e in ours.encode_batch(texts, max_length=64)] == expected
