"""Divergences from hidden states, a piece of the vocabulary at a time.

With z_S = h_S W_S^T + b_S (student) and z_T likewise, for pieces C of the vocabulary:

  log Z = log sum_C sum_{v in C} exp z_v           online: largest value and rescaled sum
  KL    = (1 / Z_T) sum_C sum_{v in C} exp(z_T)(z_T - z_S) - log Z_T + log Z_S      one pass,
          each side's logits less its own largest so far, so that a constant cancels
  other = sum_C sum_{v in C} f(log p_v, log q_v)                                    a second pass

Backward, every piece is computed again: with g_v = df / dlog q_v and G = sum_v g_v,

  dD / dz_v = g_v - q_v G,      dh_S = sum_C dz_C W_C,      dW_C = dz_C^T h_S

so that of both models no more than [N, chunk] logits exist at any time, N = tokens. Reverse
mode only: products with a Hessian that begin with ``jax.jvp`` need the dense form. The
vocabulary may be split over a mesh: a piece then holds a part of every shard (``shards``), and
all devices work on it.

Online normaliser: Milakov and Gimelshein 2018 (arXiv 1805.02867). Losses without the logits:
Wijmans et al. 2024 (2411.09009), Hsu et al. 2024 (2410.10989).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steppe.train.distill import divergences
from steppe.train.distill.divergences import exact, share
from steppe.train.distill.readout import Readout

ONE_PASS = ("forward_kl", "reverse_kl", "symmetric_kl")
# Hidden states [N, D] and the matrix that reads them.
Side: TypeAlias = tuple[jax.Array, Readout]


class Terms(NamedTuple):
    """What :func:`terms` finds at every position, float32.

    Attributes:
      divergence: of the two distributions, nats; 0 without a kind.
      log_z_s, log_z_t: log normalisers of the logits divided by the temperature; with
        ``exclude``, of those that are not excluded.
      log_z: log normaliser of the student's logits at temperature 1.
    """

    divergence: Any
    log_z_s: Any
    log_z_t: Any
    log_z: Any


@dataclass(frozen=True)
class Plan:
    """The constants of one program."""

    kind: str | None
    temperature: float
    beta: float
    alpha: float
    size: int  # V
    shards: int
    count: int  # pieces
    width: int  # columns of a piece, in each shard

    @property
    def local(self) -> int:
        return self.size // self.shards

    @property
    def ragged(self) -> bool:
        return self.count * self.width != self.local


def chunked_divergence(
    kind: str,
    h_s: Float[Array, "*n D"],
    readout_s: Readout,
    h_t: Float[Array, "*n E"],
    readout_t: Readout,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
    alpha: float = 0.1,
    vocab_chunk: int = 2048,
    shards: int = 1,
) -> Float[Array, "*n"]:
    """:func:`~steppe.train.distill.token_divergence` without the logits.

    Args:
      kind, temperature, beta, alpha: as there.
      h_s, readout_s: hidden states of the student and its output matrix, both differentiated.
      h_t, readout_t: the teacher's, of any width; no gradient.
      vocab_chunk: columns of a piece, all shards together; the logits of a piece take
        N * vocab_chunk * 4 bytes a model.
      shards: into how many parts the vocabulary is split over the mesh. 1 is right everywhere,
        but lets one device after the other work.

    Raises:
      ValueError: as ``token_divergence``; vocab_chunk or shards out of range.
    """
    return terms(
        kind,
        h_s,
        readout_s,
        h_t,
        readout_t,
        temperature=temperature,
        beta=beta,
        alpha=alpha,
        vocab_chunk=vocab_chunk,
        shards=shards,
    ).divergence


def terms(
    kind: str | None,
    h_s: Float[Array, "*n D"],
    readout_s: Readout,
    h_t: Float[Array, "*n E"] | None = None,
    readout_t: Readout | None = None,
    *,
    exclude: Int[Array, "*n K"] | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    alpha: float = 0.1,
    vocab_chunk: int = 2048,
    shards: int = 1,
) -> Terms:
    """Divergence and log normalisers at every position; see :func:`chunked_divergence`.

    Args:
      kind: None finds the normalisers only; the teacher may then be absent.
      exclude: tokens that are left out of both distributions, K at each position (the label of
        a decomposition, a stored top-k). Costs K comparisons a logit.

    Raises:
      ValueError: as :func:`chunked_divergence`; a kind without a teacher.
    """
    divergences.check(kind or divergences.KINDS[0], temperature, beta, alpha)
    if kind is not None and (h_t is None or readout_t is None):
        raise ValueError(f"kind={kind!r} compares with a teacher: give h_t and readout_t")
    size = check_vocabularies(h_s, readout_s, h_t, readout_t)
    if exclude is not None and exclude.shape[:-1] != h_s.shape[:-1]:
        raise ValueError(
            f"exclude must be {(*h_s.shape[:-1], 'K')}, a row for each position, got "
            f"{tuple(exclude.shape)}"
        )
    plan = _plan(kind, temperature, beta, alpha, size, vocab_chunk, shards)
    lead = h_s.shape[:-1]
    student = (h_s.reshape(-1, h_s.shape[-1]), readout_s)
    teacher = None
    if h_t is not None and readout_t is not None:
        teacher = jax.lax.stop_gradient((h_t.reshape(-1, h_t.shape[-1]), readout_t))
    ids = None if exclude is None else exclude.reshape(-1, exclude.shape[-1])
    found = _terms(plan, student, teacher, ids)
    return Terms(*(x.reshape(lead) for x in found))


def largest(
    h: Float[Array, "N D"],
    readout: Readout,
    k: int,
    *,
    vocab_chunk: int = 2048,
    shards: int = 1,
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
    """The k largest logits at each position, by falling size, and their tokens; no gradient."""
    plan = _plan(None, 1.0, 0.5, 0.1, readout.size, vocab_chunk, shards)
    n = h.shape[0]

    def merge(best: Any, index: jax.Array) -> tuple[Any, None]:
        z, _ = _logits(plan, (h, readout), None, None, index)
        columns = jnp.broadcast_to(_columns(plan, index), z.shape)
        every = jnp.concatenate([best[0], z], axis=1)
        value, place = jax.lax.top_k(every, k)
        ids = jnp.concatenate([best[1], columns], axis=1)
        return (value, jnp.take_along_axis(ids, place, axis=1)), None

    start = jnp.full((n, k), -jnp.inf, jnp.float32), jnp.zeros((n, k), jnp.int32)
    found: tuple[jax.Array, jax.Array] = _loop(plan, merge, start)
    return found


# The passes ----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _terms(plan: Plan, student: Side, teacher: Side | None, ids: jax.Array | None) -> Terms:
    return _forward(plan, student, teacher, ids)[0]


def _forward(plan: Plan, student: Side, teacher: Side | None, ids: jax.Array | None) -> Any:
    n = student[0].shape[0]
    zero, low = jnp.zeros(n, jnp.float32), jnp.full(n, -jnp.inf, jnp.float32)
    both = teacher is not None
    raw = plan.temperature != 1.0

    def normalise(carry: Any, index: jax.Array) -> tuple[Any, None]:
        z_s, z_t = _logits(plan, student, teacher, ids, index)
        a = z_s / plan.temperature
        new = dict(carry)
        new["s"], up_s, e_s, less_s = _grow(carry["s"], a)
        if raw:
            new["raw"] = _grow(carry["raw"], z_s)[0]
        if z_t is not None:
            b = z_t / plan.temperature
            new["t"], up_t, e_t, less_t = _grow(carry["t"], b)
            a, b = (z - _finite(new[side][0])[:, None] for side, z in (("s", a), ("t", b)))
            # What older columns lack where a side's largest logit has grown since.
            late = less_t - less_s
            if "forward" in carry:
                old = _times(up_t, carry["forward"] + late * carry["t"][1])
                new["forward"] = old + _times(e_t, b - a).sum(1)
            if "reverse" in carry:
                old = _times(up_s, carry["reverse"] - late * carry["s"][1])
                new["reverse"] = old + _times(e_s, a - b).sum(1)
        return new, None

    start: dict[str, Any] = {"s": (low, zero)} | ({"raw": (low, zero)} if raw else {})
    start |= {"t": (low, zero)} if both else {}
    start |= {"forward": zero} if plan.kind in ("forward_kl", "symmetric_kl") else {}
    start |= {"reverse": zero} if plan.kind in ("reverse_kl", "symmetric_kl") else {}
    carry = _loop(plan, normalise, start)

    # Two numbers each, and never their sum: where both models give logits around 1e4, it would
    # have lost the digits that the divergence is made of.
    norm_s = (_finite(carry["s"][0]), jnp.log(carry["s"][1]))
    norm_t = (_finite(carry["t"][0]), jnp.log(carry["t"][1])) if both else (zero, zero)
    norm = (_finite(carry["raw"][0]), jnp.log(carry["raw"][1])) if raw else norm_s
    gap = norm_t[1] - norm_s[1]
    value, slopes = zero, zero
    if "forward" in carry:
        part = 1.0 if plan.kind == "forward_kl" else 1 - plan.beta
        value += part * (carry["forward"] / carry["t"][1] - gap)
        slopes -= part
    if "reverse" in carry:
        part = 1.0 if plan.kind == "reverse_kl" else plan.beta
        reverse = part * (carry["reverse"] / carry["s"][1] + gap)
        value, slopes = value + reverse, slopes + reverse
    if plan.kind not in (None, "zero", *ONE_PASS):

        def add(sums: Any, index: jax.Array) -> tuple[Any, None]:
            z_s, z_t = _logits(plan, student, teacher, ids, index)
            f, g = _entry(plan, _log_p(plan, z_t, norm_t), _log_p(plan, z_s, norm_s))
            return (sums[0] + f.sum(1), sums[1] + g.sum(1)), None

        value, slopes = _loop(plan, add, (zero, zero))
    found = Terms(value, sum(norm_s), sum(norm_t), sum(norm))
    return found, (student, teacher, ids, norm_s, norm_t, norm, slopes)


def _backward(plan: Plan, kept: Any, given: Terms) -> Any:
    student, teacher, ids, norm_s, norm_t, norm, slopes = kept
    h, readout = student
    wide = readout.split(plan.shards)
    d_h = jnp.zeros(h.shape, jnp.float32)
    d_kernel = jnp.zeros(wide.kernel.shape, jnp.float32)
    d_bias = None if wide.bias is None else jnp.zeros(wide.bias.shape, jnp.float32)

    def add(carry: Any, index: jax.Array) -> tuple[Any, None]:
        d_h, d_kernel, d_bias = carry
        z_s, z_t = _logits(plan, student, teacher, ids, index)
        log_q = _log_p(plan, z_s, norm_s)
        q = jnp.exp(log_q)
        d = given.log_z_s[:, None] * q
        if plan.kind not in (None, "zero"):
            g = _entry(plan, _log_p(plan, z_t, norm_t), log_q)[1]
            d += given.divergence[:, None] * (g - q * slopes[:, None])
        d = d / plan.temperature
        d += given.log_z[:, None] * jnp.exp(_less(z_s, norm))
        d = readout.uncapped(z_s, d)
        start = _start(plan, index)
        # In the dtype that the product of the dense form would have.
        d = d.astype(jnp.result_type(h.dtype, readout.kernel.dtype))
        w = wide.take(start, plan.width)
        d_h += w.back(d)
        d_kernel = wide.put(d_kernel, start, plan.width, w.outer(d, h))
        if d_bias is not None:
            piece = d.astype(jnp.float32).sum(0).reshape(plan.shards, plan.width)
            d_bias = _added(d_bias, start, plan.width, piece, axis=1)
        return (d_h, d_kernel, d_bias), None

    d_h, d_kernel, d_bias = _loop(plan, add, (d_h, d_kernel, d_bias))
    back = readout.like(d_kernel, d_bias)
    return (d_h.astype(h.dtype), back), None, None


_terms.defvjp(_forward, _backward)


# One piece -----------------------------------------------------------------------------------


def _entry(plan: Plan, log_p: jax.Array, log_q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f(log p, log q) of each entry, and its derivative by log q."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    kind = plan.kind
    assert kind is not None
    forward = _times(p, log_p - log_q), -p
    reverse = _times(q, log_q - log_p)
    if kind == "forward_kl":
        return forward
    if kind == "reverse_kl":
        # The derivative also has + q, which g - q G takes away again.
        return reverse, reverse
    if kind == "symmetric_kl":
        f = (1 - plan.beta) * forward[0] + plan.beta * reverse
        return f, (1 - plan.beta) * forward[1] + plan.beta * reverse
    if kind == "tvd":
        return 0.5 * jnp.abs(p - q), 0.5 * q * jnp.sign(q - p)
    of_p = share(kind, plan.beta, plan.alpha)
    log_m = divergences.log_mix(log_p, log_q, of_p)
    m = jnp.exp(log_m)
    ratio = jnp.where(m > 0, q / jnp.where(m > 0, m, 1.0), 0.0)
    if kind == "skew_forward_kl":
        return _times(p, log_p - log_m), -(1 - of_p) * p * ratio
    gap = _times(q, log_q - log_m)
    if kind == "skew_reverse_kl":
        return gap, gap + q - (1 - of_p) * q * ratio
    f = plan.beta * _times(p, log_p - log_m) + (1 - plan.beta) * gap
    return f, (1 - plan.beta) * gap


def _logits(
    plan: Plan, student: Side, teacher: Side | None, ids: jax.Array | None, index: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Logits [N, shards * width] of piece ``index``, -inf where a column does not count."""
    start = _start(plan, index)
    local = start + jnp.arange(plan.width)
    dead = None
    if plan.ragged:
        # The last piece begins early, so as to end with the vocabulary: it overlaps.
        dead = jnp.tile(local < index * plan.width, plan.shards)[None]
    if ids is not None:
        named = (_columns(plan, index)[None, :, None] == ids[:, None, :]).any(-1)
        dead = named if dead is None else dead | named

    def one(side: Side) -> jax.Array:
        h, readout = side
        z = readout.split(plan.shards).take(start, plan.width).logits(h)
        return z if dead is None else jnp.where(dead, -jnp.inf, z)

    return one(student), None if teacher is None else one(teacher)


