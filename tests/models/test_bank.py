"""A bank of adapters: one batch with many of them equals one call an adapter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.models import tree
from steppe.models.heads import HeadConfig
from steppe.models.overlays import (
    adapter,
    bank,
    bitfit,
    compose,
    files,
    ia3,
    lora,
    lpt,
    mp2,
    o_lora,
    prefix,
    prefix_fixed,
    prompt,
    unipelt,
)
from steppe.train import mesh, step

from .conftest import TINY
from .test_decoder_decode import PAD, P, texts
from .test_decoder_decode import TINY as DECODER

MODEL = dataclasses.replace(TINY, unroll=1).build()
IDS = np.array([2, 0, 2, 1], np.int32)
# name -> (overlay, own leaves of the base, whether the way of vmap is taken although there is
# a shorter one)
BANKS = {
    "lora": (lora.overlay(rank=2, sites=("attn.q", "ffn.out")), (), False),
    "lora, mapped": (lora.overlay(rank=2, sites=("attn.q", "ffn.out")), (), True),
    "lora, own heads": (lora.overlay(rank=2), ("head/.*",), False),
    "houlsby, own norms and heads": (
        adapter.overlay(kind="houlsby", width=3),
        (*adapter.NORMS, "head/.*"),
        False,
    ),
    "prompt, prefix and (IA)^3": (
        compose(prompt.overlay(length=2), prefix.overlay(length=2, hidden=4), ia3.overlay()),
        (),
        False,
    ),
    "unipelt": (unipelt.overlay(rank=2, length=2, reduction=4), (), False),
    "o-lora": (o_lora.overlay(tasks=2, rank=2), (), False),
    "late prompt": (lpt.overlay(layer=2, length=2, bottleneck=3, kind="appg"), (), False),
}


def noisy(params, seed):
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), params)


def made(overlay, own, params):
    """Three adapters, (delta, own leaves) each, and the parameters of their bank."""
    init = jax.jit(lambda key: overlay.init(key, params))
    each = [noisy(init(jax.random.key(n)), n) for n in range(3)]
    theirs = [noisy(tree.split(params, own)[0], 10 + n) if own else {} for n in range(3)]
    full = {"base": params, "overlay": bank.stack(each)}
    if own:
        full["own"] = bank.stack(theirs)
    return each, theirs, full


@pytest.mark.parametrize("name", BANKS)
def test_a_bank_equals_separate_calls(tiny, batch, name):
    overlay, own, mapped = BANKS[name]
    _, params = tiny
    each, theirs, full = made(overlay, own, params)
    bound = bank.bind(MODEL, overlay, 3, own=own, mapped=mapped)
    got = jax.jit(lambda p, ids: bound.apply(p, {**batch, "adapter_ids": ids}).logits)(full, IDS)
    single = overlay.bind(MODEL)

    @jax.jit
    def alone(base, delta):
        return single.apply({"base": base, "overlay": delta}, batch).logits

    for number in range(3):
        base = tree.replace(params, tree.flatten(theirs[number]))
        expected = np.asarray(alone(base, each[number]))[number == IDS]
        np.testing.assert_allclose(np.asarray(got)[number == IDS], expected, atol=1e-5)


def test_every_adapter_learns_from_its_own_examples(tiny, batch):
    overlay, own, _ = BANKS["lora, own heads"]
    _, params = tiny
    bound = bank.bind(MODEL, overlay, 4, own=own, frozen=params)
    start = jax.jit(bound.init)(jax.random.key(0))
    assert set(start) == {"overlay", "own"}
    a = np.asarray(start["overlay"]["layers"]["attn.q"]["a"])
    assert a.shape == (4, 4, 16, 2)
    assert np.abs(a[0] - a[1]).max() > 0.01

    @jax.jit
    def slope(live):
        rows = {**batch, "adapter_ids": jnp.asarray(IDS)}
        return jax.grad(lambda p: jnp.square(bound.apply({**bound.given, **p}, rows).logits).sum())(
            live
        )

    grads = slope(start)
    for path, leaf in tree.flatten(grads).items():
        used = np.abs(np.asarray(leaf)).reshape(4, -1).max(1) > 0
        wanted = [False] * 4 if path.endswith("/a") else [True, True, True, False]
        assert used.tolist() == wanted, path  # at the start B is 0, and A has no gradient


@pytest.mark.parametrize("mapped", [False, True])
def test_a_bank_generates_as_each_adapter_does_alone(mapped):
    """Token for token, prompts padded on the left; rows that are taken keep their adapters."""
    model = DECODER.build()
    params = noisy(jax.jit(model.init)(jax.random.key(0)), 3)
    low = lora.overlay(rank=2, sites=("attn.q", "ffn.out"))
    overlay = compose(low, prompt.overlay(length=2), prefix.overlay(length=1)) if mapped else low
    own = ("norm/.*", "head/.*") if mapped else ()
    each, theirs, full = made(overlay, own, params)
    bound, single = bank.bind(model, overlay, 3, own=own), overlay.bind(model)
    ids, mask = (np.concatenate([x, x[1:2]])[:, :P] for x in texts())
    assert PAD[2] == P - 1

    def tokens(model, params, batch, rows):
        """Four tokens, then two of the rows ``rows`` alone."""
        logits, state = model.decode.start(params, batch, 6)
        said = []
        for number in range(6):
            if number == 4:
                logits, state = logits[rows], state.take(rows)
            said.append(jnp.argmax(logits, -1).astype(jnp.int32))
            logits, state = model.decode.step(params, said[-1], state)
        return jnp.stack(said[:4], 1), jnp.stack(said[4:], 1), logits

    rows = jnp.array([3, 0, 1])
    batch = {"input_ids": ids, "attention_mask": mask}
    run = jax.jit(lambda p, adapters: tokens(bound, p, {**batch, "adapter_ids": adapters}, rows))
    got = run(full, IDS)
    alone = jax.jit(lambda p: tokens(single, p, batch, rows))
    for number in range(3):
        base = tree.replace(params, tree.flatten(theirs[number]))
        wanted = alone({"base": base, "overlay": each[number]})
        for left, right, mine in zip(got, wanted, (IDS, IDS[rows], IDS[rows]), strict=True):
            left, right = (np.asarray(x)[mine == number] for x in (left, right))
            np.testing.assert_allclose(left, right, atol=2e-5)
    assert len({tuple(row) for row in np.asarray(got[0])}) > 1


def test_own_heads_of_decoders_read_the_last_token_of_a_text():
    model = dataclasses.replace(DECODER, head=HeadConfig("classification", 3, None, 0.0)).build()
    params = noisy(jax.jit(model.init)(jax.random.key(0)), 3)
    overlay, own = lora.overlay(rank=2), ("head/.*",)
    each, theirs, full = made(overlay, own, params)
    ids = np.random.default_rng(0).integers(1, 40, (4, 6)).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": (np.arange(6) < [[6], [3], [5], [4]]).astype(int)}
    bound, single = bank.bind(model, overlay, 3, own=own), overlay.bind(model)
    got = jax.jit(lambda p, a: bound.apply(p, {**batch, "adapter_ids": a}).logits)(full, IDS)
    alone = jax.jit(lambda p: single.apply(p, batch).logits)
    for number in range(3):
        base = tree.replace(params, tree.flatten(theirs[number]))
        wanted = np.asarray(alone({"base": base, "overlay": each[number]}))[number == IDS]
        np.testing.assert_allclose(np.asarray(got)[number == IDS], wanted, atol=1e-5)


def test_what_an_overlay_holds_fixed_does_not_train_in_a_bank():
    words = mp2.overlay(modules=2, length=2, intrinsic=3, ids=(5, 6))
    for overlay, still in (
        (o_lora.overlay(tasks=2, rank=2), {"bank"}),
        (words, {"words"}),
        (prefix_fixed.overlay(lengths=(2,)), {"layers"}),
    ):
        bound = bank.bind(MODEL, overlay, 3, own=("head/.*",))
        live, frozen = tree.split(bound.abstract(), bound.trainable)
        assert set(frozen["overlay"]) == still
        assert not still & set(live.get("overlay", {}))
        assert "own" in live
    assert bank.bind(MODEL, bitfit.overlay(), 2, own=("head/.*",)).trainable == (r"own/.*",)


def test_an_id_beyond_the_bank_is_no_adapter(tiny, batch):
    """Known ids are refused; those of a compiled program give NaN, never another adapter's row."""
    overlay, _, _ = BANKS["lora"]
    _, params = tiny
    _, _, full = made(overlay, (), params)
    bound = bank.bind(MODEL, overlay, 3)
    run = jax.jit(lambda p, ids: bound.apply(p, {**batch, "adapter_ids": ids}).logits)
    got = np.asarray(run(full, np.array([0, 3, 1, -1], np.int32)))
    assert np.isnan(got).all(1).tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match=r"names adapter 3; the bank holds 0 to 2"):
        bound.apply(full, {**batch, "adapter_ids": np.array([0, 3, 1, 0])})
    with pytest.raises(ValueError, match="lacks 'adapter_ids'"):
        bound.apply(full, batch)
    with pytest.raises(ValueError, match=r"must be integers \[B\], got float32"):
        bound.apply(full, {**batch, "adapter_ids": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match="has no adapter 3; it holds 0 to 2"):
        bank.select(full["overlay"], 3)


def test_it_is_placed_as_its_overlay_is(tiny):
    """The axis of adapters is never split; the others are as in one adapter."""
    overlay, own, _ = BANKS["lora, own heads"]
    bound = bank.bind(MODEL, overlay, 4, own=own, frozen=tiny[1])
    plan = mesh.plan({"data": 2, "fsdp": 2, "model": 2}, bound.axes)
    state = step.abstract(bound, optax.adamw(1e-2), plan)
    low = state.params["overlay"]["layers"]["attn.q"]
    assert low["a"].shape == (4, 4, 16, 2)
    assert tuple(low["a"].sharding.spec) == (None, None, "fsdp")
    assert tuple(low["b"].sharding.spec) == (None, None, None, "model")
    assert not any(state.params["own"]["head"]["out"]["kernel"].sharding.spec)


def test_other_mistakes(tiny):
    _, params = tiny
    with pytest.raises(ValueError, match="adapters must be >= 1, got 0"):
        bank.bind(MODEL, lora.overlay(), 0)
    with pytest.raises(ValueError, match="matches no parameter"):
        bank.bind(MODEL, lora.overlay(), 2, own=("heads/.*",))
    with pytest.raises(ValueError, match="bound already"):
        bank.bind(lora.overlay().bind(MODEL, frozen=params), lora.overlay(), 2)
    with pytest.raises(ValueError, match="deltas must hold at least one"):
        bank.stack([])
    deltas = [lora.overlay(rank=r).init(jax.random.key(0), params) for r in (2, 3)]
    with pytest.raises(ValueError, match=r"adapter 0 has \(4, 16, 2\), adapter 1 has"):
        bank.stack(deltas)


def test_from_folders(tiny, tmp_path):
    _, params = tiny
    overlay = lora.overlay(rank=2)

    def save(name, *, hashed="h", rank=2):
        made = lora.overlay(rank=rank)
        live = {
            "overlay": noisy(made.init(jax.random.key(0), params), len(name)),
            "base": {"head": params["head"]},
        }
        files.save(tmp_path / name, made, live, base="base", fingerprint=hashed)
        return live

    first, second = save("a"), save("bb")
    save("other-base", hashed="g")
    save("other-rank", rank=3)
    found = bank.load([tmp_path / "a", tmp_path / "bb"], fingerprint="h")
    assert found.settings["rank"] == 2
    assert found.name == overlay.name
    for number, one in enumerate((first, second)):
        for name, live in (("overlay", one["overlay"]), ("own", one["base"])):
            for a, b in zip(
                jax.tree.leaves(bank.select(found.params[name], number)), jax.tree.leaves(live)
            ):
                np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="not of this base"):
        bank.load([tmp_path / "a", tmp_path / "other-base"], fingerprint="h")
    with pytest.raises(ValueError, match="has base 'g', .* has 'h'"):
        bank.load([tmp_path / "a", tmp_path / "other-base"])
    with pytest.raises(ValueError, match="has rank 3, .* has 2"):
        bank.load([tmp_path / "a", tmp_path / "other-rank"])
    with pytest.raises(FileNotFoundError, match="holds no overlay"):
        bank.load([tmp_path / "nothing"])
