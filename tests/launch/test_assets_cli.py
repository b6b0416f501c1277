"""``steppe assets``: consent, what is left out of "all", the list, wrong options."""

import re

import pytest

from steppe.data import assets
from steppe.data.assets import cache
from steppe.data.errors import AssetError
from steppe.launch.assets import main


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """A catalogue with a free and an opt-in asset; what fetch_all is asked for, instead of it."""
    file = assets.File("x", "x", 3, "0" * 64)
    package = assets.Package("pip", "x", "1.0", 4_200_000, "0" * 64)
    free = assets.Asset("free", "data", (package,), (file,), "MIT", "a free one")
    asking = assets.Asset(
        "asking", "weights", (package,), (file,), "Own terms", "one [that] asks", notice="Be kind."
    )
    table = {"free": free, "asking": asking}
    monkeypatch.setenv("STEPPE_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cache, "CATALOGUE", table)
    monkeypatch.setattr(cache.get, "__defaults__", (table,))
    calls = []

    def fetch_all(names, progress, accept_licence):
        calls.append((list(names), accept_licence))
        for name in names:
            progress(f"{name}: step [one]")
            yield table[name], tmp_path / name

    monkeypatch.setattr(assets, "fetch_all", fetch_all)
    return calls


def test_all_leaves_out_what_asks_for_consent(fetched, capsys):
    assert main(["fetch", "all"]) == 0
    assert fetched == [(["free"], False)]
    told = capsys.readouterr().err
    assert "left out, since they ask for your consent (--accept-licence): asking" in told
    assert "free: " in told


def test_consent_shows_the_terms_and_reaches_the_fetch(fetched, capsys):
    assert main(["fetch", "asking", "--accept-licence"]) == 0
    assert main(["fetch", "--accept-licence", "all"]) == 0
    assert fetched == [(["asking"], True), (["free", "asking"], True)]
    assert "asking: licence: Own terms. Be kind." in capsys.readouterr().err


def test_without_consent_nothing_is_fetched(fetched, monkeypatch, tmp_path):
    monkeypatch.setattr(assets, "fetch_all", cache.fetch_all)
    with pytest.raises(AssetError, match=r"Own terms\. Be kind\. .*asking --accept-licence"):
        main(["fetch", "asking"])
    assert not list(tmp_path.rglob("x"))


def test_the_list_marks_opt_in_and_shows_size_and_licence(fetched, capsys):
    assert main(["list"]) == 0
    entries = re.split(r"\n(?=\w)", capsys.readouterr().out.strip())
    rows = {entry.split()[0]: entry for entry in entries}
    assert "opt-in" in rows["asking"]
    assert "Own terms" in rows["asking"]
    assert "one [that] asks" in rows["asking"]
    assert "4.2" in rows["free"]
    assert "opt-in" not in rows["free"]
    assert "in the cache" not in rows["free"]


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_the_real_list_is_broken_between_words_alone(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= min(columns, 100)
    words = set(shown.split())
    for asset in assets.list():
        assert {asset.name, *asset.description.split(), *asset.licence.split()} <= words


def test_help_and_wrong_options(fetched, capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--accept-licence" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert main(["fetch", "free", "--accept-license"]) == 2
    assert "unknown option --accept-license" in capsys.readouterr().err
    assert main(["check", "--accept-licence"]) == 2
    assert main(["fetch", "--accept-licence"]) == 2
    assert fetched == []
