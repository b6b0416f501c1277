"""Images: whatever holds a picture becomes one uint8 array; all else is refused by name."""

import io

import numpy as np
import pytest
from PIL import Image

from steppe.data import batches, collate, images, tasks
from steppe.data.batches import Plan
from steppe.data.errors import DataError
from steppe.data.images import Augment, ImageClassification

TASK = ImageClassification(("cat", "dog"), size=8)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def file(array, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def rows(*values):
    return [{"id": f"i{n}", "image": v, "label": n % 2} for n, v in enumerate(values)]


def test_all_forms_give_the_same_pixels():
    colour = noise(8, 8, 3)
    same = [colour, Image.fromarray(colour), file(colour), {"bytes": file(colour), "path": None}]
    data = TASK.encode(rows(*same))
    assert data.kind == TASK.kind == "classification"
    assert (TASK.num_labels, TASK.label_names) == (2, ("cat", "dog"))
    assert data.pixel_values.shape == (4, 8, 8, 3)
    assert data.pixel_values.dtype == np.uint8
    assert all(np.array_equal(image, colour) for image in data.pixel_values)
    assert data.labels.tolist() == [0, 1, 0, 1]
    assert data.input_ids is None
    assert data[1]["input_ids"] is None
    grey = noise(8, 8)
    data = TASK.encode(rows(grey, grey[:, :, None], Image.fromarray(grey), file(grey)))
    assert all((image == grey[:, :, None]).all() for image in data.pixel_values)
    black_white = Image.fromarray(grey > 128)
    assert set(TASK.encode(rows(black_white)).pixel_values.flat) == {0, 255}


def test_resizing_is_bicubic_with_antialiasing():
    colour = noise(20, 30, 3)
    data = ImageClassification(("a", "b"), size=(6, 10)).encode(rows(colour, file(colour, "BMP")))
    expected = np.asarray(Image.fromarray(colour).resize((10, 6), Image.Resampling.BICUBIC))
    assert data.pixel_values.shape == (2, 6, 10, 3)
    assert all(np.array_equal(image, expected) for image in data.pixel_values)
    # A fine pattern shrinks to its mean, not to whichever pixels are hit.
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    small = ImageClassification(("a", "b"), size=8).encode(rows(stripes)).pixel_values
    assert np.abs(small.astype(int) - 128).max() < 8


def test_crop_keeps_the_proportions():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 200
    task = ImageClassification(("a", "b"), size=10, fit="crop")
    assert (task.encode(rows(wide)).pixel_values == 200).all()
    assert (task.encode(rows(wide.transpose(1, 0, 2))).pixel_values == 200).all()


def test_floats_are_taken_only_when_asked_for():
    grey = noise(8, 8)
    task = ImageClassification(("a", "b"), size=8, unit_floats=True)
    data = task.encode(rows(grey / 255.0, (grey / 255.0).astype(np.float32), grey))
    assert all((image == grey[:, :, None]).all() for image in data.pixel_values)
    with pytest.raises(DataError, match=r"row 0 .* values from 0 to 255; unit_floats=True takes"):
        task.encode(rows(np.linspace(0, 255, 64).reshape(8, 8)))
    with pytest.raises(DataError, match="unit_floats=True takes values"):
        task.encode(rows(np.full((8, 8), np.nan)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((8, 8)), r"float64 array of shape \[8, 8\] is not uint8; values in \[0, 1\] are"),
        (np.zeros((8, 8), np.int64), r"int64 array of shape \[8, 8\] is not uint8; convert with"),
        (noise(3, 8, 8), r"of shape \[3, 8, 8\] is no image; channels must come last: array.tran"),
        (noise(8, 8, 4), r"of shape \[8, 8, 4\] is no image; drop the fourth \(alpha\) channel"),
        (noise(8), r"of shape \[8\] is no image; give \[H, W\], \[H, W, 1\] or \[H, W, 3\]"),
        (noise(0, 8), r"of shape \[0, 8\] has no pixels; drop the row"),
        (b"not an image", "12 bytes that cannot be decoded as an image .* drop the row"),
        (file(noise(8, 8, 3))[:60], "60 bytes that cannot be decoded as an image"),
        (b"", "0 bytes that cannot be decoded"),
        (Image.fromarray(noise(8, 8, 4)), r"mode 'RGBA' and size 8 x 8 is not .*convert\('RGB'\)"),
        (Image.new("I;16", (8, 8)), "mode 'I;16' .* scale its values to 0 to 255"),
        ("cat.png", "got the text 'cat.png'; images come as pixels or as encoded bytes"),
        (7, "must be a uint8 array, a PIL image or the bytes .* got int 7"),
        ([[1, 2], [3]], "the lists of pixels have unequal lengths"),
        ([[1, 2], [3, 256]], r"shape \[2, 2\] must be whole numbers 0 to 255, got"),
        ([[0.5, 2], [3, 4]], "must be whole numbers 0 to 255"),
        ([[True]], "must be whole numbers 0 to 255"),
        ([1, 2], r"of shape \[2\] is no image; give \[H, W\]"),
    ],
)
def test_bad_images_name_the_row_and_the_cure(value, message):
    with pytest.raises(
        DataError, match=rf"^row 1 \(id 'i1'\): column 'image': .*{message}"
    ) as caught:
        TASK.encode(rows(noise(8, 8), value))
    assert "\n" not in str(caught.value)


