"""``steppe distill --scheme ctcd``: teacher and student train, and both are exported."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.launch import cli
from steppe.models import pretrained

from .conftest import classes
from .test_distill import _first_logits, losses, results, stopped, weights


@pytest.fixture(scope="module")
def together(reviews, taught, tmp_path_factory):
    """A run of ctcd from the teacher and a layer of it."""
    out = tmp_path_factory.mktemp("ctcd") / "run"
    given = (f"--teacher={taught}", "--student=teacher:layers=1", f"--out={out}", "--drop=0")
    more = ("--scheme=ctcd", "--back=0.25", "--weight=0.75", "--steps=20", "--save-every=10")
    assert cli.main(classes(reviews, *given, *more)) == 0
    return out


def test_both_train_and_both_are_exported(reviews, taught, together, tmp_path):
    held = pretrained.load(taught / "model")
    large = pretrained.load(together / "teacher")
    small = pretrained.load(together / "model")
    assert small.model.config.layers == 1
    assert large.model.config == held.model.config
    assert large.labels == ("neg", "pos")
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), large.params, held.params)
    assert min(jax.tree.leaves(moved["layers"])) > 0
    found = results(together)
    assert found["baselines"]["teacher, before"] == pytest.approx(
        results(taught)["metrics"]["test"], abs=1e-5
    )
    theirs = tmp_path / "e.json"
    command = ["evaluate", str(together / "teacher"), f"--data.source={reviews.a}"]
    limits = ("--data.max-length=12", "--split=test", f"--out={theirs}")
    assert cli.main([*command, *limits]) == 0
    again = json.loads(theirs.read_text())["metrics"]["accuracy"]
    assert again == pytest.approx(found["baselines"]["teacher"]["accuracy"], abs=1e-6)


def test_the_first_loss_of_both(reviews, taught, together):
    """The two losses in float64 from logits: h CE + s KL each, each towards the other."""
    z = _first_logits(reviews, taught)
    log = {k: v - np.log(np.exp(v).sum(-1, keepdims=True)) for k, v in z.items() if k in "sl"}
    row = np.arange(len(z["labels"]))
    ce = {k: -log[k][row, z["labels"]] for k in "sl"}
    kl = {
        a: (np.exp(log[b]) * (log[b] - log[a])).sum(-1) for a, b in (("s", "l"), ("l", "s"))
    }  # from the other to oneself
    mean = {
        "s": 0.25 * ce["s"] + 0.75 * kl["s"],
        "l": 0.75 * ce["l"] + 0.25 * kl["l"],
    }
    wanted = sum(float((v * z["mask"]).sum() / z["mask"].sum()) for v in mean.values())
    assert losses(together)[1] == pytest.approx(wanted, rel=1e-5)


def test_a_resumed_pair_is_the_undisturbed_one(reviews, taught, together, tmp_path):
    copy = stopped(together, tmp_path / "run")
    given = (f"--teacher={taught}", "--student=teacher:layers=1", f"--out={copy}", "--drop=0")
    more = ("--scheme=ctcd", "--back=0.25", "--weight=0.75", "--steps=20", "--save-every=10")
    assert cli.main(classes(reviews, *given, *more, "--resume")) == 0
    assert losses(copy) == losses(together)
    assert weights(copy / "model") == weights(together / "model")
    assert weights(copy / "teacher") == weights(together / "teacher")


def test_a_pair_that_does_not_fit(capsys, reviews, taught, tmp_path):
    given = [f"--teacher={taught}", "--student=teacher:layers=1", f"--out={tmp_path / 'run'}"]
    for more, said in (
        (["--scheme=ctcd", "--teacher-dtype=bfloat16"], "teacher_dtype='bfloat16'"),
        (["--scheme=ctcd", "--back=1.5"], "back must be in [0, 1]"),
        (["--back=0.5"], "it belongs to scheme ctcd"),
        (["--scheme=ctcd", "--divergence=jsd"], "divergence='jsd' does not go with"),
    ):
        assert cli.main(classes(reviews, *given, *more)) == 2
        error = capsys.readouterr().err
        assert said in " ".join(error.split()), error
        assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
