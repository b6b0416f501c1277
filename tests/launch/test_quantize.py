"""``steppe quantize`` on a tiny model: every row is its method on the model, what is written opens
again with the same answers, a kill loses one row, and mistakes are one line."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest

from steppe.launch import cli
from steppe.launch import config as config_
from steppe.launch.config import DataConfig, FinetuneConfig
from steppe.launch.quantize import command, table
from steppe.launch.quantize.settings import QuantizeConfig
from steppe.launch.report import quantizing
from steppe.models import packed, pretrained, quantized, tree
from steppe.models.heads import HeadConfig
from steppe.train.quantize import baselines

from .test_merge import WORDS, export, network

pytestmark = pytest.mark.slow
METHODS = ("rtn", "gptq", "smooth", "zsaq")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run folder: a classifier with its data."""
    root = tmp_path_factory.mktemp("quantize")
    rng = random.Random(0)
    rows = []
    for number in range(80):
        label = rng.choice(["neg", "pos"])
        said = rng.choice(WORDS[:2] if label == "pos" else WORDS[2:4])
        rows.append({"id": f"r{number}", "text": f"plot was {said}", "label": label})
    data = root / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = network(HeadConfig("classification", 2)).build()
    params = jax.tree.map(
        lambda x: 8.0 * x if x.ndim > 1 else x, jax.jit(model.init)(jax.random.key(0))
    )
    run = root / "run"
    export(run / "model", model, params, ("neg", "pos"))
    settings = DataConfig(source=f"file:{data}", max_length=8, buckets=())
    made = FinetuneConfig(model=str(run / "model"), data=settings)
    (run / "config.json").write_text(json.dumps(config_.to_dict(made)))
    return root, run, model, params, data


@pytest.fixture(scope="module")
def done(world):
    """All methods, stopped after two rows and gone on with."""
    root, run, *_ = world
    config = QuantizeConfig(
        str(run), str(root / "out"), ("w4a8",), METHODS, examples=16, steps=4, k_min=2,
        batch_size=4, length=6, seeds=(0, 1), speed=1,
    )  # fmt: skip
    honest, calls = command.row, []

    def row(*args):
        calls.append(args[2:5])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(*args)

    patch = pytest.MonkeyPatch()
    patch.setattr(command, "row", row)
    with pytest.raises(KeyboardInterrupt, match="2 finished rows .* --resume"):
        command.run(config)
    found = command.run(dataclasses.replace(config, resume=True), ["steppe", "quantize", "x"])
    patch.undo()
    return config, calls, found, root / "out"


def test_every_row_ran_once(done):
    config, calls, found, _ = done
    assert len(calls) == len(config.rows()) + 1 == 6
    assert [(row["method"], row["seed"]) for row in found["rows"]] == [
        ("rtn", 0), ("gptq", 0), ("smooth", 0), ("zsaq", 0), ("zsaq", 1)
    ]  # fmt: skip
    assert [line["seeds"] for line in found["table"]] == [1, 1, 1, 2]


def test_a_row_is_its_method_and_its_folder_answers_like_it(done, world):
    _, _, found, out = done
    _, _, model, params, _ = world
    rules = quantized.parse("w4a8")
    grids = quantized.quantize(params, rules)
    loaded = packed.load(out / "w4a8-rtn")
    wanted = quantized.dequantize(grids)
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    row = found["rows"][0]
    errors = baselines.errors(params, grids)
    for name, error in errors.items():
        assert row["errors"][name]["sqnr"] == pytest.approx(error.sqnr, rel=1e-4)
    assert row["size"]["float32"] == 4 * sum(
        leaf.size for path, leaf in _kernels(params).items() if path
    )
    assert set(row["speed"]["ratio"]) == {"float", "rounded", "integer"}
    assert row["speed"]["ratio"]["float"]["median"] == 1.0
    assert 0 <= row["agreement"] <= 1
    batch = {"input_ids": np.array([[2, 5, 6, 3]]), "attention_mask": np.ones((1, 4), np.int32)}
    student = quantized.wrap(model, rules, weights=False)
    np.testing.assert_allclose(
        loaded.model.apply(loaded.params, batch).logits,
        student.apply(wanted, batch).logits,
        atol=1e-5,
    )


