"""Taking chosen files out of an archive without trusting it.

An archive may hold absolute paths, ``..``, links, device files, or a member that unpacks to
far more than it claims. Nothing is written to a path that comes from the archive: members
are matched by name, their names are checked, only regular files are read, and they are
copied in bounded chunks to destinations that the catalogue chose.
"""

from __future__ import annotations

import fnmatch
import hashlib
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from steppe.data.errors import AssetError

CHUNK = 1 << 20


class Member(NamedTuple):
    """A regular file inside an archive.

    Attributes:
      name: cleaned.
      size: claimed, in bytes.
      open: gives a reader of its bytes.
      place: where it lies; a compressed tar is read fastest in the order of its places.
    """

    name: str
    size: int
    open: Callable[[], IO[bytes]]
    place: int = 0


def safe_name(name: str, archive: str) -> str:
    """The member's name as a clean relative POSIX path.

    Raises:
      AssetError: the name is absolute, climbs with ``..``, or holds a backslash, a drive or NUL.
    """
    path = PurePosixPath(name)
    drive = len(name) > 1 and name[1] == ":"
    if (
        not name
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or "\0" in name
        or drive
    ):
        raise AssetError(
            f"{archive}: unsafe path {name!r} inside the archive; nothing was taken from it"
        )
    return str(path)


@contextmanager
def members(archive: Path) -> Iterator[list[Member]]:
    """Opens a zip or tar (plain, gzip, bzip2 or xz) and lists its regular files.

    Raises:
      AssetError: neither a zip nor a tar, damaged, or a name is unsafe.
    """
    label = archive.name
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                yield _zip_members(opened, label)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as opened_tar:
                yield _tar_members(opened_tar, label)
        else:
            raise AssetError(f"{label}: not a zip or tar archive; fetch it again")
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise AssetError(f"{label}: damaged archive ({error}); fetch it again") from error


def _zip_members(opened: zipfile.ZipFile, label: str) -> list[Member]:
    found = []
    for info in opened.infolist():
        name = safe_name(info.filename, label)
        mode = info.external_attr >> 16
        # Zips made on other systems carry no mode at all: that is a plain file.
        if info.is_dir() or (stat.S_IFMT(mode) not in (0, stat.S_IFREG)):
            continue
        found.append(Member(name, info.file_size, _zip_opener(opened, info), info.header_offset))
    return found


def _zip_opener(opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], IO[bytes]]:
    return lambda: opened.open(info)


def _tar_members(opened: tarfile.TarFile, label: str) -> list[Member]:
    found = []
    for info in opened:
        name = safe_name(info.name, label)
        # Links, devices and pipes are never followed or made.
        if info.isreg():
            found.append(Member(name, info.size, _tar_opener(opened, info), info.offset_data))
    return found


def _tar_opener(opened: tarfile.TarFile, info: tarfile.TarInfo) -> Callable[[], IO[bytes]]:
    def read() -> IO[bytes]:
        stream = opened.extractfile(info)
        if stream is None:
            raise AssetError(f"{info.name}: not a regular file inside the archive")
        return stream

    return read


def select(found: list[Member], pattern: str, archive: str, count: int = 1) -> list[Member]:
    """The members whose name matches a shell pattern (``*`` crosses folders), sorted by name.

    Raises:
      AssetError: their number is not `count`.
    """
    chosen = [m for m in found if m.name == pattern or fnmatch.fnmatchcase(m.name, pattern)]
    chosen.sort(key=lambda member: member.name)
    if len(chosen) != count:
        raise AssetError(
            f"{archive}: expected {count} file(s) named {pattern!r}, found {len(chosen)}; "
            "the package is not the one in the catalogue"
        )
    return chosen


def targets(chosen: list[Member], path: str, root: str, archive: str) -> list[tuple[Member, str]]:
    """Where each chosen member goes: `path` itself, or below it where it ends in ``/``.

    Args:
      root: folder inside the archive whose inner paths are kept; empty keeps base names only.

    Raises:
      AssetError: two members would go to one place, or one lies outside `root`.
    """
    if not path.endswith("/"):
        return [(member, path) for member in chosen]
    pairs = []
    for member in chosen:
        if root and not member.name.startswith(f"{root}/"):
            raise AssetError(f"{archive}: {member.name!r} is outside {root!r}")
        inner = member.name[len(root) + 1 :] if root else PurePosixPath(member.name).name
        pairs.append((member, path + inner))
    if len({target for _, target in pairs}) != len(pairs):
        raise AssetError(f"{archive}: two files for {path!r} share a base name")
    return pairs


def copy(member: Member, target: Path, *, append: bool = False) -> None:
    """Writes one member to `target`, reading no more than its claimed size.

    Raises:
      AssetError: it unpacks to more or fewer bytes than it claims.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    done = 0
    stream: AbstractContextManager[IO[bytes]] = member.open()
    with stream as source, open(target, "ab" if append else "wb") as sink:
        while done <= member.size and (chunk := source.read(CHUNK)):
            done += len(chunk)
            sink.write(chunk)
    if done != member.size:
        raise AssetError(
            f"{member.name}: unpacks to {'more' if done > member.size else 'fewer'} bytes "
            f"than the {member.size} that the archive claims; fetch it again"
        )


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def bundle_sha256(paths: list[Path], folder: Path) -> str:
    """One hash for many files: SHA-256 of the lines ``<sha256>  <path in folder>``, sorted.

    It equals ``sha256sum * | LC_ALL=C sort -k2 | sha256sum`` in a folder without folders.
    """
    total = hashlib.sha256()
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in paths):
        total.update(f"{sha256(path)}  {name}\n".encode())
    return total.hexdigest()
