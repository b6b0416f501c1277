"""Every notebook runs from top to bottom on a tiny model, and is committed without outputs."""

import json
import shutil
from pathlib import Path

import jax
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


@pytest.fixture
def tiny(reviews, tmp_path, monkeypatch):
    """A small model and reviews.jsonl for the notebooks; their pictures are closed afterwards."""
    import matplotlib.pyplot as plt

    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("STEPPE_NOTEBOOK_TINY", str(tmp_path))
    shutil.copytree(reviews.model, tmp_path / "model")
    shutil.copy(reviews.a.removeprefix("file:"), tmp_path / "reviews.jsonl")
    yield
    plt.close("all")


def titles(space):
    return [axis.get_title() for axis in np.ravel(space.get("axes", space.get("axis")))]


def test_first_fine_tune(tiny, capsys):
    space = run("first_fine_tune.ipynb")
    assert titles(space) == ["Training", "Calibration"]
    said = capsys.readouterr().out
    assert "'model.safetensors'" in said
    assert said.count("said ") == 3
    assert space["rows"][-1]["loss"] < space["rows"][0]["loss"]
    kept = jax.tree.map(np.array_equal, space["again"].params, space["state"].full())
    assert all(jax.tree.leaves(kept))


def test_own_objective(tiny):
    space = run("own_objective.ipynb")
    assert titles(space) == ["What it is sure of"]
    np.testing.assert_allclose(space["ours"].total, space["theirs"].total, rtol=1e-6)
    assert max(jax.tree.leaves(space["apart"])) < 1e-5
    sure = {name: found.probs.max(-1).mean() for name, found in space["found"].items()}
    assert sure["focal"] < sure["cross entropy"]


def test_distil(tiny):
    space = run("distil.ipynb")
    assert titles(space) == ["Says what the teacher says", "Calibration error"]
    assert space["agree"]["teacher"] == 1.0
    assert set(space["agree"]) == {"teacher", "cut", "labels", "teacher's answers"}
    assert space["student"].model.config.layers < space["layers"]


def test_quantize(tiny):
    space = run("quantize.ipynb")
    assert titles(space) == ["Smaller, and other"]
    rows = space["rows"]
    assert rows["w2a8", "nearest"]["size"] < rows["w8a8", "nearest"]["size"] < 0.5
    assert rows["w8a8", "GPTQ"]["as float"] > 0.9


def test_many_overlays(tiny):
    space = run("many_overlays.ipynb")
    assert titles(space)[:2] == ["All tasks at once", "Accuracy"]
    assert float(space["losses"][-1]) < float(space["losses"][0])
    assert space["table"].shape == (3, 3)
    assert ((space["table"] > 0) & (space["table"] <= 1)).all()


@pytest.mark.slow
def test_laptop_to_pod(tiny, capsys):
    space = run("laptop_to_pod.ipynb")
    assert titles(space) == ["The same on every mesh", "bert-base on paper"]
    assert len(space["losses"]) == 2  # the tests have eight devices
    first, *others = space["losses"].values()
    for losses in others:
        np.testing.assert_allclose(losses, first, rtol=1e-4)
    assert "#SBATCH --nodes=2" in capsys.readouterr().out


def test_flat_minima(tiny, capsys):
    space = run("flat_minima.ipynb")
    assert titles(space) == ["Along a line", "AdamW", "FSAM"]
    assert "entries are perturbed" in capsys.readouterr().out
    for scores in space["found"].values():
        assert np.isfinite(list(scores.values())).all()
    middle = space["points"] // 2
    for name, curve in space["curves"].items():
        clean = space["found"][name]["training loss"]
        assert curve.losses[middle] == pytest.approx(clean, rel=1e-4)


@pytest.mark.slow
def test_merge_two(tiny, capsys):
    space = run("merge_two.ipynb")
    assert titles(space) == ["Entropy", "Entries kept"]
    assert "cosine of the two task vectors" in capsys.readouterr().out
    assert list(space["scores"]) == ["alone", "average", "TIES", "Concrete"]
    assert np.isfinite(space["table"]).all()
    # The mask has learnt, but where nothing depends on a parameter, as on the keys' bias.
    assert (space["table"] != 0.5).mean() > 0.8
