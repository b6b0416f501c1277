"""Mistakes of ``steppe compare merging`` are found before anything is trained; what the terminal
says of models that do not differ."""

import pytest

from steppe.launch import cli
from steppe.launch.merge import table
from steppe.launch.merge.evaluation import data_of
from steppe.launch.merge.settings import MergeConfig
from steppe.launch.merge.study_settings import StudyConfig

TASKS = ("file:a.csv", "file:b.csv")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"eval_limit": -1}, "eval_limit must be >= 0, got -1"),
        ({"sweep": (0.1, float("nan"))}, "sweep must hold finite numbers"),
        ({"seeds": (0, -1)}, "seed must be >= 0, got -1"),
        ({"methods": ("ties:k=0.2,lam=0.3", "ties:lam=0.30,k=0.2")}, "'ties:lam=0.30,k=0.2' are"),
        ({"methods": ("average", "ties", "ties:merge=sum")}, "'ties' and 'ties:merge=sum' are the"),
    ],
)
def test_what_the_arms_share_is_checked_with_them(values, said):
    with pytest.raises(ValueError, match=said):
        StudyConfig(tasks=TASKS, **values)


def test_arms_stand_on_what_they_share():
    config = StudyConfig(tasks=TASKS, batch_size=4, eval_limit=7, sweep=(0.5,), seeds=(3,))
    shared = config.shared(3)
    assert shared == MergeConfig(batch_size=4, eval_limit=7, sweep=(0.5,), seed=3, adapt_on="valid")
    assert config.arm("ties:k=0.1", shared).k == 0.1
    assert config.arm("ties:k=0.1", shared).batch_size == 4


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lam": 1e39}, "lam must be a finite number of float32, got 1e.39"),
        ({"t": float("inf")}, "t must be a finite number"),
        ({"sweep": (0.1, -1e39)}, "sweep must hold finite numbers of float32"),
        ({"seed": 2**32}, r"seed must be in \[0, 2\^32\), got 4294967296"),
    ],
)
def test_numbers_that_the_merge_could_not_hold(values, said):
    with pytest.raises(ValueError, match=said):
        MergeConfig(**values)


@pytest.mark.parametrize("out", [".", "new/.."])
def test_the_folder_that_one_is_in_is_no_new_folder(out, tmp_path, monkeypatch, capsys):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert cli.main(["merge", "average", "base", "one", "two", "--out", out]) == 2
    assert "out must not be the folder that you are in" in capsys.readouterr().err
    assert here.is_dir()
    assert not list(here.iterdir())


def test_a_mistake_in_what_is_shared_leaves_no_folder(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["compare", "merging", "--tasks", *TASKS, "--batch-size", "0", "--out", str(out)]
    assert cli.main(words) == 2
    message = capsys.readouterr().err
    assert "--batch-size must be >= 1, got 0" in message
    assert message.count("\n") == 1
    assert not out.exists()


def test_damaged_tasks_of_a_merged_folder_are_named(tmp_path):
    (tmp_path / "merge.json").write_text('{"tasks": [3]}')
    with pytest.raises(
        ValueError, match=r"merge\.json is damaged \(tasks must hold objects, got 3"
    ):
        data_of(tmp_path)


def test_models_that_are_the_base_have_no_signs_to_compare():
    same = {"k": 0.2, "disagreement": float("nan"), "tensors": [("w", 0, 0)]}
    (line,) = table.said({"geometry": same})
    assert line == "no entry is among the largest 20% of two tasks: there are no signs to compare"
    apart = {"k": 0.2, "disagreement": 0.5, "tensors": [("w", 4, 2)]}
    assert table.said({"geometry": apart})[0].startswith("signs differ on 50.0%")
