"""``steppe assets list|fetch|check``: real models and data sets, with size, hash and licence."""

from __future__ import annotations

import sys

USAGE = """\
usage: steppe assets list              what there is, its licence, and what is in the cache
       steppe assets fetch NAME ...    bring assets into the cache (all: every one)
       steppe assets check [NAME ...]  verify the hashes of what is in the cache

The cache is $STEPPE_CACHE, or ~/.cache/steppe.
"""


def main(args: list[str]) -> int:
    """Runs one of the three; see USAGE."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if args else 2
    action, names = args[0], args[1:]
    if action == "list" and not names:
        return _list()
    if action == "fetch" and names:
        return _fetch(names)
    if action == "check":
        return _check(names)
    print(USAGE, end="", file=sys.stderr)
    return 2


def _list() -> int:
    from rich.console import Console
    from rich.table import Table

    from steppe.data import assets

    table = Table("name", "what", "MB", "from", "licence", "here", box=None, header_style="bold")
    for asset in assets.list():
        try:
            here = "yes" if assets.path(asset.name) else ""
        except assets.AssetMissing:
            here = ""
        size = f"{asset.download_size / 1e6:.0f}"
        table.add_row(asset.name, asset.description, size, asset.kind, asset.licence, here)
    Console().print(table)
    return 0


def _fetch(names: list[str]) -> int:
    from rich.console import Console

    from steppe.data import assets

    if names == ["all"]:
        names = [asset.name for asset in assets.list()]
    wanted = [assets.get(name) for name in names]  # a misspelt name stops before any download
    console = Console(stderr=True)
    for asset in wanted:
        with console.status(f"{asset.name} ...") as status:
            folder = assets.fetch(asset.name, progress=status.update)
        console.print(f"{asset.name}: {folder}  [dim]({asset.licence})[/dim]", highlight=False)
    return 0


def _check(names: list[str]) -> int:
    from steppe.data import assets

    bad = 0
    for asset in [assets.get(n) for n in names] if names else assets.list():
        try:
            assets.check(asset.name)
        except assets.AssetMissing as missing:
            if names:
                raise
            print(f"{asset.name}: not in the cache" if "not in" in str(missing) else str(missing))
        except assets.AssetError as error:
            print(f"{asset.name}: {error}")
            bad += 1
        else:
            print(f"{asset.name}: intact")
    return 2 if bad else 0
