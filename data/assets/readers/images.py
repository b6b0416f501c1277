"""Picture assets: digits, MNIST, Fashion-MNIST, CIFAR-10.

Columns: ``image``, uint8 [H, W] (grey, ink bright on 0) or [H, W, 3] (red, green, blue), and
``label``, a class name. All pictures of a part lie in one array; a record holds a view of it.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import io
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from steppe.data.assets.readers.part import Part, Record, View, field, json_file
from steppe.data.errors import AssetError, DataError, listing
from steppe.data.splits import position

DIGITS = tuple("0123456789")
CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
OBJECTS = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_MAGIC_IMAGES, _MAGIC_LABELS = 0x803, 0x801  # unsigned bytes with 3 or 1 axes


def pictures(
    images: UInt8[np.ndarray, "n h w *c"],
    labels: Int[np.ndarray, " n"],
    names: Sequence[str],
    prefix: str,
    order: Sequence[int] | None = None,
    **more: Any,
) -> View[int]:
    """Records over one array of pictures.

    Args:
      labels: class of each picture, an index into `names`.
      prefix: of the ids, which end in the picture's number in its file, from 0.
      order: numbers of the pictures in the order of the records; None is that of the file.
      more: further columns, the same in every record.
    """
    images.flags.writeable = False  # records share it

    def make(number: int) -> Record:
        label = names[int(labels[number])]
        return {"id": f"{prefix}/{number}", "image": images[number], "label": label, **more}

    return View(range(len(images)) if order is None else order, make)


def in_mixed_order(count: int, prefix: str) -> list[int]:
    """Numbers in the order of the hash of their ids.

    For files that are sorted by class: any stretch of the records then holds all classes.
    """
    return sorted(range(count), key=lambda number: position(f"{prefix}/{number}"))


def _unpack(path: Path) -> bytes:
    try:
        with gzip.open(path) as stream:
            return stream.read()
    except FileNotFoundError:
        raise AssetError(f"{path} is missing; fetch the asset again") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch the asset again") from None


def read_idx(path: Path) -> UInt8[np.ndarray, "n *rest"]:
    """An array of an IDX file (gzip): magic, sizes as big-endian int32, then unsigned bytes.

    Raises:
      DataError: another kind of file, or more or fewer bytes than its header says.
    """
    data = _unpack(path)
    magic = int.from_bytes(data[:4], "big")
    if len(data) < 4 or magic not in (_MAGIC_IMAGES, _MAGIC_LABELS):
        raise DataError(f"{path}: not an IDX file of bytes (it starts with {data[:4].hex()!r})")
    axes = magic & 0xFF
    start = 4 + 4 * axes
    shape = tuple(int(size) for size in np.frombuffer(data[4:start].ljust(4 * axes), ">i4"))
    if len(data) - start != int(np.prod(shape, dtype=np.int64)):
        raise DataError(
            f"{path}: its header says {' x '.join(map(str, shape))} bytes, "
            f"it holds {max(len(data) - start, 0)}; fetch the asset again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_table(
    path: Path, side: int, top: int
) -> tuple[UInt8[np.ndarray, "n side side"], Int[np.ndarray, " n"]]:
    """Pictures of a gzipped CSV: a row has side x side pixels in [0, top], then the digit.

    Pixels are scaled so that `top` becomes 255.

    Raises:
      DataError: a row with another number of cells, or a cell out of range; names the line.
    """
    rows = []
    for number, line in enumerate(_unpack(path).decode("ascii", "replace").splitlines(), start=1):
        cells = line.split(",")
        if len(cells) != side * side + 1:
            raise DataError(
                f"{path}: line {number} has {len(cells)} cells, expected {side * side + 1}"
            )
        try:
            row = np.array([int(cell) for cell in cells])
        except ValueError as error:
            raise DataError(f"{path}: line {number}: {error}") from None
        if row.min() < 0 or row[:-1].max() > top or row[-1] > 9:
            raise DataError(
                f"{path}: line {number}: pixels must be in [0, {top}] and the digit in [0, 9]"
            )
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: holds no rows; fetch the asset again")
    table = np.stack(rows)
    scaled = np.rint(table[:, :-1] * (255 / top)).astype(np.uint8)
    return scaled.reshape(-1, side, side), table[:, -1]


def read_png(data: str, shape: tuple[int, int, int], where: str) -> UInt8[np.ndarray, "h w 3"]:
    """A picture of a base64 PNG.

    Raises:
      DataError: not base64, not a PNG, or of another size or mode; `where` names it.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataError(f"{where} is a PNG; reading it needs `pip install pillow`") from None
    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=["PNG"]) as png:
            array = np.asarray(png)
            mode = png.mode
    except (binascii.Error, UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{where}: broken PNG ({error}); fetch the asset again") from None
    if array.shape != shape or mode != "RGB":
        raise DataError(
            f"{where}: a picture of mode {mode} and shape {list(array.shape)}, "
            f"expected RGB {list(shape)}"
        )
    return array


def _fashion(folder: Path) -> View[tuple[View[int], int]]:
    parts = []
    for split, stem in (("train", "train"), ("test", "t10k")):
        images = read_idx(folder / f"{stem}-images-idx3-ubyte.gz")
        path = folder / f"{stem}-labels-idx1-ubyte.gz"
        labels = read_idx(path)
        if len(images) != len(labels):
            raise DataError(f"{path}: {len(labels)} labels for {len(images)} pictures")
        if images.ndim != 3 or labels.ndim != 1 or (labels.size and labels.max() > 9):
            raise DataError(f"{path}: not the labels 0 to 9 of [n, h, w] pictures")
        parts.append(pictures(images, labels, CLOTHES, f"fashion-mnist/{split}", split=split))
    rows = [(part, number) for part in parts for number in range(len(part))]
    return View(rows, lambda row: row[0][row[1]])


def _table(file: str, name: str, side: int, top: int) -> Callable[[Path], View[int]]:
    def read(folder: Path) -> View[int]:
        images, labels = read_table(folder / file, side, top)
        return pictures(images, labels, DIGITS, name, in_mixed_order(len(images), name))

    return read


def _cifar10(folder: Path) -> View[int]:
    path = folder / "task.json"
    examples = field(json_file(path), "examples", list, str(path))
    images = np.zeros((len(examples), 32, 32, 3), np.uint8)
    labels = np.zeros(len(examples), np.int64)
    for number, example in enumerate(examples):
        where = f"{path}: example {number}"
        scores = field(example, "target_scores", dict, where)
        right = [name for name, score in scores.items() if score == 1]
        if len(right) != 1 or right[0] not in OBJECTS:
            raise DataError(f"{where}: expected one class of {listing(OBJECTS)}, got {right}")
        labels[number] = OBJECTS.index(right[0])
        images[number] = read_png(field(example, "input", str, where), (32, 32, 3), where)
    return pictures(images, labels, OBJECTS, "cifar10", in_mixed_order(len(images), "cifar10"))


_COLUMNS = ("image", "label")

PARTS: dict[str, Part] = {
    "digits": Part(_table("digits.csv.gz", "digits", 8, 16), "image", DIGITS, _COLUMNS),
    "mnist": Part(_table("mnist_5k.csv.gz", "mnist", 28, 255), "image", DIGITS, _COLUMNS),
    "fashion-mnist": Part(_fashion, "image", CLOTHES, (*_COLUMNS, "split")),
    "cifar10": Part(_cifar10, "image", OBJECTS, _COLUMNS),
}
