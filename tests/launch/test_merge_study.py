"""``steppe compare merging`` on tiny models: every row is what its formula gives on the runs of its
seed, a kill loses one merge, and mistakes are found before anything is trained."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest

from steppe.launch import cli
from steppe.launch.config import DataConfig, FinetuneConfig, OptimConfig
from steppe.launch.merge import study, study_table
from steppe.launch.merge.settings import MergeConfig
from steppe.launch.merge.study_settings import StudyConfig
from steppe.launch.report import merge_study
from steppe.models import pretrained, tree
from steppe.train.evaluate.paired import paired
from steppe.train.merge import heads

from .test_merge import WORDS, export, network

pytestmark = pytest.mark.slow
METHODS = (
    "average",
    "task-arithmetic",
    "ties:lam=0.4",
    "concrete-adamerging:steps=2,tta_steps=2",
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A comparison that was stopped after five merges and gone on with."""
    root = tmp_path_factory.mktemp("study")
    rng = random.Random(0)
    for name, wrong in (("one", 0.0), ("two", 0.3)):
        rows = []
        for number in range(90):
            label = rng.choice(["pos", "neg"])
            said = rng.choice(
                WORDS[:2] if (label == "pos") != (rng.random() < wrong) else WORDS[2:4]
            )
            rows.append({"id": f"r{number}", "text": f"plot was {said}", "label": label})
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = network().build()
    params = jax.tree.map(
        lambda x: 8.0 * x if x.ndim > 1 else x, jax.jit(model.init)(jax.random.key(0))
    )
    export(root / "base", model, params)
    config = StudyConfig(
        base=FinetuneConfig(
            model=str(root / "base"),
            data=DataConfig(max_length=8, buckets=(8,)),
            optim=OptimConfig(learning_rate=1e-2),
            epochs=2.0,
            batch_size=16,
            baselines=False,
        ),
        out=str(root / "out"),
        tasks=(f"file:{root}/one.jsonl", f"file:{root}/two.jsonl"),
        methods=METHODS,
        sweep=(0.25, 0.5),
        seeds=(0, 1),
        batch_size=4,
        eval_limit=8,
    )
    honest, calls = study._say, []

    def say(row):
        calls.append(row["method"])
        honest(row)
        if len(calls) == 5:
            raise KeyboardInterrupt

    patch = pytest.MonkeyPatch()
    patch.setattr(study, "_say", say)
    with pytest.raises(KeyboardInterrupt, match="5 finished merges .* --resume"):
        study.run(config)
    found = study.run(dataclasses.replace(config, resume=True), ["steppe", "compare", "merging"])
    patch.undo()
    return config, calls, found


def test_a_dry_run_counts_and_writes_nothing(done, tmp_path, capsys):
    config = done[0]
    again = dataclasses.replace(config, dry_run=True, resume=True)
    assert study.run(again) == {"trainings": 0, "rows": len(config.rows()) * 2, "left": 0}
    fresh = dataclasses.replace(config, dry_run=True, out=str(tmp_path / "new"), seeds=(0, 1, 2))
    found = study.run(fresh)
    assert found == {"trainings": 6, "rows": 3 * len(config.rows()), "left": found["rows"]}
    assert not (tmp_path / "new").exists()
    assert "6 fine-tunings (2 tasks x 3 seeds" in capsys.readouterr().out


def test_fewer_methods_or_seeds_are_not_gone_on_with(done):
    config = dataclasses.replace(done[0], resume=True)
    for more, said in (
        ({"methods": METHODS[1:]}, f"{METHODS[0]} is not among those given now"),
        ({"seeds": (1,)}, "has seeds 0 1, and 0 is not among"),
    ):
        with pytest.raises(ValueError, match=said):
            study.run(dataclasses.replace(config, **more))


def test_every_merge_ran_once(done):
    config, calls, found = done
    assert len(calls) == len(config.rows()) * 2
    assert found["done"] == found["of"] == len(calls)
    assert [arm["name"] for arm in found["arms"]] == ["pretrained", "individual", *METHODS]
    assert all(arm["seeds"] == [0, 1] for arm in found["arms"])


