"""Marian's own files: a small one written here, damaged ones, and the real students."""

import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import marian_weights, pretrained, tree

D, F, V, ENCODER, DECODER = 8, 12, 20, 2, 1
YML = f"""dec-cell: ssru
dec-depth: {DECODER}
dim-emb: {D}
dim-vocabs:
  - {V}
  - {V}
enc-depth: {ENCODER}
tied-embeddings-all: true
transformer-decoder-autoreg: rnn
transformer-dim-ffn: {F}
transformer-ffn-activation: relu
transformer-heads: 2
transformer-postprocess: dan
transformer-postprocess-top: ""
transformer-preprocess: ""
transformer-train-position-embeddings: false
type: transformer
"""


def matrices(seed=0):
    """Marian name -> float32 matrix (in, out) or row (1, n)."""
    rng = np.random.default_rng(seed)
    out = {"Wemb": (V, D), "decoder_ff_logit_out_b": (1, V)}

    def attention(name):
        for letter in "qkvo":
            out[f"{name}_W{letter}"], out[f"{name}_b{letter}"] = (D, D), (1, D)
        norm(f"{name}_Wo")

    def norm(name):
        out[f"{name}_ln_scale"] = out[f"{name}_ln_bias"] = (1, D)

    def feed(name):
        out[f"{name}_ffn_W1"], out[f"{name}_ffn_b1"] = (D, F), (1, F)
        out[f"{name}_ffn_W2"], out[f"{name}_ffn_b2"] = (F, D), (1, D)
        norm(f"{name}_ffn_ffn")

    for layer in range(1, ENCODER + 1):
        attention(f"encoder_l{layer}_self")
        feed(f"encoder_l{layer}")
    for layer in range(1, DECODER + 1):
        name = f"decoder_l{layer}"
        out[f"{name}_rnn_W"] = out[f"{name}_rnn_Wf"] = (D, D)
        out[f"{name}_rnn_bf"] = (1, D)
        norm(f"{name}_rnn_ffn")
        attention(f"{name}_context")
        feed(name)
    return {n: rng.normal(size=shape).astype(np.float32) for n, shape in out.items()}


def quantised(matrix, name):
    """(stored block, the values that a reader is to find)."""
    multiplier = np.float32(127 / np.abs(matrix).max())
    values = np.round(matrix * multiplier).astype(np.int8)
    stored = values if name == "Wemb" else values.T
    block = stored.tobytes() + multiplier.tobytes() + bytes(252)
    return block, values.astype(np.float32) / multiplier


def blocks(int8=True, yml=YML, seed=0):
    """(name, type, shape, bytes) of each tensor, and what a reader is to find."""
    entries, expected = [], {}
    for name, matrix in matrices(seed).items():
        block, kind, found = matrix.tobytes(), 0x404, matrix
        if int8 and matrix.shape[0] > 1:
            kind, (block, found) = 0x4101, quantised(matrix, name)
        expected[name] = found
        entries.append((name, kind, matrix.shape, block))
    entries.append(("encoder_l1_self_Wq_QuantMultA", 0x404, (1, 1), bytes(256)))
    entries.append(("Wemb_QuantMultA", 0x4101, (1, 1), bytes(256)))
    entries.append(("special:model.yml", 0x101, (len(yml) + 1,), yml.encode() + b"\0"))
    return entries, expected


