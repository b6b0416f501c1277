"""Tokenizers out of GGUF files: ids of both kinds of vocabulary, special tokens, export, errors."""

import itertools
import json
import random

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from steppe.data import tokenizer_gguf
from steppe.data.errors import DataError
from steppe.data.text import Tokenizer
from steppe.data.tokenizer_gguf import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

gguf = pytest.importorskip("gguf")

TEXT = """The cat sat on the mat; the cats sat. It's 1234 o'clock, they've 12 mats?
    if x == 10:
        return [1, 22, 333]  # naïve café 東京 😀😀

Don't  you   think    so\t\tnow?\r\n"""
HARD = [
    "",
    " ",
    "Hello world",
    "  the   cats\n\n\n12",
    "\n\n4",
    "x12345y ½² ٣٤",
    "😀 東京 naïve \u200d\ufeff\u00a0",
    "<s>the cat</s> <tool>x",
    "don't DON'T they'Ve",
    "\x00\x7f\u0378",
]


def write(path, kind, metadata, arch="llama"):
    """A GGUF file of a tokenizer alone."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("tokenizer.ggml.model", kind)
    for key, value in metadata.items():
        key = f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    writer.add_uint32(f"{arch}.context_length", 64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


SPECIAL = ["<unk>", "<s>", "</s>", "<tool>"]
KINDS = [CONTROL, CONTROL, CONTROL, USER_DEFINED]


def trained(pre) -> tokenizers.Tokenizer:
    """A small byte-level BPE with the cutting rule `pre`, and four tokens of its own."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    return backend


def vocabulary(backend):
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [" ".join(pair) for pair in model["merges"]]
    return {
        "tokens": tokens,
        "token_type": (KINDS + [NORMAL] * len(tokens))[: len(tokens)],
        "merges": merges,
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    """(the tokenizer that was trained, the GGUF file made of it)."""
    backend = trained(digits)
    metadata = {**vocabulary(backend), "pre": "smollm", "chat_template": "{{ messages }}"}
    return backend, write(tmp_path_factory.mktemp("gguf") / "t.gguf", "gpt2", metadata)


@pytest.mark.parametrize(("name", "pre"), [("gpt-2", byte_level), ("smollm", digits)])
def test_byte_level_ids_are_those_of_the_tokenizer(tmp_path, name, pre):
    backend = trained(pre)
    file = write(tmp_path / "t.gguf", "gpt2", {**vocabulary(backend), "pre": name})
    held = Tokenizer.open(file)
    for text in [*HARD[:7], *HARD[8:], TEXT]:
        ids = held.encode_batch([text])[0]["input_ids"]
        assert ids == backend.encode(text).ids, text
        assert held.decode(ids) == text


def test_digits_stand_alone_only_where_the_file_says_so(tmp_path):
    """With the wrong rule all texts still encode, only to other ids."""
    metadata = vocabulary(trained(byte_level))
    plain = Tokenizer.from_gguf(write(tmp_path / "a.gguf", "gpt2", {**metadata, "pre": "gpt-2"}))
    apart = Tokenizer.from_gguf(write(tmp_path / "b.gguf", "gpt2", {**metadata, "pre": "smollm"}))
    qwen = Tokenizer.from_gguf(write(tmp_path / "c.gguf", "gpt2", {**metadata, "pre": "qwen2"}))
    assert [len(t.encode_batch(["\n\n4 12 12"])[0]["input_ids"]) for t in (plain, apart)] == [5, 9]
    text = "x=(1)\n\n  they'VE"
    pieces = [p for p, _ in qwen.backend.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == ["x", "=(", "1", ")ĊĊ", "Ġ", "Ġthey", "'VE"]
    llama = tokenizer_gguf.build(
        write(tmp_path / "d.gguf", "gpt2", {**metadata, "pre": "llama-bpe"})
    )
    cut = llama.backend.pre_tokenizer.pre_tokenize_str("12345")
    assert [piece for piece, _ in cut] == ["123", "45"]


def test_special_tokens_and_settings(smol):
    _, file = smol
    held = Tokenizer.open(file)
    assert (held.bos_id, held.eos_id, held.stop_ids, held.pad_id) == (1, 2, (2,), 2)
    assert (held.special.unk, held.max_positions, held.has_token_types) == (0, 64, False)
    assert held.chat_template == "{{ messages }}"
    ids = held.encode_batch(["<s>the</s> <tool>"])[0]["input_ids"]
    assert (ids[0], ids[-3], ids[-1]) == (1, 2, 3)
    assert held.decode(ids) == "the <tool>"
    assert held.decode(ids, skip_special=False) == "<s>the</s> <tool>"
    held.check_vocabulary(held.vocab_size)
    with pytest.raises(DataError, match="has 338 tokens but the model embeds 300; they do not"):
        held.check_vocabulary(300)


def test_first_and_last_tokens(tmp_path, smol):
    metadata = {**vocabulary(smol[0]), "pre": "smollm"}
    flags = {"add_bos_token": True, "add_eos_token": True, "eot_token_id": 3}
    held = Tokenizer.open(write(tmp_path / "t.gguf", "gpt2", {**metadata, **flags}))
    assert held.stop_ids == (2, 3)
    plain = held.encode_batch(["the cat"], special=False)[0]["input_ids"]
    assert held.encode_batch(["the cat"])[0]["input_ids"] == [1, *plain, 2]
    assert held.encode_batch(["the cat"], ["the cat"])[0]["input_ids"] == [1, *plain, 2] * 2
    cut = held.encode_batch(["the cat sat on the mat"], max_length=5)[0]
    assert (cut["input_ids"][0], cut["input_ids"][-1], len(cut["input_ids"])) == (1, 2, 5)


def test_export_is_read_again_and_by_transformers(tmp_path, smol):
    transformers = pytest.importorskip("transformers")
    held = Tokenizer.open(smol[1])
    held.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    again = Tokenizer.open(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*HARD, TEXT]:
        ids = held.encode_batch([text])[0]["input_ids"]
        assert again.encode_batch([text])[0]["input_ids"] == ids
        assert theirs(text)["input_ids"] == ids
    assert (again.bos_id, again.stop_ids, again.pad_id) == (held.bos_id, held.stop_ids, 2)
    assert again.chat_template == theirs.chat_template == held.chat_template
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")
    assert (again.max_positions, theirs.model_max_length) == (64, 64)
    again.chat_template = "another"
    again.save(tmp_path / "other")
    assert Tokenizer.open(tmp_path / "other").chat_template == "another"


# --- SentencePiece ---------------------------------------------------------------------------

BYTES = [f"<0x{n:02X}>" for n in range(256)]
WORDS = ["▁", *"abcdefgh", "ab", "bc", "abc", "▁a", "▁ab", "cd", "ef", "gh", "efgh", "▁b", "bcd"]
SPACES = ["  ", "   "]


def pieces(**more):
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *SPACES, *WORDS]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER_DEFINED, USER_DEFINED]
    order = random.Random(3).sample(range(len(WORDS)), len(WORDS))
    scores = [0.0] * 261 + [-float(rank) for rank in order]
    ids = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    kinds += [NORMAL] * len(WORDS)
    return {"tokens": tokens, "token_type": kinds, "scores": scores, **ids, **more}


