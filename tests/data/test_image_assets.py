"""Readers of picture assets on small made files, whole and broken."""

import base64
import gzip
import io
import json

import numpy as np
import pytest

from steppe.data.assets.readers import images
from steppe.data.errors import AssetError, DataError


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write(path, data: bytes):
    path.write_bytes(gzip.compress(data))
    return path


@pytest.fixture
def fashion(tmp_path):
    rng = np.random.default_rng(0)
    for stem, count in (("train", 5), ("t10k", 3)):
        pixels = rng.integers(0, 256, (count, 28, 28), np.uint8)
        write(tmp_path / f"{stem}-images-idx3-ubyte.gz", idx(pixels))
        write(tmp_path / f"{stem}-labels-idx1-ubyte.gz", idx(np.arange(count, dtype=np.uint8)))
    return tmp_path


def test_fashion_records_are_views_of_one_array(fashion):
    records = images.PARTS["fashion-mnist"].read(fashion)
    assert [r["id"] for r in records][3:6] == [
        "fashion-mnist/train/3",
        "fashion-mnist/train/4",
        "fashion-mnist/test/0",
    ]
    assert [r["split"] for r in records] == ["train"] * 5 + ["test"] * 3
    assert [r["label"] for r in records[:3]] == ["T-shirt/top", "Trouser", "Pullover"]
    image = records[1]["image"]
    assert image.shape == (28, 28)
    assert image.dtype == np.uint8
    assert not image.flags.owndata
    assert np.shares_memory(image, records[1]["image"])
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0] = 1
    assert records[-1]["id"] == "fashion-mnist/test/2"
    with pytest.raises(IndexError):
        records[8]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (idx(np.zeros((2, 28, 28), np.uint8))[:-1], "says 2 x 28 x 28 bytes, it holds 1567"),
        (b"\0\0\x08\x03\0\0", "its header says .* it holds 0"),
        (b"abc", "not an IDX file of bytes .it starts with '616263'"),
        (b"\0\0\x0d\x01\0\0\0\x01abcd", "not an IDX file of bytes"),
        (b"", "not an IDX file"),
    ],
)
def test_broken_idx_files_are_named(tmp_path, data, message):
    path = write(tmp_path / "x-ubyte.gz", data)
    with pytest.raises(DataError, match=rf"x-ubyte\.gz: .*{message}"):
        images.read_idx(path)


def test_truncated_and_missing_gzip_files_are_named(tmp_path):
    path = tmp_path / "x.gz"
    with pytest.raises(AssetError, match="x.gz is missing; fetch"):
        images.read_idx(path)
    path.write_bytes(gzip.compress(idx(np.zeros(999, np.uint8)))[:-9])
    with pytest.raises(DataError, match=r"x\.gz: damaged gzip"):
        images.read_idx(path)
    path.write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"x\.gz: damaged gzip"):
        images.read_idx(path)


def test_labels_must_fit_the_pictures(fashion):
    path = write(fashion / "train-labels-idx1-ubyte.gz", idx(np.zeros(4, np.uint8)))
    with pytest.raises(DataError, match="4 labels for 5 pictures"):
        images.PARTS["fashion-mnist"].read(fashion)
    write(path, idx(np.full(5, 10, np.uint8)))
    with pytest.raises(DataError, match="not the labels 0 to 9"):
        images.PARTS["fashion-mnist"].read(fashion)


def row(pixel: int, digit: int, count: int = 64) -> str:
    return ",".join([str(pixel)] * count + [str(digit)]) + "\n"


