"""What ``steppe COMMAND --help`` shows: one screen, and all about the options that words name.

steppe finetune --help          a line for each option that fits, the others by name
steppe finetune --help rho      every option with "rho" in its name, explained in full
steppe finetune --help data     those of the data
steppe finetune --help all      everything
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Sequence
from typing import Any

from steppe.data.errors import near
from steppe.launch import completion, options, prose, usage

ALL = "all"
FLAGS = ("-h", "--help")
# Lines of a screen, the prompt below them included.
LINES = 40
# Columns of the names; a longer one shortens what stands beside it.
LEFT = 26
# What is given first, where a command has it; the others follow as they are declared.
FIRST = (
    "model",
    "teacher",
    "student",
    "base",
    "models",
    "runs",
    "run",
    "on",
    "tasks",
    "sources",
    "methods",
    "data.source",
    "data.task",
    "data.text",
    "data.label",
    "out",
    "resume",
    "dry-run",
    "overlay",
    "sharpness",
    "rho",
    "scheme",
    "divergence",
    "epochs",
    "steps",
    "batch-size",
    "optim.learning-rate",
    "data.limit",
    "data.max-length",
    "seed",
    "seeds",
)
_NAMES = re.compile(r"^[a-z0-9-]+(, [a-z0-9-]+)+: ")


@dataclasses.dataclass(frozen=True)
class Entry:
    """Options that are explained together.

    Attributes:
      names: as they are given, without the dashes.
      values: the few that they take; empty = any.
      words: their explanation.
      default: as text, one for each name; empty = nothing.
      switch: they take no value, and ``no-`` in front of the name switches them off.
    """

    names: tuple[str, ...]
    values: tuple[str, ...]
    words: str
    default: tuple[str, ...]
    switch: bool = False

    def flags(self) -> str:
        return ", ".join(f"--{name}" for name in self.names)

    def off(self) -> str:
        """Flags that switch them off."""
        return ", ".join(f"--{completion.off(name)}" for name in self.names)


def asked(args: Sequence[str]) -> list[str] | None:
    """The words after ``--help``; None where no help is wanted."""
    for place, word in enumerate(args):
        flag, is_set, value = word.partition("=")
        if flag in FLAGS:
            words = ([value] if is_set else []) + list(args[place + 1 :])
            return [word for word in words if word and word not in FLAGS]
    return None


def show(kind: type, prog: str, words: Sequence[str] = (), default: Any = None) -> str:
    """The text.

    Args:
      kind: dataclass of the settings.
      prog: the command, maybe with a recipe.
      words: what is asked about; empty = one screen of everything.
      default: an instance of ``kind`` with the values that hold if nothing is said.

    Raises:
      ValueError: no option has a word in its name or its explanation.
    """
    own, inner = entries(kind, default)
    everything = [*own, *(entry for group in inner.values() for entry in group)]
    if words:
        found = [one for word in words for one in _about(everything, word, prog)]
        return "\n".join(map(_whole, dict.fromkeys(found)))
    place, first = _places(prog), completion.PLACES.get((prog, 1))
    before, dashes, after = f"{prog} {place}".strip().partition(" -- ")
    head = [options.about(kind), "", f"usage: steppe {before} [options]{dashes}{after}"]
    if place and first:
        head.append(prose.fill(", ".join(first()), f"{place.split()[0].strip('[]')}: "))
    tail = [_group(name, group) for name, group in inner.items()]
    last = f"steppe {prog} --help WORD explains options, `all` all of them."
    if any("yes" in entry.default for entry in everything if entry.switch):
        last += " What is [yes] is switched off by --no-NAME."
    tail += ["", prose.fill(last)]
    return "\n".join(_screen(head, _sorted(own, everything), own, tail))


def _about(everything: Sequence[Entry], word: str, prog: str) -> list[Entry]:
    word = word.lstrip("-").lower()
    name = word.replace("_", "-")
    found = [e for e in everything if word == ALL or any(name in one for one in e.names)]
    found = found or [entry for entry in everything if word in entry.words.lower()]
    if not found:
        nearest = near(word, [name for entry in everything for name in entry.names])
        raise ValueError(
            f"no option of `steppe {prog}` speaks of {word!r}{nearest or ';'} `steppe {prog} "
            "--help` lists them"
        )
    return found


def _sorted(own: Sequence[Entry], everything: Sequence[Entry]) -> list[Entry]:
    """Those that are given first, also out of groups, then the others of the command itself."""
    first = [entry for name in FIRST for entry in everything if name in entry.names]
    return list(dict.fromkeys([*first, *own]))


def _screen(
    head: Sequence[str], ranked: Sequence[Entry], own: Sequence[Entry], tail: Sequence[str]
) -> list[str]:
    """As many of the entries on lines of their own as fit, and the names of the others."""
    around = sum(block.count("\n") + 1 for block in (*head, "", *tail))
    shown = list(ranked[: max(LINES - 1 - around, 1)])
    while True:
        rest = [entry for entry in own if entry not in shown]
        more = [prose.fill(", ".join(entry.flags() for entry in rest), "and: ")] if rest else []
        lines = len(shown) + sum(block.count("\n") + 1 for block in more) + around
        if lines < LINES or len(shown) == 1:
            return [*head, "", *map(_line, shown), *more, *tail]
        shown = shown[:-1]


def entries(
    kind: type, default: Any = None, prefix: str = ""
) -> tuple[list[Entry], dict[str, list[Entry]]]:
    """The options of a dataclass: its own, and by name those of the dataclasses in it.

    What a class adds to those that it inherits stands first. Neighbours that one line of the
    docstring explains are one entry.
    """
    hints, said = typing.get_type_hints(kind), options.explained(kind)
    added = inspect.get_annotations(kind)
    fields = sorted(dataclasses.fields(kind), key=lambda field: field.name not in added)
    own: list[Entry] = []
    inner: dict[str, list[Entry]] = {}
    for field in fields:
        name, hint = f"{prefix}{field.name}".replace("_", "-"), hints[field.name]
        value = options.default_of(field, default)
        if dataclasses.is_dataclass(hint):
            inside = entries(typing.cast(type, hint), value, f"{prefix}{field.name}.")
            inner |= {name: inside[0], **inside[1]}
            continue
        entry = Entry(
            (name,),
            completion.choices(hint),
            said.get(field.name, ""),
            (_text(value),),
            hint is bool,
        )
        last = own[-1] if own and entry.words else None
        if last is not None and (last.words, last.values) == (entry.words, entry.values):
            own[-1] = dataclasses.replace(
                last, names=last.names + entry.names, default=last.default + entry.default
            )
        else:
            own.append(entry)
    return own, inner


def _text(value: Any) -> str:
    """A default as it is given on the command line; empty for nothing."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _line(entry: Entry) -> str:
    """An entry on one line, its explanation cut to the width."""
    left = f"  {entry.flags()}".ljust(LEFT)
    last = f" [{', '.join(entry.default)}]" if all(entry.default) else ""
    room = prose.columns() - len(left) - 1
    if len(last) > room // 2:
        last = f"{last[: room // 2 - 2].rstrip(' ,')} …]"
    cut = textwrap.shorten(_own_words(entry), max(room - len(last), 8), placeholder=" …")
    return f"{left} {cut}{last}"[: prose.columns()].rstrip()


