"""Some tokens at a time: the dense loss and its gradient, on any readout, mask, block and mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from steppe.train import distill
from steppe.train.distill import rowwise

from . import small

N, D, E, V = 11, 6, 7, 24
RNG = np.random.default_rng(0)
HOW = {"beta": 0.3, "alpha": 0.2}


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


H_S, W_S, B_S = normal(N, D), normal(V, D), normal(V)
H_T, READ_T = normal(N, E), distill.Readout(normal(E, V), transposed=True)
WEIGHT = jnp.asarray(RNG.random(N) * (RNG.random(N) < 0.7), jnp.float32)
LABELS = jnp.asarray(RNG.integers(0, V, N))


def readout(w, b, bias=True, transposed=False, softcap=None):
    return distill.Readout(w.T if transposed else w, b if bias else None, transposed, softcap)


def dense(kind, mix, temperature, h, w, b, **how):
    read = readout(w, b, **how)
    z_s, z_t = read.logits(h), READ_T.logits(H_T)
    value = distill.token_divergence(kind, z_s, z_t, temperature=temperature, **HOW)
    nll = jax.nn.logsumexp(z_s, -1) - jnp.take_along_axis(z_s, LABELS[:, None], 1)[:, 0]
    return mix[0] * (WEIGHT * value).sum() + mix[1] * (WEIGHT * nll).sum()


def by_rows(kind, mix, temperature, h, w, b, rows=4, **how):
    read = readout(w, b, **how)
    return distill.rowwise_loss(
        kind, h, read, H_T, READ_T, WEIGHT, LABELS, temperature=temperature, mix=mix, rows=rows,
        **HOW,
    ).loss  # fmt: skip


def both(kind, mix=(0.7, 0.3), temperature=1.0, rows=4, **how):
    found = []
    for f in (functools.partial(dense, **how), functools.partial(by_rows, rows=rows, **how)):
        loss = functools.partial(f, kind, mix, temperature)
        found.append(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(H_S, W_S, B_S))
    (value, grads), (other, others) = found
    np.testing.assert_allclose(other, value, rtol=1e-5)
    for a, b in zip(others, grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kind", distill.KINDS)
def test_every_kind(kind):
    both(kind, temperature=2.5)


@pytest.mark.parametrize("rows", [1, 5, N, 100])
def test_any_block(rows):
    both("forward_kl", rows=rows)


@pytest.mark.parametrize(
    "how",
    [{"bias": False}, {"transposed": True}, {"softcap": 2.0}],
    ids=lambda how: next(iter(how)),
)
def test_any_readout(how):
    both("jsd", **how)


def test_divergence_alone_and_labels_alone():
    both("reverse_kl", mix=(1.0, 0.0))
    both("reverse_kl", mix=(0.0, 1.0))


def test_columns_of_the_gradient_that_no_piece_divides(monkeypatch):
    monkeypatch.setattr(rowwise, "COLUMNS", 7)
    both("forward_kl")


def test_the_sums_and_a_factor_from_outside():
    args = ("tvd", H_S, readout(W_S, B_S), H_T, READ_T, WEIGHT, LABELS)

    def scaled(h):
        found = distill.rowwise_loss(args[0], h, *args[2:], mix=(2.0, 0.5), rows=3)
        return 3.0 * found.loss + found.divergence + found.nll, found

    (_, found), grad = jax.jit(jax.value_and_grad(scaled, has_aux=True))(H_S)
    np.testing.assert_allclose(found.loss, 2 * found.divergence + 0.5 * found.nll, rtol=1e-5)
    plain = jax.jit(
        jax.grad(lambda h: distill.rowwise_loss("tvd", h, *args[2:], mix=(2.0, 0.5), rows=3).loss)
    )(H_S)
    np.testing.assert_allclose(grad, 3 * plain, rtol=1e-5)  # the other two have none
    # Without a gradient the same numbers come from the other program.
    again = jax.jit(lambda h: distill.rowwise_loss("tvd", h, *args[2:], mix=(2.0, 0.5), rows=3))(
        H_S
    )
    np.testing.assert_allclose(jnp.stack(again), jnp.stack(found), rtol=1e-6)


def test_what_is_masked_may_be_anything():
    bad, worse = (jnp.where(WEIGHT[:, None] > 0, h, jnp.nan) for h in (H_S, H_T))
    labels = jnp.where(WEIGHT > 0, LABELS, V + 5)

    def loss(h, w, h_t, labels):
        read = readout(w, B_S)
        return distill.rowwise_loss(
            "forward_kl", h, read, h_t, READ_T, WEIGHT, labels, mix=(0.5, 0.5), rows=4
        ).loss

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    (value, grads), (wanted, right) = run(bad, W_S, worse, labels), run(H_S, W_S, H_T, LABELS)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    np.testing.assert_allclose(grads[0], right[0], atol=1e-6)
    np.testing.assert_allclose(grads[1], right[1], atol=1e-6)
    beyond = jnp.where(WEIGHT > 0, V, LABELS)  # a label that counts and is not there
    assert np.isnan(run(H_S, W_S, H_T, beyond)[0])


def test_bfloat16_products_and_float32_sums():
    def loss(h, w):
        read = distill.Readout(w)
        return distill.rowwise_loss(
            "forward_kl", h, read, H_T, READ_T, WEIGHT, LABELS, mix=(1.0, 0.0), rows=4
        ).loss

    h, w = H_S.astype(jnp.bfloat16), W_S.astype(jnp.bfloat16)
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(h, w)
    assert value.dtype == jnp.float32
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]
    wanted = dense("forward_kl", (1.0, 0.0), 1.0, H_S, W_S, B_S, bias=False)
    np.testing.assert_allclose(value, wanted, rtol=0.03)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 4, "model": 2}])
def test_on_a_mesh(axes):
    """Tokens over data, the vocabulary over model: the values of one device."""
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))
    wide = "model" if "model" in axes else None
    h_s, h_t = normal(16, D), normal(16, E)
    labels, weight = jnp.arange(16) % V, jnp.ones(16)

    def loss(h, w, h_t, w_t):
        reads = distill.Readout(w), distill.Readout(w_t, transposed=True)
        return distill.rowwise_loss(
            "jsd", h, reads[0], h_t, reads[1], weight, labels, mix=(0.5, 0.5), rows=8
        ).loss

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    given = (h_s, W_S, h_t, READ_T.kernel)
    places = (P("data"), P(wide), P("data"), P(None, wide))
    there = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(given, places, strict=True)]
    for a, b in zip(jax.tree.leaves(run(*there)), jax.tree.leaves(run(*given)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"ratio": 0.3, "temperature": 2.0, "scale_tau2": True}])
def test_kd_takes_it(options):
    student, teacher, batch = small.decoder(), small.teacher(), small.batch()
    params = small.start(student)
    wanted = small.value(distill.kd(student, teacher, kind="jsd", **options), params, batch)
    objective = distill.kd(student, teacher, kind="jsd", token_chunk=5, **options)
    found = small.value(objective, params, batch)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    assert small.largest(found[1], wanted[1]) < 1e-5
    out = objective(params, batch, None)
    ours = distill.kd(student, teacher, kind="jsd", **options)(params, batch, None)
    assert set(out.aux) == set(ours.aux)
    for name in out.aux:
        np.testing.assert_allclose(out.aux[name], ours.aux[name], rtol=1e-5)


def test_bad_input():
    args = (H_S, readout(W_S, B_S), H_T, READ_T)
    with pytest.raises(ValueError, match="rows must be a whole number >= 1, got 0"):
        distill.rowwise_loss("tvd", *args, WEIGHT, LABELS, rows=0)
    with pytest.raises(ValueError, match=r"labels must be \(11,\) like the tokens, got \(5,\)"):
        distill.rowwise_loss("tvd", *args, WEIGHT, LABELS[:5])
    student, teacher = small.decoder(), small.teacher()
    with pytest.raises(ValueError, match="token_chunk takes whole vocabularies"):
        distill.kd(student, teacher, token_chunk=4, top_k=3)
    with pytest.raises(ValueError, match="kind must be one of"):
        distill.rowwise_loss("kl", *args, WEIGHT, LABELS)
