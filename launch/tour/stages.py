"""The stages of a tour: what each does, what decides its result, what it depends on.

SEED/finetune/TASK-OPTIMISER  ->  SEED/scores/OPTIMISER  ->  SEED/choice/optimiser
SEED/merge/METHOD             ->  SEED/scores/METHOD     ->  SEED/choice/merge
SEED/student                  ->  SEED/scores/student
SEED/quantize/BITS-METHOD     ->  SEED/scores/BITS-METHOD
SEED/flatness/NAME of both optimisers, the chosen merge and the student
of the first seed: surface, choice/rounded, export, costs
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from steppe.launch import config as config_
from steppe.launch.config import DataConfig, FinetuneConfig
from steppe.launch.merge.settings import ADAPTED, STREAMED, SWEPT, MergeConfig
from steppe.launch.quantize.settings import QuantizeConfig
from steppe.launch.tour import flat, rounded, shared, shipped, small
from steppe.launch.tour.flat import Landscape
from steppe.launch.tour.graph import Done, Graph, Result, Stage
from steppe.launch.tour.settings import ADAMW, TourConfig
from steppe.launch.tour.shared import Trees
from steppe.launch.tour.world import MODEL, World, size
from steppe.train.merge import heads

# Raised where a stage's work changes what it finds: older results then count no longer.
VERSION = 1
# The same of the flatness: 2 since eigenvalues are not taken for found beside a negative one.
FLATNESS = 2
OTHER = "average-other"
Needed = Mapping[str, Done]
Work = Callable[[Path, Needed], Result]


def slugs(config: TourConfig) -> dict[str, str]:
    """Short name of every merging method -> the method as the settings have it."""
    found: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for text in config.methods:
        name = text.partition(":")[0]
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name}-{seen[name]}"] = text
    return found


def graph(config: TourConfig, world: World) -> Graph:
    """All stages, in an order in which they can run."""
    plan = _Plan(config, world)
    stages: list[Stage] = []
    for seed in config.seeds:
        stages += plan.seed(seed)
    return Graph(Path(config.out), stages)


class _Plan:
    def __init__(self, config: TourConfig, world: World) -> None:
        self.config, self.world = config, world
        self.trees, self.landscape = Trees(world), Landscape(world)
        data = _changed(dataclasses.replace(config.data, source=""), DataConfig(source=""))
        data |= {name: getattr(config.data, name) for name in ("max_length", "limit")}
        # The splits that are scored decide nothing of a training.
        self.training = {k: v for k, v in data.items() if k != "eval_limit"}
        self.data = data
        self.tasks = [[name, world.inputs[a]] for name, a in zip(config.names, config.tasks)]
        self.further = [world.inputs[a] for a in config.further]

    def seed(self, seed: int) -> list[Stage]:
        """The stages of one seed."""
        config = self.config
        tunes = {o: [f"{seed}/finetune/{t}-{o}" for t in config.names] for o in config.optimisers}
        stages = [self._tune(seed, o, n) for o in config.optimisers for n in range(len(tunes[o]))]
        stages += [self._family(seed, optimiser, tunes) for optimiser in config.optimisers]
        families = tuple(f"{seed}/scores/{o}" for o in config.optimisers)
        stages.append(self._choice(f"{seed}/choice/optimiser", families, flat.choose))
        every = (f"{seed}/choice/optimiser", *(name for own in tunes.values() for name in own))
        found = slugs(config)
        for slug, text in (*found.items(), (OTHER, "average")):
            stages.append(self._merge(seed, slug, text, every))
            stages.append(self._scores(f"{seed}/merge/{slug}", self._several))
        marks = tuple(f"{seed}/scores/{slug}" for slug in found)
        stages.append(self._choice(f"{seed}/choice/merge", marks, shared.choose))
        merges = (f"{seed}/choice/merge", *(f"{seed}/merge/{slug}" for slug in found))
        stages.append(self._student(seed, merges))
        stages.append(self._scores(f"{seed}/student", self._columns))
        for bits, method in config.rounded():
            stages.append(self._quantize(seed, bits, method))
            stages.append(self._scores(f"{seed}/quantize/{bits}-{method}", self._packed))
        if config.curvature:
            stages += [self._flatness(seed, optimiser, tunes) for optimiser in config.optimisers]
            stages.append(self._flat(f"{seed}/flatness/merged", merges, _chosen_merge))
            stages.append(self._flat(f"{seed}/flatness/student", (f"{seed}/student",), _only))
        return stages + (self._ends(seed, tunes) if seed == config.seeds[0] else [])

    # Flat ------------------------------------------------------------------------------------

    def _tune(self, seed: int, optimiser: str, number: int) -> Stage:
        config, world = self.config, self.world
        task, address = config.names[number], config.tasks[number]
        own = _changed(config.finetune(address, optimiser, seed, ""), FinetuneConfig())
        settings = {k: v for k, v in own.items() if k not in ("out", "data", "model")}
        settings |= {"data": self.training, "version": VERSION}
        settings |= {"model": world.inputs[config.model], "source": world.inputs[address]}
        return Stage(
            f"{seed}/finetune/{task}-{optimiser}",
            settings,
            lambda folder, _: flat.learn(world, address, optimiser, seed, folder),
            what=f"{task} with {named(optimiser)}",
            resumes=True,
        )

    def _family(self, seed: int, optimiser: str, tunes: Mapping[str, list[str]]) -> Stage:
        world, names = self.world, self.config.names

        def work(folder: Path, needed: Needed) -> Result:
            runs = {task: needed[name] for task, name in zip(names, tunes[optimiser])}
            served = world.individual(runs)
            found = world.scores(served)
            found["crossed"] = world.crossed(served)
            found["bytes"] = sum(size(run.folder / "run" / MODEL) for run in runs.values())
            return found

        return Stage(
            f"{seed}/scores/{optimiser}",
            self._scoring(),
            work,
            tuple(tunes[optimiser]),
            f"scores of {named(optimiser)}",
        )

    def _flatness(self, seed: int, optimiser: str, tunes: Mapping[str, list[str]]) -> Stage:
        names = self.config.names

        def served(world: World, needed: Needed) -> Any:
            return world.individual(dict(zip(names, (needed[n] for n in tunes[optimiser]))))

        return self._flat(f"{seed}/flatness/{optimiser}", tuple(tunes[optimiser]), served)

    def _flat(
        self, name: str, needs: tuple[str, ...], served: Callable[[World, Needed], Any]
    ) -> Stage:
        config, what = self.config, name.rpartition("/")[2]
        settings = {"data": self.training, "tasks": self.tasks, "version": FLATNESS}
        settings |= {"curvature": config.curvature, "ball": config.ball}
        return Stage(
            name,
            settings,
            lambda _, needed: self.landscape.flatness(served(self.world, needed), what),
            needs,
            f"flatness of {named(what)}",
        )

    # Shared ----------------------------------------------------------------------------------

    def _merge(self, seed: int, slug: str, text: str, needs: tuple[str, ...]) -> Stage:
        config, world = self.config, self.world
        arm = shared.arm_of(world, text, seed)

        def work(folder: Path, needed: Needed) -> Result:
            chosen = needed[f"{seed}/choice/optimiser"].result["best"].rpartition("/")[2]
            if slug == OTHER:
                chosen = next(o for o in config.optimisers if o != chosen)
            runs = {task: needed[f"{seed}/finetune/{task}-{chosen}"] for task in config.names}
            trees = self.trees.of(runs, folder / "inputs")
            found = shared.merged(world, trees, arm, folder)
            return {**found, "optimiser": chosen, "bytes": size(folder / MODEL)}

        settings = {"arm": _decides(arm), "version": VERSION}
        if slug != OTHER and arm.method not in STREAMED:
            settings["data"] = self.data
        elif arm.method in SWEPT and arm.lam is None:
            settings |= {"data": self.data, "sweep": list(arm.sweep)}
        what = "averaging the other models" if slug == OTHER else f"merging by {slug}"
        return Stage(f"{seed}/merge/{slug}", settings, work, needs, what)

    # Small, and in integers ------------------------------------------------------------------

    def _student(self, seed: int, needs: tuple[str, ...]) -> Stage:
        config, world = self.config, self.world

        def work(folder: Path, needed: Needed) -> Result:
            found = small.learn(world, chosen_merge(needed), seed, folder)
            return {**found, "bytes": size(folder / MODEL)}

        names = ("layers", "divergence", "beta", "student_epochs", "student_lr", "batch_size")
        settings: dict[str, Any] = {name: getattr(config, name) for name in names}
        settings |= {"data": self.training, "warmup": config.optim.warmup, "version": VERSION}
        settings |= {"weight_decay": config.optim.weight_decay}
        return Stage(
            f"{seed}/student", settings, work, needs, f"a student of {config.layers} layers"
        )

    def _quantize(self, seed: int, bits: str, method: str) -> Stage:
        world = self.world
        settings = _changed(self.config.quantize(seed), QuantizeConfig())
        if method == "rtn":  # rounding has no other settings
            settings = {k: v for k, v in settings.items() if k in ("embed", "head", "activations")}
        settings = {k: v for k, v in settings.items() if k not in ("bits", "method", "data")}

        def work(folder: Path, needed: Needed) -> Result:
            student = needed[f"{seed}/student"]
            found = rounded.quantize(world, student, bits, method, seed, folder)
            return {**found, "bytes": size(folder / MODEL)}

        return Stage(
            f"{seed}/quantize/{bits}-{method}",
            {**settings, "scheme": bits, "max_length": self.data["max_length"], "version": VERSION},
            work,
            (f"{seed}/student",),
            f"{bits.upper()} by {method}",
        )

    # Scores and choices ----------------------------------------------------------------------

    def _scoring(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "tasks": self.tasks,
            "further": self.further,
            "version": VERSION,
        }

    def _scores(self, name: str, served: Callable[[Done], Any]) -> Stage:
        seed, what = name.partition("/")[0], name.rpartition("/")[2]
        return Stage(
            f"{seed}/scores/{what}",
            self._scoring(),
            lambda _, needed: self.world.scores(served(needed[name])),
            (name,),
            f"scores of {what}",
        )

    def _several(self, done: Done) -> Any:
        return self.world.several(heads.load(done.folder / MODEL))

    def _columns(self, done: Done) -> Any:
        return self.world.columns(*small.read(done.folder / MODEL))

    def _packed(self, done: Done) -> Any:
        return self.world.packed(done.folder / MODEL)

    def _choice(
        self, name: str, needs: tuple[str, ...], choose: Callable[[Needed], Result]
    ) -> Stage:
        return Stage(
            name,
            {"version": VERSION},
            lambda _, needed: choose(needed),
            needs,
            f"choosing the {name.rpartition('/')[2]}",
        )

    # Of the first seed -----------------------------------------------------------------------

    def _ends(self, seed: int, tunes: Mapping[str, list[str]]) -> list[Stage]:
        config, world = self.config, self.world
        pairs = {f"{bits}-{method}": bits for bits, method in config.rounded()}
        student = f"{seed}/student"

        def choose(_: Path, needed: Needed) -> Result:
            sizes = {
                f"{seed}/scores/{n}": needed[f"{seed}/quantize/{n}"].result["bytes"] for n in pairs
            }
            scores = {name: needed[name] for name in sizes}
            return rounded.choose(scores, sizes, needed[f"{seed}/scores/student"])

        def export(folder: Path, needed: Needed) -> Result:
            best = needed[f"{seed}/choice/rounded"].result["best"].rpartition("/")[2]
            chosen = needed[f"{seed}/quantize/{best}"]
            return shipped.export(world, needed[student], chosen, folder)

        def costs(_: Path, needed: Needed) -> Result:
            schemes = {bits: needed[f"{seed}/quantize/{name}"] for name, bits in pairs.items()}
            return shipped.costs(world, needed[tunes[ADAMW][0]], needed[student], schemes)

        def surface(_: Path, needed: Needed) -> Result:
            task = config.names[0]
            runs = {o: world.individual({task: needed[tunes[o][0]]}) for o in config.optimisers}
            return self.landscape.surfaces(runs, task)

        models = tuple(f"{seed}/quantize/{name}" for name in pairs)
        marks = tuple(f"{seed}/scores/{name}" for name in pairs)
        rounding = f"{seed}/choice/rounded"
        length = {"max_length": config.data.max_length, "version": VERSION}
        needs = (*models, *marks, f"{seed}/scores/student")
        stages = [
            Stage(rounding, {"room": rounded.ROOM}, choose, needs, "choosing the rounded model"),
            Stage(
                f"{seed}/export",
                self._scoring(),
                export,
                (student, rounding, *models),
                "files, opened again",
            ),
            Stage(
                f"{seed}/costs",
                length,
                costs,
                (tunes[ADAMW][0], student, *models),
                "FLOPs and latency",
            ),
        ]
        if config.grid:
            settings = {"grid": config.grid, "data": self.training, "few": config.curvature}
            firsts = tuple(tunes[o][0] for o in config.optimisers)
            stages.append(
                Stage(f"{seed}/surface", {**settings, "version": VERSION}, surface, firsts,
                      "loss surfaces")
            )  # fmt: skip
        return stages


def chosen_merge(needed: Needed) -> Done:
    """The merge that goes on, among what a stage needs."""
    (choice,) = (done for name, done in needed.items() if name.endswith("/choice/merge"))
    return needed[choice.result["best"].replace("/scores/", "/merge/")]


def _chosen_merge(world: World, needed: Needed) -> Any:
    return world.several(heads.load(chosen_merge(needed).folder / MODEL))


def _only(world: World, needed: Needed) -> Any:
    (done,) = needed.values()
    return world.columns(*small.read(done.folder / MODEL))


def _decides(arm: MergeConfig) -> dict[str, Any]:
    """Of the settings of a merge those that its result depends on."""
    own = _changed(arm, MergeConfig())
    if arm.method in STREAMED:  # no data, but for the choice of a coefficient
        own = {k: v for k, v in own.items() if k not in ("batch_size", "adapt_on", "eval_limit")}
    if arm.method not in ("dare", "dare-ties", *ADAPTED, "fisher", "regmean"):
        own.pop("seed", None)
    return {k: v for k, v in own.items() if k != "sweep"}


def _changed(config: Any, plain: Any) -> dict[str, Any]:
    """Settings that are not the neutral ones: another version with more of them, all neutral,
    finds the results of this one."""
    neutral = config_.to_dict(plain)
    return {k: v for k, v in config_.to_dict(config).items() if v != neutral[k]}


def named(what: str) -> str:
    """An optimiser as people write it; other names as they are."""
    return {"adamw": "AdamW", "sam": "SAM", "asam": "ASAM", "fsam": "FSAM"}.get(what, what)
