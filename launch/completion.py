"""``steppe completion bash|zsh|fish``: a script for the shell, which asks this program for words.

  eval "$(steppe completion bash)"          in ~/.bashrc; zsh the same in ~/.zshrc
  steppe completion fish | source           in ~/.config/fish/config.fish

Commands, recipes, methods, assets, shapes, overlays, options and the values of options that have
few are completed; elsewhere the shell completes files. What stands behind the options of
``launch``, and behind ``--`` of ``submit``, is completed as a command of its own.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

WORDS = "--words"
USAGE = "usage: steppe completion bash|zsh|fish      prints a script; see its first lines\n"
# command -> "module:dataclass" of its options.
OPTIONS = {
    "tour": "steppe.launch.tour.settings:TourConfig",
    "finetune": "steppe.launch.config:FinetuneConfig",
    "distill": "steppe.launch.distill.settings:DistillConfig",
    "quantize": "steppe.launch.quantize.settings:QuantizeConfig",
    "compare": "steppe.launch.compare.settings:CompareConfig",
    "merge": "steppe.launch.merge.settings:MergeConfig",
    "blackbox": "steppe.launch.blackbox.settings:BlackboxConfig",
    "continual": "steppe.launch.continual.settings:ContinualConfig",
    "evaluate": "steppe.launch.config:EvaluateConfig",
    "generate": "steppe.launch.config:GenerateConfig",
    "chat": "steppe.launch.config:ChatConfig",
    "plan": "steppe.launch.plan.settings:PlanConfig",
    "sharpness": "steppe.launch.sharpness:SharpnessConfig",
    "submit": "steppe.launch.pods.submit:SubmitConfig",
}
# Those of ``launch``, which reads them itself.
LAUNCH: dict[str, tuple[str, ...]] = {
    "--local-processes": (),
    "--devices-per-process": (),
    "--platform": ("cpu", "gpu"),
    "--grace": (),
}
SCRIPTS = {
    "bash": """\
