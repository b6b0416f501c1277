"""Quantised models on disk: every integer comes back, in as few bytes as promised."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import fake_quant as fq
from steppe.models import integer, packed, pretrained, quantized, tree
from steppe.models.decoder import DecoderConfig
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.quantized import QuantConfig

from .conftest import TINY

MODEL = TINY.build()


@pytest.mark.parametrize("bits", range(2, 9))
def test_bits_there_and_back(bits):
    rng = np.random.default_rng(bits)
    half = 1 << (bits - 1)
    for shape in ((3, 5, 7), (1,), (0, 4), (2, 16)):
        q = rng.integers(-half, half, shape).astype(np.int8)
        data = packed.pack(q, bits)
        assert data.nbytes == -(-q.size * bits // 8)
        np.testing.assert_array_equal(packed.unpack(data, bits, shape), q)


def test_pieces_are_the_whole(monkeypatch):
    q = np.random.default_rng(0).integers(-4, 4, (9, 11)).astype(np.int8)
    whole = packed.pack(q, 3)
    monkeypatch.setattr(packed, "PIECE", 16)
    np.testing.assert_array_equal(packed.pack(q, 3), whole)
    np.testing.assert_array_equal(packed.unpack(whole, 3, q.shape), q)


def test_the_lowest_bit_comes_first():
    np.testing.assert_array_equal(packed.pack(np.array([-8, -7, 7]), 4), [0x10, 0x0F])


def test_what_is_packed_is_bytes():
    with pytest.raises(ValueError, match=r"packed integers are bytes \(uint8\), got float32"):
        packed.unpack(np.zeros(2, np.float32), 4, (4,))


def test_what_trains_needs_floats(tiny, tmp_path):
    _, params = tiny
    rules = quantized.parse("w4a8")
    folder = packed.save(tmp_path / "q", MODEL, quantized.quantize(params, rules), rules)
    with pytest.raises(ValueError, match="holds a quantized model, .* needs the float model"):
        pretrained.load(folder)


def test_integers_that_do_not_fit():
    with pytest.raises(ValueError, match=r"q must lie in -4\.\.3 for 3 bits"):
        packed.pack(np.array([4]), 3)
    with pytest.raises(ValueError, match="5 integers of 3 bits take 2 bytes, got 3"):
        packed.unpack(np.zeros(3, np.uint8), 3, (5,))
    with pytest.raises(ValueError, match="bits must be 2 to 8, got 32"):
        packed.pack(np.zeros(1), 32)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g8", "w3a16", "w2a8"])
def test_a_folder_gives_the_model_back(tiny, batch, tmp_path, scheme):
    _, params = tiny
    rules = quantized.rules(quantized.parse(scheme), quantize_head=True)
    grids = quantized.quantize(params, rules)
    folder = packed.save(tmp_path / "q", MODEL, grids, rules, labels=("a", "b", "c"))
    assert packed.is_packed(folder)
    held = packed.load(folder)
    assert held.model.config == TINY
    assert held.labels == ("a", "b", "c")
    assert held.model.stored == "rounded"
    for path, leaf in tree.flatten(quantized.dequantize(grids)).items():
        np.testing.assert_array_equal(tree.get(held.params, path), leaf)
    integers = packed.load(folder, integers=True)
    for path, leaf in tree.flatten(grids).items():
        np.testing.assert_array_equal(tree.get(integers.params, path), leaf)
        assert tree.get(integers.params, path).dtype == leaf.dtype
    if scheme == "w8a8":

        def logits(model, params):
            return jax.jit(lambda p: model.apply(p, batch).logits)(params)

        fake = logits(quantized.wrap(MODEL, rules), params)
        np.testing.assert_allclose(logits(held.model, held.params), fake, atol=1e-5)
        np.testing.assert_allclose(logits(integers.model, integers.params), fake, atol=5e-3)


REAL = {
    "encoder": EncoderConfig(
        "bert", vocab_size=60, width=384, layers=2, heads=12, ffn_width=1536, positions=16, types=2
    ),
    "decoder": DecoderConfig(
        "llama", vocab_size=60, width=576, layers=2, heads=9, kv_heads=3, ffn_width=1536,
        positions=16, head=HeadConfig("lm"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize(
    ("scheme", "most"), [("w8a8", 0.27), ("w4a8", 0.16), ("w4a8-g64", 0.16), ("w4a16-g32", 0.16)]
)
def test_bytes_of_kernels_of_real_shapes(kind, scheme, most, tmp_path):
    model = REAL[kind].build()
    config = quantized.parse(scheme)
    made = jax.jit(integer.wrap(model, config).init)(jax.random.key(0))
    folder = packed.save(tmp_path / "q", model, made, config)
    size = packed.sizes(folder)
    assert size.float32 == sum(
        4 * leaf.size for p, leaf in tree.flatten(model.abstract()).items() if p.endswith("kernel")
        and p.startswith("layers")
    )  # fmt: skip
    assert size.ratio <= most
    whole = (folder / "model.safetensors").stat().st_size
    others = sum(leaf.nbytes for p, leaf in tree.flatten(made).items() if "/kernel/" not in p)
    # Nothing but the header comes on top.
    assert whole - others <= size.packed + 8000
    assert (whole - others) / size.float32 <= most


def test_floats_can_be_halved(tiny, tmp_path):
    _, params = tiny
    config = QuantConfig(8, 8, a_mode="static")
    grids = quantized.quantize(params, config)
    sites = [quantized.site_of(p) for p in quantized.resolve(MODEL, config)]
    extra = {s: {"low": jnp.full(4, -1.1), "high": jnp.full(4, 1.3)} for s in sorted(sites)}
    grids = quantized.requant(grids, extra)
    folder = packed.save(tmp_path / "q", MODEL, grids, config, float_dtype="bfloat16")
    held = packed.load(folder, integers=True).params
    assert held["embed"]["word"]["table"].dtype == jnp.bfloat16
    assert held["layers"]["attn"]["q"]["kernel"]["scale"].dtype == jnp.float32
    np.testing.assert_array_equal(held["quant"]["layers"]["attn.q"]["low"], extra["attn.q"]["low"])


def test_fields_that_config_json_lacks_are_kept(tmp_path):
    config = dataclasses.replace(REAL["encoder"], width=16, heads=2, ffn_width=8, unroll=1)
    model = config.build()
    rules = quantized.parse("w8a8")
    grids = jax.jit(integer.wrap(model, rules).init)(jax.random.key(0))
    folder = packed.save(tmp_path / "q", model, grids, rules, notes={"method": "rtn"})
    assert packed.load(folder).model.config == config
    assert json.loads((folder / packed.FILE).read_text())["notes"] == {"method": "rtn"}


def test_bad_folders(tiny, tmp_path):
    _, params = tiny
    rules = quantized.parse("w4a8")
    with pytest.raises(ValueError, match="layers/attn/k/kernel' that the quantised model lacks"):
        packed.save(tmp_path / "float", MODEL, params, rules)
    assert not (tmp_path / "float").exists()
    grids = quantized.quantize(params, rules)
    wide = tree.replace(
        grids, {"layers/ffn/in/kernel/q": fq.quantize(params["layers"]["ffn"]["in"]["kernel"], 8).q}
    )
    with pytest.raises(ValueError, match=r"q must lie in -8\.\.7 for 4 bits"):
        packed.save(tmp_path / "wide", MODEL, wide, rules)
    with pytest.raises(FileNotFoundError, match=r"holds no quantized\.json"):
        packed.load(tmp_path)
    folder = packed.save(tmp_path / "q", MODEL, grids, rules)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(FileExistsError, match="already holds"):
        packed.save(tmp_path / "mine", MODEL, grids, rules)
    record = json.loads((folder / packed.FILE).read_text())
    (folder / packed.FILE).write_text(json.dumps({**record, "format": 2}))
    with pytest.raises(ValueError, match="has format 2, this version reads 1: update steppe"):
        packed.load(folder)
    first = next(iter(record["kernels"]))
    for bits, says in ((3, r"integers of 3 bits take \d+ bytes"), ("four", "got 'four'")):
        kernels = {**record["kernels"], first: {**record["kernels"][first], "bits": bits}}
        (folder / packed.FILE).write_text(json.dumps({**record, "kernels": kernels}))
        with pytest.raises(ValueError, match=rf"q/quantized\.json .* kernel '{first}': .*{says}"):
            packed.load(folder)
    (folder / packed.FILE).write_text(json.dumps(record))
    held = (folder / "config.json").read_text()
    (folder / "config.json").write_text(held[:20])
    with pytest.raises(ValueError, match=r"q/config\.json is damaged .*: save it again"):
        packed.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="does not describe a quantised model"):
        packed.load(folder)
    (folder / "config.json").write_text(held)
    for key, value in (("kernels", []), ("config", [1]), ("rules", [["(", None]])):
        (folder / packed.FILE).write_text(json.dumps({**record, key: value}))
        with pytest.raises(ValueError, match="does not describe a quantised model"):
            packed.load(folder)
    record["rules"][0][1]["w_bits"] = 3
    (folder / packed.FILE).write_text(json.dumps(record))
    with pytest.raises(
        ValueError, match="contradicts itself: .* stored in 4 bits, its rule says 3"
    ):
        packed.load(folder)
    record["rules"][0][1]["w_bits"] = 11
    (folder / packed.FILE).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"does not describe a quantised model: w_bits must be"):
        packed.load(folder)
    (folder / packed.FILE).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        packed.load(folder)
