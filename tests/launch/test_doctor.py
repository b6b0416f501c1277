"""``steppe doctor``: what is there, what is broken, and that a bad look does not hide the rest."""

import logging

import pytest

from steppe.launch import cli, doctor


def by_name(parts):
    return {look.name: look for part in parts for look in part()}


def test_a_whole_machine_is_fine(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "python" in said
    assert "x cpu" in said
    assert "broken" not in said


def test_what_is_broken_is_said_with_its_cure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "required", lambda: ("jax", "no-such-package"))
    monkeypatch.setattr(doctor, "_writable", lambda folder: False)
    monkeypatch.setenv("STEPPE_CACHE", str(tmp_path / "cache"))
    found = by_name((doctor._packages, doctor._folders, doctor._assets))
    assert found["no-such-package"].state == "broken"
    assert "pip install" in found["no-such-package"].cure
    assert found["packages"].found.startswith("jax ")
    assert found["cache"].state == "broken"
    assert "STEPPE_CACHE" in found["cache"].cure
    assert "minilm-l6" in found["assets absent"].found
    assert "fetch minilm-l6 vader" in found["assets absent"].cure
    assert cli.main(["doctor"]) == 1
    assert "broken: no-such-package, cache, here" in capsys.readouterr().out


def test_what_packages_log_while_they_are_imported_is_not_shown(monkeypatch, tmp_path, caplog):
    (tmp_path / "loud_package.py").write_text(
        "import logging\nlogging.getLogger(__name__).warning('a framework was not found')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    doctor._import("loud_package")
    logging.getLogger("loud_package").warning("later")
    assert [record.message for record in caplog.records] == ["later"]


def test_a_look_that_fails_is_a_line_and_the_others_go_on(monkeypatch):
    def fails():
        raise RuntimeError("no such luck")
        yield

    monkeypatch.setattr(doctor, "_devices", fails)
    found = {look.name: look for look in doctor.looks()}
    assert found["fails"].state == "broken"
    assert "no such luck" in found["fails"].found
    assert "cores and memory" in found


def test_settings_that_slow_everything_down(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_JIT", "1")
    found = by_name((doctor._environment,))
    assert found["JAX_DISABLE_JIT"].state == "note"
    assert "fake devices" in found["XLA_FLAGS"].cure or "not optimised" in found["XLA_FLAGS"].cure


@pytest.mark.parametrize(("args", "status"), [(["-h"], 0), (["--all"], 2)])
def test_options(args, status):
    assert cli.main(["doctor", *args]) == status
