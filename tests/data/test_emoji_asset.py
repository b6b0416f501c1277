"""The reader of emoji on made pictures and tables, whole and broken."""

import json

import numpy as np
import pytest

from steppe.data.assets.readers import emoji
from steppe.data.errors import AssetError, DataError


def row(unified: str, group: str = "People & Body", name: str = "X", image: str = "") -> dict:
    image = image or f"{unified.lower()}.png"
    return {"unified": unified, "image": image, "name": name, "category": group}


def write(folder, rows, size=(64, 64), mode="RGBA", colour=(200, 0, 0, 128)):
    from PIL import Image

    (folder / "pictures").mkdir(exist_ok=True)
    for number, one in enumerate(rows):
        picture = Image.new(mode, size, colour)
        if mode == "RGBA" and number:
            picture.putpixel((63, 63), (number, number, number, 255))  # no two are the same
        picture.save(folder / "pictures" / one["image"], "PNG")
    (folder / "emoji.json").write_text(json.dumps(rows))


def read(folder):
    return emoji.PARTS["emoji"].read(folder)


def test_sequences_that_vary_an_emoji_are_left_out_and_flags_stay(tmp_path):
    rows = [
        row("1F3C3-200D-2642-FE0F", name="MAN RUNNING"),
        row("1F3C3", name="RUNNER"),
        row("1F3C3-200D-2640-FE0F", name="WOMAN RUNNING"),
        row("1F1E6-1F1E8", "Flags", "ASCENSION"),
        row("1F1E6-1F1E9", "Flags", "ANDORRA"),
        row("1F3FB", "Component", "LIGHT SKIN"),
    ]
    write(tmp_path, rows)
    records = read(tmp_path)
    assert {r["name"] for r in records} == {"runner", "ascension", "andorra"}
    assert {r["label"] for r in records} == {"People & Body", "Flags"}
    assert len({r["id"] for r in records}) == 3
    assert [r["id"] for r in read(tmp_path)] == [r["id"] for r in records]


def test_of_pictures_that_are_the_same_one_stays(tmp_path):
    rows = [row(f"1F1E6-1F1E{n}", "Flags", f"F{n}") for n in (8, 9)] + [row("1F3C3", name="RUNNER")]
    write(tmp_path, rows)
    pictures = tmp_path / "pictures"
    (pictures / rows[1]["image"]).write_bytes((pictures / rows[0]["image"]).read_bytes())
    records = read(tmp_path)
    assert {r["name"] for r in records} == {"f8", "runner"}
    assert {r["id"] for r in records} == {"emoji/0", "emoji/2"}


def test_what_is_transparent_becomes_white(tmp_path):
    write(tmp_path, [row("1F3C3")])
    image = read(tmp_path)[0]["image"]
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    np.testing.assert_allclose(image[0, 0], [227, 127, 127], atol=1)  # 128/255 of it over white


@pytest.mark.parametrize(("mode", "colour"), [("LA", (80, 255)), ("P", 3), ("RGB", (1, 2, 3))])
def test_grey_and_palette_pictures_are_read(tmp_path, mode, colour):
    write(tmp_path, [row("1F3C3")], mode=mode, colour=colour)
    assert read(tmp_path)[0]["image"].shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"unified": "1F3C3"}], "emoji 0: .*image"),
        ([row("1F3C3", "Cars")], "emoji 0: group 'Cars' is none of Smileys & Emotion"),
        ([], "holds no emoji"),
        ({}, "holds no list"),
    ],
)
def test_broken_tables_are_named(tmp_path, rows, message):
    (tmp_path / "emoji.json").write_text(json.dumps(rows))
    with pytest.raises((AssetError, DataError), match=rf"emoji\.json: {message}"):
        read(tmp_path)


def test_broken_and_missing_pictures_are_named(tmp_path):
    write(tmp_path, [row("1F3C3")], size=(32, 64))
    with pytest.raises(DataError, match=r"1f3c3\.png: 32 x 64 pixels, expected 64 x 64"):
        read(tmp_path)
    path = tmp_path / "pictures" / "1f3c3.png"
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1f3c3\.png: broken PNG"):
        read(tmp_path)
    path.unlink()
    with pytest.raises(AssetError, match=r"1f3c3\.png is missing; fetch"):
        read(tmp_path)


def test_a_picture_outside_the_folder_is_not_read(tmp_path):
    write(tmp_path, [row("1F3C3")])
    (tmp_path / "emoji.json").write_text(json.dumps([row("1F3C3", image="../1f3c3.png")]))
    (tmp_path / "1f3c3.png").write_bytes((tmp_path / "pictures" / "1f3c3.png").read_bytes())
    (tmp_path / "pictures" / "1f3c3.png").unlink()
    with pytest.raises(AssetError, match=r"pictures/1f3c3\.png is missing"):
        read(tmp_path)