def test_rows_are_the_formulas_on_the_runs(done):
    config, _, found = done
    out = study.Path(config.out)
    rows = {
        (row["seed"], row["method"]): row
        for row in map(json.loads, (out / "merges.jsonl").read_text().splitlines())
    }
    runs = [out / "tasks" / "1" / name / "model" for name in ("one", "two")]
    theta0 = pretrained.load(config.base.model, head=None).params
    thetas = [heads.split(pretrained.load(run).params)[0] for run in runs]
    shared = MergeConfig(base=config.base.model, models=tuple(map(str, runs)), eval_limit=8)
    base, models, _ = study.inputs.collect(
        dataclasses.replace(shared, out=str(out / "x"), data=tuple(str(r.parent) for r in runs),
                            names=("one", "two"))
    )  # fmt: skip
    tasks = [study.material.open_task(part) for part in models]
    trees, nets = study.methods.load(base, models), study.methods.Nets()
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *thetas)
    scores = study.table.score(tasks, trees.multihead(mean), nets, "test")
    got = rows[1, "average"]["test"]
    assert got["scores"] == [scores[name]["accuracy"] for name in ("one", "two")]
    assert got["metrics"] == scores

    lam = rows[1, "task-arithmetic"]["lam"]
    swept = rows[1, "task-arithmetic"]["sweep"]
    assert lam == swept["lambdas"][int(np.argmax(swept["valid"]))]
    moved = jax.tree.map(lambda a, b, c: a + lam * (b - a + c - a), theta0, *thetas)
    scores = study.table.score(tasks, trees.multihead(moved), nets, "valid")
    for name, metrics in rows[1, "task-arithmetic"]["valid"]["metrics"].items():
        assert metrics == pytest.approx(scores[name], rel=1e-5)
    assert rows[1, "individual"]["test"]["normalised_mean"] == 1.0
    assert rows[0, "ties:lam=0.4"]["lam"] == 0.4
    adapted = rows[0, "concrete-adamerging:steps=2,tta_steps=2"]
    assert 0.4 < adapted["mask_rate"] < 0.6
    assert set(adapted["entropy"]) == {"mask", "coefficients"}
    # Different seeds are different fine-tunes.
    other = heads.split(pretrained.load(out / "tasks" / "0" / "one" / "model").params)[0]
    assert any(
        not np.array_equal(x, tree.get(thetas[0], p)) for p, x in tree.flatten(other).items()
    )
    assert not (out / "tasks" / "0" / "one" / "checkpoints").exists()

    arm = found["arms"][3]
    pairs = [[rows[s, n]["test"]["mean"] for s in (0, 1)] for n in ("average", "task-arithmetic")]
    assert arm["differences"]["accuracy"] == paired(*pairs)._asdict()
    assert arm["metrics"]["accuracy"]["mean"] == pytest.approx(np.mean(pairs[1]))


def test_table_and_page(done, capsys):
    config, *_ = done
    out = study.Path(config.out)
    text = (out / "table.md").read_text()
    assert text == study_table.markdown(json.loads((out / "table.json").read_text()))
    assert "| ties:lam=0.4 (lam 0.4) |" in text
    assert "| valid |" in text
    assert "fisher and regmean saw inputs of the training split" in text
    page = (out / "report.html").read_text()
    assert page == merge_study.render(json.loads((out / "table.json").read_text()))
    assert "<script" not in page
    assert page.count("<svg") == 3
    assert cli.main(["report", str(out)]) == 0
    assert "concrete-adamerging" in capsys.readouterr().out.replace("\n", "")
    assert (out / "report.html").read_text() == page
    assert cli.main(["sharpness", str(out)]) == 2


def test_the_metric_is_the_one_that_stands_for_the_tasks():
    metrics = {"one": {"accuracy": 0.5, "perplexity": 3.0}}
    rows = {(0, "average"): {"test": {"metrics": metrics, "scores": [3.0]}}}
    assert study_table._metric(rows) == "score"
    rows[0, "average"]["test"]["scores"] = [0.5]
    assert study_table._metric(rows) == "accuracy"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "tie"], "methods must be among average"),
        (["--methods", "slerp"], "methods must be among average"),
        (["--methods", "ties:kk=1"], "SETTING=VALUE with one of"),
        (["--methods", "ties:k=2"], "k must be in"),
        (["--methods", "ties:k=x"], "k='x'"),
        (["--methods", "adamerging:level=head"], "level='head'"),
        (["--tasks", "asset:vader/movies"], "tasks must be two or more"),
        (["--tasks", "file:a/x.csv", "file:b/x.csv"], "last part"),
        (["--tasks", "file:/nowhere/a.csv", "file:/nowhere/b.csv"], "nowhere"),
        (["--base.seed", "3"], "base.seed is not used here"),
        (["--base.lora.rank", "4"], "base.lora is not used here"),
    ],
)
def test_mistakes(options, said, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["compare", "merging", *options, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert not out.exists()
