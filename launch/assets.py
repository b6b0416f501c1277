"""``steppe assets list|fetch|check``: real models and data sets, with size, hash and licence."""

from __future__ import annotations

import sys

from steppe.data.errors import unknown
from steppe.launch import prose

CONSENT = "--accept-licence"
ACTIONS = ("list", "fetch", "check")
USAGE = f"""\
usage: steppe assets list              what there is, its licence, and what is
                                       in the cache
       steppe assets fetch NAME ... [{CONSENT}]
                                       bring assets into the cache (all: every
                                       one that asks for no consent)
       steppe assets check [NAME ...]  verify the hashes of what is in the cache

Assets marked "opt-in" have terms that you must agree to: a licence that is not
open, or authors who ask that their data never be published again or enter
training corpora. They are fetched only with {CONSENT}, which says that
you have read what `fetch` shows and agree to it; then "all" means them too.
Assets from one package share its download when they are fetched together.

The cache is $STEPPE_CACHE, or ~/.cache/steppe. Records of a data asset:
asset:NAME[/PART].
"""


def main(args: list[str]) -> int:
    """Runs one of the three; see USAGE."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if args else 2
    action, names = args[0], args[1:]
    accepted = CONSENT in names
    names = [name for name in names if name != CONSENT]
    wrong = [name for name in names if name.startswith("-")]
    if wrong and set(wrong) <= {"-h", "--help"}:
        print(USAGE, end="")
        return 0
    if wrong or (accepted and action != "fetch"):
        print(f"steppe assets {action}: unknown option {(wrong or [CONSENT])[0]}", file=sys.stderr)
    elif action not in ACTIONS:
        raise ValueError(unknown("action of steppe assets", action, ACTIONS))
    elif action == "list" and not names:
        return _list()
    elif action == "fetch" and names:
        return _fetch(names, accepted)
    elif action == "check":
        return _check(names)
    print(USAGE, end="", file=sys.stderr)
    return 2


def _list() -> int:
    from steppe.data import assets

    known = assets.list()
    wide = max(len(asset.name) for asset in known) + 2
    for asset in known:
        try:
            here = assets.path(asset.name).is_dir()
        except assets.AssetMissing:
            here = False
        marks = [asset.kind, *["opt-in"] * asset.opt_in, *["in the cache"] * here]
        size = f"{asset.download_size / 1e6:.1f} MB".rjust(9)
        print(f"{asset.name.ljust(wide)}{size}  {', '.join(marks)}")
        print(prose.fill(asset.description, "    "))
        print(prose.fill(f"licence: {asset.licence}", "    "))
    return 0


def _fetch(names: list[str], accepted: bool) -> int:
    from rich.console import Console

    from steppe.data import assets

    console = Console(stderr=True)
    if names == ["all"]:
        left = [asset.name for asset in assets.list() if asset.opt_in and not accepted]
        names = [asset.name for asset in assets.list() if asset.name not in left]
        if left:
            told = f"left out, since they ask for your consent ({CONSENT}): {', '.join(left)}"
            console.print(told, highlight=False)
    if accepted:
        for asset in (assets.get(name) for name in names):
            if asset.opt_in:
                told = f"{asset.name}: licence: {asset.licence}. {asset.notice}"
                console.print(told, style="yellow", highlight=False, markup=False, soft_wrap=True)
    with console.status("looking at the cache ...") as status:
        steps = assets.fetch_all(
            names, progress=lambda line: status.update(_plain(line)), accept_licence=accepted
        )
        for asset, folder in steps:
            told = f"{asset.name}: {folder}  ({asset.licence})"
            console.print(told, highlight=False, markup=False, soft_wrap=True)
    return 0


def _plain(line: str) -> str:
    """Text that rich shows as it is: names such as [x] are not mark-up."""
    from rich.markup import escape

    return escape(line)


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
