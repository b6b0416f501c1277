"""The real checkpoints: MiniLM-L6, MPNet and MiniLM-L3 give what their own runtimes give."""

import jax
import numpy as np
import pytest

from steppe.models import pretrained, tree

pytestmark = [pytest.mark.parity, pytest.mark.assets, pytest.mark.slow]

TEXTS = [
    "A man is playing a guitar on the stage.",
    "Someone performs music with an instrument.",
    "The stock market fell sharply on Monday morning.",
]


def encode(folder, pad_id):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=pad_id)
    encodings = tokenizer.encode_batch(TEXTS)
    return {
        "input_ids": np.array([e.ids for e in encodings]),
        "attention_mask": np.array([e.attention_mask for e in encodings]),
    }


def hidden(loaded, batch):
    return np.asarray(jax.jit(loaded.model.apply)(loaded.params, batch).hidden)


def cosines(states, batch):
    mask = batch["attention_mask"][..., None]
    pooled = (states * mask).sum(1) / mask.sum(1)
    pooled /= np.linalg.norm(pooled, axis=-1, keepdims=True)
    return pooled @ pooled.T


@pytest.mark.parametrize(
    ("name", "count", "pad"), [("minilm-l6", 22_713_216, 0), ("mpnet", 109_486_464, 1)]
)
def test_against_transformers(asset, name, count, pad):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = asset(name)
    loaded = pretrained.load(folder)
    assert tree.count(loaded.params) == count
    assert loaded.fresh == ()
    assert loaded.unused == ()
    batch = encode(folder, pad)
    ours = hidden(loaded, batch)
    reference = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = reference(**{k: torch.tensor(v) for k, v in batch.items()}).last_hidden_state
    mask = batch["attention_mask"][..., None]
    np.testing.assert_allclose(ours * mask, theirs.numpy() * mask, atol=2e-5, rtol=1e-4)
    similar = cosines(ours, batch)
    assert similar[0, 1] > 0.35 > similar[0, 2]


def test_minilm_l3_from_onnx(asset):
    """Names recovered from the graph; outputs equal those of the graph itself."""
    onnxruntime = pytest.importorskip("onnxruntime")
    (file,) = asset("minilm-l3").glob("*.onnx")
    loaded = pretrained.load(file)
    assert tree.count(loaded.params) == 17_241_984
    assert loaded.model.config.heads == 12
    batch = encode(asset("minilm-l6"), 0)
    session = onnxruntime.InferenceSession(str(file))
    feed = {i.name: batch[i.name].astype(np.int64) for i in session.get_inputs()}
    outputs = session.run(None, feed)
    pooled = next(o for o in outputs if o.shape == (3, 384))
    mask = batch["attention_mask"][..., None]
    ours = (hidden(loaded, batch) * mask).sum(1) / mask.sum(1)
    if np.allclose(np.linalg.norm(pooled, axis=-1), 1, atol=1e-3):
        ours = ours / np.linalg.norm(ours, axis=-1, keepdims=True)
    np.testing.assert_allclose(ours, pooled, atol=1e-4, rtol=1e-3)


def test_round_trip_of_real_weights(asset, tmp_path):
    loaded = pretrained.load(asset("minilm-l6"))
    pretrained.save(tmp_path / "copy", loaded.model, loaded.params)
    again = tree.flatten(pretrained.load(tmp_path / "copy").params)
    for path, leaf in tree.flatten(loaded.params).items():
        np.testing.assert_array_equal(leaf, again[path], err_msg=path)
