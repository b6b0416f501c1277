"""``--overlay prefix-fixed:folders=A+B``: prefixes of saved runs on the base that is theirs."""

import json

import jax
import numpy as np
import pytest

from steppe.launch import overlays
from steppe.models.encoder import EncoderConfig
from steppe.models.overlays import compose, files, lora, prefix, prefix_fixed

KEY = jax.random.key(0)
CONFIG = EncoderConfig(
    "bert", vocab_size=20, width=8, layers=2, heads=2, ffn_width=16, positions=12, unroll=1
)


@pytest.fixture(scope="module")
def base():
    return jax.jit(CONFIG.build().init)(KEY)


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """A prefix that is saved as a run has it, one that a network makes, and what is none."""
    root = tmp_path_factory.mktemp("prefixes")
    plain, network = prefix.overlay(length=2), prefix.overlay(length=3, hidden=4)
    deltas = [made.init(KEY, base) for made in (plain, network)]
    here = {"base": "a model", "fingerprint": overlays.base_hash(base)}
    files.save(root / "a" / "model", plain, {"overlay": deltas[0]}, **here)
    files.save(root / "b", network, {"overlay": deltas[1]}, **here)
    other = lora.overlay(rank=1)
    files.save(root / "c", other, {"overlay": other.init(KEY, base)}, **here)
    files.save(root / "d", plain, {"overlay": deltas[0]}, base="another", fingerprint="0")
    return root, [deltas[0], prefix.fold(deltas[1])]


def test_the_prefixes_of_runs(runs, base):
    root, wanted = runs
    made = overlays.parse([f"prefix-fixed:folders={root / 'a'}+{root / 'b'}"])
    assert dict(made.settings) == {"lengths": (2, 3), "attentions": ("attn",)}
    delta = made.init(KEY, base)
    stacked = prefix_fixed.stack_prefixes(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), delta, stacked)
    bound = made.bind(CONFIG.build(), frozen=base)
    made_there = jax.jit(bound.init)(KEY)["overlay"]
    jax.tree.map(np.testing.assert_array_equal, made_there, delta)
    again = overlays.rebuilt(made.name, json.loads(json.dumps(files.settings_of(made))))
    assert again.settings == made.settings
    assert again.fixed == made.fixed
    both = compose(made, lora.overlay(rank=1))
    again = overlays.rebuilt(both.name, json.loads(json.dumps(files.settings_of(both))))
    assert again.settings == both.settings


def test_prefixes_of_another_base(runs, base):
    root, _ = runs
    made = overlays.parse([f"prefix-fixed:folders={root / 'a'}"])
    moved = jax.tree.map(lambda a: a + 1, base)
    with pytest.raises(ValueError, match="belong to other parameters than this model's"):
        made.init(KEY, moved)
    for text, said in (
        ("prefix-fixed", r"needs folders=RUN\+RUN"),
        (f"prefix-fixed:folders={root / 'c'}", "c has lora"),
        (f"prefix-fixed:folders={root / 'a'}+{root / 'd'}", "of another base than that of"),
        (f"prefix-fixed:folders={root / 'a'},lengths=7", "lengths=7 are not those of"),
    ):
        with pytest.raises(ValueError, match=said):
            overlays.parse([text])
    with pytest.raises(FileNotFoundError, match="holds no overlay"):
        overlays.parse([f"prefix-fixed:folders={root / 'none'}"])


def test_the_list_names_what_they_are():
    said = overlays.show()
    for name, words in (
        ("idpg", "Instance-dependent prompts"),
        ("lpt", "Late prompt tuning"),
        ("mp2", "Modular prompts"),
        ("plugat", "PlugAT's module"),
        ("prefix-fixed", "Prefixes of several tasks on one frozen network"),
    ):
        assert f"\n{name:16} {words}" in f"\n{said}"
