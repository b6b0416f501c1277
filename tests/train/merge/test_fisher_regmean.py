"""Fisher merging and RegMean: golden numbers, invariants, and what they are estimated from."""

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
