"""What a model may lack, what makes it another network, and what the errors of the disk say."""

import dataclasses
import errno
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from steppe.models import pretrained
from steppe.models.heads import HeadConfig
from steppe.train.merge import heads, stream
from steppe.train.merge.inputs import open_input
from steppe.train.merge.output import Output
from steppe.train.merge.roles import Roles, role_of

from .test_stream import TINY, folder, random

NORM = "embeddings.LayerNorm"


def network(path, head=None, seed=0, **changes):
    config = dataclasses.replace(TINY, head=head, **changes)
    return pretrained.save(path, config.build(), random(config, seed))


@pytest.fixture
def world(tmp_path):
    kinds = [HeadConfig("classification", 3), HeadConfig("classification", 2)]
    models = [network(tmp_path / f"m{i}", kind, i + 1) for i, kind in enumerate(kinds)]
    return network(tmp_path / "base"), models


def rewrite(at, change):
    file = at / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def without(part):
    return lambda tensors: {name: x for name, x in tensors.items() if part not in name}


def test_a_model_without_a_tensor_of_the_trunk_is_refused(world, tmp_path):
    base, models = world
    rewrite(models[0], without(NORM))
    for start in (base, None):
        found = stream.inspect(start, models)
        assert {row.what for row in found.differences} == {f"{NORM}.weight", f"{NORM}.bias"}
    assert found.table().splitlines()[1].split() == [f"{NORM}.bias", "-", "[8]", "float32"]
    with pytest.raises(ValueError, match=rf"differ in architecture(.|\n)*{NORM}\.bias"):
        stream.merge(stream.Average(), models, tmp_path / "out", base=base)
    # That all models lack it makes none of them whole.
    rewrite(models[1], without(NORM))
    assert len(stream.inspect(base, models).differences) == 2
    assert not list(tmp_path.glob("*out*"))


def test_a_pooler_is_needed_by_the_heads_that_read_it(world, tmp_path):
    base, models = world
    tokens = [
        network(tmp_path / f"t{i}", HeadConfig("token", 4), i, pooler=False) for i in range(2)
    ]
    found = stream.inspect(base, [models[0], tokens[0]])
    assert {row.what for row in found.differences} == {"pooler.dense.weight", "pooler.dense.bias"}
    found = stream.inspect(base, tokens)
    assert found.ok
    (note,) = found.notes
    assert note.startswith("pooler.dense.")
    assert note.endswith("not in every model and read by no head, so left out")
    merged = heads.load(stream.merge(stream.Average(), tokens, tmp_path / "out", base=base).out)
    assert "pooler" not in merged.model("t1")[1]


def test_buffers_and_a_head_of_the_base_alone_are_left_out(world, tmp_path):
    _, models = world
    rewrite(models[1], lambda t: {**t, "bert.embeddings.position_ids": np.arange(10)})
    base = network(tmp_path / "mlm", HeadConfig("mlm", 1, drop=0.0), pooler=False)
    result = stream.merge(stream.Average(), models, tmp_path / "out", base=base)
    assert result.report.notes == ()
    held = load_file(result.out / "heads" / "m1.safetensors")
    assert set(held) == {"classifier.weight", "classifier.bias"}
    assert json.loads((result.out / "config.json").read_text())["architectures"] == ["BertModel"]
    assert pretrained.load(result.out).fresh == ()
    assert set(heads.load(result.out).heads) == {"m0", "m1"}


def test_of_a_family_that_is_not_known_the_base_is_the_trunk(tmp_path):
    x = {name: np.ones(2, np.float32) for name in ("norm", "lm_head", "score", "w")}
    base = folder(tmp_path / "base", {n: x[n] for n in ("norm", "lm_head", "w")})
    one = folder(tmp_path / "one", {n: 3 * x[n] for n in ("norm", "w")})
    two = folder(tmp_path / "two", {n: 5 * x[n] for n in ("w", "score")})
    three = folder(tmp_path / "three", {n: 5 * x[n] for n in ("norm", "w", "score")})
    assert [row.what for row in stream.inspect(base, [one, two]).differences] == ["norm"]
    result = stream.merge(stream.Ties(1.0, 0.5), [one, three], tmp_path / "out", base=base)
    assert result.report.notes == ("lm_head: only in the base, so copied from it",)
    assert result.tensors == 3
    found = load_file(result.out / "model.safetensors")
    np.testing.assert_array_equal(found["lm_head"], x["lm_head"])
    assert set(found) == {"norm", "lm_head", "w"}
    assert set(load_file(result.out / "heads" / "three.safetensors")) == {"score"}


def test_roles_of_a_family_with_masks_in_its_layers(tmp_path):
    raw = {"model_type": "gpt2", "n_embd": 4, "n_layer": 2, "n_head": 1, "n_positions": 8,
           "vocab_size": 5, "activation_function": "gelu_new"}  # fmt: skip
    held = {"transformer.h.0.attn.bias": np.ones((1, 1, 8, 8), np.float32)}
    roles = Roles.of([open_input(folder(tmp_path / "g", held, **raw), "g")])
    assert roles is not None

    def role(name):
        return role_of(name, roles, in_base=True, in_models=True, pooled=False)

    assert role("h.0.attn.bias") == "buffer"
    assert role("h.1.attn.c_attn.bias") == role("h.1.ln_1.weight") == "layer"
    assert role("ln_f.weight") == role("wte.weight") == "trunk"
    assert role("score.weight") == "head"


def test_a_type_that_is_not_read_is_not_called_damage(world):
    base, _ = world
    rewrite(base, lambda t: {**t, "extra": np.arange(3, dtype=np.uint32)})
    with pytest.raises(
        ValueError, match=r"tensor 'extra' has the type U32, which is not read"
    ) as e:
        open_input(base, "base")
    assert "damaged" not in str(e.value)
    assert "fetch" not in str(e.value)


def test_a_damaged_listing_of_heads_is_named(world, tmp_path):
    base, models = world
    out = stream.merge(stream.Average(), models, tmp_path / "out", base=base).out
    listing = out / "heads.json"
    for text, words in (
        ('{"m0": ', "is damaged"),
        ("[1, 2]", "an object a task"),
        ('{"m0": 3}', "an object a task"),
        ('{"m0": {"kind": "foo"}}', "the head 'm0' is damaged"),
        ('{"m0": {"kind": "lm"}}', "the head 'm0' is damaged"),
        ('{"m0": {"kind": "classification", "num_labels": "two"}}', "the head 'm0' is damaged"),
    ):
        listing.write_text(text)
        with pytest.raises(ValueError, match=rf"heads\.json.*{words}.*merge the models again") as e:
            heads.load(out)
        assert "\n" not in str(e.value)


def test_a_full_disk_is_explained_where_files_are_laid_out(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"\.out\.partial cannot be written .*raise the limit") as e:
        Output(tmp_path / "out", {"w": ((4,), np.float64)}, {})
    assert e.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_a_second_merge_into_the_same_folder_is_refused(tmp_path):
    pytest.importorskip("fcntl")
    arguments = (tmp_path / "out", {"w": ((2,), np.float32)}, {})
    first = Output(*arguments)
    for resume in (True, False):
        with pytest.raises(FileExistsError, match="another process is merging into .*out; wait"):
            Output(*arguments, resume=resume)
    first.write("w", 0, np.ones(2, np.float32))
    first.finish("w")
    first.interrupt()
    second = Output(*arguments)
    assert second.done == {"w"}
    np.testing.assert_array_equal(load_file(second.publish() / "model.safetensors")["w"], 1)
    with pytest.raises(FileExistsError, match="is there already"):
        Output(*arguments)
