"""Downloading a package with the ordinary clients of pip, npm and apt, running none of its code.

- A wheel, an npm tarball or a .deb is only downloaded; no install script is run.
- pip asks a source distribution for its metadata, which normally executes its ``setup.py``.
  Here pip is given a stand-in build backend that answers from the static ``PKG-INFO``, and
  the expected hash, which pip checks before anything else: no line of the package runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steppe.data.errors import AssetError, HashMismatch

Client = Literal["pip", "pip-sdist", "npm", "apt"]

# The stand-in for setuptools that pip imports instead of running setup.py.
_BACKEND = """\
import pathlib

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    info = pathlib.Path(metadata_directory, {folder!r})
    info.mkdir()
    (info / "METADATA").write_bytes(pathlib.Path("PKG-INFO").read_bytes())
    return info.name

class __legacy__:
    get_requires_for_build_wheel = staticmethod(get_requires_for_build_wheel)
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
"""


@dataclass(frozen=True)
class Package:
    """One download.

    Attributes:
      client: which client brings it; ``pip-sdist`` is a source distribution.
      name, version: as the client knows them.
      size: bytes of the download.
      sha256: hex hash of the downloaded archive; empty where the registry may rebuild it
        (apt), since every extracted file has a hash of its own.
    """

    client: Client
    name: str
    version: str
    size: int
    sha256: str = ""

    def __str__(self) -> str:
        joint = {"npm": "@", "apt": "="}.get(self.client, "==")
        return f"{self.name}{joint}{self.version}"


def download(package: Package, folder: Path) -> Path:
    """Downloads one package into an empty folder and returns the archive.

    Raises:
      AssetError: the client is not installed, or it failed (with its last line).
      HashMismatch: the archive is not the recorded one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if package.client in ("pip", "pip-sdist"):
        _pip(package, folder)
    elif package.client == "npm":
        # --ignore-scripts: packing a remote package runs none today; this keeps it so.
        _run(["npm", "pack", "--ignore-scripts", "--loglevel=error", str(package)], package, folder)
    else:
        _run(["apt-get", "download", str(package)], package, folder)
    files = [path for path in folder.iterdir() if path.is_file() and not path.is_symlink()]
    if len(files) != 1:
        raise AssetError(f"{package}: {package.client} left {len(files)} files, expected one")
    archive = files[0]
    if package.sha256:
        from steppe.data.assets import archives

        found = archives.sha256(archive)
        if found != package.sha256:
            raise mismatch(str(package), package.sha256, found)
    return _unwrap_deb(archive, package) if package.client == "apt" else archive


def mismatch(what: str, expected: str, found: str) -> HashMismatch:
    """The error for a file that is not the recorded one; it names both hashes."""
    return HashMismatch(
        f"{what}: SHA-256 is {found}, the catalogue says {expected}; "
        "nothing was kept, check the package index in use and fetch again"
    )


def _pip(package: Package, folder: Path) -> None:
    work = folder.parent / f"{folder.name}-pip"
    work.mkdir()
    requirements = work / "requirements.txt"
    requirements.write_text(f"{package} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--progress-bar", "off"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    environment = dict(os.environ)
    if package.client == "pip":
        command += ["--only-binary", ":all:", "--ignore-requires-python"]
    else:
        backend = work / "backend" / "setuptools"
        backend.mkdir(parents=True)
        (backend / "__init__.py").write_text("")
        info = f"{package.name}-{package.version}.dist-info"
        (backend / "build_meta.py").write_text(_BACKEND.format(folder=info))
        command += ["--no-binary", ":all:", "--no-build-isolation"]
        environment["PYTHONPATH"] = str(backend.parent)
        environment["PIP_USE_PEP517"] = "1"  # old pips would run setup.py directly
    _run(command, package, folder, environment)


def _run(
    command: list[str], package: Package, folder: Path, env: Mapping[str, str] | None = None
) -> None:
    if shutil.which(command[0]) is None:
        cure = {"npm": "install Node.js with npm", "apt-get": "use a Debian or Ubuntu machine"}
        raise AssetError(
            f"{package} comes from {package.client}, but {command[0]!r} is not on this machine: "
            f"{cure.get(command[0], 'install it')} and fetch again"
        )
    done = subprocess.run(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise AssetError(
            f"{package} comes from pip, but {sys.executable} has no pip: "
            f"run `{sys.executable} -m ensurepip` and fetch again"
        )
    wrong = re.search(r"Expected sha256 (\w+)\s+Got\s+(\w+)", done.stderr)
    if wrong:
        raise mismatch(str(package), wrong[1], wrong[2])
    raise AssetError(
        f"{package}: {package.client} failed with exit code {done.returncode}: {_last(done.stderr)}"
    )


# Lines that clients print after the one that says what went wrong.
_NOISE = re.compile(
    r"A complete log of this run|Note that you can also|tarball, folder, http url|\[notice\]"
    r"|In most cases you or one of|^npm (error|ERR!)( \w+)?\s*$"
)


def _last(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines()]
    told = [line for line in lines if line and not _NOISE.search(line)]
    return told[-1] if told else "it said nothing"


def _unwrap_deb(archive: Path, package: Package) -> Path:
    """A .deb holds a tar of its files; dpkg-deb knows every compression that it may have."""
    target = archive.parent.parent / f"{archive.parent.name}.tar"
    if shutil.which("dpkg-deb") is None:
        raise AssetError(f"{package}: 'dpkg-deb' is not on this machine: use Debian or Ubuntu")
    with open(target, "wb") as sink:
        done = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", str(archive)],
            stdout=sink,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise AssetError(f"{package}: dpkg-deb failed: {_last(done.stderr)}")
    return target
