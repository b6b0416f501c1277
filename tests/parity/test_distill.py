"""The divergences and ATKD against PyTorch, each written anew from its published formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.train import distill

torch = pytest.importorskip("torch")
F = torch.nn.functional
pytestmark = pytest.mark.parity

RNG = np.random.default_rng(0)
B, T, V = 3, 7, 41
STUDENT, TEACHER = (RNG.normal(size=(B, T, V)).astype(np.float32) * 2 for _ in range(2))
LABELS = RNG.integers(0, V, (B, T))
VALID = (RNG.random((B, T)) < 0.7).astype(np.float32)


# In torch.nn.functional.kl_div(input, target) the input is the second argument of the KL.
def gkd(s, t, beta, temperature):
    """Generalised JSD as in the trainers: kl_div on log probabilities, summed over classes."""
    log_q, log_p = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
    if beta == 0:
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if beta == 1:
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    b = torch.tensor(beta, dtype=s.dtype)
    log_m = torch.logsumexp(torch.stack([log_q + torch.log(1 - b), log_p + torch.log(b)]), 0)
    of_p = F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
    of_q = F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(-1)
    return beta * of_p + (1 - beta) * of_q


def skewed(s, t, lam, reverse):
    """DistiLLM's skewed divergences, in the probabilities that it computes them in."""
    q, p = F.softmax(s, -1), F.softmax(t, -1)
    if reverse:
        m = (1 - lam) * p + lam * q
        return (q * (torch.log(q) - torch.log(m))).sum(-1)
    m = lam * p + (1 - lam) * q
    # The cross entropy, as there; less the teacher's entropy it is the KL.
    return -(p * torch.log(m)).sum(-1) + (p * F.log_softmax(t, -1)).sum(-1)


def tvd(s, t):
    return 0.5 * (F.softmax(s, -1) - F.softmax(t, -1)).abs().sum(-1)


CASES = {
    "forward_kl": ({}, lambda s, t: gkd(s, t, 0, 1.0)),
    "reverse_kl": ({}, lambda s, t: gkd(s, t, 1, 1.0)),
    "jsd .1": ({"beta": 0.1}, lambda s, t: gkd(s, t, 0.1, 1.0)),
    "jsd .5 warm": ({"beta": 0.5, "temperature": 0.9}, lambda s, t: gkd(s, t, 0.5, 0.9)),
    "jsd .9": ({"beta": 0.9}, lambda s, t: gkd(s, t, 0.9, 1.0)),
    "skew_forward_kl": ({"alpha": 0.1}, lambda s, t: skewed(s, t, 0.1, False)),
    "skew_reverse_kl": ({"alpha": 0.1}, lambda s, t: skewed(s, t, 0.1, True)),
    "tvd": ({}, tvd),
    "symmetric_kl": (
        {"beta": 0.9},
        lambda s, t: 0.1 * gkd(s, t, 0, 1.0) + 0.9 * gkd(s, t, 1, 1.0),
    ),
}


def in_torch(loss):
    s = torch.tensor(STUDENT, requires_grad=True)
    value = loss(s, torch.tensor(TEACHER))
    value.backward()
    return value.item(), s.grad.numpy()


def compare(ours, theirs):
    value, grad = jax.jit(jax.value_and_grad(ours))(jnp.asarray(STUDENT))
    wanted, expected = in_torch(theirs)
    np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grad, expected, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_divergences(name):
    how, reference = CASES[name]
    kind, mask = name.split()[0], torch.tensor(VALID)

    def ours(z):
        return distill.masked_token_mean(
            distill.token_divergence(kind, z, jnp.asarray(TEACHER), **how), VALID
        )

    compare(ours, lambda s, t: (reference(s, t) * mask).sum() / mask.sum())


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_masked_vocabulary(kind):
    s, t = torch.tensor(STUDENT), torch.tensor(TEACHER)
    s[..., 30:] = t[..., 30:] = -torch.inf
    found = distill.token_divergence(kind, jnp.asarray(s.numpy()), jnp.asarray(t.numpy()))
    short = gkd(s[..., :30], t[..., :30], 0 if kind == "forward_kl" else 1, 1.0)
    np.testing.assert_allclose(found, short.numpy(), atol=1e-5)


def atkd(s, t, reverse, lam=0.2):
    """The loss over the valid tokens, from concatenated probabilities, token by token."""
    valid = torch.tensor(VALID) > 0
    s, t, y = s[valid], t[valid], torch.tensor(LABELS)[valid]
    p_y = F.softmax(t, -1).gather(1, y[:, None])[:, 0]
    unc = 1 - p_y
    others = torch.ones_like(s, dtype=torch.bool).scatter(1, y[:, None], False)
    s_rest, t_rest = (z[others].reshape(len(z), -1) for z in (s, t))
    q_y = F.softmax(s, -1).gather(1, y[:, None])[:, 0]
    two_s, two_t = (torch.stack([x, 1 - x], 1) for x in (q_y, p_y))
    first, second = (
        ((two_s, s_rest), (two_t, t_rest)) if reverse else ((two_t, t_rest), (two_s, s_rest))
    )
    tkd = (first[0] * (first[0].log() - second[0].log())).sum(1)
    log_a, log_b = F.log_softmax(first[1], -1), F.log_softmax(second[1], -1)
    dkd = (log_a.exp() * (log_a - log_b)).sum(1)
    limit = torch.median(unc)
    hard = unc >= limit
    return lam * dkd[~hard].mean() + (1 - lam) * (tkd + dkd)[hard].mean()


@pytest.mark.parametrize("reverse", [False, True])
def test_atkd(reverse):
    def ours(z):
        return distill.atkd_loss(
            z, jnp.asarray(TEACHER), jnp.asarray(LABELS), VALID, reverse=reverse
        )[0]

    compare(ours, functools.partial(atkd, reverse=reverse))


def mutual(s, t, tau=2.0):
    """Co-training of two models, cross entropies and batch means of the soft losses."""
    mask = torch.tensor(VALID) > 0
    s, t, y = s[mask], t[mask], torch.tensor(LABELS)[mask]

    def soft(own, other):
        log_q, p = F.log_softmax(own / tau, -1), F.softmax(other.detach() / tau, -1)
        return F.kl_div(log_q, p, reduction="batchmean") * tau**2

    return F.cross_entropy(s, y) + F.cross_entropy(t, y) + soft(s, t) + soft(t, s)


def test_ctcd():
    def ours(z):
        return distill.mutual_kd_loss(
            jnp.asarray(TEACHER), z, jnp.asarray(LABELS), VALID, None, 2.0, True
        )[0]

    compare(ours, mutual)


def test_chunked_divergence_of_two_linear_heads():
    h = RNG.normal(size=(B, T, 6)).astype(np.float32)
    w = RNG.normal(size=(V, 6)).astype(np.float32)

    def ours(kernel):
        readout = distill.Readout(kernel)
        teacher = distill.Readout(jnp.asarray(w))
        value = distill.chunked_divergence(
            "jsd", jnp.asarray(h), readout, jnp.asarray(h), teacher, vocab_chunk=10
        )
        return distill.masked_token_mean(value, VALID)

    mine = w + RNG.normal(size=w.shape).astype(np.float32)
    value, grad = jax.jit(jax.value_and_grad(ours))(jnp.asarray(mine))
    kernel, x = torch.tensor(mine, requires_grad=True), torch.tensor(h)
    mask = torch.tensor(VALID)
    loss = (gkd(x @ kernel.T, x @ torch.tensor(w).T, 0.5, 1.0) * mask).sum() / mask.sum()
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(grad, kernel.grad.numpy(), atol=1e-5)
