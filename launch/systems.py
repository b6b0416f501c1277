"""What ``steppe papers`` shows: the list of systems, or the page of one."""

from __future__ import annotations

import importlib
import inspect
import sys

from steppe.data.errors import unknown
from steppe.launch import prose
from steppe.launch.papers import PAPERS, Paper

USAGE = "usage: steppe papers [NAME]"
# Published systems that steppe sets out to implement.
TOTAL = 72


def main(args: list[str]) -> int:
    """Lists all, or shows one: equations, reference, deviations, defaults and the command.

    Raises:
      ValueError: no system has that name; the message suggests one.
    """
    if args and args[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if len(args) > 1:
        print(USAGE, file=sys.stderr)
        return 2
    if not args:
        print(listed())
        return 0
    found = {paper.name: paper for paper in PAPERS}
    name = args[0].lower()
    if name not in found:
        raise ValueError(unknown("system", name, found))
    print(page(found[name]))
    return 0


def listed() -> str:
    """Name and title of every system and, below, the command that runs it; its function where it
    has none. The last line counts them."""
    wide = max(len(paper.name) for paper in PAPERS) + 2
    lines = []
    for paper in PAPERS:
        lines.append(prose.fill(paper.title, paper.name.ljust(wide)))
        # Commands are copied: they are not broken.
        lines.append(f"    {paper.command or f'from Python: {paper.function}'}")
    extra = sum(paper.baseline for paper in PAPERS)
    counted = f"{len(PAPERS) - extra} of {TOTAL} systems, and {extra} that they are compared with"
    lines += ["", f"{counted}; those that are listed are implemented"]
    return "\n".join(lines)


def page(paper: Paper) -> str:
    """What the module of a system says of it, its settings with their defaults, its command."""
    module_name, _, attribute = paper.function.rpartition(".")
    module = importlib.import_module(module_name)
    signature = inspect.signature(getattr(module, attribute))
    settings = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in signature.parameters.values()
    ]
    parts = [
        prose.fill(paper.title),
        prose.reflow(inspect.getdoc(module) or ""),
        prose.fill(f"{paper.function}({', '.join(settings)})", rest="    "),
        f"file: {module_name.removeprefix('steppe.').replace('.', '/')}.py",
    ]
    if paper.command:
        parts.append(f"see it run: {paper.command}")
    return "\n\n".join(parts)
