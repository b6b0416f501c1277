"""Fisher merging and RegMean: golden numbers, invariants, and what they are estimated from."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import tree
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.train import merge

TINY = EncoderConfig(
    family="bert", vocab_size=30, width=8, layers=2, heads=2, ffn_width=12, positions=10, types=2,
    pooler=True, drop=0.0, attn_drop=0.0, head=HeadConfig("classification", 3, drop=0.0),
)  # fmt: skip


def test_fisher_golden():
    thetas = [{"w": np.float32([1, 2])}, {"w": np.float32([3, 0])}]
    fishers = [{"w": np.float32([1, 0])}, {"w": np.float32([3, 2])}]
    plain = merge.fisher_merge(thetas, fishers, normalize=False)["w"]
    np.testing.assert_allclose(plain, [2.4999998, 1.0e-6], rtol=2e-6)
    scaled = merge.fisher_merge(thetas, fishers)["w"]
    np.testing.assert_allclose(scaled, [1.9083270, 3.60554e-6], rtol=2e-6)


def test_equal_fishers_average_and_identical_models_stay():
    rng = np.random.default_rng(0)
    thetas = [{"w": rng.standard_normal(5).astype(np.float32)} for _ in range(3)]
    same = [{"w": np.float32([1, 2, 3, 4, 5])}] * 3
    np.testing.assert_allclose(
        merge.fisher_merge(thetas, same)["w"], merge.average(thetas)["w"], atol=1e-6
    )
    other = [{"w": rng.uniform(size=5).astype(np.float32)} for _ in range(3)]
    np.testing.assert_allclose(
        merge.fisher_merge([thetas[0]] * 3, other)["w"], thetas[0]["w"], atol=1e-6
    )


def softmax_model(params, batch):
    return batch["x"] @ params["w"] + params["b"]


def test_the_exact_fisher_against_the_formula_and_the_shortcut_against_its_own():
    rng = np.random.default_rng(1)
    params = {
        "w": rng.standard_normal((4, 3)).astype(np.float32),
        "b": np.zeros(3, np.float32),
        "n": np.arange(2),
    }
    x = rng.standard_normal((6, 4)).astype(np.float32)
    batches = [{"x": x[:4]}, {"x": x[4:]}]
    found = merge.diag_fisher(softmax_model, params, batches, chunk=3)
    assert set(found) == {"w", "b"}
    p = np.asarray(jax.nn.softmax(x @ params["w"] + params["b"]))
    wanted = np.zeros((4, 3))
    for i in range(6):
        for y in range(3):
            g = np.outer(x[i], np.eye(3)[y] - p[i])
            wanted += p[i, y] * g**2 / 6
    np.testing.assert_allclose(found["w"], wanted, atol=1e-6)

    short = merge.diag_fisher(softmax_model, params, batches, "shortcut")["w"]
    wanted = np.zeros((4, 3))
    for rows in (slice(0, 4), slice(4, 6)):
        g = np.zeros((4, 3))
        for xi, pi in zip(x[rows], p[rows], strict=True):
            for y in range(3):
                g += np.sqrt(pi[y]) * np.outer(xi, np.eye(3)[y] - pi)
        wanted += g**2 / 6
    np.testing.assert_allclose(short, wanted, atol=1e-6)
    assert np.abs(np.asarray(short) - found["w"]).max() > 0.01  # it is not the Fisher

    many = [{"x": np.tile(x, (200, 1))}]
    sampled = merge.diag_fisher(softmax_model, params, many, "sampled", chunk=400)["w"]
    np.testing.assert_allclose(sampled, found["w"], atol=0.06)


def test_positions_of_tokens_add_up_and_regressions_use_their_error():
    params = {"w": np.float32([[0.3, -0.2, 0.5], [0.1, 0.4, -0.6]])}
    x = np.random.default_rng(2).standard_normal((2, 3, 2)).astype(np.float32)
    mask = np.array([[1, 1, 0], [1, 0, 0]])

    def tokens(p, batch):
        return batch["x"] @ p["w"]

    found = merge.diag_fisher(tokens, params, [{"x": x, "attention_mask": mask}])["w"]
    single = merge.diag_fisher(tokens, params, [{"x": x[mask > 0]}])["w"]
    np.testing.assert_allclose(found, np.asarray(single) * 3 / 2, atol=1e-6)

    line = {"w": np.float32([1.0, 2.0])}
    batch = {"x": x[:, 0], "labels": np.float32([0.5, -1.0])}
    found = merge.diag_fisher(lambda p, b: b["x"] @ p["w"], line, [batch])["w"]
    error = x[:, 0] @ line["w"] - batch["labels"]
    np.testing.assert_allclose(found, ((2 * error[:, None] * x[:, 0]) ** 2).mean(0), rtol=1e-5)
    with pytest.raises(ValueError, match="needs the batch's labels"):
        merge.diag_fisher(lambda p, b: b["x"] @ p["w"], line, [{"x": x[:, 0]}])


def span_oracle(x, w, shown, mode):
    """The Fisher of a span model x @ w in float64: two softmaxes over the tokens shown."""
    found, whole = np.zeros_like(w), np.zeros_like(w)
    for rows, seen in zip(x, shown, strict=True):
        rows = rows[seen > 0]
        for end in range(2):
            p = np.exp(rows @ w[:, end])
            p /= p.sum()
            scores = rows - p @ rows  # [T, D], of the end's column
            found[:, end] += p @ scores**2
            whole[:, end] += np.sqrt(p) @ scores
    return found / len(x) if mode == "exact" else whole**2 / len(x)


def test_the_fisher_of_a_span_is_that_of_softmaxes_over_the_tokens_shown():
    rng = np.random.default_rng(4)
    params = {"w": rng.standard_normal((3, 2)).astype(np.float32)}
    x = rng.standard_normal((2, 5, 3)).astype(np.float32)
    shown = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    batch = {"x": x, "attention_mask": shown}

    def span(p, batch):
        return batch["x"] @ p["w"]

    w = params["w"].astype(np.float64)
    for mode in ("exact", "shortcut"):
        found = merge.diag_fisher(span, params, [batch], mode, kind="span")["w"]
        np.testing.assert_allclose(found, span_oracle(x, w, shown, mode), rtol=1e-5)
    other = merge.diag_fisher(span, params, [batch])["w"]  # of two classes a token
    assert np.abs(np.asarray(other) - span_oracle(x, w, shown, "exact")).max() > 0.05
    # What lies behind the mask is never drawn, and does not count.
    moved = {"x": np.where(shown[..., None] > 0, x, 9.0), "attention_mask": shown}
    many = {name: np.repeat(value, 500, axis=0) for name, value in moved.items()}
    found = merge.diag_fisher(span, params, [many], "sampled", chunk=1000, kind="span")["w"]
    np.testing.assert_allclose(found, span_oracle(x, w, shown, "exact"), atol=0.06)
    with pytest.raises(ValueError, match=r"needs logits \[B, T, 2\] .*, got \(1, 5, 3\)"):
        merge.diag_fisher(lambda p, b: b["x"] * p["w"][0, 0], params, [batch], kind="span")
    with pytest.raises(ValueError, match="kind must be one of classification"):
        merge.diag_fisher(span, params, [batch], kind="spans")


def test_the_encoders_mask_is_not_that_of_the_decoder():
    params = {"w": np.float32([[0.3, -0.2, 0.5], [0.1, 0.4, -0.6]])}
    x = np.random.default_rng(5).standard_normal((2, 3, 2)).astype(np.float32)
    source, target = np.array([[1, 0, 0], [1, 1, 1]]), np.array([[1, 1, 1], [1, 0, 0]])
    batch = {"x": x, "attention_mask": source}

    def words(p, batch):
        return batch["x"] @ p["w"]

    wanted = merge.diag_fisher(words, params, [{"x": x, "label_mask": target}])["w"]
    labels = np.where(target > 0, 2, -100)
    for more in ({"labels": labels}, {"decoder_attention_mask": target}, {"label_mask": target}):
        found = merge.diag_fisher(words, params, [{**batch, **more}], kind="seq2seq")["w"]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    short = merge.diag_fisher(words, params, [batch], "shortcut", kind="seq2seq")["w"]
    every = merge.diag_fisher(words, params, [{"x": x}], "shortcut")["w"]
    np.testing.assert_allclose(short, every, rtol=1e-6)  # nothing is known of the decoder


def test_weights_that_leave_no_mean_are_refused():
    from steppe.train.merge import fisher, methods

    thetas, fine = [{"w": np.ones(2, np.float32)}] * 2, {"w": np.ones(2, np.float32)}
    for coef in ([0, 0], [-1, 2], (1, -1), [float("nan"), 1]):
        with pytest.raises(ValueError, match="coef must be finite numbers >= 0 with a sum > 0"):
            merge.fisher_merge(thetas, [fine, fine], coef)
    with pytest.raises(ValueError, match="coef must be finite numbers >= 0 with a sum > 0, got"):
        methods.check(methods.Fisher(("a", "b"), (0.0, 0.0)), SimpleNamespace(models=thetas))
    np.testing.assert_allclose(merge.fisher_merge(thetas, [fine, fine], [0, 2])["w"], 1, atol=1e-6)
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="Fisher 1 at 'w' must be finite and >= 0"):
            merge.fisher_merge(thetas, [fine, {"w": np.float32([1, bad])}])
    # Under jit nothing is known of traced values, and known ones are read.
    known = {"w": jnp.ones(2)}
    traced = jax.jit(lambda f, c: merge.fisher_merge(thetas, [f, known], c))
    assert jnp.isfinite(traced(fine, jnp.ones(2))["w"]).all()
    assert fisher.check_coef(None) is None


X1 = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
X2 = np.array([[2, 0], [0, 1], [1, -1]], np.float32)
W1, W2 = np.eye(2, dtype=np.float32), np.array([[0, 1], [1, 2]], np.float32)
GOLDEN = {
    1.0: [[0.1428571, 0.5714286], [0.75, 1.25]],
    0.95: [[0.15, 0.5785714], [0.7375, 1.2625]],
    0.0: [[0.2857143, 0.7142857], [0.5, 1.5]],
}


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("a", GOLDEN)
def test_regmean_golden(a, precision):
    thetas, grams = [{"w": W1}, {"w": W2}], [{"w": X1.T @ X1 / 3}, {"w": X2.T @ X2 / 3}]
    found = merge.regmean(thetas, grams, a, precision=precision)["w"]
    np.testing.assert_allclose(found, GOLDEN[a], atol=1e-6)


def test_regmean_is_least_squares_layer_by_layer_and_averages_the_rest():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((3, 2, 9, 4)).astype(np.float32)  # task, layer, token, in
    w = rng.standard_normal((3, 2, 4, 2, 3)).astype(np.float32)  # two output axes
    thetas = [{"layers": {"k": w[i], "b": np.full((2, 3), i, np.float32)}} for i in range(3)]
    grams = [{"layers": {"k": np.einsum("lti,ltj->lij", x[i], x[i]) / 9}} for i in range(3)]
    found = merge.regmean(thetas, grams, 1.0)["layers"]
    for layer in range(2):
        left = np.concatenate(list(x[:, layer]))
        right = np.concatenate([x[i, layer] @ w[i, layer].reshape(4, 6) for i in range(3)])
        wanted = np.linalg.lstsq(left, right, rcond=None)[0].reshape(4, 2, 3)
        np.testing.assert_allclose(found["k"][layer], wanted, atol=1e-5)
    np.testing.assert_allclose(found["b"], np.ones((2, 3)), atol=1e-6)
    isotropic = [{"layers": {"k": np.tile(2 * np.eye(4, dtype=np.float32), (2, 1, 1))}}] * 3
    np.testing.assert_allclose(
        merge.regmean(thetas, isotropic)["layers"]["k"], w.mean(0), atol=1e-6
    )


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_singular_sum_draws_to_the_average(precision):
    gram = np.diag(np.float32([1, 0]))
    found = merge.regmean([{"w": W1}, {"w": W2}], [{"w": gram}] * 2, 1.0, precision=precision)["w"]
    np.testing.assert_allclose(found, (W1 + W2) / 2, atol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("large", [1.0, 1e2, 1e3])
def test_inputs_of_large_variance_and_dead_ones_leave_the_other_rows_alone(large, precision):
    rng = np.random.default_rng(0)
    width = 16
    scale = np.r_[large, large, np.ones(width - 3), 0.0]
    x = [rng.standard_normal((400, width)) * scale for _ in range(2)]
    x[1][:, :8] *= 5
    w = [rng.standard_normal((width, 3)) for _ in range(2)]
    grams = [rows.T @ rows / 400 for rows in x]
    shrunk = [0.9 * g + 0.1 * np.diag(np.diag(g)) for g in grams]
    wanted = np.linalg.lstsq(
        sum(s[:-1, :-1] for s in shrunk),
        sum(s[:-1, :-1] @ k[:-1] for s, k in zip(shrunk, w, strict=True)),
        rcond=None,
    )[0]
    found = merge.regmean(
        [{"w": np.float32(k)} for k in w], [{"w": np.float32(g)} for g in grams],
        precision=precision,
    )["w"]  # fmt: skip
    np.testing.assert_allclose(found[:-1], wanted, atol=2e-3)
    np.testing.assert_allclose(found[-1], (w[0] + w[1])[-1] / 2, atol=1e-6)


def test_bad_grams():
    two = [{"w": W1}, {"w": W2}]
    with pytest.raises(ValueError, match="one tree of Grams a model"):
        merge.regmean(two, [{"w": W1}])
    with pytest.raises(ValueError, match=r"must be \(2, 2\), got \(3, 3\)"):
        merge.regmean(two, [{"w": np.eye(3)}] * 2)
    with pytest.raises(ValueError, match="where the models have no kernel"):
        merge.regmean(two, [{"v": W1}] * 2)
    with pytest.raises(ValueError, match=r"a must be in \[0, 1\]"):
        merge.regmean(two, [{"w": W1}] * 2, 1.5)


def test_grams_are_those_of_what_goes_into_every_layer():
    model = TINY.build()
    params = jax.jit(model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    batches = [{"input_ids": rng.integers(1, 30, (2, 5)), "attention_mask": mask} for _ in range(2)]
    grams = tree.flatten(merge.collect_grams(model, params, batches))
    assert set(grams) == {
        f"layers/{n}/kernel" for n in ("attn/q", "attn/k", "attn/v", "attn/o", "ffn/in", "ffn/out")
    }
    np.testing.assert_allclose(grams["layers/attn/q/kernel"], grams["layers/attn/k/kernel"])

    # The first layer's queries read the embeddings.
    seen = []
    for batch in batches:
        embedded = model.parts.embed(params, batch)
        seen.append(np.asarray(embedded.hidden)[mask > 0])
    x = np.concatenate(seen)
    np.testing.assert_allclose(grams["layers/attn/q/kernel"][0], x.T @ x / 12, atol=1e-5)

    assert grams["layers/ffn/out/kernel"].shape == (2, 12, 12)
    assert np.linalg.eigvalsh(np.asarray(grams["layers/ffn/out/kernel"])).min() > -1e-5
    with pytest.raises(ValueError, match="no dense layer at site 'attn.x'"):
        merge.collect_grams(model, params, batches, sites=["attn.x"])


def test_regmean_of_a_model_with_itself_is_itself():
    model = TINY.build()
    params = jax.jit(model.init)(jax.random.key(0))
    batch = {"input_ids": np.random.default_rng(0).integers(1, 30, (4, 6))}
    grams = merge.collect_grams(model, params, [batch], sites=["attn.q", "ffn.in"])
    merged = merge.regmean([params, params], [grams, grams], 0.9)
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_allclose(tree.get(merged, path), leaf, atol=2e-5)
    assert jnp.isfinite(model.apply(merged, batch).logits).all()


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_fewer_tokens_than_inputs_draw_to_the_average(precision):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 12, 64)).astype(np.float32)
    w = rng.standard_normal((64, 3)).astype(np.float32)
    grams = [{"w": rows.T @ rows / 12} for rows in x]
    same = merge.regmean([{"w": w}] * 2, grams, 1.0, precision=precision)["w"]
    np.testing.assert_allclose(same, w, atol=1e-5)
    other = rng.standard_normal((64, 3)).astype(np.float32)
    found = merge.regmean([{"w": w}, {"w": other}], grams, 1.0, precision=precision)["w"]
    # Where no token points there is nothing to fit.
    hidden = np.linalg.svd(np.concatenate(list(x)))[2][24:]
    np.testing.assert_allclose(hidden @ found, hidden @ (w + other) / 2, atol=1e-2)
