"""Archives are not trusted: hostile names, links and lying sizes never reach the disk."""

import hashlib
import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from steppe.data.assets import archives
from steppe.data.errors import AssetError

HOSTILE = ["/etc/passwd", "../outside", "a/../../outside", "a\\..\\outside", "C:/windows", ""]


def make_tar(path: Path, entries: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as opened:
        for info, data in entries:
            info.size = len(data) if info.isreg() else 0
            opened.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return path


def take(archive: Path, pattern: str, target: Path, count: int = 1) -> None:
    with archives.members(archive) as found:
        for member in archives.select(found, pattern, archive.name, count):
            archives.copy(member, target)


@pytest.mark.parametrize("name", HOSTILE[:-1])
def test_zip_with_a_hostile_name_is_refused_whole(tmp_path, name):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("good.txt", "fine")
        opened.writestr(name, "evil")
    with pytest.raises(AssetError, match=r"a\.zip: unsafe path"):
        take(archive, "good.txt", tmp_path / "out" / "good.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", HOSTILE[:-1])
def test_tar_with_a_hostile_name_is_refused_whole(tmp_path, name):
    archive = make_tar(
        tmp_path / "a.tar.gz",
        [(tarfile.TarInfo("good.txt"), b"fine"), (tarfile.TarInfo(name), b"evil")],
    )
    with pytest.raises(AssetError, match="unsafe path"):
        take(archive, "good.txt", tmp_path / "out" / "good.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_safe_name_refuses(name):
    with pytest.raises(AssetError, match="unsafe path"):
        archives.safe_name(name, "x.zip")


def test_safe_name_cleans_what_is_harmless():
    assert archives.safe_name("./a//b/./c.txt", "x.tar") == "a/b/c.txt"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_tar_links_and_devices_are_never_members(tmp_path, kind):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    link = tarfile.TarInfo("link.txt")
    link.type, link.linkname = kind, str(secret)
    archive = make_tar(tmp_path / "a.tar.gz", [(link, b""), (tarfile.TarInfo("x"), b"1")])
    with archives.members(archive) as found:
        assert [member.name for member in found] == ["x"]
    with pytest.raises(AssetError, match=r"expected 1 file\(s\) named 'link.txt', found 0"):
        take(archive, "link.txt", tmp_path / "out")


def test_zip_symlink_is_never_a_member(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        info = zipfile.ZipInfo("link")
        info.create_system = 3
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        opened.writestr(info, "/etc/passwd")
    with archives.members(archive) as found:
        assert found == []


def test_a_member_larger_than_it_claims_is_refused(tmp_path):
    lying = archives.Member("big", 3, lambda: io.BytesIO(b"x" * 10_000_000))
    with pytest.raises(AssetError, match="more bytes than the 3"):
        archives.copy(lying, tmp_path / "big")
    # No more than one chunk past the claim was ever written.
    assert (tmp_path / "big").stat().st_size <= archives.CHUNK


def test_a_truncated_member_is_refused(tmp_path):
    short = archives.Member("short", 30, lambda: io.BytesIO(b"x"))
    with pytest.raises(AssetError, match="fewer bytes than the 30"):
        archives.copy(short, tmp_path / "short")


def test_damaged_archives_are_named(tmp_path):
    (tmp_path / "no.zip").write_bytes(b"hello")
    with pytest.raises(AssetError, match=r"no\.zip: not a zip or tar"):
        take(tmp_path / "no.zip", "x", tmp_path / "x")
    noise = b"".join(hashlib.sha256(bytes([i])).digest() for i in range(256)) * 20
    good = make_tar(tmp_path / "a.tar.gz", [(tarfile.TarInfo("x"), noise)])
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(good.read_bytes()[:-4000])
    with pytest.raises(AssetError, match=r"cut\.tar\.gz: damaged"):
        take(cut, "x", tmp_path / "x")
    packed = tmp_path / "bad.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("x", noise)
    data = bytearray(packed.read_bytes())
    data[200:240] = bytes(40)
    packed.write_bytes(data)
    with pytest.raises(AssetError, match=r"bad\.zip: damaged"):
        take(packed, "x", tmp_path / "x")


def test_select_counts_and_targets_refuse_clashing_names(tmp_path):
    found = [archives.Member(n, 0, io.BytesIO) for n in ("a/1.txt", "b/1.txt", "a/2.txt")]
    assert [m.name for m in archives.select(found, "a/*.txt", "z", 2)] == ["a/1.txt", "a/2.txt"]
    with pytest.raises(AssetError, match="expected 1 file.s. named '.*', found 3"):
        archives.select(found, "*.txt", "z")
    clashing = archives.select(found, "*/1.txt", "z", 2)
    with pytest.raises(AssetError, match="share a base name"):
        archives.targets(clashing, "texts/", "", "z")


def test_targets_keep_inner_paths_below_a_root():
    found = [archives.Member(n, 0, io.BytesIO) for n in ("r/a/1.txt", "r/b/1.txt")]
    assert [t for _, t in archives.targets(found, "x/", "r", "z")] == ["x/a/1.txt", "x/b/1.txt"]
    assert [t for _, t in archives.targets(found[:1], "one.txt", "", "z")] == ["one.txt"]
    with pytest.raises(AssetError, match="'r/b/1.txt' is outside 'r/a'"):
        archives.targets(found, "x/", "r/a", "z")


def test_members_know_their_place(tmp_path):
    entries = [(tarfile.TarInfo(name), name.encode()) for name in ("b", "a", "c")]
    with archives.members(make_tar(tmp_path / "a.tgz", entries)) as found:
        assert [m.name for m in sorted(found, key=lambda m: m.place)] == ["b", "a", "c"]


def test_bundle_hash_is_that_of_sha256sum(tmp_path):
    for name, text in (("b.txt", "two"), ("a.txt", "one")):
        (tmp_path / name).write_text(text)
    lines = "".join(
        f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n"
        for name, text in (("a.txt", "one"), ("b.txt", "two"))
    )
    paths = [tmp_path / "b.txt", tmp_path / "a.txt"]
    assert archives.bundle_sha256(paths, tmp_path) == hashlib.sha256(lines.encode()).hexdigest()
    moved = tmp_path / "deep" / "b.txt"
    moved.parent.mkdir()
    moved.write_text("two")
    assert archives.bundle_sha256([moved, paths[1]], tmp_path) != archives.bundle_sha256(
        paths, tmp_path
    )
