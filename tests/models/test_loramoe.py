"""LoRAMoE: experts, router, and the balancing constraint that an objective listens for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.models import tree
from steppe.models.overlays import lora, loramoe
from steppe.models.sites import Site, heard, listening, tell
from steppe.train import objectives

from .conftest import TINY

QUIET = {"drop": 0.0, "attn_drop": 0.0}


def still(**more):
    import dataclasses

    head = dataclasses.replace(TINY.head, drop=0.0)
    return dataclasses.replace(TINY, head=head, **({"unroll": 1} | QUIET | more))


def trained(peft, params, seed=5):
    keys = iter(jax.random.split(jax.random.key(seed), 50))
    delta = peft.init(jax.random.key(seed), params)
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), delta)


def oracle(q, types, delta, mode="cv2", eps=1e-10):
    """The published constraint in float64, element by element."""
    samples, experts = q.shape
    z = []
    for n in range(samples):
        for i in range(experts):
            own = (i < experts // 2) == (types[n] == 1)
            z.append((1 + delta if own else 1 - delta) * q[n, i])
    mean = sum(z) / len(z)
    var = sum((v - mean) ** 2 for v in z) / (len(z) - 1)
    return var / (mean**2 + eps) if mode == "cv2" else var / mean


@pytest.mark.parametrize("mode", ["cv2", "paper"])
def test_the_constraint_equals_the_oracle(mode):
    rng = np.random.default_rng(0)
    q, types = rng.uniform(0, 9, (5, 4)), np.array([1, 0, 0, 1, 1])
    got = objectives.localized_balance_loss(q.astype(np.float32), types, 0.3, mode=mode)
    np.testing.assert_allclose(got, oracle(q, types, 0.3, mode), rtol=1e-5)
    thrice = objectives.localized_balance_loss(3 * q.astype(np.float32), types, 0.3, mode=mode)
    np.testing.assert_allclose(thrice, got * (1 if mode == "cv2" else 3), rtol=1e-5)
    padded = np.concatenate([q, 50 * np.ones((2, 4))]).astype(np.float32)
    rows = np.array([1, 1, 1, 1, 1, 0, 0], np.float32)
    more = np.concatenate([types, [0, 1]])
    again = objectives.localized_balance_loss(padded, more, 0.3, mode=mode, rows=rows)
    np.testing.assert_allclose(again, got, rtol=1e-5)


@pytest.mark.parametrize(("delta", "share"), [(0.1, 0.45), (0.0, 0.5)])
def test_golden_minimum(delta, share):
    """Free logits, N = E = 6: the loss falls below 1e-6 and the group with 1 + delta receives
    (1 - delta) / 2 of every sample (loramoe.md, 3)."""
    types = jnp.array([1, 1, 1, 0, 0, 0])
    tx = optax.adam(0.05)

    def loss(logits):
        return objectives.localized_balance_loss(7.0 * jax.nn.softmax(logits), types, delta)

    @jax.jit
    def run(logits):
        def one(carry, _):
            logits, state = carry
            updates, state = tx.update(jax.grad(loss)(logits), state)
            return (optax.apply_updates(logits, updates), state), None

        (logits, _), _ = jax.lax.scan(one, (logits, tx.init(logits)), length=1500)
        return logits, loss(logits)

    logits, value = run(jax.random.normal(jax.random.key(0), (6, 6)))
    assert value < 1e-6
    weights = np.asarray(jax.nn.softmax(logits))
    own = np.concatenate([weights[:3, :3].sum(1), weights[3:, 3:].sum(1)])
    np.testing.assert_allclose(own, share, atol=0.005)


def test_moments_over_devices(devices):
    """Four shares of the rows with ``axis_name`` give what all rows give."""
    rng = np.random.default_rng(3)
    q, types = rng.uniform(0, 1, (8, 4)).astype(np.float32), rng.integers(0, 2, 8)

    def share(q, types):
        return objectives.localized_balance_loss(q, types, 0.2, axis_name="shares")

    each = jax.vmap(share, axis_name="shares")(q.reshape(4, 2, 4), types.reshape(4, 2))
    np.testing.assert_allclose(each, oracle(q.astype(np.float64), types, 0.2), rtol=1e-5)


def test_at_the_start_it_is_the_base_and_only_b_has_a_gradient(tiny, batch):
    _, params = tiny
    model = still().build()
    peft = loramoe.overlay(experts=4, rank=2, drop=0.0)
    bound = peft.bind(model, frozen=params)
    made = bound.init(jax.random.key(0))

    def loss(delta):
        logits = bound.apply({**bound.given, **delta}, batch).logits
        return jnp.square(logits).sum(), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(made)
    plain = jax.jit(lambda p: model.apply(p, batch).logits)(params)
    np.testing.assert_allclose(logits, plain, atol=1e-6)
    for own in grads["overlay"]["layers"].values():
        assert not np.asarray(own["a"]).any()
        assert not np.asarray(own["router"]).any()
        assert np.abs(own["b"]).max() > 1e-5


def test_one_expert_is_lora(tiny, batch):
    _, params = tiny
    model = still().build()
    peft = loramoe.overlay(experts=1, rank=2, alpha=6.0, drop=0.0)
    delta = trained(peft, params)
    plain = lora.overlay(rank=2, alpha=6.0, sites=("ffn.in", "ffn.out"))
    low = {name: {n: own[n][:, 0] for n in "ab"} for name, own in delta["layers"].items()}

    def logits(overlay, delta):
        full = {"base": params, "overlay": delta}
        return jax.jit(lambda p: overlay.bind(model).apply(p, batch).logits)(full)

    got = logits(peft, delta)
    np.testing.assert_allclose(got, logits(plain, {"layers": low}), atol=1e-5)


def test_one_layer_equals_the_oracle():
    """The branch of a projection and the mass of its router, in float64."""
    rng = np.random.default_rng(2)
    x, w = rng.normal(size=(3, 4, 5)), rng.normal(size=(5, 6))
    a, b = rng.normal(size=(2, 5, 2)), rng.normal(size=(2, 2, 6))
    router = rng.normal(size=(5, 2))
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    own = {n: jnp.asarray(v, jnp.float32) for n, v in (("a", a), ("b", b), ("router", router))}
    peft = loramoe.overlay(experts=2, rank=2, alpha=3.0, drop=0.0)
    site = peft.sites({"layers": {"ffn.in": own}})["ffn.in"]
    from steppe.models.sites import SiteContext

    with listening() as told:
        got = site.fn(
            own,
            jnp.asarray(x, jnp.float32),
            lambda x: x @ jnp.asarray(w, jnp.float32),
            SiteContext(mask=jnp.asarray(mask)),
        )
    scores = np.exp(x @ router)
    weights = scores / scores.sum(-1, keepdims=True)
    expected = x @ w
    for i in range(2):
        expected = expected + 1.5 * weights[..., i, None] * (x @ a[i] @ b[i])
    np.testing.assert_allclose(got, expected, atol=1e-4)
    q = (weights * mask[..., None]).sum(1)
    np.testing.assert_allclose(told["router_mass/ffn.in"], q, rtol=1e-5)
    np.testing.assert_allclose(q.sum(1), mask.sum(1))  # rows sum to the tokens


def test_the_objective_hears_every_layer(tiny, batch):
    """Also through a loop that is computed twice; the mass is what the site's input gives."""
    _, params = tiny
    model = still(remat="full").build()
    peft = loramoe.overlay(experts=2, rank=2, drop=0.0)
    bound = peft.bind(model)
    full = {"base": params, "overlay": trained(peft, params)}
    rows = {**batch, "labels": np.array([0, 1, 2, 1]), "sample_type": np.array([0, 1, 1, 0])}
    plain = objectives.classification_ce(bound)
    balanced = objectives.loramoe_loss(plain, beta=0.5, delta=0.2)

    def loss(p):
        out = balanced(p, rows, None)
        return out.total["task"] / 4 + out.total["balance"], out

    @jax.jit
    def run(p):
        with listening() as told:
            plain(p, rows, None)
        return jax.grad(loss, has_aux=True)(p), told, plain(p, rows, None)

    (grads, out), told, alone = run(full)
    assert {n: v.shape for n, v in told.items()} == {
        "router_mass/ffn.in": (4, 4, 2),
        "router_mass/ffn.out": (4, 4, 2),
    }
    expected = sum(
        oracle(np.asarray(q, np.float64), rows["sample_type"], 0.2)
        for masses in told.values()
        for q in masses
    )
    np.testing.assert_allclose(out.total["balance"], 0.5 * expected, rtol=1e-4)
    np.testing.assert_allclose(out.aux["balance/loss"][0], expected, rtol=1e-4)
    np.testing.assert_allclose(out.total["task"], alone.total, rtol=1e-5)
    assert out.aux["accuracy"] == alone.aux["accuracy"]
    routers = [own["router"] for own in grads["overlay"]["layers"].values()]
    assert all(np.abs(layer).max() > 1e-6 for router in routers for layer in router)
    assert not heard()


