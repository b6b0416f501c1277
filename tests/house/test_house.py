"""The house keeps its own rules: arrows, packages, names, lengths, the index of systems."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("models", "optim", "train", "data", "launch")
MAY_IMPORT = {
    "data": {"data"},
    "models": {"models"},
    "optim": {"optim", "models.tree"},
    "train": {"train", "data", "models", "optim"},
    "launch": set(ROOMS),
}
SOURCES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))
ALL_PYTHON = SOURCES + sorted((ROOT / "tests").rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> list[str]:
    """Modules that a file imports, wherever the statement stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_the_arrows_point_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    for module in imported(path):
        if module.startswith("steppe."):
            target = module.removeprefix("steppe.")
            allowed = MAY_IMPORT[room]
            assert any(target == a or target.startswith(a + ".") for a in allowed), (
                f"{name(path)} imports {module}; {room} may import {sorted(allowed)}"
            )


@pytest.mark.parametrize("path", ALL_PYTHON, ids=name)
def test_no_room_is_imported_without_the_namespace(path):
    bare = [m for m in imported(path) if m.split(".")[0] in ROOMS]
    assert not bare, f"write steppe.{bare[0]}"


@pytest.mark.parametrize("path", ALL_PYTHON, ids=name)
def test_no_file_is_longer_than_500_lines(path):
    assert len(path.read_text("utf-8").splitlines()) <= 500


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_every_module_says_what_it_is(path):
    doc = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert doc, "no module docstring"
    assert "TODO" not in path.read_text("utf-8")


def raised(function: ast.AST) -> list[ast.Raise]:
    """The exceptions that a function makes itself, not in functions inside it."""
    found = []
    for node in ast.iter_child_nodes(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            found.append(node)
        elif not isinstance(node, ast.FunctionDef | ast.Lambda):
            found += raised(node)
    return found


def test_public_functions_say_what_they_do_and_what_they_raise():
    missing = []
    for path in (p for p in SOURCES if p.relative_to(ROOT).parts[0] != "launch"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            doc = ast.get_docstring(node) or ""
            # "See ..." hands over to a protocol's docstring.
            if not doc or (raised(node) and "Raises" not in doc and not doc.startswith("See ")):
                missing.append(f"{name(path)}: {node.name}")
    assert not missing, missing


def test_no_pickle_anywhere():
    for path in SOURCES:
        for module in imported(path):
            assert module.split(".")[0] not in ("pickle", "dill", "cloudpickle", "shelve"), name(
                path
            )


def test_only_the_core_is_imported_eagerly():
    """Importing every room brings in nothing but the core (flax itself brings rich)."""
    code = (
        "import sys, importlib\n"
        f"for room in {ROOMS!r}: importlib.import_module('steppe.' + room)\n"
        "from steppe.train import step, loop, checkpoint\n"
        "heavy = ['torch', 'transformers', 'datasets', 'tensorflow', 'tensorflow_datasets',\n"
        "         'grain', 'tokenizers', 'matplotlib', 'tyro', 'sacrebleu', 'onnx',\n"
        "         'pandas', 'sklearn']\n"
        "print(*[m for m in heavy if m in sys.modules])\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert out.stdout.split() == []


def test_types_are_checked_without_the_extras():
    """``make test`` of a user installs no reference implementation; mypy must not miss one."""
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    extras = whole["project"]["optional-dependencies"]
    optional = {
        re.split(r"[\[><=!~ ]", entry)[0].replace("-", "_")
        for extra, entries in extras.items()
        if extra != "test"
        for entry in entries
    } - {"jax"}
    met = {m.split(".")[0] for path in SOURCES for m in imported(path)} & optional
    assert {"torch", "peft"} <= met
    silenced = {
        m.removesuffix(".*") for o in whole["tool"]["mypy"]["overrides"] for m in o["module"]
    }
    assert met <= silenced


def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]


def test_the_list_of_packages_is_the_tree():
    """A folder that the list lacks works in an editable install and is absent from the wheel."""
    tree = {
        "steppe." + ".".join(p.parent.relative_to(ROOT).parts)
        for room in ROOMS
        for p in (ROOT / room).rglob("__init__.py")
    }
    assert set(pyproject()["packages"]) == tree
    for path in SOURCES:
        assert (path.parent / "__init__.py").exists(), f"{path.parent} has no __init__.py"
    assert pyproject()["package-dir"] == {f"steppe.{room}": room for room in ROOMS}


@pytest.mark.slow
def test_the_wheel_holds_the_tree_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\n")
    for file in filter(None, tracked):  # a copy: building must not litter the checkout
        if (ROOT / file).is_file():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((ROOT / file).read_bytes())
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {n for n in archive.namelist() if ".dist-info/" not in n}
    assert {n for n in held if n.endswith(".py")} == {"steppe/" + name(p) for p in SOURCES}
    for room in ROOMS:
        assert f"steppe/{room}/py.typed" in held
    data = {n for n in held if not n.endswith((".py", "py.typed"))}
    assert all(n.endswith((".json", ".html", ".css")) for n in data), data


def rows() -> list[list[str]]:
    lines = (ROOT / "PAPERS.md").read_text("utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table]
    return [c for c in cells if not set("".join(c)) <= set("-: ")]


def test_papers_rows_are_importable_and_tested():
    header, *body = rows()
    assert header[:4] == ["system", "reference", "file", "function"]
    assert body
    for row in body:
        record = dict(zip(header, row, strict=True))
        for function in re.findall(r"`([\w.]+)`", record["function"]):
            module, _, attribute = function.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), function
        for column in ("file", "test"):
            paths = re.findall(r"`([\w./]+)`", record[column])
            assert paths, f"{record['system']} names no {column}"
            for path in paths:
                assert (ROOT / path).exists(), f"{record['system']}: {path} does not exist"


def test_nothing_names_a_machine_or_a_registry():
    """The project speaks of itself alone (the words are spelt so that this file passes too)."""
    words = ["py" + "pi.org", "python" + "hosted", "npm" + "js.", "deb." + "debian", "/wo" + "rk/"]
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for file in tracked:
        path = ROOT / file
        if path.is_file() and path.suffix not in (".png",):
            text = path.read_text("utf-8", errors="ignore")
            for word in words:
                assert word not in text, f"{file} names {word}"


def test_no_binary_is_tracked():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    banned = (".safetensors", ".onnx", ".gguf", ".npz", ".npy", ".pkl", ".pt", ".bin", ".whl")
    assert not [f for f in tracked if f.endswith(banned)]


def test_the_long_tests_are_there():
    for line in (ROOT / "tests" / "long.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            file, colons, test = line.partition("::")
            file, _, fixture = (file, "", "") if colons else file.partition(" ")
            name = test.partition("[")[0] if colons else fixture
            assert f"def {name}(" in (ROOT / file).read_text("utf-8"), line
