"""``steppe distill``: what is computed, what is left behind, and every mistake in one line."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.launch import cli, config
from steppe.launch.config import DataConfig
from steppe.launch.distill import opened, recipes, schemes, settings
from steppe.launch.distill.build import build
from steppe.launch.distill.settings import DistillConfig
from steppe.launch.pieces import start
from steppe.models import pretrained, shrink
from steppe.train import distill

from .conftest import VOCAB, classes, save, write_lines, write_tokenizer


def results(run):
    return json.loads((run / "results.json").read_text())


def rows(run, kind="train"):
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if row["kind"] == kind]


def losses(run):
    return {row["step"]: row["loss"] for row in rows(run)}


def weights(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*.safetensors")}


def written(world, out, *more, task="chat"):
    return [
        "distill",
        f"--data.source={world.chats if task == 'chat' else world.texts}",
        f"--data.task={task}",
        "--data.max-length=24",
        "--data.buckets",
        "24",
        "--batch-size=8",
        "--optim.learning-rate=5e-3",
        "--log-every=1",
        "--samples=3",
        "--sample-tokens=6",
        f"--out={out}",
        *more,
    ]


# --- classes ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt(reviews, taught, tmp_path_factory):
    out = tmp_path_factory.mktemp("learnt") / "run"
    given = (f"--teacher={taught}", "--student=teacher:layers=1", f"--out={out}", "--drop=0")
    assert cli.main(classes(reviews, *given, "--steps=20", "--save-every=10")) == 0
    return out


def test_a_cut_student_learns_and_the_teacher_does_not_change(reviews, taught, learnt, tmp_path):
    found, before = results(learnt), results(taught)
    assert found["metrics"]["test"]["accuracy"] > 0.9
    assert set(found["before"]) == {"valid", "test"}
    teacher = found["distillation"]["teacher"]["metrics"]["test"]
    assert teacher == pytest.approx(before["metrics"]["test"], abs=1e-5)
    assert found["baselines"]["teacher"]["accuracy"] == teacher["accuracy"]
    # Agreement again, from what both runs wrote down.
    said = [
        {row["id"]: row["prediction"] for row in map(json.loads, file.read_text().splitlines())}
        for file in (run / "predictions.jsonl" for run in (taught, learnt))
    ]
    same = np.mean([said[0][key] == said[1][key] for key in said[0]])
    assert found["distillation"]["agreement"]["top1"] == pytest.approx(same)
    student = pretrained.load(learnt / "model")
    assert student.labels == ("neg", "pos")
    assert student.model.config.layers == 1
    sizes = found["distillation"]["sizes"]
    assert sizes["student"]["parameters"] == sum(x.size for x in jax.tree.leaves(student.params))
    assert sizes["student"]["parameters"] == found["model"]["parameters"]
    assert sizes["student"]["bytes"] == (learnt / "model" / "model.safetensors").stat().st_size
    assert sizes["share"] < 0.8
    speed = found["distillation"]["speed"]
    assert 0 < speed["low"] <= speed["ratio"] <= speed["high"]
    page = (learnt / "report.html").read_text()
    assert "Student and teacher" in page
    assert "<script" not in page
    assert config.read(learnt).data.source == reviews.a
    assert settings.read(learnt).teacher == str(taught)


def test_the_teacher_file_is_untouched(reviews, taught, tmp_path):
    held = weights(taught)
    given = (f"--teacher={taught}", f"--student={taught}", f"--out={tmp_path / 'run'}")
    more = ("--steps=2", "--drop=0", "--weight=1", "--optim.weight-decay=0")
    assert cli.main(classes(reviews, *given, *more)) == 0
    assert weights(taught) == held
    # A student that is its teacher has nothing to learn: no loss, no gradient.
    (first, *_) = rows(tmp_path / "run")
    assert abs(first["loss"]) < 1e-6
    assert first["grad_norm"] < 1e-4


def test_the_loss_is_that_of_the_two_models(reviews, taught, learnt):
    """The first row of the log from logits alone: half label loss, half T^2 KL."""
    loss = _first_loss(reviews, taught)
    assert losses(learnt)[1] == pytest.approx(loss(temperature=1.0), rel=1e-5)


def _first_logits(reviews, taught):
    """Of the first batch: logits of teacher (l) and student (s), labels, mask."""
    from steppe.data import batches
    from steppe.launch import setup

    data = config.read(taught).data
    origin = setup.origin(reviews.model)
    made = setup.prepare(
        dataclasses.replace(data, classes=("neg", "pos")),
        origin,
        pretrained.load_config(origin.weights),
    )
    batch = next(batches.train(made.splits["train"], 16, seed=0, buckets=(8, 12)))
    teacher = pretrained.load(taught / "model")
    student = shrink.student(teacher.model, teacher.params, layers=1)
    pairs = {"l": teacher, "s": student}
    found = {
        k: np.asarray(m.model.apply(m.params, batch).logits, np.float64) for k, m in pairs.items()
    }
    return {**found, "labels": np.asarray(batch["labels"]), "mask": np.asarray(batch["label_mask"])}


def _first_loss(reviews, taught):
    z = _first_logits(reviews, taught)

    def loss(temperature):
        log_p, log_q = (
            x - np.log(np.exp(x).sum(-1, keepdims=True))
            for x in (z["l"] / temperature, z["s"] / temperature)
        )
        kl = (np.exp(log_p) * (log_p - log_q)).sum(-1) * temperature**2
        own = z["s"] - np.log(np.exp(z["s"]).sum(-1, keepdims=True))
        ce = -np.take_along_axis(own, z["labels"][:, None], 1)[:, 0]
        return float((0.5 * (kl + ce) * z["mask"]).sum() / z["mask"].sum())

    return loss


def stopped(run, copy):
    """A copy of a run of 20 steps as it was after the checkpoint of step 10."""
    shutil.copytree(run, copy)
    for name in ("results.json", "report.html", "predictions.jsonl"):
        (copy / name).unlink()
    shutil.rmtree(copy / "checkpoints" / "20")
    return copy


def test_resumed_is_the_undisturbed_run(reviews, taught, learnt, tmp_path):
    copy = stopped(learnt, tmp_path / "run")
    given = (f"--teacher={taught}", "--student=teacher:layers=1", f"--out={copy}", "--drop=0")
    more = ("--steps=20", "--save-every=10", "--resume")
    assert cli.main(classes(reviews, *given, *more)) == 0
    assert losses(copy) == losses(learnt)
    assert results(copy)["metrics"] == results(learnt)["metrics"]
    assert results(copy)["before"] == results(learnt)["before"]
    assert weights(copy / "model") == weights(learnt / "model")


def test_evaluate_and_report_know_the_run(learnt, tmp_path, capsys):
    out = tmp_path / "e.json"
    assert cli.main(["evaluate", str(learnt), f"--out={out}"]) == 0
    again = json.loads(out.read_text())["metrics"]
    assert again == pytest.approx(results(learnt)["metrics"]["test"], abs=1e-5)
    page = (learnt / "report.html").read_bytes()
    assert cli.main(["report", str(learnt)]) == 0
    assert (learnt / "report.html").read_bytes() == page
    said = " ".join(capsys.readouterr().out.split())  # the terminal may wrap
    assert "agreement with the teacher" in said


def test_each_model_reads_by_its_own_tokenizer(reviews, taught, learnt, tmp_path):
    """A teacher whose tokens are numbered otherwise says the same, and teaches the same."""
    from steppe.models import tree

    words = (Path(reviews.model) / "vocab.txt").read_text().split()
    order = [*range(5), *reversed(range(5, len(words)))]
    other = tmp_path / "other"
    teacher = pretrained.load(taught / "model")
    flat = tree.flatten(teacher.params)
    table = flat["embed/word/table"]
    params = tree.replace(teacher.params, {"embed/word/table": table[jnp.asarray(order)]})
    pretrained.save(other, teacher.model, params, labels=teacher.labels)
    (other / "vocab.txt").write_text("\n".join(words[i] for i in order) + "\n")
    (other / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    student = tmp_path / "student"
    cut = shrink.student(teacher.model, teacher.params, layers=1)
    pretrained.save(
        student, cut.model, cut.params, labels=teacher.labels, tokenizer_dir=taught / "model"
    )
    out = tmp_path / "run"
    given = (f"--teacher={other}", f"--student={student}", f"--out={out}", "--drop=0")
    assert cli.main(classes(reviews, *given, "--steps=3")) == 0
    first = losses(learnt)
    # The schedule of three steps is another one; the first loss is before any step.
    assert losses(out)[1] == pytest.approx(first[1], rel=1e-5)
    accuracy = results(out)["distillation"]["teacher"]["metrics"]["test"]["accuracy"]
    assert accuracy == results(taught)["metrics"]["test"]["accuracy"]
    with pytest.raises(ValueError, match="different tokenizers"):
        build(
            schemes.resolved(
                DistillConfig(
                    teacher=str(other),
                    student=str(student),
                    scheme="features",
                    data=DataConfig(source=reviews.a, max_length=12, buckets=(12,)),
                )
            )
        )


def test_one_reading_takes_one_vocabulary(reviews, taught, tmp_path):
    """A word that one of the two lacks is read by each in its own way."""
    from steppe.models.encoder import EncoderConfig

    words = (Path(reviews.model) / "vocab.txt").read_text().split()
    model = EncoderConfig("bert", 17, 8, 1, 2, 16, 16, types=2, pooler=True, drop=0.0).build()
    params = jax.jit(model.init)(jax.random.key(3))
    data = DataConfig(source=reviews.a, max_length=12, buckets=(12,))
    for name, more, one, alike in (
        ("same", (), True, True),
        ("more", ("great",), False, False),
        ("less", (), False, True),
    ):
        folder = tmp_path / name
        pretrained.save(folder, model, params)
        kept = words[:-1] if name == "less" else words
        (folder / "vocab.txt").write_text("\n".join([*kept, *more]) + "\n")
        (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
        given = DistillConfig(teacher=str(taught), student=str(folder), data=data)
        assert opened.find(given).one_reading is one
        # Features are compared token by token, which the teacher must know.
        features = dataclasses.replace(given, scheme="features")
        if alike:
            assert opened.find(features).one_reading
        else:
            with pytest.raises(ValueError, match="different tokenizers"):
                opened.find(features)


def test_a_teacher_of_nan_is_named(reviews, taught, tmp_path):
    from steppe.models import tree

    loaded = pretrained.load(taught / "model")
    kernel = loaded.params["layers"]["attn"]["q"]["kernel"].at[0, 0, 0].set(jnp.nan)
    params = tree.replace(loaded.params, {"layers/attn/q/kernel": kernel})
    broken = tmp_path / "broken"
    pretrained.save(
        broken, loaded.model, params, labels=loaded.labels, tokenizer_dir=taught / "model"
    )
    given = DistillConfig(
        teacher=str(broken), student="teacher:layers=1", data=DataConfig(source=reviews.a)
    )
    source = opened.find(given).teacher
    with pytest.raises(ValueError, match="broken holds NaN or infinity in 'layers/attn/q/kernel'"):
        opened.load_teacher(given, source)


def test_features_train_projections_that_stay_behind(reviews, taught, tmp_path):
    """A student of another width; what is learnt beside it is not exported."""
    from steppe.models.encoder import EncoderConfig

    small = EncoderConfig("bert", 16, 8, 1, 2, 16, 16, types=2, pooler=True, drop=0.0).build()
    pretrained.save(
        tmp_path / "small",
        small,
        jax.jit(small.init)(jax.random.key(3)),
        tokenizer_dir=Path(reviews.model),
    )
    out = tmp_path / "run"
    given = (f"--teacher={taught}", f"--student={tmp_path / 'small'}", f"--out={out}")
    assert cli.main(classes(reviews, *given, "--steps=2", "--scheme=features")) == 0
    assert "features/loss" in rows(out)[0]
    loaded = pretrained.load(out / "model")
    assert loaded.model.config.width == 8
    assert results(out)["model"]["trainable"] == results(out)["model"]["parameters"]
    made = build(settings.read(out))
    state = start(made.pieces)
    assert set(state.params) == {"student", "extra"}
    shapes = jax.tree.map(jnp.shape, state.params["extra"])
    assert shapes == {"projections": {"0": (8, 16), "1": (8, 16)}}
    assert set(state.frozen) == {"teacher"}


def test_a_lora_student_is_exported_whole(reviews, taught, tmp_path):
    out = tmp_path / "run"
    given = (f"--teacher={taught}", "--student=teacher:layers=1", f"--out={out}", "--lora.rank=2")
    assert cli.main(classes(reviews, *given, "--steps=2", "--scheme=atkd", "--ema=0.9")) == 0
    found = results(out)["model"]
    assert found["trainable"] < found["parameters"] / 2
    assert found["largest_logit_difference_after_merge"] < 1e-4
    assert pretrained.load(out / "model").model.config.layers == 1


# --- mistakes ---------------------------------------------------------------------------


def mistake(capsys, args, *says):
    assert cli.main([str(a) for a in args]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("steppe: error: ")
    assert "\n" not in said
    for words in says:
        assert words in said, said


def test_what_does_not_go_together(capsys, reviews, taught, tmp_path):
    out = tmp_path / "run"
    for more, says in [
        (["--scheme=gkd"], "scheme='gkd' needs a decoder"),
        (["--policy=student"], "policy='student' needs a decoder"),
        (["--scheme=atkd", "--divergence=jsd"], "divergence='jsd' does not go with scheme='atkd'"),
        (["--scheme=kid", "--policy=gt", "--data.task=lm"], "policy='gt' does not go with"),
        (["--scheme=features", "--temperature=2"], "temperature=2.0 is not read by"),
        (["--scheme=minillm", "--data.task=lm", "--weight=0.5"], "weight=0.5 is no setting of"),
        (["--weight=0"], "leaves the teacher out"),
        (["--weight=1.5"], "weight must be in [0, 1], got 1.5"),
        (["--data.task=token"], "data.task='token' is not distilled"),
        (["--student=teacher:depth=2"], "'depth=2' is no size"),
        (["--layers=2", "--student=teacher:layers=1"], "layers is given in student="),
        (["--student=teacher:layers=1,layers=2"], "names layers twice"),
        (["--student=teacher:how=first"], "how='first' says which layers stay, and no number"),
        (["--student=teacher", "--how=last"], "how='last' says which layers stay, and no number"),
        (["--student=teacher:layers=9"], "layers=9 is more than the 2 of"),
        (["--student=teacher:heads=9"], "heads=9 is more than the 2 of"),
        (["--student=teacher:width=99"], "width=99 is more than the 16 of"),
        (["--student=teacher:width=4"], "could not be saved after its training: files of"),
        (["--teacher="], "no teacher is named"),
        (["--student="], "no student is named"),
        (["--layer-map", "1"], "--layer-map must hold pairs"),
        (["--data.max-length=99"], "longer than the model's 16 positions"),
        ([f"--teacher={reviews.model}"], "no head, but classification is distilled"),
        (["--data.classes", "pos", "neg"], "the teacher knows neg, pos in this order"),
        (["--scheme=features", "--layer-map", "5:1"], "layer 5 of the student"),
        (["--top-k=5"], "top_k must be a whole number in 1..2"),
    ]:
        base = [f"--teacher={taught}", "--student=teacher:layers=1", f"--out={out}"]
        kept = [x for x in base if x.split("=")[0] not in {m.split("=")[0] for m in more}]
        mistake(capsys, classes(reviews, *kept, *more), says)
        assert not out.exists(), more


def test_models_that_do_not_fit(capsys, tiny, reviews, taught, tmp_path):
    out = tmp_path / "run"
    renamed = tmp_path / "renamed"
    shutil.copytree(tiny.llama, renamed)
    words = [*VOCAB[:-2], VOCAB[-1], VOCAB[-2]]
    write_tokenizer(renamed, words=words)
    given = (f"--teacher={tiny.llama}", f"--student={renamed}")
    place = len(VOCAB) - 2
    says = (f"id {place} is 'h' to the student and 'g' to the teacher", "sequence-level")
    mistake(capsys, written(tiny, out, *given), *says)
    larger = tmp_path / "larger"
    save(larger, dataclasses.replace(pretrained.load_config(tiny.llama), vocab_size=18))
    write_tokenizer(larger, words=[*VOCAB, "i"])
    given = (f"--teacher={tiny.llama}", f"--student={larger}")
    says = ("id 16 is 'i' to the student and none to the teacher", "(SeqKD) works")
    mistake(capsys, written(tiny, out, *given), *says)
    given = (f"--teacher={tiny.llama}", f"--student={larger}", "--scheme=seqkd")
    mistake(
        capsys, written(tiny, out, *given), "are learnt as its own tokens", "--data.answer text"
    )
    given = (f"--teacher={tiny.llama}", "--student=teacher:layers=1", "--sample-tokens=999")
    mistake(capsys, written(tiny, out, *given, "--samples=2"), "sample_tokens=999 leaves no room")
    given = (f"--teacher={taught}", "--student=teacher:layers=1")
    mistake(capsys, written(tiny, out, *given), "data.task='chat' needs a model of kind decoder")
    # The data knows a class that the teacher does not.
    three = tmp_path / "three.jsonl"
    found = map(json.loads, Path(reviews.a.removeprefix("file:")).read_text().splitlines())
    write_lines(
        three, [{**r, "label": r["label"] if i % 3 else "odd"} for i, r in enumerate(found)]
    )
    args = classes(reviews, *given, f"--out={out}", source=f"file:{three}")
    mistake(capsys, args, "is not among the classes neg, pos")
    other = tmp_path / "other"
    loaded = pretrained.load(taught / "model")
    pretrained.save(
        other, loaded.model, loaded.params, labels=("no", "yes"), tokenizer_dir=taught / "model"
    )
    args = classes(reviews, f"--teacher={taught}", f"--student={other}", f"--out={out}")
    mistake(capsys, args, "was made for the classes no, yes")
    assert not out.exists()


def test_folders_are_never_overwritten(capsys, reviews, taught, learnt):
    given = (f"--teacher={taught}", "--student=teacher:layers=1", f"--out={learnt}", "--drop=0")
    mistake(capsys, classes(reviews, *given, "--steps=20"), "already holds another run")
    more = ("--steps=20", "--resume", "--scheme=atkd")
    mistake(capsys, classes(reviews, *given, *more), "scheme was 'kd', now it is 'atkd'")


def test_dry_run_writes_nothing(capsys, reviews, taught, tmp_path):
    out = tmp_path / "run"
    given = (f"--teacher={taught}", "--student=teacher:layers=1", f"--out={out}", "--dry-run")
    assert cli.main(classes(reviews, *given)) == 0
    assert "parameters learn from" in capsys.readouterr().out
    assert not out.exists()


def test_recipes_are_valid_and_round_trip():
    for name, recipe in recipes.RECIPES.items():
        made = recipe()
        assert made.out == f"runs/{name}"
        assert config.from_dict(DistillConfig, config.to_dict(made)) == made
        full = schemes.resolved(made)
        assert config.from_dict(DistillConfig, config.to_dict(full)) == full
        assert schemes.resolved(full) == full
        assert recipe.__doc__


def test_the_writers_of_fdistill_depend_on_its_divergence():
    def given(**more):
        made = DistillConfig(
            teacher="x", student="teacher:layers=1", scheme="fdistill",
            data=DataConfig(task="chat"), **more,
        )  # fmt: skip
        full = schemes.resolved(made)
        assert schemes.resolved(full) == full
        return full.policy, full.share, full.mix_with

    assert given() == ("mix_request", 0.5, "teacher")
    assert given(divergence="jsd") == ("mix_request", 0.5, "teacher")
    assert given(divergence="jsd", beta=0.9) == ("mix_request", 0.1, "teacher")
    assert given(divergence="forward_kl") == ("teacher", None, None)
    assert given(divergence="reverse_kl") == ("student", None, None)
    assert given(divergence="reverse_kl", policy="mix_token") == ("mix_token", 0.5, None)


def test_the_table_of_schemes_is_that_of_the_library():
    assert schemes.KINDS == distill.KINDS
    assert set(settings.SchemeName.__args__) == set(schemes.SCHEMES)
    assert set(settings.Divergence.__args__) == set(schemes.KINDS)
    assert set(settings.Policy.__args__) == set(schemes.ANY)
    names = {f.name for f in dataclasses.fields(DistillConfig)}
    assert set(schemes.OPTIONS) <= names
