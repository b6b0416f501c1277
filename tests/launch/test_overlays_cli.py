"""``steppe finetune --overlay`` and ``steppe overlays list``: what is trained is what is evaluated
again, on its own base alone."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from steppe.launch import cli, overlays
from steppe.models import pretrained, tree
from steppe.models.overlays import adapter, bank, bitfit, compose, files, lora, prefix

pytestmark = pytest.mark.slow
QUICK = ["--batch-size=16", "--no-baselines", "--epochs=1", "--optim.learning-rate=1e-2"]


def finetune(reviews, out, *options, model=None):
    words = ["finetune", f"--model={model or reviews.model}", f"--data.source={reviews.a}"]
    words += ["--data.max-length=12", "--data.buckets=12", *QUICK, f"--out={out}"]
    return cli.main([*words, *options])


@pytest.fixture(scope="module")
def runs(reviews, tmp_path_factory):
    """One run with overlays that cannot be merged, one with those that can."""
    root = tmp_path_factory.mktemp("overlays")
    base = shutil.copytree(reviews.model, root / "base")
    first = ["--overlay", "prefix:length=2,hidden=3", "prompt:length=2", "houlsby:width=4"]
    assert finetune(reviews, root / "kept", *first, model=base) == 0
    assert finetune(reviews, root / "merged", "--overlay", "ia3", "lora:rank=2", "bitfit") == 0
    return root, base


def scores(run, tmp_path, capsys=None):
    out = tmp_path / "said.json"
    assert cli.main(["evaluate", str(run), f"--out={out}"]) == 0
    return json.loads(out.read_text())["metrics"]


def test_what_cannot_be_merged_is_kept_beside_its_base(runs, tmp_path, capsys):
    root, base = runs
    model = root / "kept" / "model"
    assert not (model / "model.safetensors").exists()  # nobody opens it without the overlay
    about = json.loads((model / "overlay.json").read_text())
    assert about["name"] == "prefix+prompt+adapter-houlsby"
    assert about["base"]["name"] == str(Path(base).resolve())
    found = json.loads((root / "kept" / "results.json").read_text())
    assert found["model"]["trainable"] < 0.5 * found["model"]["parameters"]
    again = scores(root / "kept", tmp_path)
    for name in ("accuracy", "loss"):
        assert again[name] == pytest.approx(found["metrics"]["test"][name], rel=1e-5)
    saved = files.load(model)
    trained = {p.split("/")[0] for p in saved.params["base"]}
    assert {"head", "layers"} <= trained  # houlsby trains the norms
    assert set(saved.params["base"]["layers"]) == {"attn_norm", "ffn_norm"}


def test_what_the_base_does_not_hold_is_kept_with_the_delta(reviews, tmp_path):
    """A pooler that was initialised is no part of the base, and trains as the head does."""
    base = shutil.copytree(reviews.model, tmp_path / "base")
    held = load_file(base / "model.safetensors")
    left = {name: leaf for name, leaf in held.items() if "pooler" not in name}
    assert len(left) < len(held)
    save_file(left, base / "model.safetensors", metadata={"format": "pt"})
    run = tmp_path / "run"
    more = ("--overlay", "prefix:length=2", "--seed=1")
    assert finetune(reviews, run, *more, model=base) == 0
    results = json.loads((run / "results.json").read_text())
    delta, pooler, head = 2 * 2 * 2 * 16, 16 * 16 + 16, 2 * 16 + 2
    assert results["model"]["trainable"] == delta + pooler + head
    found = results["metrics"]["test"]
    assert scores(run, tmp_path)["loss"] == pytest.approx(found["loss"], rel=1e-5)
    file = run / "model" / "delta.safetensors"
    kept = load_file(file)
    (name,) = (n for n in kept if "pooler" in n and "kernel" in n)
    del kept[name]
    save_file(kept, file)
    with pytest.raises(
        ValueError, match="lacks base/pooler/dense/kernel, which the base's files do not"
    ):
        overlays.load(run / "model")


def test_what_can_be_merged_is(runs, tmp_path):
    root, _ = runs
    found = json.loads((root / "merged" / "results.json").read_text())
    assert found["model"]["largest_logit_difference_after_merge"] < 1e-4
    assert pretrained.load(root / "merged" / "model").model.config.head is not None
    again = scores(root / "merged", tmp_path)
    assert again["accuracy"] == pytest.approx(found["metrics"]["test"]["accuracy"])


def test_what_is_not_to_be_merged_goes_into_a_bank(reviews, tmp_path, capsys):
    runs = [tmp_path / name for name in "ab"]
    for seed, run in enumerate(runs):
        more = ("--overlay", "lora:rank=2", "--no-merge", f"--seed={seed}")
        assert finetune(reviews, run, *more) == 0
        found = json.loads((run / "results.json").read_text())
        assert "largest_logit_difference_after_merge" not in found["model"]
        again = scores(run, tmp_path)
        assert again["loss"] == pytest.approx(found["metrics"]["test"]["loss"], rel=1e-6)
    assert finetune(reviews, runs[1], *more[:-2], "--seed=1", "--resume") == 2
    assert "exported its model with merge=False, now it is True" in capsys.readouterr().err
    assert finetune(reviews, tmp_path / "c", "--no-merge") == 2
    assert "merge=False keeps the delta of an overlay" in capsys.readouterr().err
    both = bank.load([run / "model" for run in runs])
    alone = [overlays.load(run / "model") for run in runs]
    stacked = both.params["overlay"]["layers"]
    for name, pair in stacked.items():
        for number, one in enumerate(alone):
            np.testing.assert_array_equal(
                pair["b"][number], one.params["overlay"]["layers"][name]["b"]
            )


def test_overlays_that_need_more_than_sites(reviews, tmp_path):
    """A prompt between two layers, one that is made of each text, and leaves that never train."""
    for text in (
        "lpt:layer=1,length=2,kind=appg,bottleneck=4",
        "idpg:length=2,bottleneck=4,n=2",
        "mp2:length=2,modules=2,intrinsic=4,ids=5/6",
        "added-prompt:length=2,ids=5/6",
    ):
        run = tmp_path / text[:3]
        assert finetune(reviews, run, "--overlay", text) == 0
        found = json.loads((run / "results.json").read_text())["metrics"]["test"]
        assert scores(run, tmp_path)["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_a_head_is_fitted_on_prefixes_of_other_runs(reviews, prefix_run, tmp_path):
    """What stands below the head is fixed, so that features of it are computed once."""
    run = tmp_path / "target"
    way = f"prefix-fixed:folders={prefix_run}"
    assert finetune(reviews, run, "--probe", "--overlay", way) == 0
    saved, source = files.load(run / "model"), files.load(prefix_run / "model")
    assert sorted(saved.params["base"]) == ["head"]
    kept, learnt = (tree.flatten(one.params["overlay"]) for one in (saved, source))
    for path in learnt:
        np.testing.assert_array_equal(kept[path], learnt[path])
    found = json.loads((run / "results.json").read_text())
    width, classes = saved.params["base"]["head"]["out"]["kernel"].shape
    assert found["model"]["trainable"] == (width + 1) * classes
    # A fitted head: the few steps of the source have 40%.
    assert found["metrics"]["test"]["accuracy"] > 0.8
    # The features of this random model hardly differ, so that the fitted kernel is 1e5 and its
    # sums cancel in float32.
    again, said = scores(run, tmp_path), found["metrics"]["test"]
    assert again["accuracy"] == said["accuracy"]
    assert again["loss"] == pytest.approx(said["loss"], rel=0.02)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"overlay/layers/attn.qq/a": (2, 3)}, "a parameter at 'layers/attn.qq/a' that prefix"),
        ({"overlay/layers/attn.kv_prefix/v": None}, "a parameter at 'layers/attn.kv_prefix/v'"),
        ({"overlay/layers/attn.kv_prefix/k": (2, 4, 8)}, "shape mismatch at 'layers/attn.kv_pre"),
        ({"base/head/xx/kernel": (2, 2)}, "no parameter at 'head/xx/kernel'"),
        ({"base/head/out/bias": None}, "lacks base/head/out/bias, which trains with the overlay"),
        ({"base/head/out/bias": (1,)}, "base/head/out/bias: the file has (1,), the base (2,)"),
        ({"base/layers/attn/q/bias": (2, 16)}, "base/layers/attn/q/bias, which does not train"),
        ({"overlay/layers/attn.kv_prefix/k": np.int32}, "is of int32, no floating-point type"),
        ({"base/head/out/bias": np.nan}, "base/head/out/bias holds numbers that are not finite"),
        ({"optimiser/count": (2,)}, "'optimiser', which is neither of the delta nor the base"),
        ({"settings": {"lenght": 2}}, "unexpected keyword argument 'lenght'"),
        ({"settings": {"length": 2.5}}, "'prefix' has length=2.5, which must be a whole number"),
        ({"settings": {"attentions": [1]}}, "attentions=[1], which must be a list of names"),
        ({"name": "prefix+lora", "settings": {"prefix": 3}}, "settings of 'prefix' in"),
        ({"name": "prefixx"}, "no overlay is called 'prefixx'"),
    ],
)
def test_a_file_that_is_not_what_it_says(prefix_run, tmp_path, change, said, capsys):
    from safetensors.numpy import load_file, save_file

    run = shutil.copytree(prefix_run, tmp_path / "run")
    delta, about = run / "model" / files.DELTA, run / "model" / files.ABOUT
    leaves, settings = load_file(delta), json.loads(about.read_text())
    for name, shape in change.items():
        if name in ("settings", "name"):
            settings[name] = shape
        elif shape is None:
            del leaves[name]
        elif shape is np.int32:
            leaves[name] = leaves[name].astype(shape)
        elif shape is np.nan:
            leaves[name] = np.full_like(leaves[name], shape)
        else:
            leaves[name] = np.zeros(shape, np.float32)
    save_file(leaves, delta)
    about.write_text(json.dumps(settings))
    assert cli.main(["evaluate", str(run)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert said in message
    assert f"{delta} is not what overlay.json beside it describes" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": {}}, "its base has no 'name'"),
        ({"base": {"name": "x"}}, "its base has no 'hash'"),
        ({"base": []}, "has no attribute 'items'"),
        ({"notes": {"head": {"kynd": 1}}}, "notes.head is {'kynd': 1}"),
        ({"notes": {"head": "classification"}}, "notes.head is 'classification'"),
        ({"notes": {"head": {"kind": "classification", "num_labels": 2.5}}}, "a whole number"),
        ({"notes": {"head": {"kind": "token", "transform": ["x"]}}}, "notes.head is"),
        ({"notes": {"head": {"kind": "token", "drop": "much"}}}, "notes.head is"),
        ({"notes": {"head": {"kind": "classification"}, "labels": 5}}, "notes.labels is 5"),
        ({"notes": {"head": {"kind": "classification"}, "labels": ["a"]}}, "names 1 classes"),
    ],
)
def test_a_damaged_overlay_json_is_named(prefix_run, tmp_path, change, said):
    model = shutil.copytree(prefix_run / "model", tmp_path / "model")
    about = model / files.ABOUT
    about.write_text(json.dumps({**json.loads(about.read_text()), **change}))
    with pytest.raises(ValueError, match=re.escape(said)) as found:
        overlays.load(model)
    assert str(found.value).startswith(f"{about} is damaged")


def test_norms_and_biases_of_the_base_are_missed(runs, reviews, tmp_path):
    """What trains of the base beside houlsby adapters, and beside BitFit."""
    from safetensors.numpy import load_file, save_file

    root, base = runs
    loaded = pretrained.load(base)
    biases = bitfit.overlay().bind(loaded.model)
    params = {"base": loaded.params}
    live, _ = tree.split(params, biases.trainable)
    overlays.save(
        tmp_path / "bitfit", bitfit.overlay(), live, base=str(base),
        hashed=overlays.base_hash(loaded.params), model=loaded.model, labels=None,
        tokenizer_dir=None,
    )  # fmt: skip
    shutil.copytree(root / "kept" / "model", tmp_path / "houlsby")
    for name, lost in (
        ("bitfit", "base/layers/attn/q/bias"),
        ("houlsby", "base/layers/attn_norm/scale"),
    ):
        overlays.load(tmp_path / name)
        delta = tmp_path / name / files.DELTA
        leaves = load_file(delta)
        del leaves[lost]
        save_file(leaves, delta)
        with pytest.raises(ValueError, match=f"lacks {lost}, which trains with the overlay"):
            overlays.load(tmp_path / name)


@pytest.fixture(scope="module")
def prefix_run(reviews, tmp_path_factory):
    out = tmp_path_factory.mktemp("prefix") / "run"
    assert finetune(reviews, out, "--overlay", "prefix:length=2") == 0
    return out


def test_another_base_is_refused(runs, tmp_path, capsys):
    root, base = runs
    loaded = pretrained.load(base)
    moved = {**loaded.params, "embed": {**loaded.params["embed"]}}
    table = np.asarray(moved["embed"]["word"]["table"]) + 1.0
    moved["embed"]["word"] = {"table": table}
    kept = shutil.move(base, tmp_path / "kept")
    try:
        pretrained.save(base, loaded.model, moved, tokenizer_dir=kept)
        assert cli.main(["evaluate", str(root / "kept")]) == 2
        message = capsys.readouterr().err
        assert "belongs to other parameters" in message
        assert message.count("\n") == 1
    finally:
        shutil.rmtree(base)
        shutil.move(kept, base)


def test_another_pooler_or_head_of_the_base_is_refused(runs, tmp_path, capsys):
    """Those that its files hold are neither in the delta nor in the hash of the body."""
    root, base = runs
    loaded = pretrained.load(base)
    assert "pooler" in loaded.params
    assert not [path for path in loaded.fresh if path.startswith("pooler")]
    model, kept = root / "kept" / "model", shutil.move(base, tmp_path / "base")
    pooler = jax.tree.map(lambda leaf: leaf + 1.0, loaded.params["pooler"])
    try:
        pretrained.save(base, loaded.model, {**loaded.params, "pooler": pooler}, tokenizer_dir=kept)
        assert cli.main(["evaluate", str(root / "kept")]) == 2
        message = capsys.readouterr().err
        assert "belongs to another head or pooler than that of" in message
        assert message.count("\n") == 1
        # A folder of before, which does not say.
        older = shutil.copytree(model, tmp_path / "older")
        about = json.loads((older / files.ABOUT).read_text())
        assert about["notes"].pop("top")
        (older / files.ABOUT).write_text(json.dumps(about))
        overlays.load(older)
    finally:
        shutil.rmtree(base)
        shutil.move(kept, base)


def test_lengths_of_given_folders_must_be_theirs(prefix_run):
    """The folder's prefix has 2 rows; 10 are what one without folders has."""
    way = f"prefix-fixed:folders={prefix_run}"
    assert dict(overlays.parse([f"{way},lengths=2,attentions=attn"]).settings)["lengths"] == (2,)
    for given, said in (
        ("lengths=10", "lengths=10 are not those of"),
        ("lengths=2/2", "lengths=2/2 are not those of"),
        ("attentions=cross", "attentions=cross are not those of"),
    ):
        with pytest.raises(ValueError, match=said):
            overlays.parse([f"{way},{given}"])
    plain = overlays.rebuilt("prefix-fixed", {"lengths": [10], "attentions": ["attn"]})
    assert overlays.fixed_prefixes().settings == plain.settings


