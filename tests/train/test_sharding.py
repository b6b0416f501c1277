"""Rule tables cover every family and what shadows its parameters; slices stay whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from steppe import optim
from steppe.models import tree
from steppe.models.clip import ClipConfig
from steppe.models.clip_text import ClipTextConfig
from steppe.models.decoder import DecoderConfig
from steppe.models.encoder import EncoderConfig
from steppe.models.families import FAMILIES
from steppe.models.heads import HeadConfig
from steppe.models.overlays import adapter, bitfit, compacter, ia3, lora, prefix, prompt
from steppe.models.seq2seq import Seq2SeqConfig
from steppe.models.vision import VisionConfig
from steppe.train import distill, mesh, sharding, step

ENCODER = {"vocab_size": 32, "width": 16, "layers": 2, "heads": 4, "ffn_width": 32}
ENCODER |= {"positions": 16, "head": HeadConfig("mlm")}
LM = {**ENCODER, "head": HeadConfig("lm"), "kv_heads": 2}
GPT = {"rotary": None, "norm": "layer", "gated": False, "qkv_bias": True, "out_bias": True}
BOTH = {"vocab_size": 32, "width": 16, "heads": 4, "ffn_width": 32, "positions": 16}
BOTH |= {"encoder_layers": 2, "decoder_layers": 2, "head": HeadConfig("lm")}
POST = {"pre_norm": False, "rms": False, "use_bias": True, "head_bias": "trained"}
VIT = VisionConfig(
    "vit", image_size=8, patch=4, width=16, layers=2, heads=4, ffn_width=32,
    head=HeadConfig("classification", 3, None, 0.0),
)  # fmt: skip
TEXT = ClipTextConfig(
    vocab_size=32, width=16, layers=2, heads=4, ffn_width=32, positions=8, end_id=3
)
CONFIGS = {
    "bert": EncoderConfig("bert", **ENCODER, types=2),
    "roberta": EncoderConfig(
        "roberta", **ENCODER | {"head": HeadConfig("classification", 2, "tanh")}
    ),
    "distilbert": EncoderConfig(
        "distilbert", **ENCODER | {"head": HeadConfig("classification", 2, "relu")}
    ),
    "mpnet": EncoderConfig("mpnet", **ENCODER, relative_buckets=8, pooler=True),
    "llama": DecoderConfig("llama", **LM),
    "qwen2": DecoderConfig("qwen2", **LM, qkv_bias=True),
    "mistral": DecoderConfig("mistral", **LM, window=4),
    "gemma3_text": DecoderConfig(
        "gemma3_text", **LM, norm="rms1", qk_norm=True, post_norms=True, tied=True
    ),
    "gpt2": DecoderConfig("gpt2", **LM, **GPT, ffn_bias=True, act="gelu_tanh", tied=True),
    "t5": Seq2SeqConfig("t5", **BOTH, gated=True, tied=False),
    "bart": Seq2SeqConfig("bart", **BOTH, **POST, position_kind="learned", embed_norm=True),
    "marian": Seq2SeqConfig("marian", **BOTH, **POST, position_kind="sinusoidal"),
    "marian_ssru": Seq2SeqConfig(
        "marian_ssru", **BOTH, **POST, position_kind="timing", cell="ssru"
    ),
    "vit": dataclasses.replace(VIT, pooler=True),
    "dinov2": dataclasses.replace(VIT, family="dinov2", layer_scale=0.5, mask_token=True),
    "dinov2_with_registers": dataclasses.replace(
        VIT, family="dinov2_with_registers", layer_scale=0.5, registers=2, gated=True
    ),
    "clip": ClipConfig(
        dataclasses.replace(VIT, head=None, projection=8), dataclasses.replace(TEXT, projection=8)
    ),
    "clip_vision_model": dataclasses.replace(VIT, family="clip_vision_model", head=None),
    "clip_text_model": TEXT,
}


def specs(tree_):
    return {p: s.spec for p, s in tree.flatten(tree_).items()}


def test_there_is_a_configuration_for_every_family():
    assert set(CONFIGS) == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_rules_cover_a_family_and_split_its_layers_over_fsdp_and_model(name):
    model = CONFIGS[name].build()
    params = model.abstract()
    sharding.check(model.axes, params)
    plan = mesh.abstract({"data": 2, "fsdp": 2, "model": 4}, model.axes)
    found = specs(plan.shardings(params))
    kernels = [p for p in found if tree.is_stacked(p) and p.endswith("kernel")]
    assert kernels
    for path in kernels:
        assert set(found[path]) == {None, "fsdp", "model"}, path
    # No rule is a dead letter everywhere: each table has been read for its own family.
    whole = sum(tree.get(params, p).size for p in found if not any(found[p]))
    assert whole < 0.2 * tree.count(params)


def test_moments_averages_and_masks_lie_like_their_parameters_in_every_table():
    for name in ("bert", "gemma3_text", "marian_ssru", "dinov2_with_registers"):
        model = CONFIGS[name].build()
        plan = mesh.abstract({"fsdp": 2, "model": 2}, model.axes)
        tx = optim.fsam(optax.adamw(1e-3), 0.05, keep_ratio=0.5)
        state = step.abstract(model, tx, plan, ema=0.9)
        wanted = plan.shardings(state.params)
        assert jax.tree.map(lambda x: x.sharding, state.extra["ema"]) == wanted
        leaves = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
        named = [(jax.tree_util.keystr(keys), leaf) for keys, leaf in leaves]
        shadows = [(path, leaf) for path, leaf in named if "['layers']" in path]
        assert len(shadows) >= 3 * len([p for p in tree.flatten(wanted) if tree.is_stacked(p)])
        flat = tree.flatten(wanted)
        for path, leaf in shadows:
            own = next((s for p, s in flat.items() if _ends(path, p)), None)
            assert own is not None, path
            assert leaf.sharding == own, path


def _ends(keys, path):
    return keys.endswith("".join(f"['{part}']" for part in path.split("/")))


@pytest.mark.parametrize(
    "overlay",
    [
        lora.overlay(rank=2, sites=("attn.q", "attn.o", "ffn.in", "ffn.out")),
        prefix.overlay(length=2),
        prompt.overlay(length=2),
        adapter.overlay(),
        compacter.overlay(n=2, reduction=4),
        ia3.overlay(),
        bitfit.overlay(),
    ],
    ids=lambda o: o.name,
)
def test_rules_cover_overlays_and_a_teacher_beside_them(overlay):
    bare = CONFIGS["qwen2"].build()
    bound = overlay.bind(bare)
    teacher = distill.Teacher(bare, bare.abstract())
    both = distill.with_teacher(bound, teacher)
    params = {"student": bound.abstract(), "teacher": teacher.params}
    sharding.check(both.axes, params)
    found = specs(mesh.abstract({"fsdp": 2, "model": 2}, both.axes).shardings(params))
    q = "layers/attn/q/kernel"
    assert (
        found[f"student/base/{q}"] == found[f"teacher/{q}"] == PartitionSpec(None, "fsdp", "model")
    )


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


RULES = CONFIGS["llama"].build().axes


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        ("layers/ffn/up/kernel", (2, 16, 32), (None, "fsdp", "model")),
        ("layers/ffn/down/kernel", (2, 32, 16), (None, "model", "fsdp")),
        # A stack of experts: layers and experts first.
        ("layers/moe/weights", (2, 8, 16, 32), (None, None, "fsdp", "model")),
        ("layers/gate", (2, 16), (None, None)),
        ("scale", (16,), (None,)),
    ],
)
def test_an_uncovered_leaf_is_named_with_a_rule_that_covers_it(path, shape, axes):
    params = tree.unflatten({path: shaped(*shape)})
    assert sharding.uncovered(RULES, params) == {path: shape}
    rule = repr((path, axes))
    with pytest.raises(ValueError, match="no sharding rule covers") as raised:
        sharding.check(RULES, params)
    assert rule in str(raised.value)
    with pytest.raises(ValueError, match=f"no sharding rule covers '{path}'") as raised:
        mesh.abstract({"fsdp": 2, "model": 2}, RULES).shardings(params)
    assert rule in str(raised.value)
    plan = mesh.abstract({"fsdp": 2, "model": 2}, (*RULES, (path, axes)))
    assert plan.sharding(path, shape).spec == PartitionSpec(*_cut(axes))


def _cut(axes):
    out = list(axes)
    while out and out[-1] is None:
        out.pop()
    return out


def test_an_axis_that_does_not_divide_a_dimension_comes_with_the_nearest_sizes():
    with pytest.raises(ValueError, match="size 50257") as raised:
        mesh.abstract({"model": 2}, RULES).sharding("embed/word/table", (50257, 16))
    for word in ("dimension 0 of 'embed/word/table'", "1 or 29", "50256 or 50258"):
        assert word in str(raised.value)
    assert sharding.near(12, 5) == [4, 6]
    assert sharding.near(7, 8) == [7]


def test_an_abstract_plan_has_the_shardings_of_a_real_one():
    real = mesh.plan({"fsdp": 4, "model": 2}, RULES)
    far = mesh.abstract({"fsdp": 4, "model": 2}, RULES)
    assert isinstance(far.mesh, AbstractMesh)
    params = CONFIGS["llama"].build().abstract()
    assert specs(real.shardings(params)) == specs(far.shardings(params))
    huge = mesh.abstract({"data": 64, "fsdp": 4, "model": 2}, RULES)
    assert huge.data_size == 256
    kernel = huge.sharding("layers/ffn/in/kernel", (2, 16, 32))
    assert kernel.shard_shape((2, 16, 32)) == (2, 4, 16)


@dataclasses.dataclass(frozen=True)
class Chip:
    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "fake"


def test_slices_are_outermost_along_the_axis_that_runs_across_them():
    chips = [Chip(i, i // 4) for i in range(8)]
    found = mesh.arrange({"data": 4, "model": 2}, {"data": 2}, chips)
    slices = np.vectorize(lambda c: c.slice_index)(found)
    np.testing.assert_array_equal(slices, [[0, 0], [0, 0], [1, 1], [1, 1]])
    inner = mesh.arrange({"fsdp": 2, "data": 4}, {"data": 2}, chips)
    slices = np.vectorize(lambda c: c.slice_index)(inner)
    np.testing.assert_array_equal(slices, [[0, 0, 1, 1], [0, 0, 1, 1]])
    # Devices that do not know their slice: equal consecutive blocks.
    plain = mesh.arrange({"fsdp": 2, "data": 4}, {"data": 2}, list(range(8)))
    np.testing.assert_array_equal(plain, [[0, 1, 4, 5], [2, 3, 6, 7]])


def test_a_hybrid_mesh_computes_what_a_plain_one_does():
    plan = mesh.plan({"data": 4, "model": 2}, RULES, slices={"data": 2})
    assert dict(plan.mesh.shape) == {"data": 4, "model": 2}
    rows = plan.batch({"x": np.arange(8.0).reshape(8, 1)})["x"]
    assert float(jax.jit(lambda x: x.sum())(rows)) == 28.0


@pytest.mark.parametrize(
    ("slices", "words"),
    [
        ({"data": 3}, "axis 'data' of mesh .* cannot run across 3 slices"),
        ({"fsdp": 2}, "axis 'fsdp'"),
        ({"data": 4}, "are 4, but the devices are on 2"),
    ],
)
def test_slices_that_do_not_fit_are_refused(slices, words):
    chips = [Chip(i, i // 4) for i in range(8)]
    with pytest.raises(ValueError, match=words):
        mesh.arrange({"data": 4, "model": 2}, slices, chips)
