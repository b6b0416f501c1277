"""``steppe bench overlays`` on a tiny encoder: the ways agree, and the result says what it is."""

import io
import json

import pytest

from steppe.launch.bench import harness, overlays
from steppe.launch.bench.harness import Protocol
from steppe.launch.bench.shapes import TINY

pytestmark = pytest.mark.slow
SMALL = {"shapes": TINY, "adapters": 4, "rank": 2, "length": 6, "protocol": Protocol(1, 2, 1)}


def test_it_measures_what_agrees(tmp_path):
    out = tmp_path / "result.json"
    result = overlays.run(overlays.OverlaysBench(**SMALL, out=out), lambda line: None)
    assert result["differences"]["separate"] == 0.0
    assert max(result["differences"][name] for name in ("bank", "mapped")) < 1e-5
    assert result["differences"]["base"] > 1e-4
    for name in overlays.PROGRAMS:
        found = result["programs"][name]
        assert len(found["seconds"]) == 2
        assert found["rows_per_s"] == pytest.approx(4 / found["median"])
    assert result["programs"]["separate"]["throughput"]["median"] == 1.0
    assert json.loads(out.read_text())["bench"] == "overlays"
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(overlays.table(result))
    assert "4 LoRAs of rank 2" in console.export_text()


@pytest.mark.parametrize("wrong", [{"bank": 0.1}, {"mapped": 0.1}, {"base": 1e-6}])
def test_what_does_not_agree_is_not_measured(wrong, monkeypatch):
    class Wrong:
        def __init__(self, *args, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def call(self, method, *args):
            assert method == "check"
            return {"bank": 1e-6, "mapped": 1e-6, "separate": 0.0, "base": 0.3, **wrong}

    monkeypatch.setattr(overlays, "Worker", Wrong)
    with pytest.raises(harness.Void, match="differ from those of separate calls"):
        overlays.run(overlays.OverlaysBench(**SMALL), lambda line: None)


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="adapters must be >= 1, got 0"):
        overlays.OverlaysBench(adapters=0)
    with pytest.raises(ValueError, match="length must be <= the 512 positions, got 513"):
        overlays.OverlaysBench(length=513)
