"""Images to classes: anything that holds a picture to one uint8 array [N, H, W, 3].

Images are resized once, when they are encoded (bicubic, with antialiasing when they shrink),
and stay integers in [0, 255]: a model scales and normalises them with its own mean and
deviation. Grey images become three equal channels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import UInt8

from steppe.data.columns import check_names, class_names, classes
from steppe.data.dataset import Dataset
from steppe.data.errors import DataError, column, row_name, shorten
from steppe.data.text import Tokenizer

Records = Sequence[dict[str, Any]]
Pixels = UInt8[np.ndarray, "h w 3"]
Fit = Literal["stretch", "crop"]

# Modes that hold nothing but grey or colour, and what they are read as.
_MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB"}


@dataclass(frozen=True)
class Augment:
    """Random crop and flip, a pure function of (seed, epoch, example index).

    So a batch is the same after a resume and on any number of processes.

    Attributes:
      padding: black pixels put on every side before the crop to the old size.
      flip: mirrors half of the images left to right. Not for digits or letters.
    """

    padding: int = 4
    flip: bool = False

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise DataError(f"padding must be >= 0 pixels, got {self.padding}")

    def __call__(self, pixels: Pixels, *, seed: int, epoch: int, index: int) -> Pixels:
        """One image, changed."""
        sequence = np.random.SeedSequence((seed, epoch, index))
        generator = np.random.Generator(np.random.Philox(sequence))
        height, width = pixels.shape[:2]
        down, right = generator.integers(0, 2 * self.padding + 1, size=2)
        mirrored = generator.random() < 0.5
        side = (self.padding, self.padding)
        wide = np.pad(pixels, (side, side, (0, 0)))
        cropped = wide[down : down + height, right : right + width]
        return cropped[:, ::-1] if self.flip and mirrored else cropped


@dataclass(frozen=True)
class ImageClassification:
    """An image into one of several classes.

    Attributes:
      labels: class names in order; see :meth:`from_records` to gather them.
      image, label: columns. An image is a uint8 array [H, W], [H, W, 1] or [H, W, 3], a PIL
        image, the bytes of a file such as PNG or JPEG (also as ``{"bytes": ...}``), or pixels
        as nested lists of whole numbers 0 to 255, of the same shapes.
      size: of the result in pixels, (height, width) or one number for both.
      fit: "stretch" resizes to `size` whatever the proportions; "crop" resizes the image until
        it covers `size` and takes its centre.
      augment: changes training images, batch by batch; evaluation never does.
      unit_floats: also takes floating-point arrays, with values in [0, 1].
    """

    labels: tuple[str, ...]
    image: str = "image"
    label: str = "label"
    size: int | tuple[int, int] = 224
    fit: Fit = "stretch"
    augment: Augment | None = None
    unit_floats: bool = False
    kind: ClassVar[str] = "classification"

    def __post_init__(self) -> None:
        check_names(self.labels)
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise DataError(f"size must be pixels >= 1, or (height, width), got {self.size}")
        if self.fit not in ("stretch", "crop"):
            raise DataError(f"fit must be 'stretch' or 'crop', got {self.fit!r}")

    @classmethod
    def from_records(
        cls, records: Records, *, image: str = "image", label: str = "label", **options: Any
    ) -> ImageClassification:
        """The task with the classes that occur in the records (see ``columns.class_names``)."""
        return cls(class_names(records, label), image, label, **options)

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.labels)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Class names in order."""
        return self.labels

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def encode(
        self, records: Records, tokenizer: Tokenizer | None = None, max_length: int | None = None
    ) -> Dataset:
        """Encodes records; takes ``3 x height x width`` bytes an image.

        Args:
          tokenizer, max_length: of no effect; every task has them.

        Raises:
          DataError: a missing column, a bad label, or something that is no image, cannot be
            decoded, or has another mode, shape or type (the row is named).
        """
        del tokenizer, max_length
        labels = classes(records, self.label, self.labels)
        pixels = np.zeros((len(records), *self.shape, 3), np.uint8)
        for row, record in enumerate(records):
            value = column(record, self.image, row, option="image")
            try:
                pixels[row] = self._pixels(value)
            except DataError as error:
                where = row_name(row, record)
                raise DataError(f"{where}: column {self.image!r}: {error}") from error.__cause__
        return Dataset(
            kind=self.kind,
            input_ids=None,
            pixel_values=pixels,
            labels=labels,
            ids=[str(record["id"]) for record in records],
            records=records,
            record_index=np.arange(len(records)),
            pad_id=0,
            augment=self.augment,
        )

    def _pixels(self, value: Any) -> np.ndarray:
        from PIL import Image

        if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
            value = value["bytes"]
        if isinstance(value, (bytes, bytearray, memoryview)):
            image = _decoded(bytes(value))
        elif isinstance(value, Image.Image):
            image = _plain(value)
        elif isinstance(value, np.ndarray):
            image = Image.fromarray(checked(value, unit_floats=self.unit_floats))
        elif isinstance(value, (list, tuple)):
            image = Image.fromarray(checked(_listed(value)))
        elif isinstance(value, str):
            raise DataError(
                f"got the text {shorten(value)}; images come as pixels or as encoded bytes "
                "(parquet, hf), not as paths"
            )
        else:
            raise DataError(
                f"must be a uint8 array, a PIL image or the bytes of an image file, got "
                f"{type(value).__name__} {shorten(value)}"
            )
        return np.asarray(_resized(image, *self.shape, self.fit).convert("RGB"))


