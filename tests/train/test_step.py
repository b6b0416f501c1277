"""The step is exact: however the batch is split, whatever the mesh, the update is the same."""

import re
import runpy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steppe.models import tree
from steppe.train import mesh, step
from steppe.train.types import LossOut

toy = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "programs" / "toy.py")))

SPLITS = {
    "1x32": (None, 1),
    "4x8": (None, 4),
    "8 devices": ({"data": 8}, 1),
    "8 devices, 2 micro-batches": ({"data": 8}, 2),
    "4x2": ({"data": 4, "model": 2}, 1),
    "2x2x2, 4 micro-batches": ({"data": 2, "fsdp": 2, "model": 2}, 4),
}


def plan_of(shape):
    return None if shape is None else mesh.plan(shape, toy.RULES)


def host(tree_):
    # Copies: a view of an array on the CPU keeps its memory from being donated.
    return jax.tree.map(np.array, tree_)


def largest(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


def mini_sam(rho):
    """Sharpness-aware gradient as a transform: the gradient at params + rho g / |g|."""

    def update(grads, state, params=None, *, grad_fn, **_):
        norm = optax.global_norm(grads)
        ascent = jax.tree.map(lambda p, g: p + rho * g / norm, params, grads)
        return grad_fn(ascent), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def reference(objective, tx, steps, perturb=0.0):
    """Plain full-batch training, written down independently of steppe.train.step."""
    params = toy.init(jax.random.split(jax.random.key(0))[0])
    opt = tx.init(params)

    def loss(params, batch):
        out = objective(params, batch, None)
        totals, weights = out.total, out.weight
        if not isinstance(totals, dict):
            totals, weights = {"": totals}, {"": weights}
        return sum(totals[k] / weights[k] for k in totals)

    @jax.jit
    def one(params, opt, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        if perturb:
            norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
            near = jax.tree.map(lambda p, g: p + perturb * g / norm, params, grads)
            grads = jax.grad(loss)(near, batch)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, value

    losses = []
    for number in range(steps):
        params, opt, value = one(params, opt, toy.batch(number))
        losses.append(float(value))
    return host(params), losses


REFERENCES = {}


@pytest.mark.parametrize("kind", ["ce", "two", "sam"])
@pytest.mark.parametrize("split", SPLITS)
def test_every_split_gives_the_same_updates(split, kind):
    objective = toy.two if kind == "two" else toy.ce
    adamw = optax.adamw(1e-2)
    if kind not in REFERENCES:
        REFERENCES[kind] = reference(objective, adamw, 4, 0.05 if kind == "sam" else 0.0)
    expected, losses = REFERENCES[kind]
    tx = optax.chain(mini_sam(0.05), adamw) if kind == "sam" else adamw
    shape, microbatches = SPLITS[split]
    plan = plan_of(shape)
    state = step.init(jax.random.key(0), toy.MODEL, tx, plan)
    train = step.make(objective, tx, plan, microbatches=microbatches)
    for number in range(4):
        state, metrics = train(state, toy.batch(number))
        total, weight = metrics["loss"]
        assert float(total / weight) == pytest.approx(losses[number], abs=1e-5)
    assert largest(host(state.params), expected) < 1e-5
    assert int(state.step) == 4
    if kind != "two":
        assert float(metrics["loss"][1]) == toy.batch(3)["label_mask"].sum()
        assert float(metrics["accuracy"][1]) == toy.batch(3)["label_mask"].sum()
    else:
        assert float(metrics["loss/l2"][1]) == toy.ROWS
        assert set(metrics) == {"loss", "loss/ce", "loss/l2", "accuracy", "grad_norm"}


@pytest.mark.parametrize("split", ["4x8", "8 devices", "2x2x2, 4 micro-batches"])
def test_the_second_call_compiles_nothing(split):
    shape, microbatches = SPLITS[split]
    plan = plan_of(shape)
    tx = optax.adamw(1e-2)
    state = step.init(jax.random.key(0), toy.MODEL, tx, plan, ema=0.9)
    train = step.make(toy.ce, tx, plan, microbatches=microbatches, ema=0.9, clip_norm=1.0)
    events = []
    listen = events.append
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: listen(event) if "compile" in event else None
    )
    before = jax.tree.map(lambda leaf: (leaf.sharding, leaf.aval), state)
    state, _ = train(state, toy.batch(0))
    assert any("backend_compile" in event for event in events)
    after = jax.tree.map(lambda leaf: (leaf.sharding, leaf.aval), state)
    assert before == after
    events.clear()
    for number in (1, 2):
        state, metrics = train(state, toy.batch(number))
    jax.block_until_ready(metrics)
    listen = lambda event: None  # noqa: E731
    assert events == []
    assert train.compiles == 1
    train(state, toy.batch(0, rows=64))
    assert train.compiles == 2


def test_the_state_is_donated_but_the_frozen_part_and_the_key_are_not():
    tx = optax.adamw(1e-2)
    state = step.init(jax.random.key(0), toy.MODEL, tx, trainable=("head/.*",), ema=0.5)
    train = step.make(toy.ce, tx, ema=0.5)
    size = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state, state.extra)))
    memory = train.compile(state, toy.batch()).memory_analysis()
    assert memory.alias_size_in_bytes >= size
    old = state
    state, _ = train(state, toy.batch())
    given_up = jax.tree.leaves((old.params, old.opt_state, old.extra, old.step))
    assert all(leaf.is_deleted() for leaf in given_up)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((old.frozen, old.rng)))
    assert state.frozen is old.frozen

    keep = step.make(toy.ce, tx, ema=0.5, donate=False)
    new, _ = keep(state, toy.batch())
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert int(new.step) == int(state.step) + 1


