"""Merges against the published libraries on the same tensors: fusion_bench and mergekit where
they are installed, else the same equations in torch.

Both libraries depend on much that a merge does not need, so their functions are loaded from
the files that hold them. Without them the equations are computed by torch.
"""

import importlib.util
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from steppe.train import merge
from steppe.train.merge.dare import draws

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

SHAPES = {"a/kernel": (40, 30), "a/bias": (30,), "b": (7, 5, 3)}


def models(count=5, seed=0):
    rng = np.random.default_rng(seed)
    base = {n: rng.standard_normal(s).astype(np.float32) for n, s in SHAPES.items()}
    tuned = [
        {n: (x + 0.1 * rng.standard_normal(x.shape)).astype(np.float32) for n, x in base.items()}
        for _ in range(count)
    ]
    return base, tuned


def tree(flat):
    return {"a": {"kernel": flat["a/kernel"], "bias": flat["a/bias"]}, "b": flat["b"]}


def flat(t):
    return {"a/kernel": t["a"]["kernel"], "a/bias": t["a"]["bias"], "b": t["b"]}


BASE, TUNED = models()
TAUS = merge.task_vectors(tree(BASE), [tree(t) for t in TUNED])


def vector(state):
    return torch.cat([torch.as_tensor(np.array(state[n])).reshape(-1) for n in sorted(state)])


def same(ours, vec, atol=1e-6):
    np.testing.assert_allclose(vector(flat(ours)).numpy(), vec.numpy(), atol=atol)


@pytest.fixture
def stand_ins(monkeypatch):
    """What the files of fusion_bench import and these functions never use."""
    wanted = {
        "fusion_bench": ("BaseAlgorithm", "BaseModelPool"),
        "fusion_bench.utils": (),
        "fusion_bench.utils.type": ("StateDictType",),
        "fusion_bench.method": ("BaseAlgorithm",),
        "fusion_bench.mixins": ("SimpleProfilerMixin", "auto_register_config"),
        "fusion_bench.modelpool": ("BaseModelPool",),
    }

    def install():
        for name, attributes in wanted.items():
            module = types.ModuleType(name)
            module.__path__ = []
            for attribute in attributes:
                plain = attribute == "auto_register_config"
                setattr(module, attribute, (lambda x: x) if plain else type(attribute, (), {}))
            monkeypatch.setitem(sys.modules, name, module)

    return install


def from_fusion_bench(stand_ins, file):
    try:
        spec = importlib.util.find_spec("fusion_bench")
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("fusion_bench is not installed")
    stand_ins()
    path = Path(spec.submodule_search_locations[0]) / file
    source = path.read_text("utf-8").replace("from .utils import", "from _unused import")
    unused = types.ModuleType("_unused")
    unused.get_modules_to_merge = unused.get_param_names_to_merge = None
    sys.modules["_unused"] = unused
    module = types.ModuleType(path.stem)
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


# --- the equations in torch ---


def torch_ties(rows, k, merge_):
    d = rows.shape[1]
    kept = []
    for row in rows:
        limit = row.abs().kthvalue(d - int(d * k)).values
        kept.append(torch.where(row.abs() >= limit, row, torch.zeros_like(row)))
    kept = torch.stack(kept)
    sign = torch.sign(kept.sum(0))
    sign[sign == 0] = torch.sign(sign.sum())
    live = torch.where(sign > 0, kept > 0, kept < 0)
    chosen = kept * live
    if merge_ == "sum":
        return chosen.sum(0)
    if merge_ == "mean":
        return chosen.sum(0) / (chosen != 0).sum(0).clamp(min=1)
    return chosen.abs().max(0).values * sign


def stacked():
    names = sorted(SHAPES)
    return torch.stack(
        [
            torch.cat([torch.as_tensor(np.array(flat(TAUS)[n][i])).reshape(-1) for n in names])
            for i in range(len(TUNED))
        ]
    )


@pytest.mark.parametrize("how", ["sum", "mean", "max"])
@pytest.mark.parametrize("k", [0.05, 0.2, 0.7])
def test_ties_in_torch(k, how):
    wanted = vector(BASE) + 0.3 * torch_ties(stacked(), k, how)
    same(merge.ties(tree(BASE), TAUS, k, 0.3, how), wanted)


@pytest.mark.parametrize("how", ["sum", "mean", "max"])
def test_ties_of_fusion_bench(stand_ins, how, capsys):
    peer = from_fusion_bench(stand_ins, "method/ties_merging/ties_merging_utils.py")
    wanted = peer.ties_merging(stacked(), reset_thresh=20, merge_func=how)
    same(merge.ties(tree(BASE), TAUS, 0.2, 0.3, how), vector(BASE) + 0.3 * wanted)
    if how == "sum":
        parts, _ = peer.ties_merging_split(stacked(), reset_thresh=20, merge_func=how)
        ours = merge.ties_components(TAUS, 0.2)
        for i in range(len(TUNED)):
            same(jax.tree.map(lambda x, i=i: x[i], ours), parts[i])


def test_task_arithmetic_and_averages():
    rows = torch.stack([vector(t) for t in TUNED])
    base = vector(BASE)
    same(merge.average([tree(t) for t in TUNED]), rows.mean(0))
    same(merge.task_arithmetic(tree(BASE), TAUS, 0.3), base + 0.3 * (rows - base).sum(0))
    same(merge.task_arithmetic(tree(BASE), TAUS, -0.3), base - 0.3 * (rows - base).sum(0))