def test_digits_are_scaled_and_mixed(tmp_path):
    text = "".join(row(16 if n % 2 else 8, n // 10) for n in range(100))
    write(tmp_path / "digits.csv.gz", text.encode())
    records = images.PARTS["digits"].read(tmp_path)
    assert len(records) == 100
    assert {int(r["image"].max()) for r in records} == {128, 255}
    assert len({r["label"] for r in records[:30]}) >= 8
    assert all(r["label"] == str(int(r["id"].split("/")[1]) // 10) for r in records)
    again = images.PARTS["digits"].read(tmp_path)
    assert [r["id"] for r in again] == [r["id"] for r in records]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (row(1, 1, 63), "line 2 has 64 cells, expected 65"),
        (row(17, 1), r"line 2: pixels must be in \[0, 16\]"),
        (row(-1, 1), "line 2: pixels must be"),
        (row(1, 10), r"the digit in \[0, 9\]"),
        (row(1, 1).replace("1,", "x,", 1), "line 2: .*'x'"),
    ],
)
def test_broken_tables_name_the_line(tmp_path, line, message):
    write(tmp_path / "digits.csv.gz", (row(0, 0) + line).encode())
    with pytest.raises(DataError, match=rf"digits\.csv\.gz: .*{message}"):
        images.PARTS["digits"].read(tmp_path)
    write(tmp_path / "digits.csv.gz", b"")
    with pytest.raises(DataError, match="holds no rows"):
        images.PARTS["digits"].read(tmp_path)


def png(size=(32, 32), mode="RGB", colour=(200, 100, 50)) -> str:
    from PIL import Image

    sink = io.BytesIO()
    Image.new(mode, size, colour).save(sink, "PNG")
    return base64.b64encode(sink.getvalue()).decode()


def cifar(tmp_path, examples) -> None:
    (tmp_path / "task.json").write_text(json.dumps({"examples": examples}))


def scored(data: str, label: str) -> dict:
    return {"input": data, "target_scores": {name: int(name == label) for name in images.OBJECTS}}


def test_cifar_pictures_are_decoded_in_colour(tmp_path):
    pytest.importorskip("PIL")
    cifar(tmp_path, [scored(png(), "cat"), scored(png(colour=(0, 0, 9)), "ship")])
    records = {r["id"]: r for r in images.PARTS["cifar10"].read(tmp_path)}
    assert records["cifar10/0"]["label"] == "cat"
    assert records["cifar10/0"]["image"].shape == (32, 32, 3)
    assert records["cifar10/0"]["image"][5, 7].tolist() == [200, 100, 50]
    assert records["cifar10/1"]["label"] == "ship"


def test_broken_pictures_name_the_example(tmp_path):
    pytest.importorskip("PIL")
    good = scored(png(), "cat")
    half = base64.b64encode(base64.b64decode(png())[:50]).decode()
    cases = [
        (scored("no base64!", "cat"), r"task\.json: example 1: broken PNG"),
        (scored(base64.b64encode(b"text").decode(), "cat"), "example 1: broken PNG"),
        (scored(half, "cat"), "example 1: broken PNG"),
        (scored(png((16, 32)), "cat"), r"example 1: a picture of mode RGB and shape \[32, 16, 3\]"),
        (scored(png(mode="L", colour=3), "cat"), "mode L and shape .32, 32., expected RGB"),
        (scored(png(), "dragon"), r"example 1: expected one class of airplane.*, got \[\]"),
        ({"target_scores": {"cat": 1}}, "example 1: 'input' must be text, got nothing"),
        ({"input": "x"}, "'target_scores' must be an object, got nothing"),
        ("x", "example 1: 'target_scores' must be an object"),
    ]
    for example, message in cases:
        cifar(tmp_path, [good, example])
        with pytest.raises(DataError, match=message):
            images.PARTS["cifar10"].read(tmp_path)
    (tmp_path / "task.json").write_text('{"examples": [')
    with pytest.raises(DataError, match=r"task\.json: not JSON"):
        images.PARTS["cifar10"].read(tmp_path)
    (tmp_path / "task.json").write_text("[]")
    with pytest.raises(DataError, match="'examples' must be a list, got nothing"):
        images.PARTS["cifar10"].read(tmp_path)