def test_what_is_composed_of_one_overlay_is_opened_again(runs, tmp_path):
    _, base = runs
    loaded = pretrained.load(base)
    one = compose(lora.overlay(rank=2))
    live, _ = tree.split(
        {"base": loaded.params, "overlay": one.init(jax.random.key(0), loaded.params)},
        one.bind(loaded.model).trainable,
    )
    overlays.save(
        tmp_path / "one", one, live, base=str(base), hashed=overlays.base_hash(loaded.params),
        model=loaded.model, labels=None, tokenizer_dir=None,
    )  # fmt: skip
    again = overlays.load(tmp_path / "one").params["overlay"]
    jax.tree.map(np.testing.assert_array_equal, again, live["overlay"])


def test_names_settings_and_back():
    made = overlays.parse(["prefix:length=3", "lora:rank=4,alpha=2,sites=attn.q/attn.o", "lora"])
    wanted = compose(
        prefix.overlay(length=3),
        lora.overlay(rank=4, alpha=2.0, sites=("attn.q", "attn.o")),
        lora.overlay(),
    )
    assert made.name == wanted.name == "prefix+lora+lora-2"
    assert made.settings == wanted.settings
    again = overlays.rebuilt(made.name, json.loads(json.dumps(files.settings_of(made))))
    assert again.settings == made.settings
    for name in overlays.KNOWN:
        if name == "prefix-fixed":  # it needs the folders of other runs
            continue
        one = overlays.parse([name])
        plain = json.loads(json.dumps(files.settings_of(one) or {}))
        assert overlays.rebuilt(one.name, plain).settings == one.settings
    parallel = overlays.parse(["parallel:width=4,train-norms=true"])
    assert parallel.settings == adapter.overlay(kind="parallel", width=4, train_norms=True).settings


