"""The basic losses against a plain numpy reference, and the promise that they are sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.model import Inputs, Model, ModelOut, Parts
from steppe.train import objectives
from steppe.train.objectives.basic import span_logits
from steppe.train.types import LossOut


def table_model(shape: tuple[int, ...], dtype=jnp.float32) -> Model:
    """A network whose logits are a parameter, so that the loss alone is under test."""

    def init(key):
        return {"logits": jax.random.normal(key, shape)}

    def apply(params, batch, *, rng=None, train=False, **_):
        noise = jax.random.normal(rng, shape) if train else 0.0
        return ModelOut((params["logits"] + noise).astype(dtype), None)

    return Model(config=None, init=init, apply=apply, axes=())


def call(objective, params, batch, key=None) -> LossOut:
    """One compiled call: eager mode would compile every operation by itself."""
    return jax.jit(objective)(params, batch, key)


def case(shape, labels_shape, classes, seed=0):
    rng = np.random.default_rng(seed)
    params = {"logits": jnp.asarray(rng.normal(size=shape) * 3, jnp.float32)}
    labels = rng.integers(0, classes, labels_shape).astype(np.int32)
    mask = (rng.random(labels_shape) < 0.7).astype(np.float32)
    return params, {"labels": jnp.asarray(labels), "label_mask": jnp.asarray(mask)}


def reference(logits, labels, mask, smoothing=0.0):
    logp = log_softmax(np.asarray(logits, np.float64), axis=-1)
    nll = -np.take_along_axis(logp, np.asarray(labels)[..., None], -1)[..., 0]
    nll = (1 - smoothing) * nll - smoothing * logp.mean(-1)
    right = np.asarray(logits).argmax(-1) == np.asarray(labels)
    return (nll * mask).sum(), mask.sum(), (right * np.asarray(mask)).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classification_matches_numpy(smoothing):
    params, batch = case((9, 4), (9,), 4)
    out = call(objectives.classification_ce(table_model((9, 4)), smoothing), params, batch)
    total, weight, right = reference(
        params["logits"], batch["labels"], batch["label_mask"], smoothing
    )
    np.testing.assert_allclose(out.total, total, rtol=1e-5)
    assert float(out.weight) == weight
    assert tuple(map(float, out.aux["accuracy"])) == (right, weight)


@pytest.mark.parametrize("shift", [False, True])
def test_token_matches_numpy(shift):
    params, batch = case((3, 7, 5), (3, 7), 5)
    out = call(objectives.token_ce(table_model((3, 7, 5)), shift=shift), params, batch)
    logits, labels, mask = params["logits"], batch["labels"], batch["label_mask"]
    if shift:
        logits, labels, mask = logits[:, :-1], labels[:, 1:], mask[:, 1:]
    total, weight, right = reference(logits, labels, mask)
    np.testing.assert_allclose(out.total, total, rtol=1e-5)
    assert tuple(map(float, out.aux["accuracy"])) == (right, weight)


def test_gradient_is_softmax_minus_one_hot_and_zero_where_masked():
    params, batch = case((6, 3), (6,), 3)
    objective = objectives.classification_ce(table_model((6, 3)))
    grad = jax.jit(jax.grad(lambda p: objective(p, batch, None).total))(params)["logits"]
    expected = softmax(np.asarray(params["logits"]), axis=-1) - np.eye(3)[batch["labels"]]
    expected = expected * np.asarray(batch["label_mask"])[:, None]
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_mse_matches_numpy_and_accepts_a_column():
    rng = np.random.default_rng(0)
    value, labels = rng.normal(size=8), rng.normal(size=8)
    mask = np.array([1, 1, 0, 1, 1, 0, 1, 1.0])
    batch = {"labels": jnp.asarray(labels, jnp.float32), "label_mask": jnp.asarray(mask)}
    for shape in ((8,), (8, 1)):
        params = {"logits": jnp.asarray(value, jnp.float32).reshape(shape)}
        out = call(objectives.mse(table_model(shape)), params, batch)
        np.testing.assert_allclose(out.total, (mask * (value - labels) ** 2).sum(), rtol=1e-5)
        mae = (mask * abs(value - labels)).sum()
        np.testing.assert_allclose(out.aux["mae"][0], mae, rtol=1e-5)
        assert float(out.weight) == 6


def test_mse_does_not_broadcast():
    params, batch = case((4, 3), (4,), 3)
    with pytest.raises(ValueError, match=r"\(4, 3\) do not fit labels of shape \(4,\)"):
        objectives.mse(table_model((4, 3)))(params, batch, None)


def test_span_matches_numpy_and_ignores_padding():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(4, 6, 2)).astype(np.float32)
    labels = np.array([[0, 2], [1, 1], [3, 4], [0, 0]], np.int32)
    batch = {"labels": jnp.asarray(labels), "label_mask": jnp.array([1.0, 1.0, 1.0, 0.0])}
    attention = np.ones((4, 9), np.int32)
    attention[:, 6:] = 0
    attention[3] = 0  # a padding row: no token at all
    padded = np.concatenate([logits, np.full((4, 3, 2), 50.0, np.float32)], 1)
    short = call(objectives.span_ce(table_model((4, 6, 2))), {"logits": jnp.asarray(logits)}, batch)
    long = objectives.span_ce(table_model((4, 9, 2)))
    batch = {**batch, "attention_mask": jnp.asarray(attention)}
    params = {"logits": jnp.asarray(padded)}
    out = call(long, params, batch)
    grad = jax.jit(jax.grad(lambda p: long(p, batch, None).total))(params)
    logp = log_softmax(logits.astype(np.float64), axis=1)
    expected = -sum(logp[i, labels[i, e], e] for i in range(3) for e in range(2)) / 2
    np.testing.assert_allclose(out.total, expected, rtol=1e-5)
    np.testing.assert_allclose(short.total, expected, rtol=1e-5)
    exact = sum((logits[i].argmax(0) == labels[i]).all() for i in range(3))
    assert tuple(map(float, out.aux["exact"])) == (exact, 3)
    assert np.isfinite(grad["logits"]).all()
    assert not grad["logits"][:, 6:].any()


def test_span_label_on_padding_is_loud():
    batch = {
        "labels": jnp.array([[0, 3]]),
        "label_mask": jnp.ones(1),
        "attention_mask": jnp.array([[1, 1, 1, 0]]),
    }
    out = call(objectives.span_ce(table_model((1, 4, 2))), {"logits": np.zeros((1, 4, 2))}, batch)
    assert np.isinf(out.total)
    assert span_logits(jnp.zeros((1, 4, 2)), {"attention_mask": jnp.ones((1, 4, 4))}).max() == 0


def test_negative_labels_are_ignored_with_and_without_a_mask():
    params, batch = case((5, 3), (5,), 3)
    objective = objectives.classification_ce(table_model((5, 3)))
    ignored = jnp.where(batch["label_mask"] > 0, batch["labels"], -100)
    expected = call(objective, params, batch)
    for labels in ({"labels": ignored}, {"labels": ignored, "label_mask": jnp.ones(5)}):
        out = call(objective, params, labels)
        np.testing.assert_allclose(out.total, expected.total, rtol=1e-6)
        assert float(out.weight) == float(expected.weight)
    span = objectives.span_ce(table_model((2, 4, 2)))
    out = call(span, {"logits": np.zeros((2, 4, 2))}, {"labels": np.array([[1, 2], [-1, -1]])})
    np.testing.assert_allclose([out.total, out.weight], [np.log(4), 1], rtol=1e-6)


def test_label_out_of_range_is_not_trained_silently():
    objective = objectives.classification_ce(table_model((2, 3)))
    batch = {"labels": jnp.array([0, 3]), "label_mask": jnp.ones(2)}
    assert np.isnan(call(objective, {"logits": np.zeros((2, 3))}, batch).total)


def test_masked_rows_may_be_nan():
    batch = {"labels": jnp.array([0, 1]), "label_mask": jnp.array([1.0, 0.0])}
    params = {"logits": jnp.array([[0.0, 0.0], [jnp.nan, jnp.nan]])}
    out = call(objectives.classification_ce(table_model((2, 2))), params, batch)
    np.testing.assert_allclose(out.total, np.log(2), rtol=1e-6)


def test_logits_are_scored_in_float32():
    params, batch = case((64, 50), (64,), 50)
    low = params["logits"].astype(jnp.bfloat16)
    out = objectives.classification_ce(table_model((64, 50), jnp.bfloat16))
    out = call(out, {"logits": low}, batch)
    total, _, _ = reference(low.astype(jnp.float32), batch["labels"], batch["label_mask"])
    assert out.total.dtype == jnp.float32
    np.testing.assert_allclose(out.total, total, rtol=1e-5)


@pytest.mark.parametrize("pieces", [2, 4])
def test_sums_are_invariant_to_the_split(pieces):
    params, batch = case((8, 5, 3), (8, 5), 3)
    whole = call(objectives.token_ce(table_model((8, 5, 3))), params, batch)
    logits = np.asarray(params["logits"])
    batch = {k: np.asarray(v) for k, v in batch.items()}
    rows = 8 // pieces
    split = jax.jit(objectives.token_ce(table_model((rows, 5, 3))))
    total = weight = 0.0
    for i in range(pieces):
        part = slice(i * rows, (i + 1) * rows)
        out = split({"logits": logits[part]}, {k: v[part] for k, v in batch.items()}, None)
        total, weight = total + out.total, weight + out.weight
    np.testing.assert_allclose(total / weight, whole.total / whole.weight, rtol=1e-6)


def test_key_means_training():
    params, batch = case((4, 3), (4,), 3)
    objective = objectives.classification_ce(table_model((4, 3)))
    quiet = call(objective, params, batch).total
    noisy = [call(objective, params, batch, jax.random.key(k)).total for k in (0, 0, 1)]
    assert noisy[0] == noisy[1] != noisy[2] != quiet


def encoder(head: str, **kwargs):
    return EncoderConfig(
        family="bert", vocab_size=23, width=8, layers=1, heads=2, ffn_width=16, positions=12,
        head=HeadConfig(head, 2, drop=0.0), remat="none", **kwargs,
    ).build()  # fmt: skip


def params_of(model, seed=0):
    """Random parameters drawn by numpy: compiling ``model.init`` is not under test here."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0.5, 0.5, leaf.shape).astype(np.float32), model.abstract()
    )


