"""Students cut out of teachers compute what the teacher computes with the rest masked out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import pretrained, shrink, tree
from steppe.models.decoder import DecoderConfig
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.model import Masks
from steppe.models.rotary import Rotary
from steppe.models.vision import VisionConfig

ENCODER = EncoderConfig(
    "bert", 50, 24, 4, 6, 20, 20, types=2, pooler=True, head=HeadConfig("classification", 3)
)
CONFIGS = {
    "bert": ENCODER,
    "mpnet": dataclasses.replace(ENCODER, family="mpnet", types=0, relative_buckets=8),
    "llama": DecoderConfig("llama", 50, 24, 4, 6, 20, 32, kv_heads=3, head=HeadConfig("lm", 1)),
    "gpt2": DecoderConfig(
        "gpt2", 50, 24, 4, 6, 20, 32, norm="layer", act="gelu_tanh", gated=False, qkv_bias=True,
        out_bias=True, ffn_bias=True, rotary=None, tied=True, head=HeadConfig("lm", 1),
    ),
    "gemma3_text": DecoderConfig(
        "gemma3_text", 50, 24, 4, 6, 20, 32, kv_heads=2, head_dim=8, norm="rms1", qk_norm=True,
        post_norms=True, window=3, windowed=(True, True, False, True),
        local_rotary=Rotary(base=100.0), tied=True, head=HeadConfig("lm", 1),
    ),
}  # fmt: skip


def random(model):
    """Parameters that are all away from their neutral values."""
    flat = tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    made = {
        p: jnp.asarray(0.3 * rng.normal(size=x.shape) + ("scale" in p), jnp.float32)
        for p, x in flat.items()
    }
    return tree.unflatten(made)


@pytest.fixture(scope="module", params=CONFIGS)
def teacher(request):
    model = CONFIGS[request.param].build()
    return model, random(model)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    mask = np.ones((3, 7), np.int32)
    mask[1, 4:] = 0
    return {"input_ids": rng.integers(1, 50, (3, 7)).astype(np.int32), "attention_mask": mask}


def out(model, params, batch, **options):
    found = jax.jit(lambda p: model.apply(p, batch, **options)[:2])(params)
    return [np.asarray(x) for x in found]


def staged(model, params, batch, ranges, masks=None):
    """Logits after some of the teacher's own layers."""

    def run(params):
        inputs = model.parts.embed(params, batch)
        hidden = inputs.hidden
        for start, stop in ranges:
            inputs = inputs._replace(hidden=hidden)
            hidden = model.parts.layers(params, inputs, start=start, stop=stop, masks=masks)
        return model.parts.head(params, hidden, inputs)

    return np.asarray(jax.jit(run)(params))


def same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)


def on(index, shape):
    mask = np.zeros(shape, np.float32)
    np.put_along_axis(mask, np.broadcast_to(index, (shape[0], np.shape(index)[-1])), 1.0, 1)
    return jnp.asarray(mask)


def groups_of(model):
    return getattr(model.config, "groups", model.config.heads)


def test_layers(teacher, batch):
    model, params = teacher
    made = shrink.keep_layers(model, params, (0, 2, 3))
    assert made.model.config.layers == 3
    logits = staged(model, params, batch, ((0, 1), (2, 4)))
    found = out(made.model, made.params, batch)
    same(found[:1], [logits])
    if isinstance(model.config, DecoderConfig):  # norms first: a masked layer is no layer
        masks = Masks(layer=jnp.asarray([1.0, 0.0, 1.0, 1.0]))
        same(found, out(model, params, batch, masks=masks))
    if model.config.family == "gemma3_text":
        assert made.model.config.windowed == (True, False, True)


def test_all_layers_are_the_teacher(teacher, batch):
    model, params = teacher
    made = shrink.keep_layers(model, params, range(4))
    assert made.model.config == model.config
    same(out(made.model, made.params, batch), out(model, params, batch))
    own = {id(x) for x in jax.tree.leaves(params)}
    assert not own & {id(x) for x in jax.tree.leaves(made.params)}