def test_the_list(capsys):
    assert cli.main(["overlays", "list"]) == 0
    said = capsys.readouterr().out
    for name in overlays.KNOWN:
        assert f"\n{name} " in f"\n{said}"
    assert "rank=8, alpha=16.0, sites=attn.q/attn.v" in said
    assert cli.main(["overlays"]) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["prefixx"], "overlay must be one of lora, "),
        (["prefix:size=3"], "with one of length, attentions, hidden, std"),
        (["prefix:length=2,length=3"], "each once"),
        (["prefix:length=x"], "length='x'"),
        (["lora:rank=99"], "rank must be <= 16"),
        (["prompt:length=16"], "none of the model's 16 positions"),
        (["lora", "--lora.rank=2"], "overlay and lora.rank=2 are both given"),
        (["ia3", "--probe"], "overlay=ia3 has parameters that train"),
        (["lora:rank=3", "--lora.rank=2"], "write --overlay lora:rank=2, or --lora.rank 0"),
        (["lora:alpha=nan"], "alpha must be finite, got nan"),
        (["prefix:std=-1"], "std must be >= 0 and finite"),
        (["houlsby:std=nan"], "std must be >= 0 and finite"),
        (["parallel:scale=inf"], "scale must be finite"),
        (["prefix-fixed"], "prefix-fixed needs folders=RUN+RUN"),
        (["prefix-fixed:folders=nowhere"], "nowhere holds no overlay"),
        (["mp2"], "ids must be of the vocabulary of"),
        (["idpg:n=3"], "n=3 must divide the feature of 16"),
        (["lpt:layer=9"], "layer must be in 0.."),
        (["mp2:tasks=2,length=2,modules=2,intrinsic=4,ids=5/6"], "task"),
        (
            ["idpg:feature=batch,width=4,mode=first,n=2,bottleneck=4,length=2"],
            "the batch must hold",
        ),
        (["prompt:length=6"], "positions"),
    ],
)
def test_mistakes(options, said, reviews, tmp_path, capsys):
    assert finetune(reviews, tmp_path / "out", "--overlay", *options) == 2
    message = capsys.readouterr().err
    assert said in message.splitlines()[-1]
    assert not (tmp_path / "out").exists()
