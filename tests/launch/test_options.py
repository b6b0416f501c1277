"""The help of every command: each option is explained, and lines fit the terminal."""

import dataclasses
import typing

import pytest

from steppe.launch import cli, completion, options, overlays, prose
from steppe.launch.config import FinetuneConfig
from steppe.launch.merge.evaluation import MergedConfig
from steppe.launch.merge.study_settings import StudyConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    """The inner settings.

    Attributes:
      low, high: ends of the range, as
        in ``numpy``: both count.
    """

    low: int = 0
    high: int = 9


@dataclasses.dataclass(frozen=True)
class Outer(Inner):
    """``steppe outer``: a first line that is
    broken.

      an = equation

    Attributes:
      one: of its own; and a word
        (in brackets) on the next line.
      high: said anew.
      epochs, batch_size: as in ``steppe finetune``.

    Raises:
      ValueError: never.
    """

    one: str = "x"
    epochs: float = 1.0
    batch_size: int = 1
    inner: Inner = Inner(low=3)


def test_explanations_of_joined_names_and_of_other_commands():
    said = options.explained(Outer)
    assert said["one"] == "of its own; and a word (in brackets) on the next line."
    assert said["low"] == "low, high: ends of the range, as in `numpy`: both count."
    assert said["high"] == "said anew."
    assert said["epochs"] == "passes over the training split; ignored when steps > 0."
    assert said["batch_size"].startswith("examples an update, ")
    assert set(said) == {"one", "low", "high", "epochs", "batch_size"}
    assert options.about(Outer) == "`steppe outer`: a first line that is broken.\n\n  an = equation"


def test_defaults_and_nested_settings_are_parsed():
    assert options.parse(Outer, [], "outer") == Outer()
    given = Outer(one="y", inner=Inner(high=4))
    made = options.parse(Outer, ["--inner.low", "2", "--batch-size=8"], "outer", given)
    assert made == Outer(one="y", batch_size=8, inner=Inner(low=2, high=4))
    with pytest.raises(
        ValueError, match=r"--hig, 3\. Perhaps you meant: --high INT .*--inner.high"
    ):
        options.parse(Outer, ["--hig", "3"], "outer")


def kinds():
    found = [options._settings_of(command) for command in completion.OPTIONS]
    found += [StudyConfig, MergedConfig]
    for kind in found:  # grows
        inner = (t for t in typing.get_type_hints(kind).values() if dataclasses.is_dataclass(t))
        found += [t for t in inner if t not in found]
    return found


def test_every_option_of_every_command_is_explained():
    for kind in kinds():
        said = options.explained(kind)
        assert set(said) == {field.name for field in dataclasses.fields(kind)}, kind
        assert all(text.endswith((".", ")")) for text in said.values()), kind


@pytest.mark.parametrize(
    "words", [["--help"], ["tour", "--help"], ["plan", "--help"], ["overlays", "list"]]
)
def test_lines_fit_the_terminal(words, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    if words[0] == "tour":
        assert "fine-tune, merge, distil and quantize" in shown
        assert "  --epochs, --batch-size   of the fine-tuning. [2.0, 8]" in shown


def test_settings_of_overlays_stand_below_their_names(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    shown = overlays.show()
    assert max(map(len, shown.splitlines())) <= prose.MOST
    for name in overlays.KNOWN:
        assert f"\n{name} " in f"\n{shown}"


def test_paragraphs_are_filled_again_and_equations_stay(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    text = (
        "one two three four five six\nseven eight\nnine\n\n  a  = b\n  c  = d\n\n\nlist:\n  item\n"
    )
    assert prose.reflow(text) == (
        "one two three four five six\nseven eight nine\n\n  a  = b\n  c  = d\n\nlist:\n  item"
    )
    assert prose.fill("a " + "x" * 40 + " b", "- ") == "- a\n  " + "x" * 40 + "\n  b"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("finetune --batch-size 0", "--batch-size must be >= 1, got 0;"),
        ("finetune --data.max-length 0", "--data.max-length must be >= 1, got 0;"),
        ("finetune --optim.learning-rate -1", "--optim.learning-rate must be > 0"),
        ("finetune --lora.rank -1", "--lora.rank must be >= 0, got -1;"),
        ("finetune --lora.drop 1", "--lora.drop must be in [0, 1)"),
        ("compare flat-minima --valid-limit -1", "--valid-limit must be >= 0"),
        ("compare flat-minima --base.data.limit -1", "--base.data.limit must be >= 0"),
        ("compare flat-minima --base.drop nan", "--base.drop must be"),
        ("compare merging --base.batch-size 0", "--base.batch-size must be >= 1"),
        ("submit --to slurm --grace -1 -- finetune", "--restarts and --grace must be >= 0"),
        ("tour --elsewhere zzz", "--elsewhere must be addresses of data"),
        ("compare flat-minima --seeds -1", "--seeds must be in [0, 2^32)"),
        # What lists say of their own is no option's.
        ("compare flat-minima --methods sam:rho=-1", "methods has 'sam:rho=-1': rho must be"),
        ("compare flat-minima --methods lora:rank=-1", "methods has 'lora:rank=-1': rank must be"),
        ("compare merging --methods ties:k=7", "methods has 'ties:k=7': k must be"),
    ],
)
def test_messages_speak_of_options(line, said, capsys):
    assert cli.main(line.split()) == 2
    assert f"steppe: error: {said}" in capsys.readouterr().err


def test_only_settings_where_a_message_begins_are_options():
    for text in (
        "length must be >= 1",  # of an overlay
        "rank must be >= 0",  # of a group; it does not say which
        "`epochs must be`",
        "epochs and layers must agree",
        "run epochs must be >= 1",
    ):
        assert options.as_options(FinetuneConfig, text) == text
