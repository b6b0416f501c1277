"""Overlays against the library ``adapters``, with equal tensors, on a small BERT.

It wants another ``transformers`` than the other references (1.3 wants 4.57) and is left out where
it cannot be imported. Beside an environment that has them::

  pip install --target DIR --no-deps adapters==1.3.0 transformers==4.57.6 "huggingface-hub<1" \\
    "tokenizers<0.23" datasets==3.6.0 "dill<0.3.9" "multiprocess<0.70.17" "fsspec<=2025.3.0"
  PYTHONPATH=DIR python -m pytest tests/parity/test_adapters_library.py
"""

import numpy as np
import pytest

from steppe.models import pretrained
from steppe.models.overlays import adapter, compacter, lora, prefix

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
adapters = pytest.importorskip("adapters", exc_type=ImportError)

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

LAYERS, HEADS, WIDTH = 2, 2, 16
SHAPES = {
    "vocab_size": 30,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
IDS = np.random.default_rng(0).integers(1, 30, (3, 7))
MASK = (np.arange(7) < np.array([[7], [4], [5]])).astype(np.int32)
AFTER = {"attn.o": "attention.output.adapters", "ffn.out": "output.adapters"}


def stacked(tensors, name):
    """The leaf of all layers, [L, ...]."""
    return np.stack([tensors[f"encoder.layer.{i}.{name}"] for i in range(LAYERS)])


def bottleneck(tensors, site):
    maps = {"down": "adapter_down.0", "up": "adapter_up"}
    return {
        part: {
            "kernel": stacked(tensors, f"{AFTER[site]}.x.{name}.weight").swapaxes(1, 2),
            "bias": stacked(tensors, f"{AFTER[site]}.x.{name}.bias"),
        }
        for part, name in maps.items()
    }


def phm(tensors, site):
    maps = {"down": "adapter_down.0", "up": "adapter_up"}
    return {
        part: {
            "s": stacked(tensors, f"{AFTER[site]}.x.{name}.W_left")[..., 0],
            "t": stacked(tensors, f"{AFTER[site]}.x.{name}.W_right")[:, :, 0],
            "bias": stacked(tensors, f"{AFTER[site]}.x.{name}.b"),
        }
        for part, name in maps.items()
    }


def pair(tensors, name):
    where = f"attention.self.{name}.loras.x.lora"
    a, b = (stacked(tensors, f"{where}_{n}").swapaxes(1, 2) for n in "AB")
    return {"a": a, "b": b}


def rows(tensors):
    """Keys and values lie in one vector of the first layer: [layer, key or value, head, row, D/H].

    A layer's keys come before its values, as in ``past_key_values``.
    """
    name = "encoder.layer.0.attention.self.prefix_tuning.pool.prefix_tunings.x.self_prefix"
    flat = tensors[f"{name}.control_trans"].reshape(3, 2 * LAYERS, HEADS, WIDTH // HEADS)
    made = flat.transpose(1, 0, 2, 3).reshape(LAYERS, 2, 3, WIDTH)
    return {"k": made[:, 0], "v": made[:, 1]}


ONE, TWO = ("ffn.out",), ("attn.o", "ffn.out")
# name -> (configuration, overlay, tensors -> delta)
OVERLAYS = {
    "pfeiffer": (
        lambda: adapters.SeqBnConfig(reduction_factor=4),
        adapter.overlay(kind="pfeiffer", reduction=4),
        lambda t: {"layers": {site: bottleneck(t, site) for site in ONE}},
    ),
    "houlsby": (
        lambda: adapters.DoubleSeqBnConfig(reduction_factor=4),
        adapter.overlay(kind="houlsby", reduction=4, act="silu"),
        lambda t: {"layers": {site: bottleneck(t, site) for site in TWO}},
    ),
    "parallel": (
        lambda: adapters.ParBnConfig(reduction_factor=4),
        adapter.overlay(kind="parallel", reduction=4),
        lambda t: {"layers": {site: bottleneck(t, site) for site in ONE}},
    ),
    "compacter": (
        lambda: adapters.CompacterConfig(phm_dim=2, reduction_factor=4),
        compacter.overlay(n=2, reduction=4, act="gelu"),
        lambda t: {
            "shared": {"a": t["shared_parameters.x.phm_rule"]},
            "layers": {site: phm(t, site) for site in TWO},
        },
    ),
    "lora": (
        lambda: adapters.LoRAConfig(r=3, alpha=6),
        lora.overlay(rank=3, alpha=6.0),
        lambda t: {"layers": {f"attn.{n[0]}": pair(t, n) for n in ("query", "value")}},
    ),
    "prefix": (
        lambda: adapters.PrefixTuningConfig(flat=True, prefix_length=3),
        prefix.overlay(length=3),
        lambda t: {"layers": {"attn.kv_prefix": rows(t)}},
    ),
}


@pytest.mark.parametrize("name", OVERLAYS)
def test_hidden_states_are_equal(name, tmp_path):
    config, overlay, delta = OVERLAYS[name]
    torch.manual_seed(0)
    peer = transformers.BertModel(transformers.BertConfig(**SHAPES), add_pooling_layer=False)
    peer.save_pretrained(tmp_path)
    adapters.init(peer)
    before = {n for n, _ in peer.named_parameters()}
    peer.add_adapter("x", config=config())
    peer.set_active_adapters("x")
    tensors = {}
    with torch.no_grad():
        for path, leaf in peer.named_parameters():
            if path not in before:
                leaf.copy_(0.5 * torch.randn(leaf.shape))
                tensors[path] = leaf.numpy().copy()
    given = {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)}
    with torch.no_grad():
        wanted = peer.eval()(**given).last_hidden_state.numpy()

    loaded = pretrained.load(tmp_path)
    bound = overlay.bind(loaded.model)
    batch = {"input_ids": IDS, "attention_mask": MASK}
    params = {"base": loaded.params, "overlay": delta(tensors)}
    found = np.asarray(bound.apply(params, batch).hidden)
    seen = MASK.astype(bool)
    np.testing.assert_allclose(found[seen], wanted[seen], atol=2e-5)
    plain = np.asarray(loaded.model.apply(loaded.params, batch).hidden)
    assert np.abs(plain - wanted)[seen].max() > 0.01
