"""The benchmarks: the protocol is followed, unequal sides are void, results hold what they say."""

import json
import os
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

from steppe.launch.bench import (
    cli,
    compile,
    environment,
    finetune,
    harness,
    imports,
    load,
    mfu,
    shapes,
)
from steppe.launch.bench.sides import SIDES, Steppe
from steppe.launch.bench.worker import Worker, WorkerError
from steppe.models import pretrained, tree

SHORT = harness.Protocol(warmup=1, rounds=2, steps=2)


def printed(renderable) -> str:
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(renderable)
    console.file.close()
    return console.export_text()


# -- the protocol


def test_turns_are_interleaved_after_a_warm_up_of_each():
    calls: list[tuple[str, int]] = []

    def turn(name: str, seconds: float) -> harness.Turn:
        def take(steps: int) -> float:
            calls.append((name, steps))
            return seconds * steps

        return take

    a, b = harness.compare(turn("a", 1.0), turn("b", 2.0), harness.Protocol(5, 3, 20))
    assert calls == [("a", 5), ("b", 5)] + [("a", 20), ("b", 20)] * 3
    assert (a, b) == ([1.0] * 3, [2.0] * 3)
    assert harness.ratio(a, b) == (0.5, 0.5, 0.5)


def test_a_turn_waits_for_its_last_result_only():
    now = [0.0]
    waited = []

    def step() -> int:
        now[0] += 1.0
        return int(now[0])

    def sync(result: int) -> None:
        waited.append(result)
        now[0] += 10.0

    assert harness.timed(step, sync, clock=lambda: now[0])(4) == 14.0
    assert waited == [4]


def test_ratio_is_taken_pair_by_pair():
    # The machine slows down by ten between two rounds: no pair notices.
    assert harness.ratio([1.0, 10.0, 1.0], [2.0, 20.0, 2.0]) == (0.5, 0.5, 0.5)
    assert harness.spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


def test_losses_must_agree():
    assert harness.same_losses([1.0, 2.0], [1.0, 2.0001]) == pytest.approx(5e-5, rel=1e-3)
    with pytest.raises(harness.Void, match=r"differ by 5\.00e-02 at step 1 .* is void"):
        harness.same_losses([1.0, 2.0, 3.0], [1.0, 1.9, 3.0])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(harness.Void, match="void"):
            harness.same_losses([1.0, bad, 1.0], [1.0, bad, 1.0])
    with pytest.raises(harness.Void, match="2 and 1 steps"):
        harness.same_losses([1.0, 1.0], [1.0])
    with pytest.raises(harness.Void):
        harness.same_losses([], [])


def test_a_run_that_was_disturbed_on_the_way_says_so():
    """Times of a real run: it began on a quiet machine, and its median favoured one side."""
    disturbed = {"steppe": [0.71, 1.17, 1.37, 1.26, 0.86], "torch": [0.54, 3.0, 3.27, 3.26, 0.52]}
    assert harness.ratio(*disturbed.values()).median < 0.5
    first, second = harness.unsteady(disturbed)
    assert "slowest round of steppe took 1.93 times the fastest" in first
    assert "torch took 6.29 times" in second
    assert "do not quote" in second
    assert harness.unsteady({"a": [1.0, 1.1, 1.2], "b": [3.0]}) == []


@pytest.mark.parametrize(("name", "value"), [("warmup", -1), ("rounds", 0), ("steps", 0)])
def test_bad_protocol(name, value):
    with pytest.raises(ValueError, match=f"{name} must be >= .*, got {value}"):
        harness.Protocol(**{name: value})


def test_the_load_is_said_and_warned_of():
    assert environment.load_lines(0.3) == ["load average 0.30"]
    first, second = environment.load_lines(1.5)
    assert first == "load average 1.50"
    assert second.startswith("warning: above 0.7")


def test_environment_names_versions_hardware_and_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/steppe", "bench", "my file"])
    found = environment.environment()
    assert found["versions"]["jax"] == jax.__version__
    assert found["hardware"]["cores"] >= 1
    assert found["command"] == "steppe bench 'my file'"
    json.dumps(found)


