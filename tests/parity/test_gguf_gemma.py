"""Gemma 3 out of its GGUF file: the ids are those of SentencePiece itself."""

import random

import ml_dtypes
import numpy as np
import pytest

from steppe.data import tokenizer_gguf
from steppe.data.text import Tokenizer
from steppe.models import gguf_weights

pytestmark = [pytest.mark.parity, pytest.mark.assets, pytest.mark.slow]

TEXTS = [
    "",
    "Hello world",
    "  two  spaces   three    four" + " " * 50 + "x",
    "tabs\tand\n\nnew\r\nlines\n \n  x" + "\n" * 50,
    "12345.678 naïve café e\u0301 ﬁ ½ ٣ \u00a0\u200d\ufeff",
    "東京は日本の首都です。한국어 🙂👍🏽👨\u200d👩\u200d👧 \u0378\x00",
    "<table><td>x</td> ▁x ▁▁ y",
]


@pytest.fixture
def file(asset):
    (found,) = asset("gemma3-270m").rglob("*.gguf")
    return found


def sentencepiece(file):
    """The model file that the GGUF was made from, as far as the GGUF tells."""
    library = pytest.importorskip("sentencepiece")
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    held = tokenizer_gguf.metadata(file)
    model = proto.ModelProto()
    rows = (held[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    for token, score, kind in zip(*rows):
        own = kind == tokenizer_gguf.USER_DEFINED
        # Their spaces are written as spaces in the file.
        piece = token.replace(" ", "▁") if own else token
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer = model.trainer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = 2, True, len(model.pieces)
    for name in ("pad", "eos", "bos", "unk"):
        number = ("pad", "eos", "bos", "unk").index(name)
        setattr(trainer, f"{name}_id", number)
        setattr(trainer, f"{name}_piece", f"<{name}>")
    rule = model.normalizer_spec
    rule.name, rule.add_dummy_prefix = "identity", False
    rule.remove_extra_whitespaces, rule.escape_whitespaces = False, True
    return library.SentencePieceProcessor(model_proto=model.SerializeToString())


def test_ids_are_those_of_sentencepiece(file):
    """transformers' reader differs: it cuts long runs of spaces otherwise. Ours are right."""
    theirs, ours = sentencepiece(file), Tokenizer.open(file)
    draw = random.Random(0)
    texts = TEXTS + ["".join(draw.choices("ab c▁  \n\n\t1é東🙂<>x", k=25)) for _ in range(300)]
    for text in texts:
        assert ours.encode_batch([text], special=False)[0]["input_ids"] == theirs.encode(text), text
        ids = ours.encode_batch([text])[0]["input_ids"]
        assert ids[0] == ours.bos_id == 2
        assert ours.decode(ids) == text.replace("▁", " ")


def test_config_and_norms(file):
    held, config = gguf_weights.read(file)
    assert (config["model_type"], config["head_dim"], config["sliding_window"]) == (
        "gemma3_text",
        256,
        512,
    )
    assert held.shapes()["model.embed_tokens.weight"] == (262_144, 640)
    norm = held.read("model.layers.0.self_attn.q_norm.weight")
    # The checkpoint was bfloat16: its values fit only without the 1 that the file adds.
    assert (norm == norm.astype(ml_dtypes.bfloat16).astype(np.float32)).all()
    assert (norm + 1 != (norm + 1).astype(ml_dtypes.bfloat16).astype(np.float32)).any()
    assert held.read("model.embed_tokens.weight", (slice(5, 8),)).shape == (3, 640)