def test_mlm_with_gathered_positions_equals_all_positions():
    model = encoder("mlm")
    params = params_of(model)
    rng = np.random.default_rng(0)
    mask = np.zeros((4, 10), np.float32)
    for row, many in enumerate((3, 0, 1, 2)):
        mask[row, rng.choice(10, many, replace=False)] = 1
    batch = {
        "input_ids": jnp.asarray(rng.integers(0, 23, (4, 10)), jnp.int32),
        "attention_mask": jnp.ones((4, 10), jnp.int32),
        "labels": jnp.asarray(rng.integers(0, 23, (4, 10)), jnp.int32),
        "label_mask": jnp.asarray(mask),
    }

    def value_and_grad(objective):
        def f(p):
            out = objective(p, batch, None)
            return out.total, out

        return jax.jit(jax.value_and_grad(f, has_aux=True))(params)

    (_, few), few_grad = value_and_grad(objectives.mlm_ce(model, max_masked=3))
    (_, whole), whole_grad = value_and_grad(objectives.mlm_ce(model))
    np.testing.assert_allclose(few.total, whole.total, rtol=1e-5)
    assert float(few.weight) == float(whole.weight) == 6
    assert float(few.aux["accuracy"][0]) == float(whole.aux["accuracy"][0])
    assert tuple(map(float, few.aux["left_out"])) == (0, 6)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), few_grad, whole_grad
    )
    cut = call(objectives.mlm_ce(model, max_masked=2), params, batch)
    assert float(cut.weight) == 5
    assert tuple(map(float, cut.aux["left_out"])) == (1, 6)


