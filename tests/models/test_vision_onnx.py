"""A DINOv2 inside an ONNX graph: names from the nodes, split positions, damaged files."""

import numpy as np
import pytest

from steppe.models import onnx_file, onnx_weights, pretrained, tree

onnx = pytest.importorskip("onnx")

WIDTH, PATCH, SIDE = 8, 2, 3


def graph(path, *, layers=2, scale=True):
    """Writes a graph with the tensors and nodes that an export has; it could not be run."""
    rng = np.random.default_rng(0)
    tensors, nodes = {}, []

    def add(name, *shape):
        tensors[name] = rng.normal(size=shape).astype(np.float32)

    add("net.embeddings.cls_token", 1, 1, WIDTH)
    add("net.embeddings.patch_embeddings.projection.weight", WIDTH, 3, PATCH, PATCH)
    add("net.embeddings.patch_embeddings.projection.bias", WIDTH)
    add("onnx::Concat_1", 1, 1, WIDTH)
    add("onnx::Reshape_2", 1, SIDE * SIDE, WIDTH)
    add("head.weight", 5, 5)
    nodes += [
        ("Concat", "/net/embeddings/Concat", ["net.embeddings.cls_token", "x"]),
        ("Reshape", "/net/embeddings/Reshape", ["onnx::Reshape_2", "shape"]),
        ("Concat", "/net/embeddings/Concat_1", ["onnx::Concat_1", "y"]),
        ("Add", "/net/encoder/layer.0/norm1/Add", ["v", "epsilon"]),
        ("Concat", "/net/encoder/layer.0/attention/attention/Concat", ["b", "heads", "size"]),
    ]
    linear = {
        "attention.attention.query": (WIDTH, WIDTH),
        "attention.attention.key": (WIDTH, WIDTH),
        "attention.attention.value": (WIDTH, WIDTH),
        "attention.output.dense": (WIDTH, WIDTH),
        "mlp.fc1": (WIDTH, 4 * WIDTH),
        "mlp.fc2": (4 * WIDTH, WIDTH),
    }
    for layer in range(layers):
        at = f"net.encoder.layer.{layer}"
        for norm in ("norm1", "norm2"):
            add(f"{at}.{norm}.weight", WIDTH)
            add(f"{at}.{norm}.bias", WIDTH)
        for name, (rows, columns) in linear.items():
            add(f"{at}.{name}.bias", columns)
            add(f"onnx::MatMul_{layer}_{name}", rows, columns)
            scope = "/" + at.replace("net.", "net/").replace("encoder.", "encoder/")
            node = f"{scope}/{name.replace('.', '/')}/MatMul"
            nodes.append(("MatMul", node, ["h", f"onnx::MatMul_{layer}_{name}"]))
        for gain in ("layer_scale1", "layer_scale2"):
            if scale:
                add(f"{at}.{gain}.lambda1", WIDTH)
    add("net.layernorm.weight", WIDTH)
    add("net.layernorm.bias", WIDTH)

    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    constants = {
        "heads": np.array([2], np.int64),
        "size": np.array([4], np.int64),
        "epsilon": np.array(1e-5, np.float32),
    }
    made = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value, name))
        for name, value in constants.items()
    ]
    made += [helper.make_node(op, inputs, [f"{name}_out"], name=name) for op, name, inputs in nodes]
    stored = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    onnx.save(helper.make_model(helper.make_graph(made, "g", [], [], stored)), str(path))
    return tensors


def test_it_loads_as_a_model(tmp_path):
    tensors = graph(tmp_path / "m.onnx")
    loaded = pretrained.load(tmp_path / "m.onnx")
    config = loaded.model.config
    assert (config.family, config.heads, config.epsilon) == ("dinov2", 2, 1e-5)
    assert (config.image_size, config.patch, config.layers) == (SIDE * PATCH, PATCH, 2)
    assert not config.mask_token
    flat = tree.flatten(loaded.params)
    np.testing.assert_array_equal(
        flat["layers/attn/k/kernel"][1], tensors["onnx::MatMul_1_attention.attention.key"]
    )
    np.testing.assert_array_equal(flat["embed/position/table"][0], tensors["onnx::Concat_1"][0, 0])
    np.testing.assert_array_equal(flat["embed/position/table"][1:], tensors["onnx::Reshape_2"][0])
    np.testing.assert_array_equal(
        flat["embed/patch/kernel"][(0 * PATCH + 1) * 3 + 2],
        tensors["net.embeddings.patch_embeddings.projection.weight"][:, 2, 0, 1],
    )
    assert loaded.unused == ()
    assert pretrained.load_config(tmp_path / "m.onnx") == config


def test_every_tensor_is_what_onnx_reads(tmp_path):
    tensors = graph(tmp_path / "m.onnx")
    file = onnx_file.OnnxFile(tmp_path / "m.onnx")
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(file.read(name), tensor)
    assert file.constants()["heads"] == 2


def test_values_that_are_listed_instead_of_packed(tmp_path):
    """Small tensors may be lists of numbers in the file."""
    helper = onnx.helper
    stored = [
        helper.make_tensor("f", onnx.TensorProto.FLOAT, [2], [1.5, -2.0]),
        helper.make_tensor("i", onnx.TensorProto.INT64, [3], [1, -5, 2**40]),
        helper.make_tensor("none", onnx.TensorProto.FLOAT, [0, 3], []),
    ]
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], stored)), tmp_path / "m.onnx")
    file = onnx_file.OnnxFile(tmp_path / "m.onnx")
    np.testing.assert_array_equal(file.read("f"), np.float32([1.5, -2.0]))
    np.testing.assert_array_equal(file.read("i"), [1, -5, 2**40])
    assert file.read("none").shape == (0, 3)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "m.onnx"
    graph(path)
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"m\.onnx"):
            onnx_weights.read(path)
    path.write_bytes(b"this is a text and no graph at all, whatever its name may say")
    with pytest.raises(ValueError, match="not an ONNX file"):
        onnx_weights.read(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pretrained.load(tmp_path / "absent.onnx")
    graph(path, scale=False)
    with pytest.raises(ValueError, match="not a DINOv2"):
        onnx_weights.read(path)
    helper = onnx.helper
    tensor = helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [1.0])
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], [tensor])), str(path))
    with pytest.raises(ValueError, match="exports of BERT and of DINOv2 are read"):
        onnx_weights.read(path)
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=1)
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], [tensor])), str(path))
    with pytest.raises(ValueError, match="kept in another file"):
        onnx_weights.read(path)