def test_nobody_is_told_where_nobody_listens():
    tell("x", jnp.ones(3))
    with listening() as outer:
        tell("x", jnp.ones((1, 3)))
        with listening() as inner:
            tell("x", jnp.zeros((1, 3)))
        tell("x", 2 * jnp.ones((1, 3)))
    np.testing.assert_array_equal(outer["x"], [[1, 1, 1], [2, 2, 2]])
    np.testing.assert_array_equal(inner["x"], np.zeros((1, 3)))


def test_sites_by_whole_parts_of_their_names(tiny):
    """Of the three projections, those that there are; of others, those that are named."""
    _, params = tiny
    for sites, wanted in (
        (loramoe.PROJECTIONS, ["ffn.in", "ffn.out"]),
        (("in", "attn.q"), ["attn.q", "ffn.in"]),
        (("ffn.in", "in"), ["ffn.in"]),
    ):
        made = loramoe.overlay(sites=sites, rank=1).init(jax.random.key(0), params)
        assert sorted(made["layers"]) == wanted


def test_errors(tiny, batch):
    _, params = tiny
    with pytest.raises(ValueError, match="alpha must be finite, got nan"):
        loramoe.overlay(alpha=float("nan"))
    with pytest.raises(ValueError, match="experts must be >= 1, got 0"):
        loramoe.overlay(experts=0)
    with pytest.raises(ValueError, match="rank must be <= 16 at site 'ffn.in'"):
        loramoe.overlay(rank=17).init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="has no dense layer ffn.gate"):
        loramoe.overlay(sites=("ffn.gate",)).init(jax.random.key(0), params)
    there = "there are attn.k, attn.o, attn.q, attn.v, ffn.in, ffn.out"
    for sites, lost in (
        (("ffn.in", "attn.zq"), "attn.zq"),
        (("ffn.in", "ffn.gate"), "ffn.gate"),
        (("n",), "n"),
        (("fn.in", "ut"), "fn.in or ut"),
    ):
        with pytest.raises(ValueError, match=f"no dense layer {lost}; {there}"):
            loramoe.overlay(sites=sites).init(jax.random.key(0), params)
    with pytest.raises(ValueError, match="must be even, got 3"):
        objectives.localized_balance_loss(jnp.ones((2, 3)), jnp.zeros(2, jnp.int32))
    with pytest.raises(ValueError, match=r"delta must be in \[0, 1\), got 1"):
        objectives.localized_balance_loss(jnp.ones((2, 2)), jnp.zeros(2, jnp.int32), 1.0)
    with pytest.raises(ValueError, match="mode must be one of cv2, paper, got 'mean'"):
        objectives.loramoe_loss(lambda *a: None, mode="mean")
    ce = objectives.classification_ce(still().build())
    with pytest.raises(ValueError, match="lacks 'sample_type'"):
        objectives.loramoe_loss(ce)(params, batch, None)
    rows = {**batch, "labels": np.zeros(4, np.int32), "sample_type": np.zeros(4, np.int32)}
    with pytest.raises(ValueError, match="no router was heard"):
        jax.eval_shape(lambda p: objectives.loramoe_loss(ce)(p, rows, None), params)
    assert isinstance(loramoe.overlay().sites({"layers": {"ffn.in": {}}})["ffn.in"], Site)
    assert tree.count(
        jax.eval_shape(lambda: loramoe.overlay(experts=2, rank=1).init(jax.random.key(0), params))
    ) == 4 * (2 * (16 + 24) + 16 * 2 + 2 * (24 + 16) + 24 * 2)