def write(path, entries, version=1):
    names = [name.encode() + b"\0" for name, *_ in entries]
    data = struct.pack("<QQ", version, len(entries))
    for name, (_, kind, shape, block) in zip(names, entries, strict=True):
        data += struct.pack("<QQQQ", len(name), kind, len(shape), len(block))
    data += b"".join(names)
    for _, _, shape, _ in entries:
        data += struct.pack(f"<{len(shape)}i", *shape)
    padding = -(len(data) + 8) % 256
    data += struct.pack("<Q", padding) + bytes(padding)
    path.write_bytes(data + b"".join(block for *_, block in entries))
    return path


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "float32"])
def test_values_and_settings(tmp_path, int8):
    entries, expected = blocks(int8)
    loaded = pretrained.load(write(tmp_path / "model.bin", entries))
    config = loaded.model.config
    assert (config.cell, config.width, config.heads, config.vocab_size) == ("ssru", D, 2, V)
    assert (config.encoder_layers, config.decoder_layers) == (ENCODER, DECODER)
    assert (config.start_id, config.eos_id, config.embed_scale) == (-1, 0, D**0.5)
    assert config.head.kind == "lm"
    assert not loaded.fresh
    assert not loaded.unused
    flat = tree.flatten(loaded.params)
    for path, layer, name in (
        ("embed/word/table", None, "Wemb"),
        ("encoder/layers/attn/q/kernel", 1, "encoder_l2_self_Wq"),
        ("encoder/layers/ffn/in/kernel", 0, "encoder_l1_ffn_W1"),
        ("encoder/layers/ffn/out/kernel", 1, "encoder_l2_ffn_W2"),
        ("encoder/layers/ffn_norm/scale", 1, "encoder_l2_ffn_ffn_ln_scale"),
        ("decoder/layers/ssru/in/kernel", 0, "decoder_l1_rnn_W"),
        ("decoder/layers/ssru/forget/kernel", 0, "decoder_l1_rnn_Wf"),
        ("decoder/layers/ssru/forget/bias", 0, "decoder_l1_rnn_bf"),
        ("decoder/layers/cross/v/kernel", 0, "decoder_l1_context_Wv"),
        ("decoder/layers/cross_norm/bias", 0, "decoder_l1_context_Wo_ln_bias"),
        ("head/bias", None, "decoder_ff_logit_out_b"),
    ):
        leaf = flat[path] if layer is None else flat[path][layer]
        wanted = expected[name]
        wanted = wanted[0] if wanted.shape[0] == 1 else wanted
        np.testing.assert_array_equal(leaf, wanted, err_msg=path)


def test_saved_and_loaded_again(tmp_path):
    """In a format of our own, which says so in its model_type."""
    loaded = pretrained.load(write(tmp_path / "model.bin", blocks()[0]))
    pretrained.save(tmp_path / "out", loaded.model, loaded.params)
    again = pretrained.load(tmp_path / "out")
    assert again.model.config == loaded.model.config
    assert not again.fresh
    assert not again.unused
    flat = tree.flatten(again.params)
    for path, leaf in tree.flatten(loaded.params).items():
        np.testing.assert_array_equal(leaf, flat[path], err_msg=path)
    assert '"model_type": "marian_ssru"' in (tmp_path / "out" / "config.json").read_text()


