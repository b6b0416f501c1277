"""What language models need of a tokenizer's folder: ends of texts, templates, streams."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from steppe.data.errors import DataError
from steppe.data.text import Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def folder(tmp_path):
    """A byte-level tokenizer without any settings."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def put(folder, name, **settings):
    (folder / name).write_text(json.dumps(settings), encoding="utf-8")


def test_ends_are_read_from_the_settings_then_the_config(folder):
    held = Tokenizer.open(folder)
    assert (held.eos_id, held.bos_id) == (256, -1)  # a usual name
    assert held.pad_id == 256  # none of its own: any id will do, the mask hides it
    put(folder, "config.json", eos_token_id=[258, 256], bos_token_id=257)
    held = Tokenizer.open(folder)
    assert (held.stop_ids, held.bos_id) == ((258, 256), 257)
    put(folder, "tokenizer_config.json", eos_token={"content": "<|im_end|>"}, bos_token=None)
    put(folder, "config.json", eos_token_id=256, bos_token_id=257)
    put(folder, "generation_config.json", eos_token_id=[256, 9999])
    held = Tokenizer.open(folder)
    assert (held.stop_ids, held.bos_id, held.pad_id) == ((258, 256), -1, 258)
    assert held.special_ids == {256, 257, 258}
    put(folder, "tokenizer_config.json", eos_token=None, pad_token="<|endoftext|>")
    (folder / "config.json").unlink()
    (folder / "generation_config.json").unlink()
    held = Tokenizer.open(folder)
    assert (held.eos_id, held.stop_ids, held.pad_id) == (-1, (), 256)


def test_encoder_tokenizers_have_no_ends(tokenizer):
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.chat_template) == (-1, -1, None)


def test_special_tokens_are_added_or_not(folder, tokenizer):
    held = Tokenizer.open(folder)
    assert held.encode_batch(["a"])[0]["input_ids"][0] == 257
    plain = held.encode_batch(["a"], special=False)[0]["input_ids"]
    assert held.decode(plain) == "a"
    assert held.encode_batch(["<|im_end|>"], special=False)[0]["input_ids"] == [258]
    cut = held.encode_batch(["abcdefgh"], max_length=4, special=False)[0]
    assert held.decode(cut["input_ids"]) == "abcd"
    assert cut["cut"]
    assert tokenizer.encode_batch(["the cat"], special=False)[0]["input_ids"] == [5, 6]


def test_chat_templates_of_all_three_kinds(folder, tmp_path):
    assert Tokenizer.open(folder).chat_template is None
    both = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    put(folder, "tokenizer_config.json", chat_template=both)
    assert Tokenizer.open(folder).chat_template == "d"
    put(folder, "tokenizer_config.json", chat_template="inside")
    assert Tokenizer.open(folder).chat_template == "inside"
    (folder / "chat_template.jinja").write_text("own file", encoding="utf-8")
    held = Tokenizer.open(folder)
    assert held.chat_template == "own file"
    held.save(folder / "copy")
    assert Tokenizer.open(folder / "copy").chat_template == "own file"
    held.chat_template = "changed"
    held.save(folder / "changed")
    assert Tokenizer.open(folder / "changed").chat_template == "changed"
    assert Tokenizer.open(folder).chat_template == "own file"  # the source stays as it is


def test_vocabularies_that_do_not_fit(folder):
    held = Tokenizer.open(folder)
    held.check_vocabulary(259)
    held.check_vocabulary(320)  # embeddings are often rounded up
    with pytest.raises(DataError, match=r"has 259 tokens but the model embeds 258; they do not"):
        held.check_vocabulary(258)


def test_streams_hold_back_half_characters(folder):
    held = Tokenizer.open(folder)
    ids = held.encode_batch(["é😀!"], special=False)[0]["input_ids"]
    stream = held.stream()
    assert [stream.push([n]) for n in ids] == ["", "é", "", "", "", "😀", "!"]
    assert stream.end() == ""
    assert [stream.push(ids[:3]), stream.push(ids[3:5])] == ["", ""]  # "é" waits for its neighbour
    assert stream.push(ids[5:]) == "é😀!"
    assert stream.push(ids[2:5]) == ""
    assert stream.push(ids[-1:]) == "\ufffd!"  # bytes that never become a character
    assert stream.push([258, 256]) == ""
    assert stream.push([]) == stream.end() == ""
    shown = held.stream(skip_special=False)
    assert shown.push([258]) == "<|im_end|>"


def test_streams_of_words(tokenizer):
    ids = tokenizer.encode_batch(["the cats sat."])[0]["input_ids"]
    stream = tokenizer.stream()
    pieces = [stream.push([number]) for number in ids]
    assert pieces == ["", "the", " cat", "s", " sat", ".", ""]
    assert "".join(pieces) == tokenizer.decode(ids)
