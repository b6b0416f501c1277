"""SAM, ASAM, GSAM, LookSAM, FSAM: golden numbers, neutral settings, oracles, bad input."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe import optim
from steppe.optim import fisher, perturbation, structure, topk

W = {"kernel": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "bias": jnp.array([0.5, -0.5])}
C = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.array([5.0, 6.0])}
SGD = optax.sgd(0.1)


def grad_fn(w: Any) -> Any:
    """Gradient of 1/2 sum c w^2."""
    return jax.tree.map(lambda c, w: c * w, C, w)


def compiled(tx: Any, grad: Any) -> Any:
    """``(gradient, state, params) -> updates, state`` in one program, however often it is called:
    an eager update would compile its branches anew each time."""
    return jax.jit(lambda g, state, params: tx.update(g, state, params, grad_fn=grad))


def one_step(tx: Any, params: Any = W, grad: Any = grad_fn) -> tuple[Any, Any]:
    updates, state = compiled(tx, grad)(grad(params), tx.init(params), params)
    return optax.apply_updates(params, updates), state


GOLDEN = {
    "sam": (
        lambda: optim.sam(SGD, 0.1),
        [[0.8994796, -1.5958368], [2.0859492, 2.3666942]],
        [0.2434950, -0.1906328],
    ),
    "asam, port": (
        lambda: optim.asam(SGD, 0.1, eta=0.0, scaled="all"),
        [[0.8998570, -1.5954257], [2.0652637, 2.2536218]],
        [0.2495533, -0.1993567],
    ),
    "asam": (
        lambda: optim.asam(SGD, 0.1, eta=0.01),
        [[0.8998547, -1.5953974], [2.0651650, 2.2534490]],
        [0.2482199, -0.1974367],
    ),
    "fsam": (
        lambda: optim.fsam(SGD, 0.1, keep_ratio=0.5),
        [[0.9, -1.5958368], [2.0859492, 2.3666942]],
        [0.25, -0.2],
    ),
    "fsam, as published": (
        lambda: optim.fsam(SGD, 0.1, keep_ratio=0.5, exclude=("bias",), excluded_mode="full"),
        [[0.9, -1.6], [2.0859492, 2.3666942]],
        [0.2434950, -0.1906328],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers(name: str) -> None:
    make, kernel, bias = GOLDEN[name]
    params, _ = one_step(make())
    np.testing.assert_allclose(params["kernel"], kernel, atol=1e-6)
    np.testing.assert_allclose(params["bias"], bias, atol=1e-6)


def test_golden_norms() -> None:
    g = grad_fn(W)
    np.testing.assert_allclose(perturbation.global_norm(g), 19.2158794, rtol=1e-6)
    e = perturbation.l2()(g, W, 0.1)
    np.testing.assert_allclose(perturbation.global_norm(e), 0.1, rtol=1e-6)
    chosen = fisher.candidates(W)
    mask = fisher.elementwise(fisher.square(g), 0.5, chosen, False)
    masked = jax.tree.map(lambda e, m: e * m, e, mask)
    np.testing.assert_allclose(perturbation.global_norm(masked), 0.0977748, atol=1e-6)
    only = fisher.elementwise(fisher.square(g), 0.5, fisher.candidates(W, ("bias",)), True)
    masked = jax.tree.map(lambda e, m: e * m, e, only)
    np.testing.assert_allclose(perturbation.global_norm(masked), 0.0976709, atol=1e-6)


# A problem with curvature, so that the second gradient differs: a small MLP on fixed data.
def mlp(seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    params = {
        "layers": {
            "kernel": jnp.asarray(rng.normal(size=(2, 6, 6)) * 0.5, jnp.float32),
            "bias": jnp.asarray(rng.normal(size=(2, 6)) * 0.1, jnp.float32),
        },
        "out": {"kernel": jnp.asarray(rng.normal(size=(6, 3)) * 0.5, jnp.float32)},
    }
    x = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 3, 16))
    return params, (x, y)


def example_loss(params: Any, example: Any) -> jax.Array:
    x, y = example
    for layer in range(2):
        x = jnp.tanh(x @ params["layers"]["kernel"][layer] + params["layers"]["bias"][layer])
    logits = x @ params["out"]["kernel"]
    return jax.nn.logsumexp(logits) - logits[y]


PARAMS, DATA = mlp()


def batch_loss(params: Any) -> jax.Array:
    return jax.vmap(example_loss, (None, 0))(params, DATA).mean()


GRAD = jax.jit(jax.grad(batch_loss))
ADAMW = optax.adamw(1e-2)
SAM = optim.sam(ADAMW, 0.1)


@functools.cache
def run(tx: Any, steps: int = 20) -> Any:
    """``steps`` updates in one compiled loop."""

    @jax.jit
    def loop(params: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            params, state = carry
            updates, state = tx.update(GRAD(params), state, params, grad_fn=GRAD)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), None, length=steps)[0][0]

    return loop(PARAMS)


def same(left: Any, right: Any, tolerance: float = 0.0) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


NEUTRAL = {
    "sam rho 0": lambda: optim.sam(ADAMW, 0.0),
    "asam rho 0": lambda: optim.asam(ADAMW, 0.0),
    "gsam rho 0": lambda: optim.gsam(ADAMW, 0.0),
    "looksam rho 0": lambda: optim.looksam(ADAMW, 0.0),
    "fsam rho 0": lambda: optim.fsam(ADAMW, 0.0),
    "fsam keep 0": lambda: optim.fsam(ADAMW, 0.1, keep_ratio=0.0),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_settings_are_the_base_bit_for_bit(name: str) -> None:
    same(run(NEUTRAL[name]()), run(ADAMW))


def test_keeping_everything_is_sam() -> None:
    whole = run(SAM)
    same(run(optim.fsam(ADAMW, 0.1, keep_ratio=1.0)), whole)
    same(run(optim.fsam(ADAMW, 0.1, structure=(3, 3))), whole, 1e-6)
    same(run(optim.gsam(ADAMW, 0.1, alpha=0.0)), whole, 1e-6)
    same(run(optim.looksam(ADAMW, 0.1, every=1)), whole)


def test_parity_with_optax_in_opaque_mode() -> None:
    peer = optax.contrib.sam(
        ADAMW,
        optax.chain(optax.contrib.normalize(), optax.sgd(0.1)),
        sync_period=2,
        opaque_mode=True,
    )
    params, state = PARAMS, peer.init(PARAMS)
    update = compiled(peer, lambda p, _: GRAD(p))
    for _ in range(20):
        updates, state = update(GRAD(params), state, params)
        params = optax.apply_updates(params, updates)
    same(run(SAM), params, 1e-6)


def test_a_schedule_and_an_injected_rho_equal_the_number() -> None:
    wanted = run(SAM)
    same(run(optim.sam(ADAMW, optax.constant_schedule(0.1))), wanted, 1e-6)
    injected = optax.inject_hyperparams(optim.sam)(ADAMW, rho=0.1)
    same(run(injected), wanted, 1e-6)
    # At a scheduled 0 the program branches, and its other fusions round in the last place.
    same(run(optim.sam(ADAMW, lambda step: 0.0 * step)), run(ADAMW), 1e-6)


def test_gsam_against_its_formula() -> None:
    g = GRAD(PARAMS)
    sharp = GRAD(perturbation.displace(PARAMS, perturbation.l2()(g, PARAMS, 0.1)))
    flat = {k: np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]).astype(np.float64)
            for k, t in {"g": g, "s": sharp}.items()}  # fmt: skip
    norms = {k: np.linalg.norm(v) for k, v in flat.items()}
    cosine = flat["g"] @ flat["s"] / norms["g"] / norms["s"]
    wanted = flat["s"] - 0.4 * (flat["g"] - cosine * norms["g"] * flat["s"] / norms["s"])
    tx = optim.gsam(optax.sgd(1.0), 0.1)
    updates, _ = compiled(tx, GRAD)(g, tx.init(PARAMS), PARAMS)
    found = -np.concatenate([np.ravel(x) for x in jax.tree.leaves(updates)])
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_looksam_reuses_the_orthogonal_part() -> None:
    tx = optim.looksam(optax.sgd(0.1), 0.1, every=3)
    update = compiled(tx, GRAD)
    params, state = PARAMS, tx.init(PARAMS)
    kept = None
    for step in range(4):
        g = GRAD(params)
        updates, state = update(g, state, params)
        if step in (0, 3):
            assert abs(float(_dot(state.direction, g))) < 1e-5  # orthogonal to the gradient
            kept = state.direction
        else:
            same(state.direction, kept)
            scale = 0.7 * perturbation.global_norm(g) / perturbation.global_norm(kept)
            wanted = jax.tree.map(lambda g, v, s=scale: -0.1 * (g + s * v), g, kept)
            same(updates, wanted, 1e-6)
        params = optax.apply_updates(params, updates)


def _dot(a: Any, b: Any) -> Any:
    return sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(
    "make",
    [optim.sam, optim.asam, optim.gsam, optim.looksam, optim.fsam],
    ids=["sam", "asam", "gsam", "looksam", "fsam"],
)
def test_a_zero_gradient_and_a_bad_step(make: Any) -> None:
    tx = make(optax.sgd(0.1), 0.1)

    @jax.jit
    def update(scale: Any, state: Any) -> Any:
        grad = lambda p: jax.tree.map(lambda g: g * scale, GRAD(p))  # noqa: E731
        return tx.update(grad(PARAMS), state, PARAMS, grad_fn=grad)

    updates, _ = update(0.0, tx.init(PARAMS))
    assert not any(x.any() for x in jax.tree.leaves(updates))
    # One step of NaN leaves no trace in the state: what follows is finite.
    _, state = update(jnp.nan, tx.init(PARAMS))
    for _ in range(2):
        updates, state = update(1.0, state)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(state))


def test_the_mask_is_kept_between_refreshes_and_is_global() -> None:
    tx = optim.fsam(optax.sgd(0.1), 0.1, keep_ratio=0.25, refresh_every=3)
    update = compiled(tx, GRAD)
    params, state = PARAMS, tx.init(PARAMS)
    masks = []
    for step in range(4):
        # The gradient of one leaf dominates: a mask a layer would still keep some of the others.
        scale = {"layers": {"kernel": 1e-6, "bias": 1e-6}, "out": {"kernel": 1.0 + step}}
        g = jax.tree.map(lambda s, g: s * g, scale, GRAD(params))
        updates, state = update(g, state, params)
        masks.append(state.mask)
        params = optax.apply_updates(params, updates)
    assert int(masks[0]["out"]["kernel"].sum()) == 18
    entries = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    assert sum(int(m.sum()) for m in jax.tree.leaves(masks[0])) == int(0.25 * entries)
    same(masks[0], masks[1])
    same(masks[0], masks[2])
    assert int(state.age) == 1


def test_plain_refresh_steps_are_steps_of_the_base() -> None:
    tx = optim.fsam(optax.sgd(0.1), 0.1, keep_ratio=0.5, refresh_every=100, plain_refresh=True)
    update = compiled(tx, GRAD)
    updates, state = update(GRAD(PARAMS), tx.init(PARAMS), PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    same(updates, jax.tree.map(lambda g: -0.1 * g, GRAD(PARAMS)), 1e-7)
    updates, _ = update(GRAD(params), state, params)
    plain = jax.tree.map(lambda g: -0.1 * g, GRAD(params))
    assert any(
        np.abs(a - b).max() > 1e-5
        for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(plain), strict=True)
    )


@pytest.mark.parametrize("k", [0, 1, 7, 90, 119, 120])
def test_bisection_equals_sorting(k: int) -> None:
    rng = np.random.default_rng(k)
    scores = {"a": rng.random((4, 5, 5)), "b": rng.random(20)}
    scores = jax.tree.map(
        lambda x: jnp.asarray(x * 10.0 ** rng.integers(-20, 20), jnp.float32), scores
    )
    found = jax.jit(topk.top_k, static_argnums=1)(scores, k)
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(scores)])
    wanted = np.zeros(flat.size, bool)
    wanted[np.argsort(-flat, kind="stable")[:k]] = True
    mask = np.concatenate([np.ravel(x) for x in jax.tree.leaves(found.mask)])
    np.testing.assert_array_equal(mask, wanted)
    assert float(found.chosen) == k
    assert k == 0 or float(found.threshold) == flat[wanted].min()


def test_top_k_keeps_ties_and_counts_nan_as_nothing() -> None:
    found = topk.top_k({"a": jnp.array([1.0, 1.0, 0.5, jnp.nan])}, 1)
    np.testing.assert_array_equal(found.mask["a"], [True, True, False, False])
    assert float(found.chosen) == 2
    assert bool(topk.top_k({"a": jnp.zeros(3)}, 2).mask["a"].all())


def test_structured_masks() -> None:
    scores = fisher.square(GRAD(PARAMS))
    chosen = fisher.candidates(scores)
    mask = fisher.n_of_m(scores, 1, 3, chosen, False)
    kept = np.asarray(mask["layers"]["kernel"]).reshape(2, 6, 2, 3)
    assert (kept.sum(-1) == 1).all()
    best = np.asarray(scores["layers"]["kernel"]).reshape(2, 6, 2, 3).argmax(-1)
    np.testing.assert_array_equal(kept.argmax(-1), best)
    assert np.asarray(mask["layers"]["bias"]).all()  # vectors have no groups
    # Whole tensors: layer 1's kernel alone, which holds 36 of 102 entries.
    scores = jax.tree.map(jnp.zeros_like, scores)
    scores["layers"]["kernel"] = scores["layers"]["kernel"].at[1].set(1.0)
    mask = structure.tensorwise(scores, 36 / 102, chosen, False)
    assert np.asarray(mask["layers"]["kernel"][1]).all()
    assert sum(int(m.sum()) for m in jax.tree.leaves(mask)) == 36


def test_stacked_biases_are_vectors() -> None:
    """ASAM scales matrices; a stacked bias has two dimensions and is none."""
    e = perturbation.adaptive(eta=0.0)(GRAD(PARAMS), PARAMS, 1.0)
    g = GRAD(PARAMS)
    ratio = e["layers"]["bias"] / g["layers"]["bias"]
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)


def test_asam_does_not_see_a_rescaling_and_sam_does() -> None:
    rng = np.random.default_rng(1)
    w = {"a": jnp.asarray(rng.normal(size=(4, 8))), "b": jnp.asarray(rng.normal(size=(8, 2)))}
    scaled = {"a": w["a"] * 3.0, "b": w["b"] / 3.0}
    x, y = jnp.asarray(rng.normal(size=(9, 4))), jnp.asarray(rng.normal(size=(9, 2)))
    loss = lambda w: jnp.mean((jax.nn.relu(x @ w["a"]) @ w["b"] - y) ** 2)  # noqa: E731

    def climbed(perturb: Any, w: Any) -> float:
        e = perturb(jax.grad(loss)(w), w, 0.5)
        return float(loss(jax.tree.map(jnp.add, w, e)))

    asam = perturbation.adaptive(eta=0.0)
    np.testing.assert_allclose(climbed(asam, w), climbed(asam, scaled), rtol=1e-4)
    assert abs(climbed(perturbation.l2(), w) - climbed(perturbation.l2(), scaled)) > 0.05


BAD = {
    "negative rho": (lambda: optim.sam(SGD, -0.1), "rho must be a finite number >= 0 .* got -0.1"),
    "rho not a number": (lambda: optim.fsam(SGD, float("nan")), "rho must be a finite number"),
    "negative rho of numpy": (lambda: optim.sam(SGD, np.float32(-1)), "rho must be .* number >= 0"),
    "rho of another kind": (lambda: optim.sam(SGD, "0.1"), "rho must be a finite number"),
    "rho of one entry": (lambda: optim.sam(SGD, jnp.array([0.1])), r"rho .* array of shape \(1,\)"),
    "rho true": (lambda: optim.sam(SGD, True), "rho must be .* got True"),
    "endless eta": (lambda: optim.asam(SGD, eta=float("inf")), "eta must be .* got inf"),
    "eta of words": (lambda: optim.asam(SGD, eta="x"), "eta must be .* got 'x'"),
    "alpha of words": (lambda: optim.gsam(SGD, alpha="x"), "alpha must be a finite number"),
    "alpha none": (lambda: optim.looksam(SGD, alpha=None), "alpha must be a finite number"),
    "every of words": (lambda: optim.looksam(SGD, every="2"), "every must be a whole"),
    "every true": (lambda: optim.looksam(SGD, every=True), "every must be a whole"),
    "every without end": (lambda: optim.looksam(SGD, every=float("inf")), "every must be a whole"),
    "keep_ratio of words": (lambda: optim.fsam(SGD, keep_ratio="x"), "keep_ratio must be in"),
    "keep_ratio true": (lambda: optim.fsam(SGD, keep_ratio=True), "keep_ratio must be in"),
    "refresh nan": (lambda: optim.fsam(SGD, refresh_every=float("nan")), "refresh_every must be"),
    "plain_refresh": (lambda: optim.fsam(SGD, plain_refresh="no"), "must be True or False"),
    "nothing excluded": (lambda: optim.fsam(SGD, excluded_mode="full"), "exclude is empty"),
    "exclude 5": (lambda: optim.fsam(SGD, exclude=5), "exclude must be regular expressions"),
    "exclude (": (lambda: optim.fsam(SGD, exclude=["("]), "exclude must be regular expressions"),
    "no neighbours": (lambda: optim.fsam(SGD, structure=(3, 7)).init(W), "7 divides"),
    "half a step": (lambda: optim.looksam(SGD, every=2.5), "whole number"),
    "half a neighbour": (lambda: optim.fsam(SGD, structure=(1.5, 2)), "structure must be"),
    "keep_ratio": (lambda: optim.fsam(SGD, keep_ratio=1.5), "keep_ratio must be in"),
    "refresh": (lambda: optim.fsam(SGD, refresh_every=0), "refresh_every must be a whole"),
    "structure": (lambda: optim.fsam(SGD, structure=(4, 2)), "structure must be"),
    "eta": (lambda: optim.asam(SGD, eta=-1.0), "eta must be >= 0"),
    "every": (lambda: optim.looksam(SGD, every=0), "every must be a whole"),
    "exclude": (lambda: optim.fsam(SGD, exclude=("nose",)).init(W), "matches no parameter"),
    "no grad_fn": (
        lambda: optim.sam(SGD).update(W, optim.sam(SGD).init(W), W),
        "pass tx.update",
    ),
    "no fisher_fn": (
        lambda: (tx := optim.fsam(SGD, fisher="per_sample")).update(
            W, tx.init(W), W, grad_fn=grad_fn
        ),
        "fisher_fn",
    ),
    "mask of other params": (
        lambda: (tx := optim.fsam(SGD)).update(
            {"other": W["bias"]}, tx.init(W), {"other": W["bias"]}, grad_fn=grad_fn
        ),
        "'bias'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_base_that_is_no_transform() -> None:
    with pytest.raises(TypeError, match="optax transform"):
        optim.sam(lambda x: x, 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (5, "grad_fn must be a function"),
        (jax.value_and_grad(lambda w: w["bias"].sum()), "take the second part"),
        (lambda w: {"bias": w["bias"]}, "a tree like params"),
    ],
)
def test_a_grad_fn_of_another_kind(wrong: Any, said: str) -> None:
    for tx in (optim.sam(SGD), optim.looksam(SGD)):
        with pytest.raises(TypeError, match=said):
            tx.update(W, tx.init(W), W, grad_fn=wrong)


def test_a_state_or_a_ball_of_another_kind() -> None:
    with pytest.raises(TypeError, match=r"fsam needs FsamState, got SamState; .* tx\.init"):
        optim.fsam(SGD).update(W, optim.sam(SGD).init(W), W, grad_fn=grad_fn)
    for make in (optim.sam, optim.fsam, optim.esam):
        with pytest.raises(TypeError, match="perturbation must be a function"):
            make(SGD, perturbation=5)