def _kernels(params):
    from steppe.models import tree

    return {
        p: x for p, x in tree.flatten(params).items() if p.startswith("layers/") and "kernel" in p
    }


def test_gptq_uses_the_data_and_zsaq_none(done):
    _, _, found, out = done
    rows = {(row["method"], row["seed"]): row for row in found["rows"]}
    rtn, gptq = (rows[name, 0]["errors"] for name in ("rtn", "gptq"))
    assert any(gptq[k]["mse"] > rtn[k]["mse"] for k in rtn)  # it trades weights for outputs
    game = (out / "w4a8-zsaq-seed0-game" / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(line)["loss"]) for line in game)
    assert "held_out" in json.loads(game[-1])  # four iterations, and a look at the champion
    assert len(rows["zsaq", 0]["samples"]) == 4
    record = json.loads((out / "w4a8-zsaq-seed1" / "quantized.json").read_text())
    assert record["notes"]["rho"] == 0.05
    assert record["notes"]["seed"] == 1
    assert "calibration" not in record["notes"]


def test_rows_are_added_and_none_is_lost(world, tmp_path):
    """Another seed is another folder; what an earlier run asked for stays in the table."""
    _, run, *_ = world
    config = QuantizeConfig(
        str(run), str(tmp_path / "out"), ("w4a8",), ("rtn", "random"), examples=16, steps=1,
        k_min=1, student_lr=1e-2, batch_size=4, length=6, seeds=(0,), speed=0,
    )  # fmt: skip
    command.run(config)
    first = (tmp_path / "out" / "w4a8-random-seed0" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "w2a8-rtn").mkdir()
    (tmp_path / "out" / "w2a8-rtn" / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match=r"w2a8-rtn holds other files \(mine.txt\)"):
        command.run(dataclasses.replace(config, bits=("w2a8",), resume=True))
    more = dataclasses.replace(config, bits=("w3a8",), seeds=(7,), resume=True)
    found = command.run(more)
    names = [row["folder"] for row in found["rows"]]
    assert names == ["w4a8-rtn", "w4a8-random-seed0", "w3a8-rtn", "w3a8-random-seed7"]
    assert (tmp_path / "out" / "w4a8-random-seed0" / "model.safetensors").read_bytes() == first
    # What the float classifier's answers tell of made inputs, beside what they tell of the data.
    told = [row.get("information") for row in found["rows"]]
    assert told[0] is None
    assert 0 <= told[1] <= np.log(2)
    assert 0 <= found["float"]["information"] <= np.log(2)
    found["float"]["information"], found["rows"][1]["information"] = 0.5, 0.01
    assert (
        "w4a8-random-seed0: the float model answers the made inputs almost alike"
        in (table.warnings(found)[0])
    )
    # A row whose folder is gone runs again; a line that lacks what a row has is refused.
    (tmp_path / "out" / "w3a8-rtn" / packed.FILE).unlink()
    (tmp_path / "out" / "w3a8-rtn" / "model.safetensors").unlink()
    (tmp_path / "out" / "w3a8-rtn" / "config.json").unlink()
    for file in (tmp_path / "out" / "w3a8-rtn").iterdir():
        file.unlink()
    command.run(more)
    assert packed.is_packed(tmp_path / "out" / "w3a8-rtn")
    with (tmp_path / "out" / command.FILE).open("a") as lines:
        lines.write('{"bits": "w8a8", "method": "rtn", "seed": 0}\n')
    with pytest.raises(ValueError, match="rows.jsonl, line 6 is damaged"):
        command.run(more)


