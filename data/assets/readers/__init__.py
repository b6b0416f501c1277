"""Turns the files of each data asset into records.

A part is addressed as ``asset:NAME`` or ``asset:NAME/PART``; its records carry a stable ``id``
and the columns that its task reads. ``PARTS`` says which columns and which task each part is
made for.
"""

from __future__ import annotations

from steppe.data.assets.catalogue import CATALOGUE
from steppe.data.assets.readers import (
    bigbench,
    emoji,
    images,
    instructions,
    spider,
    text,
    translation,
)
from steppe.data.assets.readers.part import Kind, Part, Record, Records, View
from steppe.data.assets.readers.text import base_tag
from steppe.data.errors import AssetError, listing, near

__all__ = ["PARTS", "Kind", "Part", "Record", "Records", "View", "base_tag", "part"]

PARTS: dict[str, Part] = {
    **text.PARTS,
    **images.PARTS,
    **emoji.PARTS,
    **spider.PARTS,
    **translation.PARTS,
    **bigbench.PARTS,
    **instructions.PARTS,
}


def part(address: str) -> tuple[str, Part]:
    """The asset's name and the part of an address such as ``vader/movies`` or ``sarcasm``.

    Raises:
      AssetError: unknown asset, unknown part (the known ones are listed), or not data.
    """
    name, _, rest = address.partition("/")
    known = {key for key in PARTS if key.partition("/")[0] == name}
    if address in PARTS:
        return name, PARTS[address]
    if not known:
        data = sorted({key.partition("/")[0] for key in PARTS})
        role = "holds weights, not records" if name in CATALOGUE else "is not in the catalogue"
        hint = "" if name in CATALOGUE else near(name, data)
        raise AssetError(f"asset {name!r} {role}{hint or ';'} data assets: {listing(data, 50)}")
    what = f"has no part {rest!r}" if rest else "has several parts"
    hint = near(address, sorted(known)) if rest else ""
    raise AssetError(f"asset {name!r} {what}{hint or ';'} use one of: {listing(sorted(known), 30)}")