def _log_p(plan: Plan, z: jax.Array | None, norm: tuple[jax.Array, jax.Array]) -> jax.Array:
    assert z is not None, "a divergence was asked for, and there is no teacher"
    return _less(z / plan.temperature, norm)


def _less(z: jax.Array, norm: tuple[jax.Array, jax.Array]) -> jax.Array:
    return z - norm[0][:, None] - _finite(norm[1])[:, None]


def _columns(plan: Plan, index: jax.Array) -> jax.Array:
    """The tokens of piece ``index``, int32 [shards * width]."""
    local = _start(plan, index) + jnp.arange(plan.width)
    return (jnp.arange(plan.shards)[:, None] * plan.local + local).reshape(-1)


def _start(plan: Plan, index: jax.Array) -> jax.Array:
    return jnp.minimum(index * plan.width, plan.local - plan.width)


def _loop(plan: Plan, body: Callable[..., Any], carry: Any) -> Any:
    return jax.lax.scan(body, carry, jnp.arange(plan.count))[0]


def _grow(
    carry: tuple[jax.Array, jax.Array], z: jax.Array
) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
    """((largest, sum), factor on older sums, exp(z - largest), the largest's fall <= 0)."""
    old, total = carry
    new = jnp.maximum(old, z.max(1))
    safe = _finite(new)
    up, e = jnp.exp(old - safe), jnp.exp(z - safe[:, None])
    fall = jnp.where(old == -jnp.inf, 0.0, old - safe)
    return (new, total * up + e.sum(1)), up, e, fall


