"""``steppe plan``: its numbers are those of real arrays, of XLA and of arithmetic by hand."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from steppe.launch import cli
from steppe.launch.plan import (
    accelerators,
    count,
    hlo,
    memory,
    program,
    propose,
    roofline,
    settings,
    shapes,
    work,
)
from steppe.models import tree
from steppe.train import mesh, step

TINY = {
    "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
L, D, F, V, KV, T = 8, 64, 128, 128, 32, 32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "config.json"
    file.write_text(json.dumps(TINY))
    return str(file)


def plan_of(model, **values):
    return settings.PlanConfig(model=model, **{"length": T, "compute_dtype": "float32", **values})


# What is given --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [("v5p-128", "v5p", 64), ("v5e-16", "v5e", 16), ("h100-8", "h100", 8), ("H200", "h200", 1),
     ("v5litepod-4", "v5e", 4), ("tpu-v6e-256", "v6e", 256), ("b200x4", "b200", 4),
     ("cpu-8", "cpu", 8)],
)  # fmt: skip
def test_accelerators_are_named_as_clouds_name_them(text, name, devices):
    assert accelerators.parse(text) == accelerators.Place(name, devices)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h10-8", "unknown accelerator 'h10' .*did you mean 'h100'"),
        ("v5pp-8", "did you mean 'v5p'"),
        ("v5p-7", "counts TensorCores, and a v5p device has 2: use v5p-8 or v5p-16"),
        ("h100-0", "a number >= 1 of devices"),
        ("h100-many", "a number >= 1 of devices"),
    ],
)
def test_other_accelerators_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        accelerators.parse(text)


def test_shapes_have_the_parameters_of_the_published_models():
    # As the models' pages give them: 6.74 B, 8.03 B, 70.6 B, 124 M, 135 M.
    counts = {
        "llama-7b": 6_738_415_616,
        "llama-8b": 8_030_261_248,
        "llama-70b": 70_553_706_496,
        "gpt2": 124_439_808,
        "smollm2": 134_515_008,
    }
    for name, wanted in counts.items():
        assert tree.count(work.build(settings.PlanConfig(model=name)).params) == wanted, name
    assert set(counts) < set(shapes.SHAPES)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": "lama-70b"}, "unknown model 'lama-70b'; did you mean 'llama-70b'"),
        ({"model": "bert-base", "length": 1024}, "length=1024 is longer than the 512 positions"),
        ({"model": "vit-base", "teacher": "vit-base"}, "a teacher goes with"),
        ({"model": ""}, "no model is named"),
        ({"model": "bert-base", "freeze": (".*",)}, "leaves nothing to train"),
        ({"model": "bert-base", "freeze": ("(",)}, "is no regular expression"),
        ({"model": "bert-base", "probe": True}, "there is no step to plan"),
    ],
)
def test_models_that_do_not_fit_the_settings(values, words):
    with pytest.raises(ValueError, match=words):
        work.build(settings.PlanConfig(**values))


def test_a_mesh_and_rows_that_do_not_fit_the_devices(tiny):
    with pytest.raises(ValueError, match=r"has 6 devices, but cpu-8 has 8"):
        work.mesh_of(plan_of(tiny, on="cpu-8", mesh="data=3,model=2"))
    with pytest.raises(ValueError, match="slices=3 does not divide the 8 devices"):
        plan_of(tiny, on="h100-8", slices=3)
    made = work.build(plan_of(tiny, batch_size=12, microbatches=2))
    with pytest.raises(ValueError, match="batch_size=12 is not divisible by 16"):
        made.rows(mesh.abstract({"data": 8}, made.model.axes))


def test_a_recipe_is_planned_with_its_own_settings():
    from steppe.launch import recipes

    made = settings.of_recipe(recipes.vader_lora())
    assert (made.length, made.batch_size, made.lora.rank) == (64, 32, 8)
    assert work.build(made).kind == "classification"
    from steppe.launch.distill import recipes as distillations

    recipe = dataclasses.replace(distillations.smollm2_cut(), token_chunk=64)
    taught = settings.of_recipe(recipe)
    assert (taught.teacher, taught.layers, taught.token_chunk) == ("asset:smollm2", 4, 64)
    both = work.build(taught).params
    assert tree.count(both["student"]) == 42_472_512
    assert both["teacher"]["layers"]["ffn"]["in"]["kernel"].shape[0] == 30
    assert settings.from_dict(settings.to_dict(made)) == made


# Memory ---------------------------------------------------------------------------------------


def on_first(leaves):
    """Bytes of the shards on the first device."""
    first = jax.devices()[0]
    total = 0
    for leaf in jax.tree.leaves(leaves):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        total += sum(s.data.nbytes for s in leaf.addressable_shards if s.device == first)
    return total


def test_bytes_a_device_are_those_of_the_real_arrays(tiny):
    config = plan_of(tiny, sharpness="fsam", ema=0.9, batch_size=16)
    made = work.build(config)
    axes = {"data": 2, "fsdp": 2, "model": 2}
    far, near = (m(axes, made.model.axes) for m in (mesh.abstract, mesh.plan))
    state = step.init(jax.random.key(0), made.model, made.tx, near, ema=0.9)
    batch = near.batch({k: np.zeros(v.shape, v.dtype) for k, v in made.batch(far).items()})
    held = memory.held(made, far)
    found = dict(held.state)
    assert found["parameters"] == on_first(state.params)
    assert found["ema"] == on_first(state.extra["ema"])
    assert found["batch"] == on_first(batch)
    assert found["step and key"] == on_first((state.step, state.rng))
    moments = {n: s for n, s in found.items() if n.startswith("optimiser")}
    assert sum(moments.values()) == on_first(state.opt_state)
    assert moments["optimiser: mu"] == moments["optimiser: nu"] == found["parameters"]
    assert 0 < moments["optimiser: mask"] < found["parameters"]
    # A second gradient is taken at a displaced copy.
    assert held.ascent == held.gradients == found["parameters"]
    assert held.copies == 0


def test_overlays_and_teachers_have_groups_and_dtypes_of_their_own(tiny):
    config = plan_of(
        tiny, teacher=tiny, lora=settings.config_.LoraConfig(rank=2), compute_dtype="bfloat16",
        frozen_dtype="bfloat16",
    )  # fmt: skip
    made = work.build(config)
    held = memory.held(made, mesh.abstract({"data": 2}, made.model.axes))
    whole = tree.count(work.build(plan_of(tiny)).params)
    assert held.state["frozen parameters"] == held.state["teacher"] == 2 * whole
    adapters = 4 * L * (2 * (D + D) + 2 * (D + KV))
    assert held.state["parameters"] == held.gradients == adapters
    assert (held.copies, held.ascent) == (adapters // 2, 0)


# The program ----------------------------------------------------------------------------------

LOOP = """\
HloModule toy