def test_bad_columns_and_settings():
    with pytest.raises(DataError, match=r"row 0 \(id 'i0'\) has no column 'picture', .*image=\.\."):
        ImageClassification(("a", "b"), image="picture").encode(rows(noise(8, 8)))
    with pytest.raises(DataError, match=r"row 0 \(id '1'\): label 'bird' is not among the classes"):
        TASK.encode([{"id": "1", "image": noise(8, 8), "label": "bird"}])
    with pytest.raises(DataError, match="the data set is empty"):
        TASK.encode([])
    for wrong in (0, (8, 0), (8, 8, 3)):
        with pytest.raises(DataError, match=r"size must be pixels >= 1, or \(height, width\)"):
            ImageClassification(("a", "b"), size=wrong)
    with pytest.raises(DataError, match="fit must be 'stretch' or 'crop', got 'pad'"):
        ImageClassification(("a", "b"), fit="pad")
    with pytest.raises(DataError, match="padding must be >= 0 pixels, got -1"):
        Augment(padding=-1)


def test_classes_are_gathered():
    task = ImageClassification.from_records(rows(*[noise(8, 8)] * 3), size=(8, 12))
    assert (task.labels, task.shape) == (("0", "1"), (8, 12))


@pytest.fixture(scope="module")
def many():
    return rows(*[noise(8, 8, seed=n) for n in range(21)])


def test_batches_have_one_shape(many):
    data = TASK.encode(many)
    plan = Plan(data, 4, (32, 64, 128), seed=0)
    assert plan.shapes == {(4, 8, 8, 3)}
    assert str(plan.report()) == "1 shapes (4x8x8x3: 6 batches), 12% padding"
    batch = collate.collate(data, np.asarray([3, -1]), 1)
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
        "pixel_values": ((2, 8, 8, 3), np.uint8),
        "labels": ((2,), np.int32),
        "label_mask": ((2,), np.float32),
        "example_index": ((2,), np.int32),
    }
    assert np.array_equal(batch["pixel_values"][0], data.pixel_values[3])
    assert (batch["pixel_values"][1].sum(), batch["label_mask"].tolist()) == (0, [1, 0])
    seen = np.concatenate([b["example_index"] for b in batches.evaluate(data, 4)])
    assert sorted(seen[seen >= 0].tolist()) == list(range(21))


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    image = noise(8, 8, 3)
    change = Augment(padding=2, flip=True)
    seen = {change(image, seed=0, epoch=e, index=i).tobytes() for e in range(5) for i in range(9)}
    assert len(seen) > 25
    again = change(image, seed=0, epoch=3, index=7)
    assert np.array_equal(again, change(image, seed=0, epoch=3, index=7))
    assert again.shape == image.shape
    wide = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    crops = {wide[y : y + 8, x : x + 8].tobytes() for y in range(5) for x in range(5)}
    plain = Augment(padding=2)
    assert {plain(image, seed=1, epoch=0, index=i).tobytes() for i in range(200)} == crops
    nothing = Augment(padding=0)
    assert np.array_equal(nothing(image, seed=0, epoch=0, index=0), image)
    mirrored = {Augment(0, flip=True)(image, seed=0, epoch=0, index=i).tobytes() for i in range(20)}
    assert mirrored == {image.tobytes(), image[:, ::-1].tobytes()}


@pytest.mark.parametrize("backend", ["numpy", "grain"])
def test_augmented_batches_resume_exactly_and_evaluation_is_plain(many, backend):
    task = ImageClassification(("cat", "dog"), size=8, augment=Augment(2, flip=True))
    data = task.encode(many)
    straight = batches.train(data, 4, seed=5)
    for _ in range(straight.steps_per_epoch + 2):
        next(straight)
    parts = [
        batches.train(data, 4, seed=5, backend=backend, process_index=i, process_count=2)
        for i in range(2)
    ]
    for part in parts:
        part.set_state(straight.get_state())
    changed = 0
    for _ in range(straight.steps_per_epoch):
        expected, found = next(straight), [next(part) for part in parts]
        for name, array in expected.items():
            np.testing.assert_array_equal(array, np.concatenate([row[name] for row in found]))
        index = expected["example_index"]
        real = index >= 0
        changed += (expected["pixel_values"][real] != data.pixel_values[index[real]]).any()
    assert changed
    for batch in batches.evaluate(data, 4):
        real = batch["example_index"] >= 0
        held = data.pixel_values[batch["example_index"][real]]
        assert np.array_equal(batch["pixel_values"][real], held)


def test_a_state_of_other_images_is_refused(many):
    state = batches.train(TASK.encode(many), 4, seed=3).get_state()
    other = [dict(record, image=255 - record["image"]) for record in many]
    with pytest.raises(DataError, match="another content"):
        batches.train(TASK.encode(other), 4, seed=3).set_state(state)


def test_tasks_are_values():
    assert hash(TASK) == hash(ImageClassification(("cat", "dog"), size=8))
    assert tasks.ImageClassification is images.ImageClassification


def test_pixels_as_nested_lists():
    for pixels in (noise(8, 8), noise(8, 8, 3)):
        records = [
            {"id": str(i), "image": v, "label": "a"}
            for i, v in enumerate((pixels, pixels.tolist()))
        ]
        made = ImageClassification(("a", "b"), size=8).encode(records).pixel_values
        np.testing.assert_array_equal(made[0], made[1])
