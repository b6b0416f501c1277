"""The reasoning-gym source against a stand-in package, and against the real one if it is there."""

import sys
import types

import pytest

from steppe.data import sources
from steppe.data.errors import DataError


@pytest.fixture
def gym(monkeypatch):
    """A module with one generator, seeded as the real one is: by seed and place."""
    package = types.ModuleType("reasoning_gym")
    package.factory = types.SimpleNamespace(DATASETS={"gsm_symbolic": 1, "leg_counting": 2})

    def create_dataset(name, size, seed):
        if name == "leg_counting":
            raise ValueError("no legs")
        worked = {"answer_cot": "1 + 1 = 2\n#### 2"}
        return [
            {"question": f"q{seed}-{i}", "answer": "2", "metadata": worked if i else {}}
            for i in range(size)
        ]

    package.create_dataset = create_dataset
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    return package


def test_problems_are_records(gym):
    records = sources.load("reasoning-gym:gsm_symbolic?size=3&seed=7")
    assert records[0] == {
        "id": "reasoning-gym/gsm_symbolic/7/0",
        "question": "q7-0",
        "answer": "2",
        "solution": "",
    }
    assert records[1]["solution"] == "1 + 1 = 2\n#### 2"
    assert sources.load("reasoning-gym:gsm_symbolic?seed=7")[:3] == records
    chosen = sources.load("reasoning-gym:gsm_symbolic", columns={"prompt": "question"})
    assert (len(chosen), chosen[5]["prompt"]) == (1000, "q0-5")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm_symbolc", "no generator 'gsm_symbolc'; known: gsm_symbolic"),
        ("leg_counting", "reasoning-gym:leg_counting failed: .*no legs"),
        ("gsm_symbolic?size=0", "size='0' must be an integer from 1 to 1000000"),
        ("gsm_symbolic?size=1e3", "size='1e3' must be an integer"),
        ("gsm_symbolic?seed=-1", "seed='-1' must be an integer from 0"),
        ("gsm_symbolic?sed=1", r"option 'sed' is unknown; options: size .default 1000. and seed"),
        ("gsm_symbolic?size=1&size=2", "option 'size' is given twice"),
        ("gsm_symbolic?size", "cannot read 'size'"),
    ],
)
def test_bad_addresses(gym, name, message):
    with pytest.raises(DataError, match=message):
        sources.load(f"reasoning-gym:{name}")


def test_bad_problems_and_splits(gym, monkeypatch):
    with pytest.raises(DataError, match="no official splits; use another seed"):
        sources.load("reasoning-gym:gsm_symbolic", split="test")
    monkeypatch.setattr(gym, "create_dataset", lambda name, size, seed: [{"question": ""}])
    with pytest.raises(DataError, match="gsm_symbolic, problem 0: expected a question and an"):
        sources.load("reasoning-gym:gsm_symbolic?size=1")


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match="run `pip install reasoning-gym`"):
        sources.load("reasoning-gym:gsm_symbolic")


@pytest.mark.slow
def test_the_real_generator_is_the_same_each_time():
    pytest.importorskip("reasoning_gym")
    records = sources.load("reasoning-gym:gsm_symbolic?size=20&seed=3")
    assert records == sources.load("reasoning-gym:gsm_symbolic?size=30&seed=3")[:20]
    assert all(r["solution"].endswith(f"#### {r['answer']}") for r in records)
