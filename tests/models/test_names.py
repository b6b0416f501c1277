"""Name maps: where a leaf lies in a stored tensor, and how tensors are put together again."""

import numpy as np
import pytest

from steppe.models.families.names import Codec, Name

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(4, 6), (6,)])
def test_parts_of_a_fused_tensor(transposed: bool, shape: tuple[int, ...]) -> None:
    names = [
        Name(f"{p}/kernel", "c_attn.weight", transposed, part=(i, 3)) for i, p in enumerate("qkv")
    ]
    leaves = [RNG.normal(size=shape) for _ in names]
    stored = names[0].join(leaves)
    assert stored.shape == names[0].stored_shape(shape)
    assert stored.size == 3 * leaves[0].size
    whole = tuple(slice(0, n) for n in shape)
    for name, leaf in zip(names, leaves, strict=True):
        piece = stored[name.region(whole, shape)]
        np.testing.assert_array_equal(piece.T if transposed else piece, leaf)


def test_a_region_of_a_part() -> None:
    name = Name("k/kernel", "qkv.weight", transposed=True, part=(1, 3))
    leaf = RNG.normal(size=(4, 6))
    stored = name.join([np.zeros((4, 6)), leaf, np.zeros((4, 6))])
    index = (slice(1, 3), slice(2, 6))
    np.testing.assert_array_equal(stored[name.region(index, leaf.shape)].T, leaf[index])


def test_stacked_names_have_one_tensor_a_layer() -> None:
    name = Name("layers/q/kernel", "h.{}.q", transposed=True)
    assert name.tensors((2, 4, 6)) == ["h.0.q", "h.1.q"]
    assert name.stored_shape((2, 4, 6)) == (6, 4)


def test_codec_decides_about_layout() -> None:
    codec = Codec(
        load=lambda a: a.reshape(a.shape[0], -1).T,
        save=lambda a: a.T.reshape(-1, 3, 2, 2),
        stored=lambda shape: (shape[1], 3, 2, 2),
    )
    name = Name("patch/kernel", "conv.weight", codec=codec)
    leaf = RNG.normal(size=(12, 5))
    stored = name.join([leaf])
    assert stored.shape == name.stored_shape(leaf.shape) == (5, 3, 2, 2)
    np.testing.assert_array_equal(codec.load(stored), leaf)