def without_spaces(**more):
    """As in Llama: spaces are no tokens of their own."""
    metadata = pieces(**more)
    for number, token in ((259, "<x>"), (260, "<y>")):
        metadata["tokens"][number] = token
    return metadata


def reference(text, metadata, prefix):
    """SentencePiece's own algorithm: join the neighbours of the best score, again and again."""
    tokens = metadata["tokens"]
    spaces = [t for t in SPACES if t in tokens]
    score = {
        t: s for t, s, k in zip(tokens, metadata["scores"], metadata["token_type"]) if k == NORMAL
    }
    parts, at = [], 0
    text = ("▁" + text if prefix and text else text).replace(" ", "▁")
    while at < len(text):
        own = [s.replace(" ", "▁") for s in spaces]
        found = max((s for s in own if text.startswith(s, at)), key=len, default=None)
        parts.append((found or text[at], found is not None))
        at += len(parts[-1][0])
    while True:
        pairs = [
            (-score[a + b], i)
            for i, ((a, x), (b, y)) in enumerate(itertools.pairwise(parts))
            if not x and not y and a + b in score
        ]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [(parts[i][0] + parts[i + 1][0], False)]
    out = []
    for part, own in parts:
        if own:
            out.append(tokens.index(part.replace("▁", " ")))
        elif part in score:
            out.append(tokens.index(part))
        else:
            out += [tokens.index(f"<0x{byte:02X}>") for byte in part.encode()]
    return out


