"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest

from .test_cli import world  # noqa: F401 -- a fixture

README = Path(__file__).resolve().parents[2] / "README.md"


def example(holding):
    """The one Python block that holds a text."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if holding in block]
    return code


def test_the_generation_example(tiny, capsys):
    names = {"decoder": str(tiny.llama)}
    exec(compile(example("decoding.generate"), "README.md", "exec"), names)
    said = names["said"]
    assert len(said.texts) == 2
    assert said.lengths[0] <= 5
    assert said.lengths[1] <= 9
    assert said.texts[0] in capsys.readouterr().out


def test_the_notebook_example(world, capsys):  # noqa: F811
    code = example("step.make")
    names = {
        "folder": str(world / "model"),
        "source": f"file:{world / 'data.jsonl'}",
        "steps": 3,
    }
    exec(compile(code.replace("max_length=64", "max_length=12"), "README.md", "exec"), names)
    assert 0.0 <= float(capsys.readouterr().out.split()[-1]) <= 1.0
    assert int(names["state"].step) == 3


def test_the_optimiser_example():
    import jax.numpy as jnp

    names = {}
    exec(compile(example("optim.fsam"), "README.md", "exec"), names)
    params = {"w": jnp.ones(3)}
    state = names["tx"].init(params)
    assert int(state.steps) == 0


def _sections(path):
    """What a page's headings can be linked by."""
    headings = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", ["README.md", "RESULTS.md"])
def test_every_link_and_recipe_exists(page):
    text = (README.parent / page).read_text("utf-8")
    for target, section in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        found = README.parent / (target or page)
        assert found.exists(), target
        assert not section or section in _sections(found), f"{target}#{section}"
    from steppe.launch.recipes import COMPARISONS, RECIPES

    for recipe in re.findall(r"steppe finetune ([a-z][\w-]+)", text):
        assert recipe in RECIPES, recipe
    for recipe in re.findall(r"steppe compare ([a-z][\w-]+)", text):
        assert recipe in COMPARISONS, recipe
    for name in re.findall(r"launch/bench/results/([\w.-]+\.json)", text):
        assert (README.parent / "launch/bench/results" / name).exists(), name
