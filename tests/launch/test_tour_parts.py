"""Parts of ``steppe tour`` that need no model: the graph of stages, the claims, the figures."""

import itertools
import json
import math

import numpy as np
import pytest

from steppe.launch.report import touring_figures as figures
from steppe.launch.tour import claims, graph
from steppe.launch.tour.graph import Done, Graph, Stage
from steppe.launch.tour.rounded import choose
from steppe.launch.tour.settings import TourConfig


def test_other_tasks_have_no_data_elsewhere_unless_it_is_given():
    assert TourConfig().further == ("asset:vader/products", "asset:vader/editorials")
    mine = ("file:a.csv", "file:b.csv")
    assert TourConfig(tasks=mine).further == ()
    assert TourConfig(tasks=mine, elsewhere=("file:c.csv",)).further == ("file:c.csv",)


# The graph -----------------------------------------------------------------------------------


def chain(root, calls, settings=1, fail=""):
    """a -> b -> d, c alone; each writes a file and adds up what it needs."""

    def work(name):
        def inside(folder, needed):
            calls.append(name)
            folder.joinpath("half").write_text(name)
            if name == fail:
                raise RuntimeError("killed")
            return {"value": 1 + sum(done.result["value"] for done in needed.values())}

        return inside

    return Graph(
        root,
        [
            Stage("a", {}, work("a")),
            Stage("x/b", {"s": settings}, work("b"), ("a",)),
            Stage("c", {}, work("c")),
            Stage("d", {}, work("d"), ("x/b", "a"), resumes=True),
        ],
    )


def test_stages_run_once_and_again_where_a_setting_changed(tmp_path):
    calls = []
    found = chain(tmp_path, calls).run()
    assert calls == ["a", "b", "c", "d"]
    assert {name: done.result["value"] for name, done in found.items()} == {
        "a": 1, "x/b": 2, "c": 1, "d": 4
    }  # fmt: skip
    chain(tmp_path, calls).run()
    assert calls == ["a", "b", "c", "d"]
    chain(tmp_path, calls, settings=2).run()
    assert calls[4:] == ["b", "d"]
    chain(tmp_path, calls, settings=1).run()  # nothing that was finished is lost
    assert len(calls) == 6


def test_a_killed_stage_is_not_finished(tmp_path):
    calls = []
    for fail in ("b", "d"):
        with pytest.raises(RuntimeError, match="killed"):
            chain(tmp_path, calls, fail=fail).run()
    assert calls == ["a", "b", "b", "c", "d"]
    made = chain(tmp_path, calls)
    assert [made.state(stage.name) for stage in made.stages] == ["done", "done", "done", "begun"]
    made.folder("d").joinpath("kept").write_text("")
    made.run()
    assert calls[5:] == ["d"]
    assert made.folder("d").joinpath("kept").exists()  # it goes on with what it left
    file = made.folder("x/b") / graph.FILE
    file.write_text(file.read_text()[:-20])
    made.folder("x/b").joinpath("kept").write_text("")
    assert made.state("x/b") == "begun"
    made.run()
    assert calls[6:] == ["b"]
    assert not made.folder("x/b").joinpath("kept").exists()


def test_results_are_those_that_will_be_read(tmp_path):
    made = Graph(tmp_path, [Stage("a", {}, lambda folder, _: {"t": (1, math.nan)})])
    assert made.run()["a"].result == {"t": [1, None]} == made.run()["a"].result
    told = json.loads((made.folder("a") / graph.FILE).read_text())
    assert told["seconds"] >= 0


def test_bad_graphs(tmp_path):
    def nothing(folder, needed):
        return {}

    with pytest.raises(ValueError, match="'b' needs 'a', which is not before it"):
        Graph(tmp_path, [Stage("b", {}, nothing, ("a",)), Stage("a", {}, nothing)])
    with pytest.raises(ValueError, match="two stages are called 'a'"):
        Graph(tmp_path, [Stage("a", {}, nothing), Stage("a", {}, nothing)])