def test_sentencepiece_ids(tmp_path):
    metadata = pieces(add_space_prefix=False)
    held = Tokenizer.open(write(tmp_path / "t.gguf", "llama", metadata))
    draw = random.Random(0)
    texts = ["", "abc abcd", "  ab   abc", "é😀", " " * 9 + "x", "▁▁a"]
    texts += [
        "".join(draw.choice("abcdefgh   x") for _ in range(draw.randint(1, 30))) for _ in range(300)
    ]
    for text in texts:
        expected = [1, *reference(text, metadata, False)]  # bos is the rule of this kind
        assert held.encode_batch([text])[0]["input_ids"] == expected, text
        assert held.decode(expected) == text.replace("▁", " ")


def test_sentencepiece_puts_its_space_before_every_text(tmp_path):
    """Also before one that begins with a space: one is added, and one is taken off again."""
    metadata = without_spaces(add_bos_token=False)
    held = Tokenizer.open(write(tmp_path / "t.gguf", "llama", metadata))
    for text in ("ab", " ab", "  ab", "b abc   c", "é"):
        ids = held.encode_batch([text])[0]["input_ids"]
        assert ids == reference(text, metadata, True)
        assert held.decode(ids) == text
    assert held.encode_batch([""])[0]["input_ids"] == []


# --- Errors ----------------------------------------------------------------------------------


def test_bad_files(tmp_path, smol):
    with pytest.raises(FileNotFoundError, match="no such file"):
        Tokenizer.open(tmp_path / "nothing.gguf")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"")
    with pytest.raises(DataError, match="not a GGUF file"):
        Tokenizer.open(bad)
    whole = smol[1].read_bytes()
    for length in (4, 12, 40, 900, len(whole) - 200):
        bad.write_bytes(whole[:length])
        with pytest.raises(DataError, match="damaged or cut off inside its header"):
            Tokenizer.open(bad)
    bad.write_bytes(b"GGUF\x09" + whole[5:])
    with pytest.raises(DataError, match="GGUF version 9"):
        Tokenizer.open(bad)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("t5", {}, "tokenizer of kind 't5'; gpt2, llama are read"),
        ("gpt2", {"pre": "viking"}, r"by the rule 'viking' \(tokenizer\.ggml\.pre\), which is not"),
        ("gpt2", {"pre": None}, "by the rule 'default'"),
        ("gpt2", {"merges": None}, r"has no 'tokenizer\.ggml\.merges'"),
        ("gpt2", {"tokens": None}, r"has no 'tokenizer\.ggml\.tokens' in its metadata"),
        ("gpt2", {"merges": ["a bcdefgh"]}, "its merge 'a bcdefgh' does not join two tokens"),
        ("gpt2", {"token_type": [1, 1]}, "lists 338 tokens but the kinds of 2"),
        ("gpt2", {"eos_token_id": 900}, "its eos token 900 is not one of 338 tokens"),
        ("llama", {"scores": [0.5], "merges": None}, "lists 338 tokens but the scores of 1"),
    ],
)
def test_bad_metadata(tmp_path, smol, kind, change, message):
    metadata = {**vocabulary(smol[0]), "pre": "smollm", **change}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(DataError, match=message):
        Tokenizer.open(write(tmp_path / "t.gguf", kind, metadata))


# --- Streams ---------------------------------------------------------------------------------


def test_a_stream_never_splits_a_character(smol):
    held = Tokenizer.open(smol[1])
    text = "naïve 東京🦊! the\n\ncats"
    ids = held.encode_batch([text])[0]["input_ids"]
    stream = held.stream()
    pieces = [stream.push([number]) for number in ids]
    assert "".join(pieces) + stream.end() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "🦊" in pieces
    assert stream.push([*ids, 2]) == text  # a second text, several ids a time; </s> is not shown
    assert stream.end() == ""
    half = ids[: pieces.index("🦊")]  # some bytes of the character are missing
    assert [stream.push([n]) for n in half][-1] == ""
    assert stream.end().endswith("\ufffd")


def test_any_ids_give_the_text_that_decode_gives(smol, tmp_path):
    held = Tokenizer.open(smol[1])
    draw = random.Random(1)
    for _ in range(300):
        ids = [draw.randrange(held.vocab_size) for _ in range(draw.randint(0, 12))]
        stream = held.stream(skip_special=False)
        shown = "".join(stream.push([number]) for number in ids)
        assert "".join(shown) + stream.end() == held.decode(ids, skip_special=False)
    spm = Tokenizer.open(write(tmp_path / "t.gguf", "llama", without_spaces()))
    for text in ("ab abc  é😀d", " 東京", "a"):
        ids = spm.encode_batch([text])[0]["input_ids"]
        stream = spm.stream()
        assert "".join(stream.push([n]) for n in ids) + stream.end() == text
