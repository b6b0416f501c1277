"""First gradients that are made cheaper, inside the training step."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe import optim
from steppe.models import tree
from steppe.models.decoder import DecoderConfig
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.optim import perturbation
from steppe.train import cut, mesh, step
from steppe.train.ascent import CARRIED, Ascent, Cut
from steppe.train.objectives import basic
from steppe.train.types import LossOut

PROGRAMS = Path(__file__).parents[1] / "train" / "programs"
toy = SimpleNamespace(**runpy.run_path(str(PROGRAMS / "toy.py")))
ADAMW = optax.adamw(1e-2)
SGD = optax.sgd(0.1)


def host(tree_):
    return jax.tree.map(np.array, tree_)


def largest(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


def build(tx, shape=None, microbatches=1, objective=toy.ce, model=toy.MODEL, **options):
    plan = None if shape is None else mesh.plan(shape, toy.RULES)
    start = {k: options.pop(k) for k in ("trainable",) if k in options}
    state = step.init(jax.random.key(0), model, tx, plan, **start)
    return state, step.make(objective, tx, plan, microbatches=microbatches, **options)


def trained(tx, *args, steps=3, **options):
    state, train = build(tx, *args, **options)
    for number in range(steps):
        state, metrics = train(state, toy.batch(number))
    assert train.compiles == 1
    return host(state.params), {k: float(s) / float(w) for k, (s, w) in metrics.items()}


# Cheaper first gradients: the toy in two, with dropout above the cut.
def below(params, batch, key):
    x = params["embed"]["table"][batch["input_ids"]]
    return jnp.tanh(x @ params["layers"]["kernel"][0] + params["layers"]["bias"][0])


def above(params, batch, key):
    x = batch[CARRIED]
    x = jnp.tanh(x @ params["layers"]["kernel"][1] + params["layers"]["bias"][1])
    x = x * jax.random.bernoulli(key, 0.9, x.shape).astype(x.dtype)
    logits = (x @ params["head"]["kernel"] + params["head"]["bias"]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return LossOut((losses * batch["label_mask"]).sum(), batch["label_mask"].sum())


CUT = Cut(below, above, 1)


def masked_sam(base, rho, live):
    """SAM that perturbs what is live, by the norm of that part, with two whole gradients."""

    def update(grads, state, params=None, *, grad_fn, **_):
        upper = jax.tree.map(lambda g, on: jnp.where(on, g, 0.0), grads, live)
        e = perturbation.l2()(upper, params, rho)
        return base.update(grad_fn(perturbation.displace(params, e)), state, params)

    return optax.GradientTransformationExtraArgs(base.init, update)


def upper_part(params, layer, below):
    """True on the layers from ``layer`` on, and on the other leaves that are not ``below``."""

    def one(path, leaf):
        if tree.is_stacked(path):
            live = np.arange(leaf.shape[0]) >= layer
            return live.reshape(-1, *(1,) * (leaf.ndim - 1))
        return np.asarray(not tree.matches(path, below))

    return tree.map_with_path(one, params)


LIVE = upper_part(toy.init(jax.random.key(0)), 1, ("embed/.*",))


@pytest.mark.parametrize(
    "split", [(None, 1), (None, 4), ({"data": 8}, 1), ({"data": 4, "model": 2}, 2)]
)
def test_a_cut_step_equals_an_uncut_one_that_perturbs_the_upper_part(split):
    kind = {"objective": toy.dropped, "steps": 2}
    wanted, plain = trained(masked_sam(SGD, 0.5, LIVE), *split, **kind)
    found, metrics = trained(optim.sam(SGD, 0.5), *split, ascent=Ascent(cut=CUT), **kind)
    assert largest(found, wanted) < 1e-6
    assert largest(found, trained(optim.sam(SGD, 0.5), *split, **kind)[0]) > 1e-4
    assert metrics["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert 0 < metrics["grad_norm"] < plain["grad_norm"]


def texts(kind, rows=8, length=6):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, length + 1, rows)
    ids = rng.integers(1, 40, (rows, length)).astype(np.int32)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": mask}
    if kind == "classification":
        return batch | {"labels": ids[:, 0] % 3, "label_mask": np.ones(rows, np.float32)}
    return batch | {
        "labels": ids % 3 if kind == "token" else ids,
        "label_mask": mask.astype(np.float32),
    }


SMALL = {"vocab_size": 40, "width": 8, "layers": 2, "heads": 2, "ffn_width": 16, "positions": 12}


def encoder(kind, **changes):
    return EncoderConfig("bert", types=2, head=HeadConfig(kind, 3), **(SMALL | changes)).build()


MODELS = {
    "read at its first token": lambda: encoder("classification", layers=3),
    "tied table": lambda: encoder("mlm"),
    "shared positions": lambda: encoder("token", relative_buckets=8),
    "decoder": lambda: DecoderConfig(
        "gpt2", tied=True, drop=0.1, attn_drop=0.1, head=HeadConfig("lm"), **SMALL
    ).build(),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_network_that_is_cut_is_the_network_dropout_included(name):
    """Leaves that both sides read are left in place, and have the gradients of both."""
    model = MODELS[name]()
    kind = model.config.head.kind
    factory = lambda m: basic.for_task(m, kind)  # noqa: E731
    params = model.init(jax.random.key(0))
    live = upper_part(params, 1, ("embed/.*", "relative/.*"))
    ends = []
    for tx, options in (
        (masked_sam(SGD, 0.5, live), {}),
        (optim.sam(SGD, 0.5), {"ascent": Ascent(cut=cut.at_layer(model, 1, factory))}),
    ):
        state, train = build(tx, objective=factory(model), model=model, **options)
        state, metrics = train(state, texts(kind))
        ends.append((host(state.params), float(metrics["loss"][0])))
    assert largest(ends[0][0], ends[1][0]) < 1e-6
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-5)


def test_a_cut_saves_half_a_gradient_and_a_fraction_its_share():
    """In units of forward and backward: SAM 2, half the layers 1.5, an eighth of the rows 1.125."""
    model = encoder("token", width=32, ffn_width=128)
    factory = lambda m: basic.for_task(m, "token")  # noqa: E731
    half = cut.at_layer(model, 1, factory)
    batch = texts("token", rows=16)

    def flops(tx, **options):
        state, train = build(tx, objective=factory(model), model=model, **options)
        return train.compile(state, batch).cost_analysis()["flops"]

    one = flops(SGD)
    sam = optim.sam(SGD, 0.1)
    assert flops(sam) / one == pytest.approx(2, abs=0.1)
    assert flops(sam, ascent=Ascent(cut=half)) / one == pytest.approx(1.5, abs=0.1)
    assert flops(sam, ascent=Ascent(fraction=0.125)) / one == pytest.approx(1.125, abs=0.1)


METHODS = {
    "sam": lambda: optim.sam(ADAMW, 0.05),
    "asam": lambda: optim.asam(ADAMW, 0.5),
    "fsam": lambda: optim.fsam(ADAMW, 0.05, keep_ratio=0.5, refresh_every=2),
    "scheduled": lambda: optim.sam(ADAMW, lambda t: jnp.where(t < 1, 0.0, 0.05)),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_plain_ascent_is_the_plain_step_and_a_part_is_another(name):
    whole, metrics = trained(METHODS[name](), microbatches=2)
    same, again = trained(METHODS[name](), microbatches=2, ascent=Ascent())
    # Branches (a schedule, every other step) are compiled on their own and round differently.
    assert largest(whole, same) <= (1e-6 if name in ("scheduled", "fsam") else 0)
    assert metrics == pytest.approx(again, rel=1e-6)
    other, _ = trained(METHODS[name](), microbatches=2, ascent=Ascent(0.25, "bfloat16"))
    assert 1e-5 < largest(whole, other) < 0.1


@pytest.mark.parametrize(
    ("tx", "said"),
    [
        (ADAMW, "the transform does not read it"),
        (optim.gsam(ADAMW), "gsam compares the gradients"),
        (optim.looksam(ADAMW), "looksam compares the gradients"),
    ],
)
def test_a_cheaper_ascent_is_refused_where_it_is_wrong_or_unused(tx, said):
    state, train = build(tx, ascent=Ascent(0.25))
    with pytest.raises(ValueError, match=said):
        train(state, toy.batch(0))


def test_flooding_sees_the_loss_of_the_whole_batch():
    """In the step's precision, whatever rows and dtype the direction comes from."""
    seen = {}

    def look(grads, state, params=None, *, value, **_):
        return grads, value

    look = optax.GradientTransformationExtraArgs(lambda _: jnp.float32(0), look)
    for name, ascent in {"plain": None, "cheap": Ascent(0.25, "bfloat16")}.items():
        tx = optim.sam(optax.chain(look, SGD), 0.05)
        state, train = build(tx, microbatches=2, ascent=ascent)
        state, metrics = train(state, toy.batch(0))
        seen[name] = float(state.opt_state.base[0])
    assert seen["cheap"] == pytest.approx(seen["plain"], rel=1e-6)
    assert float(metrics["loss"][0] / metrics["loss"][1]) != pytest.approx(seen["plain"], rel=1e-3)


