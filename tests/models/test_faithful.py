"""What a family's files cannot hold is refused when saving, and nothing is written."""

import dataclasses

import jax
import pytest

from steppe.models import pretrained
from steppe.models.decoder import DecoderConfig
from steppe.models.heads import HeadConfig

BASE = DecoderConfig(
    "llama",
    vocab_size=40,
    width=16,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=6,
    ffn_width=24,
    positions=64,
    head=HeadConfig("lm", 1, drop=0.0),
)
CANNOT = {
    "a window of llama": ({"window": 3}, "window=3"),
    "a capped llama": ({"softcap": 3.0}, "softcap=3.0"),
    "another scale": ({"query_scale": 0.7}, "query_scale=0.7"),
    "a bias on some": ({"qkv_bias": True}, "out_bias=False"),
    "a pattern of mistral": (
        {"family": "mistral", "window": 3, "windowed": (True, False, True)},
        "windowed",
    ),
    "qwen2 without biases": ({"family": "qwen2"}, "qkv_bias=False"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_a_setting_that_would_be_lost(name, tmp_path):
    changes, message = CANNOT[name]
    model = dataclasses.replace(BASE, **changes).build()
    with pytest.raises(ValueError, match=f"cannot hold {message}"):
        pretrained.save(tmp_path / "m", model, model.init(jax.random.key(0)))
    assert not (tmp_path / "m").exists()


def test_settings_of_training_may_differ(tmp_path):
    model = dataclasses.replace(BASE, drop=0.3, remat="full", unroll=1).build()
    pretrained.save(tmp_path / "m", model, model.init(jax.random.key(0)))
    assert pretrained.load(tmp_path / "m").model.config.head_dim == 6