def test_mlm_gathers_at_most_the_row_and_passes_the_key_to_every_stage():
    # A network of three stages that add noise under a key; hidden rows 0 and 1 are a prompt.
    table = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)), jnp.float32)
    seen = []

    def noise(name, rng, train):
        seen.append((name, train))
        return jax.random.normal(rng) if train else 0.0

    def embed(params, batch, *, rng, train):
        hidden = table[batch["input_ids"]] + noise("embed", rng, train)
        prompt = jnp.full((len(hidden), 2, 5), 9.0)
        return Inputs(jnp.concatenate([prompt, hidden], 1), None, None, None, prompt=2)

    def layers(params, inputs, *, rng, train):
        return inputs.hidden + noise("layers", rng, train)

    def head(params, hidden, inputs, *, rng, train):
        return params["w"] * hidden[:, inputs.prompt :] + noise("head", rng, train)

    def apply(params, batch, *, rng=None, train=False):
        inputs = embed(params, batch, rng=rng, train=train)
        hidden = layers(params, inputs, rng=rng, train=train)
        return ModelOut(head(params, hidden, inputs, rng=rng, train=train), hidden)

    model = Model(None, None, apply, (), parts=Parts(embed, layers, head))
    params, batch = case((1,), (3, 4), 5)
    params = {"w": params["logits"]}
    batch["input_ids"] = batch["labels"][::-1]
    for key in (None, jax.random.key(0)):
        whole = call(objectives.mlm_ce(model), params, batch, key)
        seen.clear()
        few = call(objectives.mlm_ce(model, max_masked=99), params, batch, key)
        assert seen == [(name, key is not None) for name in ("embed", "layers", "head")]
        np.testing.assert_allclose(few.total, whole.total, rtol=1e-5)
        assert float(few.weight) == float(whole.weight)


