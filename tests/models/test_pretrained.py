"""Reading and writing model folders: exact round trips, placement, and every bad input."""

import json
import os
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steppe.models import pretrained, tree, weights

from .conftest import TINY


@pytest.fixture
def saved(tiny, tmp_path):
    _, params = tiny
    pretrained.save(tmp_path / "m", TINY.build(), params, labels=["a", "b", "c"])
    return tmp_path / "m"


def same(left, right):
    tree.same_structure(left, right, ("left", "right"))
    right = tree.flatten(right)
    for path, leaf in tree.flatten(left).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(right[path]), err_msg=path)


def edit_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_round_trip_is_exact(tiny, saved):
    loaded = pretrained.load(saved)
    same(loaded.params, tiny[1])
    assert loaded.model.config == TINY
    assert loaded.fresh == ()
    assert loaded.unused == ()
    assert loaded.labels == ("a", "b", "c")


def test_shards_and_index(tiny, tmp_path):
    pretrained.save(tmp_path / "m", TINY.build(), tiny[1], shard_bytes=4096)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    same(pretrained.load(tmp_path / "m").params, tiny[1])


def test_bf16_is_read_and_written(tiny, tmp_path):
    half = tree.cast(tiny[1], jnp.bfloat16)
    pretrained.save(tmp_path / "m", TINY.build(), half)
    same(pretrained.load(tmp_path / "m", dtype="bfloat16").params, half)
    again = pretrained.load(tmp_path / "m")
    assert again.params["head"]["out"]["bias"].dtype == jnp.float32
    same(again.params, tree.cast(half, jnp.float32))


def test_a_plan_places_each_leaf_in_its_shards(tiny, saved):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))

    class Plan:
        def shardings(self, abstract):
            def one(path, leaf):
                axes = [None] * leaf.ndim
                if path.endswith("kernel") and "layers" in path:
                    axes[-1] = "model"
                return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

            return tree.map_with_path(one, abstract)

    loaded = pretrained.load(saved, plan=Plan())
    same(loaded.params, tiny[1])
    kernel = loaded.params["layers"]["ffn"]["in"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(4, 16, 12)}


def test_a_new_head_is_initialised_and_reported(tiny, saved):
    loaded = pretrained.load(saved, head="token", num_labels=5)
    assert set(loaded.fresh) == {"head/out/kernel", "head/out/bias"}
    assert loaded.params["head"]["out"]["kernel"].shape == (16, 5)
    assert 0.005 < float(loaded.params["head"]["out"]["kernel"].std()) < 0.05
    assert "pooler" not in loaded.params
    assert "bert.pooler.dense.weight" in loaded.unused
    other = pretrained.load(saved, head="classification", num_labels=2, key=jax.random.key(3))
    assert set(other.fresh) == {"head/out/kernel", "head/out/bias"}
    same(other.params["layers"], tiny[1]["layers"])
    kept = pretrained.load(saved, head="classification")
    assert kept.fresh == ()
    assert kept.model.config.head.num_labels == 3


def test_head_none_and_overrides(saved):
    loaded = pretrained.load(saved, head=None, drop=0.0, remat="full")
    assert loaded.model.config.head is None
    assert loaded.model.config.drop == 0.0
    assert loaded.model.config.remat == "full"
    with pytest.raises(ValueError, match="'dropp' is not a setting of the model"):
        pretrained.load(saved, dropp=0.1)


