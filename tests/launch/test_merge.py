"""``steppe merge`` as a user meets it: tiny runs of one base, merged, scored and reported."""

import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.launch import cli, config, outputs
from steppe.launch.merge import geometry, methods
from steppe.launch.report import merging
from steppe.models import pretrained, tree, weights
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.train.merge import heads, stream

pytestmark = pytest.mark.slow

WORDS = ["good", "fine", "bad", "poor", "film", "plot", "was"]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
QUICK = ["--eval-limit=8", "--examples=8", "--batch-size=4", "--steps=3", "--tta-steps=2"]


def network(head=None, width=8, words=VOCAB):
    return EncoderConfig(
        "bert", len(words), width, 2, 2, 8, 12, types=2, pooler=True, remat="none", head=head
    )


def export(folder, model, params, labels=None, words=VOCAB):
    pretrained.save(folder, model, params, labels=labels)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    return folder


def make_run(folder, data, trunk, *, seed, kind="classification", labels=("neg", "pos"), **options):
    """A run folder whose trunk is a little off the base's, as a short fine-tuning leaves it."""
    model = network(HeadConfig(kind, len(labels) or 1)).build()
    own = jax.jit(model.init)(jax.random.key(seed))
    noise = np.random.default_rng(seed)
    moved = tree.map_with_path(
        lambda _, x: np.asarray(x + 0.2 * noise.normal(size=x.shape), np.float32), trunk
    )
    head = jax.tree.map(lambda x: 50 * x, own["head"])
    export(folder / "model", model, {**moved, "head": head}, labels or None)
    settings = config.DataConfig(source=f"file:{data}", max_length=8, buckets=(), **options)
    made = config.FinetuneConfig(model=str(folder.parent / "base"), data=settings)
    outputs.write_json(folder / "config.json", config.to_dict(made))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The base, runs one to three, and their data."""
    root = tmp_path_factory.mktemp("merge")
    rng = random.Random(0)
    rows = []
    for number in range(80):
        label = rng.choice(["pos", "neg"])
        said = rng.choice(WORDS[:2] if label == "pos" else WORDS[2:4])
        text = f"{rng.choice(WORDS[4:6])} was {said}"
        rows.append({"id": f"r{number}", "text": text, "label": label, "score": len(said)})
    data = root / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = network().build()
    params = jax.tree.map(
        lambda x: 8.0 * x if x.ndim > 1 else x, jax.jit(model.init)(jax.random.key(0))
    )
    base = export(root / "base", model, params)
    runs = [make_run(root / n, data, params, seed=i) for i, n in enumerate(("one", "two"), 1)]
    score = {"task": "regression", "label": "score"}
    graded = make_run(root / "graded", data, params, seed=3, kind="regression", labels=(), **score)
    return root, base, runs, data, params, graded


def merge(method, world, out, *options, models=None):
    _root, base, runs, *_ = world
    models = runs if models is None else models
    words = ["merge", method, str(base), *map(str, models), "--out", str(out), *QUICK]
    assert cli.main([*words, *map(str, options)]) == 0
    return json.loads((out / "merge.json").read_text())


def checked(found, out, method):
    """What every result with data holds; returns the merged folder."""
    assert [task["name"] for task in found["tasks"]] == ["one", "two"]
    assert [row["name"] for row in found["table"]] == ["pretrained", "individual", method]
    assert found["table"][1]["normalised_mean"] == pytest.approx(1.0)
    page = (out / "report.html").read_text()
    assert page == merging.render(merging.finite(found))
    assert "<script" not in page
    assert "http:" not in page
    assert cli.main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == page
    return heads.load(out)


def test_task_arithmetic_streams_sweeps_and_is_evaluated(world, tmp_path, capsys):
    out = tmp_path / "merged"
    found = merge("task-arithmetic", world, out, "--sweep", "0", "0.5", "1")
    merged = checked(found, out, "task-arithmetic")
    swept = found["sweep"]
    assert swept["lambdas"] == [0, 0.5, 1]
    assert swept["by"] == "validation"
    assert swept["used"] == swept["best"]
    best = max(row["normalised_mean"] for row in swept["valid"])
    assert swept["valid"][swept["lambdas"].index(swept["used"])]["normalised_mean"] == best
    # At 0 the base, with the tasks' heads.
    assert swept["test"][0]["scores"] == found["table"][0]["scores"]
    assert found["table"][2]["scores"] == swept["test"][swept["lambdas"].index(swept["used"])][
        "scores"
    ]  # fmt: skip
    # The formula, from the folders.
    _, base, runs, *_ = world
    theta0 = pretrained.load(base, head=None).params
    thetas = [heads.split(pretrained.load(run / "model").params)[0] for run in runs]
    wanted = jax.tree.map(lambda a, b, c: a + swept["used"] * (b - a + c - a), theta0, *thetas)
    for path, leaf in tree.flatten(merged.trunk).items():
        np.testing.assert_allclose(leaf, tree.get(wanted, path), atol=1e-6)
    assert found["stream"]["resumed"] == 0
    assert found["geometry"]["cosines"][0][0] == pytest.approx(1)
    assert 0 < found["geometry"]["disagreement"] < 1
    capsys.readouterr()

    said = tmp_path / "said.json"
    assert cli.main(["evaluate", str(out), "--out", str(said)]) == 0
    result = json.loads(said.read_text())["tasks"]
    assert [result[n]["metrics"]["accuracy"] for n in ("one", "two")] == found["table"][2]["scores"]
    assert cli.main(["evaluate", str(out), "--task", "two"]) == 0
    assert "one:" not in capsys.readouterr().out.split("two:")[1]
    assert cli.main(["evaluate", str(out), "--task", "three"]) == 2
    assert "no task 'three'" in capsys.readouterr().err
    assert cli.main(["evaluate", str(out), "--data.source", "file:x"]) == 2
    assert "say which task" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("average", ()),
        ("weighted", ("--weights", "0.25", "0.75")),
        ("slerp", ("--t", "0.3")),
        ("ties", ("--lam", "0.4", "--sweep", "0.4")),
        ("dare", ("--lam", "0.4", "--sweep")),
        ("dare-ties", ("--lam", "0.4", "--sweep")),
    ],
)
def test_the_other_streamed_methods(method, options, world, tmp_path):
    out = tmp_path / "merged"
    found = merge(method, world, out, "--no-maps", *options)
    checked(found, out, method)
    assert "geometry" not in found
    if method == "ties":
        assert found["sweep"]["by"] == "given"
        assert found["table"][2]["scores"] == found["sweep"]["test"][0]["scores"]
    values = found["coefficients"][0]["values"]
    wanted = {"average": [0.5, 0.5], "weighted": [0.25, 0.75], "slerp": [0.7, 0.3]}
    assert values == pytest.approx(wanted.get(method, [0.4, 0.4]))


def test_fisher_and_regmean_take_data(world, tmp_path):
    for method in ("fisher", "regmean"):
        out = tmp_path / method
        found = merge(method, world, out, "--no-maps")
        checked(found, out, method)
        assert "sweep" not in found


def test_what_is_merged_in_memory_has_the_dtype_of_its_base(world, tmp_path):
    _root, base, runs, *_ = world
    low = tmp_path / "low"
    for folder in (base, *(run / "model" for run in runs)):
        held = pretrained.load(folder, head=None) if folder == base else pretrained.load(folder)
        target = low / (folder.name if folder == base else f"{folder.parent.name}/model")
        export(target, held.model, tree.cast(held.params, jnp.bfloat16), held.labels)
        if folder != base:
            (target.parent / "config.json").write_text((folder.parent / "config.json").read_text())
    out = tmp_path / "merged"
    low_world = (low, low / "base", [low / "one", low / "two"], None)
    found = merge("fisher", low_world, out, "--no-maps")
    assert found["table"][2]["normalised_mean"] > 0.5
    store = weights.Safetensors([out / "model.safetensors"])
    assert {str(store.read(name).dtype) for name in store.shapes()} == {"bfloat16"}


def test_concrete_saves_the_mask_that_made_the_model(world, tmp_path):
    from safetensors.numpy import load_file

    out = tmp_path / "merged"
    found = merge("concrete-ta", world, out, "--sweep", "0.3", "--no-maps")
    merged = checked(found, out, "concrete-ta")
    assert found["adaptation"]["on"] == "train"
    assert not found["adaptation"]["transductive"]
    assert len(found["adaptation"]["entropy"]["mask"]["steps"]) == 3
    assert found["table"][2]["scores"] == found["sweep"]["test"][0]["scores"]
    mask = tree.unflatten(load_file(out / "mask.safetensors"))
    _, base, runs, *_ = world
    theta0 = pretrained.load(base, head=None).params
    thetas = [heads.split(pretrained.load(run / "model").params)[0] for run in runs]
    wanted = methods.concrete.masked_merge(
        theta0, methods.merge.task_vectors(theta0, thetas), np.full(2, 0.3, np.float32), mask
    )
    for path, leaf in tree.flatten(merged.trunk).items():
        np.testing.assert_allclose(leaf, tree.get(wanted, path), atol=1e-6)
    names = [row["tensor"] for row in found["mask"]]
    assert "layers.1/attn/q/kernel" in names
    assert all(0 < row["density"] < 1 for row in found["mask"])


@pytest.mark.slow
def test_adaptation_says_what_it_saw_and_learns_a_coefficient_a_tensor(world, tmp_path):
    out = tmp_path / "am"
    found = merge("adamerging", world, out, "--plus", "--adapt-on", "test")
    checked(found, out, "adamerging")
    assert found["adaptation"]["transductive"]
    assert "transductive" in (out / "report.html").read_text()
    rows = found["coefficients"]
    tensors = [name for name, _ in tree.tensors(heads.load(out).trunk)]
    assert [row["tensor"] for row in rows] == tensors
    found = merge("concrete-adamerging", world, tmp_path / "ca", "--level", "task")
    assert [row["tensor"] for row in found["coefficients"]] == [""]
    assert set(found["adaptation"]["entropy"]) == {"mask", "coefficients"}


@pytest.mark.parametrize("tied", [True, False])
def test_language_models_keep_their_heads_and_are_scored(tied, tmp_path):
    from steppe.models.decoder import DecoderConfig

    network = DecoderConfig(
        "llama", len(VOCAB), 8, 1, 2, 8, 16, tied=tied, head=HeadConfig("lm", 1, drop=0.0)
    )
    model = network.build()
    params = jax.jit(model.init)(jax.random.key(0))

    def export_(folder, params):
        export(folder, model, params)
        (folder / "tokenizer_config.json").write_text('{"eos_token": "[SEP]"}')
        return folder

    base = export_(tmp_path / "base", params)
    texts = tmp_path / "texts.jsonl"
    rows = [{"id": str(i), "text": f"{WORDS[i % 7]} was {WORDS[i % 5]}"} for i in range(40)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = config.DataConfig(source=f"file:{texts}", task="lm", max_length=16, buckets=())
    runs = []
    for i, name in enumerate(("one", "two"), 1):
        moved = jax.tree.map(lambda x, i=i: x + 0.02 * i * np.cos(np.arange(x.size)).reshape(
            x.shape).astype(np.float32), params)  # fmt: skip
        export_(tmp_path / name / "model", moved)
        made = config.FinetuneConfig(model=str(base), data=data)
        outputs.write_json(tmp_path / name / "config.json", config.to_dict(made))
        runs.append(tmp_path / name)
    out = tmp_path / "out"
    found = merge("task-arithmetic", (tmp_path, base, runs), out, "--no-maps", "--sweep", "0.5")
    assert found["table"][2]["scores"] == pytest.approx(found["sweep"]["test"][0]["scores"])
    merged = heads.load(out)
    assert [merged.heads[name].config.kind for name in ("one", "two")] == ["lm", "lm"]
    for name in ("one", "two"):
        own = pretrained.load(tmp_path / name / "model").params.get("head", {})
        assert bool(own) != tied
        jax.tree.map(np.testing.assert_array_equal, merged.heads[name].params, own)


def test_batches_for_adaptation_hold_no_labels(world):
    from steppe.launch.merge import inputs, material

    _, _, runs, *_ = world
    part = inputs.Part("one", "one", runs[0] / "model", config.read(runs[0]).data)
    task = material.open_task(part)
    draws = task.draws("train", 4, 0)
    assert "labels" not in draws(0)
    assert draws(1)["input_ids"].shape == draws(0)["input_ids"].shape == (4, 8)
    assert (draws(0)["input_ids"] != draws(1)["input_ids"]).any()
    assert [len(batch["input_ids"]) for batch in task.some(9, 4, 0)] == [4, 4]


def test_without_data_only_the_disk_is_touched(world, tmp_path):
    _, _base, runs, *_ = world
    out = tmp_path / "merged"
    models = [run / "model" for run in runs]
    found = merge("ties", world, out, models=models)
    assert "table" not in found
    assert [task["name"] for task in found["tasks"]] == ["one", "two"]
    assert set(heads.load(out).heads) == {"one", "two"}
    assert cli.main(["evaluate", str(out)]) == 2


def test_an_interrupted_stream_goes_on_with_the_same_command(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "merged"
    first = stream.merge

    def broken(*args, progress=None, **options):
        def stop(done, total, name):
            if done == 3:
                raise KeyboardInterrupt

        return first(*args, progress=stop, **options)

    monkeypatch.setattr(stream, "merge", broken)
    _, base, runs, *_ = world
    models = [str(run / "model") for run in runs]
    words = ["merge", "ties", str(base), *models, "--out", str(out), "--no-maps"]
    assert cli.main(words) == 130
    assert not out.exists()
    monkeypatch.setattr(stream, "merge", first)
    assert cli.main(words) == 0
    assert json.loads((out / "merge.json").read_text())["stream"]["resumed"] == 3
    capsys.readouterr()


def said(capsys, *args):
    assert cli.main(["merge", *map(str, args)]) == 2
    return capsys.readouterr().err


def test_mistakes_end_in_one_line(world, tmp_path, capsys, monkeypatch):
    root, base, runs, data, params, graded = world
    out = tmp_path / "out"
    to = ("--out", out)
    assert "unknown method 'tie'" in said(capsys, "tie", base, *runs, *to)
    assert "say what to merge" in said(capsys, "ties", base, *to)
    assert "out must name" in said(capsys, "ties", base, *runs)
    assert "does not exist" in said(capsys, "ties", base, root / "nowhere", *to)
    assert "weighted takes --weights" in said(capsys, "weighted", base, *runs, *to)
    assert "slerp is between two" in said(capsys, "slerp", base, runs[0], *to)
    for method, numbers, words in (
        ("weighted", ("inf", "1"), "weights must be finite"),
        ("average", ("nan", "1"), "weights must be finite"),
        ("average", ("0", "0"), "weights must not sum to 0"),
    ):
        assert words in said(capsys, method, base, *runs, *to, "--weights", *numbers)
    assert "must be able to name a file" in said(
        capsys, "ties", base, *runs, *to, "--names", "a/b", "c"
    )
    assert "is a file" in said(capsys, "ties", base, *runs, "--out", data / "x")
    assert "k must be in (0, 1]" in said(capsys, "ties", base, *runs, *to, "--k", "2")
    assert "different ones" in said(capsys, "ties", base, runs[0], runs[0], *to)
    loose = [run / "model" for run in runs]
    assert "fisher needs data" in said(capsys, "fisher", base, *loose, *to)
    words = said(capsys, "concrete-ta", base, runs[0], graded, *to)
    assert "graded is a regression task" in words
    wrong = ("--data", runs[0], runs[0])
    words = said(capsys, "ties", base, runs[0], graded, *to, *wrong)
    assert "has a regression head" in words
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    assert "is there already" in said(capsys, "ties", base, *runs, "--out", taken)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "metrics.jsonl").write_text("")
    assert "the run has not ended" in said(capsys, "ties", base, unfinished, *to)

    wide = network(width=16).build()
    other = export(tmp_path / "wide", wide, jax.jit(wide.init)(jax.random.key(0)))
    words = said(capsys, "ties", base, runs[0], other, *to)
    table, line = words.rstrip().rsplit("\n", 1)
    assert "hidden_size" in table
    assert "wide" in table
    assert line.startswith("steppe: error: the models cannot be merged")

    headless = export(tmp_path / "headless", network().build(), params)
    one = ("--data", f"file:{data}")
    assert "has no head" in said(capsys, "ties", base, headless, *to, *one)

    first, leaf = next(iter(tree.flatten(params).items()))
    broken = tree.replace(params, {first: np.full(leaf.shape, np.nan, np.float32)})
    hurt = export(tmp_path / "hurt", network().build(), broken)
    words = said(capsys, "average", base, hurt, *to)
    assert "NaN" in words
    assert "hurt" in words
    assert "embeddings" in words
    # Methods that hold whole models say it with the file's own names too.
    with pytest.raises(ValueError, match=r"safetensors: tensor '.*embeddings.*' holds"):
        methods._check_finite(broken, hurt)

    import shutil

    full = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert "10" not in said(capsys, "average", base, *runs, *to).split("needs")[0]
    assert not out.exists()


def test_notes_name_another_base_and_models_without_data(world, monkeypatch):
    from steppe.launch.merge import inputs

    root, base, runs, *_ = world
    run = inputs.run_of(str(runs[0]))
    part = inputs.Part("one", "one", runs[0] / "model", run.data, run)
    monkeypatch.chdir(root)
    report = stream.inspect(None, [runs[0] / "model"])
    assert inputs.notes(inputs.Part("base", "base", base), [part], report) == []
    loose = inputs.Part("two", "two/model", runs[1] / "model")
    other, lacking = inputs.notes(inputs.Part("base", "two", base), [part, loose], report)
    assert other == f"one was fine-tuned from {base}, not two"
    assert lacking == "no scores: two/model names no data; give --data, one source a model"


def test_nothing_is_left_of_inputs_that_cannot_be_collected(world, tmp_path, monkeypatch):
    from steppe.launch.merge import inputs
    from steppe.launch.merge.settings import MergeConfig

    _, base, runs, *_ = world
    made = inputs.folder

    def converts(given, out, name):
        (inputs.converted(out) / name).mkdir(parents=True)
        return made(given, out, name)

    monkeypatch.setattr(inputs, "folder", converts)
    wanted = MergeConfig("ties", str(base), (str(runs[0]), "nowhere"), str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        inputs.collect(wanted)
    assert not list(tmp_path.iterdir())


def test_other_data_of_a_task_is_read_with_its_settings():
    from steppe.launch.merge import evaluation

    own = config.DataConfig(source="file:a", task="regression", label="score", max_length=8)
    given, plain = config.DataConfig(source="file:b"), config.EvaluateConfig("").data
    assert evaluation._settings(given, own) == dataclasses.replace(own, source="file:b")
    assert evaluation._settings(plain, own) == own
    assert evaluation._settings(given, None) == given
    assert evaluation._settings(plain, None) is None


def test_a_negative_reference_has_no_ratio():
    from steppe.launch.merge.material import Task

    task = Task("a", "regression", "pearson", False, config.DataConfig(), None, None, {}, 1)
    assert task.ratio(0.4, 0.8) == 0.5
    assert np.isnan(task.ratio(0.4, -0.8))


def test_disagreement_is_of_what_two_tasks_keep(tmp_path):
    """Golden: two tasks, one tensor, counted by hand."""
    model = EncoderConfig("bert", 5, 4, 1, 1, 4, 4, types=2, pooler=False).build()
    base = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), model.abstract())
    pretrained.save(tmp_path / "base", model, base)
    moves = ([5.0, -4, 3, 0.1], [5.0, 4, -3, 0.1])
    for number, move in enumerate(moves):
        tuned = tree.replace(base, {"embed/norm/bias": np.array(move, np.float32)})
        pretrained.save(tmp_path / str(number), model, tuned)
    report = stream.inspect(tmp_path / "base", [tmp_path / "0", tmp_path / "1"])
    entries = sum(leaf.size for leaf in tree.flatten(base).values())
    found = geometry.measure(report, k=3.5 / entries)
    assert {row for row in found.tensors if row[1]} == {("embed/norm/bias", 3, 2)}
    assert found.norms == pytest.approx([np.linalg.norm(m) for m in moves])
    assert found.cosines[0][1] == pytest.approx((25 - 16 - 9 + 0.01) / np.dot(*2 * (moves[0],)))


def test_figures_bear_what_is_missing():
    cells = {"layers.0/a": 0.5, "layers.1/a": float("nan"), "pooler/kernel": 0.1}
    drawn = merging.heat("a <label>", cells)
    assert drawn.startswith("<svg")
    assert "nan" not in drawn
    assert "nan" not in merging.matrix("m", ["a", "b"], [[1, float("nan")], [float("nan"), 1]])
    assert merging.heat("none", {})


@pytest.mark.long
def test_the_benchmark_runs_on_tiny_shapes(tmp_path, monkeypatch, capsys):
    from steppe.launch.bench import merge as bench
    from steppe.launch.bench.harness import Protocol
    from steppe.launch.bench.shapes import TINY

    monkeypatch.setenv("PYTHONPATH", "")
    config = bench.MergeBench(
        width=16, layers=2, ffn_width=32, patch=4, positions=5, tasks=3, triad=100_000,
        stream=("ties",), room=200_000_000, scratch=tmp_path, meta_steps=0, threads=1,
        protocol=Protocol(1, 1, 1), peers=("torch",), out=tmp_path / "merge.json",
    )  # fmt: skip
    lines = []
    result = bench.run(config, lines.append)
    assert json.loads((tmp_path / "merge.json").read_text())["bench"] == "merge"
    assert set(result["methods"]) == set(bench.METHODS)
    for row in result["methods"].values():
        assert row["steppe"]["gigabytes_a_second"]["median"] > 0
        assert all(value < 0.05 for value in row["differences"].values())
    assert result["streamed"]["methods"]["ties"]["grown"] < 200_000_000
    side = bench.Meta(dataclasses.asdict(TINY), 2, 2, 8)
    assert side.turn("concrete-ta", 1) > 0
    from rich.console import Console

    Console().print(bench.table(result))
    assert "of memory" in capsys.readouterr().out
    with pytest.raises(ValueError, match="methods must be of"):
        bench.MergeBench(methods=("tie",))
