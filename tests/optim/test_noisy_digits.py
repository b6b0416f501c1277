"""What a flat minimum is worth where labels are wrong, on real digits (see ``noisy_digits``)."""

import runpy
from pathlib import Path
from types import SimpleNamespace

toy = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("noisy_digits.py"))))


def test_sharpness_aware_steps_gain_where_labels_are_wrong(asset):
    # One seed moves by three points, and all methods with it: differences within a seed.
    names = ("SGD", "SAM 0.5", "FSAM 0.5, a half")
    plain, sam, fsam = toy.table(asset("digits"), 10, names).values()
    assert 0.6 < plain.mean() < 0.73
    assert (sam - plain).mean() > 0.015
    assert (fsam - plain).mean() > 0.01
