"""Lengths at the edge of a model's positions, and token ids that are not the model's."""

import jax
import numpy as np
import pytest

from steppe.models import decoding
from steppe.models.decoder import DecoderConfig
from steppe.models.decoding import Settings
from steppe.models.heads import HeadConfig
from steppe.models.seq2seq import Seq2SeqConfig

HEAD = HeadConfig("lm", 1, drop=0.0)
SIZE = {"vocab_size": 40, "width": 16, "heads": 2, "ffn_width": 16, "positions": 20, "head": HEAD}
DEPTH = {"encoder_layers": 1, "decoder_layers": 1, "drop": 0.0}


def build(config):
    model = config.build()
    return model, jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def bart():
    """20 positions, which no bucket of lengths ends at."""
    style = {"pre_norm": False, "rms": False, "use_bias": True, "head_bias": "fixed"}
    return build(Seq2SeqConfig("bart", **SIZE, **DEPTH, **style, position_kind="learned"))


@pytest.fixture(scope="module")
def t5():
    return build(Seq2SeqConfig("t5", **SIZE, **DEPTH, head_dim=8))


@pytest.fixture(scope="module")
def llama():
    return build(DecoderConfig("llama", **SIZE, layers=1))


def ids(count):
    return np.arange(count)[None] % 30 + 5


def test_a_source_between_the_last_bucket_and_the_limit(bart):
    source = {"input_ids": ids(18)}
    said = decoding.generate(*bart, source, Settings(max_new_tokens=19))
    assert said.tokens.shape == (1, 19)
    assert decoding.beam_search(*bart, source, beams=2, max_new_tokens=3).tokens.shape[2] <= 3
    assert np.isfinite(decoding.score(*bart, ids(18), [[5, 6, 7]]).total).all()
    assert np.isfinite(decoding.score(*bart, [[5, 6]], ids(18)).total).all()


def test_beyond_the_limit_the_caller_reads_the_numbers_given(bart, llama):
    with pytest.raises(ValueError, match="a source of 21 tokens .* 20 positions"):
        decoding.generate(*bart, {"input_ids": ids(21)}, Settings(max_new_tokens=3))
    with pytest.raises(ValueError, match="max_new_tokens = 20 .* ask for 19"):
        decoding.generate(*bart, {"input_ids": ids(3)}, Settings(max_new_tokens=20))
    with pytest.raises(ValueError, match="up to 21 tokens, the model 20 positions"):
        decoding.score(*bart, [[5, 6]], ids(21))
    with pytest.raises(ValueError, match="the model has 20; shorten both"):
        decoding.generate(*llama, {"input_ids": ids(30)}, Settings(max_new_tokens=30))


def test_relative_positions_have_no_limit(t5):
    plain = decoding.generate(*t5, {"input_ids": ids(2)}, Settings(max_new_tokens=30))
    start = {"input_ids": ids(2), "decoder_input_ids": np.zeros((1, 1), np.int32)}
    begun = decoding.generate(*t5, start, Settings(max_new_tokens=30))
    np.testing.assert_array_equal(plain.tokens, begun.tokens)


@pytest.mark.parametrize("bad", [40, -1])
def test_ids_of_another_tokenizer(llama, bad):
    match = rf"token id {bad}, the model has 40 tokens"
    with pytest.raises(ValueError, match=match):
        decoding.generate(*llama, {"input_ids": np.array([[5, bad]])})
    with pytest.raises(ValueError, match=f"prompt 1 holds the {match}"):
        decoding.score(*llama, [[5], [bad]], [[6], [6]])
    with pytest.raises(ValueError, match=f"continuation 0 holds the {match}"):
        decoding.score(*llama, [[5]], [[bad]])


def test_an_end_that_never_comes(llama):
    with pytest.raises(ValueError, match="eos_id holds the token id 400"):
        decoding.generate(*llama, {"input_ids": ids(3)}, eos_id=400)
    with pytest.raises(ValueError, match="length_penalty must be a finite number, got nan"):
        decoding.beam_search(*llama, {"input_ids": ids(3)}, length_penalty=float("nan"))