def test_weighted_keeps_every_component_apart():
    shape = (3, 7, 5)
    params, batch = case(shape, (3, 7), 5)
    ce = objectives.token_ce(table_model(shape))
    smooth = objectives.token_ce(table_model(shape), shift=True, label_smoothing=0.2)
    out = call(objectives.weighted({"ce": (ce, 0.5), "lm": (smooth, -2.0)}), params, batch)
    first, second = call(ce, params, batch), call(smooth, params, batch)
    assert set(out.total) == set(out.weight) == {"ce", "lm"}
    np.testing.assert_allclose(out.total["ce"], 0.5 * first.total)
    np.testing.assert_allclose(out.total["lm"], -2.0 * second.total)
    assert float(out.weight["lm"]) == float(second.weight) != float(out.weight["ce"])
    assert set(out.aux) == {"ce/loss", "ce/accuracy", "lm/loss", "lm/accuracy"}
    np.testing.assert_allclose(out.aux["lm/loss"][0], second.total)


def test_weighted_nests_and_shares_the_key():
    seen = []

    def spy(params, batch, key):
        seen.append(key)
        return LossOut(jnp.float32(2.0), jnp.float32(4.0), {"m": (1.0, 1.0)})

    inner = objectives.weighted({"a": (spy, 1.0), "b": (spy, 3.0)})
    out = objectives.weighted({"x": (inner, 0.5), "y": (spy, 1.0)})({}, {}, jax.random.key(3))
    assert {k: float(v) for k, v in out.total.items()} == {"x/a": 1.0, "x/b": 3.0, "y": 2.0}
    assert set(out.aux) == {"x/a/loss", "x/a/m", "x/b/loss", "x/b/m", "y/loss", "y/m"}
    assert all((jax.random.key_data(k) == jax.random.key_data(seen[0])).all() for k in seen)


def test_one_network_in_two_components_runs_once():
    model = encoder("classification", attn_drop=0.0)
    params = model.abstract()
    batch = {
        "input_ids": jax.ShapeDtypeStruct((2, 8), jnp.int32),
        "labels": jax.ShapeDtypeStruct((2,), jnp.int32),
        "label_mask": jax.ShapeDtypeStruct((2,), jnp.float32),
    }
    key = jax.random.key(0)
    one = objectives.classification_ce(model)
    two = objectives.weighted({"a": (one, 1.0), "b": (objectives.classification_ce(model), 0.5)})

    def flops(objective):
        def loss(p, b):
            out = objective(p, b, key)
            return sum(jax.tree.leaves(out.total))

        return jax.jit(loss).lower(params, batch).compile().cost_analysis()["flops"]

    assert flops(two) < 1.1 * flops(one)


@pytest.mark.parametrize("kind", ["classification", "regression", "token", "span", "mlm"])
def test_for_task_fits_the_head_of_that_kind(kind):
    num = {"regression": 1}.get(kind, 2)
    config = EncoderConfig("bert", 23, 8, 1, 2, 16, 12, head=HeadConfig(kind, num))
    model = config.build()
    labels = {
        "classification": jnp.array([0, 1]),
        "regression": jnp.array([0.5, -1.0]),
        "span": jnp.array([[0, 1], [2, 2]]),
    }.get(kind, jnp.ones((2, 5), jnp.int32))
    mask = jnp.ones(labels.shape[: 2 if kind in ("token", "mlm") else 1])
    batch = {
        "input_ids": jnp.arange(10).reshape(2, 5),
        "attention_mask": jnp.ones((2, 5), jnp.int32),
        "labels": labels,
        "label_mask": mask,
    }
    params = params_of(model)
    out = call(objectives.for_task(model, kind), params, batch)
    assert np.isfinite(out.total)
    assert float(out.weight) == mask.size


