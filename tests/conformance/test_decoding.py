"""What generation must do by every kind of model: caches, meshes, overlays, bf16, programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import decoding
from steppe.models.decoder import DecoderConfig
from steppe.models.decoding import Settings
from steppe.models.heads import HeadConfig
from steppe.models.overlays import lora
from steppe.train import mesh

V, NEW = 48, 10
COMMON = {
    "vocab_size": V,
    "width": 16,
    "layers": 2,
    "heads": 4,
    "ffn_width": 32,
    "positions": 64,
    "head": HeadConfig("lm"),
}
CONFIGS = {
    "llama": DecoderConfig("llama", kv_heads=2, **COMMON),
    "gpt2": DecoderConfig(
        "gpt2",
        norm="layer",
        act="gelu_tanh",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        rotary=None,
        tied=True,
        **COMMON,
    ),
}
MIXED = Settings(
    max_new_tokens=[NEW, 7, NEW, 9, 3, NEW, 8, 1],
    temperature=[0, 1, 0.7, 0, 1, 0, 2, 0],
    top_p=[1, 0.9, 1, 1, 0.5, 1, 1, 1],
    top_k=[0, 0, 5, 0, 0, 0, 7, 0],
    repetition_penalty=[1, 1, 1, 1.3, 1, 1, 1, 1],
    seed=list(range(8)),
)


def build(name):
    model = CONFIGS[name].build()
    params = jax.jit(model.init)(jax.random.key(0))
    return model, jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)


@pytest.fixture(scope="module")
def base():
    return build("llama")


@pytest.fixture(scope="module")
def prompts_ids():
    rng = np.random.default_rng(0)
    return [rng.integers(1, V, n).tolist() for n in (3, 9, 1, 5, 7, 2, 8, 4)]


@pytest.fixture(scope="module")
def batch(prompts_ids):
    return decoding.pad_prompts(prompts_ids)


@pytest.fixture(scope="module")
def plain(base, batch):
    return decoding.generate(*base, batch, MIXED)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_equals_the_full_forward_pass(name, base, batch, plain, prompts_ids):
    """Greedy rows take the largest logit of a pass over everything before; scores agree."""
    model, params = base if name == "llama" else build(name)
    out = plain if name == "llama" else decoding.generate(model, params, batch, MIXED)
    rows = [row[:n].tolist() for row, n in zip(out.tokens, out.lengths)]
    found = decoding.score(model, params, prompts_ids, rows)
    np.testing.assert_allclose(found.tokens, out.logprobs, atol=2e-4)
    assert found.greedy[[0, 5, 7]].all()
    assert out.lengths.tolist() == MIXED.max_new_tokens


def test_streaming_and_stops(base, batch, plain):
    seen = []
    out = decoding.generate(
        *base, batch, MIXED, on_token=lambda step, tokens: seen.append(tokens), every=3
    )
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_array_equal(out.logprobs, plain.logprobs)
    np.testing.assert_array_equal(np.stack(seen, 1), plain.tokens)
    text = ",".join(map(str, plain.tokens[0].tolist()))
    out = decoding.generate(
        *base, batch, MIXED, stop=text[5:9], decode=lambda ids: ",".join(map(str, ids))
    )
    assert out.texts[0] == text[: text.find(text[5:9])]
    for i in (i for i in range(8) if out.reasons[i] == "length"):
        np.testing.assert_array_equal(
            out.tokens[i, : out.lengths[i]], plain.tokens[i, : plain.lengths[i]]
        )


def test_on_a_mesh(base, batch, plain):
    """The same tokens from sharded parameters; streaming compiles no second loop."""
    model, params = base
    plan = mesh.plan({"data": 4, "model": 2}, model.axes)
    placed = plan.place(params)
    rows = jax.sharding.NamedSharding(plan.mesh, jax.sharding.PartitionSpec("data"))
    run = decoding.make(model)
    for options in ({}, {"on_token": lambda *_: None, "every": 3}):
        out = run(placed, batch, MIXED, sharding=rows, **options)
        np.testing.assert_array_equal(out.tokens, plain.tokens)
        np.testing.assert_allclose(out.logprobs, plain.logprobs, atol=1e-4)
    assert run.compiles <= 3


def test_in_bf16(base, batch, plain):
    model, params = base
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    out = decoding.generate(model, half, batch, MIXED)
    first = out.tokens[:, 0] == plain.tokens[:, 0]
    np.testing.assert_allclose(out.logprobs[first, 0], plain.logprobs[first, 0], atol=0.3)
    assert first.sum() >= 4


def test_under_lora(base, batch, plain):
    """The neutral overlay changes nothing; another one is scored as it generates."""
    model, params = base
    overlay = lora.overlay(rank=2)
    bound = overlay.bind(model)
    delta = overlay.init(jax.random.key(1), params)
    full = {"base": params, "overlay": delta}
    np.testing.assert_array_equal(decoding.generate(bound, full, batch, MIXED).tokens, plain.tokens)
    moved = {**full, "overlay": jax.tree.map(lambda x: x + 0.3, delta)}
    out = decoding.generate(bound, moved, batch, MIXED)
    assert (out.tokens != plain.tokens).any()
    assert decoding.shared(bound).compiles == 2


def test_beams(base, batch, prompts_ids):
    found = decoding.beam_search(*base, batch, beams=3, best=2, max_new_tokens=6, eos_id=3)
    for k in range(2):
        rows = [row[:n].tolist() for row, n in zip(found.tokens[:, k], found.lengths[:, k])]
        total = decoding.score(*base, prompts_ids, rows).total
        np.testing.assert_allclose(found.scores[:, k], total / found.lengths[:, k], atol=2e-4)
