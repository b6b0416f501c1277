"""Pieces of the vocabulary give what all logits give: values, gradients, top-k, on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from steppe.train import distill
from steppe.train.distill import chunked, topk

B, T, D, E, V = 2, 5, 6, 7, 24
RNG = np.random.default_rng(0)
HOW = {"beta": 0.3, "alpha": 0.2}


def normal(*shape, scale=1.0):
    return jnp.asarray(RNG.normal(size=shape) * scale, jnp.float32)


def sides(size=V, bias=True, transposed=False, softcap=None):
    """(h, W, b) of the student, (h, readout) of the teacher, and how to read the student's."""
    student = (normal(B, T, D), normal(*((D, size) if transposed else (size, D))), normal(size))
    teacher = normal(B, T, E), distill.Readout(normal(E, size), transposed=True)

    def readout(w, b):
        return distill.Readout(w, b if bias else None, transposed, softcap)

    return student, teacher, readout


def logits(h, readout):
    return readout.logits(h.reshape(-1, h.shape[-1])).reshape(*h.shape[:-1], -1)


def both(kind, size=V, chunk=7, shards=1, temperature=1.0, **options):
    """(value, gradients) dense and in pieces, under different weights at every position."""
    student, (h_t, read_t), readout = sides(size, **options)
    weight = normal(B, T)
    how = {**HOW, "temperature": temperature}

    def dense(h, w, b):
        z = logits(h, readout(w, b))
        return (weight * distill.token_divergence(kind, z, logits(h_t, read_t), **how)).sum()

    def pieces(h, w, b):
        value = distill.chunked_divergence(
            kind, h, readout(w, b), h_t, read_t, vocab_chunk=chunk, shards=shards, **how
        )
        return (weight * value).sum()

    return tuple(jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*student) for f in (dense, pieces))