def test_heads(teacher, batch):
    """Other heads in every layer, and the same in all where the position bias is shared."""
    model, params = teacher
    config = model.config
    groups = groups_of(model)
    if groups == 6:
        heads = np.array([[0, 2, 5], [1, 2, 3], [3, 4, 5], [0, 1, 2]])
    elif groups == 3:  # one of each pair
        heads = np.array([[0, 2, 5], [1, 2, 4], [1, 3, 5], [0, 3, 4]])
    else:  # two of each three
        heads = np.array([[0, 2, 3, 5], [1, 2, 3, 4], [0, 1, 4, 5], [0, 2, 4, 5]])
    if config.family == "mpnet":
        with pytest.raises(ValueError, match="heads must be the same in all layers"):
            shrink.keep_heads(model, params, heads)
        heads = heads[0]
    made = shrink.keep_heads(model, params, heads)
    assert made.model.config.heads == heads.shape[-1]
    assert made.model.config.dim == config.dim
    masks = Masks(head=on(heads, (4, 6)))
    same(out(made.model, made.params, batch), out(model, params, batch, masks=masks))
    assert tree.count(made.params) < tree.count(params)


def test_whole_groups_of_heads(batch):
    config = CONFIGS["llama"]
    model = config.build()
    params = random(model)
    heads = np.array([[0, 1], [2, 3], [4, 5], [0, 1]])
    made = shrink.keep_heads(model, params, heads)
    assert (made.model.config.heads, made.model.config.kv_heads) == (2, 1)
    masks = Masks(head=on(heads, (4, 6)))
    same(out(made.model, made.params, batch), out(model, params, batch, masks=masks))
    for bad in ([0, 1, 2], [[0, 1], [2, 3], [4, 5], [0, 2]]):
        with pytest.raises(ValueError, match="heads must take equally many of every group"):
            shrink.keep_heads(model, params, bad)


def test_units(teacher, batch):
    model, params = teacher
    units = np.sort(
        np.random.default_rng(3).permuted(np.tile(np.arange(20), (4, 1)), axis=1)[:, :7]
    )
    made = shrink.keep_units(model, params, units)
    assert made.model.config.ffn_width == 7
    masks = Masks(ffn=on(units, (4, 20)))
    same(out(made.model, made.params, batch), out(model, params, batch, masks=masks))


def test_a_student_of_a_size(teacher, batch):
    """All cuts at once, by magnitude, equal the three masks; decoders also generate alike."""
    model, params = teacher
    groups = groups_of(model)
    count = {6: 3, 3: 3, 2: 4}[groups]
    made = shrink.student(model, params, layers=2, heads=count, ffn_width=9)
    config = made.model.config
    assert (config.layers, config.heads, config.ffn_width) == (2, count, 9)
    scores = np.asarray(shrink.head_scores(model, params))
    if model.config.family == "mpnet":
        scores = np.broadcast_to(scores.sum(0), scores.shape)
    kept = {6: 3, 3: 3, 2: 2}[groups]
    heads = shrink.best(scores, count, groups=groups, kept_groups=kept)
    units = shrink.best(shrink.unit_scores(model, params), 9)
    masks = Masks(head=on(heads, (4, 6)), ffn=on(units, (4, 20)))
    wanted = staged(model, params, batch, ((0, 1), (3, 4)), masks)
    same(out(made.model, made.params, batch)[:1], [wanted])
    if made.model.decode is not None:
        prompt = {"input_ids": batch["input_ids"]}
        logits, _ = jax.jit(lambda p: made.model.decode.start(p, prompt, 2))(made.params)
        same([np.asarray(logits)], [out(made.model, made.params, prompt)[0][:, -1]])