@pytest.mark.parametrize("microbatches", [1, 2])
def test_donated_memory_is_updated_in_place_with_the_same_values(microbatches):
    """Parameters, moments and average are overwritten where they lie, none is copied first."""
    tx = optax.adamw(1e-2)
    outcome = []
    for donate in (True, False):
        state = step.init(jax.random.key(0), toy.MODEL, tx, ema=0.9)
        train = step.make(toy.ce, tx, ema=0.9, donate=donate, microbatches=microbatches)
        for number in range(3):
            state, _ = train(state, toy.batch(number))
        outcome.append(host((state.params, state.opt_state, state.extra)))
        (program,) = train._programs.values()
        copied = re.findall(r"= f32\[(\d[\d,]*)\]\S* copy\((?:%live|live)", program.as_text())
        if donate:
            assert copied == []
    assert largest(*outcome) < 1e-7


def test_a_transform_that_keeps_the_parameters_or_passes_leaves_through_survives_donation():
    def start(params):
        return {"slow": params, "again": params, "constant": jnp.arange(3.0)}

    def update(grads, state, params=None):
        return grads, {**state, "again": params}

    tx = optax.chain(optax.GradientTransformation(start, update), optax.sgd(0.1))
    state = step.init(jax.random.key(0), toy.MODEL, tx)
    slow = host(state.params)
    train = step.make(toy.ce, tx)
    for number in range(3):
        before = host(state.params)
        state, _ = train(state, toy.batch(number))
    assert largest(state.opt_state[0]["slow"], slow) == 0
    assert largest(state.opt_state[0]["again"], before) == 0
    assert largest(state.params, before) > 0


