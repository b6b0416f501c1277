"""The asset cache: fetch, find, check.

Layout: ``<root>/assets/<name>/<version>/`` holds the extracted files and ``asset.json``
(where they came from, their licence, their hashes). A folder appears by one rename after
everything in it has been verified, so a reader never sees half an asset, and several
processes may fetch the same one: the first rename wins, the others use it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from steppe.data.assets import archives, clients
from steppe.data.assets.build import Downloads, build
from steppe.data.assets.catalogue import CATALOGUE, Asset, File
from steppe.data.errors import AssetError, AssetMissing, unknown

Progress = Callable[[str], None]

MANIFEST = "asset.json"
_SCRATCH = ".fetching-"
_STALE_SECONDS = 24 * 3600


def root(cache: Path | str | None = None) -> Path:
    """The cache root: the argument, or ``$STEPPE_CACHE``, or ``~/.cache/steppe``."""
    if cache is not None:
        return Path(cache).expanduser()
    named = os.environ.get("STEPPE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "steppe"


def get(name: str, catalogue: Mapping[str, Asset] = CATALOGUE) -> Asset:
    """The catalogue's entry.

    Raises:
      AssetError: unknown name; the message suggests one and lists the known ones.
    """
    if name not in catalogue:
        raise AssetError(unknown("asset", name, sorted(catalogue)))
    return catalogue[name]


def list() -> tuple[Asset, ...]:
    """All assets of the catalogue, by role and name."""
    return tuple(sorted(CATALOGUE.values(), key=lambda asset: (asset.role, asset.name)))


def folder(asset: Asset, cache: Path | str | None = None) -> Path:
    """Where an asset lies once fetched."""
    # Debian versions may hold a colon, which some file systems refuse.
    return root(cache) / "assets" / asset.name / asset.version.replace(":", "_")


def path(name: str, cache: Path | str | None = None) -> Path:
    """The folder of a fetched asset. Sizes are looked at, hashes are not (see :func:`check`).

    Raises:
      AssetMissing: not fetched, or files are missing; the message holds the command to run.
    """
    asset = get(name)
    where = folder(asset, cache)
    flag = " --accept-licence" if asset.opt_in else ""
    size = f"{asset.download_size / 1e6:.1f} MB from {asset.kind}"
    cure = f"run `steppe assets fetch {name}{flag}` ({size})"
    if not (where / MANIFEST).is_file():
        raise AssetMissing(f"asset {name!r} is not in the cache at {where}: {cure}")
    for file in asset.files:
        found = _located(where, file)
        if len(found) != file.count or sum(p.stat().st_size for p in found) != file.size:
            raise AssetMissing(f"asset {name!r} is damaged ({file.path} in {where}): {cure}")
    return where


def tokenizer(name: str, cache: Path | str | None = None) -> Path:
    """The folder with an asset's tokenizer files, which may be those of another asset.

    Raises:
      AssetMissing: that asset is not fetched.
    """
    return path(get(name).tokenizer or name, cache)


def check(name: str, cache: Path | str | None = None) -> Path:
    """Compares every file of a fetched asset with the catalogue; returns its folder.

    Raises:
      AssetMissing: not fetched.
      HashMismatch: a file differs; the message names both hashes.
    """
    where = path(name, cache)
    _verify(get(name), where)
    return where


def fetch(
    name: str | Asset,
    cache: Path | str | None = None,
    progress: Progress | None = None,
    *,
    accept_licence: bool = False,
    downloads: Downloads | None = None,
) -> Path:
    """Brings an asset into the cache; does nothing when it is there and intact.

    Args:
      name: a name of the catalogue, or an :class:`Asset` of your own.
      cache: cache root, see :func:`root`.
      progress: called with one line of text at each step.
      accept_licence: you have read the terms of an opt-in asset and agree to them.
      downloads: archives shared with other fetches, see :func:`fetch_all`.

    Returns:
      The folder with the files.

    Raises:
      AssetError: the terms are not accepted, a client is missing or failed, an archive is damaged
        or unsafe, no disk space.
      HashMismatch: a download or a file is not the recorded one.
    """
    asset = get(name) if isinstance(name, str) else name
    where = folder(asset, cache)
    tell = progress or (lambda line: None)
    if _intact(asset, where):
        return where
    _consent(asset, accept_licence)
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        _sweep(where.parent)
        # In the same folder as the target, so that the final rename stays on one file system.
        with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=where.parent) as scratch:
            shelf = downloads or Downloads(Path(scratch) / "downloads", [asset])
            built = build(asset, Path(scratch), shelf, tell)
            _verify(asset, built)
            _write_manifest(asset, built)
            _publish(asset, built, where, Path(scratch))
    except AssetError:
        _drop_empty(where.parent)
        raise
    except OSError as error:
        _drop_empty(where.parent)
        raise AssetError(f"asset {asset.name!r}: cannot write {where} ({error})") from error
    tell(f"{asset.name}: ready in {where}")
    return where


def fetch_all(
    names: Iterable[str],
    cache: Path | str | None = None,
    progress: Progress | None = None,
    *,
    accept_licence: bool = False,
) -> Iterator[tuple[Asset, Path]]:
    """Fetches several assets, each package once, and yields them as they become ready.

    Raises:
      AssetError: as :func:`fetch`; a misspelt name or terms that are not accepted stop it before
        anything is downloaded.
    """
    wanted = [get(name) for name in dict.fromkeys(names)]
    missing = [asset for asset in wanted if not _intact(asset, folder(asset, cache))]
    for asset in missing:
        _consent(asset, accept_licence)
    store = root(cache) / "assets"
    try:
        store.mkdir(parents=True, exist_ok=True)
        _sweep(store)
    except OSError as error:
        raise AssetError(f"cannot write the cache {store} ({error})") from error
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=store) as scratch:
        shelf = Downloads(Path(scratch), missing)
        for asset in wanted:
            done = fetch(asset, cache, progress, accept_licence=accept_licence, downloads=shelf)
            yield asset, done


def _consent(asset: Asset, accepted: bool) -> None:
    if asset.opt_in and not accepted:
        raise AssetError(
            f"asset {asset.name!r} is only fetched for those who accept its terms. Licence: "
            f"{asset.licence}. {asset.notice} If you agree, run "
            f"`steppe assets fetch {asset.name} --accept-licence`"
        )


def _write_manifest(asset: Asset, built: Path) -> None:
    manifest = {
        "name": asset.name,
        "version": asset.version,
        "licence": asset.licence,
        **({"notice": asset.notice} if asset.notice else {}),
        "packages": [f"{package.client} {package}" for package in asset.packages],
        "files": {file.path: file.sha256 for file in asset.files},
    }
    (built / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _publish(asset: Asset, built: Path, where: Path, scratch: Path) -> None:
    """Renames the finished folder into place, unless another process was first."""
    for _ in range(3):
        try:
            os.rename(built, where)
            return
        except OSError:
            if not where.exists():
                raise
        if _intact(asset, where):
            return
        try:  # a damaged copy: move it away and try again
            os.rename(where, scratch / f"damaged-{time.monotonic_ns()}")
        except FileNotFoundError:
            continue
    raise AssetError(
        f"asset {asset.name!r}: {where} keeps changing; is another program writing it?"
    )


def _located(where: Path, file: File) -> tuple[Path, ...]:
    target = where / file.path
    if not file.path.endswith("/"):
        return (target,) if target.is_file() else ()
    return tuple(sorted(p for p in target.rglob("*") if p.is_file())) if target.is_dir() else ()


def _verify(asset: Asset, where: Path) -> None:
    for file in asset.files:
        found = _located(where, file)
        if file.path.endswith("/"):
            digest = archives.bundle_sha256([*found], where / file.path)
        elif found:
            digest = archives.sha256(found[0])
        else:
            raise AssetError(
                f"asset {asset.name!r}: {where / file.path} is missing; fetch it again"
            )
        if digest != file.sha256:
            raise clients.mismatch(f"asset {asset.name!r}, {file.path}", file.sha256, digest)


def _intact(asset: Asset, where: Path) -> bool:
    try:
        _verify(asset, where)
    except (OSError, AssetError):
        return False
    return (where / MANIFEST).is_file()


def _drop_empty(parent: Path) -> None:
    """A failed fetch leaves nothing behind, not even an empty folder."""
    with contextlib.suppress(OSError):
        parent.rmdir()


def _sweep(parent: Path) -> None:
    """Removes what killed fetches left behind more than a day ago."""
    for left in parent.glob(f"{_SCRATCH}*"):
        try:
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        except OSError:  # another process removed it first
            continue