@pytest.mark.parametrize("kind", ["classification", "regression", "token", "lm", "span", "mlm"])
def test_rows_are_what_the_sums_are_made_of(kind):
    """Each row's sums are those of a batch of that row alone; nothing is learnt through them."""
    shapes = {"classification": (6, 4), "regression": (6,), "span": (6, 5, 2)}
    shape = shapes.get(kind, (6, 5, 4))
    answers = {"span": (6, 2), "token": (6, 5), "lm": (6, 5), "mlm": (6, 5)}.get(kind, (6,))
    params, batch = case(shape, answers, 2)
    if kind == "span":
        batch["label_mask"] = batch["label_mask"][:, 0]
        batch["attention_mask"] = jnp.ones((6, 5), jnp.int32)
    if kind == "regression":
        batch["labels"] = batch["labels"] + 0.25
    batch["label_mask"] = batch["label_mask"].at[2].set(0.0)

    def out(chosen):
        objective = objectives.for_task(table_model((len(chosen), *shape[1:])), kind)
        one = {name: value[jnp.array(chosen)] for name, value in batch.items()}
        return call(objective, {"logits": params["logits"][jnp.array(chosen)]}, one)

    whole, single = out(list(range(6))), out([3])
    for given, total, alone in zip(
        whole.rows, (whole.total, whole.weight), (single.total, single.weight), strict=True
    ):
        assert given.shape == (6,)
        assert float(given[2]) == 0
        np.testing.assert_allclose(given.sum(), total, rtol=1e-6)
        np.testing.assert_allclose(given[3], alone, rtol=1e-6)
    objective = objectives.for_task(table_model(shape), kind)
    grads = jax.grad(lambda p: objective(p, batch, None).rows[0].sum())(params)
    assert not np.any(grads["logits"])


def test_rows_of_a_weighted_sum():
    shape = (3, 7, 5)
    params, batch = case(shape, (3, 7), 5)
    ce = objectives.token_ce(table_model(shape))
    pair = objectives.weighted({"a": (ce, 0.5), "b": (ce, -2.0)})
    out, alone = (
        call(objectives.weighted({"x": (pair, 2.0), "y": (ce, 1.0)}), params, batch),
        call(ce, params, batch),
    )
    assert set(out.rows[0]) == set(out.rows[1]) == {"x/a", "x/b", "y"}
    np.testing.assert_allclose(out.rows[0]["x/b"], -4.0 * alone.rows[0], rtol=1e-6)
    np.testing.assert_array_equal(out.rows[1]["x/a"], alone.rows[1])
    untold = lambda *_: LossOut(jnp.float32(1), jnp.float32(1))  # noqa: E731
    both = objectives.weighted({"x": (ce, 1.0), "z": (untold, 1.0), "y": (ce, 1.0)})
    assert call(both, params, batch).rows is None


def test_bad_input_is_named():
    model = table_model((4, 3))
    params, batch = case((4, 3), (4,), 3)
    with pytest.raises(ValueError, match=r"kind must be one of classification.*got 'rank'"):
        objectives.for_task(model, "rank")
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1.0"):
        objectives.classification_ce(model, label_smoothing=1.0)
    with pytest.raises(ValueError, match="at least one"):
        objectives.weighted({})
    with pytest.raises(ValueError, match="coefficient of 'a' must be finite, got nan"):
        objectives.weighted({"a": (objectives.mse(model), float("nan"))})
    with pytest.raises(ValueError, match="max_masked must be >= 1, got 0"):
        objectives.mlm_ce(model, max_masked=0)
    with pytest.raises(ValueError, match="needs a model with parts"):
        objectives.mlm_ce(model, max_masked=3)
    with pytest.raises(ValueError, match="do not fit labels"):
        objectives.token_ce(model)(params, {"labels": jnp.zeros((4, 3), jnp.int32)}, None)
    with pytest.raises(ValueError, match="use a span head"):
        objectives.span_ce(model)(params, batch, None)
    headless = EncoderConfig("bert", 23, 8, 1, 2, 16, 12).build()
    ids = {"input_ids": jnp.zeros((4, 3), jnp.int32), **batch}
    with pytest.raises(ValueError, match="no head"):
        jax.eval_shape(objectives.classification_ce(headless), headless.abstract(), ids, None)