def _finite(x: jax.Array) -> jax.Array:
    # Where nothing counts, every exponential must be 0, not NaN.
    return jnp.where(x == -jnp.inf, 0.0, x)


def _times(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(w > 0, w * x, 0.0)


def _added(
    whole: jax.Array, start: jax.Array, width: int, piece: jax.Array, axis: int
) -> jax.Array:
    old = jax.lax.dynamic_slice_in_dim(whole, start, width, axis)
    return jax.lax.dynamic_update_slice_in_dim(whole, old + piece, start, axis)


def _plan(
    kind: str | None,
    temperature: float,
    beta: float,
    alpha: float,
    size: int,
    vocab_chunk: int,
    shards: int,
) -> Plan:
    for name, value in (("vocab_chunk", vocab_chunk), ("shards", shards)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    if size % shards:
        raise ValueError(
            f"shards must divide the vocabulary of {size}, got {shards}: give the size of the "
            "mesh axis that splits the output matrix, or 1"
        )
    local = size // shards
    count = -(-size // vocab_chunk)
    width = -(-local // min(count, local))
    count = -(-local // width)
    kind = None if kind is None else exact(kind, beta, alpha)
    return Plan(kind, float(temperature), beta, alpha, size, shards, count, width)


def check_vocabularies(
    h_s: jax.Array, readout_s: Readout, h_t: jax.Array | None, readout_t: Readout | None
) -> int:
    """The common size V.

    Raises:
      ValueError: hidden states, matrices and vocabularies that do not fit each other.
    """
    readout_s.check(h_s, "student")
    if h_t is None or readout_t is None:
        return readout_s.size
    readout_t.check(h_t, "teacher")
    if readout_s.size != readout_t.size:
        raise ValueError(divergences.unlike(readout_s.size, readout_t.size))
    if h_s.shape[:-1] != h_t.shape[:-1]:
        raise ValueError(
            f"hidden states of shape {h_s.shape} (student) and {h_t.shape} (teacher) are not of "
            "the same positions: give both models the same input_ids"
        )
    return readout_s.size
