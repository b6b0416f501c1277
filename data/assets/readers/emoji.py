"""Noto's emoji: small colour pictures, labelled by Unicode's nine groups.

Columns: ``image``, uint8 [64, 64, 3] (red, green, blue, on white), ``label``, the group, and
``name``. Sequences that change another emoji's gender, hair or family are left out: they are
almost the same picture, and would stand on both sides of a split. Flags, which are sequences of
letters or tags, stay, but one alone of those that are the same to the last pixel (Norway's stands
for Svalbard's too).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from steppe.data.assets.readers.images import in_mixed_order, pictures
from steppe.data.assets.readers.part import Part, Record, View, field, json_file
from steppe.data.errors import AssetError, DataError, listing

GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
SIDE = 64
_PARTS = "Component"  # skin tones and hair, which are no emoji of their own


def read_picture(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """A PNG of 64 x 64 pixels, its transparent parts white.

    Raises:
      AssetError: there is no such file.
      DataError: not a PNG, or of another size.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataError(f"{path} is a PNG; reading it needs `pip install pillow`") from None
    try:
        with Image.open(io.BytesIO(path.read_bytes()), formats=["PNG"]) as png:
            inked = png.convert("RGBA")
    except FileNotFoundError:
        raise AssetError(f"{path} is missing; fetch the asset again") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: broken PNG ({error}); fetch the asset again") from None
    if inked.size != (SIDE, SIDE):
        raise DataError(f"{path}: {inked.width} x {inked.height} pixels, expected {SIDE} x {SIDE}")
    white = Image.new("RGBA", inked.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, inked).convert("RGB"))


def chosen(rows: list[Any], where: str) -> list[dict[str, str]]:
    """``image``, ``name`` and ``category`` of one emoji for each first code point, and all flags.

    Raises:
      DataError: a row without these, or of an unknown group; names its number.
    """
    taken: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows):
        row_name = f"{where}: emoji {number}"
        keys = ("unified", "image", "name", "category")
        values = {key: field(row, key, str, row_name) for key in keys}
        group = values["category"]
        if group == _PARTS:
            continue
        if group not in GROUPS:
            raise DataError(f"{row_name}: group {group!r} is none of {listing(GROUPS)}")
        points = values["unified"].split("-")
        alone = values["unified"] if group == "Flags" else points[0]
        # The shortest sequence is the plain one, wherever it stands in the file.
        if alone not in taken or len(points) < taken[alone]["unified"].count("-") + 1:
            taken[alone] = values
    return list(taken.values())


def _read(folder: Path) -> View[int]:
    table = folder / "emoji.json"
    rows = json_file(table)
    if not isinstance(rows, list):
        raise DataError(f"{table}: holds no list; fetch the asset again")
    kept = chosen(rows, str(table))
    if not kept:
        raise DataError(f"{table}: holds no emoji; fetch the asset again")
    images = np.stack([read_picture(folder / "pictures" / Path(row["image"]).name) for row in kept])
    labels = np.array([GROUPS.index(row["category"]) for row in kept])
    view = pictures(images, labels, GROUPS, "emoji")

    def make(number: int) -> Record:
        return {**view[number], "name": kept[number]["name"].lower()}

    first: dict[bytes, int] = {}
    for number, image in enumerate(images):
        first.setdefault(image.tobytes(), number)
    alone = set(first.values())
    return View([n for n in in_mixed_order(len(kept), "emoji") if n in alone], make)


PARTS: dict[str, Part] = {"emoji": Part(_read, "image", GROUPS, ("image", "label", "name"))}
