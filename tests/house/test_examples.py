"""The examples in the docstrings run and give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("models", "optim", "train", "data", "launch")


def modules():
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            if ">>> " in path.read_text("utf-8"):
                parts = path.relative_to(ROOT).with_suffix("").parts
                yield ".".join(("steppe", *(p for p in parts if p != "__init__")))


@pytest.mark.parametrize("name", modules())
def test_examples_give_what_they_say(name, asset):
    if name == "steppe.data":
        asset("vader")
        asset("minilm-l6")
    module = importlib.import_module(name)
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).attempted > 0
    assert not runner.failures, "".join(said)


def test_every_library_room_has_examples():
    assert {name.split(".")[1] for name in modules()} == {"models", "optim", "train", "data"}
