"""``steppe blackbox``: what is found is what is evaluated again, a kill costs one generation, the
model is only ever called, and mistakes are one line."""

import dataclasses
import json
import random
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

from steppe.launch import cli, overlays, setup
from steppe.launch.blackbox import command, opened, search
from steppe.launch.blackbox.settings import BlackboxConfig
from steppe.launch.config import DataConfig
from steppe.models import pretrained
from steppe.models.heads import HeadConfig
from steppe.train import loop
from steppe.train.blackbox import tuning

pytestmark = pytest.mark.slow


def settings(reviews, out, **changes):
    data = DataConfig(source=reviews.a, max_length=8, buckets=(8,))
    made = BlackboxConfig(
        model=reviews.model, out=str(out), data=data, shots=8, budget=48, popsize=4, rank=6,
        length=2, first_id=5, alpha=1.0, dev_every=8, baselines=False,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.fixture(scope="module")
def done(reviews, tmp_path_factory):
    """A search of two layers that was interrupted in its fourth generation and gone on with, and
    the evaluators' calls."""
    root = tmp_path_factory.mktemp("blackbox")
    config = settings(reviews, root / "run")
    compiled, calls, limit = search.programs, [], [3]
    made = []

    def programs(*args):
        made.extend([] if made else [compiled(*args)])  # once for all three
        parts = made[0]

        def evaluate(prompts, asked):
            if len(calls) == limit[0]:
                raise KeyboardInterrupt
            calls.append(np.asarray(asked.rows))
            return parts.evaluate(prompts, asked)

        return parts._replace(evaluate=evaluate)

    patch = pytest.MonkeyPatch()
    patch.setattr(search, "programs", programs)
    with pytest.raises(loop.Interrupted, match=r"generations are in .* --resume"):
        command.run(config)
    assert len((root / "run" / search.FILE).read_text().splitlines()) == 3
    with (root / "run" / search.FILE).open("a") as stream:
        stream.write('{"generation": 3, "lo')  # a kill while it was written
    limit[0] = 10**6
    found = command.run(dataclasses.replace(config, resume=True), ["steppe", "blackbox"])
    resumed = list(calls)
    calls.clear()
    held = opened.open_all(config)
    space, _ = opened.space(config, held)
    whole = search.run(config, held, space, root / "whole", [])
    patch.undo()
    return config, found, whole, resumed, calls, root


def test_a_search_that_was_interrupted_is_the_whole_search(done):
    _, found, whole, resumed, calls, root = done
    assert len(resumed) == len(calls) == 12
    for a, b in zip(resumed, calls, strict=True):
        np.testing.assert_array_equal(a, b)
    journals = [
        [json.loads(line) for line in (root / n / search.FILE).read_text().splitlines()]
        for n in ("run", "whole")
    ]
    assert journals[0] == journals[1]
    assert found["search"]["chosen_at"] == whole.chosen.calls
    assert found["search"]["dev"]["loss"] == whole.chosen.loss
    assert (whole.generations, whole.resumed, whole.passes) == (12, 0, (48, 7))
    saved = overlays.load(root / "run" / "model").params["overlay"]["layers"]["resid"]
    np.testing.assert_array_equal(np.asarray(saved).reshape(2, -1), whole.chosen.rows)


def test_what_is_written(done):
    _, found, _, _, _, root = done
    run = root / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(4, 49, 4))
    assert [row["layer"] for row in train] == [0.0, 1.0] * 6
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [0, 8, 16, 24, 32, 40, 48]
    held = found["search"]
    assert (held["calls"], held["generations"], held["failed"]) == (48, 12, 0)
    assert held["prompts"] == [2, 2, 16]
    assert found["model"]["trainable"] == 64
    trials = {row["step"]: row for row in rows if row["kind"] == "eval" and row["step"]}
    best = max(trials.values(), key=lambda row: (row["accuracy"], -row["loss"]))
    assert held["chosen_at"] == best["step"]
    assert held["dev"]["accuracy"] == pytest.approx(best["accuracy"])
    assert (run / "predictions.jsonl").is_file()
    page = (run / "report.html").read_text()
    assert "<h2>Search</h2>" in page
    assert "48 forward passes over the examples, no gradient" in page
    assert "Step size" in page


def test_the_prompt_is_evaluated_again(done, tmp_path, capsys):
    _, found, _, _, _, root = done
    out = tmp_path / "said.json"
    assert cli.main(["evaluate", str(root / "run"), f"--out={out}"]) == 0
    again = json.loads(out.read_text())["metrics"]
    for name in ("accuracy", "loss"):
        assert again[name] == pytest.approx(found["metrics"]["test"][name], rel=1e-5)
    about = json.loads((root / "run" / "model" / "overlay.json").read_text())
    assert about["name"] == "added-prompt"
    loaded = overlays.load(root / "run" / "model")
    assert np.abs(loaded.params["overlay"]["layers"]["resid"]).max() > 0