# eval "$(steppe completion bash)"
_steppe() {
  local found
  COMPREPLY=()
  found=$(steppe completion --words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
  if [ -n "$found" ]; then
    mapfile -t COMPREPLY < <(compgen -W "$found" -- "${COMP_WORDS[COMP_CWORD]}")
  fi
}
complete -o default -o nosort -F _steppe steppe
""",
    "zsh": """\
# eval "$(steppe completion zsh)"
_steppe() {
  local -a found
  found=(${(f)"$(steppe completion --words "${words[@]:1:$((CURRENT-1))}" 2>/dev/null)"})
  if (( ${#found} )); then compadd -- $found; else _files; fi
}
compdef _steppe steppe
""",
    "fish": """\
# steppe completion fish | source
function __steppe_words
  set -l words (commandline -opc) (commandline -ct)
  steppe completion --words $words[2..-1] 2>/dev/null
end
complete -c steppe -a '(__steppe_words)'
""",
}


def main(args: list[str], commands: Sequence[str]) -> int:
    """Prints a script, or the words that may stand last in a line."""
    if args[:1] == [WORDS]:
        print("\n".join(candidates(args[1:], commands)))
        return 0
    if len(args) == 1 and args[0] in SCRIPTS:
        print(SCRIPTS[args[0]], end="")
        return 0
    asked = args in (["-h"], ["--help"])
    print(USAGE, end="", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def candidates(words: Sequence[str], commands: Sequence[str]) -> list[str]:
    """What may stand in place of the last of ``words``, all of which follow ``steppe``; empty
    where a file is wanted."""
    *before, last = words or [""]
    if not before:
        return _starting(last, [*commands, "--help", "--version"])
    command = before[0]
    inner = _inner(words)
    if inner is not None:
        return _starting(last, RANKS) if len(inner) == 1 else candidates(inner, RANKS)
    options = _options(command)
    if last.startswith("-"):
        return _starting(last, [*options, "--help"])

    def values(flag: str) -> list[str]:
        few = VALUES[flag]() if flag in VALUES and flag in options else options.get(flag, ())
        return _starting(last, few)

    if before[-1] in options:
        return values(before[-1])
    # Values of an option that takes several stand between it and the word.
    flags = [number for number, word in enumerate(before) if word.startswith("-")]
    if flags:
        return values(before[flags[-1]])
    place = (command, len(before))
    return _starting(last, PLACES[place]()) if place in PLACES else []


def _inner(words: Sequence[str]) -> Sequence[str] | None:
    """The words of the command that ``launch`` or ``submit`` runs, the last one included; None
    where it has not begun."""
    if words[0] == "submit":
        return words[words.index("--") + 1 :] if "--" in words[:-1] else None
    if words[0] != "launch":
        return None
    place = 1
    while place < len(words) and words[place].startswith("-"):
        # A value of its own follows, unless it stands behind "=".
        place += 1 if "=" in words[place] else 2
    return words[place:] or None


def _starting(start: str, words: Sequence[str]) -> list[str]:
    return [word for word in words if word.startswith(start)]


def _options(command: str) -> dict[str, tuple[str, ...]]:
    """Option -> its values where they are few, else ()."""
    where = OPTIONS.get(command)
    if command == "launch":
        return LAUNCH
    if where is None:
        return {}
    module, _, name = where.partition(":")
    return dict(_fields(getattr(importlib.import_module(module), name)))


def _fields(kind: Any, prefix: str = "") -> list[tuple[str, tuple[str, ...]]]:
    hints = typing.get_type_hints(kind)
    found: list[tuple[str, tuple[str, ...]]] = []
    for one in dataclasses.fields(kind):
        hint, flag = hints[one.name], f"{prefix}{one.name}".replace("_", "-")
        if dataclasses.is_dataclass(hint):
            found += _fields(hint, f"{prefix}{one.name}.")
        elif hint is bool:
            negative = f"{prefix}no-{one.name}".replace("_", "-")
            found += [(f"--{flag}", ()), (f"--{negative}", ())]
        else:
            found.append((f"--{flag}", _values(hint)))
    return found


def _values(hint: Any) -> tuple[str, ...]:
    """The values of a Literal, also inside a tuple or beside None."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return tuple(str(value) for value in typing.get_args(hint))
    if origin in (tuple, typing.Union, types.UnionType):
        return tuple(v for part in typing.get_args(hint) for v in _values(part))
    return ()


def _recipes(module: str, name: str = "RECIPES") -> Callable[[], list[str]]:
    return lambda: list(getattr(importlib.import_module(module), name))


def _asset_names() -> list[str]:
    from steppe.data import assets

    return [asset.name for asset in assets.list()]


def _planned() -> list[str]:
    from steppe.launch.distill.recipes import RECIPES as DISTILLATIONS
    from steppe.launch.plan.shapes import SHAPES
    from steppe.launch.recipes import RECIPES

    return [*SHAPES, *RECIPES, *DISTILLATIONS]


def _overlays() -> list[str]:
    from steppe.launch.overlays import KNOWN

    return list(KNOWN)


def _accelerators() -> list[str]:
    from steppe.launch.plan.accelerators import NAMES

    return list(NAMES)


def _papers() -> list[str]:
    from steppe.launch.papers import PAPERS

    return [paper.name for paper in PAPERS]


# Commands that several processes can run.
RANKS = ("finetune", "distill")
# Option -> its values, where they are not those of a Literal.
VALUES: dict[str, Callable[[], list[str]]] = {"--overlay": _overlays, "--on": _accelerators}
# (command, number of words before) -> what may stand there.
PLACES: dict[tuple[str, int], Callable[[], list[str]]] = {
    ("finetune", 1): _recipes("steppe.launch.recipes"),
    ("distill", 1): _recipes("steppe.launch.distill.recipes"),
    ("plan", 1): _planned,
    ("compare", 1): _recipes("steppe.launch.recipes", "COMPARISONS"),
    ("merge", 1): _recipes("steppe.launch.merge.settings", "METHODS"),
    ("assets", 1): lambda: ["list", "fetch", "check"],
    ("overlays", 1): lambda: ["list"],
    ("bench", 1): _recipes("steppe.launch.bench.cli", "BENCHES"),
    ("papers", 1): _papers,
    ("completion", 1): lambda: list(SCRIPTS),
    # More assets than these are rarely fetched by one line.
    **{("assets", number): _asset_names for number in range(2, 12)},
}