def test_pretrained_parameters_outlive_the_run_unless_they_are_given_away():
    params = toy.init(jax.random.key(5))
    values = host(params)
    for plan in (None, mesh.plan({"data": 8})):
        state = step.init(jax.random.key(0), toy.MODEL, optax.sgd(1.0), plan, params=params)
        step.make(toy.ce, optax.sgd(1.0), plan)(state, toy.batch())
        assert largest(params, values) == 0

    # Memory of numpy that is aligned as XLA likes it may be taken without a copy.
    def aligned(leaf):
        raw = np.empty(leaf.nbytes + 64, np.uint8)
        begin = -raw.ctypes.data % 64
        out = raw[begin : begin + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
        out[...] = leaf
        return out

    own = jax.tree.map(aligned, values)
    state = step.init(jax.random.key(0), toy.MODEL, optax.sgd(1.0), params=own)
    state, _ = step.make(toy.ce, optax.sgd(1.0))(state, toy.batch())
    assert largest(own, values) == 0
    assert largest(state.params, values) > 0

    state = step.init(jax.random.key(0), toy.MODEL, optax.sgd(1.0), params=params, donate=True)
    step.make(toy.ce, optax.sgd(1.0))(state, toy.batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_an_overlay_is_initialised_beside_the_leaves_that_its_model_was_given():
    base = toy.init(jax.random.key(5))
    head = base.pop("head")
    overlay = SimpleNamespace(
        init=lambda key: {"head": jax.tree.map(lambda x: x + 1, toy.init(key)["head"])},
        trainable=("head/.*",),
        given=base,
    )
    del head
    tx = optax.adam(1e-2)
    for plan in (None, plan_of({"data": 4, "model": 2})):
        state = step.init(jax.random.key(0), overlay, tx, plan)
        assert sorted(tree.paths(state.params)) == ["head/bias", "head/kernel"]
        assert largest(host(state.frozen), host(base)) == 0
        like = step.abstract(overlay, tx, plan)
        assert jax.tree.structure(like) == jax.tree.structure(state)
        state, _ = step.make(toy.ce, tx, plan)(state, toy.batch())


def test_frozen_leaves_stay_bitwise_and_have_no_gradient_and_no_optimiser_state():
    seen = []

    def look(grads, state, params=None):
        seen.append((tree.paths(grads), tree.paths(params)))
        return grads, state

    tx = optax.chain(
        optax.GradientTransformation(lambda p: optax.EmptyState(), look), optax.adamw(1e-2)
    )
    patterns = ("head/.*", "layers/bias")
    state = step.init(jax.random.key(0), toy.MODEL, tx, trainable=patterns)
    frozen, trained = host(state.frozen), host(state.params)
    moments = jax.tree.leaves(state.opt_state)
    assert len(moments) == 2 * 3 + 1
    train = step.make(toy.ce, tx, microbatches=2)
    for number in range(3):
        state, _ = train(state, toy.batch(number))
    names = ["layers/bias", "head/kernel", "head/bias"]
    assert [sorted(a) for a in seen[0]] == [sorted(names)] * 2
    for path, leaf in tree.flatten(frozen).items():
        assert leaf.tobytes() == np.asarray(tree.flatten(state.frozen)[path]).tobytes()
    assert all(
        np.abs(new - old).max() > 0
        for new, old in zip(jax.tree.leaves(host(state.params)), jax.tree.leaves(trained))
    )


def test_bfloat16_compute_keeps_a_float32_master_and_float32_gradients():
    seen = []

    def look(grads, state, params=None):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves((grads, params)))
        return grads, state

    dtypes = []

    def objective(params, batch, key):
        dtypes.extend(leaf.dtype for leaf in jax.tree.leaves(params))
        return toy.ce(params, batch, key)

    tx = optax.chain(
        optax.GradientTransformation(lambda p: optax.EmptyState(), look), optax.sgd(1e-6)
    )
    outcome = {}
    for microbatches in (1, 4):
        state = step.init(jax.random.key(0), toy.MODEL, tx, trainable=("(embed|layers|head)/k?.*",))
        first = host(state.params)
        train = step.make(objective, tx, microbatches=microbatches, compute_dtype="bfloat16")
        for number in range(4):
            state, _ = train(state, toy.batch(number))
        assert set(seen) == {np.dtype("float32")}
        assert set(dtypes) == {np.dtype(jnp.bfloat16)}
        # Updates of 1e-6 are far below what bfloat16 resolves; the master keeps them.
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), host(state.params), first)
        assert all(0 < m < 1e-4 for m in jax.tree.leaves(moved))
        outcome[microbatches] = host(state.params)
    assert largest(outcome[1], outcome[4]) < 1e-7


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("split", ["4x8", "2x2x2, 4 micro-batches"])
def test_grad_fn_is_the_gradient_of_the_step(split, clip):
    """Same rows, same dropout, same precision, same clipping (one rounding apart)."""

    def start(params):
        return {"same": jnp.float32(-1), "norm": jnp.float32(0), "value": jnp.float32(0)}

    def update(grads, state, params=None, *, grad_fn, value, **_):
        again = grad_fn(params)
        moved = grad_fn(jax.tree.map(lambda p: p + 0.1, params))
        gaps = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), grads, again)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(again))
        return moved, {
            "same": jnp.stack(jax.tree.leaves(gaps)).max(),
            "norm": optax.global_norm(moved),
            "value": value,
        }

    probe = optax.GradientTransformationExtraArgs(start, update)
    tx = optax.chain(probe, optax.sgd(0.1))
    shape, microbatches = SPLITS[split]
    plan = plan_of(shape)
    state = step.init(jax.random.key(0), toy.MODEL, tx, plan)
    train = step.make(
        toy.dropped, tx, plan, microbatches=microbatches, clip_norm=clip, compute_dtype="bfloat16"
    )
    state, metrics = train(state, toy.batch())
    assert float(state.opt_state[0]["same"]) < 1e-8
    loss = float(metrics["loss"][0] / metrics["loss"][1])
    assert float(state.opt_state[0]["value"]) == pytest.approx(loss, rel=1e-6)
    if clip is not None:
        assert float(state.opt_state[0]["norm"]) == pytest.approx(clip, rel=1e-5)
        assert float(metrics["grad_norm"][0]) > clip