@pytest.mark.parametrize("rescale", [True, False])
def test_dare_with_the_same_mask(rescale):
    key, p = jax.random.key(3), 0.5
    dropped = merge.dare(key, TAUS, p, rescale)
    for name, x in flat(TAUS).items():
        kept = np.stack([np.array(m) for m in draws(key, name, x.shape, 1 << 15)])
        wanted = torch.as_tensor(np.array(x)) * torch.as_tensor(kept)
        wanted = wanted / (1 - p) if rescale else wanted
        np.testing.assert_allclose(flat(dropped)[name], wanted.numpy(), atol=1e-6)
        assert 0.3 < kept.mean() < 0.7


def fishers():
    rng = np.random.default_rng(8)
    return [{n: rng.uniform(size=s).astype(np.float32) for n, s in SHAPES.items()} for _ in TUNED]


@pytest.mark.parametrize("normalize", [True, False])
def test_fisher_in_torch_and_of_fusion_bench(stand_ins, normalize):
    found = fishers()
    ours = merge.fisher_merge(
        [tree(t) for t in TUNED], [tree(f) for f in found], normalize=normalize
    )
    theta = torch.stack([vector(t) for t in TUNED])
    f = torch.stack([vector(x) for x in found])
    c = torch.full((len(TUNED),), 1 / len(TUNED))
    if normalize:
        inverse = 1 / (f.norm(dim=1) + 1e-6)
        c = c * inverse / inverse.sum()
    w = c[:, None] * (f + 1e-6)
    same(ours, (w * theta).sum(0) / w.sum(0))
    peer = from_fusion_bench(stand_ins, "method/fisher_merging/fisher_merging.py")
    wanted = peer.merging_with_fisher_weights(
        {n: [torch.as_tensor(t[n]) for t in TUNED] for n in SHAPES},
        [{n: torch.as_tensor(x[n]) for n in SHAPES} for x in found],
        torch.full((len(TUNED),), 1 / len(TUNED)),
        normalize_fisher_weight=normalize,
    )
    same(ours, vector(wanted))


def test_regmean_in_torch_and_of_fusion_bench(stand_ins):
    rng = np.random.default_rng(4)
    x = [rng.standard_normal((90, 40)).astype(np.float32) for _ in TUNED]
    grams = [torch.as_tensor(v.T @ v / 90) for v in x]
    ours = merge.regmean(
        [tree(t) for t in TUNED], [{"a": {"kernel": g.numpy()}} for g in grams], 0.9
    )
    shrunk = [g * (0.9 + 0.1 * torch.eye(40)) for g in grams]
    right = sum(g @ torch.as_tensor(t["a/kernel"]) for g, t in zip(shrunk, TUNED, strict=True))
    wanted = torch.linalg.solve(sum(shrunk).double(), right.double()).numpy()
    np.testing.assert_allclose(ours["a"]["kernel"], wanted, atol=2e-6)
    peer = from_fusion_bench(stand_ins, "method/regmean/regmean.py")
    wanted = peer.merging_with_regmean_weights(
        {"a.weight": [torch.as_tensor(t["a/kernel"].T.copy()) for t in TUNED],
         "b": [torch.as_tensor(t["b"]) for t in TUNED]},
        [{"a": g} for g in grams],
        reduce_non_diagonal_ratio=0.9,
    )  # fmt: skip
    np.testing.assert_allclose(ours["a"]["kernel"], wanted["a.weight"].numpy().T, atol=2e-6)
    np.testing.assert_allclose(ours["b"], wanted["b"].numpy(), atol=1e-6)


def test_slerp_of_fusion_bench(stand_ins):
    peer = from_fusion_bench(stand_ins, "method/slerp/slerp_utils.py")
    ours = flat(merge.slerp(tree(TUNED[0]), tree(TUNED[1]), 0.3))
    other = flat(merge.slerp(tree(BASE), tree(models(1, seed=9)[0]), 0.3))  # far from parallel
    far = models(1, seed=9)[0]
    for name in SHAPES:
        a, b = torch.as_tensor(TUNED[0][name]), torch.as_tensor(TUNED[1][name])
        np.testing.assert_allclose(ours[name], peer.slerp(0.3, a, b).numpy(), atol=1e-6)
        a, b = torch.as_tensor(BASE[name]), torch.as_tensor(far[name])
        np.testing.assert_allclose(other[name], peer.slerp(0.3, a, b).numpy(), atol=1e-6)


def test_the_trim_of_mergekit():
    """mergekit trims tensor by tensor: on one tensor its TIES is ours with exact_k."""
    pytest.importorskip("mergekit")
    sparsify = pytest.importorskip("mergekit.sparsify", exc_type=ImportError)
    rows = torch.as_tensor(np.array(TAUS["a"]["kernel"]))
    trimmed = torch.stack([sparsify.magnitude(r, density=0.2) for r in rows])
    kept = merge.ties_components({"w": TAUS["a"]["kernel"][:1]}, 0.2, exact_k=True)["w"][0]
    # One task alone: every sign is elected, only the trim is left.
    np.testing.assert_allclose(kept, trimmed[0].numpy(), atol=1e-6)
