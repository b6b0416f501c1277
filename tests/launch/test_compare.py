"""``steppe compare`` on a tiny model: pairs are pairs, radii are chosen on validation only, a kill
loses one run, and the numbers of the table are those of its parts."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from steppe.launch import cli
from steppe.launch import config as config_
from steppe.launch.compare import command, curvature, material, schedule, table
from steppe.launch.compare.journal import Journal, Trial
from steppe.launch.compare.settings import Cell, CompareConfig, parse_arm
from steppe.launch.compare.trial import Trials, with_rho, with_seed
from steppe.launch.config import DataConfig, FinetuneConfig, OptimConfig
from steppe.launch.pieces import start
from steppe.launch.report import comparison
from steppe.train.evaluate.curvature import NotFinite
from steppe.train.evaluate.paired import paired

pytestmark = pytest.mark.slow


def base(world, **more):
    return FinetuneConfig(
        model=world.model,
        data=DataConfig(source=world.a, max_length=8, buckets=(8,)),
        optim=OptimConfig(learning_rate=5e-3),
        batch_size=16,
        epochs=2.0,
        baselines=False,
        **more,
    )


def small(world, out, **more):
    settings = {
        "base": base(world),
        "out": str(out),
        "sources": (world.a,),
        "transfer": (world.a, world.b),
        "sizes": (32,),
        "methods": ("adamw", "sam:rho=0.001/0.5"),
        "seeds": (0, 1),
        "select_seeds": (7,),
    }
    return CompareConfig(**(settings | more))


@pytest.fixture(scope="module")
def done(reviews, tmp_path_factory):
    """A comparison that was stopped after four trials and gone on with."""
    out = tmp_path_factory.mktemp("compare") / "out"
    config = small(reviews, out, curvature=True, curvature_examples=16)
    honest, calls = Trials.run, []

    def run(self, trial):
        calls.append(trial)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return honest(self, trial)

    patch = pytest.MonkeyPatch()
    patch.setattr(Trials, "run", run)
    with pytest.raises(KeyboardInterrupt, match="4 finished trials .* --resume"):
        command.run(config)
    with (out / "runs.jsonl").open("a") as stream:
        stream.write('{"source": "torn')
    found = command.run(dataclasses.replace(config, resume=True), ["steppe", "compare"])
    patch.undo()
    return config, calls, found


def test_every_trial_ran_once(done):
    config, calls, found = done
    assert calls[4] == calls[5]  # the one that was stopped
    assert len(calls) == schedule.count(config) + 1 == 8
    assert found["trials"] == found["of"] == 7
    lines = (Path(config.out) / "runs.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in lines]) == 7


def test_the_test_split_is_scored_for_reported_trials_only(done):
    config, _, _ = done
    rows = Journal(Path(config.out)).rows
    for trial, row in rows.items():
        assert ("test" in row, "valid" in row) == (trial.reported, not trial.reported)
        assert (trial.seed in config.seeds) == trial.reported
    chosen = {t.rho for t in rows if t.reported and t.arm == "sam"}
    assert len(chosen) == 1


def test_the_table_holds_what_the_trials_found(done):
    config, _, found = done
    out = Path(config.out)
    journal = Journal(out)
    adamw, sam = found["cells"][0]["arms"]
    rows = [journal.rows[Trial(config.cells()[0], "sam", sam["rho"], s, True)] for s in (0, 1)]
    mean = np.mean([row["test"]["accuracy"] for row in rows])
    assert sam["metrics"]["accuracy"]["mean"] == pytest.approx(mean)
    right = [row["correct"].count("1") / len(row["correct"]) for row in rows]
    assert right == pytest.approx([row["test"]["accuracy"] for row in rows])
    assert adamw["gradients"] == 1.0
    assert sam["gradients"] == 2.0
    assert [point["rho"] for point in sam["grid"]] == [0.001, 0.5]
    assert [point["rho"] for point in adamw["grid"]] == [0.0]
    over = sam["differences"]["accuracy"]
    assert over["difference"] == pytest.approx(mean - adamw["metrics"]["accuracy"]["mean"])
    assert sam["differences"]["examples"]["difference"] == pytest.approx(over["difference"])
    assert sam["metrics"]["top_eigenvalue"]["mean"] is not None
    assert sam["metrics"]["ball_gap"]["mean"] >= 0
    (other,) = [name for name in sam["metrics"] if name.startswith("transfer/")]
    assert other.endswith("b.jsonl")
    text = (out / "table.md").read_text()
    assert "32 training examples" in text
    assert "| sam |" in text
    page = (out / "report.html").read_text()
    assert page == comparison.render(found)
    assert "<script" not in page
    saved = json.loads((out / "table.json").read_text())
    assert saved["cells"][0]["arms"][1]["metrics"]["accuracy"] == sam["metrics"]["accuracy"]


def test_methods_of_a_seed_share_everything_but_the_optimiser(reviews, tmp_path):
    config = small(reviews, tmp_path, noise=(0.25,))
    trials = Trials(config)
    cell = config.cells()[0]
    adamw, sam = (trials.build(cell, arm, 3) for arm in config.arms())
    first, second = start(adamw), start(sam)
    for a, b in zip(jax.tree.leaves(first.full()), jax.tree.leaves(second.full()), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.random.key_data(first.rng).tolist() == jax.random.key_data(second.rng).tolist()
    for _ in range(3):
        a, b = next(adamw.batches), next(sam.batches)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    other = trials.build(cell, config.arms()[0], 4)
    assert set(other.data.splits["train"].ids) != set(adamw.data.splits["train"].ids)
    assert other.data.splits["test"].ids == adamw.data.splits["test"].ids
    head = [
        np.abs(np.asarray(p.loaded.params["head"]["out"]["kernel"])).sum() for p in (adamw, other)
    ]
    assert head[0] != head[1]


def test_radii_and_seeds_run_one_program_and_rho_0_is_adamw(reviews, tmp_path):
    config = small(reviews, tmp_path, transfer=())
    trials = Trials(config)
    cell = config.cells()[0]
    found = [
        trials.run(Trial(cell, arm, rho, 0, True))
        for arm, rho in (("adamw", 0.0), ("sam", 0.0), ("sam", 0.5))
    ]
    trials.run(Trial(cell, "sam", 0.1, 1, False))
    assert trials.compiles == 2
    assert found[1]["test"] == pytest.approx(found[0]["test"], abs=1e-6)
    assert found[2]["test"]["loss"] != pytest.approx(found[0]["test"]["loss"], abs=1e-4)


def test_a_trial_is_the_run_of_finetune(reviews, tmp_path):
    config = small(reviews, tmp_path / "c", transfer=(), resample=False)
    found = Trials(config).run(Trial(config.cells()[0], "sam", 0.05, 3, True))
    alone = [
        "finetune",
        f"--model={reviews.model}",
        f"--data.source={reviews.a}",
        *("--data.max-length=8", "--data.buckets", "8", "--data.limit=32"),
        *("--batch-size=16", "--epochs=2", "--optim.learning-rate=5e-3", "--no-baselines"),
        *("--sharpness=sam", "--rho=0.05", "--seed=3", f"--out={tmp_path / 'run'}"),
    ]
    assert cli.main(alone) == 0
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]["test"]
    for name, value in found["test"].items():
        assert metrics[name] == pytest.approx(value, abs=1e-5), name


def test_a_run_that_diverges_is_written_down(reviews, tmp_path):
    config = small(reviews, tmp_path, methods=("adamw", "sam:rho=0.01/1e30"), transfer=())
    cell = config.cells()[0]
    journal = Journal(tmp_path)
    row = {"steps": 4, "gradients": 2.0, "diverged": "loss is nan at step 2"}
    journal.add(Trial(cell, "sam", 1e30, 7, False), row)
    sam = config.arms()[1]
    assert schedule.choose(config, cell, sam, journal) is None
    journal.add(Trial(cell, "sam", 0.01, 7, False), {"valid": {"accuracy": 0.1, "loss": 9.0}})
    for by in ("accuracy", "loss"):
        chosen = dataclasses.replace(config, select_by=by)
        assert schedule.choose(chosen, cell, sam, Journal(tmp_path)) == 0.01
    found = table.summary(config, journal)
    assert "sam" in comparison.render(found)
    assert Trials(config).run(Trial(cell, "sam", 1e30, 7, False)).keys() >= {"diverged"}


def test_curvature_is_that_of_examples_of_any_length_and_class(reviews, tmp_path):
    lines = Path(reviews.a.removeprefix("file:")).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows[::2]:
        row["text"] = " ".join(row["text"].split()[:2])
    rows.sort(key=lambda row: row["label"])
    source = tmp_path / "mixed.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small(reviews, tmp_path, curvature=True, curvature_examples=20)
    config = dataclasses.replace(config, sources=(f"file:{source}",), transfer=())
    wide = dataclasses.replace(config.base.data, max_length=12, buckets=(4, 12))
    config = dataclasses.replace(config, base=dataclasses.replace(config.base, data=wide))
    trials = Trials(config)
    trials.open()
    built = trials.build(config.cells()[0], config.arms()[0], 0)
    train = built.data.splits["train"]
    (batch,) = curvature.few(config, built)
    counted = np.asarray(batch["label_mask"]) > 0
    found = np.sort(batch["example_index"][counted])
    assert list(found) == list(range(20))
    # As many of both classes as chance gives.
    assert 6 <= batch["labels"][counted].sum() <= 14
    lengths = batch["attention_mask"][counted].sum(1)
    assert lengths.min() <= 4 < lengths.max()
    # The training examples are in the order of their source, which names one class first.
    assert (np.diff(train.labels) >= 0).all()
    (again,) = curvature.few(config, trials.build(config.cells()[0], config.arms()[1], 0))
    np.testing.assert_array_equal(batch["input_ids"], again["input_ids"])


def test_a_run_without_curvature_keeps_its_scores(reviews, tmp_path, monkeypatch):
    def none(*args, **more):
        raise NotFinite("the Hessian-vector product is not finite")

    monkeypatch.setattr(curvature.sharpness, "top_eigenvalues", none)
    config = small(reviews, tmp_path / "x", curvature=True, methods=("adamw",), seeds=(0,))
    found = command.run(config)
    (arm,) = found["cells"][0]["arms"]
    assert 0 < arm["metrics"]["accuracy"]["mean"] <= 1
    assert "top_eigenvalue" not in arm["metrics"]
    assert arm["metrics"]["ball_gap"]["mean"] >= 0


def test_a_number_that_some_seeds_lack_says_so():
    found = table.spread([300.0, math.nan, 320.0])
    assert table.number("top_eigenvalue", found) == "310.0 ± 14.1 (2 of 3)"
    assert table.number("top_eigenvalue", table.spread([1.0, 2.0])) == "1.5 ± 0.7"


def test_wrong_labels_are_a_share_of_the_training_labels():
    labels, ids = np.arange(100) % 3, [f"x{i}" for i in range(100)]
    wrong = material.wrong_labels(labels, ids, 3, 0.2, seed=0)
    assert (wrong != labels).sum() == 20
    assert set(wrong.tolist()) == {0, 1, 2}
    np.testing.assert_array_equal(wrong, material.wrong_labels(labels, ids, 3, 0.2, seed=0))
    assert (wrong != material.wrong_labels(labels, ids, 3, 0.2, seed=1)).any()


def test_an_arm_says_what_differs():
    arm = parse_arm("fsam:keep_ratio=0.3,refresh_every=5,rho=0.05/0.01", FinetuneConfig())
    assert arm.name == "fsam:keep_ratio=0.3,refresh_every=5"
    assert arm.grid == (0.01, 0.05)
    assert (arm.config.keep_ratio, arm.config.refresh_every) == (0.3, 5)
    assert parse_arm("adamw:epochs=10", FinetuneConfig()).config.epochs == 10.0
    assert parse_arm("sam", FinetuneConfig()).grid == (0.01,)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"methods": ("adam",)}, "methods must be among adamw, sam"),
        ({"methods": ("sam:keep_ratio=0.1",)}, "keep_ratio=0.1 is no setting of sharpness='sam'"),
        ({"methods": ("adamw:rho=0.1",)}, "rho=0.1 is no setting of sharpness='none'"),
        ({"methods": ("sam:rho=-1",)}, "rho must be >= 0 and finite, got -1.0"),
        ({"methods": ("sam:rho=x",)}, "'x' in 'sam:rho=x'; it must be a finite number"),
        ({"methods": ("sam:rho=0.1,rho=0.2",)}, "methods has rho twice"),
        ({"methods": ("sam:rho=0.1/0.2/0.1",)}, "methods has a radius twice"),
        ({"methods": ("adamw:epochs=2,epochs=3",)}, "methods has epochs twice"),
        ({"methods": ("adamw:epochs=inf",)}, "'inf' in 'adamw:epochs=inf'; it must be a finite"),
        ({"methods": ("adamw:drop=nan",)}, "'nan' in 'adamw:drop=nan'; it must be a finite"),
        ({"seeds": (-1,)}, r"^seeds must be in \[0, 2\^32\), got -1"),
        ({"methods": ("sam:model=x",)}, "it must be SETTING=VALUE with one of epochs"),
        ({"methods": ("sam", "sam:rho=0.1")}, "methods must differ in more than rho"),
        ({"sizes": (-1,)}, "sizes must be >= 0"),
        ({"seeds": ()}, "seeds must not be empty"),
        ({"seeds": (1, 1)}, "seeds must not hold a value twice"),
        ({"select_seeds": ()}, "select_seeds must not be empty"),
        ({"noise": (1.0,)}, r"noise must be shares in \[0, 1\)"),
        ({"base": FinetuneConfig(seed=3)}, "base.seed is not used here: seeds has the seeds"),
        ({"base": FinetuneConfig(data=DataConfig(limit=3))}, "base.data.limit is not used here"),
        ({"base": FinetuneConfig(data=DataConfig(task="lm"))}, "base.data.task must be class"),
    ],
)
def test_mistakes_are_one_sentence(given, said):
    with pytest.raises(ValueError, match=said):
        CompareConfig(**given)


def test_the_command_line(reviews, tmp_path, capsys):
    assert cli.main(["compare", "flat-minimum"]) == 2
    assert "did you mean 'flat-minima'" in capsys.readouterr().err
    given = ["compare", f"--base.model={reviews.model}", f"--sources={reviews.a}", "--sizes=500"]
    given += ["--base.data.max-length=8", "--base.data.buckets=8", f"--out={tmp_path / 'x'}"]
    assert cli.main(given) == 2
    assert "sizes=500 is more than the" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main([*given[:-1], f"--out={tmp_path / 'file'}"]) == 2
    assert "is a file; choose another --out" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    assert cli.main([*given[:-1], f"--out={tmp_path / 'run'}", "--resume"]) == 2
    assert "is a run of steppe finetune" in capsys.readouterr().err
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "notes").touch()
    assert cli.main([*given[:-1], f"--out={tmp_path / 'y'}"]) == 2
    assert "already holds other files (notes)" in capsys.readouterr().err


@pytest.mark.parametrize("more", [{}, {"dry_run": True}])
def test_an_arm_that_cannot_run_is_found_before_any_training(reviews, tmp_path, more):
    methods = ("adamw", "sam:rho=0.01,ascent=3")
    config = small(reviews, tmp_path / "x", methods=methods, **more)
    with pytest.raises(ValueError, match="methods: sam:ascent=3: ascent=3 does not divide the 16"):
        command.run(config)
    assert not (tmp_path / "x" / "config.json").exists()


def test_what_has_not_run_may_be_left_out(done, tmp_path):
    config, _, _ = done
    begun = tmp_path / "begun"
    begun.mkdir()
    wider = dataclasses.replace(config, out=str(begun), seeds=(0, 1, 2), sizes=(*config.sizes, 9))
    (begun / "config.json").write_text(json.dumps(config_.to_dict(wider)))
    (begun / "runs.jsonl").write_text((Path(config.out) / "runs.jsonl").read_text())
    found = command.run(dataclasses.replace(config, out=str(begun), resume=True))
    assert found["trials"] == found["of"]


def test_other_settings_are_not_gone_on_with(done):
    config, _, _ = done
    for more, said in (
        ({"select_by": "loss"}, "select_by was 'accuracy'"),
        ({"base": dataclasses.replace(config.base, epochs=3.0)}, "epochs was 2.0"),
        ({"methods": ("adamw",)}, "sam is not among those given now"),
        ({"seeds": (0, 2)}, "has seeds 0 1, and 1 is not among"),
        ({"methods": ("adamw", "sam:rho=0.3")}, "sam with rho 0.* not name .0.3.: add it"),
    ):
        with pytest.raises(ValueError, match=said):
            command.run(dataclasses.replace(config, resume=True, **more))


def test_a_comparison_of_before_can_be_gone_on_with(done):
    config, _, found = done
    file = Path(config.out) / "config.json"
    whole = file.read_text()
    values = json.loads(whole)
    del values["base"]["sharpness"], values["base"]["optim"]["clip_norm"], values["ball"]
    file.write_text(json.dumps(values))
    again = command.run(dataclasses.replace(config, resume=True))
    assert again["cells"] == found["cells"]
    assert json.loads(file.read_text()) == json.loads(whole)


def test_a_report_is_written_again(done, capsys):
    out = Path(done[0].out)
    before = {name: (out / name).read_text() for name in ("table.md", "report.html")}
    for name in before:
        (out / name).unlink()
    assert cli.main(["report", str(out)]) == 0
    assert {name: (out / name).read_text() for name in before} == before
    assert "32 training examples" in capsys.readouterr().out


def test_a_plan_is_counted_and_timed(reviews, tmp_path):
    config = small(reviews, tmp_path / "x", dry_run=True)
    plan = command.run(config)
    assert not (tmp_path / "x").exists()
    assert plan["runs"] == schedule.count(config) == 7
    assert plan["steps"] == 7 * 4
    assert plan["gradients"] == 4 * (3 * 1 + 4 * 2)
    assert plan["seconds"] > 0


def test_the_recipe_is_what_it_says():
    from steppe.launch.recipes import flat_minima

    config = flat_minima()
    assert [arm.name for arm in config.arms()] == ["adamw", "sam", "asam", "fsam:keep_ratio=0.1"]
    assert min(config.arms()[1].grid) == 0.002
    assert schedule.count(config) == 6 * 50
    assert config.cells()[:2] == (
        Cell("asset:vader/movies", 250, 0.0),
        Cell("asset:vader/products", 250, 0.0),
    )
    assert config_.to_dict(config)["base"]["batch_size"] == 16


def test_pairs_are_compared_as_pairs():
    stats = pytest.importorskip("scipy.stats")
    a = np.array([0.80, 0.82, 0.79, 0.85, 0.81])
    b = a + np.array([0.01, 0.02, 0.015, 0.005, 0.01])
    found = paired(a, b)
    other = stats.ttest_rel(b, a)
    assert found.p_t == pytest.approx(other.pvalue)
    low, high = other.confidence_interval()
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.p_sign == 2 / 32  # the least that five pairs can give
    assert paired(b, a).difference == -found.difference
    assert paired(a, a)._replace(level=0)[3:] == (0, 1.0, 1.0, 5)
    assert math.isnan(paired([0.1], [0.2]).p_t)
    many = np.random.default_rng(0).normal(0.0, 1.0, (2, 30))
    assert paired(*many).p_sign == pytest.approx(paired(*many).p_t, abs=0.05)
    with pytest.raises(ValueError, match="must be finite"):
        paired([0.1, math.nan], [0.1, 0.2])
    with pytest.raises(ValueError, match="one value a pair"):
        paired([0.1], [0.1, 0.2])


def test_rho_is_an_array_of_the_state(reviews, tmp_path):
    config = small(reviews, tmp_path)
    built = Trials(config).build(config.cells()[0], config.arms()[1], 0)
    state = with_rho(start(built), 0.25)
    assert float(state.opt_state.hyperparams["rho"]) == 0.25


def test_esam_draws_by_the_seed_of_the_trial_whichever_came_first(reviews, tmp_path):
    config = small(reviews, tmp_path, methods=("adamw", "esam:rho=0.1"))
    trials = Trials(config)
    arm = config.arms()[1]
    keys = []
    for seed in (1, 0, 1):
        state = with_seed(start(trials.build(config.cells()[0], arm, seed)), seed)
        keys.append(np.asarray(state.opt_state.inner_state.key).tolist())
    assert keys[0] == keys[2] != keys[1]
    alone = start(Trials(config).build(config.cells()[0], arm, 0))
    assert keys[1] == np.asarray(alone.opt_state.inner_state.key).tolist()


@pytest.mark.parametrize(
    "more",
    [{"sizes": (32, 9999)}, {"transfer": ("file:/nowhere.jsonl",)}],
    ids=["too few rows in a later cell", "no such source"],
)
def test_a_mistake_is_found_before_anything_runs_and_leaves_the_folder_free(
    reviews, tmp_path, more
):
    out = tmp_path / "out"
    with pytest.raises((ValueError, OSError), match="9999|nowhere"):
        command.run(small(reviews, out, **more))
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"select_seeds": (0,)}, r"both have \[0\]"),
        ({"select_seeds": (7, 7)}, "select_seeds must not hold a value twice"),
        ({"ball": math.inf}, "ball must be > 0 and finite"),
        ({"methods": ("adamw", "fsam:fisher=foo")}, "fisher must be"),
    ],
)
def test_settings_that_would_make_the_table_untrue(reviews, tmp_path, more, said):
    with pytest.raises(ValueError, match=said):
        small(reviews, tmp_path, **more)


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"base": 3}')
    with pytest.raises(ValueError, match="FinetuneConfig must be an object, got int"):
        command.report(tmp_path)
