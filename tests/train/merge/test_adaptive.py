"""AdaMerging: the objective, the merge, its gradients, the guard, and what is refused."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.models import Model, ModelOut, tree
from steppe.train.loop import NonFiniteLoss
from steppe.train.merge import adaptive, guard
from steppe.train.merge.concrete import ConcreteConfig

RNG = np.random.default_rng(0)
THETA0 = {
    "embed": {"kernel": jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)},
    "layers": {"kernel": jnp.asarray(RNG.normal(size=(2, 4, 4)) * 0.5, jnp.float32)},
    "steps": jnp.asarray([7]),
}
TAUS = {
    "embed": {"kernel": jnp.asarray(RNG.normal(size=(3, 5, 4)) * 0.3, jnp.float32)},
    "layers": {"kernel": jnp.asarray(RNG.normal(size=(3, 2, 4, 4)) * 0.3, jnp.float32)},
}
BATCHES = tuple(jnp.asarray(RNG.normal(size=(6, 5)), jnp.float32) for _ in range(3))


def logits(theta, x):
    h = x @ theta["embed"]["kernel"]
    for layer in range(2):
        h = jnp.tanh(h @ theta["layers"]["kernel"][layer]) + h
    return h * 3


def entropy_fn(theta, batches):
    return adaptive.summed([adaptive.task_entropy(logits(theta, x)) for x in batches])


def scalar_fn(theta, batches):
    return entropy_fn(theta, batches).total


def always(number):
    return BATCHES


def largest(a, b):
    return max(
        float(jnp.abs(x - y).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def cfg(steps=8, lr=1e-2, **options):
    return adaptive.AdaMergingConfig(steps=steps, lr=lr, **options)


def test_entropy_golden_and_forbidden_classes():
    assert float(adaptive.entropy(jnp.asarray([2.0, 0.0, -1.0]))) == pytest.approx(
        0.5242666, abs=1e-6
    )
    z = jnp.asarray([1.0, 1.0, -jnp.inf])
    assert float(adaptive.entropy(z)) == pytest.approx(np.log(2), abs=1e-6)
    assert np.isfinite(jax.grad(adaptive.entropy)(z)).all()


def test_the_objective_sums_tasks_and_means_rows():
    z = jnp.asarray([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    mean, classes, answers = adaptive.task_entropy(z, jnp.asarray([1.0, 1.0, 0.0]))
    assert float(mean) == pytest.approx((0.5242666 + np.log(3)) / 2, abs=1e-6)
    assert float(classes.sum()) == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(answers, [2, 0, 0])
    both = adaptive.summed([adaptive.task_entropy(z), adaptive.task_entropy(z)])
    assert float(both.total) == pytest.approx(2 * float(both.tasks[0]), rel=1e-6)


def by_hand(lambdas, scale=None):
    """theta_0 + s sum_i lambda_i tau_i, a tensor at a time, in float64."""
    done = dict(tree.flatten(THETA0))
    for path, tau in tree.flatten(TAUS).items():
        lam = np.asarray(lambdas if not isinstance(lambdas, dict) else tree.get(lambdas, path))
        lam = np.clip(lam.astype(np.float64), 0, 1)
        lam = lam.reshape(lam.shape + (1,) * (tau.ndim - lam.ndim))
        s = 1.0 if scale is None else np.asarray(tree.get(scale, path), np.float64)
        done[path] = np.asarray(done[path], np.float64) + s * (lam * np.asarray(tau)).sum(0)
    return tree.unflatten(done)


def test_the_merge_by_task_and_by_tensor():
    task = jnp.asarray([0.3, -0.5, 1.7])
    found = jax.jit(adaptive.merged)(THETA0, TAUS, task)
    assert largest(found, by_hand(task)) < 1e-6
    assert found["steps"].dtype == THETA0["steps"].dtype
    layer = adaptive.coefficients(TAUS, "layer", 0.3)
    assert layer["embed"]["kernel"].shape == (3,)
    assert layer["layers"]["kernel"].shape == (3, 2)  # each stacked layer has its own
    layer = jax.tree.map(lambda x: jnp.asarray(RNG.uniform(size=x.shape), jnp.float32), layer)
    scale = jax.tree.map(lambda t: jnp.asarray(RNG.uniform(size=t.shape[1:]), jnp.float32), TAUS)
    found = jax.jit(lambda l, s: adaptive.merged(THETA0, TAUS, l, scale=s))(layer, scale)  # noqa: E741
    assert largest(found, by_hand(layer, scale)) < 1e-6
    # In bf16 the sum is still in float32.
    low = tree.cast(THETA0, jnp.bfloat16)
    found = adaptive.merged(low, tree.cast(TAUS, jnp.bfloat16), task)
    assert found["embed"]["kernel"].dtype == jnp.bfloat16
    assert largest(tree.cast(found, jnp.float32), by_hand(task)) < 0.05


def test_one_model_at_coefficient_one_is_itself_and_order_does_not_matter():
    one = jax.tree.map(lambda t: t[:1], TAUS)
    found = adaptive.merged(THETA0, one, jnp.ones(1))
    wanted = {**jax.tree.map(lambda a, t: a + t[0], tree.split(THETA0, ("steps",))[1], one)}
    assert largest({k: found[k] for k in wanted}, wanted) < 1e-7
    turned = jax.tree.map(lambda t: t[::-1], TAUS)
    lam = jnp.asarray([0.1, 0.2, 0.4])
    assert (
        largest(adaptive.merged(THETA0, TAUS, lam), adaptive.merged(THETA0, turned, lam[::-1]))
        < 1e-6
    )


def test_gradients_of_the_coefficients_are_those_of_plain_autodiff():
    layer = jax.tree.map(
        lambda x: jnp.asarray(RNG.uniform(0.1, 0.9, x.shape), jnp.float32),
        adaptive.coefficients(TAUS, "layer", 0.3),
    )

    def plain(lambdas):
        theta = dict(THETA0)
        for top in ("embed", "layers"):
            lam, tau = lambdas[top]["kernel"], TAUS[top]["kernel"]
            shaped = lam.reshape(lam.shape + (1,) * (tau.ndim - lam.ndim))
            theta[top] = {"kernel": THETA0[top]["kernel"] + (shaped * tau).sum(0)}
        return scalar_fn(theta, BATCHES)

    ours = jax.jit(jax.grad(lambda l: scalar_fn(adaptive.merged(THETA0, TAUS, l), BATCHES)))(layer)  # noqa: E741
    assert largest(ours, jax.jit(jax.grad(plain))(layer)) < 1e-5


def test_clipping_has_no_gradient_outside_and_one_at_the_ends():
    slope = jax.vmap(jax.grad(adaptive._clipped))(jnp.asarray([-0.1, 0.0, 0.5, 1.0, 1.1]))
    np.testing.assert_array_equal(slope, [0, 1, 1, 1, 0])


@pytest.mark.parametrize("level", ["task", "layer"])
def test_entropy_falls_and_the_steps_are_adams(level):
    found = adaptive.adamerging(THETA0, TAUS, entropy_fn, always, level, cfg(steps=8))
    assert found.run.entropy.shape == (8, 3)
    assert found.run.entropy[-1].sum() < found.run.entropy[0].sum()
    assert found.run.notes == ()
    assert int(found.state.step) == 8
    assert largest(found.params, by_hand(found.lambdas)) < 1e-6
    # The same by hand with optax.
    tx, lam = optax.adam(1e-2), adaptive.coefficients(TAUS, level, 0.3)
    opt = tx.init(lam)
    grad = jax.jit(jax.grad(lambda l: scalar_fn(adaptive.merged(THETA0, TAUS, l), BATCHES)))  # noqa: E741
    for _ in range(8):
        updates, opt = tx.update(grad(lam), opt)
        lam = optax.apply_updates(lam, updates)
    assert largest(lam, found.state.lambdas) < 1e-6


def test_a_run_goes_on_where_it_stopped_and_compiles_once():
    def draws(number):
        return tuple(x + 0.1 * number for x in BATCHES)

    whole = adaptive.adamerging(THETA0, TAUS, entropy_fn, draws, "layer", cfg(steps=8))
    before = adaptive.adapt_step._cache_size()
    seen = []
    half = adaptive.adamerging(
        THETA0, TAUS, entropy_fn, draws, "layer", cfg(steps=8, guard=guard.Guard(window=4)),
        watch=lambda phase, at, state, _: seen.append((phase, at, jax.tree.map(np.array, state))),
    )  # fmt: skip
    assert [(p, s) for p, s, _ in seen] == [("adamerging", 4), ("adamerging", 8)]
    assert adaptive.adapt_step._cache_size() == before + 1  # another configuration, one program
    middle = jax.tree.map(jnp.asarray, seen[0][2])
    rest = adaptive.adamerging(THETA0, TAUS, entropy_fn, draws, "layer", cfg(steps=8), state=middle)
    assert len(rest.run.entropy) == 4
    assert largest(rest.params, whole.params) == 0
    assert largest(half.params, whole.params) == 0


def test_an_iterator_serves_and_a_short_one_is_named():
    many = itertools.repeat(BATCHES)
    found = adaptive.adamerging(THETA0, TAUS, entropy_fn, many, "task", cfg(steps=2))
    assert int(found.state.step) == 2
    with pytest.raises(ValueError, match="data ended at draw 1: it must be endless"):
        adaptive.adamerging(THETA0, TAUS, entropy_fn, iter([BATCHES]), "task", cfg(steps=2))


def test_plus_plus_learns_on_trimmed_vectors():
    from steppe.train.merge.ties import ties_components

    found = adaptive.adamerging(THETA0, TAUS, entropy_fn, always, "task", cfg(steps=2, ties=0.2))
    other = adaptive.adamerging(
        THETA0, ties_components(TAUS, k=0.2), entropy_fn, always, "task", cfg(steps=2)
    )
    assert largest(found.params, other.params) == 0


# The guard --------------------------------------------------------------------------------------


def falling(collapse_at):
    """A fake step whose answers become one class from a step on."""

    def step(state, batch):
        on = state["n"] < collapse_at
        p = np.full(4, 0.25) if on else np.asarray([1.0, 0, 0, 0])
        counts = np.full(4, 4.0) if on else np.asarray([16.0, 0, 0, 0])
        nats = np.asarray([1.0 - 0.01 * state["n"] if on else 0.0])
        out = guard.Entropy(nats[0], nats, (p,), (counts,))
        return {"n": state["n"] + 1}, jax.tree.map(jnp.asarray, out)

    return step


def two_classes(rare):
    """A fake step of a task with two classes; the rarer one gets ``rare`` of 16 answers late."""

    def step(state, batch):
        few = 8.0 if state["n"] < 30 else rare
        counts = np.asarray([16.0 - few, few])
        nats = np.asarray([0.1])
        out = guard.Entropy(nats[0], nats, (counts / 16,), (counts,))
        return {"n": state["n"] + 1}, jax.tree.map(jnp.asarray, out)

    return step


def test_a_collapse_of_two_classes_is_noticed_and_an_uneven_task_is_not():
    with pytest.warns(UserWarning, match="collapsed by step 40"):
        assert guarded(two_classes(0.0)).kept < 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guarded(two_classes(4.0)).notes == ()


def guarded(step, names=None, **options):
    return guard.run(
        step, {"n": jnp.int32(0)}, lambda n: None, begin=0, steps=60,
        guard=guard.Guard(window=10, **options), phase="test", names=names,
    )  # fmt: skip


def test_a_collapse_is_noticed_and_the_state_that_told_most_is_kept():
    with pytest.warns(UserWarning, match="task 0 have collapsed by step 40 .task 0 uses 1.0 class"):
        found = guarded(falling(30))
    assert found.kept == 30
    assert int(found.state["n"]) == 30
    assert "the state of step 30 is kept" in found.notes[0]
    with pytest.warns(UserWarning, match="collapsed"):
        found = guarded(falling(30), stop=False)
    assert (found.kept, int(found.state["n"]), len(found.notes)) == (60, 60, 1)
    with pytest.warns(UserWarning, match="the state of step 0 is kept"):
        assert int(guarded(falling(5)).state["n"]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guarded(falling(99)).notes == ()


def ten_classes(state, batch):
    """A fake step of a perfect model: four answers, drawn evenly from ten classes."""
    answers = np.random.default_rng(int(state["n"])).integers(0, 10, 4)
    counts = np.bincount(answers, minlength=10).astype(float)
    out = guard.Entropy(np.asarray(0.01), np.asarray([0.01]), (counts / 4,), (counts,))
    return {"n": state["n"] + 1}, out


@pytest.mark.parametrize("steps", [20, 21, 22, 39, 41, 101])
def test_a_short_rest_is_judged_with_the_steps_before_it(steps):
    state = {"n": np.int32(0)}
    options = {"begin": 0, "guard": guard.Guard(window=20), "phase": "test"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = guard.run(ten_classes, state, lambda n: None, steps=steps, **options)
    assert (found.kept, found.notes) == (steps, ())
    # The last window by hand.
    answers = [np.random.default_rng(n).integers(0, 10, 4) for n in range(steps - 20, steps)]
    share = np.bincount(np.concatenate(answers), minlength=10) / 80
    used = np.exp(-(share[share > 0] * np.log(share[share > 0])).sum())
    assert found.windows[-1].classes[0] == pytest.approx(used)
    assert [w.step for w in found.windows] == [*range(20, steps, 20), steps]


def test_a_start_of_one_class_is_told_but_stops_nothing():
    with pytest.warns(UserWarning, match="first 160 answers to task films, by step 10, are nearly"):
        found = guarded(falling(0), names=["films"])
    assert (found.kept, int(found.state["n"]), len(found.notes)) == (60, 60, 1)
    assert "either the merge had collapsed before the first step" in found.notes[0]
    # A rare class, and few answers, do not say so much.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guarded(two_classes(7.0), names=["films"]).notes == ()
        few = guard.run(
            falling(0), {"n": jnp.int32(0)}, lambda n: None, begin=0, steps=4,
            guard=guard.Guard(), phase="test",
        )  # fmt: skip
    assert few.notes == ()
    counts = {0: np.asarray([0.0, 60.0]), 1: np.asarray([0.0, 60.0])}
    row = guard.Entropy(0, np.zeros(2), (), (np.asarray([1.0, 5.0]), np.asarray([0.0, 5.0])))
    assert guard._uniform(counts, [row]) == []  # 66 answers are not there yet for the second
    assert set(counts) == {1}
    assert guard._uniform(counts, [row]) == [(1, 70)]


def test_notes_say_the_names_of_the_tasks():
    with pytest.warns(UserWarning, match="answers to task films have collapsed by step 40 .task f"):
        assert "task films uses 1.0" in guarded(falling(30), names=["films"]).notes[0]
    with pytest.raises(ValueError, match="names must be 1, one a task, got 2: films, books"):
        guarded(falling(30), names=["films", "books"])


def test_nan_on_the_way_keeps_a_state_and_nan_at_once_stops():
    def step_at(bad):
        def step(state, batch):
            value = jnp.where(state["n"] >= bad, jnp.nan, 1.0)
            return {"n": state["n"] + 1}, guard.entropy_of(value)

        return step

    with pytest.warns(UserWarning, match="not finite at step 25; stopped, the state of step 20"):
        found = guarded(step_at(25))
    assert int(found.state["n"]) == 20
    with pytest.raises(NonFiniteLoss, match="not finite at step 0"):
        guarded(step_at(0))


# Models of the house ----------------------------------------------------------------------------


def network(classes):
    """A model of the house: a bag of words, tanh, and a head of so many classes."""

    def init(key):
        return {"embed": jnp.ones((30, 4)), "head": {"kernel": jnp.ones((4, classes))}}

    def apply(params, batch, *, train=False, **_):
        hidden = jnp.tanh(params["embed"][batch["input_ids"]])
        scores = hidden @ params["head"]["kernel"]
        tokens = "tokens" in batch
        return ModelOut(scores if tokens else scores.mean(1), hidden)

    return Model(None, init, apply, ())


def test_models_with_heads_of_their_own():
    models = [network(2), network(3)]
    heads = [{"head": {"kernel": jnp.asarray(RNG.normal(size=(4, c)))}} for c in (2, 3)]
    trunk = {"embed": jnp.asarray(RNG.normal(size=(30, 4)), jnp.float32)}
    ids = np.asarray(RNG.integers(0, 30, (2, 4, 6)), np.int32)
    filled = np.asarray([0, 1, 2, -1], np.int32)  # the last row only fills the batch up
    batches = tuple({"input_ids": ids[i], "example_index": filled} for i in range(2))
    objective = adaptive.entropies(models, heads)
    found = jax.jit(objective)(trunk, batches)
    for task in range(2):
        full = tree.merge(trunk, heads[task])
        rows = models[task].apply(full, batches[task]).logits[:3]
        assert float(found.tasks[task]) == pytest.approx(float(adaptive.entropy(rows).mean()), 1e-5)
    assert [c.shape[0] for c in found.classes] == [2, 3]
    assert [float(a.sum()) for a in found.answers] == [3, 3]
    # Scores a token: those that the attention mask shows; or one chosen token.
    shown = np.ones((4, 6), np.int32)
    shown[:, 2:] = 0
    tokens = tuple({**b, "tokens": np.ones(4), "attention_mask": shown} for b in batches)
    found = jax.jit(objective)(trunk, tokens)
    assert [float(a.sum()) for a in found.answers] == [6, 6]
    first = adaptive.entropies(models, heads, select=lambda z, b: z[:, 0])
    assert [float(a.sum()) for a in jax.jit(first)(trunk, tokens).answers] == [3, 3]
    with pytest.raises(ValueError, match="2 tasks need one batch each, got 1"):
        objective(trunk, batches[:1])
    with pytest.raises(ValueError, match="one head a task, got 2 models, 1 heads"):
        adaptive.entropies(models, heads[:1])
    with pytest.raises(ValueError, match=r"class logits .B, C. or .B, T, C., got .4,."):
        jax.eval_shape(
            adaptive.entropies(models, heads, select=lambda z, b: z[:, 0]), trunk, batches
        )


@pytest.mark.parametrize(
    ("taus", "words"),
    [
        ({}, "taus hold no parameter"),
        ({"extra": jnp.ones((3, 2))}, "'extra', which theta0 lacks"),
        ({"embed": {"kernel": jnp.ones((3, 4, 5))}}, r"must have shape .N, ..5, 4.., got .3, 4, 5"),
        (
            {"embed": {"kernel": TAUS["embed"]["kernel"].at[1, 0, 0].set(jnp.nan)}},
            "task 1 holds NaN",
        ),
        (
            {"embed": TAUS["embed"], "layers": {"kernel": TAUS["layers"]["kernel"][:2]}},
            "tasks on axis 0",
        ),
    ],
)
def test_task_vectors_that_do_not_fit_are_named(taus, words):
    with pytest.raises(ValueError, match=words):
        adaptive.adamerging(THETA0, taus, entropy_fn, always, "task", cfg())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cfg(steps=-1), "steps must be >= 0"),
        (lambda: cfg(lr=float("nan")), "lr must be >= 0"),
        (lambda: cfg(ties=0.0), "ties must lie in"),
        (lambda: cfg(lam=float("nan")), "lam must be finite, got nan"),
        (lambda: ConcreteConfig(lam=float("inf")), "lam must be finite, got inf"),
        (lambda: ConcreteConfig(init=float("nan")), "init must be finite, got nan"),
        (lambda: adaptive.coefficients(TAUS, "tensor", 0.3), "level must be 'task' or 'layer'"),
        (lambda: guard.Guard(window=0), "window must be >= 1"),
        (lambda: guard.Guard(share=1.0), "share must lie in"),
        (lambda: guard.entropy_of(jnp.ones(2)), "must return a scalar"),
    ],
)
def test_settings_that_cannot_work_say_so(call, words):
    with pytest.raises(ValueError, match=words):
        call()