def forward(expected, source, target):
    """The network in numpy, written from the format's description; logits [U, V]."""
    e = {n: a.astype(np.float64) for n, a in expected.items()}
    angles = np.arange(16)[:, None] * np.exp(-np.arange(D // 2) * np.log(1e4) / (D // 2 - 1))
    sinusoid = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * e[f"{name}_ln_scale"] + e[f"{name}_ln_bias"]

    def attention(x, memory, name):
        q, k, v = (
            (m @ e[f"{name}_W{n}"] + e[f"{name}_b{n}"]).reshape(len(m), 2, D // 2).swapaxes(0, 1)
            for m, n in ((x, "q"), (memory, "k"), (memory, "v"))
        )
        scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(D // 2))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        out = mixed.swapaxes(0, 1).reshape(len(x), D) @ e[f"{name}_Wo"] + e[f"{name}_bo"]
        return norm(x + out, f"{name}_Wo")

    def feed(x, name):
        inner = np.maximum(x @ e[f"{name}_ffn_W1"] + e[f"{name}_ffn_b1"], 0)
        return norm(x + inner @ e[f"{name}_ffn_W2"] + e[f"{name}_ffn_b2"], f"{name}_ffn_ffn")

    x = e["Wemb"][source] * np.sqrt(D) + sinusoid[: len(source)]
    for layer in range(1, ENCODER + 1):
        x = feed(attention(x, x, f"encoder_l{layer}_self"), f"encoder_l{layer}")
    y = np.concatenate([np.zeros((1, D)), e["Wemb"][target[:-1]] * np.sqrt(D)])
    y = y + sinusoid[: len(target)]
    for layer in range(1, DECODER + 1):
        name, cell, outputs = f"decoder_l{layer}", np.zeros(D), []
        for token in y:
            f = 1 / (1 + np.exp(-(token @ e[f"{name}_rnn_Wf"] + e[f"{name}_rnn_bf"][0])))
            cell = f * cell + (1 - f) * (token @ e[f"{name}_rnn_W"])
            outputs.append(np.maximum(cell, 0))
        y = norm(y + np.array(outputs), f"{name}_rnn_ffn")
        y = feed(attention(y, x, f"{name}_context"), name)
    return y @ e["Wemb"].T + e["decoder_ff_logit_out_b"]


def test_the_forward_pass_of_the_description(tmp_path):
    entries, expected = blocks()
    loaded = pretrained.load(write(tmp_path / "model.bin", entries))
    source, target = np.array([3, 5, 8, 0]), np.array([7, 2, 11, 4, 0])
    batch = {"input_ids": source[None], "labels": target[None]}
    logits = jax.jit(loaded.model.apply)(loaded.params, batch).logits[0]
    np.testing.assert_allclose(logits, forward(expected, source, target), atol=2e-5, rtol=1e-5)


def test_damaged_files_are_named(tmp_path):
    path = write(tmp_path / "model.bin", blocks()[0])
    whole = path.read_bytes()

    def rejects(match, data=None, entries=None, **options):
        if entries is not None:
            write(path, entries, **options)
        else:
            path.write_bytes(data)
        with pytest.raises(ValueError, match=match):
            marian_weights.read(path)

    rejects(rf"truncated: tensor 'special:model.yml' ends at byte {len(whole)}", whole[:-5])
    rejects("truncated: its header needs", whole[:2000])
    rejects("truncated: .* tensors need a header", whole[:100])
    rejects("truncated: its header needs 16 bytes, the file has 3", whole[:3])
    rejects("truncated: its header needs 16 bytes, the file has 0", b"")
    rejects("no Marian model of version 1: it starts with 0x4034b50", b"PK\3\4" + bytes(60))
    rejects("version 1: it starts with 0x2", entries=blocks()[0], version=2)
    entries, _ = blocks()
    name, _, shape, block = entries[3]
    odd = [*entries[:3], (name, 0x4102, shape, block), *entries[4:]]
    rejects(f"tensor '{name}' has the type 0x4102", entries=odd)
    short = [*entries[:3], (name, 0x404, shape, bytes(8)), *entries[4:]]
    rejects(rf"tensor '{name}' of shape .* needs \d+ bytes, its block has 8", entries=short)
    rejects("holds no special:model.yml", entries=entries[:-1])
    rejects(f"lacks the tensor '{name}'", entries=entries[:3] + entries[4:])
    gru = blocks(yml=YML.replace("dec-cell: ssru", "dec-cell: gru"))[0]
    rejects("dec-cell is 'gru'; of Marian's own files only those with 'ssru'", entries=gru)
    none = blocks(yml=YML.replace("dim-emb: 8", "dim-emb: wide"))[0]
    rejects("gives no number for dim-emb", entries=none)
    wide = blocks(yml=YML.replace("dim-emb: 8", "dim-emb: 16"))[0]
    rejects(r"Wemb has shape \(20, 8\), but dim-emb is 16", entries=wide)
    with pytest.raises(FileNotFoundError):
        marian_weights.read(tmp_path / "none.bin")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "translation"),
    [
        (
            "marian-en-pt",
            "The weather is beautiful today and we are going to the beach.",
            "O tempo é bonito hoje e nós estamos indo para a praia.",
        ),
        (
            "marian-pt-en",
            "O tempo é bonito hoje e nós estamos indo para a praia.",
            "The weather is beautiful today and we are going to the beach.",
        ),
    ],
)
def test_a_real_student_translates(asset, name, text, translation):
    tokenizers = pytest.importorskip("tokenizers")
    folder = asset(name)
    loaded = pretrained.load(folder / "model.bin")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    eos = loaded.model.config.eos_id
    ids = np.array([[*tokenizer.encode(text).ids, eos]], np.int32)
    start = jax.jit(loaded.model.decode.start, static_argnums=2)
    step = jax.jit(loaded.model.decode.step)
    logits, state = start(loaded.params, {"input_ids": ids}, 40)
    out = []
    for _ in range(40):
        token = logits.argmax(-1).astype(jnp.int32)
        if int(token[0]) == eos:
            break
        out.append(int(token[0]))
        logits, state = step(loaded.params, token, state)
    assert tokenizer.decode(out) == translation
