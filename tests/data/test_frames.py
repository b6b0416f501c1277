"""The reader of pickled tables executes nothing and refuses what is not a plain table."""

import lzma

import pytest

from steppe.data import assets
from steppe.data.assets import frames
from steppe.data.errors import DataError


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def call(module: str, name: str, argument: str) -> bytes:
    """A protocol-4 pickle that calls module.name(argument) when it is unpickled."""
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


def test_a_call_is_described_and_never_made(tmp_path):
    marker = tmp_path / "ran"
    value = frames.describe(call("os", "system", f"touch {marker}"), "evil")
    assert value == frames.Call(frames.Name("os", "system"), (f"touch {marker}",))
    assert not marker.exists()


def test_a_table_that_is_a_call_is_refused_without_making_it(tmp_path):
    marker = tmp_path / "ran"
    path = tmp_path / "evil.pkl.xz"
    path.write_bytes(lzma.compress(call("os", "system", f"touch {marker}")))
    with pytest.raises(DataError, match=r"evil\.pkl\.xz: not a plain pandas table \(holds Name"):
        frames.text_columns(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cos\nsystem\n.", "refuses the pickle opcode GLOBAL"),
        (b"(S'x'\nios\nsystem\n.", "refuses the pickle opcode"),
        (b"\x80\x04\x82\x01.", "refuses the pickle opcode EXT1"),
        (b"Ppersistent\n.", "refuses the pickle opcode PERSID"),
        (b"\x80\x04N", "damaged pickle|ends too early"),
        (b"\x80\x04R.", "damaged pickle"),
        (b"\x80\x04h\x07.", "damaged pickle"),
        (b"\x80\x04N}b.", "damaged pickle"),
        (b"\x80\x04NN.", "damaged pickle"),
    ],
)
def test_other_opcodes_and_damage_are_refused(data, message):
    with pytest.raises(DataError, match=message):
        frames.describe(data, "x.pkl")


def test_plain_values_are_read():
    data = b"\x80\x04](K\x01X\x01\x00\x00\x00aNe}(X\x01\x00\x00\x00k\x88u\x86."
    assert frames.describe(data, "x") == ([1, "a", None], {"k": True})


def test_not_xz_and_too_big(tmp_path, monkeypatch):
    path = tmp_path / "t.pkl.xz"
    path.write_bytes(b"plain")
    with pytest.raises(DataError, match="not an xz file"):
        frames.text_columns(path)
    path.write_bytes(lzma.compress(b"\x80\x04N."))
    monkeypatch.setattr(frames, "MAX_BYTES", 2)
    with pytest.raises(DataError, match="unpacks to more than"):
        frames.text_columns(path)


@pytest.mark.assets
def test_fine_foods_is_read_as_recorded(asset):
    table = frames.text_columns(asset("fine-foods") / "test.pkl.xz")
    assert list(table) == ["product", "review", "score"]
    assert {len(column) for column in table.values()} == {1000}
    assert table["score"].count("great") == 658
    assert table["review"][0].startswith("These are the best tasting gummy fruits")
    assert assets.get("fine-foods").licence == "GPL-3 package"
