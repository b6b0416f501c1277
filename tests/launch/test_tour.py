"""``steppe tour`` on a tiny model: every stage once, what is left after a kill or another setting,
and what the page and the files say of it."""

import dataclasses
import importlib.util
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest

from steppe.launch import cli
from steppe.launch.merge import methods
from steppe.launch.report import touring
from steppe.launch.report.sharpness import finite
from steppe.launch.tour import command, flat, graph, settings, shared, stages
from steppe.launch.tour.settings import TourConfig
from steppe.launch.tour.world import World
from steppe.models import packed, pretrained
from steppe.models.encoder import EncoderConfig
from steppe.train.merge import joined

from .conftest import write_lines

pytestmark = pytest.mark.slow
GOOD, BAD = ("good", "fine"), ("bad", "poor")
WORDS = [*GOOD, *BAD, "odd", "plain", "film", "plot", "was"]
KINDS = {
    "movies": (GOOD, BAD, ("pos", "neg")),
    "news": (("odd",), ("plain",), ("odd", "plain")),
    "products": (GOOD, BAD, ("pos", "neg")),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Settings of a tour of two tasks, on data and a model that take no time."""
    root = tmp_path_factory.mktemp("tour")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    model = EncoderConfig(
        "bert", len(vocab), 16, 2, 2, 16, 12, types=2, pooler=True, drop=0.1, attn_drop=0.1
    ).build()
    params = jax.tree.map(
        lambda x: 8.0 * x if x.ndim > 1 else x, jax.jit(model.init)(jax.random.key(0))
    )
    pretrained.save(root / "base", model, params)
    (root / "base" / "vocab.txt").write_text("\n".join(vocab) + "\n")
    (root / "base" / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    rng = random.Random(0)
    for name, (good, bad, labels) in KINDS.items():
        rows = []
        for number in range(120):
            first = rng.random() < 0.5
            text = f"{rng.choice(WORDS[-3:-1])} was {rng.choice(good if first else bad)}"
            label = labels[0] if first else labels[1]
            rows.append({"id": f"{name}{number}", "text": text, "label": label})
        write_lines(root / f"{name}.jsonl", rows)
    data = dataclasses.replace(TourConfig().data, limit=32, eval_limit=12, max_length=8)
    return TourConfig(
        model=str(root / "base"),
        tasks=(f"file:{root / 'movies.jsonl'}", f"file:{root / 'news.jsonl'}"),
        elsewhere=(f"file:{root / 'products.jsonl'}",),
        out=str(root / "out"),
        data=data,
        optim=dataclasses.replace(TourConfig().optim, learning_rate=3e-3),
        epochs=1.0,
        batch_size=8,
        methods=("average", "ties"),
        sweep=(0.5, 1.0),
        merge_batch=4,
        layers=1,
        sharpness="sam",
        student_epochs=1.0,
        student_lr=3e-3,
        bits=("w4a8",),
        steps=2,
        k_min=1,
        adapter="soft_embed",
        curvature=4,
        grid=3,
    )


@pytest.fixture(scope="module")
def done(world):
    """A tour that was stopped in a fine-tuning and in a merge, and gone on with twice."""
    begun = []
    learn, choose = flat.learn, flat.choose

    def stopped(world, address, optimiser, seed, folder):
        begun.append(folder.name)
        if len(begun) == 3:
            folder.joinpath("half").mkdir()
            raise KeyboardInterrupt
        return learn(world, address, optimiser, seed, folder)

    def late(scores):
        begun.append("choice")
        if begun.count("choice") == 1:
            raise KeyboardInterrupt
        return choose(scores)

    patch = pytest.MonkeyPatch()
    patch.setattr(flat, "learn", stopped)
    patch.setattr(flat, "choose", late)
    for count in (2, 6):
        with pytest.raises(KeyboardInterrupt, match=rf"{count} of \d+ stages are finished"):
            command.run(world)
    found = command.run(world, ["steppe", "tour", "--x"])
    patch.undo()
    return world, begun, found, Path(world.out)


def test_a_killed_stage_begins_again_and_no_other(done):
    _, begun, found, out = done
    names = [name.rpartition("-")[0] for name in begun if name != "choice"]
    movies, news = (f"0-finetune-{name}" for name in ("movies", "news"))
    adamw, sam = [f"{movies}-adamw", f"{news}-adamw"], [f"{movies}-sam", f"{news}-sam"]
    assert names == [*adamw, sam[0], *sam]
    assert begun.count("choice") == 2
    for name in found["hashes"]:
        (folder,) = out.glob(f"stages/{name.replace('/', '-')}-{found['hashes'][name]}")
        told = json.loads((folder / "stage.json").read_text())
        assert told["name"] == name
        assert told["needs"] == {n: found["hashes"][n] for n in told["needs"]}
    assert not list(out.glob("stages/*/run/checkpoints"))
    assert set(found["seconds"]["stages"]) == set(found["hashes"])


def test_the_same_command_runs_nothing_and_says_the_same(done, monkeypatch, capsys):
    config, _, found, out = done
    monkeypatch.setattr(graph.Graph, "_work", None)
    page = (out / "report.html").read_text()
    again = command.run(config, ["steppe", "tour", "--x"])
    for key in ("rows", "claims", "hashes", "export", "choices"):
        assert again[key] == json.loads(json.dumps(found[key])), key
    assert (out / "report.html").read_text() == page
    said = capsys.readouterr().out
    assert "goes on to the next stage" in said
    assert str(out / "model") in said.replace("\n", "")
    assert cli.main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == page


def test_rows_are_what_lies_on_the_disk(done):
    _, _, found, out = done
    rows = {row["key"]: row for row in found["rows"]}
    merges = ["average", "ties", "average-other"]
    assert list(rows) == ["adamw", "sam", *merges, "student", "w4a8-rtn", "w4a8-zsaq"]
    for row in rows.values():
        assert row["test"] == pytest.approx(np.mean(list(row["tasks"].values())))
        assert row["tests"] == [row["test"]]
        assert set(row["away"]) == {"movies", "news"}
        assert set(row["away"]["movies"]) == {"products"}
        assert not row["away"]["news"]
        assert row["ms"]["1"] > 0
    assert [key for key, row in rows.items() if "top_eigenvalue" in row] == [
        "adamw", "sam", str(found["choices"]["merge"]["best"]).rpartition("/")[2], "student"
    ]  # fmt: skip
    student = Path(out / "student" / "model.safetensors").stat().st_size
    handed = str(found["choices"]["rounded"]["best"]).rpartition("/")[2]
    assert rows["student"]["bytes"] == student
    assert rows[handed]["bytes"] == (out / "model" / "model.safetensors").stat().st_size < student
    assert rows["adamw"]["bytes"] > 2 * rows["student"]["bytes"] * 0.9
    # One of two layers, and 4 x 8 bits of 32 x 32 but for the attention.
    assert rows["student"]["flops"] == pytest.approx(rows["adamw"]["flops"] / 2)
    share = rows["w4a8-rtn"]["bit_operations"] / rows["student"]["bit_operations"]
    assert 32 / 1024 < share < 0.2


def test_what_is_handed_out_answers_as_its_row_says(done):
    """The packed folder and the student's, opened by hand and scored by hand."""
    config, _, found, out = done
    held = packed.load(out / "model")
    loaded = pretrained.load(out / "student")
    assert loaded.fresh == ()
    world_ = World(config)
    handed = str(found["choices"]["rounded"]["best"]).rpartition("/")[2]
    rows = {row["key"]: row for row in found["rows"]}
    for one, key in ((held, handed), (loaded, "student")):
        what = joined.read(one.model, one.labels)
        apply = jax.jit(lambda params, batch, model=one.model: model.apply(params, batch).logits)
        assert what.classes == {"movies": ("neg", "pos"), "news": ("odd", "plain")}
        for name, task in world_.tasks.items():
            data = task.splits["test"]
            batch = {"input_ids": np.zeros((len(data), 8), np.int32)}
            for row in range(len(data)):
                ids = np.asarray(data.input_ids[row])
                batch["input_ids"][row, : len(ids)] = ids
            batch["attention_mask"] = (batch["input_ids"] > 0).astype(np.int32)
            logits = np.asarray(apply(one.params, batch))
            right = logits[:, what.columns(name)].argmax(1) == data.labels
            assert rows[key]["tasks"][name] == pytest.approx(np.mean(right)), (key, name)
    assert found["export"]["student"] == {
        "difference": 0.0, "same": 1.0, "bytes": rows["student"]["bytes"]
    }  # fmt: skip
    assert found["export"]["packed"]["difference"] < 1e-6
    if importlib.util.find_spec("torch") is not None:
        assert found["export"]["transformers"]["difference"] < 1e-4
        assert found["export"]["transformers"]["same"] == 1.0
    assert found["export"]["integers"]["same"] > 0.9
    texts = found["export"]["texts"]
    assert [row["task"] for row in texts] == 3 * ["movies"] + 3 * ["news"]
    assert {row["said"]["news"][0] for row in texts} <= {"odd", "plain"}


def test_choices_are_made_on_the_validation_split(done):
    _, _, found, out = done
    for what in ("optimiser", "merge"):
        choice = found["choices"][what]
        assert choice["valid"][choice["best"]] == max(choice["valid"].values())
    merge = json.loads(next(out.glob("stages/0-merge-ties-*/stage.json")).read_text())["result"]
    assert merge["sweep"][f"{merge['lam']:g}"] == max(merge["sweep"].values())
    (game,) = out.glob("stages/0-quantize-w4a8-zsaq-*/stage.json")
    moved = json.loads(game.read_text())["result"]["moved"]
    assert [note for note in found["notes"] if "ZSAQ" in note] == [
        "W4A8, ZSAQ: the game keeps the rounding that it began with"
        if moved == 0
        else f"W4A8, ZSAQ: {moved:.2%} of the integers are not those of rounding"
    ]
    optimiser = str(found["choices"]["optimiser"]["best"]).rpartition("/")[2]
    assert merge["optimiser"] == optimiser
    (other,) = out.glob("stages/0-merge-average-other-*/stage.json")
    assert json.loads(other.read_text())["result"]["optimiser"] != optimiser
    crossed, rows = found["crossed"][optimiser], {row["key"]: row for row in found["rows"]}
    assert {name: crossed[name][name] for name in crossed} == rows[optimiser]["tasks"]


def test_what_is_handed_out_is_evaluated_task_by_task(done, capsys):
    config, _, found, out = done
    sources = dict(zip(config.names, config.tasks, strict=True))
    small = {row["key"]: row for row in found["rows"]}
    rounded = found["export"]["rounded"].rpartition("/")[2]
    for folder, key in (("student", "student"), ("model", rounded)):
        for name, source in sources.items():
            given = ["evaluate", str(out / folder), "--data.source", source, "--split", "test"]
            given += ["--data.max-length=8", "--data.eval-limit=12"]
            assert cli.main(given) == 0
            said = capsys.readouterr().out
            assert f"{small[key]['tasks'][name]:,.4f}" in said, (folder, name, said)
    given = ["evaluate", str(out / "student"), "--data.source", sources["movies"]]
    assert cli.main([*given, "--task", "plays"]) == 2
    assert "no head for 'plays'; there are movies, news" in capsys.readouterr().err
    assert cli.main([*given, "--task", "news"]) == 2  # the classes of movies are not news's
    assert cli.main([*given, "--data.label", "text"]) == 2
    assert "answers several tasks (movies: " in capsys.readouterr().err


def test_damaged_stages_are_run_again(done, tmp_path):
    """A file that is cut, a file that is gone, a record that says something else."""
    import shutil

    config, _, _, out = done
    copied = tmp_path / "tour"
    shutil.copytree(out, copied)
    made = stages.graph(dataclasses.replace(config, out=str(copied)), World(config))
    held = {stage.name: made.done(stage.name) for stage in made.stages}
    assert None not in held.values()
    merge = next(name for name in held if name.startswith("0/merge/"))
    weights = next(made.folder(merge).rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.rmtree(made.folder("0/export") / "packed")
    record = made.folder("0/costs") / graph.FILE
    for result in (None, {}):
        record.write_text(json.dumps({**json.loads(record.read_text()), "result": result}))
        left = {name for name in held if made.done(name) is None}
        assert left == {merge, "0/export", "0/costs"}
    (copied / "tour.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tour.json is damaged: it lacks 'config'; give the"):
        command.write(copied)
    (copied / "config.json").write_text("{")
    command.check(copied)  # still a tour: its settings are written again


def test_two_at_once_do_not_share_a_folder(tmp_path):
    with (
        graph.alone(tmp_path / "out"),
        pytest.raises(BlockingIOError, match="another process works in .*choose another --out"),
        graph.alone(tmp_path / "out"),
    ):
        pass
    with graph.alone(tmp_path / "out"):
        pass


def test_the_page_is_whole(done):
    _, _, found, out = done
    page = (out / "report.html").read_text()
    assert page == touring.render(finite(json.loads((out / "tour.json").read_text())))
    for word in ("<script", "http:", "https:", "nan", ">None<", ">inf<"):
        assert word not in page, word
    # Two fronts, two surfaces, two grids, the seconds; and where there is a mask two of it.
    assert page.count("<svg") == 7
    mask = [
        {"tensor": f"layers.{n}/attn/q/kernel", "density": 0.5, "rate": rate}
        for n, rate in enumerate((0.4, 0.6))
    ]
    masked = touring.render(finite({**found, "mask": mask}))
    assert masked.count("<svg") == 9
    same = touring.render(finite({**found, "mask": [{**row, "rate": 0.5} for row in mask]}))
    assert same.count("<svg") == 8
    assert "with a probability of 0.50" in same
    assert "The shared subspace" in masked
    for claim in found["claims"]:
        assert claim["claim"] in page
    assert "this is one seed" in page.lower()


def test_another_setting_runs_what_depends_on_it(done):
    """Names of the stages whose hashes change, by setting."""
    config, _, found, _ = done

    def changed(**values):
        other = dataclasses.replace(config, **values)
        hashes = stages.graph(other, World(other)).hashes
        assert set(hashes) == set(found["hashes"])
        names = {name for name in hashes if hashes[name] != found["hashes"][name]}
        return {name.removeprefix("0/") for name in names}

    rounded = {"choice/rounded", "export", "costs"}
    game = {"quantize/w4a8-zsaq", "scores/w4a8-zsaq"} | rounded
    assert changed(steps=3) == game
    rtn = {"quantize/w4a8-rtn", "scores/w4a8-rtn"}
    assert changed(embed=False) == game | rtn
    student = {"student", "scores/student", "flatness/student"} | game | rtn
    assert changed(divergence="forward_kl") == student
    ties = {"merge/ties", "scores/ties", "choice/merge", "flatness/merged"} | student
    assert changed(sweep=(0.5, 0.7)) == ties
    assert changed(grid=5) == {"surface"}
    assert {n for n in changed(curvature=3) if "flatness" not in n} == {"surface"}
    every = changed(optim=dataclasses.replace(config.optim, learning_rate=1e-3))
    assert every == {name.removeprefix("0/") for name in found["hashes"]}
    sam = changed(rho=0.03)
    assert not any(name.endswith("adamw") for name in sam)
    assert {"finetune/movies-sam", "merge/average", "student"} <= sam
    scored = changed(data=dataclasses.replace(config.data, eval_limit=11))
    assert not any(name.startswith("finetune") for name in scored)
    assert changed(keeps=0.5, out="elsewhere", dry_run=True) == set()


def test_other_data_under_the_same_name_is_other_data(done, tmp_path):
    config, *_ = done
    lines = Path(config.tasks[1].removeprefix("file:")).read_text().splitlines()
    file = tmp_path / "news.jsonl"
    other = dataclasses.replace(config, tasks=(config.tasks[0], f"file:{file}"))
    hashes = []
    for text in ("\n".join(lines) + "\n", "\n".join(lines).replace("plot", "film") + "\n"):
        file.write_text(text)
        hashes.append(stages.graph(other, World(other)).hashes)
    assert hashes[0]["0/finetune/movies-adamw"] == hashes[1]["0/finetune/movies-adamw"]
    assert hashes[0]["0/finetune/news-adamw"] != hashes[1]["0/finetune/news-adamw"]


def test_dry_run(done, tmp_path, capsys):
    config, _, found, _ = done
    told = command.run(dataclasses.replace(config, dry_run=True, steps=3))
    states = {row["name"]: row["state"] for row in told["stages"]}
    assert states["0/quantize/w4a8-zsaq"] == "to do"
    assert states["0/quantize/w4a8-rtn"] == "done"
    assert "stages are done in" in capsys.readouterr().out
    fresh = dataclasses.replace(config, dry_run=True, out=str(tmp_path / "new"), seeds=(0, 1))
    names = [row["name"] for row in command.run(fresh)["stages"]]
    assert sum(name.startswith("1/") for name in names) == len(found["hashes"]) - 4
    assert not (tmp_path / "new").exists()
    capsys.readouterr()
    words = ["--model", config.model, "--tasks", *config.tasks, "--elsewhere", *config.elsewhere]
    words += ["--layers", "1", "--data.max-length", "8", "--out", str(tmp_path / "new")]
    assert cli.main(["tour", "--full", "--dry-run", *words]) == 0
    said = capsys.readouterr().out
    assert "2/merge/adamerging" in said
    assert "0 of " in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layers", "9"], "layers=9 is more than the 2"),
        (["--keeps", "2"], "keeps must be in (0, 1]"),
        (["--grid", "1"], "grid must be 0"),
        (["--rho", "-1"], "rho must be >= 0"),
        (["--student-lr", "0"], "--student-lr must be > 0"),
        (["--seeds", "1", "1"], "seeds must not hold a value twice"),
        (["--methods", "tie"], "methods must be among average"),
        (["--bits", "w9"], "scheme must look like w8a8"),
        (["--bits", "w9a9"], "bits='w9a9': "),
        (["--methods", "avrage"], "did you mean 'average'?"),
        (["--rounding", "rtm"], "did you mean 'rtn'?"),
        (["--game-lr", "-1"], "--game-lr must be > 0"),
        (["--epochs", "-1"], "epochs must be > 0 and finite"),
        (["--beta", "3"], "beta must be in [0, 1]"),
        (["--optim.warmup", "3"], "warmup must be in [0, 1)"),
        (["--optim.learning-rate", "-1"], "--optim.learning-rate must be > 0 and finite, or 0"),
        (["--optim.clip-norm", "-1"], "--optim.clip-norm must be > 0 and finite, or 0"),
        (["--data.task", "lm"], "--data.task must be classification"),
        (["--tasks", "file:/nowhere/a.csv", "file:/nowhere/b.csv"], "nowhere"),
        (["--out", "{here}"], "holds something else"),
        (["--elsewhere", "{elsewhere}"], "are those of no task"),
        (["--tasks", "movies.csv", "news.csv"], "such as file:movies.csv or asset:"),
        (["--tasks", "{slash}", "{elsewhere}"], "'a/b' has a '/'"),
    ],
)
def test_mistakes(world, options, said, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    write_lines(
        tmp_path / "x.jsonl", [{"id": str(n), "text": "a", "label": f"l{n}"} for n in range(60)]
    )
    write_lines(
        tmp_path / "slash.jsonl",
        [{"id": str(n), "text": "a", "label": ("a/b", "c")[n % 2]} for n in range(60)],
    )
    places = {"{here}": str(tmp_path), "{elsewhere}": f"file:{tmp_path / 'x.jsonl'}"}
    places["{slash}"] = f"file:{tmp_path / 'slash.jsonl'}"
    options = [places.get(word, word) for word in options]
    base = {
        "--model": [world.model],
        "--tasks": world.tasks,
        "--elsewhere": [],
        "--data.max-length": ["8"],
        "--layers": ["1"],
        "--out": [str(tmp_path / "out")],
    }
    for option in (word for word in options if word.startswith("--")):
        base.pop(option, None)
    words = [word for name, values in base.items() if values for word in (name, *values)]
    assert cli.main(["tour", *words, *options]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "mine.txt",
        "slash.jsonl",
        "x.jsonl",
    ]


def test_the_longer_version():
    full, plain = settings.full(), TourConfig()
    assert full.seeds == (0, 1, 2)
    assert full.data.limit > plain.data.limit
    assert full.out != plain.out
    assert len(full.methods) > len(plain.methods)


def test_a_method_with_a_mask_leaves_it_for_the_page(world, tmp_path, monkeypatch):
    """What a Concrete method finds, and what its row says of it; the method itself is not run."""
    opened = World(world)
    mask = {"layers": {"x": {"kernel": np.array([[[1.0, 0.0]], [[1.0, 1.0]]], np.float32)}}}
    got = methods.Outcome(
        {"w": 1},
        [("a", [0.2, 0.4]), ("b", [0.4, 0.0])],
        mask=mask,
        rates={"layers.0/x/kernel": 0.7},
    )
    seen = []
    monkeypatch.setattr(methods, "with_data", lambda *args: seen.append(args) or got)
    arm = shared.arm_of(opened, "concrete-adamerging:steps=2", 3)
    found = shared._merge(opened, None, arm)
    assert (arm.updates, arm.seed, arm.adapt_on, arm.eval_limit) == (2, 3, "valid", 12)
    assert seen[0][2] == list(opened.tasks.values())
    assert found["trunk"] == {"w": 1}
    assert found["coefficients"] == pytest.approx([0.3, 0.2])
    assert found["mask"] == [
        {"tensor": "layers.0/x/kernel", "density": 0.5, "rate": 0.7},
        {"tensor": "layers.1/x/kernel", "density": 1.0, "rate": None},
    ]