def checked(array: np.ndarray, *, unit_floats: bool = False) -> np.ndarray:
    """An array as uint8 [H, W] or [H, W, 3].

    Args:
      unit_floats: whether floating-point values in [0, 1] are taken, scaled by 255.

    Raises:
      DataError: another type, shape or range; says what it has and the cure.
    """
    has = f"{array.dtype} array of shape {list(array.shape)}"
    if np.issubdtype(array.dtype, np.floating) and unit_floats:
        if array.size and not (array.min() >= 0 and array.max() <= 1):
            raise DataError(
                f"{has} has values from {array.min():.3g} to {array.max():.3g}; "
                "unit_floats=True takes values in [0, 1]"
            )
        array = np.rint(array * 255.0).astype(np.uint8)
    if array.dtype != np.uint8:
        cure = "convert with .astype(np.uint8) if the values are 0 to 255"
        if np.issubdtype(array.dtype, np.floating):
            cure = "values in [0, 1] are read with unit_floats=True, or use integers 0 to 255"
        raise DataError(f"{has} is not uint8; {cure}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        cure = "give [H, W], [H, W, 1] or [H, W, 3]"
        if array.ndim == 3 and array.shape[0] in (1, 3):
            cure = "channels must come last: array.transpose(1, 2, 0)"
        elif array.ndim == 3 and array.shape[2] == 4:
            cure = "drop the fourth (alpha) channel: array[..., :3]"
        raise DataError(f"{has} is no image; {cure}")
    if not array.size:
        raise DataError(f"{has} has no pixels; drop the row")
    return array


def _listed(value: Sequence[Any]) -> np.ndarray:
    """Nested lists of numbers, as JSON holds pixels, as a uint8 array."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError("the lists of pixels have unequal lengths; give [H, W] or [H, W, 3]") from (
            error
        )
    if array.size and not (
        array.dtype.kind in "iuf"
        and ((array >= 0) & (array <= 255)).all()
        and (array == np.floor(array)).all()
    ):
        raise DataError(
            f"the pixels in lists of shape {list(array.shape)} must be whole numbers 0 to 255, "
            f"got {shorten(value)}"
        )
    return array.astype(np.uint8)


def _decoded(data: bytes) -> Any:
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError and others
        first = (str(error).splitlines() or [type(error).__name__])[0]
        first = first.partition("<_io.")[0].strip()  # an address in memory tells nothing
        raise DataError(
            f"{len(data)} bytes that cannot be decoded as an image ({first}); "
            "drop the row or fetch the file again"
        ) from error
    return _plain(image)


def _plain(image: Any) -> Any:
    """A PIL image in mode L or RGB; refuses what would need a choice (transparency, depth)."""
    if image.mode not in _MODES or "transparency" in image.info:
        cure = "convert it with image.convert('RGB')"
        if image.mode[0] in "IF":
            cure = "scale its values to 0 to 255 and convert it to mode 'L'"
        raise DataError(
            f"image of mode {image.mode!r} and size {image.size[0]} x {image.size[1]} is not plain "
            f"8-bit grey or colour; {cure}"
        )
    if not all(image.size):
        raise DataError(f"image of size {image.size[0]} x {image.size[1]} has no pixels")
    mode = _MODES[image.mode]
    return image if image.mode == mode else image.convert(mode)


def _resized(image: Any, height: int, width: int, fit: Fit) -> Any:
    from PIL import Image

    if image.size == (width, height):
        return image
    box = None
    if fit == "crop":  # the largest centred part of the wanted proportions
        scale = min(image.size[0] / width, image.size[1] / height)
        across, down = width * scale, height * scale
        left, top = (image.size[0] - across) / 2, (image.size[1] - down) / 2
        box = (left, top, left + across, top + down)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)
