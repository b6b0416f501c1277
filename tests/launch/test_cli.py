"""The command line as a user meets it: a tiny model, tiny data, every mistake in one line."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from steppe.launch import cli, config, papers, recipes
from steppe.models import pretrained
from steppe.models.encoder import EncoderConfig

from .conftest import SHORT

WORDS = ["good", "fine", "nice", "bad", "poor", "sad", "film", "plot", "the", "a", "was", "very"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny BERT, its vocabulary, and a separable sentiment file."""
    root = tmp_path_factory.mktemp("world")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    model = EncoderConfig(
        "bert", len(vocab), 16, 2, 2, 32, 24, types=2, pooler=True, drop=0.0, attn_drop=0.0
    ).build()
    # Wider initial values than a pretrained model would need, so that 48 steps are enough.
    params = jax.tree.map(
        lambda x: 8.0 * x if x.ndim > 1 else x, jax.jit(model.init)(jax.random.key(0))
    )
    pretrained.save(root / "model", model, params)
    (root / "model" / "vocab.txt").write_text("\n".join(vocab) + "\n")
    (root / "model" / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    rng = random.Random(0)
    rows = []
    for _ in range(240):
        positive = rng.random() < 0.5
        said = rng.choice(WORDS[:3] if positive else WORDS[3:6])
        text = f"{rng.choice(WORDS[8:])} {rng.choice(WORDS[6:8])} was {said}"
        rows.append({"text": text, "label": "pos" if positive else "neg"})
    with (root / "data.jsonl").open("w") as stream:
        for number, row in enumerate(rows):
            stream.write(json.dumps({"id": f"r{number}", **row}) + "\n")
    return root


def arguments(world, out, *more):
    return [
        "finetune",
        f"--model={world / 'model'}",
        f"--data.source=file:{world / 'data.jsonl'}",
        *SHORT,
        "--drop=0",
        "--log-every=1",
        f"--out={out}",
        *more,
    ]


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


@pytest.fixture(scope="module")
def finished(world):
    run = world / "run"
    assert cli.main(arguments(world, run, "--steps=48")) == 0
    return run


def test_a_run_leaves_everything(finished, world):
    for name in (
        "config.json",
        "metrics.jsonl",
        "results.json",
        "report.html",
        "predictions.jsonl",
    ):
        assert (finished / name).stat().st_size > 100, name
    results = json.loads((finished / "results.json").read_text())
    assert results["metrics"]["test"]["accuracy"] > 0.9
    assert set(results["baselines"]) == {"majority class", "frozen features + logistic regression"}
    loaded = pretrained.load(finished / "model")
    assert loaded.labels == ("neg", "pos")
    assert loaded.fresh == ()
    assert (finished / "model" / "vocab.txt").is_file()
    assert config.read(finished).data.source == f"file:{world / 'data.jsonl'}"
    rows = (finished / "predictions.jsonl").read_text().splitlines()
    assert len(rows) == results["data"]["test"]


def test_evaluate_gives_the_same_numbers(finished, tmp_path, capsys):
    out = tmp_path / "e.json"
    assert cli.main(["evaluate", str(finished), f"--out={out}"]) == 0
    again = json.loads(out.read_text())["metrics"]
    first = json.loads((finished / "results.json").read_text())["metrics"]["test"]
    assert again == pytest.approx(first, abs=1e-5)
    assert "accuracy" in capsys.readouterr().out


def test_evaluate_on_other_data_takes_all_of_it(finished, world, tmp_path):
    """Another file is not split again, its numbers are classes by value, settings can be undone."""
    rows = [json.loads(line) for line in (world / "data.jsonl").read_text().splitlines()]
    other = tmp_path / "other.csv"
    other.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows[:30]))
    out = tmp_path / "e.json"
    assert cli.main(["evaluate", str(finished), f"--data.source=file:{other}", f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert found["data"] == {"source": f"file:{other}", "split": "all", "examples": 30}
    assert found["metrics"]["accuracy"] > 0.9
    positive = tmp_path / "positive.csv"  # one class only: the model knows the others
    positive.write_text("text,label\nthe film was good,pos\n")
    assert cli.main(["evaluate", str(finished), f"--data.source=file:{positive}"]) == 0


def test_resume_notices_other_labels(world, tmp_path, capsys):
    file, run = tmp_path / "data.jsonl", tmp_path / "run"
    text = (world / "data.jsonl").read_text()
    file.write_text(text)
    source = f"--data.source=file:{file}"
    more = (source, "--steps=4", "--save-every=2", "--no-baselines")
    assert cli.main(arguments(world, run, *more)) == 0
    capsys.readouterr()
    file.write_text(text.replace('"pos"', '"x"').replace('"neg"', '"pos"').replace('"x"', '"neg"'))
    assert cli.main(arguments(world, run, *more, "--resume")) == 2
    assert "another content" in capsys.readouterr().err


def test_lora_run_exports_a_merged_model(world, tmp_path):
    more = ("--steps=4", "--lora.rank=2", "--ema=0.9", "--no-baselines", "--compute-dtype=bfloat16")
    assert cli.main(arguments(world, tmp_path / "run", *more)) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["model"]["trainable"] < results["model"]["parameters"] / 10
    assert results["model"]["largest_logit_difference_after_merge"] < 1e-4
    assert pretrained.load(tmp_path / "run" / "model").fresh == ()


@pytest.mark.parametrize("task", ["regression", "token", "mlm"])
def test_other_tasks_run(world, tmp_path, task):
    rows = []
    for number in range(60):
        words = [WORDS[(number + k) % len(WORDS)] for k in range(5)]
        rows.append(
            {
                "id": str(number),
                "text": " ".join(words),
                "score": float(number % 7),
                "words": words,
                "tags": ["A" if w in WORDS[:6] else "B" for w in words],
            }
        )
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {
        "regression": ["--data.label=score"],
        "token": ["--data.text=words", "--data.label=tags"],
        "mlm": [],
    }[task]
    more = ["--steps=3", f"--data.source=file:{file}", f"--data.task={task}", *columns]
    assert cli.main(arguments(world, tmp_path / "run", *more)) == 0
    assert (tmp_path / "run" / "report.html").is_file()


def test_freeze_and_mesh_and_microbatches_change_nothing_else(world, tmp_path):
    """One device, and four devices with two micro-batches: the same losses."""
    a, b = tmp_path / "a", tmp_path / "b"
    common = ("--steps=5", "--freeze", "embed/.*", "--no-baselines")
    assert cli.main(arguments(world, a, *common, "--mesh=data=8")) == 0
    assert cli.main(arguments(world, b, *common, "--mesh=data=4,model=2", "--microbatches=2")) == 0
    assert losses(a) == pytest.approx(losses(b), abs=1e-5)


def test_resumed_on_another_mesh(world, tmp_path):
    """Stopped half-way on one mesh, continued on another: the losses of the whole run."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    more = ("--steps=6", "--save-every=3", "--no-baselines", "--optim.schedule=constant")
    assert cli.main(arguments(world, whole, *more, "--mesh=data=8")) == 0
    assert cli.main(arguments(world, run, *more, "--mesh=data=8")) == 0
    shutil.rmtree(run / "checkpoints" / "6")
    more = (*more, "--mesh=data=4,model=2", "--microbatches=2", "--resume")
    assert cli.main(arguments(world, run, *more)) == 0
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)


def test_dry_run_writes_nothing(world, tmp_path, capsys):
    assert cli.main(arguments(world, tmp_path / "run", "--dry-run")) == 0
    shown = capsys.readouterr().out
    assert "parameters" in shown
    assert "peak per device" in shown
    assert "FLOPs" in shown
    assert len(shown.splitlines()) < 20  # a table that is read, not all settings
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_killed_and_resumed_is_bitwise_the_same(world, tmp_path):
    """SIGKILL in the middle, then --resume, against the run that nobody disturbed."""
    more = ("--steps=30", "--save-every=3", "--no-baselines")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "steppe.launch.cli"]
    subprocess.run([*command, *arguments(world, whole, *more)], check=True, env=env, timeout=300)
    process = subprocess.Popen([*command, *arguments(world, broken, *more)], env=env)
    deadline = time.time() + 240
    while time.time() < deadline and process.poll() is None:
        file = broken / "metrics.jsonl"
        if file.is_file() and len(file.read_text().splitlines()) >= 11:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert max(losses(broken)) < 30, "it ended before it could be killed"
    resumed = [*command, *arguments(world, broken, *more, "--resume")]
    subprocess.run(resumed, check=True, env=env, timeout=300)
    assert losses(broken) == losses(whole)
    left, right = (pretrained.load(run / "model").params for run in (whole, broken))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), left, right))


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(world, tmp_path):
    run = tmp_path / "run"
    more = ("--steps=5000", "--no-baselines")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "steppe.launch.cli", *arguments(world, run, *more)],
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.time() + 240
    while time.time() < deadline and not (run / "metrics.jsonl").is_file():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "--resume" in said
    assert [p for p in (run / "checkpoints").iterdir() if p.name.isdigit()]


# --- mistakes ---------------------------------------------------------------------------


def mistake(capsys, args, *says):
    assert cli.main([str(a) for a in args]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("steppe: error: ")
    assert "\n" not in said
    for words in says:
        assert words in said, said


def test_unknown_names_get_a_suggestion(capsys):
    mistake(capsys, ["finetun"], "did you mean 'finetune'?")
    mistake(capsys, ["finetune", "vader-movie"], "did you mean 'vader-movies'?")
    mistake(capsys, ["finetune", "--batch-sise", "3"], "--batch-sise")
    mistake(capsys, ["finetune", "--batch-size", "x"], "--batch-size")
    mistake(capsys, ["tour", "--layer", "3"], "Perhaps you meant: --layers INT")
    mistake(capsys, ["assets", "fetch", "zork"], "unknown asset 'zork'")
    mistake(capsys, ["assets", "fetch", "vadr"], "did you mean 'vader'?")
    mistake(capsys, ["papers", "fsma"], "did you mean 'fsam'?")
    mistake(capsys, ["papers", "FSMA"], "did you mean 'fsam'?")
    mistake(capsys, ["assets", "ftch"], "did you mean 'fetch'?")
    mistake(capsys, ["overlays", "lisst"], "did you mean 'list'?")
    mistake(capsys, ["completion", "bas"], "did you mean 'bash'?")
    mistake(capsys, ["bench", "overlay-stp"], "did you mean 'overlay-step'?")
    mistake(capsys, ["finetune", "--sharpness", "fsma"], "did you mean 'fsam'?", "expected one of")
    mistake(capsys, ["finetune", "--overlay", "lroa"], "did you mean 'lora'?")
    mistake(capsys, ["finetune", "--overlay", "lora:rnk=3"], "did you mean 'rank'?")
    mistake(capsys, ["compare", "--methods", "adamw", "fsma"], "did you mean 'fsam'?")


def test_settings_out_of_range(capsys, world, tmp_path):
    out = tmp_path / "run"
    for more, says in [
        (["--batch-size=0"], "--batch-size must be >= 1, got 0"),
        (["--epochs=0"], "epochs must be > 0"),
        (["--ema=1"], "ema must be in [0, 1), got 1.0"),
        (["--batch-size=6", "--microbatches=4", "--mesh=data=8"], "batch_size=6"),
        (["--mesh=data=3"], "devices"),
        (["--mesh=data:3"], "mesh must look like data=4,model=2"),
        (["--data.limit=-5"], "--data.limit must be >= 0, got -5"),
        (["--data.pair=b"], "data.pair='b' is not read by a classification task"),
        (["--data.max-length=99"], "longer than the model's 24 positions"),
        (["--freeze", "nothing"], "freeze='nothing' matches no parameter"),
        (["--lora.rank=99"], "rank must be <= 16"),
        (["--lora.rank=2", "--lora.sites", "attn.x"], "no dense layer at site 'attn.x'"),
    ]:
        mistake(capsys, arguments(world, out, *more), says)
        assert not out.exists(), more


def test_bad_data(capsys, world, tmp_path):
    out = tmp_path / "run"

    def file(name, text, encoding="utf-8"):
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        return f"--data.source=file:{path}"

    few = "".join(f'{{"id": "{i}", "text": "good", "label": "x{i % 2}"}}\n' for i in range(40))
    for source, more, says in [
        (file("a.csv", "text,label\ngood,\n"), [], "row 0"),
        (file("b.csv", "txt,label\n" + "good,pos\nbad,neg\n" * 30), [], "has no column 'text'"),
        (file("c.txt", "caf\xe9\n", "latin-1"), ["--data.task=mlm"], "UTF-8"),
        (file("d.jsonl", few), ["--data.classes", "x0", "y"], "is not among the classes x0, y"),
        (file("e.jsonl", "".join(few.splitlines(True)[:2])), [], "empty"),
        (f"--data.source=file:{tmp_path / 'none.csv'}", [], "none.csv"),
        ("--data.source=ftp:x", [], "file:"),
    ]:
        mistake(capsys, arguments(world, out, source, *more), says)
        assert not out.exists(), source


def test_bad_models(capsys, world, tmp_path):
    out = tmp_path / "run"
    for name, damage, says in [
        ("gone", lambda d: shutil.rmtree(d), "does not exist"),
        ("cut", lambda d: os.truncate(d / "model.safetensors", 999), "truncated or damaged"),
        ("other", lambda d: _edit(d, model_type="gpt9"), "known families: bart, bert, "),
        ("shape", lambda d: _edit(d, intermediate_size=33), "config.json asks for"),
        ("vocab", _longer_vocabulary, "do not belong together"),
    ]:
        model = tmp_path / name
        shutil.copytree(world / "model", model)
        damage(model)
        mistake(capsys, arguments(world, out, f"--model={model}"), says)
        assert not out.exists(), name


def _edit(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_folders_are_never_overwritten(capsys, world, finished, tmp_path):
    before = (finished / "results.json").read_bytes()
    mistake(capsys, arguments(world, finished), "already holds another run", "--resume")
    more = ("--steps=48", "--resume", "--seed=5")
    mistake(capsys, arguments(world, finished, *more), "seed was 0, now it is 5")
    mistake(capsys, arguments(world, tmp_path / "none", "--resume"), "nothing to resume")
    assert (finished / "results.json").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    mistake(capsys, arguments(world, tmp_path), "already holds other files (notes.txt)")


def test_evaluate_mistakes(capsys, world, finished, tmp_path):
    mistake(capsys, ["evaluate", tmp_path / "none"], "does not exist")
    source = f"--data.source=file:{world / 'data.jsonl'}"
    mistake(capsys, ["evaluate", world / "model", source], "has no head to evaluate")
    mistake(
        capsys,
        ["evaluate", finished, "--data.classes", "a", "b", "c"],
        "not among the classes a, b, c",
    )


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    assert "finetune [RECIPE]" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert "jax " in capsys.readouterr().out
    assert cli.main(["finetune", "--help"]) == 0
    assert "--batch-size" in capsys.readouterr().out
    assert cli.main([]) == 2


def test_recipes_are_valid_and_round_trip():
    for name, recipe in recipes.RECIPES.items():
        made = recipe()
        assert made.out == f"runs/{name}"
        assert config.from_dict(config.FinetuneConfig, config.to_dict(made)) == made
        assert recipe.__doc__


def test_papers(capsys):
    assert cli.main(["papers"]) == 0
    shown = capsys.readouterr().out
    for paper in papers.PAPERS:
        assert (paper.command or f"from Python: {paper.function}") in shown
    baselines = sum(paper.baseline for paper in papers.PAPERS)
    assert f"{len(papers.PAPERS) - baselines} of 72 systems, and {baselines} that" in shown
    root = Path(__file__).resolve().parents[2]
    for paper in papers.PAPERS:
        capsys.readouterr()
        assert cli.main(["papers", paper.name.upper()]) == 0
        page = capsys.readouterr().out
        (file,) = [line[6:] for line in page.splitlines() if line.startswith("file: ")]
        assert (root / file).is_file(), file
    assert cli.main(["papers", "lora"]) == 0
    assert "rank=8" in capsys.readouterr().out
    mistake(capsys, ["papers", "zork"], "unknown system 'zork'")


def test_the_commands_of_papers_parse(monkeypatch):
    """Every one with settings that go together; what they run is cut off."""
    from steppe.launch import finetune
    from steppe.launch.distill import command as distillation

    ran = []
    for module in (finetune, distillation):
        monkeypatch.setattr(module, "run", lambda config, command=(): ran.append(config) or {})
    wanted = 0
    for paper in papers.PAPERS:
        words = paper.command.split()[1:]
        if words[:1] in (["finetune"], ["distill"]):
            wanted += 1
            assert cli.main(words) == 0, paper.command
    assert len(ran) == wanted > 20


def _longer_vocabulary(folder):
    file = folder / "vocab.txt"
    file.write_text(file.read_text() + "x\ny\n")


def test_resuming_a_complete_run_leaves_its_results(world, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(arguments(world, run)) == 0
    before = (run / "results.json").read_text()
    capsys.readouterr()
    assert cli.main(arguments(world, run, "--resume")) == 0
    assert (run / "results.json").read_text() == before
    assert "nothing is left to do" in capsys.readouterr().err
