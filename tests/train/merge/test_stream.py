"""Merging on disk equals merging in memory; broken inputs and broken runs leave nothing broken."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from steppe.models import pretrained
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.train import merge
from steppe.train.merge import heads, stream

METHODS = {
    "average": (stream.Average(), lambda b, t, taus: merge.average(t)),
    "weights": (stream.Average((1, 2, 5)), lambda b, t, taus: merge.average(t, [1, 2, 5])),
    "weighted": (stream.Weighted((0.2, 0, 1)), lambda b, t, taus: merge.weighted(t, [0.2, 0, 1])),
    "forget": (
        stream.TaskArithmetic(-0.4),
        lambda b, t, taus: merge.task_arithmetic(b, taus, -0.4),
    ),
    "own lam": (
        stream.TaskArithmetic((0.1, 0.2, 0.3)),
        lambda b, t, taus: merge.task_arithmetic(b, taus, [0.1, 0.2, 0.3]),
    ),
    "ties": (stream.Ties(), lambda b, t, taus: merge.ties(b, taus)),
    "ties mean": (
        stream.Ties(0.4, 1.0, "mean"),
        lambda b, t, taus: merge.ties(b, taus, 0.4, 1.0, "mean"),
    ),
}


def folder(path: Path, tensors, **config) -> Path:
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    if config:
        (path / "config.json").write_text(json.dumps(config))
    return path


def tensors(seed, base=None, scale=0.1):
    rng = np.random.default_rng(seed)

    def one(*shape):
        return np.asarray(rng.standard_normal(shape), np.float32)

    new = {
        "embed.weight": one(37, 16),
        "layer.0.weight": one(16, 16),
        "layer.1.weight": one(16, 16),
        "scalar": one(),
        "empty": np.zeros((0, 4), np.float32),
    }
    if base is not None:
        new = {name: np.asarray(base[name] + scale * x, np.float32) for name, x in new.items()}
    new["position_ids"] = np.arange(37)
    return new


@pytest.fixture
def four(tmp_path):
    base = tensors(0)
    trees = [tensors(i, base) for i in (1, 2, 3)]
    folders = [folder(tmp_path / f"m{i}", t) for i, t in enumerate(trees)]
    return folder(tmp_path / "base", base), folders, base, trees


def moving(tree):
    return {name: x for name, x in tree.items() if x.size and name != "position_ids"}


@pytest.mark.parametrize("name", METHODS)
def test_on_disk_as_in_memory(four, tmp_path, name, monkeypatch):
    at, folders, base, trees = four
    method, wanted = METHODS[name]
    seen = []
    result = stream.merge(
        method, folders, tmp_path / "out", base=at, progress=lambda *a: seen.append(a)
    )
    found = load_file(result.out / "model.safetensors")
    taus = merge.task_vectors(moving(base), [moving(t) for t in trees])
    for path, leaf in wanted(moving(base), [moving(t) for t in trees], taus).items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-6, err_msg=path)
    np.testing.assert_array_equal(found["position_ids"], base["position_ids"])
    assert found["empty"].shape == (0, 4)
    assert [s[:2] for s in seen] == [(i, 6) for i in range(1, 7)]
    assert result.tensors == 6
    assert result.resumed == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "m0", "m1", "m2", "out"]


def test_pieces_and_shards_do_not_show(four, tmp_path, monkeypatch):
    from steppe.train.merge import job

    at, folders, base, trees = four
    monkeypatch.setattr(job, "PIECE", 100)
    out = stream.merge(
        stream.Ties(), folders, tmp_path / "out", base=at, shard_bytes=1500
    ).out  # fmt: skip
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    found = {name: x for file in files for name, x in load_file(out / file).items()}
    taus = merge.task_vectors(moving(base), [moving(t) for t in trees])
    for path, leaf in merge.ties(moving(base), taus).items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-6)


def test_slerp_dare_and_fisher(four, tmp_path):
    at, folders, base, trees = four
    out = stream.merge(stream.Slerp(0.3), folders[:2], tmp_path / "slerp").out
    wanted = merge.slerp(moving(trees[0]), moving(trees[1]), 0.3)
    found = load_file(out / "model.safetensors")
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-6)

    rng = np.random.default_rng(9)
    fishers = [
        {n: rng.uniform(size=x.shape).astype(np.float32) for n, x in base.items()} for _ in range(3)
    ]
    at_fishers = tuple(str(folder(tmp_path / f"f{i}", f)) for i, f in enumerate(fishers))
    out = stream.merge(stream.Fisher(at_fishers), folders, tmp_path / "fisher").out
    wanted = merge.fisher_merge([moving(t) for t in trees], [moving(f) for f in fishers])
    found = load_file(out / "model.safetensors")
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-5)

    dropped = {}
    for then in (stream.TaskArithmetic(1.0), stream.Ties(0.2, 1.0)):
        method = stream.Dare(0.5, then, seed=3)
        name = type(then).__name__
        out = stream.merge(method, folders[:1], tmp_path / f"dare {name}", base=at).out
        dropped[name] = load_file(out / "model.safetensors")["embed.weight"] - base["embed.weight"]
    tau = trees[0]["embed.weight"] - base["embed.weight"]
    kept = np.abs(dropped["TaskArithmetic"]) > 1e-6
    assert 0.4 < kept.mean() < 0.6
    np.testing.assert_allclose(dropped["TaskArithmetic"][kept], 2 * tau[kept], atol=1e-5)
    # TIES trims what DARE left: a subset of it, the largest.
    also = np.abs(dropped["Ties"]) > 1e-6
    assert also.sum() < kept.sum()
    assert not (also & ~kept).any()


def test_one_model_is_returned_and_its_dtype_kept(tmp_path):
    import ml_dtypes

    base = {n: np.asarray(x, ml_dtypes.bfloat16) if x.dtype == np.float32 else x
            for n, x in tensors(0).items()}  # fmt: skip
    model = {n: np.asarray(x, base[n].dtype) for n, x in tensors(5).items()}
    at, tuned = folder(tmp_path / "b", base), folder(tmp_path / "m", model)
    for number, method in enumerate((stream.TaskArithmetic(1.0), stream.Ties(1.0, 1.0))):
        out = stream.merge(method, [tuned], tmp_path / f"o{number}", base=at).out
        found = load_file(out / "model.safetensors")
        for name, leaf in model.items():
            assert found[name].dtype == leaf.dtype
            np.testing.assert_array_equal(found[name], leaf)


def test_an_interrupted_merge_goes_on_with_the_next_tensor(four, tmp_path):
    at, folders, _, _ = four
    whole = stream.merge(stream.Ties(), folders, tmp_path / "whole", base=at).out

    def stop(done, total, name):
        if done == 3:
            raise KeyboardInterrupt

    arguments = (stream.Ties(), folders, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        stream.merge(*arguments, base=at, progress=stop)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "journal.jsonl").is_file()
    with pytest.raises(ValueError, match="start of another merge"):
        stream.merge(stream.Ties(0.3), folders, tmp_path / "out", base=at)
    with pytest.raises(ValueError, match="start of another merge"):
        stream.merge(stream.Ties(), folders[::-1], tmp_path / "out", base=at)
    result = stream.merge(*arguments, base=at)
    assert result.resumed == 3
    assert (result.out / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()
    with pytest.raises(FileExistsError, match="choose a new folder"):
        stream.merge(*arguments, base=at)


def test_what_does_not_fit_is_shown_in_a_table(four, tmp_path):
    at, folders, _, trees = four
    other = dict(trees[0])
    other["embed.weight"] = np.zeros((40, 16), np.float32)
    del other["layer.1.weight"]
    bad = folder(tmp_path / "bad", other, model_type="bert", vocab_size=40)
    (at / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 37}))
    report = stream.inspect(at, [folders[0], bad])
    assert not report.ok
    lines = report.table().splitlines()
    assert lines[0].split() == ["the", "base", "m0", "bad"]
    assert lines[1].split() == ["config.json:", "vocab_size", "37", "-", "40"]
    assert "embed.weight" in lines[2]
    assert "[40, 16] float32" in lines[2]
    assert lines[3].split()[0] == "layer.1.weight"
    assert lines[3].rstrip().endswith("-")
    with pytest.raises(ValueError, match=r"architecture or vocabulary\n(.|\n)*embed.weight"):
        stream.merge(stream.Average(), [folders[0], bad], tmp_path / "out", base=at)
    assert not (tmp_path / "out").exists()
    (folders[0] / "vocab.txt").write_text("a\nb\nc\n")
    (folders[1] / "vocab.txt").write_text("a\nc\nb\n")
    assert "vocabulary" in stream.inspect(None, folders).table()


def test_nan_names_file_and_tensor(four, tmp_path):
    at, folders, _, trees = four
    broken = dict(trees[1])
    broken["layer.1.weight"] = broken["layer.1.weight"].copy()
    broken["layer.1.weight"][3, 3] = np.nan
    shutil.rmtree(folders[1])
    folder(folders[1], broken)
    for method in (stream.Average(), stream.Ties()):
        with pytest.raises(ValueError, match=r"m1.model\.safetensors: tensor 'layer\.1\.weight'"):
            stream.merge(method, folders, tmp_path / "out", base=at)
    assert not list(tmp_path.glob("*out*"))


def test_no_space_and_settings_out_of_range(four, tmp_path, monkeypatch):
    at, folders, *_ = four
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="needs 0.02 GB in"):
        stream.merge(stream.Average(), folders, tmp_path / "out")
    monkeypatch.undo()
    for method, words in (
        (stream.Ties(k=20), "fraction"),
        (stream.Ties(merge="total"), "merge must be one of"),
        (stream.Slerp(), "between two models, got 3"),
        (stream.Weighted((1.0,)), "weights must be 3"),
        (stream.Dare(p=1.0), r"p must be in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=words):
            stream.merge(method, folders, tmp_path / "out", base=at)
    with pytest.raises(ValueError, match="give base="):
        stream.merge(stream.Ties(), folders, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        stream.merge(stream.Average(), [tmp_path / "none"], tmp_path / "out")
    with pytest.raises(ValueError, match="matches no tensor"):
        stream.inspect(at, folders, ["x.*"])
    assert not list(tmp_path.glob("*out*"))


TINY = EncoderConfig(
    family="bert", vocab_size=30, width=8, layers=2, heads=2, ffn_width=12, positions=10, types=2,
    pooler=True, head=HeadConfig("classification", 3),
)  # fmt: skip


def random(config, seed):
    rng = np.random.default_rng(seed)
    shapes = config.build().abstract()
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)


def test_real_folders_keep_their_heads_and_open_as_one(tmp_path):
    base = dataclasses.replace(TINY, head=None)
    start = random(base, 0)
    at = pretrained.save(tmp_path / "base", base.build(), start)
    folders, trees = [], []
    for number, kind in enumerate((HeadConfig("classification", 3), HeadConfig("regression", 1))):
        config = dataclasses.replace(TINY, head=kind)
        trees.append(random(config, number + 1))
        folders.append(pretrained.save(tmp_path / f"task{number}", config.build(), trees[-1]))
    out = stream.merge(stream.TaskArithmetic(0.3), folders, tmp_path / "out", base=at).out
    merged = heads.load(out)
    trunks = [heads.split(t)[0] for t in trees]
    wanted = merge.task_arithmetic(start, merge.task_vectors(start, trunks), 0.3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged.trunk, wanted)
    for number, own in enumerate(trees):
        head = merged.heads[f"task{number}"].params
        jax.tree.map(np.testing.assert_array_equal, head, own["head"])
        merged.model(f"task{number}")
    assert merged.heads["task1"].config.kind == "regression"


PROGRAM = """
import resource, sys
import jax
from steppe.train.merge import stream
jax.numpy.zeros(3).block_until_ready()
base, models, out = sys.argv[1], sys.argv[2:-1], sys.argv[-1]
small = models[-1]
# Compiled first: the compiler's memory is not what is measured.
stream.merge(stream.Ties(), [small, small + "2"], out + " warm", base=small)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * 4096 + 160_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
stream.merge(stream.Ties(), models[:-1], out, base=base)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc")
def test_inputs_larger_than_memory(tmp_path):
    """Three inputs of 96 MB each under a limit of 160 MB more than the process had before."""
    rng = np.random.default_rng(0)
    base = {f"t{i}": rng.standard_normal((1 << 20,), np.float32) for i in range(24)}
    at = folder(tmp_path / "base", base)
    names = []
    for number in range(2):
        tuned = {n: x + rng.standard_normal(x.shape, np.float32) for n, x in base.items()}
        names.append(str(folder(tmp_path / f"m{number}", tuned)))
        del tuned
    tiny = {"t": rng.standard_normal((1 << 20) + 300).astype(np.float32)}
    small = folder(tmp_path / "small", tiny)
    folder(tmp_path / "small2", {"t": tiny["t"] * 1.5})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(at), *names, str(small),
         str(tmp_path / "out")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "out" / "model.safetensors")
    moved = [np.abs(found[f"t{i}"] - base[f"t{i}"]) > 0 for i in range(24)]
    assert 0.3 < np.mean(moved) < 0.45  # 1 - 0.8^2


