"""Every notebook runs from top to bottom on a tiny model, and is committed without outputs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "launch" / "notebooks"


def cells(name):
    return json.loads((FOLDER / name).read_text("utf-8"))["cells"]


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem)
def test_no_outputs_are_committed(file):
    for cell in cells(file.name):
        assert cell["id"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def run(name):
    """The code cells in one namespace, as a kernel would run them; a failure names its cell."""
    space = {"__name__": "__main__"}
    for number, cell in enumerate(cells(name)):
        if cell["cell_type"] == "code":
            code = compile("".join(cell["source"]), f"{name}, cell {number}", "exec")
            exec(code, space)
    return space


def test_flat_minima(reviews, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("STEPPE_NOTEBOOK_TINY", str(tmp_path))
    shutil.copytree(reviews.model, tmp_path / "model")
    shutil.copy(reviews.a.removeprefix("file:"), tmp_path / "reviews.jsonl")
    space = run("flat_minima.ipynb")
    import matplotlib.pyplot as plt

    try:
        assert {axis.get_title() for axis in space["axes"]} == {"Along a line", "AdamW", "FSAM"}
    finally:
        plt.close("all")
    assert "entries are perturbed" in capsys.readouterr().out
    for scores in space["found"].values():
        assert np.isfinite(list(scores.values())).all()
    middle = space["points"] // 2
    for name, curve in space["curves"].items():
        clean = space["found"][name]["training loss"]
        assert curve.losses[middle] == pytest.approx(clean, rel=1e-4)


@pytest.mark.slow
def test_merge_two(reviews, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("STEPPE_NOTEBOOK_TINY", str(tmp_path))
    shutil.copytree(reviews.model, tmp_path / "model")
    shutil.copy(reviews.a.removeprefix("file:"), tmp_path / "reviews.jsonl")
    space = run("merge_two.ipynb")
    import matplotlib.pyplot as plt

    try:
        assert [axis.get_title() for axis in space["axes"]] == ["Entropy", "Entries kept"]
    finally:
        plt.close("all")
    assert "cosine of the two task vectors" in capsys.readouterr().out
    assert list(space["scores"]) == ["alone", "average", "TIES", "Concrete"]
    assert np.isfinite(space["table"]).all()
    # The mask has learnt, but where nothing depends on a parameter, as on the keys' bias.
    assert (space["table"] != 0.5).mean() > 0.8