%body (p: (s32[], bf16[4,8], bf16[10,8,8])) -> (s32[], bf16[4,8], bf16[10,8,8]) {
  %p = (s32[], bf16[4,8]{1,0}, /*index=2*/bf16[10,8,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %w = bf16[10,8,8]{2,1,0} get-tuple-element(%p), index=2
  %zero = s32[] constant(0)
  %one = bf16[1,8,8]{2,1,0} dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,8,8}
  %k = bf16[8,8]{1,0} reshape(%one)
  %full = bf16[8,16]{1,0} all-gather(%k), replica_groups=[2,2]<=[4], dimensions={1}
  %y = bf16[4,16]{1,0} dot(%x, %full), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %half = bf16[4,8]{1,0} slice(%y), slice={[0:4], [0:8]}
  %z = bf16[4,8]{1,0} tanh(%half)
  %step = s32[] constant(1)
  %next = s32[] add(%i, %step)
  ROOT %out = (s32[], bf16[4,8]{1,0}, bf16[10,8,8]{2,1,0}) tuple(%next, %z, %w)
}

%cond (q: (s32[], bf16[4,8], bf16[10,8,8])) -> pred[] {
  %q = (s32[], bf16[4,8]{1,0}, bf16[10,8,8]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %bound = s32[] constant(10)
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

ENTRY %main (x0: bf16[4,8], w0: bf16[10,8,8]) -> f32[8] {
  %x0 = bf16[4,8]{1,0} parameter(0)
  %w0 = bf16[10,8,8]{2,1,0} parameter(1)
  %start = s32[] constant(0)
  %init = (s32[], bf16[4,8]{1,0}, bf16[10,8,8]{2,1,0}) tuple(%start, %x0, %w0)
  %loop = (s32[], bf16[4,8]{1,0}, bf16[10,8,8]{2,1,0}) while(%init), condition=%cond, body=%body
  %last = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
  %wide = f32[4,8]{1,0} convert(%last)
  %nil = f32[] constant(0)
  %r = f32[8]{0} reduce(%wide, %nil), dimensions={0}, to_apply=%sum
  ROOT %g = f32[8]{0} all-reduce(%r), replica_groups={{0,2},{1,3}}, to_apply=%sum
}
"""


def test_a_loop_counts_as_often_as_it_turns():
    found = count.count(LOOP, {"data": 2, "model": 2})
    assert found.flops == 10 * 2 * 4 * 16 * 8
    assert found.exponentials == 10 * 4 * 8
    assert found.unknown == 0
    gather, reduce = found.collectives
    # Each of two devices sends half of what is gathered; a ring sends a sum twice, halved.
    assert gather == count.Collective("all-gather", ("model",), 2, 8 * 16 * 2 / 2, 10)
    assert reduce == count.Collective("all-reduce", ("data",), 2, 2 * 8 * 4 / 2, 1)
    products = [k for k in found.kernels if k.flops]
    assert products == [count.Kernel(2 * 4 * 16 * 8, 2 * (4 * 8 + 8 * 16 + 4 * 16), "bf16", 10)]
    assert count.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("model",)),
        ("replica_groups=[4,2]<=[8]", ("model",)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=[2,4]<=[2,4]T(0,1)", ("fsdp", "model")),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "fsdp")),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("data",)),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}",
            ("model",),
        ),
        ("replica_groups={}", ("data", "fsdp", "model")),
        ("source_target_pairs={{0,2},{2,0},{1,3},{3,1}}", ("fsdp",)),
    ],
)
def test_the_axes_of_a_collective_in_every_spelling(groups, axes):
    one = hlo.Instruction("g", "all-gather", (), (), f", {groups}, dimensions={{0}}", False)
    assert hlo.axes_of(one, {"data": 2, "fsdp": 2, "model": 2}) == axes


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("HloModule nothing\n")


@pytest.fixture(scope="module")
def counted(tiny):
    """A step of eight layers in a loop on eight devices, as another process counts it."""
    config = plan_of(tiny, batch_size=16, on="cpu-8")
    return config, program.counted(config, {"data": 2, "fsdp": 2, "model": 2})


def test_flops_are_those_that_xla_counts(tmp_path):
    """XLA's own count takes a loop's body once, so that this step has its layers written out."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY | {"num_hidden_layers": 2}))
    made = work.build(plan_of(str(file), batch_size=16))
    plan = mesh.plan({"data": 1}, made.model.axes, devices=jax.devices()[:1])
    lowered = made.step(plan).lower(made.state(plan), made.batch(plan))
    wanted = lowered.compile().cost_analysis()["flops"]
    found = count.count(lowered.as_text("hlo"), {"data": 1})
    assert found.flops > 0.8 * wanted
    # Elementwise arithmetic too, some of which XLA has simplified away by then.
    assert found.flops + found.elementwise == pytest.approx(wanted, rel=0.1)


def test_products_are_counted_through_loops_as_by_hand(counted):
    _, found = counted
    # Forward and backward, and the scores of attention again for the latter; a quarter of the
    # rows and half of every matrix on each device.
    tokens = 16 * T // 4
    layer = 2 * tokens * (2 * D * D + 2 * D * KV + 3 * D * F) / 2
    attention = 4 * tokens * T * D / 2
    head = 2 * tokens * D * V / 2
    assert found.flops == pytest.approx(L * (3 * layer + 3.5 * attention) + 3 * head, rel=0.02)


def test_collectives_are_those_that_fsdp_and_tensor_parallelism_take(counted):
    _, found = counted
    sent = {}
    for one in found.collectives:
        key = one.kind, one.axes
        sent[key] = sent.get(key, 0) + one.sent * one.times
    matrices = L * (2 * D * D + 2 * D * KV + 3 * D * F)
    # Every matrix is gathered forward and backward over fsdp, its part along model only; half
    # of it is sent by each of two devices.
    gathered = 2 * matrices / 2 * 4 / 2
    assert sent["all-gather", ("fsdp",)] == pytest.approx(gathered, rel=0.15)
    # Sums of hidden states over model: two a layer forward, at least two backward.
    hidden = 16 * T // 4 * D * 4
    assert sent["all-reduce", ("model",)] >= L * 4 * hidden
    over_data = sum(s for (_, axes), s in sent.items() if set(axes) <= {"data", "fsdp"})
    assert over_data > sent["all-gather", ("fsdp",)] + matrices / 2 * 4 / 2
    assert found.unknown == 0


def test_memory_in_the_step_is_what_layers_keep_and_more(counted):
    _, found = counted
    tokens, half = 16 * T // 4, 2
    # Outputs of the projections, and the hidden state that enters a layer.
    projections = (D + 2 * KV + 2 * F) // half + 2 * D
    assert found.memory["saved by layers"] == pytest.approx(
        4 * L * tokens * (projections + D), rel=0.3
    )


# In a process of its own: what other tests held before would count as its memory.
_PLANS_70B = """
import json, re, resource, sys
import jax
from steppe.launch.plan import command, settings

found = command.report(settings.PlanConfig(model="llama-70b", on="v5p-128", length=4096))
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
partitioner = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
found["KiB"] = [int(peak[1]), partitioner]
found["arrays"] = sum(a.nbytes for a in jax.live_arrays())
json.dump(found, sys.stdout, default=str)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc to read the peak in")
def test_a_70b_configuration_is_planned_without_its_arrays():
    ran = subprocess.run(
        [sys.executable, "-c", _PLANS_70B], capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["arrays"] < 2**20
    # Neither in the process nor in the one that partitions the program.
    assert max(found["KiB"]) < 3 * 2**20
    assert found["parameters"] == 70_553_706_496
    assert found["fits"]
    assert math.prod(found["mesh"].values()) == found["devices"] == 64
    # 6 N a token, and attention; a device's share of them is what it computes.
    tokens = found["rows"] * 4096
    assert found["model_flops"] * 64 == pytest.approx(6 * 70e9 * tokens, rel=0.15)
    assert found["flops"] == pytest.approx(found["model_flops"], rel=0.1)
    assert found["times"]["step"] >= found["model_flops"] / 459e12


# Time and meshes ------------------------------------------------------------------------------

FAST = accelerators.Accelerator("fast", 100.0, 50.0, 1e3, 10.0, 4.0, 1.0, 4, hop=0.0)


def test_a_roofline_by_hand():
    kernels = [
        count.Kernel(400.0, 10.0, "bf16", 2),  # 4 s each at the peak
        count.Kernel(0.0, 30.0, "f32", 1),  # 3 s of memory
        count.Kernel(100.0, 1.0, "f32", 1),  # 2 s at the lower peak
    ]
    collectives = [
        count.Collective("all-gather", ("fsdp",), 2, 8.0, 3),  # 2 s each inside a domain
        count.Collective("all-reduce", ("model",), 2, 4.0, 1),  # 1 s
    ]
    made = count.Counts(kernels, collectives, flops=900.0)
    found = roofline.times(made, FAST, {"fsdp": 2, "model": 2})
    assert found.compute == 13.0
    assert (found.overlapped, found.exposed) == (6.0, 1.0)
    assert found.step == 14.0
    assert found.bound == 10 / 13
    assert found.efficiency == 13 / 14
    assert found.intensity == pytest.approx(900 / 51)
    assert made.nbytes == 51.0


def test_what_crosses_domains_takes_the_network():
    sizes = {"data": 2, "fsdp": 4, "model": 2}
    assert roofline.parts(("model",), sizes, 4) == (2, 1)
    assert roofline.parts(("fsdp",), sizes, 4) == (2, 2)
    assert roofline.parts(("data",), sizes, 8) == (1, 2)
    one = count.Collective("all-gather", ("fsdp",), 4, 8.0, 1)
    # 8 by the links, then half of it, what the two of a domain share, by the network.
    assert roofline.duration(one, FAST, sizes) == 8 / 4 + 8 / 2 / 1
    assert roofline.duration(one, FAST, {"fsdp": 4}) == 2.0
    assert roofline.duration(one, FAST, {"fsdp": 4}, slices=2) == 8 / 4 + 8 / 2 / 1


def test_hops_go_around_a_torus_or_down_a_tree():
    v5p, h100 = accelerators.ACCELERATORS["v5p"], accelerators.ACCELERATORS["h100"]
    assert [v5p.steps(n) for n in (8, 64, 512)] == [3, 9, 21]
    assert [h100.steps(n) for n in (2, 8, 512)] == [1, 3, 9]
    small = count.Collective("all-reduce", ("data",), 64, 0.0, 1)
    assert roofline.duration(small, v5p, {"data": 64}) == pytest.approx(2 * 9e-6)


def test_what_nobody_waits_for_is_one_collective():
    one = count.Collective("all-reduce", ("data",), 8, 3.0, 5)
    waited = count.Collective("all-reduce", ("model",), 2, 1.0, 5)
    found = count.combined([one, waited, one, waited])
    assert found == [waited, waited, one._replace(sent=6.0)]


def test_a_mesh_is_proposed_with_the_smallest_model_axis_that_fits(tiny):
    made = work.build(plan_of(tiny, batch_size=16))
    roomy = dataclasses.replace(FAST, memory=1e9, domain=8)
    assert propose.propose(made, roomy, 8).mesh == {"data": 8}
    state = {
        axis: propose.needed(made, {axis: 8} if axis != "model" else {"fsdp": 4, "model": 2})
        for axis in ("data", "fsdp", "model")
    }
    assert state["fsdp"] < state["data"]
    tight = dataclasses.replace(roomy, memory=1.001 * state["fsdp"] / memory.USABLE)
    found = propose.propose(made, tight, 8)
    assert found.mesh["fsdp"] > 1
    assert "model" not in found.mesh
    assert "fsdp is as small as the state allows" in " ".join(found.why)
    two = propose.propose(made, roomy, 8, slices=2)
    assert two.mesh["data"] % 2 == 0
    small = dataclasses.replace(roomy, memory=1e5)
    with pytest.raises(
        ValueError, match=r"does not fit 8 devices of fast: even mesh .* try|or "
    ) as e:
        propose.propose(made, small, 8)
    for word in ("remat=full", "microbatches=2", "compute_dtype=bfloat16", "lora.rank=8"):
        assert word in str(e.value)


# The command ----------------------------------------------------------------------------------


def run(*args):
    return cli.main(["plan", *args])


def test_the_command_prints_a_table_or_json(tiny, capsys):
    options = ("--length", "32", "--no-compiled")
    assert run(tiny, "--on", "v5e-8", *options) == 0
    out = capsys.readouterr().out
    for word in ("8 devices of v5e, mesh data=8", "optimiser: mu", "usable", "fits: "):
        assert word in out, word
    assert run(tiny, "--on", "v5e-8", "--mesh", "fsdp=4,model=2", "--json", *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == {"fsdp": 4, "model": 2}
    assert found["fits"]
    assert found["total"] == sum(found["state"].values()) + sum(
        found[n] for n in ("gradients", "ascent_copy", "compute_copies", "activations_estimated")
    )


def test_the_command_says_what_to_change_where_a_given_mesh_does_not_fit(capsys):
    args = ("--on", "v5e-64", "--mesh", "data=64", "--no-compiled", "--length", "512")
    assert run("llama-7b", *args) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "does not fit" in out
    assert "GiB a device too much: try mesh" in out
    assert "remat=full" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("llama-70b", "--on", "h10-8"), "did you mean 'h100'"),
        (("llama-70b", "--on", "v5e-8", "--no-compiled"), "does not fit 8 devices of v5e"),
        (
            ("gpt2", "--on", "v5e-8", "--mesh", "data=4,model=2"),
            "nearest sizes of the axis 1 or 29",
        ),
        (("llama-7b", "--on", "v5e-8", "--mesh", "data=3"), "mesh 'data=3' has 3 devices"),
        (("lama-7b", "--on", "v5e-8"), "did you mean 'llama-7b'"),
        (("llama-7b", "--on", "v5e-8", "--mesh", "date=8"), "mesh axis 'date'"),
    ],
)
def test_mistakes_end_in_one_line(args, words, capsys):
    assert run(*args) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