def test_peak_memory_sees_an_allocation():
    before = environment.peak_memory()
    # Far above what the process may have held and given back earlier.
    size = before + 2**26
    block = np.ones(size, np.uint8)
    assert environment.peak_memory() >= size
    del block


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        environment.write_json(tmp_path / "a.json", {"x": object()})
    assert list(tmp_path.iterdir()) == []
    environment.write_json(tmp_path / "b" / "a.json", {"x": 1})
    assert json.loads((tmp_path / "b" / "a.json").read_text()) == {"x": 1}


# -- sides in processes of their own


class Echo:
    """A side that a test can question."""

    def __init__(self, word: str) -> None:
        self.word = word

    def say(self, times: int) -> list[str]:
        print("this goes to stderr, not among the answers")
        return [self.word] * times

    def fail(self) -> None:
        raise ValueError("no such thing")

    def die(self) -> None:
        print("last words", file=sys.stderr, flush=True)
        os._exit(3)

    def cores(self) -> int:
        return environment.cores()

    def flags(self) -> str:
        return os.environ["XLA_FLAGS"]


@pytest.fixture
def echo(monkeypatch):
    """A worker of Echo; the tests' folder must be importable there."""
    folder = os.path.dirname(os.path.abspath(__file__))
    monkeypatch.setenv("PYTHONPATH", folder + os.pathsep + os.environ.get("PYTHONPATH", ""))
    with Worker("test_bench:Echo", {"word": "hm"}, threads=1) as worker:
        yield worker


def test_a_worker_answers_and_survives_an_error(echo):
    assert echo.call("say", 2) == ["hm", "hm"]
    with pytest.raises(WorkerError, match="ValueError: no such thing"):
        echo.call("fail")
    assert echo.call("say", 1) == ["hm"]
    assert echo.call("cores") == 1
    assert "device_count" not in echo.call("flags")


def test_a_dead_worker_is_an_error_with_its_last_words(echo):
    with pytest.raises(WorkerError, match="last words"):
        echo.call("die")


def test_an_unknown_side_is_an_error():
    with pytest.raises(WorkerError, match="ModuleNotFoundError"):
        Worker("steppe.launch.bench.nothing:Side", {})


# -- models and batches


def test_batches_are_the_same_for_everyone_and_padded():
    one, two = (shapes.batches(3, 4, 16, 97, seed=5) for _ in range(2))
    for a, b in zip(one, two):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    lengths = np.concatenate([batch["attention_mask"].sum(1) for batch in one])
    assert lengths.max() == 16
    assert 4 <= lengths.min() < 16
    assert all((b["input_ids"] < 97).all() for b in one)
    assert not (one[0]["input_ids"] * (1 - one[0]["attention_mask"])).any()


