"""``steppe completion bash|zsh|fish``: a script for the shell, which asks this program for words.

  eval "$(steppe completion bash)"          in ~/.bashrc (bash 4 or newer)
  eval "$(steppe completion zsh)"           in ~/.zshrc, below compinit
  steppe completion fish | source           in ~/.config/fish/config.fish

Commands, recipes, methods, assets, shapes, overlays with their settings, options and the values of
options that have few are completed, and what begins with ``asset:``; elsewhere the shell completes
files. What stands behind the options of ``launch``, and behind ``--`` of ``submit``, is completed
as a command of its own.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steppe.data.errors import unknown

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
    "generate": "steppe.launch.sampling:GenerateConfig",
    "chat": "steppe.launch.sampling:ChatConfig",
    "plan": "steppe.launch.plan.settings:PlanConfig",
    "sharpness": "steppe.launch.sharpness:SharpnessConfig",
    "submit": "steppe.launch.pods.submit:SubmitConfig",
}
# Roles of assets, the options that take them, and the commands that begin with a model.
DATA, WEIGHTS = "data", "weights"
MODELS = {"--model", "--teacher", "--student", "--base", "--models"}
NAMES_MODELS = {"quantize", "merge", "evaluate", "generate", "chat", "plan"}
SOURCES = {"--data.source", "--data", "--tasks", "--elsewhere", "--sources", "--transfer"}
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
  # bash 4 or newer. Where it takes ":" and "=" for the ends of words, "asset:NAME" and "--on=NAME"
  # are read whole, and only what follows the last of them is replaced.
  local line=${COMP_LINE:0:COMP_POINT} words last found ends=""
  if [[ $COMP_WORDBREAKS == *:* ]]; then ends+=":"; fi
  if [[ $COMP_WORDBREAKS == *=* ]]; then ends+="="; fi
  read -ra words <<< "$line"
  if [[ $line == *[[:space:]] ]]; then words+=(""); fi
  last=${words[-1]}
  COMPREPLY=()
  found=$(steppe completion --words "${words[@]:1}" 2>/dev/null)
  if [ -n "$found" ]; then
    mapfile -t COMPREPLY < <(compgen -W "$found" -- "$last")
    if [[ -n $ends && $last == *[$ends]* ]]; then
      COMPREPLY=("${COMPREPLY[@]#"${last%"${last##*[$ends]}"}"}")
    fi
    case ${COMPREPLY[*]} in *: | */ | *=) compopt -o nospace 2>/dev/null ;; esac
  fi
}
complete -o default -o nosort -F _steppe steppe
""",
    "zsh": """\
# autoload -Uz compinit && compinit; eval "$(steppe completion zsh)"
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
    if len(args) == 1 and not asked:
        raise ValueError(unknown("shell", args[0], SCRIPTS))
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
    options = _options(*before[:2])
    flag, is_set, value = last.partition("=")
    if last.startswith("-") and is_set:
        return [f"{flag}={word}" for word in _of_option(flag, value, options)]
    if last.startswith("-"):
        return _starting(last, [*options, "--help"])
    if before[-1] in options:
        return _of_option(before[-1], last, options)
    # Values of an option that takes several stand between it and the word.
    given = [word for word in before if word.startswith("-")]
    if given:
        return _of_option(given[-1], last, options)
    place = (command, len(before))
    if place in PLACES:
        return _starting(last, PLACES[place]())
    return _addresses(last, WEIGHTS) if command in NAMES_MODELS else []


def _of_option(flag: str, last: str, options: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Values of ``flag`` that begin with ``last``."""
    few = VALUES[flag](last) if flag in VALUES and flag in options else options.get(flag, ())
    if few or flag not in {*SOURCES, *MODELS}:
        return _starting(last, few)
    return _addresses(last, DATA if flag in SOURCES else WEIGHTS)


def _addresses(last: str, role: str) -> list[str]:
    """What ``asset:`` may be followed by; nothing where ``last`` is not its beginning, of three
    letters at least: files begin with "a" too."""
    scheme = "asset:"
    if len(last) < 3 or not (last.startswith(scheme) or scheme.startswith(last)):
        return []
    from steppe.data import assets
    from steppe.data.assets import readers

    names = (
        list(readers.PARTS)
        if role == DATA
        else [asset.name for asset in assets.list() if asset.role == WEIGHTS]
    )
    return _starting(last, [f"{scheme}{name}" for name in names])


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


def _options(command: str, word: str = "") -> dict[str, tuple[str, ...]]:
    """Option -> its values where they are few, else (); ``word`` stands behind the command."""
    where = OPTIONS.get(command)
    if command == "launch":
        return LAUNCH
    if command == "assets":
        from steppe.launch.assets import CONSENT

        return {CONSENT: ()} if word == "fetch" else {}
    if command == "compare":
        from steppe.launch.recipes import COMPARISONS

        if word in COMPARISONS:
            return dict(flags(type(COMPARISONS[word]())))
    if command == "bench":
        from steppe.launch.bench.cli import BENCHES

        where = ":".join(BENCHES[word]) if word in BENCHES else None
    if where is None:
        return {}
    module, _, name = where.partition(":")
    return dict(flags(getattr(importlib.import_module(module), name)))


def off(name: str) -> str:
    """What switches an option off: ``data.no-packed`` for ``data.packed``."""
    group, dot, own = name.rpartition(".")
    return f"{group}{dot}no-{own}"


def flags(kind: Any, prefix: str = "") -> list[tuple[str, tuple[str, ...]]]:
    """Options of a dataclass of settings and of those in it; with their values, if few."""
    hints = typing.get_type_hints(kind)
    found: list[tuple[str, tuple[str, ...]]] = []
    for one in dataclasses.fields(kind):
        hint, flag = hints[one.name], f"{prefix}{one.name}".replace("_", "-")
        if dataclasses.is_dataclass(hint):
            found += flags(hint, f"{prefix}{one.name}.")
        elif hint is bool:
            found += [(f"--{flag}", ()), (f"--{off(flag)}", ())]
        else:
            found.append((f"--{flag}", choices(hint)))
    return found


def choices(hint: Any) -> tuple[str, ...]:
    """The values of a Literal, also inside a tuple or beside None."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return tuple(str(value) for value in typing.get_args(hint))
    if origin in (tuple, typing.Union, types.UnionType):
        return tuple(v for part in typing.get_args(hint) for v in choices(part))
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


def _overlays(last: str) -> list[str]:
    """Names of overlays; behind one, its settings that are not given yet."""
    from steppe.launch.overlays import KNOWN, settings_of

    name, colon, rest = last.partition(":")
    if not colon or name not in KNOWN:
        return list(KNOWN)
    given, comma, _ = rest.rpartition(",")
    taken = {part.partition("=")[0] for part in given.split(",")}
    return [f"{name}:{given}{comma}{key}=" for key in settings_of(name) if key not in taken]


def _accelerators(_: str) -> list[str]:
    from steppe.launch.plan.accelerators import NAMES

    return list(NAMES)


def _papers() -> list[str]:
    from steppe.launch.papers import PAPERS

    return [paper.name for paper in PAPERS]


# Commands that several processes can run.
RANKS = ("finetune", "distill")
# Option -> its values for a word that has begun, where they are not those of a Literal.
VALUES: dict[str, Callable[[str], list[str]]] = {"--overlay": _overlays, "--on": _accelerators}
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
