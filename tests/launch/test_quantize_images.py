"""What `steppe quantize` makes for a vision model when it has no data."""

import dataclasses
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from steppe.launch.quantize import methods, opened
from steppe.launch.quantize.settings import QuantizeConfig
from steppe.train.quantize import generator, scenes

HERE = Path(__file__).parents[1] / "train" / "quantize"
small = SimpleNamespace(**runpy.run_path(str(HERE / "small.py")))
CONFIG = QuantizeConfig(
    "model", "out", method=("zsaq",), calibration="noise", examples=8, batch_size=4
)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def vision():
    model = small.vision()
    return opened.Opened(model, jax.jit(model.init)(KEY), None, None, None, None)


def images(made):
    return np.asarray(made.apply(made.init(KEY), {}, KEY).batch["pixel_values"])


def test_images_are_dead_leaves_or_noise(vision):
    leaves = images(opened.noise(vision, CONFIG, 4))
    np.testing.assert_allclose(leaves, scenes.dead_leaves(KEY, (4, 8, 8, 3)), atol=1e-5)
    plain = dataclasses.replace(CONFIG, images="noise")
    noise = images(generator.pixels(vision.model, rows=4))
    np.testing.assert_array_equal(images(opened.noise(vision, plain, 4)), noise)
    np.testing.assert_array_equal(images(opened.learned(vision, plain)), noise)
    learned = images(opened.learned(vision, CONFIG))
    drawn = scenes.dead_leaves(jax.random.fold_in(KEY, 1), (4, 8, 8, 3))
    assert np.corrcoef(learned.ravel(), drawn.ravel())[0, 1] > 0.9


def test_calibration_without_data_draws_the_same(vision):
    _, batches = opened.calibration(vision, CONFIG, 3)
    assert [b["pixel_values"].shape for b in batches] == [(4, 8, 8, 3)] * 2
    assert abs(batches[0]["pixel_values"] - batches[1]["pixel_values"]).max() > 0.1
    _, some = opened.calibration(vision, dataclasses.replace(CONFIG, examples=6), 3)
    np.testing.assert_array_equal(some[1]["pixel_values"], batches[1]["pixel_values"][:2])


def test_what_is_recorded_is_what_was_used(vision):
    for method, there in (("zsaq", True), ("random", False), ("rtn", False)):
        notes = methods.describe(vision, CONFIG, method)
        assert ("generator_lr" in notes, "info_bonus" in notes) == (there, there)
        assert ("images" in notes) == (method != "rtn")
        assert not {"adapter", "candidates", "length"} & set(notes)  # of texts
    assert methods.describe(vision, CONFIG, "gptq")["images"] == "leaves"
    known = dataclasses.replace(CONFIG, calibration="data")
    assert "images" not in methods.describe(vision, known, "gptq")
    begun = dataclasses.replace(known, start="gptq")
    assert methods.describe(vision, begun, "zsaq")["calibration"] == "data"
    assert "start" not in methods.describe(vision, begun, "gptq")


def test_a_text_is_recorded_as_long_as_it_was():
    model = small.encoder()
    read = opened.Opened(model, {}, None, None, None, None)
    config = dataclasses.replace(CONFIG, length=999)
    notes = methods.describe(read, config, "zsaq")
    assert notes["length"] == 16  # what the model reads
    assert notes["adapter"] == "soft_embed"
    assert "images" not in notes


@pytest.mark.parametrize(("name", "value"), [("adapter", "linear"), ("length", 7)])
def test_settings_of_texts_are_not_for_images(vision, name, value):
    config = dataclasses.replace(CONFIG, **{name: value})
    with pytest.raises(ValueError, match=f"{name}={value} does not go with model, which reads im"):
        methods.check(vision, config)


def test_words_are_not_for_images(vision):
    config = dataclasses.replace(CONFIG, candidates=5)
    with pytest.raises(ValueError, match="candidates=5 are words, and model reads images"):
        methods.check(vision, config)
