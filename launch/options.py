"""Options of a command from its dataclass of settings: parsing, help, and mistakes in one line.

The explanations in the help are those of the docstrings. A line of the docstring may document
several settings, ``b1, b2, eps: of Adam.``; then each of them shows the line, names included.
Where it says no more than ``as in `steppe COMMAND`.`` they show what they say there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import re
import typing
from collections.abc import Mapping
from typing import Any

from steppe.data.errors import near
from steppe.launch import completion, prose

_SECTION = "Attributes:\n"
_CHOICE = re.compile(r"(invalid choice '([^']*)' for argument '[^']*')\. (Expected one of (.*))")
# Lines of boxes, and colours.
_FRAME = re.compile(r"[\u2500-\u259f]|\x1b\[[0-9;]*m")
# Where a message begins that says what one setting must be, or two.
_SETTINGS = re.compile(r"([a-z][a-z0-9_.]*)(?:( and | \+ )([a-z][a-z0-9_.]*))?(?= must )")
# In front of what a group of settings says of itself.
_GROUP = re.compile(r"^Error parsing (?:([\w.]+): )?")
_ELSEWHERE = re.compile(r"as in `steppe (\w+)`\.")


def parse(kind: Any, args: list[str], prog: str, default: Any = None) -> Any:
    """The settings that ``args`` say; shows the help and leaves where they ask for it.

    Args:
      kind: frozen dataclass.
      args: words of the command line, after the command.
      prog: the command, for messages.
      default: an instance of ``kind``: what is not said stays as it is there.

    Raises:
      ValueError: an unknown option, a value of the wrong form or out of range; one line.
      SystemExit: the help was shown.
    """
    from steppe.launch import help

    words = help.asked(args)
    if words is not None:
        print(help.show(kind, prog, words, default))
        raise SystemExit(0)
    import tyro

    registry = tyro.constructors.ConstructorRegistry()
    registry.struct_rule(_fields)
    options: dict[str, Any] = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), registry:
            return tyro.cli(kind, args=args, prog=f"steppe {prog}", description="", **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(
            f"{_one_line(said.getvalue(), kind)}; `steppe {prog} --help` lists the options"
        ) from None


def _one_line(box: str, kind: Any) -> str:
    """What the parser says in a box of several lines about settings of ``kind``."""
    lines = [_FRAME.sub("", line) for line in box.split("\n")]
    # Rules may be drawn in dashes; options begin with two of them.
    lines = [re.sub(r"-{3,}", " ", line).strip(" |") for line in lines]
    words = " ".join(" ".join(lines).split())
    words = re.sub(
        r"^(Parsing error|Unrecognized options|Value error|Required options)\s+", "", words
    )
    words = re.sub(r"^(Invalid choice|Missing argument)\s+(?=invalid|Missing)", "", words)
    words = re.split(r" For full helptext| Argument helptext", words)[0].rstrip(". ")
    group = _GROUP.match(words)
    words = words[group.end() :] if group else words
    words = as_options(kind, words, (group[1] or "") if group else "")
    words = re.sub(r" (?=Perhaps you meant:|Arguments similar to --)", ". ", words)
    return _CHOICE.sub(_suggested, words)


def as_options(kind: Any, text: str, group: str = "") -> str:
    """A message about settings of ``kind``, in the words of the command line.

    ``data.max_length must be`` becomes ``--data.max-length must be``, and so do two settings with
    "and" or "+" between them. Names count where a message begins, and only those that a setting
    has: what an overlay or a method in a list says of its own stays as it is.

    Args:
      group: settings whose own check it is, such as ``base.data``; names are those within it.
    """
    said = _SETTINGS.match(text)
    if said is None:
        return text
    known = dict(completion.flags(kind))
    if not any(flag.startswith(f"--{group}.") for flag in known):
        group = ""  # the parser names the whole by its class
    # A group's checks call a setting by its name, or by the group's last part and its name.
    places = (group, group.rpartition(".")[0])
    found = []
    for name in filter(None, (said[1], said[3])):
        tried = [f"--{f'{place}.{name}'.lstrip('.')}".replace("_", "-") for place in places]
        found += [flag for flag in tried if flag in known][:1] or [""]
    if "" in found:
        return text
    named = (said[2] or "").join(found)
    return named + text[said.end() :]


def _suggested(said: re.Match[str]) -> str:
    """A choice that is none, with the nearest one."""
    nearest = near(said[2], re.findall("'([^']*)'", said[4]))
    return f"{said[1]}{nearest or ';'} {said[3][0].lower()}{said[3][1:]}"


def _fields(info: Any) -> Any:
    """The parser's rule for dataclasses, with explanations from :func:`explained`."""
    from tyro.constructors import MISSING_NONPROP, StructConstructorSpec, StructFieldSpec

    kind = info.type
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return None
    types = typing.get_type_hints(kind, include_extras=True)

    fields = tuple(
        StructFieldSpec(
            name=field.name,
            type=types[field.name],
            default=default_of(field, info.default, MISSING_NONPROP),
            # Looked up when it is shown.
            helptext=functools.partial(_explanation, kind, field.name),
        )
        for field in dataclasses.fields(kind)
    )
    return StructConstructorSpec(instantiate=typing.cast(Any, kind), fields=fields)


def default_of(field: dataclasses.Field[Any], given: Any, missing: Any = None) -> Any:
    """The value of a setting that is not said: that of ``given`` where it is an instance, else
    the class's own; ``missing`` where there is none."""
    if dataclasses.is_dataclass(given):
        return getattr(given, field.name)
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return missing


def about(kind: type) -> str:
    """The docstring of a class without its ``Attributes``, filled to the terminal's width."""
    text = inspect.cleandoc(kind.__doc__ or "").partition(_SECTION)[0]
    return prose.reflow(_plain(text))


@functools.cache
def explained(kind: type) -> Mapping[str, str]:
    """Setting -> its explanation in the docstrings of a class and of those above it, one line."""
    found: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        if dataclasses.is_dataclass(parent):
            found |= _attributes(inspect.cleandoc(parent.__doc__ or ""))
    return found


def _explanation(kind: type, name: str) -> str | None:
    return explained(kind).get(name)


def _attributes(text: str) -> dict[str, str]:
    entries: list[str] = []
    for line in text.partition(_SECTION)[2].split("\n"):
        if line and not line[0].isspace():  # the next section
            break
        if line[:3].strip():
            entries.append(line)
        elif entries:
            entries[-1] += f" {line}"
    found = {}
    for entry in entries:
        head, _, words = _plain(" ".join(entry.split())).partition(": ")
        names = head.split(", ")
        shown = ", ".join(name.replace("_", "-") for name in names)
        elsewhere = _ELSEWHERE.fullmatch(words)
        for name in names:
            if elsewhere:
                found[name] = explained(_settings_of(elsewhere[1]))[name]
            else:
                found[name] = words if len(names) == 1 else f"{shown}: {words}"
    return found


def _settings_of(command: str) -> type:
    from steppe.launch.completion import OPTIONS

    module, _, name = OPTIONS[command].partition(":")
    kind: type = getattr(importlib.import_module(module), name)
    return kind


def _plain(text: str) -> str:
    """Docstring markup as a terminal shows it."""
    return text.replace("``", "`")
