"""Every adaptive merge on a mesh: masks, logits, Adam's moments and task vectors sharded like the
base give what one device gives, and each phase is one program."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from steppe.models import tree
from steppe.train import mesh
from steppe.train.merge import adaptive, concrete, guard

PROGRAMS = Path(__file__).parents[1] / "train" / "programs"
toy = SimpleNamespace(**runpy.run_path(str(PROGRAMS / "toy.py")))
HEAD, THETA0 = tree.split(toy.init(jax.random.key(0)), ("head/.*",))
TASKS, STEPS = 3, 3
TAUS = jax.tree.map(
    lambda w: 0.3 * jax.random.normal(jax.random.key(w.size), (TASKS, *w.shape)), THETA0
)
KEY = jax.random.key(1)
CALM = guard.Guard(stop=False)
PLAN = {"data": 2, "fsdp": 2, "model": 2}


def entropy_fn(trunk, batches):
    full = tree.merge(trunk, HEAD)
    rows = [adaptive.task_entropy(toy.logits(full, b), b["attention_mask"]) for b in batches]
    return adaptive.summed(rows)


def draws(order=range(TASKS)):
    return lambda number: tuple(toy.batch(10 * number + task) for task in order)


def setting(**options):
    return concrete.ConcreteConfig(
        steps=STEPS, tta_steps=STEPS, mask_lr=1e-2, guard=CALM, **options
    )


def am(level, **options):
    cfg = adaptive.AdaMergingConfig(steps=STEPS, lr=1e-2, guard=CALM)
    return lambda base, taus, data, plan: adaptive.adamerging(
        base, taus, entropy_fn, data, level, cfg, plan=plan
    )


def cam(level, **options):
    cfg = setting(**options)
    return lambda base, taus, data, plan: concrete.concrete_adamerging(
        base, taus, entropy_fn, data, cfg, KEY, level=level, plan=plan
    )


def cta(base, taus, data, plan):
    return concrete.concrete_task_arithmetic(
        base, taus, entropy_fn, data, setting(), KEY, plan=plan
    )


METHODS = {
    "adamerging, task": am("task"),
    "adamerging, layer": am("layer"),
    "concrete task arithmetic": cta,
    "concrete adamerging, task": cam("task"),
    "concrete adamerging, layer": cam("layer", base_lr=0.1),
}
WHOLE = {}


def whole(name):
    if name not in WHOLE:
        WHOLE[name] = METHODS[name](THETA0, TAUS, draws(), None)
    return WHOLE[name]


def host(tree_):
    return jax.tree.map(np.array, tree_)


def largest(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


@pytest.mark.parametrize("name", METHODS)
def test_a_mesh_gives_what_one_device_gives(name):
    plan, one = mesh.plan(PLAN, toy.RULES), whole(name)
    sizes = [f._cache_size() for f in (concrete.meta_step, concrete.arithmetic_step)]
    found = METHODS[name](THETA0, TAUS, draws(), plan)
    assert largest(host(found.params), host(one.params)) < 1e-5
    assert found.params["layers"]["kernel"].sharding.spec == P(None, None, "model")
    after = [f._cache_size() for f in (concrete.meta_step, concrete.arithmetic_step)]
    assert sum(after) - sum(sizes) == ("concrete" in name)
    if "concrete" in name:
        for part in (found.state.logits, found.state.opt[0].mu, found.mask):
            assert part["layers"]["kernel"].sharding.spec == P(None, None, "model")
        assert largest(host(found.state.logits), host(one.state.logits)) < 1e-4


def test_the_noise_is_the_same_on_every_mesh():
    plan = mesh.plan(PLAN, toy.RULES)
    logits = concrete.mask_init(TAUS, setting()).logits
    split = jax.tree.map(jax.device_put, logits, plan.shardings(logits))
    one, many = (concrete.draw_mask(KEY, x, setting()) for x in (logits, split))
    assert many["layers"]["kernel"].sharding.spec == P(None, None, "model")
    assert largest(host(one), host(many)) == 0


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_the_tasks_does_not_matter(name):
    order = [2, 0, 1]
    turned = jax.tree.map(lambda t: t[jnp.asarray(order)], TAUS)
    found = METHODS[name](THETA0, turned, draws(order), None)
    assert largest(host(found.params), host(whole(name).params)) < 1e-5


@pytest.mark.parametrize("name", ["adamerging, layer", "concrete task arithmetic"])
def test_bf16_models_stay_near(name):
    low = tree.cast(THETA0, jnp.bfloat16), tree.cast(TAUS, jnp.bfloat16)
    found = METHODS[name](*low, draws(), None)
    assert {str(x.dtype) for x in jax.tree.leaves(found.params)} == {"bfloat16"}
    assert largest(host(tree.cast(found.params, jnp.float32)), host(whole(name).params)) < 0.1


@pytest.mark.parametrize("name", METHODS)
def test_the_entropy_is_finite_and_the_base_is_not_touched(name):
    before = host(THETA0)
    found = whole(name)
    runs = found.runs if "concrete" in name else (found.run,)
    for run in runs:
        assert run.entropy.shape == (STEPS, TASKS)
        assert np.isfinite(run.entropy).all()
    assert largest(host(THETA0), before) == 0
    assert largest(host(found.params), before) > 1e-3
