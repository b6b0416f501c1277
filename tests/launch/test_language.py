"""Fine-tuning and evaluating language models, seq2seq and vision models from the command line."""

import json
import shutil

import numpy as np
import pytest

from steppe.data.text import Tokenizer
from steppe.launch import cli
from steppe.models import pretrained


def finetune(model, source, task, out, *more):
    return cli.main(
        [
            "finetune",
            f"--model={model}",
            f"--data.source={source}",
            f"--data.task={task}",
            "--data.max-length=24",
            "--data.buckets",
            "24",
            "--batch-size=8",
            "--optim.learning-rate=1e-2",
            "--log-every=1",
            "--samples=4",
            "--sample-tokens=6",
            f"--out={out}",
            *more,
        ]
    )


def results(run):
    return json.loads((run / "results.json").read_text())


def rows(run, kind):
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if row["kind"] == kind]


@pytest.fixture(scope="module")
def lm_run(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("lm") / "run"
    assert finetune(tiny.llama, tiny.texts, "lm", out, "--steps=30", "--save-every=15") == 0
    return out


def test_a_language_model_learns_and_is_compared_with_itself(lm_run):
    found = results(lm_run)
    before, after = found["before"]["test"], found["metrics"]["test"]
    assert after["perplexity"] < 2.5 < before["perplexity"]
    assert before["tokens"] == after["tokens"]
    assert after["bits_per_byte"] == pytest.approx(
        after["loss"] / np.log(2) * after["tokens"] / _bytes(after), rel=1e-5
    )
    assert found["baselines"]["before training"]["perplexity"] == before["perplexity"]
    assert rows(lm_run, "eval")[0]["step"] == 0
    assert "packing" in found["data"]
    assert len(found["samples"]) == 4
    assert set(found["samples"][0]) == {"source", "reference", "before", "after"}
    assert found["task"]["kind"] == "lm"
    page = (lm_run / "report.html").read_text()
    assert "What it writes" in page
    assert "Before and after the training" in page
    predicted = [json.loads(x) for x in (lm_run / "predictions.jsonl").read_text().splitlines()]
    assert {"id", "loss", "text", "tokens_scored"} <= set(predicted[0])


def _bytes(metrics):
    """Bytes of the scored tokens, back from the metric itself being a ratio of sums."""
    return metrics["loss"] * metrics["tokens"] / np.log(2) / metrics["bits_per_byte"]


def test_the_export_is_whole(lm_run):
    loaded = pretrained.load(lm_run / "model")
    assert loaded.fresh == ()
    assert loaded.model.config.head.kind == "lm"
    assert Tokenizer.open(lm_run / "model").chat_template is not None


def test_evaluate_gives_the_same_numbers(lm_run, tmp_path, capsys):
    out = tmp_path / "e.json"
    assert cli.main(["evaluate", str(lm_run), f"--out={out}"]) == 0
    again = json.loads(out.read_text())["metrics"]
    assert again == pytest.approx(results(lm_run)["metrics"]["test"], rel=1e-4)
    assert "perplexity" in capsys.readouterr().out


_THREE = ("--samples=3", "--sample-tokens=8")


def test_evaluate_a_model_folder_on_a_file(tiny, tmp_path):
    out = tmp_path / "e.json"
    given = ["--data.task=lm", f"--data.source={tiny.texts}", "--data.max-length=24"]
    assert cli.main(["evaluate", str(tiny.llama), *given, *_THREE, f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert found["metrics"]["examples"] == 120
    assert len(found["samples"]) == 3


def _steps(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir())


def test_a_packed_run_resumes_where_it_was(tiny, lm_run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(lm_run, copy)
    for name in ("results.json", "report.html", "predictions.jsonl"):
        (copy / name).unlink()
    shutil.rmtree(copy / "checkpoints" / _steps(copy)[-1])
    again = ("--steps=30", "--save-every=15", "--resume")
    assert finetune(tiny.llama, tiny.texts, "lm", copy, *again) == 0
    first, second = (
        {row["step"]: row["loss"] for row in rows(run, "train")} for run in (lm_run, copy)
    )
    assert first == second
    assert results(copy)["before"] == results(lm_run)["before"]
    assert sum(row["step"] == 0 for row in rows(copy, "eval")) == 1


def test_lora_on_chats_trains_the_answers(tiny, tmp_path):
    out = tmp_path / "run"
    lora = ("--lora.rank=4", "--lora.sites", "attn.q", "attn.o", "ffn.gate", "ffn.out")
    assert finetune(tiny.llama, tiny.chats, "chat", out, *lora, "--steps=20") == 0
    found = results(out)
    assert found["metrics"]["test"]["loss"] < found["before"]["test"]["loss"]
    assert {"chrf", "bleu", "exact"} <= set(found["metrics"]["test"])
    assert found["model"]["largest_logit_difference_after_merge"] < 1e-4
    assert found["model"]["trainable"] < 0.3 * found["model"]["parameters"]
    said = found["samples"][0]
    assert "assistant" in said["source"]
    assert len(said["reference"].split()) == 2


def test_seq2seq_is_scored_by_its_texts(tiny, tmp_path):
    out = tmp_path / "run"
    assert finetune(tiny.t5, tiny.pairs, "seq2seq", out, "--steps=40") == 0
    found = results(out)
    before, after = found["before"]["test"], found["metrics"]["test"]
    assert after["chrf"] > before["chrf"] + 10
    assert after["perplexity"] < before["perplexity"]
    assert after["generated"] == 4
    assert found["task"]["kind"] == "seq2seq"
    row = json.loads((out / "predictions.jsonl").read_text().splitlines()[0])
    assert row["label"] == row["text"].replace("a", "b")
    assert "chrf" in (out / "report.html").read_text()
    e = tmp_path / "e.json"
    assert cli.main(["evaluate", str(out), "--samples=4", "--sample-tokens=6", f"--out={e}"]) == 0
    assert json.loads(e.read_text())["metrics"] == pytest.approx(after, rel=1e-4)


def test_lora_and_freezing_of_an_encoder_decoder(tiny, tmp_path):
    out = tmp_path / "lora"
    sites = ("--lora.rank=2", "--lora.sites", "encoder.attn.q", "decoder.cross.v")
    quick = ("--steps=2", "--samples=0")
    assert finetune(tiny.t5, tiny.pairs, "seq2seq", out, *sites, *quick) == 0
    assert results(out)["model"]["largest_logit_difference_after_merge"] < 1e-4
    assert "samples" not in results(out)
    out = tmp_path / "frozen"
    assert finetune(tiny.t5, tiny.pairs, "seq2seq", out, "--freeze", "encoder/.*", *quick) == 0
    was, now = (pretrained.load(f).params for f in (tiny.t5, out / "model"))
    leaf = ("layers", "attn", "q", "kernel")
    for stack, same in (("encoder", True), ("decoder", False)):
        a, b = was[stack], now[stack]
        for key in leaf:
            a, b = a[key], b[key]
        assert np.array_equal(a, b) == same


def test_images(tiny, tmp_path):
    out = tmp_path / "run"
    given = ("--steps=15", "--no-baselines")
    assert finetune(tiny.vit, tiny.images, "image", out, *given) == 0
    assert results(out)["metrics"]["test"]["accuracy"] > 0.9
    loaded = pretrained.load(out / "model")
    assert loaded.labels == ("dark", "light")
    assert loaded.fresh == ()
    e = tmp_path / "e.json"
    assert cli.main(["evaluate", str(out), f"--out={e}"]) == 0
    again = json.loads(e.read_text())["metrics"]
    assert again == pytest.approx(results(out)["metrics"]["test"], abs=1e-5)


def test_a_probe_fits_the_head_alone(tiny, tmp_path):
    out = tmp_path / "run"
    assert finetune(tiny.vit, tiny.images, "image", out, "--probe", "--no-baselines") == 0
    assert results(out)["metrics"]["test"]["accuracy"] > 0.9
    assert results(out)["model"]["trainable"] == 16 * 2 + 2
    was, now = (pretrained.load(f, head=None).params for f in (tiny.vit, out / "model"))
    assert np.array_equal(was["embed"]["patch"]["kernel"], now["embed"]["patch"]["kernel"])


@pytest.mark.parametrize("task", ["lm", "seq2seq", "image"])
def test_a_dry_run_counts_and_writes_nothing(tiny, tmp_path, task, capsys):
    out = tmp_path / "run"
    model, source = {
        "lm": (tiny.llama, tiny.texts),
        "seq2seq": (tiny.t5, tiny.pairs),
        "image": (tiny.vit, tiny.images),
    }[task]
    assert finetune(model, source, task, out, "--dry-run") == 0
    assert not out.exists()
    assert "peak per device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "source", "task", "more", "message"),
    [
        ("llama", "texts", "mlm", (), "needs a model of kind encoder, but"),
        ("llama", "texts", "image", (), "needs a model of kind vision"),
        ("vit", "texts", "lm", (), "needs a model of kind decoder"),
        ("t5", "pairs", "classification", (), "needs a model of kind encoder or decoder"),
        ("vit", "images", "image", ("--data.image-size=10",), "multiple of the model's patch of 4"),
        ("plain", "chats", "chat", (), "has no chat template"),
        ("llama", "texts", "lm", ("--data.max-length=65",), "longer than the model's 64 positions"),
        ("llama", "texts", "lm", ("--probe",), "probe fits classes"),
        ("llama", "texts", "lm", ("--lora.rank=2", "--lora.sites", "attn.x"), "attn.x"),
        ("t5", "pairs", "seq2seq", ("--data.target=answer",), "no column 'answer'"),
        ("llama", "texts", "lm", ("--data.official",), "needs a column 'split'"),
        ("vit", "images", "image", ("--probe", "--ema=0.9"), "neither lora, freeze nor ema"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(tiny, tmp_path, capsys, model, source, task, more, message):
    out = tmp_path / "run"
    model, source = getattr(tiny, model), getattr(tiny, source)
    assert finetune(model, source, task, out, "--steps=1", *more) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert said[-1].startswith("steppe: error: ")
    assert not out.exists()


def test_a_tokenizer_of_another_model(tiny, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny.llama, folder)
    held = json.loads((folder / "tokenizer.json").read_text())
    held["model"]["vocab"] |= {f"more{i}": 100 + i for i in range(9)}
    (folder / "tokenizer.json").write_text(json.dumps(held))
    assert finetune(folder, tiny.texts, "lm", tmp_path / "run", "--steps=1") == 2
    assert "do not belong together" in capsys.readouterr().err


@pytest.mark.parity
def test_transformers_opens_the_export(lm_run):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = lm_run / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer("a b c d")["input_ids"]
    assert ids == Tokenizer.open(folder).encode_batch(["a b c d"])[0]["input_ids"]
    assert tokenizer.chat_template is not None
    loaded = pretrained.load(folder)
    ours = loaded.model.apply(loaded.params, {"input_ids": np.array([ids], np.int32)}).logits
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours), expected, atol=1e-4)