def close(pair, atol=1e-5):
    (value, grads), (other, others) = pair
    np.testing.assert_allclose(other, value, atol=atol)
    for a, b in zip(others, grads, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize("kind", distill.KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_every_kind(kind, temperature):
    close(both(kind, temperature=temperature))


@pytest.mark.parametrize("chunk", [1, 7, V, 1000])
def test_any_size_of_piece(chunk):
    close(both("forward_kl", chunk=chunk))


@pytest.mark.parametrize(("size", "shards"), [(24, 4), (22, 2), (23, 1)])
def test_shards_and_a_vocabulary_that_no_piece_divides(size, shards):
    close(both("jsd", size=size, chunk=10, shards=shards))


@pytest.mark.parametrize(
    "options", [{"bias": False}, {"transposed": True}, {"softcap": 2.0}], ids=str
)
def test_every_form_of_output_layer(options):
    close(both("reverse_kl", **options))


@pytest.mark.parametrize("kind", ["jsd", "symmetric_kl", "skew_forward_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_ends_of_the_range(kind, end):
    student, (h_t, read_t), readout = sides()
    how = {"beta": end, "alpha": end}
    read_s = readout(*student[1:])
    found = distill.chunked_divergence(kind, student[0], read_s, h_t, read_t, vocab_chunk=7, **how)
    wanted = distill.token_divergence(kind, logits(student[0], read_s), logits(h_t, read_t), **how)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", distill.KINDS)
def test_equal_models_give_0_and_no_gradient(kind):
    (h, w, b), _, readout = sides()

    def total(h, w):
        return distill.chunked_divergence(
            kind, h, readout(w, b), 1.0 * h, readout(1.0 * w, b), vocab_chunk=7
        ).sum()

    value, grads = jax.jit(jax.value_and_grad(total, (0, 1)))(h, w)
    np.testing.assert_allclose(value, 0, atol=1e-5)
    assert max(float(jnp.abs(g).max()) for g in grads) < 1e-6


@pytest.mark.parametrize("kind", distill.KINDS)
def test_large_logits_stay_numbers(kind):
    (h, w, b), (h_t, read_t), readout = sides()
    value, grad = jax.jit(
        jax.value_and_grad(
            lambda h: distill.chunked_divergence(
                kind, h * 1e4, readout(w, b), h_t * -1e4, read_t, vocab_chunk=7
            ).sum()
        )
    )(h)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    dense = distill.token_divergence(
        kind, logits(h * 1e4, readout(w, b)), logits(h_t * -1e4, read_t)
    ).sum()
    np.testing.assert_allclose(value, dense, rtol=1e-4)


def test_large_logits_that_agree_keep_their_digits():
    (h, w, b), _, readout = sides()
    h = h.at[..., 0].set(1.0)
    high = w.at[:, 0].add(3000.0)  # the same constant on every logit
    found, low = (
        distill.chunked_divergence("forward_kl", h, readout(x, b), h * 0.9, readout(y, b))
        for x, y in ((high, high / 0.9 * 1.0), (w, w))
    )
    dense = distill.token_divergence(
        "forward_kl", logits(h, readout(high, b)), logits(h * 0.9, readout(high / 0.9, b))
    )
    np.testing.assert_allclose(found, dense, atol=2e-3)
    assert np.isfinite(low).all()


def test_normalisers_and_their_gradient_at_both_temperatures():
    (h, w, b), _, readout = sides()

    def dense(h, w, b):
        z = logits(h, readout(w, b))
        warm = jax.nn.logsumexp(z / 3, axis=-1)
        return (warm * 0.3 + jax.nn.logsumexp(z, axis=-1)).sum()

    def pieces(h, w, b):
        found = chunked.terms(None, h, readout(w, b), temperature=3.0, vocab_chunk=7)
        return (found.log_z_s * 0.3 + found.log_z).sum()

    close([jax.jit(jax.value_and_grad(f, (0, 1, 2)))(h, w, b) for f in (dense, pieces)])


def test_excluded_tokens_are_in_neither_distribution():
    student, (h_t, read_t), readout = sides()
    ids = jnp.asarray(RNG.integers(0, V, (B, T, 2)))

    def dense(h, w, b):
        z_s, z_t = logits(h, readout(w, b)), logits(h_t, read_t)
        z_s, z_t = (
            jnp.put_along_axis(z, ids, -jnp.inf, axis=-1, inplace=False) for z in (z_s, z_t)
        )
        return distill.token_divergence("forward_kl", z_s, z_t).sum()

    def pieces(h, w, b):
        return chunked.terms(
            "forward_kl", h, readout(w, b), h_t, read_t, exclude=ids, vocab_chunk=7
        ).divergence.sum()

    close([jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*student) for f in (dense, pieces)])


def test_bf16_stays_near_and_returns_the_dtypes_it_was_given():
    student, (h_t, read_t), readout = sides()
    low = [x.astype(jnp.bfloat16) for x in student]
    teacher = h_t.astype(jnp.bfloat16), jax.tree.map(lambda x: x.astype(jnp.bfloat16), read_t)

    def total(teacher, h, w, b):
        return distill.chunked_divergence("jsd", h, readout(w, b), *teacher, vocab_chunk=7).sum()

    run = jax.jit(jax.value_and_grad(total, (1, 2, 3)))
    value, grads = run(teacher, *low)
    wide, wides = run((h_t, read_t), *student)
    assert {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(value, wide, rtol=0.05)
    for a, b in zip(grads, wides, strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b, atol=0.05)


def test_no_array_of_all_logits_is_in_the_program():
    student, (h_t, read_t), readout = sides(size=1024)
    n = B * T

    def total(h, w, b):
        return distill.chunked_divergence(
            "jsd", h, readout(w, b), h_t, read_t, vocab_chunk=64
        ).sum()

    text = jax.jit(jax.grad(total, (0, 1, 2))).lower(*student).compile().as_text()
    assert f"[{n},64]" in text
    for shape in (f"[{n},1024]", f"[1024,{n}]", f"[{B},{T},1024]"):
        assert shape not in text


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_a_vocabulary_split_over_a_mesh(kind, devices):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    (h, w, b), (h_t, read_t), readout = sides()

    def total(h, w, b, h_t, u, shards=1):
        read_t = distill.Readout(u, transposed=True)
        return distill.chunked_divergence(
            kind, h, readout(w, b), h_t, read_t, vocab_chunk=8, shards=shards
        ).sum()

    args = (h, w, b, h_t, read_t.kernel)
    wanted = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*args)
    specs = (P("data"), P("model"), P("model"), P("data"), P(None, "model"))
    split = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(args, specs, strict=True)]
    for shards in (4, 1):
        run = jax.jit(jax.value_and_grad(functools.partial(total, shards=shards), (0, 1, 2)))
        found = run(*split)
        jax.block_until_ready(found)
        close((wanted, found))


# Top-k and the remainder ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", distill.KINDS)
def test_all_tokens_are_no_reduction_and_few_are_never_more(kind):
    z_s, z_t = normal(9, V, scale=2.0), normal(9, V, scale=2.0)
    whole = distill.token_divergence(kind, z_s, z_t)

    def reduced(z, k):
        return distill.topk_divergence(kind, z, z_t, k=k)

    np.testing.assert_allclose(reduced(z_s, V), whole, atol=1e-5)
    last = jnp.zeros(9)
    for k in (1, 4, 12):
        now = reduced(z_s, k)
        assert (now >= last - 1e-6).all()
        assert (now <= whole + 1e-5).all()
        last = now
    for k in (4, V):
        grad = jax.grad(lambda z, k=k: reduced(z, k).sum())(z_s)
        assert np.isfinite(grad).all()
    exact = jax.grad(lambda z: distill.token_divergence(kind, z, z_t).sum())(z_s)
    np.testing.assert_allclose(grad, exact, atol=1e-5)


@pytest.mark.parametrize("k", [1, 4, V])
def test_top_k_in_pieces(k):
    student, (h_t, read_t), readout = sides()
    z_t = logits(h_t, read_t)
    wanted = topk.top_k(z_t, k, temperature=2.0)
    found = topk.chunked_top_k(h_t, read_t, k, temperature=2.0, vocab_chunk=7)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_allclose(found.log_p, wanted.log_p, atol=1e-5)
    np.testing.assert_allclose(found.log_rest, wanted.log_rest, atol=1e-5)

    def dense(h, w, b):
        z = logits(h, readout(w, b))
        return topk.stored_divergence("forward_kl", z, wanted, temperature=2.0).sum()

    def pieces(h, w, b):
        return topk.chunked_stored_divergence(
            "forward_kl", h, readout(w, b), found, temperature=2.0, vocab_chunk=7
        ).sum()

    close([jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*student) for f in (dense, pieces)])


# Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"vocab_chunk": 0}, "vocab_chunk must be a whole number >= 1, got 0"),
        ({"shards": 5}, "shards must divide the vocabulary of 24, got 5"),
        ({"temperature": -1}, "temperature must be a finite number > 0, got -1"),
    ],
)
def test_bad_numbers(how, message):
    (h, w, b), (h_t, read_t), readout = sides()
    with pytest.raises(ValueError, match=message):
        distill.chunked_divergence("tvd", h, readout(w, b), h_t, read_t, **how)


