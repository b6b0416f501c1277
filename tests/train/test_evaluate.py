"""The evaluation run: every example once, whatever the batches, the mesh and the precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.train import evaluate, mesh
from steppe.train.evaluate.predict import best_span, pool


def encoder(head=None, labels=2, **kwargs):
    config = EncoderConfig("bert", 30, 16, 1, 2, 16, 16, remat="none", **kwargs)
    return config.with_head(None if head is None else HeadConfig(head, labels)).build()


def params_of(model, seed=0):
    """Random parameters drawn by numpy: compiling ``model.init`` is not under test here."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0.5, 0.5, leaf.shape).astype(np.float32), model.abstract()
    )


@pytest.fixture(scope="module")
def corpus():
    """Eleven token sequences of 3 to 8 tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(1, 30, rng.integers(3, 9)).astype(np.int32) for _ in range(11)]


def label(kind, tokens, i):
    rng = np.random.default_rng(100 + i)
    n = len(tokens)
    start = rng.integers(0, n)
    return {
        "classification": np.int32(i % 2),
        "regression": np.float32(rng.normal()),
        "token": rng.integers(0, 3, n).astype(np.int32),
        "span": np.array([start, rng.integers(start, n)], np.int32),
        "mlm": rng.integers(0, 30, n).astype(np.int32),
    }[kind]


def batches_of(corpus, kind, size, order=None, width=8, indexed=True):
    """Padded batches; the last is filled up with padding rows."""
    order = list(range(len(corpus))) if order is None else list(order)
    per_token = kind in ("token", "mlm")
    for at in range(0, len(order), size):
        part = order[at : at + size]
        ids, attention = np.zeros((2, size, width), np.int32)
        labels = np.zeros(
            (size, width) if per_token else (size, 2) if kind == "span" else (size,),
            np.float32 if kind == "regression" else np.int32,
        )
        mask = np.zeros((size, width) if per_token else (size,), np.float32)
        index = np.full(size, -1, np.int32)
        for row, i in enumerate(part):
            n = len(corpus[i])
            ids[row, :n], attention[row, :n], index[row] = corpus[i], 1, i
            labels[(row, slice(n)) if per_token else row] = label(kind, corpus[i], i)
            if per_token:
                mask[row, 1:n] = 1
            else:
                mask[row] = 1
        batch = {
            "input_ids": ids, "attention_mask": attention, "labels": labels,
            "label_mask": mask, "example_index": index,
        }  # fmt: skip
        if not indexed:
            del batch["example_index"]
        yield batch


COUNT = {"classification": 2, "regression": 1, "token": 3, "span": 2, "mlm": 2}
KEYS = {
    "classification": {
        "accuracy", "f1_macro", "mcc", "ece", "brier", "precision", "recall", "f1",
    },
    "regression": {"mse", "mae", "pearson", "spearman"},
    "token": {"accuracy", "f1_macro"},
    "span": {"exact", "f1"},
    "mlm": {"accuracy", "perplexity", "tokens"},
}  # fmt: skip


@pytest.mark.parametrize("kind", list(KEYS))
def test_run_does_not_depend_on_order_batch_size_or_padding(kind, corpus):
    model = encoder(kind, COUNT[kind])
    params = params_of(model)
    one = evaluate.run(model, params, batches_of(corpus, kind, 4), kind)
    other = evaluate.run(
        model, params, batches_of(corpus, kind, 6, order=np.arange(11)[::-1], width=10), kind
    )
    assert set(one.metrics) == KEYS[kind] | {"examples", "loss"}
    assert one.metrics["examples"] == 11
    assert one.metrics == pytest.approx(other.metrics, rel=1e-6, abs=2e-5)  # perplexity is 161
    assert one.index.tolist() == list(range(11))
    assert one.labelled.all()
    for a, b in ((one.predictions, other.predictions), (one.losses, other.losses)):
        for x, y in zip(a, b):
            np.testing.assert_allclose(x, y, atol=2e-5)
    if kind != "regression":
        assert one.correct.shape == (11,)
    else:
        with pytest.raises(ValueError, match="no right or wrong"):
            _ = one.correct
    # Each example alone, straight from the model.
    for i in (5,):
        n = len(corpus[i])
        logits = jax.jit(model.apply)(params, {"input_ids": corpus[i][None]}).logits[0]
        logits = np.asarray(logits, np.float64)
        if kind == "classification":
            assert one.predictions[i] == logits.argmax()
            probs = np.exp(logits) / np.exp(logits).sum()
            np.testing.assert_allclose(one.probs[i], probs, atol=1e-5)
        elif kind == "regression":
            np.testing.assert_allclose(one.predictions[i], logits, atol=1e-5)
        elif kind == "span":
            scores = {(s, e): logits[s, 0] + logits[e, 1] for s in range(n) for e in range(s, n)}
            assert tuple(one.predictions[i]) == max(scores, key=scores.get)
            assert one.scores[i] == pytest.approx(max(scores.values()), rel=1e-5)
        else:
            np.testing.assert_array_equal(one.predictions[i], logits[1:n].argmax(-1))
            np.testing.assert_array_equal(one.labels[i], label(kind, corpus[i], i)[1:])


def test_run_agrees_with_the_objective(corpus):
    from steppe.train import objectives

    for kind in ("classification", "span"):
        model = encoder(kind, COUNT[kind])
        params = params_of(model)
        (batch,) = batches_of(corpus, kind, 11)
        out = jax.jit(objectives.for_task(model, kind))(params, batch, None)
        result = evaluate.run(model, params, [batch], kind)
        assert result.metrics["loss"] == pytest.approx(float(out.total / out.weight), rel=1e-5)


def test_a_second_evaluation_compiles_nothing(corpus):
    model = encoder("classification")
    params = params_of(model)
    compiled = evaluate.predictor(model, "classification")
    for _ in range(3):
        evaluate.run(model, params, batches_of(corpus, "classification", 4), "classification")
        evaluate.run(
            model, params, batches_of(corpus, "classification", 4, width=10), "classification"
        )
    assert compiled is evaluate.predictor(model, "classification")
    assert compiled.compiles == 2


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 4, "model": 2}])
def test_run_on_a_mesh_equals_one_device(axes, corpus):
    model = encoder("classification")
    params = params_of(model)
    rows = list(batches_of(corpus, "classification", 8))
    alone = evaluate.run(model, params, rows, "classification")
    plan = mesh.plan(axes, model.axes)
    placed = plan.place(params)
    for kwargs in ({"plan": plan}, {}):
        shared = evaluate.run(model, placed, rows, "classification", **kwargs)
        assert shared.metrics == pytest.approx(alone.metrics, abs=1e-5)
        np.testing.assert_array_equal(shared.predictions, alone.predictions)
    with pytest.raises(ValueError, match="has 3 rows, not divisible by the"):
        evaluate.run(
            model, placed, batches_of(corpus, "classification", 3), "classification", plan=plan
        )


def test_run_in_bfloat16_stays_close_and_scores_in_float64(corpus):
    model = encoder("classification")
    params = params_of(model)
    rows = list(batches_of(corpus, "classification", 11))
    exact = evaluate.run(model, params, rows, "classification")
    low = evaluate.run(model, params, rows, "classification", compute_dtype="bfloat16")
    assert low.probs.dtype == np.float64
    assert (low.probs != exact.probs).any()
    np.testing.assert_allclose(low.probs, exact.probs, atol=0.03)


class Tags:
    kind = "token"
    label_names = ("O", "B-X", "I-X")


def test_tagging_tasks_score_entities_and_others_classes():
    rows = {
        "input_ids": np.zeros((2, 4), np.int32),
        "labels": np.array([[0, 1, 2, 0], [1, 0, -100, 0]]),
        "label_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    guess = np.array([[0, 1, 2, 0], [0, 0, 2, 2]])

    def predict(params, batch):
        return {"label": guess, "confidence": np.ones((2, 4)), "nll": np.ones((2, 4))}

    result = evaluate.run(None, {}, [rows], Tags(), predict=predict)
    assert result.metrics["precision"] == 1.0
    assert result.metrics["recall"] == 0.5
    assert result.metrics["accuracy"] == pytest.approx(5 / 6)
    assert [list(p) for p in result.predictions] == [[0, 1, 2, 0], [0, 0]]
    assert result.correct.tolist() == [True, False]
    assert result.label_names == Tags.label_names


def logits_of(values):
    return lambda params, batch: {"logits": np.asarray(values, np.float32)}


def test_unlabelled_examples_are_predicted_but_not_scored():
    rows = {
        "labels": np.array([1, 0, -100, 0]),
        "label_mask": np.array([1.0, 0.0, 1.0, 1.0]),
        "example_index": np.array([2, 0, 1, -1]),
    }
    result = evaluate.run(
        None, {}, [rows], "classification", predict=logits_of([[0, 2], [3, 0], [0, 1], [9, 0]])
    )
    assert result.predictions.tolist() == [0, 1, 1]
    assert result.labelled.tolist() == [False, False, True]
    assert result.metrics["examples"] == 1
    assert result.metrics["accuracy"] == 1
    assert np.isnan(result.losses).tolist() == [True, True, False]
    del rows["labels"]
    result = evaluate.run(
        None, {}, [rows], "classification", predict=logits_of([[0, 2], [3, 0], [0, 1], [9, 0]])
    )
    assert result.metrics == {"examples": 0}


def test_batches_without_an_index_are_numbered_as_they_come(corpus):
    model = encoder("classification")
    params = params_of(model)
    with_index = evaluate.run(
        model, params, batches_of(corpus, "classification", 4), "classification"
    )
    rows = batches_of(corpus, "classification", 4, indexed=False)
    without = evaluate.run(model, params, rows, "classification")
    assert without.metrics == with_index.metrics
    assert without.index.tolist() == list(range(11))


def test_bad_evaluations_are_named():
    good = {"labels": np.array([0, 1]), "example_index": np.array([0, 1])}
    ok = logits_of([[0, 1], [1, 0]])

    def run(rows, predict=ok, kind="classification"):
        return evaluate.run(None, {}, rows, kind, predict=predict)

    with pytest.raises(ValueError, match="batches hold no examples"):
        run([])
    with pytest.raises(ValueError, match="example 0 came twice"):
        run([good, good])
    with pytest.raises(ValueError, match="kind must be one of classification.*got 'rank'"):
        run([good], kind="rank")
    with pytest.raises(ValueError, match="logits of example 1 is not a number"):
        run([good], logits_of([[0, 1], [math.nan, 0]]))
    with pytest.raises(ValueError, match="labels must be >= 0 and < num_labels=2, got 7 at row 1"):
        run([{**good, "labels": np.array([0, 7])}])
    with pytest.raises(ValueError, match="predict must return 'logits', got \\['value'\\]"):
        run([good], lambda p, b: {"value": np.zeros(2)})
    with pytest.raises(ValueError, match=r"'logits' has shape \(1, 2\), but the batch has 2 rows"):
        run([good], logits_of([[0, 1]]))
    tokens = {"label": np.zeros((2, 1)), "confidence": np.ones((2, 1))}
    with pytest.raises(ValueError, match="predict must return 'nll', got"):
        run([{**good, "labels": np.zeros((2, 1), int)}], lambda p, b: tokens, "token")
    with pytest.raises(ValueError, match="model must be given"):
        evaluate.run(None, {}, [good], "classification")
    with pytest.raises(ValueError, match="kind must be one of"):
        evaluate.predictor(encoder(), "rank")
    with pytest.raises(ValueError, match="max_answer must be >= 1, got 0"):
        evaluate.predictor(encoder(), "span", max_answer=0)


def test_best_span_is_the_best_of_all_allowed():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 7, 2)).astype(np.float32)
    attention = np.arange(7) < np.array([7, 4, 1, 5, 6])[:, None]
    for longest in (1, 3, 30):
        out = jax.jit(best_span, static_argnums=2)(logits, {"attention_mask": attention}, longest)
        for row in range(5):
            n = attention[row].sum()
            scores = {
                (s, e): logits[row, s, 0] + logits[row, e, 1]
                for s in range(n)
                for e in range(s, min(n, s + longest))
            }
            assert tuple(out["span"][row].tolist()) == max(scores, key=scores.get)
            both = np.exp(logits[row, :n]) / np.exp(logits[row, :n]).sum(0)
            s, e = out["span"][row].tolist()
            np.testing.assert_allclose(out["confidence"][row], both[s, 0] * both[e, 1], rtol=1e-5)


def test_features_are_the_mean_over_visible_tokens(corpus):
    model = encoder()
    params = params_of(model)
    one = evaluate.features(model, params, batches_of(corpus, "classification", 4))
    two = evaluate.features(model, params, batches_of(corpus, "classification", 11, width=10))
    assert one.x.shape == (11, 16)
    np.testing.assert_allclose(one.x, two.x, atol=1e-5)
    assert one.labels.tolist() == [i % 2 for i in range(11)]
    hidden = jax.jit(model.apply)(params, {"input_ids": corpus[3][None]}).hidden
    np.testing.assert_allclose(one.x[3], hidden[0].mean(0), atol=1e-5)


def test_pool_takes_the_last_layer_and_skips_prompt_rows():
    hidden = np.arange(24.0).reshape(1, 2, 4, 3)  # [L + 1, B, T, D]... one layer, two rows
    mask = {"attention_mask": jnp.array([[1, 0, 1], [0, 0, 0]])}
    out = pool(jnp.asarray(hidden), mask)
    np.testing.assert_allclose(out[0], hidden[-1, 0, [1, 3]].mean(0))
    assert not out[1].any()
    np.testing.assert_allclose(pool(jnp.asarray(hidden), {}), hidden[0].mean(1))


@pytest.mark.parametrize("kind", ["token", "span"])
def test_predictions_without_any_labels(kind, corpus):
    model = encoder(kind, COUNT[kind])
    params = params_of(model)
    rows = [
        {name: v for name, v in batch.items() if not name.startswith("label")}
        for batch in batches_of(corpus, kind, 4)
    ]
    result = evaluate.run(model, params, rows, kind)
    assert result.metrics == {"examples": 0}
    assert len(result.predictions) == len(result.index) == 11
    assert not result.labelled.any()
    assert np.isnan(result.losses).all()
    if kind == "token":
        assert [len(p) for p in result.predictions] == [len(tokens) for tokens in corpus]
