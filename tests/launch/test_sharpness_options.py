"""``steppe finetune --sharpness``: settings, refusals, and runs of every method."""

import functools
import json

import jax
import numpy as np
import pytest

from steppe.launch import cli, config, optimiser, pieces, recipes
from steppe.launch.config import DataConfig, FinetuneConfig
from steppe.models import pretrained, tree
from steppe.train import step
from steppe.train.ascent import Ascent
from steppe.train.cut import at_layer
from steppe.train.objectives import basic as objectives


def arguments(world, out, *more):
    return [
        "finetune",
        f"--model={world.model}",
        f"--data.source={world.a}",
        "--data.max-length=8",
        "--data.buckets",
        "8",
        "--batch-size=16",
        "--optim.learning-rate=1e-2",
        "--steps=2",
        "--no-baselines",
        f"--out={out}",
        *more,
    ]


def base(reviews, **more):
    return FinetuneConfig(
        model=reviews.model,
        data=DataConfig(source=reviews.a, max_length=8, buckets=(8,)),
        batch_size=16,
        steps=1,
        **more,
    )


def test_a_run_with_fsam_can_be_resumed(reviews, tmp_path, capsys):
    run = tmp_path / "run"
    more = ["--sharpness=fsam", "--rho=0.02", "--keep-ratio=0.3", "--refresh-every=2"]
    more += ["--save-every=1", "--log-every=1"]
    assert cli.main(arguments(reviews, run, *more)) == 0
    assert "FSAM on AdamW, rho 0.02, keep_ratio 0.3" in capsys.readouterr().err
    saved = json.loads((run / "config.json").read_text())
    assert (saved["sharpness"], saved["rho"], saved["mask"]) == ("fsam", 0.02, "element")
    report = (run / "report.html").read_text()
    assert "<span>FSAM on AdamW</span>" in report
    assert "2 gradients a step" in report
    # A step goes wrong, the last one is done again: the mask was saved with the rest.
    whole = jax.device_get(pretrained.load(run / "model").params)
    newest = max((run / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    import shutil

    shutil.rmtree(newest)
    (run / "results.json").unlink()
    shutil.rmtree(run / "model")
    assert cli.main(arguments(reviews, run, *more, "--resume")) == 0
    again = jax.device_get(pretrained.load(run / "model").params)
    for path, leaf in tree.flatten(whole).items():
        np.testing.assert_array_equal(leaf, tree.flatten(again)[path], err_msg=path)
    assert cli.main(arguments(reviews, run, *more[:1], "--rho=0.03", "--resume")) == 2
    assert "was 0.02, now it is 0.03" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        ("asam", "--lora.rank=2", "--rho-warmup=0.5"),
        ("sam", "--freeze", "embed.*", "--compute-dtype=bfloat16", "--microbatches=2"),
        pytest.param(
            ("looksam", "--look-every=2", "--mesh=data=4,model=2"), marks=pytest.mark.slow
        ),
        pytest.param(("gsam", "--alpha=0.2", "--ema=0.9"), marks=pytest.mark.slow),
        pytest.param(("esam", "--beta=0.6", "--gamma=0.5"), marks=pytest.mark.slow),
        pytest.param(("sam", "--ascent=8"), marks=pytest.mark.slow),
        pytest.param(
            ("fsam", "--climb=cut:1+bfloat16", "--keep-ratio=0.5"), marks=pytest.mark.slow
        ),
        pytest.param(
            ("fsam", "--mask=1:2", "--exclude", "embed.*", "--fisher=per_sample"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda m: m[0],
)
def test_every_method_goes_with_the_rest(reviews, tmp_path, more):
    run = tmp_path / "run"
    assert cli.main(arguments(reviews, run, f"--sharpness={more[0]}", *more[1:])) == 0
    found = json.loads((run / "results.json").read_text())
    assert np.isfinite(found["metrics"]["test"]["loss"])


def test_a_dry_run_says_what_it_costs(reviews, capsys):
    from steppe.launch import dryrun

    plain = dryrun.show(pieces.build(base(reviews)))
    sharp = dryrun.show(pieces.build(base(reviews, sharpness="sam")))
    assert (plain["gradients"], sharp["gradients"]) == (1.0, 2.0)
    assert sharp["model_flops"] == 2 * plain["model_flops"]
    assert 1.6 < sharp["compiler_flops"] / plain["compiler_flops"] < 2.2
    assert "SAM on AdamW, rho 0.01; 2 gradients a step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--ascent=3",), "ascent=3 does not divide the 16 rows of the batch"),
        (("--climb=cut:1", "--freeze", "layers/.*", "(head|pooler)/.*"), "nothing to climb with"),
    ],
)
def test_what_the_step_alone_can_refuse_leaves_nothing_behind(
    reviews, tmp_path, capsys, more, said
):
    run = tmp_path / "run"
    assert cli.main(arguments(reviews, run, "--sharpness=sam", *more)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert said in message
    assert not run.exists()


def test_gradients_that_a_step_takes():
    for settings, wanted in (
        ({"sharpness": "sam", "climb": "fraction:0.5"}, 1.5),
        ({"sharpness": "fsam", "keep_ratio": 0.0}, 1.0),
        ({"sharpness": "looksam", "look_every": 4}, 1.25),
        ({"sharpness": "esam"}, 1.5 + 1 / 3),
        ({"sharpness": "esam", "gamma": 1.0}, 2.0),
        ({"sharpness": "esam", "climb": "fraction:0.25"}, 0.75 + 2 / 3),
    ):
        assert optimiser.gradients(FinetuneConfig(**settings)) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rho": 0.1}, "rho=0.1 is no setting of sharpness='none'"),
        ({"rho_warmup": 0.1}, "rho_warmup=0.1 is no setting of sharpness='none'"),
        ({"sharpness": "sam", "keep_ratio": 0.1}, "it belongs to sharpness fsam"),
        ({"sharpness": "esam", "ascent": "device"}, "sharpness sam or asam or fsam or gsam"),
        ({"sharpness": "sam", "exclude": ("x",)}, "it belongs to sharpness fsam"),
        ({"sharpness": "sam", "rho": -0.1}, "rho must be >= 0 and finite, got -0.1"),
        ({"sharpness": "sam", "rho": float("nan")}, "rho must be >= 0 and finite, got nan"),
        ({"sharpness": "fsam", "keep_ratio": 1.5}, r"keep_ratio must be in \[0, 1\], got 1.5"),
        ({"sharpness": "fsam", "refresh_every": 0}, "refresh_every must be >= 1, got 0"),
        ({"sharpness": "fsam", "mask": "3:2"}, "mask must be element, tensor, layer"),
        ({"sharpness": "sam", "ascent": "row"}, "ascent must be global, device or a number"),
        ({"sharpness": "esam", "gamma": 0.0}, r"gamma must be in \(0, 1\], got 0.0"),
        ({"sharpness": "sam", "rho_warmup": 2.0}, r"rho_warmup must be in \[0, 1\], got 2.0"),
        ({"sharpness": "gsam", "climb": "bfloat16"}, "it belongs to sharpness sam or asam or fsam"),
        ({"sharpness": "sam", "climb": "half"}, "climb must be whole, or of .* got 'half'"),
        ({"sharpness": "sam", "climb": "fraction:0"}, "climb must be whole"),
        ({"sharpness": "sam", "climb": "fraction:nan"}, "climb must be whole"),
        ({"sharpness": "sam", "climb": "cut:1+cut:2"}, "each once and joined by"),
        (
            {"sharpness": "sam", "climb": "cut:1", "ascent": "device"},
            "ascent='device' lets groups of rows climb by themselves",
        ),
        ({"sharpness": "sam", "probe": True}, "goes with sharpness='none' only"),
        ({"sharpness": "flat"}, "sharpness must be one of none, sam"),
    ],
)
def test_mistakes_are_one_sentence(given, said):
    with pytest.raises(ValueError, match=said):
        FinetuneConfig(**given)