def test_clipping_leaves_a_short_gradient_alone_and_shortens_a_long_one():
    def after(clip):
        tx = optax.sgd(1.0)
        state = step.init(jax.random.key(0), toy.MODEL, tx)
        before = host(state.params)
        state, metrics = step.make(toy.ce, tx, clip_norm=clip)(state, toy.batch())
        change = jax.tree.map(lambda a, b: a - b, host(state.params), before)
        return change, float(metrics["grad_norm"][0])

    plain, norm = after(None)
    same, reported = after(norm * 2)
    assert largest(plain, same) == 0
    assert reported == norm
    short, reported = after(norm / 2)
    assert reported == norm
    assert largest(short, jax.tree.map(lambda x: x / 2, plain)) < 1e-6


def test_ema_is_the_moving_average_of_the_parameters():
    tx = optax.sgd(0.5)
    plan = plan_of({"data": 4, "model": 2})
    state = step.init(jax.random.key(0), toy.MODEL, tx, plan, ema=0.8)
    average = host(state.params)
    train = step.make(toy.ce, tx, plan, ema=0.8)
    for number in range(3):
        state, _ = train(state, toy.batch(number))
        average = jax.tree.map(lambda a, p: 0.8 * a + 0.2 * p, average, host(state.params))
    assert largest(host(state.extra["ema"]), average) < 1e-6
    shardings = jax.tree.map(lambda x: x.sharding, (state.extra["ema"], state.params))
    assert shardings[0] == shardings[1]
    bare = step.init(jax.random.key(0), toy.MODEL, tx)
    with pytest.raises(ValueError, match=r"give step\.init ema= too"):
        step.make(toy.ce, tx, ema=0.8)(bare, toy.batch())


def test_every_micro_batch_of_every_step_has_its_own_reproducible_key():
    def draws(params, batch, key):
        out = toy.ce(params, batch, key)
        rows = batch["row"][0]
        value = jax.random.uniform(key)
        one_hot = {f"draw{i}": (jnp.where(rows == i, value, 0.0), 1.0) for i in range(4)}
        return LossOut(out.total, out.weight, one_hot)

    tx = optax.sgd(0.1)
    train = step.make(draws, tx, microbatches=4, donate=False)
    state = step.init(jax.random.key(0), toy.MODEL, tx)
    batch = {**toy.batch(), "row": np.arange(toy.ROWS)}
    values = []
    for _ in range(2):
        state, metrics = train(state, batch)
        values += [float(metrics[f"draw{i}"][0]) for i in range(4)]
    assert len(set(values)) == 8
    # A state rebuilt from its parts, as a resume does, draws the same.
    again = state.replace(step=jnp.int32(1), rng=jax.random.clone(state.rng))
    _, metrics = train(again, batch)
    assert [float(metrics[f"draw{i}"][0]) for i in range(4)] == values[4:]


def test_weights_cost_no_second_forward_pass():
    def dots(microbatches):
        tx = optax.sgd(0.1)
        state = step.init(jax.random.key(0), toy.MODEL, tx)
        train = step.make(toy.ce, tx, microbatches=microbatches)
        text = train.lower(state, toy.batch()).compile().as_text()
        return len(re.findall(r" dot\(", text))

    assert dots(1) > 0
    assert dots(4) == dots(1)


def test_a_plain_step_has_no_scan_over_micro_batches():
    tx = optax.sgd(0.1)
    state = step.init(jax.random.key(0), toy.MODEL, tx)
    loops = Counter()
    for count in (1, 4):
        text = step.make(toy.ce, tx, microbatches=count).lower(state, toy.batch()).as_text()
        loops[count] = text.count("stablehlo.while")
    assert loops[1] < loops[4]
    assert loops[1] == 2  # the layers, forward and backward


