"""LoRAMoE's balancing constraint from the command line: types come from a column of the data."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from steppe.launch import balance, cli, config, overlays, pieces
from steppe.models.overlays.loramoe import ROUTER_MASS
from steppe.models.sites import listening
from steppe.train.objectives import basic as objectives
from steppe.train.objectives import loramoe_loss

OVERLAY = "--overlay=loramoe:experts=4,rank=2,drop=0"
TYPES = ("--balance.column=kind", "--balance.first=qa")
OPTIONS = (OVERLAY, *TYPES)


@pytest.fixture(scope="module")
def typed(reviews, tmp_path_factory):
    """The reviews with a column that the text tells: those of films are questions."""
    file = tmp_path_factory.mktemp("typed") / "typed.jsonl"
    rows = [
        json.loads(line) for line in Path(reviews.a.removeprefix("file:")).read_text().splitlines()
    ]
    for row in rows:
        row["kind"] = "qa" if "film" in row["text"] else "talk"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SimpleNamespace(model=reviews.model, source=f"file:{file}")


def settings(typed, **changes):
    made = config.FinetuneConfig(
        model=typed.model,
        data=config.DataConfig(source=typed.source, max_length=12, buckets=(12,)),
        overlay=("loramoe:experts=4,rank=2,drop=0",),
        balance=config.BalanceConfig(beta=0.5, delta=0.3, column="kind", first="qa"),
        batch_size=16,
        drop=0.0,
    )
    return dataclasses.replace(made, **changes)


def test_the_types_are_those_of_the_records(typed):
    built = pieces.build(settings(typed))
    data = built.data.splits["train"]
    kinds = balance.types_of(built.config.balance, data)
    assert kinds.tolist() == [
        int(data.record(number)["kind"] == "qa") for number in range(len(data))
    ]
    assert 0 < kinds.mean() < 1
    # The objective on a batch with a row that fills it up is the loss on given types.
    batch = next(iter(built.batches))
    batch["example_index"][-1], batch["label_mask"][-1] = -1, 0.0
    usual = objectives.for_task(built.model, "classification")
    bound = pieces.start(built).full()
    found = balance.balanced(built.config.balance, usual, data)(bound, batch, None)
    types = np.append(kinds[batch["example_index"][:-1]], 1)  # whatever the last one is said to be
    asked = loramoe_loss(usual, beta=0.5, delta=0.3)(bound, {**batch, "sample_type": types}, None)
    assert float(found.total["balance"]) > 1e-3
    for name in ("task", "balance"):
        np.testing.assert_allclose(found.total[name], asked.total[name], rtol=1e-6)
    turned = loramoe_loss(usual, beta=0.5, delta=0.3)(
        bound, {**batch, "sample_type": 1 - types}, None
    )
    assert abs(float(turned.total["balance"] - found.total["balance"])) > 1e-4


@pytest.mark.slow
def test_a_run_sends_the_types_to_different_experts(typed, tmp_path):
    words = ["finetune", f"--model={typed.model}", f"--data.source={typed.source}", OVERLAY]
    words += ["--data.max-length=12", "--data.buckets=12", "--batch-size=16", "--no-baselines"]
    words += ["--steps=150", "--optim.learning-rate=2e-2", "--log-every=30", "--microbatches=2"]
    shares = {}
    for beta in (0.0, 1.0):
        run = tmp_path / str(beta)
        more = [f"--balance.beta={beta}", "--balance.delta=0.5", f"--out={run}"]
        more += TYPES if beta else ()
        assert cli.main([*words, *more]) == 0
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        said = [row["balance/loss"] for row in rows if "balance/loss" in row]
        assert bool(said) == bool(beta)
        if said:
            assert said[-1] < 0.5 * said[0]
        shares[beta] = parted(run, typed)
    assert shares[1.0] > shares[0.0] + 0.1


def parted(run, typed):
    """Difference of the mean share of the first half of the experts, type 0 less type 1; the
    constraint sends a type away from its own half."""
    built = pieces.build(settings(typed))
    opened = overlays.load(run / "model")
    data = built.data.splits["train"]
    batch = next(iter(built.batches))
    with listening() as told:
        opened.model.apply(opened.params, batch)
    kinds = balance.types_of(built.config.balance, data)[batch["example_index"]]
    out = []
    for name, mass in told.items():
        if name.startswith(f"{ROUTER_MASS}/"):
            share = np.asarray(mass[..., :2].sum(-1) / mass.sum(-1)).mean(0)
            out.append(share[kinds == 0].mean() - share[kinds == 1].mean())
    return float(np.mean(out))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--balance.beta=-1",), "balance.beta must be >= 0"),
        (("--balance.beta=0",), "--balance.beta must be > 0 where"),
        (("--balance.beta=1", "--balance.delta=1"), r"balance.delta must be in \[0, 1\)"),
        (("--balance.beta=1", "--balance.column="), "--balance.beta must be 0 where"),
        (("--balance.beta=1", "--overlay=ia3"), "add --overlay loramoe"),
        (
            ("--balance.beta=1", "--balance.column=type"),
            "is no column of the data; it has id, text",
        ),
        (("--balance.beta=1", "--balance.first=QA"), "has the values 'qa', 'talk'"),
        (
            ("--balance.beta=1", "--overlay=loramoe:experts=3"),
            "must be even, got 3; --overlay loramoe:experts=4",
        ),
    ],
)
def test_mistakes(typed, tmp_path, capsys, options, words):
    run = tmp_path / "run"
    given = ["finetune", f"--model={typed.model}", f"--data.source={typed.source}", *OPTIONS]
    given += ["--data.max-length=12", "--data.buckets=12", "--steps=1", f"--out={run}", *options]
    assert cli.main(given) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(words, said), said
    assert not run.exists()


def test_a_dry_run_knows_whose_rows_are_counted(typed, tmp_path, capsys):
    words = ["finetune", f"--model={typed.model}", f"--data.source={typed.source}", *OPTIONS]
    words += ["--data.max-length=12", "--data.buckets=12", "--steps=1", "--balance.beta=1"]
    assert cli.main([*words, "--dry-run", f"--out={tmp_path / 'run'}"]) == 0
    assert "peak per device" in capsys.readouterr().out