def test_sides_that_do_not_fit():
    (h, w, b), (h_t, read_t), readout = sides()
    other = distill.Readout(normal(E, V + 2), transposed=True)
    with pytest.raises(ValueError, match="student has 24 classes and the teacher 26"):
        distill.chunked_divergence("tvd", h, readout(w, b), h_t, other)
    with pytest.raises(ValueError, match=r"must be \[V, D\] with D = 6, .* got shape \(6, 24\)"):
        distill.chunked_divergence("tvd", h, readout(w.T, b), h_t, read_t)
    with pytest.raises(ValueError, match="not of the same positions"):
        distill.chunked_divergence("tvd", h, readout(w, b), h_t[:1], read_t)
    with pytest.raises(ValueError, match="k must be a whole number in 1..24"):
        topk.chunked_top_k(h_t, read_t, 25)
    stored = topk.top_k(logits(h_t, read_t)[:1], 3)
    with pytest.raises(ValueError, match="stored top-k is of positions"):
        topk.stored_divergence("tvd", logits(h, readout(w, b)), stored)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "symmetric_kl"])
@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_a_constant_on_all_logits_of_one_side_cancels(kind, offset):
    """Against float64, of the float32 logits."""
    z_s, z_t = (normal(5, V, scale=2.0) for _ in range(2))
    z_t = z_t + offset
    eye = distill.Readout(jnp.eye(V))
    found = distill.chunked_divergence(kind, z_s, eye, z_t, eye, vocab_chunk=5, beta=0.3)
    log_q, log_p = (np.asarray(z, np.float64) for z in (z_s, z_t))
    log_q, log_p = (z - z.max(1, keepdims=True) for z in (log_q, log_p))
    log_q, log_p = (z - np.log(np.exp(z).sum(1, keepdims=True)) for z in (log_q, log_p))
    forward = (np.exp(log_p) * (log_p - log_q)).sum(1)
    reverse = (np.exp(log_q) * (log_q - log_p)).sum(1)
    share = {"forward_kl": 0.0, "reverse_kl": 1.0, "symmetric_kl": 0.3}[kind]
    np.testing.assert_allclose(found, (1 - share) * forward + share * reverse, atol=1e-5)
