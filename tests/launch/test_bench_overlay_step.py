"""``steppe bench overlay-step`` on a tiny encoder: the sides begin alike, rows hold ratios."""

import dataclasses
import json
import os
from typing import ClassVar

import pytest
from rich.console import Console

from steppe.launch.bench import harness, overlay_sides, overlay_step
from steppe.launch.bench.overlay_sides import NEUTRAL
from steppe.launch.bench.shapes import TINY, export

pytestmark = pytest.mark.slow
SHORT = harness.Protocol(warmup=0, rounds=2, steps=1)
# Wide enough for the bottlenecks of adapters, which are a share of the width.
SMALL = dataclasses.replace(TINY, width=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(tmp_path_factory.mktemp("bench") / "m", SMALL)


def test_overlays_take_steps_and_the_neutral_ones_begin_as_the_base(folder):
    given = {"directory": str(folder), "batch": 4, "length": 16}
    full = overlay_sides.Steppe("full", **given)
    (first,) = full.losses(1)
    for name in ("lora", "pfeiffer"):  # every overlay has tests of its own
        side = overlay_sides.Steppe(name, **given)
        loss, second = side.losses(2)
        if name in NEUTRAL:
            assert loss == pytest.approx(first, rel=1e-4), name  # pfeiffer begins near it
        assert 0 < second < 5
        assert side.trained() < full.trained() / 2, name
        assert side.compiles() == 1


@pytest.mark.long
@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_peft_begins_at_the_same_loss_and_rows_hold_ratios(tmp_path):
    pytest.importorskip("peft")
    config = overlay_step.OverlayStepBench(
        shapes=TINY,
        batch=4,
        length=16,
        protocol=SHORT,
        overlays=("ia3",),
        threads=1,
        out=tmp_path / "r.json",
    )
    result = overlay_step.run(config, lambda line: None)
    assert list(result["rows"]) == ["full", "torch full", "ia3", "peft ia3"]
    row = result["rows"]["peft ia3"]
    assert row["against"] == "ia3"
    pairs = [a / b for a, b in zip(row["seconds"], row["base_seconds"], strict=True)]
    assert row["ratio"]["low"] == min(pairs)
    # (IA)^3 and its head are of the same size on both sides.
    assert row["trained"] == result["rows"]["ia3"]["trained"]
    assert json.loads((tmp_path / "r.json").read_text()) == result
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(overlay_step.table(result))
    console.file.close()
    assert "peft ia3" in console.export_text()


class Given:
    """A side whose steps take as long as its name says."""

    SECONDS: ClassVar = {"full": 4.0, "lpt": 1.0, "prompt": 2.0}

    def __init__(self, target, arguments, **options):
        self.name = arguments["overlay"]

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def call(self, method, *args):
        answers = {"losses": [0.7], "trained": 10, "peak_memory": 2**20}
        return args[0] * self.SECONDS[self.name] if method == "turn" else answers[method]


def test_a_late_prompt_is_measured_against_one_in_front_too(monkeypatch):
    monkeypatch.setattr(overlay_step, "Worker", Given)
    config = overlay_step.OverlayStepBench(
        shapes=TINY, length=16, peer="none", overlays=("lpt", "prompt"), protocol=SHORT
    )
    rows = overlay_step.run(config, lambda line: None)["rows"]
    assert list(rows) == ["full", "lpt", "prompt", "lpt, to prompt"]
    ratios = {name: row["ratio"]["median"] for name, row in rows.items() if "ratio" in row}
    assert ratios == {"lpt": 0.25, "prompt": 0.5, "lpt, to prompt": 0.5}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"overlays": ("lore",)}, "unknown overlay 'lore'; known: full, lora"),
        ({"length": 503}, "length must be at most 502, which leaves room for a prompt of 10"),
        ({"batch": 0}, "batch must be >= 1, got 0"),
    ],
)
def test_settings_out_of_range(given, said):
    with pytest.raises(ValueError, match=said):
        overlay_step.OverlayStepBench(**given)
