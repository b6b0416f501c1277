"""The line from the base to the end of a method, along which a coefficient is chosen."""

import numpy as np
import pytest

from steppe.launch.merge import methods


def trees(scale: float):
    rng = np.random.default_rng(0)
    return {"a": scale * rng.normal(size=(3, 2)).astype(np.float32), "b": {"c": np.float32(scale)}}


def test_a_point_between_by_hand():
    start, end = trees(1.0), trees(3.0)
    at = methods.between(start, end)
    assert at(0) is start
    np.testing.assert_allclose(at(0.25)["a"], 1.5 * start["a"], rtol=1e-6)
    np.testing.assert_allclose(at(1.0)["b"]["c"], 3.0, rtol=1e-6)


def test_models_are_arguments_of_the_program_and_not_constants_in_it():
    methods.between(trees(1.0), trees(2.0))(0.5)
    before = methods._between._cache_size()
    other = methods.between(trees(4.0), trees(2.0))
    assert other(0.5)["b"]["c"] == pytest.approx(3.0)
    assert methods._between._cache_size() == before
