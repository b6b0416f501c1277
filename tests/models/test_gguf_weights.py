"""GGUF weights: names, layouts that are undone, slices of quantised rows, damaged files."""

import builtins
import contextlib
import struct

import numpy as np
import pytest

from steppe.models import gguf_file, gguf_weights

gguf = pytest.importorskip("gguf")
from gguf import GGMLQuantizationType as Kind

WIDTH, HEADS, KV, SIZE, INNER, VOCAB = 256, 4, 2, 64, 512, 40


def interleave(kernel: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to queries and keys."""
    halves = kernel.reshape(heads, 2, -1, *kernel.shape[1:])
    return halves.swapaxes(1, 2).reshape(kernel.shape)


def blocks(rng: np.random.Generator, shape: tuple[int, int], kind: Kind) -> np.ndarray:
    """Random blocks of a type that has no quantiser in Python; their float16 scales are small."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    places = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (size - 2,)}[kind]
    for place in places:
        raw[..., place : place + 2] = scale
    return raw.reshape(shape[0], -1)


def write(path, arch, metadata, tensors):
    """A GGUF file. Tensors: name -> array, or (array, type) to quantise, or (bytes, type, None)."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        key = key if key.startswith(("tokenizer.", "split.")) else f"{arch}.{key}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_float32(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            writer.add_tensor(name, tensor)
        elif len(tensor) == 3:
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, gguf.quantize(*tensor), raw_dtype=tensor[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


LLAMA = {
    "embedding_length": WIDTH,
    "block_count": 1,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV,
    "feed_forward_length": INNER,
    "context_length": 128,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 100000.0,
    "rope.dimension_count": SIZE,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.tokens": [f"word{i}" for i in range(VOCAB)],
}


def weights(seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "token_embd.weight": (normal(VOCAB, WIDTH), Kind.Q8_0),
        "output_norm.weight": normal(WIDTH),
        "blk.0.attn_norm.weight": normal(WIDTH),
        "blk.0.attn_q.weight": (normal(HEADS * SIZE, WIDTH), Kind.Q4_1),
        "blk.0.attn_k.weight": (normal(KV * SIZE, WIDTH), Kind.Q4_0),
        "blk.0.attn_v.weight": (normal(KV * SIZE, WIDTH), Kind.Q5_0),
        "blk.0.attn_output.weight": (normal(WIDTH, HEADS * SIZE), Kind.Q5_1),
        "blk.0.ffn_norm.weight": normal(WIDTH),
        "blk.0.ffn_gate.weight": (blocks(rng, (INNER, WIDTH), Kind.Q4_K), Kind.Q4_K, None),
        "blk.0.ffn_up.weight": (blocks(rng, (INNER, WIDTH), Kind.Q5_K), Kind.Q5_K, None),
        "blk.0.ffn_down.weight": (blocks(rng, (WIDTH, INNER), Kind.Q6_K), Kind.Q6_K, None),
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "llama", LLAMA, weights())


def test_config_of_a_llama(file):
    _, config = gguf_weights.read(file)
    assert config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": SIZE,
        "intermediate_size": INNER,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }


def test_every_type_is_read_whole_and_in_slices(file):
    held, _ = gguf_weights.read(file)
    reference = {
        t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors
    }
    there = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.0.attn_k.weight": "model.layers.0.self_attn.k_proj.weight",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
        "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj.weight",
        "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "blk.0.ffn_gate.weight": "model.layers.0.mlp.gate_proj.weight",
        "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
    }
    assert set(held.shapes()) == set(there.values())
    heads = {"blk.0.attn_q.weight": HEADS, "blk.0.attn_k.weight": KV}
    for stored, name in there.items():
        got = held.read(name)
        assert held.shapes()[name] == got.shape == reference[stored].shape
        again = interleave(got, heads[stored]) if stored in heads else got
        np.testing.assert_array_equal(again, reference[stored])
        rows = slice(got.shape[0] // 3, got.shape[0] // 2)
        columns = slice(5, 77, 3)
        for index in [(rows,), (rows, columns), (slice(None), columns), (slice(7, 7),)]:
            index = index[: got.ndim]
            np.testing.assert_array_equal(held.read(name, index), got[index])


def test_only_the_rows_asked_for_are_dequantised(file, monkeypatch):
    held, _ = gguf_weights.read(file)
    seen = []
    true = gguf.quants.dequantize
    monkeypatch.setattr(gguf_file, "_CHUNK", 3 * WIDTH)
    monkeypatch.setattr(
        gguf.quants, "dequantize", lambda data, kind: (seen.append(len(data)), true(data, kind))[1]
    )
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert held.read(name, (slice(10, 18),)).shape == (8, WIDTH)
    assert seen == [3, 3, 2, 3, 3, 2]  # a few rows at a time, so little memory beside the result


def test_plain_types_and_biases(tmp_path):
    import ml_dtypes

    rng = np.random.default_rng(1)
    tensors = weights()
    kernel = rng.standard_normal((HEADS * SIZE, WIDTH)).astype(np.float16)
    bias = rng.standard_normal(HEADS * SIZE).astype(np.float32)
    tensors["blk.0.attn_q.weight"] = interleave(kernel, HEADS)
    tensors["blk.0.attn_q.bias"] = interleave(bias, HEADS)
    tensors["blk.0.attn_v.weight"] = (tensors["blk.0.attn_v.weight"][0], Kind.BF16)
    tensors["output.weight"] = rng.standard_normal((VOCAB, WIDTH)).astype(np.float32)
    tensors["blk.0.other.weight"] = np.ones(3, np.float32)
    held, config = gguf_weights.read(write(tmp_path / "a.gguf", "llama", LLAMA, tensors))
    assert config["attention_bias"]
    assert not config["tie_word_embeddings"]
    assert held.shapes()["lm_head.weight"] == (VOCAB, WIDTH)
    assert "blk.0.other.weight" in held.shapes()  # not known: left for the caller to report
    got = held.read("model.layers.0.self_attn.q_proj.weight", (slice(3, 9), slice(0, 5)))
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, kernel[3:9, :5])
    np.testing.assert_array_equal(held.read("model.layers.0.self_attn.q_proj.bias"), bias)
    assert held.read("model.layers.0.self_attn.v_proj.weight").dtype == ml_dtypes.bfloat16


def test_qwen2_keeps_the_order_of_its_heads(tmp_path):
    tensors = weights()
    kernel = np.arange(HEADS * SIZE * WIDTH, dtype=np.float32).reshape(-1, WIDTH)
    tensors["blk.0.attn_q.weight"] = kernel
    tensors["blk.0.attn_q.bias"] = kernel[:, 0].copy()
    held, config = gguf_weights.read(write(tmp_path / "a.gguf", "qwen2", LLAMA, tensors))
    assert config["model_type"] == "qwen2"
    np.testing.assert_array_equal(held.read("model.layers.0.self_attn.q_proj.weight"), kernel)


def test_gemma_norms_lose_their_one(tmp_path):
    scale = np.linspace(-0.1, 0.1, WIDTH, dtype=np.float32)
    tensors = weights()
    for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
        tensors[f"blk.0.{name}.weight"] = scale + 1
    tensors["blk.0.attn_q_norm.weight"] = scale[:SIZE] + 1
    tensors["output_norm.weight"] = scale + 1
    metadata = {
        **LLAMA,
        "attention.key_length": SIZE,
        "attention.sliding_window": 16,
        "block_count": 7,
    }
    held, config = gguf_weights.read(write(tmp_path / "a.gguf", "gemma3", metadata, tensors))
    names = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm")
    for name in (*names, "post_feedforward_layernorm"):
        got = held.read(f"model.layers.0.{name}.weight")
        np.testing.assert_allclose(got, scale, atol=1e-7)
    np.testing.assert_allclose(
        held.read("model.norm.weight", (slice(3, 5),)), scale[3:5], atol=1e-7
    )
    assert held.shapes()["model.layers.0.self_attn.q_norm.weight"] == (SIZE,)
    assert config["model_type"] == "gemma3_text"
    assert config["layer_types"] == [
        *["sliding_attention"] * 5,
        "full_attention",
        "sliding_attention",
    ]
    assert (config["sliding_window"], config["query_pre_attn_scalar"]) == (16, SIZE)


def test_gpt2_matrices_are_turned(tmp_path):
    rng = np.random.default_rng(2)
    kernel = rng.standard_normal((8, 24)).astype(np.float32)  # (in, out) at Hugging Face
    metadata = {
        "embedding_length": 8,
        "block_count": 1,
        "attention.head_count": 2,
        "context_length": 16,
        "attention.layer_norm_epsilon": 1e-5,
    }
    tensors = {
        "token_embd.weight": rng.standard_normal((11, 8)).astype(np.float32),
        "position_embd.weight": rng.standard_normal((16, 8)).astype(np.float32),
        "blk.0.attn_qkv.weight": np.ascontiguousarray(kernel.T),
        "blk.0.attn_qkv.bias": kernel[0].copy(),
    }
    held, config = gguf_weights.read(write(tmp_path / "a.gguf", "gpt2", metadata, tensors))
    name = "transformer.h.0.attn.c_attn.weight"
    assert held.shapes()[name] == (8, 24)
    np.testing.assert_array_equal(held.read(name), kernel)
    index = (slice(2, 5), slice(1, 20, 4))
    np.testing.assert_array_equal(held.read(name, index), kernel[index])
    assert (config["n_positions"], config["n_inner"], config["vocab_size"]) == (16, 32, 11)
    assert held.shapes()["transformer.wpe.weight"] == (16, 8)


def test_rotary_scaling(tmp_path):
    factor, half = 8.0, SIZE // 2
    wave = 2 * np.pi * 500000.0 ** (np.arange(half) / half)
    smooth = np.clip((8192 / wave - 1) / 3, 0, 1)
    divisors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    tensors = {**weights(), "rope_freqs.weight": divisors}
    metadata = {**LLAMA, "rope.freq_base": 500000.0}
    held, config = gguf_weights.read(write(tmp_path / "a.gguf", "llama", metadata, tensors))
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in held.shapes()
    tensors["rope_freqs.weight"] = divisors + 0.5
    with pytest.raises(ValueError, match=r"'rope_freqs\.weight' are not those of Llama 3\.1"):
        gguf_weights.read(write(tmp_path / "b.gguf", "llama", metadata, tensors))
    linear = {**LLAMA, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    _, config = gguf_weights.read(write(tmp_path / "c.gguf", "llama", linear, weights()))
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    other = {**linear, "rope.scaling.type": "longrope"}
    with pytest.raises(ValueError, match="scales rotary angles by 'longrope'"):
        gguf_weights.read(write(tmp_path / "d.gguf", "llama", other, weights()))


def test_a_window_makes_it_mistral(tmp_path):
    metadata = {**LLAMA, "attention.sliding_window": 32}
    _, config = gguf_weights.read(write(tmp_path / "a.gguf", "llama", metadata, weights()))
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 32)


def test_truncated_files_name_the_tensor_and_both_sizes(file, tmp_path):
    whole = file.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:-100])
    size = len(whole) - 100
    with pytest.raises(ValueError, match=rf"'blk\.0\.ffn_down\.weight' ends at .* file of {size} "):
        gguf_weights.read(cut)
    for length in (4, 10, 30, 500, 1200):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated or damaged inside its header"):
            gguf_weights.read(cut)


def test_every_broken_header_is_an_error_of_ours(file, tmp_path):
    """No byte of the header can be changed into a crash or an endless loop."""
    whole = bytearray(file.read_bytes())
    broken = tmp_path / "broken.gguf"
    rng = np.random.default_rng(0)
    for place in rng.integers(4, 2000, 150):
        changed = whole.copy()
        changed[place] = rng.integers(0, 256)
        broken.write_bytes(changed)
        with contextlib.suppress(ValueError):  # anything else would be a crash
            gguf_weights.read(broken)


def test_other_bad_files(file, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"nothing\.gguf does not exist"):
        gguf_weights.read(tmp_path / "nothing.gguf")
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        gguf_weights.read(other)
    other.write_bytes(b"")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        gguf_weights.read(other)
    other.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(ValueError, match="GGUF version 1; versions 2 and 3 are read"):
        gguf_weights.read(other)
    with pytest.raises(
        ValueError, match=r"architecture 'mamba'; \['gemma3', 'gpt2', 'llama', 'qwen2'\]"
    ):
        gguf_weights.read(write(tmp_path / "m.gguf", "mamba", LLAMA, weights()))
    lacking = {k: v for k, v in LLAMA.items() if k != "context_length"}
    with pytest.raises(ValueError, match=r"lacks the metadata key 'llama\.context_length'"):
        gguf_weights.read(write(tmp_path / "l.gguf", "llama", lacking, weights()))
    with pytest.raises(ValueError, match="is one of 3 parts"):
        gguf_weights.read(
            write(tmp_path / "p.gguf", "llama", {**LLAMA, "split.count": 3}, weights())
        )
    uneven = {**LLAMA, "attention.head_count_kv": [2, 4]}
    with pytest.raises(ValueError, match=r"'attention\.head_count_kv' is \[2, 4\]"):
        gguf_weights.read(write(tmp_path / "u.gguf", "llama", uneven, weights()))
    partial = {**LLAMA, "rope.dimension_count": 32}
    with pytest.raises(ValueError, match="turns 32 of 64 dimensions"):
        gguf_weights.read(write(tmp_path / "r.gguf", "llama", partial, weights()))
    rng = np.random.default_rng(0)
    block, size = gguf.GGML_QUANT_SIZES[Kind.IQ2_XXS]
    raw = rng.integers(0, 256, (KV * SIZE, WIDTH // block * size), dtype=np.uint8)
    tensors = {**weights(), "blk.0.attn_v.weight": (raw, Kind.IQ2_XXS, None)}
    with pytest.raises(
        ValueError, match=r"tensor 'blk\.0\.attn_v\.weight' has the type IQ2_XXS; F32"
    ):
        gguf_weights.read(write(tmp_path / "q.gguf", "llama", LLAMA, tensors))
    tensors = {k: v for k, v in weights().items() if k != "token_embd.weight"}
    with pytest.raises(ValueError, match=r"lacks the tensor 'token_embd\.weight'"):
        gguf_weights.read(write(tmp_path / "e.gguf", "llama", LLAMA, tensors))

    true = builtins.__import__

    def refuse(name, *rest):
        if name == "gguf":
            raise ImportError("no gguf")
        return true(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="pip install gguf"):
        gguf_weights.read(file)


def test_an_unknown_type_number_is_named(file, tmp_path):
    whole = bytearray(file.read_bytes())
    name = b"blk.0.attn_v.weight"
    place = whole.index(name) + len(name) + 4 + 2 * 8  # after the rank and two sizes
    whole[place : place + 4] = struct.pack("<I", 999)
    (tmp_path / "a.gguf").write_bytes(whole)
    with pytest.raises(
        ValueError, match=r"tensor 'blk\.0\.attn_v\.weight' has the type number 999"
    ):
        gguf_weights.read(tmp_path / "a.gguf")
