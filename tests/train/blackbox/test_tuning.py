"""Black-box tuning: losses and projections by their numbers, searches without a gradient, forward
passes that are counted, candidates over a mesh, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.overlays import added_prompt
from steppe.train import blackbox, mesh
from steppe.train.blackbox import tuning
from steppe.train.blackbox.losses import negative_accuracy, verbalizer_ce, verbalizer_hinge

KEY = jax.random.key(0)


def test_losses_by_hand():
    logits = jnp.array([[1.0, 0.0, -1.0], [0.0, 3.0, 2.5], [9.0, 9.0, 9.0]])
    labels = jnp.array([0, 2, -1])
    ce = verbalizer_ce(logits, labels)
    z = np.exp(np.asarray(logits, np.float64))
    wanted = -np.log(z[0, 0] / z[0].sum()) - np.log(z[1, 2] / z[1].sum())
    assert float(ce.total) == pytest.approx(wanted, rel=1e-6)
    assert float(ce.weight) == 2.0
    # (0 - 1 + 2) + 0;  0 + (3 - 2.5 + 2)
    assert float(verbalizer_hinge(logits, labels).total) == pytest.approx(1.0 + 2.5)
    assert float(verbalizer_hinge(logits, labels, margin=0.5).total) == pytest.approx(1.0)
    right = negative_accuracy(logits, labels)
    assert (float(right.total), float(right.weight)) == (-1.0, 2.0)
    for found in (ce, right):
        assert tuple(map(float, found.aux["accuracy"])) == (1.0, 2.0)
    masked = verbalizer_ce(logits, labels, jnp.array([0.0, 1.0, 1.0]))
    assert float(masked.weight) == 1.0
    broken = logits.at[0, 1].set(jnp.nan)
    for loss in (verbalizer_ce, verbalizer_hinge, negative_accuracy):
        assert np.isnan(float(loss(broken, labels).total))
    with pytest.raises(ValueError, match="margin must be positive, got 0"):
        verbalizer_hinge(logits, labels, margin=0)
    with pytest.raises(ValueError, match="are not \\[N, C\\] and"):
        verbalizer_ce(logits[0], labels)


def test_a_prompt_has_the_scale_of_what_it_is_added_to():
    """z ~ N(0, sigma^2 I) gives the standard deviation alpha sigma_hat, within 1%."""
    size, rank, sigma, alpha, hat = 4000, 300, 0.2, 0.7, 0.05
    std = blackbox.projection_std(hat, rank, sigma, alpha)
    assert std == pytest.approx(alpha * hat / (np.sqrt(rank) * sigma))
    a = np.asarray(blackbox.random_projection(KEY, size, rank, std))
    z = sigma * np.random.default_rng(0).normal(size=(rank, 60))
    assert (a @ z).std() == pytest.approx(alpha * hat, rel=0.01)
    flat = np.asarray(blackbox.random_projection(KEY, size, rank))
    assert np.abs(flat).max() <= 1 / np.sqrt(rank)
    assert flat.std() == pytest.approx(1 / np.sqrt(3 * rank), rel=0.01)


def test_the_spread_leaves_far_values_out():
    x = np.random.default_rng(0).normal(2.0, 0.5, (50, 40)).astype(np.float32)
    x[:, 3] = 60.0  # a dimension as transformers have them
    y = x.astype(np.float64).ravel()
    for _ in range(5):
        mean, std = y.mean(), y.std()
        y = np.clip(y, mean - 3 * std, mean + 3 * std)
    assert float(blackbox.clipped_std(x)) == pytest.approx(y.std(), rel=1e-5)
    assert y.std() < 0.2 * x.std()


def test_prototypes_are_nearest_means():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 6)) + 5.0
    y = np.arange(30) % 3
    x += 1.5 * np.eye(3, 6)[y]
    found = blackbox.prototypes(x, y, 3)
    means = np.stack([x[y == c].mean(0) for c in range(3)])
    near = ((x[:, None] - means) ** 2).sum(-1).argmin(1)
    logits = x @ found.kernel + found.bias
    np.testing.assert_array_equal(logits.argmax(1), near)
    # Differences of logits are tau times half the differences of squared distances.
    half = -((x[:, None] - means) ** 2).sum(-1) / 2
    wanted = found.scale * (half - half[:, :1])
    np.testing.assert_allclose(logits - logits[:, :1], wanted, atol=1e-4)
    # Each scored without itself, by the site that a search puts on the logits.
    site = blackbox.left_out(found)
    apart = site.fn(site.delta, jnp.asarray(x), lambda x: x @ found.kernel + found.bias, None)
    for i in range(30):
        without = np.stack([x[(y == c) & (np.arange(30) != i)].mean(0) for c in range(3)])
        far = -((x[i] - without) ** 2).sum(1) / 2 * found.scale
        np.testing.assert_allclose(apart[i] - apart[i][0], far - far[0], atol=2e-4)
    held = [
        ((x[i] - np.stack([x[(y == c) & (np.arange(30) != i)].mean(0) for c in range(3)])) ** 2)
        .sum(1)
        .argmin()
        == y[i]
        for i in range(30)
    ]
    assert found.held_out == pytest.approx(np.mean(held))
    with pytest.raises(ValueError, match="class 2 has 1 examples; a mean that leaves one out"):
        blackbox.prototypes(x[:5], np.array([0, 0, 1, 1, 2]), 3)
    with pytest.raises(ValueError, match="not finite"):
        blackbox.prototypes(np.where(x > 6, np.nan, x), y, 3)


def space(layers, size, rank, seed=0, hat=1.0, sigma=0.5):
    keys = jax.random.split(jax.random.key(seed), layers)
    std = blackbox.projection_std(hat, rank, sigma)
    made = [blackbox.random_projection(k, size, rank, std) for k in keys]
    return tuning.Space(jnp.stack(made), jnp.zeros((layers, size)))


def counting(target):
    """A service: f is the squared distance to a target, computed on the host, and counted."""
    calls = []

    def service(prompt):
        calls.append(np.array(prompt))
        return np.float32(((prompt - target) ** 2).mean())

    def evaluate(prompts, asked):
        def one(row):
            prompt = prompts.at[asked.layer].set(row)
            shape = jax.ShapeDtypeStruct((), jnp.float32)
            return jax.pure_callback(service, shape, prompt, vmap_method="sequential")

        losses = jax.vmap(one)(asked.rows)
        return tuning.Evaluated(losses, jnp.zeros_like(losses))

    return calls, evaluate


def test_layers_take_turns_and_every_forward_pass_counts():
    layers, size, rank, popsize = 3, 8, 4, 6
    target = np.random.default_rng(0).normal(size=(layers, size)).astype(np.float32)
    calls, evaluate = counting(target)
    algorithm = blackbox.black_box(popsize=popsize, sigma=0.5, rank=rank)
    cycle = jax.jit(blackbox.bbtv2_cycle(algorithm, evaluate))
    state = algorithm.init(space(layers, size, rank))
    best = np.full(layers, np.inf)
    for number in range(1, 31):
        before = np.asarray(state.prompts)
        state, found = cycle(state, KEY)
        assert int(state.calls) == number * popsize * layers == len(calls)
        np.testing.assert_array_equal(found["layer"], np.arange(layers))
        # Layer l's candidates stand beside the layers below, as they are now, and those above, as
        # they were.
        seen = np.stack(calls[-popsize * layers :]).reshape(layers, popsize, layers, size)
        now = np.asarray(state.prompts)
        for layer in range(layers):
            for other in range(layers):
                if other != layer:
                    wanted = now[other] if other < layer else before[other]
                    assert (seen[layer, :, other] == wanted).all()
        np.testing.assert_array_equal(state.last[-1], seen[-1, -1, -1])
        values = np.asarray(state.search.best_value)
        assert (values <= best).all()
        best = values
    first = np.mean([((c - target) ** 2).mean() for c in calls[:popsize]])
    reached = ((np.asarray(state.prompts) - target) ** 2).mean()
    # The least that a subspace of half the dimensions allows.
    a = np.asarray(state.space.projections, np.float64)
    left = [t - p @ np.linalg.lstsq(p, t, rcond=None)[0] for p, t in zip(a, target, strict=True)]
    least = (np.stack(left) ** 2).mean()
    assert least <= reached < least + 0.1 * (first - least)


def test_one_prompt_is_bbt_and_the_identity_searches_itself():
    size = 6
    target = np.linspace(-1, 1, size, dtype=np.float32)[None]
    _, evaluate = counting(target)
    algorithm = blackbox.black_box(popsize=8, sigma=0.5, rank=size)
    own = tuning.Space(jnp.eye(size)[None], jnp.zeros((1, size)))
    step = jax.jit(blackbox.bbt_step(algorithm, evaluate))
    cycle = jax.jit(blackbox.bbtv2_cycle(algorithm, evaluate))
    a = b = algorithm.init(own)
    for _ in range(60):
        a, found = step(a, KEY)
        b, again = cycle(b, KEY)
    np.testing.assert_allclose(a.prompts, b.prompts, atol=1e-6)
    assert float(found["best_loss"]) == pytest.approx(float(again["best_loss"][0]), abs=1e-7)
    np.testing.assert_allclose(a.prompts, a.search.best, atol=1e-6)
    np.testing.assert_allclose(a.prompts, target, atol=0.05)


CONFIG = EncoderConfig(
    "bert", 40, 16, 3, 2, 32, 24, types=2, pooler=True, drop=0.0, attn_drop=0.0,
    head=HeadConfig("classification", 2, None, 0.0),
)  # fmt: skip
LENGTH = 2


@pytest.fixture(scope="module")
def world():
    """(scores, params, batch): a tiny encoder as a function of deep prompts [3, 2 x 16]."""
    model = CONFIG.build()
    overlay = added_prompt.overlay(length=LENGTH, ids=(5, 6, 7))
    bound = overlay.bind(model)
    params = jax.jit(bound.init)(KEY)
    # Wider initial values, so that a prompt changes the answers.
    params = jax.tree.map(lambda x: 8.0 * x if x.ndim > 1 else x, params)

    def scores(params, prompt, batch):
        rows = prompt.reshape(CONFIG.layers, LENGTH, CONFIG.width)
        delta = {**params["overlay"], "layers": {"resid": rows}}
        return bound.apply({**params, "overlay": delta}, batch).logits

    rng = np.random.default_rng(0)
    batch = {
        "input_ids": rng.integers(1, 40, (4, 8)).astype(np.int32),
        "attention_mask": np.ones((4, 8), np.int32),
        "labels": np.array([0, 1, 0, 1], np.int32),
    }
    return scores, params, batch


@pytest.fixture(scope="module")
def asked_of(world):
    """(prompts, 6 candidates, what they give on one device)."""
    scores, params, batch = world
    own = space(3, LENGTH * CONFIG.width, 4, hat=0.3)
    algorithm = blackbox.black_box(popsize=6, sigma=0.5, rank=4)
    state = algorithm.init(own)
    asked = jax.jit(algorithm.ask)(state, KEY)
    plain = jax.jit(blackbox.evaluator(scores, verbalizer_ce))
    return state.prompts, asked, plain(params, batch, state.prompts, asked)


def test_a_candidate_alone_is_a_candidate_among_others(world, asked_of):
    scores, params, batch = world
    prompts, asked, together = asked_of
    few = jax.jit(blackbox.evaluator(scores, verbalizer_ce, at_once=4))
    found = few(params, batch, prompts, asked)
    np.testing.assert_allclose(found.losses, together.losses, rtol=1e-5)
    wanted = jax.jit(scores)(params, prompts.at[0].set(asked.rows[2]), batch)
    out = verbalizer_ce(wanted, batch["labels"])
    assert float(together.losses[2]) == pytest.approx(float(out.total) / 4, rel=1e-5)
    assert np.asarray(together.losses).std() > 1e-3  # the prompt does something


@pytest.mark.parametrize("axes", [{"data": 8}, {"fsdp": 4, "model": 2}])
def test_candidates_over_any_mesh_are_those_of_one_device(world, asked_of, axes):
    """6 candidates on 8 devices: two are filled up."""
    scores, params, batch = world
    prompts, asked, alone = asked_of
    rules = [(rf"base/(?:{p})", a) for p, a in CONFIG.build().axes] + [(".*", ())]
    plan = mesh.plan(axes, rules)
    placed = plan.place(params)
    over = jax.jit(blackbox.evaluator(scores, verbalizer_ce, plan=plan))
    found = plan.settle(over(placed, batch, prompts, asked))
    assert found.losses.shape == (6,)
    np.testing.assert_allclose(found.losses, alone.losses, rtol=1e-5)
    np.testing.assert_allclose(found.accuracies, alone.accuracies)


def test_nothing_is_differentiated(world):
    """A model that refuses to be differentiated is tuned all the same."""
    honest, params, batch = world

    @jax.custom_vjp
    def scores(params, prompt, batch):
        return honest(params, prompt, batch)

    def refuse(*args):
        raise AssertionError("differentiated")

    scores.defvjp(refuse, refuse)
    evaluate = blackbox.evaluator(scores, verbalizer_hinge)
    algorithm = blackbox.black_box(popsize=4, sigma=0.5, rank=4)
    state = algorithm.init(space(3, LENGTH * CONFIG.width, 4))
    cycle = blackbox.bbtv2_cycle(algorithm, lambda p, a: evaluate(params, batch, p, a))
    state, found = jax.jit(cycle)(state, KEY)
    assert np.isfinite(np.asarray(found["loss"])).all()
    assert int(state.calls) == 12
    with pytest.raises(AssertionError, match="differentiated"):
        jax.eval_shape(jax.grad(lambda p: scores(params, p, batch).sum()), state.prompts)


def test_scales_are_of_the_inputs_of_the_layers(world):
    _, params, batch = world
    overlay = added_prompt.overlay(length=LENGTH, ids=(5, 6, 7))
    model = CONFIG.build()
    bound = overlay.bind(model)
    delta = overlay.init(KEY, params["base"])
    params = {"base": params["base"], "overlay": delta}
    found = jax.jit(lambda p: blackbox.scales(bound, p, batch, deep=True))(params)
    words = np.asarray(params["base"]["embed"]["word"]["table"])
    assert float(found[0]) == pytest.approx(words.std(), rel=1e-5)
    ids = np.concatenate([batch["input_ids"][:, :1], np.tile([5, 6, 7], (4, 1)),
                          batch["input_ids"][:, 1:]], 1)  # fmt: skip
    plain = {"input_ids": ids, "attention_mask": np.ones((4, 11), np.int32)}
    hidden = jax.jit(lambda p: model.apply(p, plain, all_hidden=True).hidden)(params["base"])
    wanted = [float(blackbox.clipped_std(h)) for h in hidden[1:3]]
    np.testing.assert_allclose(found[1:], wanted, rtol=1e-5)
    one = jax.jit(lambda p: blackbox.scales(bound, p, batch, deep=False))(params)
    np.testing.assert_allclose(one, found[:1], rtol=1e-6)


def test_broken_candidates_change_nothing_else():
    algorithm = blackbox.black_box(popsize=4, sigma=0.5, rank=3)
    state = algorithm.init(space(2, 5, 3))
    asked = jax.jit(algorithm.ask)(state, KEY)
    nan = jnp.full(4, jnp.nan)
    after = jax.jit(algorithm.tell)(state, asked, nan)
    np.testing.assert_array_equal(after.prompts, state.prompts)
    assert (int(after.generation), int(after.calls)) == (1, 4)
    found = tuning.metrics(after, asked.layer, tuning.Evaluated(nan, nan))
    assert float(found["failed"]) == 4
    assert np.isnan(float(found["mean_loss"]))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: blackbox.black_box(popsize=1), "popsize must be a whole number >= 2, got 1"),
        (lambda: blackbox.black_box(sigma=0.0), "sigma0 must be positive and finite, got 0.0"),
        (lambda: blackbox.black_box(rank=0), "dim must be a whole number >= 1, got 0"),
        (
            lambda: blackbox.random_projection(KEY, 6, 7),
            "rank must be from 1 to the 6 numbers of the prompt, got 7",
        ),
        (lambda: blackbox.random_projection(KEY, 6, 3, -1.0), "std must be positive"),
        (
            lambda: blackbox.black_box(rank=7).init(
                tuning.Space(jnp.zeros((1, 6, 7)), jnp.zeros((1, 6)))
            ),
            "at most the 6 numbers of a prompt, got 7",
        ),
        (
            lambda: blackbox.black_box(rank=3).init(
                tuning.Space(jnp.zeros((1, 6, 7)), jnp.zeros((1, 6)))
            ),
            r"projections \[S, D, r\] with r = 3",
        ),
        (lambda: blackbox.projection_std(1.0, 4, 0.0), "sigma must be positive and finite"),
        (lambda: blackbox.projection_std(1.0, 4, 1.0, -1.0), "alpha must be positive"),
        (lambda: blackbox.evaluator(None, verbalizer_ce, at_once=0), "at_once must be >= 1"),
        (
            lambda: tuning.generations(100, 20, 6),
            r"at least 120 forward passes \(20 candidates x 6 prompts\), got 100",
        ),
    ],
)
def test_mistakes(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_budgets():
    assert tuning.generations(8000, 20, 1) == 400
    assert tuning.generations(8000, 20, 24) == 16 * 24
    assert tuning.every(100, 20) == 5
    assert tuning.every(10, 20) == 1