def test_names_of_old_files(tiny, saved):
    """Files of 2019 call the norms' parameters gamma and beta."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(saved / "model.safetensors")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for n, t in tensors.items()
    }
    save_file(old, saved / "model.safetensors")
    same(pretrained.load(saved).params, tiny[1])


# --- bad input --------------------------------------------------------------------------


def test_missing_things(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="model folder .*nowhere does not exist"):
        pretrained.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no config.json"):
        pretrained.load(tmp_path / "empty")
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin may run code and is not read"):
        pretrained.load(saved)


def test_unknown_family_lists_the_known(saved):
    edit_config(saved, model_type="xlnet")
    with pytest.raises(ValueError, match="'xlnet' is not known; known families: bart, bert, clip"):
        pretrained.load(saved)


@pytest.mark.parametrize("cut", [3, 9, 200, 5000])
def test_truncated_file(saved, cut):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"model\.safetensors is"):
        pretrained.load(saved)


def test_not_a_safetensors_file(saved):
    (saved / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"\x80\x04K\x01")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        pretrained.load(saved)


@pytest.mark.parametrize("offsets", [[0, 4], [-8, 0], [0, 1 << 60]])
def test_hostile_offsets(tmp_path, offsets):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(ValueError, match=r"m\.safetensors is truncated or damaged"):
        weights.Safetensors([tmp_path / "m.safetensors"])


def test_missing_shard_and_index_that_leaves_the_folder(tiny, tmp_path):
    pretrained.save(tmp_path / "m", TINY.build(), tiny[1], shard_bytes=4096)
    index = tmp_path / "m" / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    (tmp_path / "m" / sorted(places.values())[0]).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-\d+\.safetensors does not exist"):
        pretrained.load(tmp_path / "m")
    index.write_text(json.dumps({"weight_map": {"x": "../../etc/secret.safetensors"}}))
    with pytest.raises(ValueError, match="names a shard outside its folder"):
        pretrained.load(tmp_path / "m")


def test_shape_mismatch_names_leaf_and_both_shapes(saved):
    edit_config(saved, intermediate_size=32)
    with pytest.raises(
        ValueError,
        match=r"'encoder.layer.0.intermediate.dense.bias' \(our 'layers/ffn/in/bias'\) has shape "
        r"\(24,\), but config.json asks for \(32,\)",
    ):
        pretrained.load(saved)


def test_missing_tensor_and_config_key(saved):
    edit_config(saved, num_hidden_layers=5)
    with pytest.raises(ValueError, match=r"lacks the tensor 'encoder\.layer\.4\."):
        pretrained.load(saved)
    edit_config(saved, num_hidden_layers=None)
    with pytest.raises(ValueError, match="config.json lacks 'num_hidden_layers'"):
        pretrained.load(saved)
    edit_config(saved, num_hidden_layers=4, position_embedding_type="relative_key")
    with pytest.raises(ValueError, match="'relative_key' is not supported"):
        pretrained.load(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        pretrained.load(saved)


def test_a_head_that_the_family_lacks(saved):
    with pytest.raises(ValueError, match="a bert model has no 'ner' head; it has classification, "):
        pretrained.load(saved, head="ner")


def test_save_refuses_wrong_params_and_foreign_folders(tiny, tmp_path):
    model, params = TINY.build(), tiny[1]
    wrong = tree.replace(params, {"head/out/bias": jnp.zeros(9)})
    with pytest.raises(ValueError, match=r"'head/out/bias': params has \(9,\)"):
        pretrained.save(tmp_path / "m", model, wrong)
    with pytest.raises(ValueError, match="labels must name the head's 3 classes, got 2"):
        pretrained.save(tmp_path / "m", model, params, labels=["a", "b"])
    assert not (tmp_path / "m").exists()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("do not lose me")
    with pytest.raises(FileExistsError, match="already holds thesis.tex"):
        pretrained.save(tmp_path / "m", model, params)
    assert (tmp_path / "m" / "thesis.tex").read_text() == "do not lose me"


def test_a_failed_save_keeps_the_earlier_export(tiny, saved, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "write", full)
    with pytest.raises(OSError, match="No space left"):
        pretrained.save(saved, TINY.build(), tiny[1])
    monkeypatch.undo()
    same(pretrained.load(saved).params, tiny[1])
    assert [p.name for p in saved.parent.iterdir()] == ["m"]


def test_saving_again_replaces_an_export(tiny, saved):
    new = jax.tree.map(lambda x: x + 1, tiny[1])
    pretrained.save(saved, TINY.build(), new)
    same(pretrained.load(saved).params, new)


def test_nothing_is_unpickled_and_no_torch_is_needed(saved):
    """Loading works where torch and transformers cannot be imported."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'datasets', 'tokenizers'):\n"
        "    sys.modules[name] = None\n"
        "from steppe.models import pretrained\n"
        f"pretrained.load({str(saved)!r})\n"
        "assert 'pickle' not in str(pretrained.__dict__)\n"
    )
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=120)