def test_a_finished_run_is_left_alone_and_a_larger_budget_goes_on(done, tmp_path):
    config, *_, root = done
    run = shutil.copytree(root / "run", tmp_path / "run")
    config = dataclasses.replace(config, out=str(run), resume=True)
    before = (run / "results.json").read_bytes()
    command.run(config)
    assert (run / "results.json").read_bytes() == before
    more = command.run(dataclasses.replace(config, budget=60))  # 4 more make no round of 8
    assert more["search"]["calls"] == 56
    lines = (run / search.FILE).read_text().splitlines()
    assert lines[:12] == (root / "run" / search.FILE).read_text().splitlines()
    # The first twelve are read, not searched again.
    assert len(lines) == 14


def test_shots_are_of_every_class_and_no_example_is_both(done):
    config = done[0]
    held = opened.open_all(config)
    parts = {}
    for name in opened.SHARES:
        dataset = held.splits[name]
        labels = [dataset.record(i)["label"] for i in range(len(dataset))]
        assert sorted(labels) == ["neg"] * 8 + ["pos"] * 8
        parts[name] = {dataset.record(i)["id"] for i in range(len(dataset))}
    assert not parts["train"] & parts["dev"]
    rows = setup.divide(config.data, setup.records(config.data))["train"]
    other = opened.shots(rows, held.task, dataclasses.replace(config, seed=1))["train"]
    assert {row["id"] for row in other} != parts["train"]
    # Scored by means that leave each out; the others by the head as it is.
    space, _ = opened.space(config, held)
    batch = held.batches["train"]
    score = jax.jit(held.scores, static_argnames="left_out")
    apart = np.asarray(score(held.params, space.start, batch, left_out=True))
    plain = np.asarray(score(held.params, space.start, batch))
    y = np.asarray(batch["labels"])
    rows = np.arange(16)
    np.testing.assert_array_equal(apart[rows, 1 - y], plain[rows, 1 - y])
    assert (apart[rows, y] < plain[rows, y]).all()
    assert (apart.argmax(1) == y).mean() == pytest.approx(held.means.held_out)


def test_a_decoder_is_scored_by_its_next_word(tiny, tmp_path, capsys):
    rng = random.Random(0)
    rows = []
    for number in range(90):
        up = rng.random() < 0.5
        text = " ".join(rng.choices("abcd" if up else "efgh", k=4))
        rows.append({"id": f"r{number}", "text": text, "label": "up" if up else "down"})
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = BlackboxConfig(
        model=str(tiny.llama), out=str(tmp_path / "run"), shots=4, budget=24, popsize=4, rank=5,
        data=DataConfig(source=f"file:{file}", max_length=8, buckets=()), length=2, first_id=8,
        words=("a", "b"), suffix=" user", loss="hinge", baselines=False, select="last",
    )  # fmt: skip
    found = command.run(config)
    assert found["search"]["head"] == "logits of the next word after 'user': a, b"
    assert found["search"]["held_out"] is None
    out = tmp_path / "said.json"
    assert cli.main(["evaluate", str(config.run), f"--out={out}"]) == 0
    again = json.loads(out.read_text())["metrics"]
    assert again["loss"] == pytest.approx(found["metrics"]["test"]["loss"], rel=1e-5)
    # By hand: the language model itself reads words, text and suffix.
    held = opened.open_all(config)
    lm = pretrained.load(tiny.llama)
    dataset = held.splits["test"]
    ids = [int(i) for i in held.tokenizer.encode_batch([dataset.record(0)["text"]])[0]["input_ids"]]
    about = json.loads((config.run / "model" / "overlay.json").read_text())["settings"]
    whole = [*about["ids"], *ids, *about["after"]]
    logits = jax.jit(lm.model.apply)(lm.params, {"input_ids": np.array([whole])}).logits[0, -1]
    a, b = (held.tokenizer.backend.token_to_id(word) for word in "ab")
    one = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int32)}
    ours = jax.jit(held.model.apply)(held.params, one).logits[0]
    np.testing.assert_allclose(ours, logits[np.array([a, b])], atol=1e-5)


def test_a_class_of_a_decoder_is_one_token(tiny, tmp_path):
    """A word of several is no column of the logits, be it given or the name of a class."""
    rows = [{"id": f"r{n}", "text": "a b", "label": ("up we", "down")[n % 2]} for n in range(90)]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = BlackboxConfig(
        model=str(tiny.llama), out=str(tmp_path / "run"), shots=4, budget=24, popsize=4, rank=5,
        data=DataConfig(source=f"file:{file}", max_length=8, buckets=()), length=2, first_id=8,
        baselines=False,
    )  # fmt: skip
    for words, said in (
        (
            ("a", "user b"),
            r"words has 'user b', which is 2 tokens \('user' 'b'\)",
        ),
        ((), r"the class 'up we', which is 2 tokens .* give words, one for each class"),
        (("a", "a"), "words a, a are not all different tokens"),
        (("a",), "words must name the 2 classes"),
    ):
        with pytest.raises(ValueError, match=said):
            opened.open_all(dataclasses.replace(config, words=words))


