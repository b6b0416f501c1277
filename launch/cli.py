"""The command line: ``steppe COMMAND ...``.

Every mistake of the user's ends in one line on stderr and exit status 2, without a traceback
(``STEPPE_DEBUG=1`` shows it). An interrupted run ends with 130 and says how to resume, one
that SIGTERM stopped with 75; see ``steppe.launch.pods.codes`` for all of them.
"""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steppe.data import errors
from steppe.launch import help, options, usage

_parse, _unknown = options.parse, errors.unknown


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status (0, 2 for a mistake, 130 when interrupted).

    A rank of several leaves the process where it did not succeed: see ``pods.rank.leave``.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # our own process, not one that calls us as a function
        from steppe.launch import tuning

        tuning.prepare()
    try:
        status = _guarded(args)
    except BaseException:
        if argv is None and _rank() is not None:
            traceback.print_exc()
            _rank().leave(1)
        raise
    if argv is None and _rank() is not None:
        _rank().leave(status)
    return status


def _guarded(args: list[str]) -> int:
    try:
        return _dispatch(args)
    except KeyboardInterrupt as stop:
        # The loop raises a subclass whose text says what was saved and how to go on.
        rank = _rank()
        if rank is None or rank.lead():
            print(f"steppe: {str(stop) or 'interrupted'}", file=sys.stderr)
        return int(getattr(stop, "status", 130))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:  # the option parser has spoken already
        code = stop.code
        return code if isinstance(code, int) else (0 if code is None else 2)
    except (
        ValueError,
        OSError,
        KeyError,
        ImportError,
        MemoryError,
        RuntimeError,
        ArithmeticError,
    ) as error:
        if os.environ.get("STEPPE_DEBUG"):
            raise
        rank = _rank()
        lost = rank is not None and rank.lost(error)
        who = "" if rank is None else rank.name()
        # Below ``steppe launch`` the process that failed by itself has the word.
        launched = os.environ.get("STEPPE_LAUNCHED")
        if not (lost and launched):
            print(f"steppe: error: {who}{_one_line(error)}", file=sys.stderr)
            if launched:
                from steppe.launch.pods import local

                local.tell(launched, _one_line(error))
        return 69 if lost else 2


def _rank() -> Any:
    """The module of ranks where this process is one of several."""
    rank = sys.modules.get("steppe.launch.pods.rank")
    return rank if rank is not None and rank.joined() is not None else None


