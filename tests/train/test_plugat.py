"""PlugAT's training: what is refused, the attack that it is trained against, a real step."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.models import tree
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.model import ModelOut
from steppe.models.overlays import plugat as module
from steppe.train import plugat, step

KEY = jax.random.key(0)
B, T, D, C = 6, 5, 4, 3


def toy_apply(params, batch, *, embeds, **_):
    """Classes from the mean of the embeddings, moved by a module of one vector and one matrix."""
    shown = jnp.asarray(batch["attention_mask"])[..., None]
    x = (embeds * shown).sum(1) / shown.sum(1) + params["overlay"]["p"]
    return ModelOut(jnp.tanh(x @ params["overlay"]["m"]) @ params["base"]["w"], embeds)


TOY = SimpleNamespace(apply=toy_apply)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def params():
    draw = rng(1).normal
    return jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float32),
        {
            "base": {"embed": {"word": {"table": draw(size=(9, D))}}, "w": draw(size=(5, C))},
            "overlay": {"p": draw(size=D), "m": draw(size=(D, 5))},
        },
    )


@pytest.fixture(scope="module")
def batch():
    mask = (np.arange(T) < np.array([5, 4, 5, 2, 3, 5])[:, None]).astype(np.int32)
    return {
        "input_ids": rng(2).integers(0, 9, (B, T)) * mask,
        "attention_mask": mask,
        "labels": np.array([0, 1, 2, 1, 0, 2]),
        "label_mask": np.array([1, 1, 1, 1, 1, 0], np.float32),
    }


@pytest.fixture(scope="module")
def setting(params, batch):
    """(clean, adversarial) as functions of the module, under perturbations that hurt."""
    embeds = plugat.word_embeddings(params, batch)
    attack = jax.jit(lambda p: plugat.attack(TOY, p, batch, KEY, steps=3, lr=1.0))
    delta = attack(params)

    def each(own, at):
        logits = toy_apply({**params, "overlay": own}, batch, embeds=at).logits
        picked = jnp.take_along_axis(logits, jnp.asarray(batch["labels"])[:, None], 1)[:, 0]
        return (jax.nn.logsumexp(logits, -1) - picked) * batch["label_mask"]

    def clean(own):
        return each(own, embeds).sum() / 5

    return clean, lambda own: each(own, embeds + delta)


@pytest.fixture(scope="module")
def found(params, setting):
    """By hand: a_i [B, n], c [n], and both losses."""
    clean, adversarial = setting
    own = params["overlay"]
    a, c, losses = jax.jit(
        lambda o: (
            jax.jacrev(adversarial)(o),
            jax.grad(clean)(o),
            (clean(o), adversarial(o)),
        )
    )(own)
    return flat(a, B), flat(c, 1)[0], *losses


def flat(trees, count):
    return np.concatenate([np.reshape(x, (count, -1)) for x in jax.tree.leaves(trees)], axis=1)


RHO = (0.0, 0.3, -0.3)


def test_one_derivative_gives_all_influences(params, setting, found):
    a, c, *_ = found

    @jax.jit
    def run(own):
        kept = [plugat.adv_filter(*setting, own, rho=rho) for rho in RHO]
        return plugat.influences(*setting, own), kept

    (dots, norm), kept = run(params["overlay"])
    np.testing.assert_allclose(dots, a @ c, atol=1e-5)
    np.testing.assert_allclose(norm, c @ c, rtol=1e-5)
    size = np.linalg.norm(a, axis=1) * np.linalg.norm(c)
    for rho, keep in zip(RHO, kept, strict=True):
        np.testing.assert_array_equal(keep, a @ c >= rho * size)
    assert 0 < kept[0].sum() < B


def test_lookahead_takes_the_step(params, setting, found):
    a, c, now, _ = found
    own = params["overlay"]
    rows = {"m": a[:, : D * 5].reshape(B, D, 5), "p": a[:, D * 5 :]}

    @jax.jit
    def run(own):
        ahead = jax.vmap(lambda g: setting[0](jax.tree.map(lambda p, g: p - 0.1 * g, own, g)))
        options = ({"step": 0.1}, {"step": 0.1, "margin": 0.02}, {"step": 1e-3, "margin": 1e-6})
        kept = [plugat.adv_filter(*setting, own, rule="lookahead", **o) for o in options]
        return ahead(rows), kept

    after, kept = run(own)
    for keep, margin in zip(kept, (0.0, 0.02), strict=False):
        np.testing.assert_array_equal(keep[:5], np.asarray(after[:5] <= now + margin))
    # Near enough both rules agree: what is kept does not raise the clean loss to first order.
    np.testing.assert_array_equal(kept[2], a @ c >= 0)


def test_a_flipped_label_is_refused_and_an_example_keeps_itself(params, batch):
    embeds = plugat.word_embeddings(params, batch)

    def each(label):
        def loss(own):
            full = {**params, "overlay": own}
            return -jax.nn.log_softmax(toy_apply(full, batch, embeds=embeds).logits[:1])[:, label]

        return loss

    def mean(own):
        return each(0)(own).sum()

    for label, kept in ((0, True), (1, False)):
        keep = plugat.adv_filter(mean, each(label), params["overlay"])
        assert keep.tolist() == [kept]


def test_the_objective_and_its_gradient(params, batch, found):
    a, c, clean, adversarial = found
    dots, off = a @ c, np.asarray(adversarial)[:5]
    wanted = {
        "grad": c + a[:5][dots[:5] >= 0].mean(0),
        "none": c + a.sum(0) / 5,
        "project": c + (a - np.minimum(dots, 0)[:, None] / (c @ c) * c).sum(0) / 5,
    }

    def loss(own, rule):
        options = {"rho": 1.0} if rule == "nothing" else {"rule": rule}
        objective = plugat.plugat_loss(TOY, steps=3, lr=1.0, **options)
        out = objective({**params, "overlay": own}, batch, KEY)
        return sum(out.total[n] / jnp.maximum(out.weight[n], 1) for n in out.total), out

    @jax.jit
    def run(own):
        grad = jax.value_and_grad(loss, has_aux=True)
        return {rule: grad(own, rule) for rule in (*wanted, "nothing")}

    results = run(params["overlay"])
    (value, out), grads = results.pop("nothing")
    # Nothing kept: the clean term alone, and no division by nothing.
    assert (out.total["adversarial"], out.weight["adversarial"]) == (0, 0)
    np.testing.assert_allclose(value, clean, rtol=1e-5)
    np.testing.assert_allclose(flat(grads, 1)[0], c, atol=1e-5)
    for rule, ((value, out), grads) in results.items():
        kept = (dots[:5] >= 0) if rule == "grad" else np.ones(5, bool)
        np.testing.assert_allclose(flat(grads, 1)[0], wanted[rule], atol=1e-5, err_msg=rule)
        np.testing.assert_allclose(value, clean + off[kept].mean(), rtol=1e-5, err_msg=rule)
        assert out.aux["kept"] == (kept.sum(), 5)


def test_the_attack(params, batch):
    mask = batch["attention_mask"]
    wide = {n: np.repeat(v, 200, axis=0) for n, v in batch.items()}

    def total(at):
        logits = toy_apply(params, batch, embeds=at).logits
        return -(jax.nn.log_softmax(logits)[jnp.arange(5), batch["labels"][:5]]).sum()

    @jax.jit
    def run(params):
        def attack(batch=batch, **options):
            return plugat.attack(TOY, params, batch, KEY, **options)

        many = attack(wide, steps=1, lr=0.0, mag=0.3)
        one, ball = attack(steps=1, lr=0.5, mag=0.0), attack(steps=6, lr=0.5, eps=0.7)
        embeds = plugat.word_embeddings(params, batch)
        totals = [total(embeds + d) for d in (0.0, one, ball)]
        return many, one, ball, jax.grad(total)(embeds), totals

    many, one, ball, g, totals = run(params)
    assert not np.asarray(many)[wide["attention_mask"] == 0].any()
    size = np.sqrt(np.mean(np.square(many).sum((1, 2))))
    np.testing.assert_allclose(size, 0.3 / np.sqrt(3), rtol=0.02)
    # From 0, one step is of length lr along the gradient of each text.
    np.testing.assert_allclose(np.sqrt(np.square(one).sum((1, 2)))[:5], 0.5, rtol=1e-4)
    g = np.asarray(g)
    g = 0.5 * g / np.maximum(np.sqrt(np.square(g).sum((1, 2), keepdims=True)), 1e-8)
    np.testing.assert_allclose(one, g, atol=1e-5)
    assert np.sqrt(np.square(ball).sum((1, 2))).max() < 0.7001
    assert not np.asarray(ball)[mask == 0].any()
    assert totals[0] < totals[1] < totals[2]


def test_a_plugged_classifier_learns_and_its_base_does_not():
    config = EncoderConfig(
        "bert", vocab_size=20, width=8, layers=1, heads=2, ffn_width=16, positions=12, drop=0.0,
        attn_drop=0.0, unroll=1, head=HeadConfig("classification", 2, None, 0.0),
    )  # fmt: skip
    model = config.build()
    base = jax.jit(model.init)(KEY)
    base = jax.tree.map(
        lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape), base
    )
    bound = module.overlay(length=2, hidden=4).bind(model, frozen=base, trainable=())
    ids = rng(3).integers(1, 20, (8, 6)).astype(np.int32)
    batch = {"input_ids": ids, "labels": (ids[:, 1] > 9).astype(np.int32)}
    run = step.make(plugat.plugat_loss(bound, steps=2, lr=0.3), optax.adam(5e-2))
    state = step.init(KEY, bound, optax.adam(5e-2))
    assert {p.split("/")[0] for p in tree.paths(state.params)} == {"overlay"}
    seen = []
    for _ in range(25):
        state, metrics = run(state, batch)
        seen.append({n: float(v[0] / v[1]) for n, v in metrics.items() if v[1]})
    assert run.compiles == 1
    assert seen[-1]["loss"] < 0.95 * seen[0]["loss"]
    for path, leaf in tree.flatten(state.frozen["base"]).items():
        np.testing.assert_array_equal(leaf, tree.get(base, path), err_msg=path)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: plugat.plugat_loss(TOY, rule="cos"), "rule must be one of grad, lookahead"),
        (lambda: plugat.plugat_loss(TOY, rho=2), r"rho must be in \[-1, 1\], got 2"),
        (lambda: plugat.plugat_loss(TOY, steps=0), "steps must be >= 1"),
        (lambda: plugat.plugat_loss(TOY, lr=float("nan")), "lr, mag, eps, step >= 0 and finite"),
        (lambda: plugat.plugat_loss(TOY, margin=float("nan")), "margin must be a number of nats"),
        (lambda: plugat.adv_filter(None, None, {}, rule="none"), "rule must be grad or lookahead"),
        (lambda: plugat.word_embeddings({}, {}), "needs a model of words and input_ids"),
    ],
)
def test_bad_input(call, said):
    with pytest.raises(ValueError, match=said):
        call()