def test_named_heads_stay_and_what_the_base_lacks_is_averaged(four, tmp_path):
    _, folders, base, trees = four
    less = {n: x for n, x in base.items() if n != "scalar"}
    at = folder(tmp_path / "less", less)
    report = stream.inspect(at, folders, ["embed.*"], names=["a", "b", "c"])
    assert report.unbased == {"scalar"}
    assert report.apart["b"] == ("embed.weight",)
    out = stream.merge(
        stream.TaskArithmetic(0.5), folders, tmp_path / "out", base=at, heads=["embed.*"],
        names=["a", "b", "c"],
    ).out  # fmt: skip
    found = load_file(out / "model.safetensors")
    assert "embed.weight" not in found
    np.testing.assert_allclose(found["scalar"], np.mean([t["scalar"] for t in trees]), atol=1e-6)
    kept = load_file(out / "heads" / "b.safetensors")
    np.testing.assert_array_equal(kept["embed.weight"], trees[1]["embed.weight"])
    assert set(json.loads((out / "heads.json").read_text())) == {"a", "b", "c"}


def test_float64_is_written_whole(tmp_path):
    base = {"w": np.arange(12.0).reshape(3, 4)}
    folders = [folder(tmp_path / f"m{i}", {"w": base["w"] + i}) for i in (1, 2)]
    out = stream.merge(stream.Average(), folders, tmp_path / "out").out
    found = load_file(out / "model.safetensors")["w"]
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, base["w"] + 1.5)