def _one_line(error: BaseException) -> str:
    """The message on one line; the class too where the message alone says too little."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split())
    return text if len(text.split()) > 2 else f"{type(error).__name__}: {text}"


def _dispatch(args: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {
        "tour": _tour,
        "finetune": _finetune,
        "distill": _distill,
        "quantize": _quantize,
        "blackbox": _blackbox,
        "compare": _compare,
        "merge": _merge,
        "continual": _continual,
        "evaluate": _evaluate,
        "generate": _generate,
        "chat": _chat,
        "assets": _assets,
        "report": _report,
        "plan": _plan,
        "sharpness": _sharpness,
        "overlays": _overlays,
        "launch": _launch,
        "submit": _submit,
        "papers": _papers,
        "doctor": _doctor,
        "completion": lambda words: _completion(words, list(commands)),
        "bench": _bench,
    }
    if len(args) > 1 and args[0] in ("-h", "--help", "help"):
        args = [args[1], "--help", *args[2:]]
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage.show())
        return 0 if args else 2
    if args[0] == "--version":
        from steppe.launch.machine import versions

        print("  ".join(f"{name} {version}" for name, version in versions().items()))
        return 0
    command = commands.get(args[0])
    if command is None:
        raise ValueError(_unknown("command", args[0], commands))
    return command(args[1:])


def settings(command: str, args: list[str]) -> Any:
    """Settings of ``finetune`` or ``distill``; a recipe may stand before them.

    Raises:
      ValueError: an unknown recipe or option, or a value out of range.
    """
    default: Any
    recipes: Mapping[str, Callable[[], Any]]
    if command == "distill":
        from steppe.launch.distill import recipes as distillations
        from steppe.launch.distill.settings import DistillConfig

        default, recipes = DistillConfig(), distillations.RECIPES
    else:
        from steppe.launch import recipes as finetunings
        from steppe.launch.config import FinetuneConfig

        default, recipes = FinetuneConfig(), finetunings.RECIPES
    prog = command
    if args and not args[0].startswith("-"):
        if args[0] not in recipes:
            raise ValueError(_unknown("recipe", args[0], recipes))
        default, prog = recipes[args[0]](), f"{command} {args[0]}"
        args = args[1:]
    return _parse(type(default), args, prog, default)


def _tour(args: list[str]) -> int:
    from steppe.launch.tour import settings as tours

    default = tours.full() if "--full" in args else tours.TourConfig()
    config = _parse(tours.TourConfig, args, "tour", default)
    from steppe.launch.tour import command

    command.run(config, command=["steppe", "tour", *args])
    return 0


def _finetune(args: list[str]) -> int:
    return _train("finetune", "steppe.launch.finetune", args)


def _distill(args: list[str]) -> int:
    return _train("distill", "steppe.launch.distill.command", args)


def _train(command: str, module: str, args: list[str]) -> int:
    """A command whose process may be one of several, and may be told to make room."""
    import importlib

    from steppe.launch.pods import rank, stop

    with stop.requeued():
        config = settings(command, args)
        run = importlib.import_module(module).run
        rank.join()
        run(config, command=["steppe", command, *args])
    return 0


def _compare(args: list[str]) -> int:
    from steppe.launch.compare.settings import CompareConfig
    from steppe.launch.recipes import COMPARISONS

    default: Any = CompareConfig()
    prog = "compare"
    if args and not args[0].startswith("-"):
        if args[0] not in COMPARISONS:
            raise ValueError(_unknown("recipe", args[0], COMPARISONS))
        default, prog = COMPARISONS[args[0]](), f"compare {args[0]}"
        args = args[1:]
    config = _parse(type(default), args, prog, default)
    words = ["steppe", *prog.split(), *args]
    if isinstance(config, CompareConfig):
        from steppe.launch.compare import command

        command.run(config, command=words)
        return 0
    from steppe.launch.merge import study

    study.run(config, command=words)
    return 0


def _continual(args: list[str]) -> int:
    from steppe.launch.continual.settings import ContinualConfig

    config = _parse(ContinualConfig, args, "continual")
    from steppe.launch.continual import command

    command.run(config, command=["steppe", "continual", *args])
    return 0


def _merge(args: list[str]) -> int:
    from steppe.launch.merge.settings import METHODS, MergeConfig

    named = list(itertools.takewhile(lambda word: not word.startswith("-"), args))
    rest = args[len(named) :]
    if named and help.asked(rest) is None:
        method, base, models = named[0], named[1:2], named[2:]
        if method not in METHODS:
            raise ValueError(_unknown("method", method, METHODS))
        if not models:
            raise ValueError(
                "say what to merge: steppe merge METHOD BASE MODEL MODEL ... --out FOLDER"
            )
        rest = ["--method", method, "--base", *base, "--models", *models, *rest]
    config = _parse(MergeConfig, rest, "merge")
    from steppe.launch.merge import command

    command.run(config, command=["steppe", "merge", *args])
    return 0


def _quantize(args: list[str]) -> int:
    from steppe.launch.quantize.settings import QuantizeConfig

    config = _parse(QuantizeConfig, _model_first(args), "quantize")
    _named(config.model, "quantize")
    from steppe.launch.quantize import command

    command.run(config, command=["steppe", "quantize", *args])
    return 0


def _blackbox(args: list[str]) -> int:
    from steppe.launch.blackbox.settings import BlackboxConfig

    # The source is what one says of the data first.
    short = [word.replace("--data=", "--data.source=", 1) for word in args]
    short = ["--data.source" if word == "--data" else word for word in short]
    config = _parse(BlackboxConfig, short, "blackbox")
    from steppe.launch.blackbox import command

    command.run(config, command=["steppe", "blackbox", *args])
    return 0


def _evaluate(args: list[str]) -> int:
    from steppe.launch.config import EvaluateConfig

    args = _model_first(args)
    model = next((a for f, a in itertools.pairwise(args) if f == "--model"), "")
    model = next((a.split("=", 1)[1] for a in args if a.startswith("--model=")), model)
    from steppe.launch import evaluation
    from steppe.launch.merge import evaluation as merged

    if model and merged.is_merged(model):
        merged.run(_parse(merged.MergedConfig, args, "evaluate", merged.MergedConfig(model)))
        return 0
    # A run's own data settings are the default, so that any of them can be set, even back to
    # the default of a fresh one.
    default = evaluation.defaults(model) if model else None
    evaluation.run(_parse(EvaluateConfig, args, "evaluate", default))
    return 0


def _generate(args: list[str]) -> int:
    from steppe.launch.sampling import GenerateConfig

    config = _parse(GenerateConfig, _model_first(args), "generate")
    _named(config.model, "generate")
    from steppe.launch import generate

    generate.run(config)
    return 0


def _chat(args: list[str]) -> int:
    from steppe.launch.sampling import ChatConfig

    config = _parse(ChatConfig, _model_first(args), "chat")
    _named(config.model, "chat")
    from steppe.launch import chat

    return chat.run(config)


def _model_first(args: list[str]) -> list[str]:
    """The model stands first, without a flag, as everybody would type it."""
    return ["--model", *args] if args and not args[0].startswith("-") else args


def _named(model: str, prog: str) -> None:
    if not model:
        raise ValueError(f"no model is named: steppe {prog} MODEL, such as asset:smollm2")


def _assets(args: list[str]) -> int:
    from steppe.launch import assets

    return assets.main(args)


def _report(args: list[str]) -> int:
    from pathlib import Path

    if len(args) != 1 or args[0].startswith("-"):
        wants_help = bool(args) and args[0] in ("-h", "--help")
        print("usage: steppe report RUN      writes RUN/report.html from what the run left")
        return 0 if wants_help else 2
    from steppe.launch.report import again

    print(again.write(Path(args[0])))
    return 0


def _sharpness(args: list[str]) -> int:
    from steppe.launch import sharpness

    if args and not args[0].startswith("-"):
        args = ["--run", *args]
    config = _parse(sharpness.SharpnessConfig, args, "sharpness")
    sharpness.check_run(config.run)
    sharpness.run(config)
    return 0


def _plan(args: list[str]) -> int:
    from steppe.launch.distill.recipes import RECIPES as DISTILLATIONS
    from steppe.launch.plan import settings
    from steppe.launch.recipes import RECIPES

    default, prog = settings.PlanConfig(), "plan"
    if args and not args[0].startswith("-"):
        recipe = {**RECIPES, **DISTILLATIONS}.get(args[0])
        if recipe is not None:
            default, prog, args = settings.of_recipe(recipe()), f"plan {args[0]}", args[1:]
        else:
            args = _model_first(args)
    config = _parse(settings.PlanConfig, args, prog, default)
    from steppe.launch.plan import command

    command.run(config)
    return 0


def _overlays(args: list[str]) -> int:
    if args and args[0] not in ("list", "-h", "--help"):
        raise ValueError(_unknown("action of steppe overlays", args[0], ["list"]))
    if args != ["list"]:
        print("usage: steppe overlays list")
        return 0 if args and args[0] in ("-h", "--help") else 2
    from steppe.launch import overlays

    print(overlays.show())
    return 0


def _launch(args: list[str]) -> int:
    from steppe.launch.pods import local

    return local.main(args)


def _submit(args: list[str]) -> int:
    from steppe.launch.pods import submit

    return submit.main(args)


def _papers(args: list[str]) -> int:
    from steppe.launch import systems

    return systems.main(args)


def _doctor(args: list[str]) -> int:
    from steppe.launch import doctor

    return doctor.main(args)


def _completion(args: list[str], commands: Sequence[str]) -> int:
    from steppe.launch import completion

    return completion.main(args, commands)


def _bench(args: list[str]) -> int:
    from steppe.launch.bench import cli

    return cli.main(args)


if __name__ == "__main__":
    sys.exit(main())
