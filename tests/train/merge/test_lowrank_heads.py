"""Adapters are merged by their products; heads stay with their tasks."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import pretrained, tree
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.models.overlays import lora
from steppe.train import merge
from steppe.train.merge import heads, lowrank

TINY = EncoderConfig(
    family="bert", vocab_size=30, width=8, layers=2, heads=2, ffn_width=12, positions=10, types=2,
    pooler=True, head=HeadConfig("classification", 3),
)  # fmt: skip


def random(config, seed):
    rng = np.random.default_rng(seed)
    shapes = config.build().abstract()
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), shapes)


@pytest.fixture(scope="module")
def params():
    return random(TINY, 0)


def adapters(params):
    """Two adapters of different rank, scale and sites, away from zero."""
    out = []
    for number, (rank, sites) in enumerate(((2, ("attn.q", "attn.v")), (3, ("attn.q", "ffn.in")))):
        overlay = lora.overlay(rank=rank, alpha=4.0, sites=sites)
        delta = overlay.init(jax.random.key(number), params)
        rng = np.random.default_rng(number)
        shapes = jax.tree.leaves(delta)
        values = [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in shapes]
        delta = jax.tree.unflatten(jax.tree.structure(delta), values)
        out.append((overlay, delta, lowrank.scale(rank, 4.0)))
    return [list(column) for column in zip(*out, strict=True)]


def close(a, b, atol=1e-5):
    flat = tree.flatten(b)
    for path, leaf in tree.flatten(a).items():
        np.testing.assert_allclose(leaf, flat[path], atol=atol, err_msg=path)


@pytest.mark.parametrize("c", [None, [0.3, 0.3], [1.0, -0.5]])
def test_concatenated_factors_are_the_merge_of_the_folded_models(params, c):
    overlays, deltas, scales = adapters(params)
    overlay, delta = lowrank.concatenated(deltas, scales, c)
    folded = list(lowrank.folded(params, overlays, deltas))
    taus = merge.task_vectors(params, folded)
    wanted = merge.task_arithmetic(params, taus, [0.5, 0.5] if c is None else c)
    close(overlay.merge(params, delta), wanted)
    assert delta["layers"]["attn.q"]["a"].shape == (2, 8, 5)
    # The factors alone are not the products: averaging them is another model.
    only = merge.task_vectors(params, folded)["layers"]["attn"]["q"]["kernel"]
    products = lowrank.products(params, deltas, scales)
    np.testing.assert_allclose(products["layers"]["attn"]["q"]["kernel"], only, atol=1e-5)
    close(merge.task_arithmetic(params, products, 0.3), merge.task_arithmetic(params, taus, 0.3))


def test_compressed_keeps_the_largest_singular_values(params):
    _, deltas, scales = adapters(params)
    overlay, delta = lowrank.concatenated(deltas, scales)
    full = lowrank.compressed(delta, 5)
    close(overlay.merge(params, full), overlay.merge(params, delta), 1e-4)
    small = lowrank.compressed(delta, 2)["layers"]["attn.q"]
    product = np.asarray(delta["layers"]["attn.q"]["a"][1] @ delta["layers"]["attn.q"]["b"][1])
    u, s, v = np.linalg.svd(product)
    best = (u[:, :2] * s[:2]) @ v[:2]
    np.testing.assert_allclose(small["a"][1] @ small["b"][1], best, atol=1e-4)


def test_bad_adapters(params):
    _, deltas, scales = adapters(params)
    with pytest.raises(ValueError, match="at least one adapter"):
        lowrank.concatenated([], [])
    with pytest.raises(ValueError, match="one scale and one coefficient"):
        lowrank.concatenated(deltas, scales[:1])
    other = {"layers": {"attn.q": {"a": jnp.zeros((3, 8, 2)), "b": jnp.zeros((3, 2, 8))}}}
    with pytest.raises(ValueError, match=r"at 'attn.q' are of different models"):
        lowrank.concatenated([deltas[0], other], scales)


def test_adapters_without_factors_and_numbers_that_are_not_finite_are_refused(params):
    _, deltas, scales = adapters(params)
    with pytest.raises(ValueError, match="adapter 0 must hold LoRA factors .* 'layers' without a"):
        lowrank.concatenated([{"layers": {}}], [1.0])
    with pytest.raises(ValueError, match="adapter 1 must hold LoRA factors .* got nothing"):
        lowrank.concatenated([deltas[0], {}], [1.0, 1.0])
    with pytest.raises(ValueError, match="adapter 0 must hold LoRA factors under 'layers', got 'x"):
        lowrank.products(params, [{"x": {}}], [1.0])
    with pytest.raises(ValueError, match=r"coefficients must be finite, got \[nan, 1.0\]"):
        lowrank.concatenated(deltas, scales, [float("nan"), 1.0])
    with pytest.raises(ValueError, match="scales must be finite"):
        lowrank.products(params, deltas, [float("inf"), 1.0])


def test_products_are_not_rounded_to_the_dtype_of_the_base(params):
    _, deltas, scales = adapters(params)
    low = lowrank.products(tree.cast(params, jnp.bfloat16), deltas, scales)
    full = lowrank.products(params, deltas, scales)
    assert {x.dtype for x in jax.tree.leaves(low)} == {jnp.dtype(jnp.float32)}
    close(low, full, 0)


def multihead(params):
    models = {}
    for number, kind in enumerate((HeadConfig("classification", 3), HeadConfig("token", 4))):
        config = dataclasses.replace(TINY, head=kind)
        models[f"task{number}"] = (config, random(config, number))
    trunk = merge.average([heads.split(p)[0] for _, p in models.values()])
    return models, heads.gather(TINY, trunk, models, {"task0": ("a", "b", "c")})


def test_a_trunk_with_two_heads_saves_loads_and_evaluates_as_one(params, tmp_path):
    models, merged = multihead(params)
    folder = heads.save(tmp_path / "merged", merged)
    assert pretrained.load(folder, head=None).fresh == ()  # an ordinary model without a head
    loaded = heads.load(folder)
    assert list(loaded.heads) == ["task0", "task1"]
    assert loaded.heads["task0"].labels == ("a", "b", "c")
    for task, (_, own) in models.items():
        _, together = loaded.model(task)
        _, wanted = merged.model(task)
        close(together, wanted, 0)
        close(together["head"], own["head"], 0)
    heads.save(folder, loaded)  # an earlier export may be replaced
    with pytest.raises(ValueError, match="no head for 'x'; there are task0, task1"):
        loaded.model("x")


def test_evaluate_runs_every_task_with_its_head(params):
    _, merged = multihead(params)
    one = heads.MultiHead(merged.config, merged.trunk, {"task0": merged.heads["task0"]})

    class Task:
        kind = "classification"
        labels = ("a", "b", "c")
        num_labels = 3

    batch = {
        "input_ids": np.ones((4, 5), np.int32),
        "attention_mask": np.ones((4, 5), np.int32),
        "labels": np.array([0, 1, 2, 0]),
        "index": np.arange(4),
    }
    results = heads.evaluate(one, {"task0": [batch]}, {"task0": Task()})
    assert set(results) == {"task0"}
    assert 0 <= results["task0"].metrics["accuracy"] <= 1
    with pytest.raises(ValueError, match="no description of the task"):
        heads.evaluate(one, {"task0": [batch]}, {})


def test_a_missing_head_says_so(params, tmp_path):
    _, merged = multihead(params)
    folder = heads.save(tmp_path / "merged", merged)
    (folder / "heads" / "task1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"task1\.safetensors does not exist"):
        heads.load(folder)
    entries = json.loads((folder / "heads.json").read_text())
    entries["task1"]["num_labels"] = 9
    heads.save(tmp_path / "again", merged)
    (tmp_path / "again" / "heads.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"'classifier\.weight' must have shape \(9, 8\)"):
        heads.load(tmp_path / "again")
    (folder / "heads.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no heads\.json"):
        heads.load(folder)
    headless = dataclasses.replace(TINY, head=None)
    with pytest.raises(ValueError, match="'x' has no head to keep"):
        heads.gather(TINY, merged.trunk, {"x": (headless, merged.trunk)})
    with pytest.raises(ValueError, match="must be able to name a file"):
        heads.check_name("../x")