def test_a_component_without_any_label_counts_nothing():
    tx = optax.sgd(1.0)
    state = step.init(jax.random.key(0), toy.MODEL, tx)
    before = host(state.params)
    empty = {**toy.batch(), "label_mask": np.zeros((toy.ROWS, toy.LENGTH), np.float32)}
    state, metrics = step.make(toy.ce, tx, microbatches=2)(state, empty)
    assert float(metrics["loss"][0]) == 0
    assert float(metrics["loss"][1]) == 0
    assert largest(host(state.params), before) == 0


def test_no_gradient_flows_through_the_weight():
    def weighted(params, batch, key):
        out = toy.ce(params, batch, key)
        scale = 1.0 + (params["head"]["kernel"] ** 2).sum()
        return LossOut(out.total, out.weight * scale)

    changes = []
    for microbatches in (1, 2):
        tx = optax.sgd(1.0)
        state = step.init(jax.random.key(0), toy.MODEL, tx)
        before = host(state.params)
        scale = 1.0 + float((before["head"]["kernel"] ** 2).sum()) * microbatches / microbatches
        state, _ = step.make(weighted, tx, microbatches=microbatches)(state, toy.batch())
        changes.append(jax.tree.map(lambda a, b, s=scale: (a - b) * s, host(state.params), before))
    state = step.init(jax.random.key(0), toy.MODEL, optax.sgd(1.0))
    before = host(state.params)
    state, _ = step.make(toy.ce, optax.sgd(1.0))(state, toy.batch())
    plain = jax.tree.map(lambda a, b: a - b, host(state.params), before)
    assert largest(changes[0], plain) < 1e-5
    assert largest(changes[1], plain) < 1e-5


def test_the_sharded_init_equals_the_plain_one_and_lies_where_the_rules_say():
    plan = plan_of({"data": 4, "model": 2})
    tx = optax.adamw(1e-2)
    plain = step.init(jax.random.key(3), toy.MODEL, tx, ema=0.9)
    state = step.init(jax.random.key(3), toy.MODEL, tx, plan, ema=0.9)
    assert largest(host(plain.params), host(state.params)) < 1e-6
    kernel = state.params["layers"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 8, 4)
    moment = state.opt_state[0].mu["layers"]["kernel"]
    assert moment.sharding == kernel.sharding == state.extra["ema"]["layers"]["kernel"].sharding
    like = step.abstract(toy.MODEL, tx, plan, ema=0.9)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), like) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), state
    )


def test_bad_input_is_named():
    tx = optax.sgd(0.1)
    state = step.init(jax.random.key(0), toy.MODEL, tx)
    with pytest.raises(ValueError, match=r"has 32 rows, not divisible by microbatches=5"):
        step.make(toy.ce, tx, microbatches=5)(state, toy.batch())
    with pytest.raises(ValueError, match="microbatches must be >= 1, got 0"):
        step.make(toy.ce, tx, microbatches=0)
    with pytest.raises(ValueError, match="clip_norm must be > 0"):
        step.make(toy.ce, tx, clip_norm=-1.0)
    with pytest.raises(ValueError, match=r"ema must be in \[0, 1\)"):
        step.init(jax.random.key(0), toy.MODEL, tx, ema=1.0)
    with pytest.raises(ValueError, match="matches no parameter"):
        step.init(jax.random.key(0), toy.MODEL, tx, trainable=("haed/.*",))
    plan = mesh.plan({"data": 8})
    placed = step.init(jax.random.key(0), toy.MODEL, tx, plan)
    with pytest.raises(ValueError, match=r"32 rows, 4 in each of 8 micro-batches.*64 rows"):
        step.make(toy.ce, tx, plan, microbatches=8)(placed, toy.batch())
    with pytest.raises(ValueError, match=r"not placed on the mesh.*step\.init"):
        step.make(toy.ce, tx, plan)(state, toy.batch())

    def clash(params, batch, key):
        return toy.ce(params, batch, key)._replace(aux={"loss": (1.0, 1.0)})

    with pytest.raises(ValueError, match="aux metric 'loss'"):
        step.make(clash, tx)(state, toy.batch())