def test_content_is_of_bytes_and_names(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = graph.content(tmp_path / "a")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    second = graph.content(tmp_path / "a")
    (tmp_path / "a" / "y").write_text("2")
    assert len({first, second, graph.content(tmp_path / "a")}) == 3
    assert graph.content(tmp_path / "a" / "y") != graph.content(tmp_path / "a")
    assert graph.digest({"a": 1, "b": (2,)}) == graph.digest({"b": [2], "a": 1})


# The claims ----------------------------------------------------------------------------------


def results(config, tests, flat=(10.0, 5.0), difference=0.0):
    """Finished stages: mean test accuracies by key, one a seed."""
    found = {}

    def add(name, result):
        found[name] = Done(name, None, result, 1.0)

    for n, seed in enumerate(config.seeds):
        for key, values in tests.items():
            scores = {"examples": 200.0, "accuracy": values[n]}
            test = {"one": scores, "two": scores}
            add(f"{seed}/scores/{key}", {"mean": {"test": values[n]}, "test": test})
        add(f"{seed}/choice/optimiser", {"best": f"{seed}/scores/adamw"})
        add(f"{seed}/choice/merge", {"best": f"{seed}/scores/regmean"})
        for key, value in zip(("adamw", "fsam"), flat, strict=True):
            add(f"{seed}/flatness/{key}", {"mean": {"top_eigenvalue": value}})
    one = {"difference": difference, "same": 1.0}
    add(f"{config.seeds[0]}/export", {"student": one, "packed": one})
    return found


TESTS = {
    "adamw": (0.80, 0.80, 0.80),
    "fsam": (0.81, 0.82, 0.83),
    "average": (0.72, 0.72, 0.72),
    "average-other": (0.81, 0.82, 0.825),
    "regmean": (0.78, 0.76, 0.70),
    "concrete-adamerging": (0.70, 0.695, 0.70),
    "student": (0.77, 0.75, 0.69),
    "w8a8-rtn": (0.77, 0.75, 0.69),
    "w8a8-zsaq": (0.77, 0.77, 0.68),
    "w4a8-rtn": (0.70, 0.70, 0.70),
    "w4a8-zsaq": (0.70, 0.70, 0.70),
}


def test_claims_over_seeds():
    config = TourConfig(seeds=(0, 1, 2))
    found = {one["claim"]: one for one in claims.all_of(config, results(config, TESTS))}
    verdicts = {name: claims.verdict(one) for name, one in found.items()}
    assert verdicts == {
        "FSAM helps": "not shown",  # +2 points, but the interval of three seeds has 0 inside
        "FSAM is flatter": "true",
        "flat models merge better": "true",
        "merging keeps": "not shown",  # 97.5%, 95%, 87.5%
        "concrete-adamerging beats averaging": "not true",
        "distilling keeps": "true",
        "ZSAQ beats rounding, W8A8": "not shown",
        "ZSAQ beats rounding, W4A8": "not shown",  # the same numbers: neither above nor below
        "what is written opens with the same answers": "true",
    }
    helps = found["FSAM helps"]
    assert helps["mean"] == pytest.approx(2.0)
    # t of two degrees of freedom at 97.5% times 1 / sqrt(3).
    assert helps["low"] == pytest.approx(2.0 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert helps["said"] == "+2.0 (95% interval -0.5 to +4.5, 3 seeds)"
    assert found["merging keeps"]["said"] == "87.5% to 97.5%; 2 of 3 seeds"
    # 100% of FSAM's and 90% of AdamW's, but for the last seed.
    shares = [10.0, 10.0, 100 * (0.825 / 0.83 - 0.9)]
    assert found["flat models merge better"]["values"] == pytest.approx(shares)


def test_claims_of_one_seed_say_that_it_is_one():
    config = TourConfig()
    one = {key: values[:1] for key, values in TESTS.items()}
    made = claims.all_of(config, results(config, one, flat=(5.0, 10.0), difference=1.0))
    found = {c["claim"]: c for c in made}
    # About sqrt((0.8 * 0.2 + 0.81 * 0.19) / 400) of 400 test texts.
    assert found["FSAM helps"]["said"] == "+1.0, one seed; the test texts alone give ± 2.8"
    assert claims.verdict(found["FSAM helps"]) == "not shown"
    assert claims.verdict(found["flat models merge better"]) == "true"  # +10 points
    # -2 points of 400 texts are no more than chance gives, down as up.
    assert claims.verdict(found["concrete-adamerging beats averaging"]) == "not shown"
    assert found["FSAM is flatter"]["said"] == "2.00 times, one seed"
    assert claims.verdict(found["FSAM is flatter"]) == "not true"
    assert claims.verdict(found["what is written opens with the same answers"]) == "not true"


def test_the_error_of_a_mean_over_tasks_is_not_that_of_all_texts_together():
    """Few texts of one task make the mean uncertain, however many the others have."""
    tasks = {
        "many": {"examples": 200.0, "accuracy": 0.8},
        "few": {"examples": 2.0, "accuracy": 1.0},
    }
    found = claims.standard_error(Done("s", None, {"test": tasks}, 0.0))
    many, few = 161 / 202, 3 / 4
    parts = many * (1 - many) / 200 + few * (1 - few) / 2
    assert found == pytest.approx(100 * math.sqrt(parts) / 2)
    assert found > 15  # all 202 as one would be 2.8
    # By chance: draws of such tests spread as much.
    rng = np.random.default_rng(0)
    draws = [(rng.binomial(200, many) / 200 + rng.binomial(2, few) / 2) / 2 for _ in range(4000)]
    assert 100 * np.std(draws) == pytest.approx(found, rel=0.05)


def test_the_smallest_that_keeps_is_handed_out():
    def scored(**marks):
        return {n: Done(n, None, {"mean": {"valid": v}}, 0.0) for n, v in marks.items()}

    student = scored(s=0.80)["s"]
    sizes = {"big": 20 << 20, "small": 10 << 20, "tiny": 10 << 20}
    assert choose(scored(big=0.81, small=0.79, tiny=0.7), sizes, student)["best"] == "small"
    assert choose(scored(big=0.81, small=0.79, tiny=0.8), sizes, student)["best"] == "tiny"
    found = choose(scored(big=0.7, small=0.6, tiny=0.5), sizes, student)
    assert found["best"] == "big"
    assert not found["within"]


# The figures ---------------------------------------------------------------------------------


def point(number, cost, value):
    return figures.Point(number, f"m{number}", cost, value, "ink")


def test_the_frontier_is_what_nothing_is_better_than():
    points = [point(1, 3, 80), point(2, 1, 70), point(3, 2, 60), point(4, 3, 75), point(5, 2, 72)]
    assert [p.number for p in figures.frontier(points)] == [2, 5, 1]


def test_numbers_beside_dots_do_not_overlap():
    points = [point(n, 90.0, 77.0 + 0.1 * n) for n in range(6)] + [point(9, 10.0, 70.0)]
    x, y = figures.Axis(0, 100, 46, 380), figures.Axis(69, 79, 270, 10)
    placed = figures.tags(points, x, y)
    heights = sorted(tag.y for tag in placed if tag.x > 300)
    assert len(heights) == 6
    assert min(b - a for a, b in itertools.pairwise(heights)) >= figures.APART - 1e-9
    assert heights[0] >= 10
    # Two dots in one place, with one in their way.
    close = figures.tags([point(1, 20, 75), point(2, 20, 75), point(3, 25, 75)], x, y)
    assert [tag.text for tag in close] == ["1, 2", "3"]
    assert close[0].style == "middle"
    assert close[0].y < close[0].dot == close[1].dot
    drawn = figures.pareto("x", [*points, point(10, math.nan, 1.0)], "MB")
    assert drawn.count("<circle") == 7
    assert "nan" not in drawn


def test_the_grid_shows_what_is_known():
    drawn = figures.grid("x", ["a", "b"], ["c", "d"], [[0.5, math.nan], [0.75, 1.0]])
    assert drawn.count('class="fill"') == 3
    assert ">75.0<" in drawn
    assert "b, d: 100.0%" in drawn
