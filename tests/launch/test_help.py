"""Help fits a screen, explains what a word names, and leaves no option out."""

import contextlib
import dataclasses
from typing import Literal

import pytest

from steppe.launch import cli, completion, help, options
from steppe.launch.bench import cli as bench


@dataclasses.dataclass(frozen=True)
class Inner:
    """Some.

    Attributes:
      low, high: ends.
    """

    low: int = 0
    high: int = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    """What it does.

    Attributes:
      kind: which of the two.
      first, second: numbers of something
        that takes two lines to say.
      flag: whether.
      inner: a group.
      word: some word.
    """

    kind: Literal["a", "b"] = "a"
    first: int = 1
    second: float = 2.5
    flag: bool = True
    inner: Inner = dataclasses.field(default_factory=Inner)
    word: str | None = None


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def asked(*words):
    return help.show(Outer, "outer", words)


def test_one_screen(capsys):
    with pytest.raises(SystemExit):
        options.parse(Outer, ["-h"], "outer")
    assert (
        capsys.readouterr().out
        == """\
What it does.

usage: steppe outer [options]

  --kind                   which of the two. [a]
  --first, --second        numbers of something that takes two lines … [1, 2.5]
  --flag                   whether. [yes]
  --word                   some word.
  --inner.: low, high

steppe outer --help WORD explains options, `all` all of them. What is [yes] is
switched off by --no-NAME.
"""
    )


def test_a_word_explains_the_options_that_it_names(capsys):
    whole = """\
--first, --second
      numbers of something that takes two lines to say. Default: 1, 2.5."""
    assert asked("first") == asked("--SECOND") == asked("first", "second") == whole
    kind = "--kind {a, b}\n      which of the two. Default: b."
    assert help.show(Outer, "outer", ["kind"], Outer(kind="b")) == kind
    assert asked("inner") == "--inner.low, --inner.high\n      ends. Default: 0, 1."
    assert asked("flag") == "--flag, --no-flag\n      whether. Default: yes."
    # None has it in its name: explanations are read.
    assert asked("some word") == "--word\n      some word."
    everything = asked("ALL")
    assert whole in everything
    assert "--inner.low" in everything
    with pytest.raises(ValueError, match=r"speaks of 'wrod'; did you mean 'word'\? `steppe outer"):
        asked("wrod")
    for given in (["--help", "flag"], ["--help=flag"], ["--kind", "a", "-h", "flag", "--help"]):
        with pytest.raises(SystemExit):
            options.parse(Outer, given, "outer")
        assert capsys.readouterr().out == f"{asked('flag')}\n"


def test_what_is_given_first_stands_first_and_the_rest_is_named():
    many = dataclasses.make_dataclass(
        "Many",
        [(f"option_{i}", int, i) for i in range(60)]
        + [("model", str, "m"), ("inner", Inner, Inner())],
        frozen=True,
    )
    many.__doc__ = "Many."
    shown = help.show(many, "many").splitlines()
    assert shown[4].split() == ["--model", "[m]"]
    assert len(shown) < help.LINES
    assert all(any(f"--option-{i}" in line for line in shown) for i in range(60))


@pytest.mark.parametrize("command", [*completion.OPTIONS, *(f"bench {b}" for b in bench.BENCHES)])
def test_every_command_fits_a_screen_and_names_every_option(command, capsys):
    with contextlib.suppress(SystemExit):
        cli.main([*command.split(), "--help"])
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert len(lines) < help.LINES
    assert max(map(len, lines)) <= 80
    with contextlib.suppress(SystemExit):
        cli.main([*command.split(), "--help", "all"])
    everything = capsys.readouterr().out
    for option in completion._options(command):
        if not option.startswith("--no-") and ".no-" not in option:
            assert option in everything, option
            group, dot, name = option.removeprefix("--").rpartition(".")
            place = shown.partition(f"--{group}.:")[2] if dot else shown
            assert (name if dot else option) in place or option in shown, option


def test_the_first_word_is_named(capsys):
    assert cli.main(["merge", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: steppe merge METHOD BASE MODEL ... [options]\nMETHOD: average" in shown
    assert cli.main(["merge", "ties", "--help"]) == 0
    assert capsys.readouterr().out == shown
    assert cli.main(["help", "merge"]) == 0
    assert capsys.readouterr().out == shown
    assert cli.main(["--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) < help.LINES
    assert cli.main(["finetune", "--help"]) == 0
    assert "usage: steppe finetune [RECIPE] [options]\nRECIPE: " in capsys.readouterr().out
    # A recipe's own values are its defaults.
    assert cli.main(["finetune", "vader-lora", "--help", "learning-rate"]) == 0
    assert "Default: 0.0005." in capsys.readouterr().out
