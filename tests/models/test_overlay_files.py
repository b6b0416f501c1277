"""Saved overlays: what comes back is what was saved, and belongs to one base."""

import json

import jax
import numpy as np
import pytest

from steppe.models import tree
from steppe.models.overlays import bitfit, compose, files, lora, prefix, prompt
from steppe.train.checkpoint import fingerprint

from .conftest import TINY


def saved(tmp_path, params, overlay):
    bound = overlay.bind(TINY.build(), frozen=params)
    full = tree.merge(bound.init(jax.random.key(0)), bound.given)
    live, _ = tree.split(full, bound.trainable)
    folder = files.save(tmp_path / "o", overlay, live, base="tiny", fingerprint=fingerprint(params))
    return folder, live


@pytest.mark.parametrize(
    "overlay",
    [
        lora.overlay(rank=2),
        bitfit.overlay(),
        compose(prompt.overlay(length=2), lora.overlay(rank=2), prefix.overlay(length=3)),
    ],
    ids=lambda overlay: overlay.name,
)
def test_there_and_back(tiny, tmp_path, overlay):
    _, params = tiny
    folder, live = saved(tmp_path, params, overlay)
    found = files.load(folder, fingerprint=fingerprint(params))
    assert sorted(tree.paths(found.params)) == sorted(tree.paths(live))
    for path, leaf in tree.flatten(found.params).items():
        np.testing.assert_array_equal(leaf, tree.get(live, path))
    assert found.name == overlay.name
    assert found.base["name"] == "tiny"
    about = json.loads((folder / "overlay.json").read_text())
    assert about["parameters"] == tree.count(live.get("overlay", {}))
    assert found.settings == json.loads(json.dumps(files.settings_of(overlay) or {}))


def test_settings_say_what_an_overlay_was_made_with(tiny, tmp_path):
    overlay = compose(lora.overlay(rank=2), prompt.overlay(length=2, ids=(3, 4)))
    assert files.settings_of(overlay) == {
        "lora": {
            "rank": 2,
            "alpha": 16.0,
            "sites": ["attn.q", "attn.v"],
            "drop": 0.0,
            "rank_stabilised": False,
        },
        "prompt": {"length": 2, "site": "embed", "start": "words", "ids": [3, 4]},
    }


def test_another_base_and_damage(tiny, tmp_path):
    _, params = tiny
    folder, live = saved(tmp_path, params, lora.overlay(rank=2))
    with pytest.raises(ValueError, match=r"overlay of tiny \(hash \w{16}\), not of this base"):
        files.load(folder, fingerprint="0" * 16)
    with pytest.raises(ValueError, match="'overlay' and 'base' alone, got \\['head'\\]"):
        files.save(folder, lora.overlay(), {"head": {}}, base="", fingerprint="")
    (folder / "overlay.json").write_text('{"name": "lora"')
    with pytest.raises(ValueError, match="is damaged"):
        files.load(folder)
    with pytest.raises(FileNotFoundError, match="holds no overlay"):
        files.load(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError):
        files.save(tmp_path / "full", lora.overlay(), live, base="", fingerprint="")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "x"
