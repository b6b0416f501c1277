"""Every merge: what N = 1, equal models and the order of tasks must give, in two dtypes, under
jit without a second compile, and sharded as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.train import merge, mesh

RULES = (
    ("layers/kernel", (None, None, "model")),
    ("layers/bias", (None, "model")),
    ("table", ("model", None)),
    ("steps", ()),
)
WIDTH = 8


def model(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)

    def one(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return {
        "layers": {"kernel": one(3, WIDTH, WIDTH), "bias": one(3, WIDTH)},
        "table": one(16, 4),
        "steps": jnp.arange(3),
    }


def near(base, seed):
    """A fine-tuned model: the base moved a little, differently for every seed."""
    move = model(seed, jnp.float32)

    def one(b, m):
        if not jnp.issubdtype(b.dtype, jnp.floating):
            return b
        return (b.astype(jnp.float32) + 0.1 * m).astype(b.dtype)

    return jax.tree.map(one, base, move)


def fisher(seed):
    made = jax.tree.map(jnp.abs, model(seed))
    return {"table": made["table"], "layers": made["layers"]}


def gram(seed):
    x = np.random.default_rng(seed).standard_normal((3, 40, WIDTH)).astype(np.float32)
    return {"layers": {"kernel": jnp.einsum("lti,ltj->lij", x, x) / 40}}


KEY = jax.random.key(0)


def taus(base, trees):
    return merge.task_vectors(base, trees)


# name -> (base, models, seeds of the models) -> merged; "neutral" is the setting at which one
# model is returned as it is.
METHODS = {
    "average": lambda b, t, s: merge.average(t),
    "task arithmetic": lambda b, t, s: merge.task_arithmetic(b, taus(b, t), 1 / len(t)),
    "ties": lambda b, t, s: merge.ties(b, taus(b, t), 1.0, 1.0, "mean"),
    "ties trimmed": lambda b, t, s: merge.ties(b, taus(b, t), 0.2, 0.3),
    "ties exact": lambda b, t, s: merge.ties(b, taus(b, t), 0.2, 0.3, "max", exact_k=True),
    "dare": lambda b, t, s: merge.task_arithmetic(b, merge.dare(KEY, taus(b, t), 0.0), 1 / len(t)),
    "dare dropped": lambda b, t, s: merge.task_arithmetic(
        b, merge.dare(KEY, taus(b, t), 0.5), 1 / len(t)
    ),
    "slerp": lambda b, t, s: merge.slerp(t[0], t[-1], 0.5),
    "fisher": lambda b, t, s: merge.fisher_merge(t, [fisher(i) for i in s]),
    "regmean": lambda b, t, s: merge.regmean(t, [gram(i) for i in s], 0.9),
}
NEUTRAL = ("average", "task arithmetic", "ties", "dare", "slerp", "fisher", "regmean")
ORDERLESS = tuple(name for name in METHODS if name != "dare dropped")  # draws go by place


def largest(a, b):
    return max(
        float(np.abs(np.asarray(x, np.float32) - np.asarray(y, np.float32)).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def merged(name, base, trees, seeds):
    return jax.jit(lambda b, t: METHODS[name](b, t, seeds))(base, trees)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NEUTRAL)
def test_one_model_and_equal_models_are_returned(name, dtype):
    base = model(0, dtype)
    tuned = near(base, 1)
    # bf16 task vectors are rounded once more: an ulp of a weight of 3 is 2^-6.
    limit = 2e-5 if dtype == jnp.float32 else 2**-6
    one = merged(name, base, [tuned], [5])
    three = merged(name, base, [tuned] * 3, [5, 6, 7])
    for out in (one, three):
        assert jax.tree.map(lambda x: x.dtype, out) == jax.tree.map(lambda x: x.dtype, base)
        np.testing.assert_array_equal(out["steps"], base["steps"])
        assert largest(out, tuned) <= limit


@pytest.mark.parametrize("name", ORDERLESS)
def test_the_order_of_tasks_is_irrelevant(name):
    base = model(0)
    trees, seeds = [near(base, i) for i in (1, 2, 3)], [5, 6, 7]
    first = merged(name, base, trees, seeds)
    second = merged(name, base, trees[::-1], seeds[::-1])
    assert largest(first, second) < 1e-5
    assert largest(first, base) > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_sharded_equals_unsharded_and_compiles_once(name):
    base = model(0)
    trees, seeds = [near(base, i) for i in (1, 2, 3)], [5, 6, 7]
    plan = mesh.plan({"data": 2, "model": 4}, RULES)
    fn = jax.jit(lambda b, t: METHODS[name](b, t, seeds))
    wanted = fn(base, trees)
    placed = plan.place(base), [plan.place(t) for t in trees]
    out = plan.settle(fn(*placed))
    assert largest(out, wanted) < 1e-5
    before = fn._cache_size()
    plan.settle(fn(*placed))
    assert fn._cache_size() == before


def test_ties_outside_jit_on_a_mesh():
    base = model(0)
    trees = [near(base, i) for i in (1, 2, 3)]
    plan = mesh.plan({"data": 2, "model": 4}, RULES)
    wanted = merge.ties(base, taus(base, trees))
    placed = plan.place(base)
    found = merge.ties(placed, plan.settle(taus(placed, [plan.place(t) for t in trees])))
    assert largest(plan.settle(found), wanted) < 1e-6