def test_export_turns_dropout_off_and_keeps_a_pretrained_body(tmp_path):
    config = shapes.TINY.config()
    model = config.with_head(None).build()
    params = model.init(jax.random.key(3))
    pretrained.save(tmp_path / "base", model, params)
    raw = json.loads((tmp_path / "base" / "config.json").read_text())
    raw |= {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    (tmp_path / "base" / "config.json").write_text(json.dumps(raw))
    out = pretrained.load(shapes.export(tmp_path / "out", tmp_path / "base"))
    assert out.model.config.drop == out.model.config.attn_drop == 0.0
    assert (out.model.config.head.kind, out.model.config.head.drop) == ("classification", 0.0)
    body = tree.flatten(params)
    same = {k: v for k, v in tree.flatten(out.params).items() if not k.startswith("head/")}
    assert same.keys() == body.keys()
    jax.tree.map(np.testing.assert_array_equal, same, body)


# -- whole benchmarks, on the smallest shapes


def tiny(**options) -> finetune.FinetuneBench:
    defaults = {"shapes": shapes.TINY, "batch": 4, "length": 16, "protocol": SHORT}
    return finetune.FinetuneBench(**{**defaults, "learning_rate": 1e-3, **options})


@pytest.mark.long
@pytest.mark.parity
def test_finetune_against_torch(tmp_path):
    pytest.importorskip("torch")
    said: list[str] = []
    result = finetune.run(tiny(layers=(1,), threads=1, out=tmp_path / "r.json"), said.append)
    assert said[0].startswith("load average")
    assert result["loss_difference"] <= 1e-4
    curve = result["sides"]["steppe"]["losses"]
    assert len(curve) == 20
    assert len(set(curve)) == 20
    assert curve != result["sides"]["torch"]["losses"]  # two computations, not one copied
    pairs = [side["seconds"] for side in result["sides"].values()]
    assert result["ratio"]["pairs"] == [a / b for a, b in zip(*pairs)]
    assert result["ratio"]["low"] <= result["ratio"]["median"] <= result["ratio"]["high"]
    assert result["sides"]["steppe"]["programs"] == 1
    assert result["sides"]["steppe"]["compile"] > 0
    assert set(result["compile"]) == {"1"}
    assert json.loads((tmp_path / "r.json").read_text()) == result
    text = printed(finetune.table(result))
    for content in ("steppe", "torch", "batch 4 x 16", "1 threads", "compile by depth: 1 layers"):
        assert content in text


@pytest.mark.long
@pytest.mark.parity
def test_other_hyper_parameters_make_the_comparison_void(tmp_path):
    pytest.importorskip("torch")
    config = tiny()
    folder = shapes.export(tmp_path / "m", config.shapes)
    curves = []
    for name, eps in (("steppe", 1e-8), ("torch", 1e-4)):
        arguments = finetune.arguments(config, folder)
        arguments["optimizer"]["eps"] = eps
        with Worker(SIDES[name], arguments, threads=1) as worker:
            curves.append(worker.call("losses", 20))
    assert curves[0][0] == pytest.approx(curves[1][0], rel=1e-5)  # same tensors, same batch
    with pytest.raises(harness.Void, match="void"):
        harness.same_losses(*curves)


@pytest.mark.long
def test_finetune_alone_from_a_folder(tmp_path):
    folder = shapes.export(tmp_path / "m", shapes.TINY)
    result = finetune.run(tiny(peer="none", model=folder), lambda _: None)
    assert list(result["sides"]) == ["steppe"]
    assert "ratio" not in result
    assert result["config"]["model"] == str(folder)
    expected = tree.count(pretrained.load(folder).params)
    assert result["parameters"] == expected
    assert "torch" not in printed(finetune.table(result))


def test_compile_time_does_not_depend_on_the_time_of_a_step(tmp_path, monkeypatch):
    side = Steppe(str(shapes.export(tmp_path / "m", shapes.TINY)), 4, 16)

    def step(*_):
        raise AssertionError("compiling must not run a step")

    monkeypatch.setattr(side, "_step", step)
    assert side.compile() > 0
    assert side.compiles() == 0


@pytest.mark.long
def test_compile_time_by_depth(tmp_path):
    config = compile.CompileBench(shapes.TINY, (1, 2), 4, 16, rounds=1, out=tmp_path / "r.json")
    result = compile.run(config, lambda _: None)
    assert {name: len(times) for name, times in result["seconds"].items()} == {"1": 1, "2": 1}
    assert all(times[0] > 0 for times in result["seconds"].values())
    assert result["ratio"]["1"]["median"] == 1.0
    assert json.loads((tmp_path / "r.json").read_text()) == result
    assert "to the first" in printed(compile.table(result))


@pytest.mark.slow
def test_load_counts_the_memory_of_a_fresh_process(tmp_path):
    size = shapes.Shapes(vocab_size=30000, width=128, layers=2, heads=2, ffn_width=256)
    result = load.run(load.LoadBench(shapes=size, out=tmp_path / "r.json"), lambda _: None)
    assert result["size"] == 4 * tree.count(size.config().build().abstract())
    # The parameters must have been seen; how much beside them is what a real model measures.
    assert result["ratio"] > 0.8
    assert result["peak"] - result["before"] == pytest.approx(result["ratio"] * result["size"])
    assert "peak above before / size" in printed(load.table(result))


def test_load_of_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a model folder: it has no config.json"):
        load.run(load.LoadBench(model=tmp_path), lambda _: None)


def test_import_time_of_a_module():
    config = imports.ImportBench(module="fractions", base="json", repeats=2)
    result = imports.run(config, lambda _: None)
    assert len(result["module"]["seconds"]) == 2
    assert result["module"]["low"] > 0
    assert "fractions" in printed(imports.table(result))
    with pytest.raises(ValueError, match="cannot import json and then no_such_module"):
        imports.run(imports.ImportBench(module="no_such_module", base="json"), lambda _: None)


def test_mfu_on_the_smallest_shapes():
    config = mfu.MfuBench(
        shapes=shapes.TINY, batch=2, length=16, warmup=1, steps=2, matmul=32, peak=1e12
    )
    said: list[str] = []
    result = mfu.run(config, said.append)
    assert said[0].startswith("load average")
    assert np.isfinite(result["final_loss"])
    rate = result["tokens_per_s"] * result["flops_per_token"]
    assert result["mfu"] == pytest.approx(rate / 1e12)
    assert result["of_ceiling"] == pytest.approx(rate / result["ceiling"])
    assert "of the matmul ceiling" in printed(mfu.table(result))


def test_mfu_without_a_known_peak_says_so():
    config = mfu.MfuBench(
        shapes=shapes.TINY, batch=2, length=16, dtype="float32", warmup=1, steps=1, matmul=0
    )
    said: list[str] = []
    result = mfu.run(config, said.append)
    assert result["mfu"] is None
    assert result["ceiling"] is None
    assert any("no datasheet peak is known for 'cpu'" in line for line in said)
    printed(mfu.table(result))


def test_flops_of_bert_base():
    # 85.05 M parameters in the layers' matrices and biases; matrices alone are 84.93 M.
    assert mfu.flops_per_token(shapes.BERT_BASE, 512) == 6 * 84_934_656 + 12 * 12 * 768 * 512


def test_flops_agree_with_the_compiler(tmp_path):
    """XLA counts the products of a forward and backward pass; ours leaves small terms out."""
    size = shapes.Shapes(vocab_size=64, width=128, layers=2, heads=2, ffn_width=512, positions=64)
    model = size.config(remat="none").build()
    unrolled = 0.0
    batch = shapes.batches(1, 4, 64, 64)[0]
    params = model.init(jax.random.key(0))

    def loss(params, stop):
        inputs = model.parts.embed(params, batch)
        hidden = inputs.hidden
        for layer in range(stop):  # a scan's body is counted once whatever its length
            hidden = model.parts.layers(
                params, inputs._replace(hidden=hidden), start=layer, stop=layer + 1
            )
        return hidden.sum()

    for stop, sign in ((2, 1), (1, -1)):
        grad = jax.jit(jax.grad(loss), static_argnums=1)
        unrolled += sign * grad.lower(params, stop).compile().cost_analysis()["flops"]
    ours = mfu.flops_per_token(size, 64) / size.layers * 4 * 64
    assert unrolled == pytest.approx(ours, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("cpu", None),
    ],
)
def test_datasheet_peaks(kind, peak):
    assert mfu.peak_of(kind) == peak


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny(batch=0), r"batch must be >= 1, got 0"),
        (lambda: tiny(length=99), r"length must be at most shapes.positions = 32, got 99"),
        (lambda: tiny(threads=10**6), r"threads must be between 0 \(all\) and the \d+ cores"),
        (lambda: mfu.MfuBench(steps=0), r"steps must be >= 1, got 0"),
        (lambda: mfu.MfuBench(length=513), r"length must be at most shapes.positions = 512"),
        (lambda: compile.CompileBench(layers=()), r"layers must be one or more depths >= 1"),
        (lambda: compile.CompileBench(rounds=0), r"rounds must be >= 1, got 0"),
        (lambda: imports.ImportBench(repeats=0), r"repeats must be >= 1, got 0"),
    ],
)
def test_bad_settings_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_command_line(tmp_path, capsys):
    out = tmp_path / "r.json"
    options = ["--module", "fractions", "--base", "json", "--repeats", "1", "--out", str(out)]
    assert cli.main(["imports", *options]) == 0
    said = capsys.readouterr().out
    assert said.startswith("load average")
    assert "Import time" in said
    assert json.loads(out.read_text())["config"]["module"] == "fractions"
    assert cli.main([]) == 2
    assert (
        "NAME: finetune, lm-step, generate, compile, load, imports, mfu" in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match=r"unknown benchmark 'nothing' \(known: finetune, "):
        cli.main(["nothing"])


@pytest.mark.parametrize("name", list(cli.BENCHES))
def test_every_benchmark_lists_its_options(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert "--out" in capsys.readouterr().out