def doubled(params, wide):
    """Parameters of twice the width that compute the same: every channel is written twice and
    read once."""
    flat = tree.flatten(params)

    def grow(path, leaf):
        small = flat[path]
        for axis, (size, wanted) in enumerate(zip(small.shape, leaf.shape)):
            if size != wanted:
                read = path.endswith("kernel") and axis == small.ndim - 2
                again = jnp.zeros_like(small) if read else small
                small = jnp.concatenate([small, again], axis)
        return small

    return tree.map_with_path(grow, wide)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_channels(name, batch):
    config = dataclasses.replace(CONFIGS[name], head_dim=4)
    model = config.build()
    params = random(model)
    wide = dataclasses.replace(config, width=48).build()
    teacher = doubled(params, wide.abstract())
    want = model.apply(params, batch).logits
    np.testing.assert_allclose(wide.apply(teacher, batch).logits, want, atol=1e-5)
    made = shrink.keep_channels(wide, teacher, np.arange(24))
    assert made.model.config == config
    np.testing.assert_allclose(made.model.apply(made.params, batch).logits, want, atol=1e-5)
    # Every channel counts as much as its copy, and of equal ones the first stay.
    scores = shrink.channel_scores(wide, teacher)
    np.testing.assert_allclose(scores[:24], scores[24:], rtol=1e-6)
    loud = tree.flatten(params)
    loud = tree.replace(params, {
        path: loud[path].at[..., 5].mul(10.0)
        for path in ("embed/word/table", "layers/attn/o/kernel", "layers/ffn/out/kernel")
    })  # fmt: skip
    cut = shrink.student(model, loud, width=1)
    np.testing.assert_array_equal(
        cut.params["embed"]["word"]["table"][:, 0], loud["embed"]["word"]["table"][:, 5]
    )


def test_a_narrow_student_of_every_family(teacher, batch):
    made = shrink.student(*teacher, width=12, heads=teacher[0].config.heads, layers=2)
    assert made.model.config.width == 12
    assert made.model.config.dim == teacher[0].config.dim
    assert np.isfinite(made.model.apply(made.params, batch).logits).all()


def test_given_scores_decide():
    model = ENCODER.build()
    params = random(model)
    importance = np.zeros((4, 6))
    importance[:, 4] = 1.0
    importance[2, :] = [9, 0, 0, 0, 8, 0]
    made = shrink.student(model, params, heads=1, head_importance=importance)
    q = np.asarray(params["layers"]["attn"]["q"]["kernel"]).reshape(4, 24, 6, 4)
    wanted = np.stack([q[layer, :, head] for layer, head in enumerate((4, 4, 0, 4))])
    np.testing.assert_array_equal(made.params["layers"]["attn"]["q"]["kernel"], wanted)


def test_magnitudes_do_not_depend_on_the_scale_between_a_pair():
    config = CONFIGS["gpt2"]
    model = config.build()
    params = random(model)
    factor = jnp.asarray(np.random.default_rng(0).uniform(0.1, 9, (4, 1, 24)), jnp.float32)
    flat = tree.flatten(params)
    attn = jnp.repeat(factor[..., :6], 4, axis=-1)  # one factor a head
    flat["layers/attn/v/kernel"] = flat["layers/attn/v/kernel"] * attn
    flat["layers/attn/o/kernel"] = flat["layers/attn/o/kernel"] / attn.swapaxes(1, 2)
    units = factor[..., :20]
    flat["layers/ffn/in/kernel"] = flat["layers/ffn/in/kernel"] * units
    flat["layers/ffn/out/kernel"] = flat["layers/ffn/out/kernel"] / units.swapaxes(1, 2)
    scaled = tree.unflatten(flat)
    for score in (shrink.head_scores, shrink.unit_scores):
        np.testing.assert_allclose(score(model, scaled), score(model, params), rtol=1e-4)
    # An entry that does nothing goes first.
    dead = {**flat, "layers/ffn/out/kernel": flat["layers/ffn/out/kernel"].at[:, 13].set(0)}
    kept = shrink.best(shrink.unit_scores(model, tree.unflatten(dead)), 19)
    assert (kept == [n for n in range(20) if n != 13]).all()


@pytest.mark.parametrize(
    ("layers", "count", "how", "wanted"),
    [
        (12, 6, "even", (0, 2, 4, 7, 9, 11)),
        (12, 3, "even", (0, 6, 11)),
        (30, 10, "even", (0, 3, 6, 10, 13, 16, 19, 23, 26, 29)),
        (6, 6, "even", (0, 1, 2, 3, 4, 5)),
        (6, 1, "even", (0,)),
        (6, 2, "first", (0, 1)),
        (6, 2, "last", (4, 5)),
    ],
)
def test_choose_layers(layers, count, how, wanted):
    assert shrink.choose_layers(layers, count, how) == wanted