def test_rows_in_front_begin_where_another_run_ended(done, reviews, tmp_path):
    """A prompt overlay of the base, as a run with --overlay prompt leaves it."""
    from steppe.models.overlays import prompt

    loaded = pretrained.load(reviews.model, head=HeadConfig("classification", 2, None, 0.0))
    rows = 0.1 * np.ones((2, 16), np.float32)
    overlays.save(
        tmp_path / "given", prompt.overlay(length=2), {"overlay": {"prompt": rows}},
        base=reviews.model, hashed=overlays.base_hash(loaded.params), model=loaded.model,
        labels=("neg", "pos"), tokenizer_dir=Path(reviews.model),
    )  # fmt: skip
    config = settings(
        reviews, tmp_path / "run", method="bbt", inject="concat", start=str(tmp_path / "given"),
        projection="uniform",
    )  # fmt: skip
    held = opened.open_all(config)
    space, _ = opened.space(config, held)
    np.testing.assert_array_equal(space.start, rows.reshape(1, -1))
    assert held.shape == (1, 2, 16)
    opened.export(held, config, space.start + 1.0, tmp_path / "kept")
    saved = overlays.load(tmp_path / "kept")
    np.testing.assert_array_equal(saved.params["overlay"]["prompt"], rows + 1.0)
    np.testing.assert_array_equal(saved.params["base"]["head"]["out"]["kernel"], held.means.kernel)
    with pytest.raises(ValueError, match=r"rows of shape \(2, 16\), but the search needs \(3, 16"):
        opened.open_all(dataclasses.replace(config, length=3))
    about = tmp_path / "given" / "overlay.json"
    said = json.loads(about.read_text())
    said["base"]["hash"] = "0" * 16
    about.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="hash 0000000000000000.*, not of this base"):
        opened.open_all(config)


def broken(monkeypatch, values):
    """The search of a service whose losses are ``values`` first."""
    honest = search.programs

    def programs(*args):
        parts = honest(*args)

        def evaluate(prompts, asked):
            found = parts.evaluate(prompts, asked)
            losses = np.array(found.losses)
            losses[: len(values)] = values
            return tuning.Evaluated(jax.numpy.asarray(losses), found.accuracies)

        return parts._replace(evaluate=evaluate)

    monkeypatch.setattr(search, "programs", programs)


def test_losses_that_are_no_numbers(reviews, tmp_path, monkeypatch, capsys):
    broken(monkeypatch, [np.nan])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = command.run(settings(reviews, tmp_path / "one", budget=16))
    told = [str(w.message) for w in said if "have no loss" in str(w.message)]
    assert len(told) == 1
    assert "1 of 4 candidates of generation 0" in told[0]
    assert found["search"]["failed"] == 4
    monkeypatch.undo()
    broken(monkeypatch, [np.nan] * 4)
    with pytest.raises(FloatingPointError, match="no candidate of generation 0 has a loss"):
        command.run(settings(reviews, tmp_path / "all"))


def test_damaged_and_other_journals(done, tmp_path):
    config, *_, root = done
    run = shutil.copytree(root / "run", tmp_path / "run")
    lines = (run / search.FILE).read_text().splitlines(True)
    (run / search.FILE).write_text("".join(lines[:2] + lines[3:]))
    config = dataclasses.replace(config, out=str(run), resume=True)
    with pytest.raises(ValueError, match=r"line 3 is damaged \(generation 2 is wanted"):
        command.run(config)
    with pytest.raises(ValueError, match="other settings: rank was 6, now it is 5"):
        command.run(dataclasses.replace(config, rank=5))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--popsize=1"], "popsize must be >= 2, got 1"),
        (["--sigma=0"], "sigma must be positive and finite, got 0"),
        (["--shots=60"], "training split of"),
        (["--rank=40"], "rank must be from 1 to the 32 numbers"),
        (["--budget=7"], "budget must be at least 8 forward passes (4 candidates x 2 prompts)"),
        (["--inject=concat"], "searches; take inject=add with bbtv2"),
        (["--start=x"], "it needs inject=concat"),
        (["--first-id=30"], "ids must be of the vocabulary of 16 tokens, got 30"),
        (["--data.task=token"], "data.task must be classification or pair"),
    ],
)
def test_mistakes(options, said, reviews, tmp_path, capsys):
    words = ["blackbox", f"--model={reviews.model}", "--data", reviews.a, "--data.max-length=8"]
    words += ["--shots=8", "--popsize=4", "--rank=6", "--length=2", "--first-id=5"]
    assert cli.main([*words, f"--out={tmp_path / 'o'}", *options]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert said in message
    assert message.startswith("steppe: error: ")
    # What cannot be done is not promised either.
    assert cli.main([*words, f"--out={tmp_path / 'o'}", *options, "--dry-run"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == message
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").iterdir())