@pytest.mark.parametrize(
    ("text", "parts"),
    [("fraction:0.25", {"fraction": 0.25}), ("cut:1+bfloat16", {"dtype": "bfloat16", "layer": 1})],
)
def test_a_cheaper_climb_is_that_of_the_library(reviews, text, parts):
    built = pieces.build(base(reviews, sharpness="sam", rho=0.5, climb=text))
    objective = functools.partial(objectives.for_task, kind="classification")
    layer = parts.pop("layer", None)
    cut = None if layer is None else at_layer(built.model, layer, objective)
    ascent = Ascent(**parts, cut=cut)
    theirs = step.make(objective(built.model), built.tx, built.plan, clip_norm=1.0, ascent=ascent)
    whole = step.make(objective(built.model), built.tx, built.plan, clip_norm=1.0)
    batch = next(iter(built.batches))
    got, wanted, plain = (
        jax.device_get(train(pieces.start(built), batch)[0].params)
        for train in (built.train, theirs, whole)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (got, plain)), strict=True))


def test_a_climb_that_the_network_does_not_allow(reviews):
    with pytest.raises(ValueError, match=r"climb='cut:2': layer must be in 1..1 for 2 layers"):
        pieces.build(base(reviews, sharpness="sam", climb="cut:2"))
    with pytest.raises(ValueError, match="climb='cut:1': the model does not come in parts"):
        pieces.build(base(reviews, sharpness="sam", climb="cut:1", overlay=("prefix:length=2",)))


