"""Sharpness against closed forms and dense Hessians; the same on a mesh; nothing compiled twice."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import tree
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.optim import perturbation
from steppe.train import mesh
from steppe.train.evaluate import ball, curvature, landscape, surface
from steppe.train.evaluate import sharpness as s
from steppe.train.objectives import basic

toy = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "programs" / "toy.py")))
KEY = jax.random.key(0)
SIZE = 24
EIGENVALUES = np.concatenate([[10.0, 7.0, 5.0], np.linspace(-1.0, 1.0, SIZE - 3)])
TURN = np.linalg.qr(np.random.default_rng(0).normal(size=(SIZE, SIZE)))[0]
HESSIAN = jnp.asarray((TURN * EIGENVALUES) @ TURN.T, jnp.float32)
ORIGIN = {"layers": {"kernel": jnp.zeros((2, 3, 2))}, "head": jnp.zeros((3, 4))}
LINEAR = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(1).normal(size=x.shape)), ORIGIN)


def flat(params):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])


def quadratic(params):
    w = flat(params)
    return 0.5 * w @ HESSIAN @ w


def diagonal(params):
    return 0.5 * (flat(params) ** 2 * jnp.asarray(EIGENVALUES, jnp.float32)).sum()


def slope(params):
    return flat(params) @ flat(LINEAR)


@pytest.fixture(scope="module")
def net():
    """A whole encoder, small enough for its dense Hessian."""
    config = EncoderConfig("bert", 8, 4, 2, 1, 4, 6, drop=0.0, attn_drop=0.0, remat="none")
    model = config.with_head(HeadConfig("classification", 3)).build()
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.3, 0.6, leaf.shape), jnp.float32), model.abstract()
    )
    batches = []
    for rows, width, real in ((4, 5, 3), (2, 6, 2)):
        batches.append(
            {
                "input_ids": rng.integers(0, 8, (rows, width)).astype(np.int32),
                "attention_mask": np.ones((rows, width), np.int32),
                "labels": rng.integers(0, 3, rows).astype(np.int32),
                "label_mask": (np.arange(rows) < real).astype(np.float32),
                "example_index": np.arange(rows),
                "id": np.array(["a"] * rows),
            }
        )
    objective = basic.classification_ce(model)
    live, frozen = tree.split(params, ("layers/.*", "head/.*", "embed/word/.*"))
    loss = s.batched_loss(objective, frozen, batches)

    def plain(p):
        outs = [
            objective(tree.merge(p, frozen), {k: v for k, v in b.items() if k != "id"}, None)
            for b in batches
        ]
        return sum(o.total for o in outs) / sum(o.weight for o in outs)

    return SimpleNamespace(loss=loss, params=live, plain=plain)


@pytest.fixture(scope="module")
def dense(net):
    """Value, gradient, and eigenvalues of the dense Hessian, in float64 from there on."""
    leaves, structure = jax.tree.flatten(net.params)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def loss(w):
        parts = jnp.split(w, ends)
        return net.plain(
            structure.unflatten([p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)])
        )

    w = flat(net.params)
    value, grads = jax.jit(jax.value_and_grad(loss))(w)
    matrix = np.asarray(jax.jit(jax.hessian(loss))(w), np.float64)
    return SimpleNamespace(value=value, grads=np.asarray(grads), matrix=(matrix + matrix.T) / 2)


def test_eigenvalues_of_a_known_hessian():
    found = s.top_eigenvalues(
        quadratic, ORIGIN, KEY, count=3, iterations=SIZE, tol=1e-5, vectors=True
    )
    np.testing.assert_allclose(found.values, [10, 7, 5], atol=1e-4)
    assert found.products < SIZE
    for number, vector in enumerate(found.vectors):
        v = np.asarray(flat(vector), np.float64)
        np.testing.assert_allclose(abs(v @ TURN[:, number]), 1, atol=1e-4)
        error = np.linalg.norm(np.asarray(HESSIAN, np.float64) @ v - found.values[number] * v)
        assert error <= found.residuals[number] + 2e-5


def test_a_small_basis_restarts_and_finds_the_same():
    found = s.top_eigenvalues(quadratic, ORIGIN, KEY, count=3, iterations=60, tol=1e-5, basis=6)
    np.testing.assert_allclose(found.values, [10, 7, 5], atol=1e-4)
    assert found.products > 6


@pytest.mark.parametrize("seed", range(3))
def test_a_large_negative_eigenvalue_does_not_hide_the_positive_one(seed):
    """In 20,000 dimensions a random start hardly touches either: after two products the top of T
    is near 0, and its residual small beside the negative one."""
    values = jnp.full(20_000, 1e-3).at[jnp.array([3, 9_000])].set(jnp.array([-458.0, 103.0]))
    start = {"w": jnp.zeros(20_000)}

    def loss(params):
        return 0.5 * (values * params["w"] ** 2).sum()

    found = s.top_eigenvalues(loss, start, jax.random.key(seed), iterations=10, tol=0.05)
    assert found.values[0] == pytest.approx(103.0, rel=0.05)
    assert found.products < 10


def test_a_start_that_is_an_eigenvector_of_everything():
    found = s.top_eigenvalues(lambda p: 1.5 * flat(p) @ flat(p), ORIGIN, KEY, count=3, iterations=5)
    np.testing.assert_allclose(found.values, 3, atol=1e-5)


def test_trace():
    exact = s.trace(diagonal, ORIGIN, KEY, probes=2)
    np.testing.assert_allclose(exact.mean, EIGENVALUES.sum(), rtol=1e-5)
    assert exact.standard_error < 1e-4
    found = s.trace(quadratic, ORIGIN, KEY, probes=24)
    assert abs(found.mean - EIGENVALUES.sum()) < 3 * found.standard_error
    np.testing.assert_allclose(found.standard_error, found.samples.std(ddof=1) / 24**0.5)


def test_the_spectral_density_of_a_known_hessian():
    found = s.spectral_density(quadratic, ORIGIN, KEY, probes=2, iterations=SIZE)
    start = np.asarray(flat(curvature._start(
        jax.random.split(KEY)[0], ORIGIN, kind="sign", where=(None, None)
    )))  # fmt: skip
    np.testing.assert_allclose(found.nodes[0], np.sort(EIGENVALUES), atol=1e-3)
    order = np.argsort(EIGENVALUES)
    np.testing.assert_allclose(found.weights[0], (TURN.T @ start)[order] ** 2, atol=1e-3)
    np.testing.assert_allclose(
        found.samples[0], SIZE * start @ np.asarray(HESSIAN) @ start, rtol=1e-4
    )
    grid, values = s.smooth(found)
    np.testing.assert_allclose(np.trapezoid(values, grid), 1, atol=1e-3)
    with pytest.raises(ValueError, match="half a step of the grid"):
        s.smooth(found, width=1e-4)


def test_the_ball_in_closed_form():
    at_minimum = s.ball_max(quadratic, ORIGIN, 0.3, steps=60)
    np.testing.assert_allclose(at_minimum.gap, 0.5 * 10 * 0.3**2, rtol=1e-4)
    length = float(jnp.linalg.norm(flat(LINEAR)))
    found = s.ball_max(slope, ORIGIN, 0.3, steps=4)
    np.testing.assert_allclose(found.trace, [0, *[0.3 * length] * 4], rtol=1e-5)
    assert float(s.ball_max(quadratic, ORIGIN, 0.0, steps=4).gap) == 0.0
    # A gradient of 1e30 has no float32 norm: that must not look like a flat place.
    steep = jax.tree.map(lambda x: x * jnp.float32(1e30), LINEAR)
    there = s.ball_max(lambda p: sum(
        (a * b).sum() for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(steep), strict=True)
    ), ORIGIN, 0.3, steps=2)  # fmt: skip
    assert np.isnan(there.worst)


@pytest.mark.parametrize("norm", ["l2", "adaptive"])
def test_the_first_step_is_the_perturbation_of_the_optimisers(norm):
    params = jax.tree.map(lambda x: x + 0.5, LINEAR)
    found = s.ball_max(quadratic, params, 0.2, steps=1, norm=norm, eta=0.1)
    perturb = perturbation.l2() if norm == "l2" else perturbation.adaptive(eta=0.1)
    moved = perturbation.displace(params, perturb(jax.grad(quadratic)(params), params, 0.2))
    np.testing.assert_allclose(found.trace, [quadratic(params), quadratic(moved)], rtol=1e-5)


def test_the_adaptive_ball_does_not_see_a_rescaling_that_relu_hides():
    rng = np.random.default_rng(3)
    x, y = jnp.asarray(rng.normal(size=(16, 3))), jnp.asarray(rng.normal(size=(16, 2)))
    first = {"a": jnp.asarray(rng.normal(size=(3, 4))), "b": jnp.asarray(rng.normal(size=(4, 2)))}
    second = {"a": 8.0 * first["a"], "b": first["b"] / 8.0}

    def loss(p):
        return ((jax.nn.relu(x @ p["a"]) @ p["b"] - y) ** 2).mean()

    one, two = (s.ball_max(loss, p, 0.3, steps=5, norm="adaptive", eta=0) for p in (first, second))
    np.testing.assert_allclose(one.trace, two.trace, rtol=1e-4)
    one, two = (s.ball_max(loss, p, 0.3, steps=5) for p in (first, second))
    assert two.gap > 2 * one.gap


def test_surfaces_of_a_quadratic_are_exact():
    first, second = s.directions(KEY, LINEAR, "whole", count=2)
    a, b = np.asarray(flat(first)), np.asarray(flat(second))
    w, h = np.asarray(flat(LINEAR)), np.asarray(HESSIAN)

    def exact(v):
        return 0.5 * v @ h @ v

    curve = s.surface_1d(quadratic, LINEAR, first, 0.8, 5)
    np.testing.assert_allclose(curve.at, [-0.8, -0.4, 0, 0.4, 0.8], atol=1e-7)
    np.testing.assert_allclose(curve.losses, [exact(w + t * a) for t in curve.at], rtol=1e-4)
    told = []
    found = s.surface_2d(quadratic, LINEAR, (first, second), 0.8, 3, tell=lambda *x: told.append(x))
    wanted = [[exact(w + t * a + u * b) for u in found.at] for t in found.at]
    np.testing.assert_allclose(found.losses, wanted, rtol=1e-4)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert found.losses[1, 1] == np.float32(quadratic(LINEAR))


def test_a_line_and_its_barrier():
    def valley(p):  # minima at -1 and 1, a hill of height 1 between them
        return ((p["w"] ** 2 - 1) ** 2).sum()

    ends = {"w": jnp.array([-1.0])}, {"w": jnp.array([1.0])}
    found = s.line(valley, *ends, points=5)
    np.testing.assert_allclose(found.losses, [0, 0.5625, 1, 0.5625, 0], atol=1e-6)
    np.testing.assert_allclose(found.barrier, 1, atol=1e-6)
    assert s.line(quadratic, ORIGIN, ORIGIN, points=3).barrier == 0.0


def test_filters_of_a_direction_are_as_long_as_those_of_the_weights(net):
    (found,) = s.directions(KEY, net.params)
    for path, w in tree.flatten(net.params).items():
        d = np.asarray(tree.get(found, path))
        if w.ndim - path.startswith("layers/") < 2:
            assert not d.any()
            continue
        axis = -1 if path.endswith("table") else -2
        np.testing.assert_allclose(
            np.linalg.norm(d, axis=axis), np.linalg.norm(w, axis=axis), rtol=1e-5, err_msg=path
        )
    # Two trained states are seen from the same side.
    (other,) = s.directions(KEY, jax.tree.map(lambda w: 2 * w, net.params))
    np.testing.assert_allclose(flat(other), 2 * flat(found), rtol=1e-5)
    (each,) = s.directions(KEY, net.params, "tensor", vectors=True)
    for d, w in zip(tree.tensors(each), tree.tensors(net.params), strict=True):
        np.testing.assert_allclose(np.linalg.norm(d[1]), np.linalg.norm(w[1]), rtol=1e-5)
    (whole,) = s.directions(KEY, net.params, "whole", vectors=True)
    np.testing.assert_allclose(
        np.linalg.norm(flat(whole)), np.linalg.norm(flat(net.params)), rtol=1e-5
    )


def test_an_encoder_against_its_dense_hessian(net, dense):
    value, grads = jax.jit(landscape.value_and_grad)(net.loss, net.params)
    np.testing.assert_allclose(value, dense.value, rtol=1e-5)
    np.testing.assert_allclose(flat(grads), dense.grads, atol=2e-6)
    exact = np.linalg.eigvalsh(dense.matrix)[::-1]
    found = s.top_eigenvalues(net.loss, net.params, KEY, count=3, iterations=40, tol=1e-5)
    np.testing.assert_allclose(found.values, exact[:3], rtol=1e-4)
    total = s.trace(net.loss, net.params, KEY, probes=12)
    assert abs(total.mean - np.trace(dense.matrix)) < 3 * total.standard_error


def test_components_are_divided_by_their_own_weights():
    parts = [toy.batch(i, 8) for i in range(3)]
    whole = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    params = toy.init(KEY)
    out = jax.jit(lambda p: toy.two(p, whole, None)._replace(aux={}))(params)
    wanted = sum(out.total[k] / out.weight[k] for k in out.total)
    loss = s.batched_loss(toy.two, {}, parts)
    found, grads = jax.jit(landscape.value_and_grad)(loss, params)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    through = jax.jit(jax.grad(loss))(params)
    np.testing.assert_allclose(flat(through), flat(grads), atol=1e-6)


def test_bf16_compute_sums_in_float32():
    params, parts = toy.init(KEY), [toy.batch(0)]
    vector = jax.tree.map(jnp.ones_like, params)
    half = s.batched_loss(toy.ce, {}, parts, compute_dtype="bfloat16")
    product = jax.jit(landscape.hvp)(half, params, vector)
    assert {leaf.dtype for leaf in jax.tree.leaves(product)} == {jnp.dtype("float32")}
    full = jax.jit(landscape.hvp)(s.batched_loss(toy.ce, {}, parts), params, vector)
    error = np.linalg.norm(flat(product) - flat(full)) / np.linalg.norm(flat(full))
    assert 1e-5 < error < 0.1


def _everything(loss, params):
    first, second = s.directions(KEY, params, count=2)
    return {
        "ball": s.ball_max(loss, params, 0.1, steps=3).trace,
        "adaptive": s.ball_max(loss, params, 0.1, steps=3, norm="adaptive").trace,
        "top": s.top_eigenvalues(loss, params, KEY, count=2, iterations=9, basis=6, tol=0).values,
        "trace": s.trace(loss, params, KEY, probes=2).samples,
        "plane": s.surface_2d(loss, params, (first, second), 0.5, 2).losses,
    }


def _programs():
    jitted = (
        ball._climb, curvature._start, curvature._extend, curvature._turn, curvature._product,
        surface._direction, surface._row,
    )  # fmt: skip
    return [program._cache_size() for program in jitted]


def test_eight_devices_find_the_same_and_a_second_call_compiles_nothing():
    params, parts = toy.init(KEY), [toy.batch(i) for i in range(2)]
    wanted = _everything(s.batched_loss(toy.ce, {}, parts), params)
    plan = mesh.plan({"data": 4, "model": 2}, toy.RULES)
    placed = plan.place(params)
    found = _everything(s.batched_loss(toy.ce, {}, parts, plan=plan), placed)
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-4, err_msg=name)
    vector = curvature._start(KEY, placed, kind="sign", where=landscape.placement(placed))
    assert vector["head"]["kernel"].sharding == placed["head"]["kernel"].sharding
    before = _programs()
    others = [toy.batch(i) for i in (7, 8)]  # the objective is the same, the examples are not
    _everything(s.batched_loss(toy.ce, {}, others, plan=plan), placed)
    s.ball_max(s.batched_loss(toy.ce, {}, others, plan=plan), placed, 0.2, steps=3)
    assert _programs() == before


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: s.ball_max(slope, ORIGIN, -0.1), "rho must be a finite number >= 0, got -0.1"),
        (lambda: s.ball_max(slope, ORIGIN, float("nan")), "rho must be .* got nan"),
        (lambda: s.ball_max(slope, ORIGIN, 1, steps=0), "steps must be a whole number >= 1"),
        (lambda: s.ball_max(slope, ORIGIN, "x"), "rho must be .* got 'x'"),
        (lambda: s.ball_max(slope, ORIGIN, 1, steps=float("nan")), "steps must be a whole"),
        (lambda: s.ball_max(slope, ORIGIN, 1, eta=float("inf")), "eta must be .* got inf"),
        (lambda: s.ball_max(slope, ORIGIN, 1, stride=float("inf")), "stride must be .* got inf"),
        (lambda: s.surface_2d(slope, ORIGIN, (ORIGIN,)), "pair must be two directions"),
        (lambda: s.top_eigenvalues(slope, ORIGIN, KEY, iterations=float("inf")), "iterations must"),
        (lambda: s.top_eigenvalues(slope, ORIGIN, KEY, basis="x"), "basis must be a whole"),
        (lambda: s.ball_max(slope, ORIGIN, 1, norm="l1"), "norm must be 'l2' or 'adaptive'"),
        (lambda: s.ball_max(slope, ORIGIN, 1, eta=-1), "eta must be >= 0"),
        (lambda: s.ball_max(slope, ORIGIN, 1, stride=0), "stride must be > 0"),
        (lambda: s.ball_max(flat, ORIGIN, 1), r"must be a scalar, got shape \(24,\)"),
        (lambda: s.surface_1d(slope, ORIGIN, ORIGIN, 1, 1), "points must be .* >= 2, got 1"),
        (lambda: s.surface_1d(slope, ORIGIN, ORIGIN, 0.0), "span must be a finite number > 0"),
        (
            lambda: s.surface_1d(slope, ORIGIN, {"head": ORIGIN["head"]}),
            "params has a parameter at 'layers/kernel' that direction lacks",
        ),
        (lambda: s.line(slope, ORIGIN, {"head": 0}), "start has a parameter at 'layers/kernel'"),
        (lambda: s.line(slope, ORIGIN, ORIGIN, points=1), "points must be"),
        (lambda: s.directions(KEY, ORIGIN, "row"), "kind must be"),
        (lambda: s.directions(KEY, {"b": jnp.ones(3)}), "nothing would vary; pass vectors=True"),
        (lambda: s.trace(slope, ORIGIN, KEY, probes=1), "probes must be a whole number >= 2"),
        (lambda: s.top_eigenvalues(slope, ORIGIN, KEY, count=0), "count must be"),
        (lambda: s.top_eigenvalues(slope, ORIGIN, KEY, count=40, iterations=50), "24 parameters"),
        (lambda: s.top_eigenvalues(slope, ORIGIN, KEY, count=4, basis=5), "at least .* 6, got 5"),
        (lambda: s.top_eigenvalues(slope, ORIGIN, KEY, tol=-1), "tol must be >= 0"),
        (
            lambda: s.top_eigenvalues(lambda p: jnp.sqrt(flat(p)).sum(), ORIGIN, KEY),
            "not finite; look for a loss of NaN",
        ),
        (lambda: s.batched_loss(toy.ce, {}, []), "batches is empty"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("key", [0, jnp.zeros(3), jnp.int32(0), jax.random.split(KEY)])
def test_what_is_no_key(key):
    for call in (s.top_eigenvalues, s.trace, s.spectral_density):
        with pytest.raises(TypeError, match=r"key must be a key such as jax.random.key\(0\)"):
            call(slope, ORIGIN, key)


def test_an_old_key_is_one():
    old = s.top_eigenvalues(slope, ORIGIN, jax.random.PRNGKey(0), iterations=2)
    assert bool(jnp.isfinite(old.values).all())


def test_rows_that_do_not_fit_the_mesh_are_named():
    plan = mesh.plan({"data": 8}, toy.RULES)
    with pytest.raises(ValueError, match="has 12 rows, not divisible by the 8 parts"):
        s.batched_loss(toy.ce, {}, [toy.batch(0, 12)], plan=plan)