def test_ceilings_learn_from_the_training_split(world, tmp_path, capsys):
    _, run, model, params, _ = world
    config = QuantizeConfig(
        str(run), str(tmp_path / "out"), ("w2a8",), ("rtn", "data", "qat"), steps=10, k_min=3,
        student_lr=3e-2, batch_size=16, seeds=(5,), speed=0,
    )  # fmt: skip
    found = command.run(config)
    rows = {row["method"]: row for row in found["rows"]}
    # One learns the float model's answers, the other the labels, which that does not know.
    assert rows["data"]["agreement"] >= rows["rtn"]["agreement"]
    assert rows["qat"]["metrics"]["loss"] < rows["rtn"]["metrics"]["loss"]
    record = json.loads((tmp_path / "out" / "w2a8-qat-seed5" / "quantized.json").read_text())
    assert record["notes"]["student_lr"] == 3e-2
    assert "generator_lr" not in record["notes"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "qat, seed 5: training loss" in page
    folder = export(tmp_path / "bare", model, params)
    words = ["quantize", str(folder), "--out", str(tmp_path / "b"), "--method", "qat"]
    assert cli.main(words) == 2
    assert "learns from the training split, and no data is named" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_page_table_and_evaluation(done, world, capsys):
    _, _, found, out = done
    _, _, _, _, data = world
    again = json.loads((out / "quantize.json").read_text())
    page = (out / "report.html").read_text()
    assert page == quantizing.render(again, out)
    assert cli.main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == page
    assert "<script" not in page
    assert page.count("<svg") == 5  # scores, sizes, kernels, two games
    cells = table.lines(found)
    assert cells[0][0] == "float"
    assert [row[0] for row in cells[1:]] == [f"w4a8 {name}" for name in METHODS]
    words = ["evaluate", str(out / "w4a8-rtn"), f"--data.source=file:{data}", "--data.max-length=8"]
    said = out.parent / "said.json"
    assert cli.main([*words, "--data.buckets=8", "--split=test", f"--out={said}"]) == 0
    score = json.loads(said.read_text())["metrics"]["accuracy"]
    assert score == pytest.approx(found["rows"][0]["metrics"]["accuracy"])
    assert cli.main(["quantize", str(out / "w4a8-rtn"), "--out", str(out.parent / "b")]) == 2
    assert "is quantized already" in capsys.readouterr().err


def test_without_data_it_rounds_and_scores_nothing(world, tmp_path):
    _, _, model, params, _ = world
    folder = export(tmp_path / "bare", model, params)
    config = QuantizeConfig(
        str(folder), str(tmp_path / "out"), ("w8a8",), ("rtn", "gptq"), calibration="noise",
        examples=8, batch_size=4, length=6, speed=0,
    )  # fmt: skip
    found = command.run(config)
    assert found["metric"] is None
    assert all("metrics" not in row for row in found["rows"])
    assert pretrained.load_config(tmp_path / "out" / "w8a8-gptq").width == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bits", "w9a8"], "--bits must be schemes such as w8a8, w4a16 or w4a8-g64, of 2 to 8"),
        (["--bits", "w16a16"], "--bits must round something, got 'w16a16'"),
        (["--bits", "w8a8", "W8A8"], "bits must not hold a scheme twice, w8a8 and W8A8 are one"),
        (["--bits", "eight"], "(16: as it is), got 'eight'"),
        (["--method", "round"], "method"),
        (["--bits", "w4a8-g5"], "bits=w4a8-g5: group must divide"),
        (["--method", "zsaq", "--info-bonus", "-1"], "--info-bonus must be >= 0"),
        (["--method", "zsaq", "--candidates", "-1"], "--candidates must be >= 0"),
        (["--method", "zsaq", "--candidates", "99999"], "candidates must be 0, or from 2 to the "),
        (["--candidates", "4", "--adapter", "linear"], "--candidates must be 0 with"),
        (["--start", "gptq"], "start='gptq' is of methods that learn (zsaq, sgd-sga, random"),
        (["--images", "noise"], "images=noise does not go with "),
        (["--rho", "-1"], "rho must be >= 0 and finite"),
        (["--seeds", "-1"], "seeds must be >= 0"),
        ([], "out must name the new folder"),
    ],
)
def test_mistakes(options, said, world, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")] if options else []
    assert cli.main(["quantize", str(world[1]), *options, *out]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_game_begins_where_gptq_ends(world, tmp_path):
    """At rate 0 the student stays there, and answers like GPTQ on the same inputs."""
    _, run, *_ = world
    config = QuantizeConfig(
        str(run), str(tmp_path / "out"), ("w3a8",), ("gptq", "random"), calibration="noise",
        examples=8, steps=1, k_min=1, student_lr=0.0, start="gptq", batch_size=4, length=6,
        speed=0,
    )  # fmt: skip
    found = command.run(config)
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["random"]["errors"] == rows["gptq"]["errors"]
    assert rows["random"]["metrics"] == rows["gptq"]["metrics"]
    record = json.loads((tmp_path / "out" / "w3a8-random-seed0" / "quantized.json").read_text())
    assert (record["notes"]["start"], record["notes"]["calibration"]) == ("gptq", "noise")


def test_what_belongs_to_others_is_not_overwritten(world, tmp_path, capsys):
    _, run, *_ = world
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("mine")
    words = ["quantize", str(run), "--out", str(out)]
    for more in ([], ["--resume"]):
        assert cli.main([*words, *more]) == 2
        said = capsys.readouterr().err
        assert "already holds other files (report.html); choose another --out" in said
    assert (out / "report.html").read_text() == "mine"
    assert cli.main(["quantize", str(run), "--out", str(run)]) == 2
    assert "is not of this command" in capsys.readouterr().err


def test_a_run_that_failed_before_its_first_row_can_be_repeated(world, tmp_path, capsys):
    """Weights that are numbers, activations that are none: named, and nothing is in the way."""
    _, _, model, params, _ = world
    grown = tree.map_with_path(lambda p, x: 1e25 * x if "ffn" in p else x, params)
    folder = export(tmp_path / "grown", model, grown)
    words = ["quantize", str(folder), "--out", str(tmp_path / "out"), "--length", "6"]
    learns = [*words, "--method", "random", "--steps", "1", "--k-min", "1", "--batch-size", "4"]
    for _ in range(2):
        assert cli.main(learns) == 2
        assert "answers made inputs with NaN or infinity" in capsys.readouterr().err


def test_no_model_and_no_data(world, tmp_path, capsys):
    assert cli.main(["quantize", "--out", str(tmp_path / "o")]) == 2
    assert "no model is named" in capsys.readouterr().err
    _, _, model, params, _ = world
    folder = export(tmp_path / "bare", model, params)
    words = ["quantize", str(folder), "--method", "gptq", "--out", str(tmp_path / "o")]
    assert cli.main([*words, "--speed", "0"]) == 2
    assert "names no data to calibrate with" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    headless = network(None).build()
    folder = export(tmp_path / "headless", headless, jax.jit(headless.init)(jax.random.key(0)))
    words = ["quantize", str(folder), "--method", "zsaq", "--out", str(tmp_path / "o")]
    assert cli.main(words) == 2
    assert "learns the answers of a head" in capsys.readouterr().err
    broken = tree.replace(params, {"embed/norm/scale": params["embed"]["norm"]["scale"] * np.nan})
    folder = export(tmp_path / "broken", model, broken)
    assert cli.main(["quantize", str(folder), "--out", str(tmp_path / "o")]) == 2
    assert "holds NaN or infinity in 'embed/norm/scale'" in capsys.readouterr().err
    (tmp_path / "o" / "w8a8-rtn").mkdir(parents=True)
    (tmp_path / "o" / "w8a8-rtn" / "mine.txt").write_text("x")
    words = ["quantize", str(tmp_path / "bare"), "--out", str(tmp_path / "o"), "--resume"]
    assert cli.main(words) == 2
    assert "already holds other files (w8a8-rtn)" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["w8a8-rtn"]


@pytest.mark.parametrize("method", ["data", "zsaq", "random"])
def test_a_regression_has_no_distributions(method, tmp_path, capsys):
    """It is refused before anything is written."""
    model = network(HeadConfig("regression", 1)).build()
    params = jax.jit(model.init)(jax.random.key(0))
    data = tmp_path / "data.jsonl"
    rows = [{"id": f"r{n}", "text": "plot was good", "label": float(n % 3)} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, out = tmp_path / "run", tmp_path / "out"
    export(run / "model", model, params)
    settings = DataConfig(source=f"file:{data}", task="regression", max_length=8, buckets=())
    made = FinetuneConfig(model=str(run / "model"), data=settings)
    (run / "config.json").write_text(json.dumps(config_.to_dict(made)))
    assert cli.main(["quantize", str(run), "--method", method, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"method {method!r} compares distributions" in said
    assert "--divergence" in said
    assert not out.exists()