def _own_words(entry: Entry) -> str:
    """The explanation without the names in front of it, where those are options."""
    found = _NAMES.match(entry.words)
    short = {name.rpartition(".")[2] for name in entry.names}
    named = found is not None and short & set(found[0].rstrip(": ").split(", "))
    return entry.words[found.end() :] if found and named else entry.words


def _whole(entry: Entry) -> str:
    values = f" {{{', '.join(entry.values)}}}" if entry.values else ""
    flags = f"{entry.flags()}, {entry.off()}" if entry.switch else entry.flags()
    known = [value for value in entry.default if value]
    if len(known) < len(entry.default):  # which of them is it the default of?
        pairs = zip(entry.names, entry.default, strict=True)
        known = [f"{name} {value}" for name, value in pairs if value]
    default = f" Default: {', '.join(known)}." if known else ""
    first = prose.fill(f"{flags}{values}", "", "    ")
    return f"{first}\n{prose.fill(_own_words(entry) + default, '      ')}"


def _group(name: str, group: Sequence[Entry]) -> str:
    names = [each.rpartition(".")[2] for entry in group for each in entry.names]
    return prose.fill(", ".join(names), f"  --{name}.: ", "      ")


def _places(prog: str) -> str:
    """What stands between a command and its options, as the list of the commands shows it."""
    line = next((line for line, _ in usage.COMMANDS if line.split()[0] == prog), prog)
    return line.removeprefix(prog).strip()