def test_best():
    scores = [[3.0, 1.0, 2.0, 2.0], [0.0, 5.0, 4.0, 9.0]]
    np.testing.assert_array_equal(shrink.best(scores, 2), [[0, 2], [1, 3]])
    np.testing.assert_array_equal(shrink.best(scores, 2, groups=2, kept_groups=2), [[0, 2], [1, 3]])
    np.testing.assert_array_equal(shrink.best(scores, 2, groups=2, kept_groups=1), [[0, 1], [2, 3]])
    # One of one group: the group whose best is best.
    np.testing.assert_array_equal(shrink.best(scores, 1, groups=2, kept_groups=1), [[0], [3]])


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_students_are_saved_where_the_format_can_hold_them(tmp_path, name, batch):
    model = CONFIGS[name].build()
    params = random(model)
    made = shrink.student(model, params, layers=2, ffn_width=8)
    folder = pretrained.save(tmp_path / "cut", *made)
    back = pretrained.load(folder, drop=model.config.drop)
    same(out(back.model, back.params, batch)[:1], out(*made, batch)[:1])
    narrow = shrink.student(model, params, heads=3)
    if name == "llama":  # its files say how wide a head is
        back = pretrained.load(pretrained.save(tmp_path / "narrow", *narrow))
        same(out(back.model, back.params, batch)[:1], out(*narrow, batch)[:1])
    else:
        with pytest.raises(ValueError, match="cannot hold (it|head_dim)"):
            pretrained.save(tmp_path / "narrow", *narrow)
        assert not (tmp_path / "narrow").exists()


def vision():
    config = VisionConfig("vit", width=8, layers=2, heads=2, ffn_width=8, image_size=8, patch=4)
    return config.build(), {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: shrink.choose_layers(4, 5), r"count must lie in 1\.\.4"),
        (lambda m, p: shrink.choose_layers(4, 2, "some"), "how must be"),
        (lambda m, p: shrink.student(m, p, layers=True), "layers must be a number of layers, or"),
        (lambda m, p: shrink.student(m, p, width=True), r"width must lie in 1\.\..*, got True"),
        (lambda m, p: shrink.keep_layers(m, p, []), r"layers must ascend within 0\.\.3"),
        (lambda m, p: shrink.keep_layers(m, p, [2, 1]), "layers must ascend"),
        (lambda m, p: shrink.keep_layers(m, p, [0, 4]), "layers must ascend"),
        (lambda m, p: shrink.keep_heads(m, p, [0, 6]), r"heads must ascend within 0\.\.5"),
        (lambda m, p: shrink.keep_heads(m, p, [[0], [1]]), "in each of 4 layers"),
        (lambda m, p: shrink.keep_heads(m, p, []), "heads must be numbers"),
        (lambda m, p: shrink.keep_units(m, p, [0.5]), "units must be numbers"),
        (lambda m, p: shrink.student(m, p, heads=7), r"heads must lie in 1\.\.6, .* got 7"),
        (lambda m, p: shrink.student(m, p, heads=4, kv_heads=3), "do not share kv_heads=3 equally"),
        (lambda m, p: shrink.student(m, p, kv_heads=2), "kv_heads=2 needs heads"),
        (lambda m, p: shrink.student(m, p, heads=2, head_importance=np.ones(6)),
         r"head_importance must have shape \(4, 6\)"),
        (lambda m, p: shrink.best([1.0, np.nan], 1), "scores must be finite"),
        (lambda m, p: shrink.best(np.ones(6), 4, groups=3, kept_groups=3), "multiple of"),
        (lambda m, p: shrink.best(np.ones(6), 3, groups=3, kept_groups=1), "is more than"),
        (lambda m, p: shrink.keep_layers(*vision(), [0]), "must be an encoder or a decoder"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_says_so(call, message):
    model = ENCODER.build()
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        call(model, params)