def test_what_was_not_written_is_not_taken_for_written(tmp_path, monkeypatch):
    from steppe.train.merge.output import Output

    output = Output(tmp_path / "out", {"w": ((4,), np.float64)}, {})
    output.write("w", 0, np.zeros(4, np.float32))
    with pytest.raises(RuntimeError, match="must take 32 bytes, got 16"):
        output.finish("w")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OSError, match=r"model\.safetensors cannot be written .* same call goes on"):
        output.write("w", 0, np.zeros(4))
    output.discard()


def test_what_was_begun_otherwise_is_not_gone_on_with(four, tmp_path):
    at, folders, _, _ = four

    def stop(done, total, name):
        raise KeyboardInterrupt

    def go(models=folders, progress=None, **options):
        method = stream.TaskArithmetic(0.5)
        names = options.pop("names", ["a", "b", "c"])
        return stream.merge(
            method, models, tmp_path / "out", base=at, names=names, progress=progress, **options
        )

    with pytest.raises(KeyboardInterrupt):
        go(progress=stop)
    # Copies with the same times: only their places tell them apart.
    copies = [Path(shutil.copytree(f, tmp_path / f"copy{i}")) for i, f in enumerate(folders)]
    for options in (
        {"heads": ["scalar"]},
        {"names": ["a", "b", "d"]},
        {"shard_bytes": 1500},
        {"models": copies},
    ):
        with pytest.raises(ValueError, match="start of another merge.*--anew"):
            go(**options)
    # The line that was being written when the power failed gives way to the next one.
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    with journal.open("a") as file:
        file.write('{"tensor": "sca')
    with pytest.raises(KeyboardInterrupt):
        go(progress=lambda done, total, name: stop(0, 0, "") if done == 3 else None)
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    assert go().resumed == 3


