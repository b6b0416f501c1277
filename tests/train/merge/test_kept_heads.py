"""Heads and files that could not be opened again are refused before a merge has cost anything."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from steppe.models import pretrained
from steppe.models.encoder import EncoderConfig
from steppe.models.heads import HeadConfig
from steppe.train.merge import heads, stream
from steppe.train.merge.output import JOURNAL

TINY = EncoderConfig("bert", 12, 8, 1, 2, 8, 12, types=2, pooler=True, remat="none")


@pytest.fixture
def pair(tmp_path):
    """A base, and two models with heads of two classes."""
    made = []
    for number, name in enumerate(("base", "one", "two")):
        head = None if name == "base" else HeadConfig("classification", 2)
        model = dataclasses.replace(TINY, head=head).build()
        params = jax.jit(model.init)(jax.random.key(number))
        labels = None if head is None else ("neg", "pos")
        made.append(pretrained.save(tmp_path / name, model, params, labels=labels))
    return made


AVERAGE = stream.Average()


def merged(pair, out, method=AVERAGE, **options):
    return stream.merge(method, pair[1:], out, base=pair[0], **options)


def changed(folder, **new):
    """Tensors of a folder in place of those that it has; None takes one away."""
    file = folder / "model.safetensors"
    held = {**load_file(file), **{name.replace("__", "."): x for name, x in new.items()}}
    save_file({n: x for n, x in held.items() if x is not None}, file, {"format": "pt"})


def configured(folder, **new):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **new}))


def refused(pair, tmp_path, said, **options):
    with pytest.raises(ValueError, match=said):
        merged(pair, tmp_path / "out", **options)
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (
            {"classifier__weight": None, "classifier__bias": None},
            "one lacks the tensor 'classifier.(weight|bias)' of the classification head",
        ),
        ({"classifier__bias": None}, "one lacks the tensor 'classifier.bias'"),
        (
            {"classifier__weight": np.zeros((5, 8), np.float32)},
            r"'classifier.weight' of the classification head must be \[2, 8\] .*got \[5, 8\]",
        ),
        ({"classifier__weight": np.zeros((2, 8), np.int32)}, "got .2, 8. int32"),
    ],
)
def test_a_head_that_is_not_whole(new, said, pair, tmp_path):
    changed(pair[1], **new)
    refused(pair, tmp_path, said)


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ({"id2label": {"a": "x", "b": "y"}}, "config.json: id2label must be an object of numbers"),
        ({"id2label": ["neg", "pos"]}, "config.json: id2label must be"),
        ({"classifier_dropout": "x"}, r"classifier_dropout must be a rate in \[0, 1\), got 'x'"),
        ({"classifier_dropout": -1}, r"classifier_dropout must be a rate in \[0, 1\), got -1"),
    ],
)
def test_settings_of_a_head_that_are_none(new, said, pair, tmp_path):
    configured(pair[1], **new)
    refused(pair, tmp_path, said)


def test_the_head_that_is_whole_is_kept_as_it_was(pair, tmp_path):
    out = merged(pair, tmp_path / "out").out
    own = load_file(pair[1] / "model.safetensors")["classifier.weight"]
    kept = heads.load(out).heads["one"]
    np.testing.assert_array_equal(np.asarray(kept.params["out"]["kernel"]).T, own)
    assert kept.labels == ("neg", "pos")


@pytest.mark.parametrize("text", ["[]", "null", '"bert"', "3"])
def test_a_configuration_that_is_no_object(text, pair, tmp_path):
    (pair[1] / "config.json").write_text(text)
    refused(pair, tmp_path, "config.json must hold an object, got")


def test_one_tensor_under_two_names(pair, tmp_path):
    name = "encoder.layer.0.attention.self.query.weight"
    changed(pair[1], **{name: np.full((8, 8), 7, np.float32)})
    refused(pair, tmp_path, f"'bert.{name}' and '{name}' are both|'{name}' and 'bert.{name}' are")


@pytest.mark.parametrize("name", ["x" * 201, "a\nb", "..", "a/b", ""])
def test_a_name_that_no_file_can_have(name, pair, tmp_path):
    refused(pair, tmp_path, "must be able to name a file", names=[name, "two"])


@pytest.mark.parametrize(
    "method", [stream.TaskArithmetic(3e38), stream.Weighted((3e38, 3e38)), stream.Slerp(3e38)]
)
def test_a_result_out_of_range_names_the_tensor(method, pair, tmp_path):
    changed(pair[1], bert__embeddings__word_embeddings__weight=np.full((12, 8), 9, np.float32))
    changed(pair[2], bert__embeddings__word_embeddings__weight=np.full((12, 8), -9, np.float32))
    refused(pair, tmp_path, "tensor '.*' of the merged model leaves the range of", method=method)


def test_a_place_that_is_taken_meanwhile_keeps_the_merge(pair, tmp_path):
    out = tmp_path / "out"
    out.mkdir()

    def taken(done, total, name):
        if done == total:
            (out / "other").write_text("x")

    with pytest.raises(FileExistsError, match=r"out cannot be replaced .*kept"):
        merged(pair, out, progress=taken)
    assert (out / "other").read_text() == "x"
    assert (tmp_path / ".out.partial" / JOURNAL).is_file()
    (out / "other").unlink()
    again = merged(pair, out)
    assert again.resumed == again.tensors
    assert not (out / JOURNAL).exists()
    assert not (tmp_path / ".out.partial").exists()
    heads.load(out).model("one")