def test_what_a_climb_costs():
    given = {"sharpness": "sam", "rho": 0.1}
    assert optimiser.gradients(FinetuneConfig(**given, climb="fraction:0.5+bfloat16")) == 1.5
    assert optimiser.gradients(FinetuneConfig(**given)) == 2
    said = optimiser.describe(FinetuneConfig(**given, climb="fraction:0.5"))
    assert said == "SAM on AdamW, rho 0.1, climb fraction:0.5; 1.5 gradients a step"


def test_an_overlay_that_stays_one_is_measured(reviews, tmp_path):
    run = tmp_path / "run"
    assert cli.main(arguments(reviews, run, "--overlay", "prefix:length=2")) == 0
    more = ["--examples=8", "--iterations=3", "--eigenvalues=1", "--probes=0", "--grid=0"]
    assert cli.main(["sharpness", str(run), *more, "--rho=0.1", "--steps=2", "--points=3"]) == 0
    (found,) = json.loads((run / "sharpness.json").read_text())["models"]
    trained = json.loads((run / "results.json").read_text())["model"]["trainable"]
    assert found["parameters"] == trained == 162


def test_an_exclude_that_matches_nothing_is_refused(reviews, tmp_path, capsys):
    more = ("--sharpness=fsam", "--exclude", "no/such/leaf")
    assert cli.main(arguments(reviews, tmp_path / "run", *more)) == 2
    assert "no/such/leaf" in capsys.readouterr().err


@pytest.mark.parametrize("junk", [{"batch_size": "8"}, {"data": 3}, {"rho": []}])
def test_settings_of_another_kind_in_a_file_are_one_sentence(junk, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(junk))
    with pytest.raises(ValueError, match="of another command or version .*; name another folder"):
        config.read(tmp_path)


def test_runs_of_before_can_be_read_and_resumed():
    old = config.to_dict(recipes.vader_movies())
    for name in optimiser.SETTINGS:
        del old[name]
    read = config.from_dict(FinetuneConfig, old)
    assert read == recipes.vader_movies()
    from steppe.launch import finetune

    assert not set(finetune._fixed(read)) & set(optimiser.SETTINGS)


def test_defaults_suit_fine_tuning():
    for method in optimiser.DEFAULTS:
        filled = optimiser.resolved(FinetuneConfig(sharpness=method))
        assert filled.rho is None if method == "none" else 0 < filled.rho <= 0.1
    sam, asam = (optimiser.DEFAULTS[m]["rho"] for m in ("sam", "asam"))
    assert asam == 10 * sam


def test_rho_rises_from_nothing():
    rho = optimiser.warmed(0.1, 0.5, 8)
    np.testing.assert_allclose([rho(t) for t in range(6)], [0, 0.025, 0.05, 0.075, 0.1, 0.1])
    assert optimiser.warmed(0.1, 0.0, 8) == 0.1


@pytest.mark.parametrize(
    ("text", "structure"),
    [
        ("layer", "layer"),
        ("2:4", (2, 4)),
        ("head:12", ("head", 12)),
        ("head:8:2", ("head", 8, 2)),
    ],
)
def test_masks_as_text(text, structure):
    assert optimiser.structure(text) == structure


@pytest.mark.parametrize(
    "text", ["heads", "head", "head:0", "head:x", "head:1:2:3", "0:4", "1:2:3"]
)
def test_other_masks_are_refused(text):
    with pytest.raises(ValueError, match="mask must be"):
        optimiser.structure(text)