def test_numbers_that_are_not_finite_are_refused(four, tmp_path):
    at, folders, _, trees = four
    nan, inf = float("nan"), float("inf")
    for method in (
        stream.Average((nan, 1, 1)),
        stream.Weighted((inf, 1, 1)),
        stream.TaskArithmetic(nan),
        stream.Ties(lam=inf),
    ):
        with pytest.raises(ValueError, match="must be finite"):
            stream.merge(method, folders, tmp_path / "out", base=at)
    for merged in (merge.average, merge.weighted):
        with pytest.raises(ValueError, match="weights must be finite"):
            merged(trees, [nan, 1, 1])
    # A head too, though it is only copied.
    trees[1]["scalar"] = np.float32(nan)
    broken = folder(tmp_path / "broken", {n: np.asarray(x) for n, x in trees[1].items()})
    with pytest.raises(ValueError, match=r"broken.model\.safetensors: tensor 'scalar' holds NaN"):
        stream.merge(
            stream.Average(), [folders[0], broken], tmp_path / "out", heads=["scalar"]
        )  # fmt: skip
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"n_head": 2}, {"n_head": 4}),
        ({"n_heads": 2}, {"n_heads": 4}),
        ({"num_heads": 2}, {"num_heads": 4}),
        ({"hidden_act": "gelu"}, {"hidden_act": "relu"}),
        ({"layer_norm_eps": 1e-12}, {"layer_norm_eps": 1e-5}),
        ({"rope_theta": 10000.0}, {"rope_parameters": {"rope_theta": 500000.0}}),
    ],
)
def test_equal_shapes_of_another_architecture_are_told_apart(tmp_path, one, other):
    held = {"w": np.zeros((2, 2), np.float32)}
    folders = [folder(tmp_path / str(i), held, model_type="x", **c) for i, c in
               enumerate((one, other))]  # fmt: skip
    (row,) = stream.inspect(None, folders).differences
    assert row.what == f"config.json: {next(iter(one))}"
    # A key that a file leaves out says nothing, nor does another way to write a number.
    plain = folder(tmp_path / "plain", held, model_type="x")
    assert stream.inspect(plain, folders[:1]).ok
    int_ = folder(tmp_path / "int", held, model_type="x", rope_theta=10000)
    float_ = folder(tmp_path / "float", held, model_type="x", rope_theta=10000.0)
    assert stream.inspect(int_, [float_]).ok
