"""The README's examples run as they stand."""

import re
from pathlib import Path

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


def test_every_link_and_recipe_exists():
    text = README.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (README.parent / target).exists(), target
    from steppe.launch.recipes import COMPARISONS, RECIPES

    for recipe in re.findall(r"steppe finetune ([a-z][\w-]+)", text):
        assert recipe in RECIPES, recipe
    for recipe in re.findall(r"steppe compare ([a-z][\w-]+)", text):
        assert recipe in COMPARISONS, recipe