@pytest.mark.parametrize("split", [(None, 1), (None, 2), ({"data": 4, "model": 2}, 2)])
def test_a_fraction_is_the_first_rows_of_every_device_and_micro_batch(split):
    shape, microbatches = split
    shards = 4 if shape else 1

    def look(grads, state, params=None, *, ascent, **_):
        return ascent.direction, state

    look = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), look)
    tx = optax.chain(look, optax.sgd(1.0))
    state, train = build(tx, shape, microbatches, ascent=Ascent(fraction=0.5))
    before = host(state.params)
    state, metrics = train(state, toy.batch(0))
    found = jax.tree.map(lambda a, b: a - b, before, host(state.params))
    own = toy.ROWS // shards
    rows = [i for i in range(toy.ROWS) if i % own < own // 2]
    part = {k: v[np.array(rows)] for k, v in toy.batch(0).items()}
    grad = jax.grad(lambda p: (out := toy.ce(p, part, None)).total / out.weight)
    assert largest(found, host(grad(before))) < 1e-6
    assert float(metrics["loss"][1]) == part["label_mask"].sum()


def test_the_share_of_a_fisher_mask_is_that_of_the_part_above():
    tx = optim.fsam(SGD, 0.05, keep_ratio=0.5)
    state, train = build(tx, objective=toy.dropped, ascent=Ascent(cut=CUT))
    state, _ = train(state, toy.batch(0))
    kept = host(state.opt_state.mask)
    upper = 8 * 8 + 8 + 8 * 4 + 4
    assert sum(int(m.sum()) for m in jax.tree.leaves(kept)) == upper // 2
    assert not kept["embed"]["table"].any()
    assert not kept["layers"]["kernel"][0].any()
    tx = optim.fsam(SGD, 0.05, keep_ratio=0.5, structure="tensor", fisher="per_sample")
    state, train = build(tx, objective=toy.dropped, ascent=Ascent(cut=CUT))
    state, _ = train(state, toy.batch(0))
    assert not host(state.opt_state.mask)["embed"]["table"].any()


def test_extra_memory_is_one_copy_of_the_parameters():
    """What SAM needs beside AdamW: the displaced parameters, the first gradient being used up."""
    model = SimpleNamespace(init=lambda key: {"w": jax.random.normal(key, (512, 512))})
    model.trainable = (".*",)

    def objective(params, batch, key):
        y = jnp.tanh(batch["x"] @ params["w"]) @ params["w"]
        return LossOut((y**2).sum(), jnp.float32(y.shape[0]))

    batch = {"x": np.ones((2, 512), np.float32)}
    needed = {}
    for name, tx in {"adamw": ADAMW, "sam": optim.sam(ADAMW, 0.05)}.items():
        state, train = build(tx, objective=objective, model=model)
        memory = train.compile(state, batch).memory_analysis()
        needed[name] = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    # The slack is for the activations, [2, 512] a few times over.
    assert needed["sam"] - needed["adamw"] <= 4 * 512 * 512 + 64 * 1024


def test_bad_ascents():
    model = encoder("classification")
    factory = lambda m: basic.classification_ce(m)  # noqa: E731
    for layer in (0, 2, 1.5):
        with pytest.raises(ValueError, match=r"layer must be in 1\.\.1 for 2 layers"):
            cut.at_layer(model, layer, factory)
    with pytest.raises(TypeError, match="must make the step's objective of a model"):
        cut.at_layer(model, 1, factory(model))
    for fraction in (0.0, -1, 1.5, float("nan"), True):
        with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\]"):
            Ascent(fraction=fraction)
    assert Ascent(fraction=np.float32(0.5)).fraction == 0.5
    for dtype in ("int32", "foo"):
        with pytest.raises(ValueError, match="floating-point"):
            Ascent(dtype=dtype)
    with pytest.raises(ValueError, match=r"a whole layer >= 1, got 1\.5"):
        Cut(below, above, 1.5)
    with pytest.raises(ValueError, match=r"train\.cut\.at_layer"):
        Ascent(cut=2)
    with pytest.raises(TypeError, match=r"sam\(base, rho, ascent=\.\.\.\)"):
        step.make(toy.ce, SGD, ascent="device")
    state, train = build(optim.sam(SGD), ascent=Ascent(cut=Cut(below, above, 2)))
    with pytest.raises(ValueError, match="holds 2 layers"):
        train(state, toy.batch(0))
    state, train = build(
        optim.sam(SGD), ascent=Ascent(cut=Cut(below, above, 1)), trainable=("embed/.*",)
    )
    with pytest.raises(ValueError, match="leaves nothing to climb with"):
        train(state, toy.batch(0))
