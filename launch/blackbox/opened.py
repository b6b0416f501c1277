"""What a search works on: the frozen model as a function of a prompt, and the few examples."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from steppe.data import collate, columns
from steppe.launch import config as config_
from steppe.launch import kinds, overlays, setup
from steppe.launch.blackbox.settings import BlackboxConfig
from steppe.models import pretrained, tree
from steppe.models.heads import HeadConfig
from steppe.models.overlays import Overlay, added_prompt, files, prompt
from steppe.models.overlays.overlay import BASE, OVERLAY
from steppe.models.sites import Site
from steppe.train import blackbox, mesh
from steppe.train.blackbox.tuning import Space
from steppe.train.types import Batch, Params

SHARES = ("train", "dev")


@dataclass(frozen=True)
class Opened:
    """Everything that the search needs; nothing in it changes.

    Attributes:
      origin: of the model.
      base: the model with its fixed head.
      model: it with the overlay of the prompt bound.
      params: all parameters, the prompt being 0 (or the given rows).
      overlay: of the prompt.
      task, tokenizer: of the data.
      splits: train and dev (the shots), valid and test -> Dataset.
      batches: the shots, each as one batch on the mesh.
      plan: the mesh.
      base_hash: of the base's parameters.
      fresh: parts of the base that its files do not hold, to be kept with the prompt.
      head: what the scores of the classes are, in words.
      means: encoders: the class means that the head is made of.
    """

    origin: setup.Origin
    base: Any
    model: Any
    params: Params
    overlay: Overlay
    task: Any
    tokenizer: Any
    splits: dict[str, Any]
    batches: dict[str, Batch]
    plan: mesh.MeshPlan
    base_hash: str
    fresh: tuple[str, ...]
    head: str
    means: blackbox.Prototypes | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the prompts: (layers or 1, length, width)."""
        delta = self.params[OVERLAY]
        leaf = delta["prompt"][None] if "prompt" in delta else delta[tree.STACK]["resid"]
        return tuple(leaf.shape)

    def with_prompt(self, rows: jax.Array) -> Params:
        """All parameters with prompts [S, D]."""
        return with_prompt(self.params, rows)

    def scores(
        self, params: Params, rows: jax.Array, batch: Batch, *, left_out: bool = False
    ) -> jax.Array:
        """Logits [N, C] of the classes under prompts [S, D].

        Args:
          left_out: the batch is that of the shots, each of which is scored without itself where
            the head is made of them.
        """
        sites = None
        if left_out and self.means is not None:
            sites = {"logits": blackbox.left_out(self.means)}
        logits = self.model.apply(with_prompt(params, rows), batch, sites=sites).logits
        assert logits is not None
        return logits


def with_prompt(params: Params, rows: jax.Array) -> Params:
    """``params`` with the prompts [S, D] in their place."""
    delta = params[OVERLAY]
    if "prompt" in delta:
        made = {**delta, "prompt": rows.reshape(delta["prompt"].shape)}
    else:
        made = {**delta, tree.STACK: {"resid": rows.reshape(delta[tree.STACK]["resid"].shape)}}
    return {**params, OVERLAY: made}


def open_all(config: BlackboxConfig) -> Opened:
    """Reads model and data, draws the shots and fixes the head. Writes nothing.

    Raises:
      FileNotFoundError: no such model, or nothing where the search is to start.
      ValueError: more shots than the data holds, words that are not one token each, a rank above
        the numbers of a prompt, rows to start at of another base, a model that cannot be searched;
        and whatever is wrong with the data.
    """
    origin = setup.origin(config.model)
    bare = pretrained.load_config(origin.weights)
    kind = kinds.kind_of(bare)
    if kind not in ("encoder", "decoder"):
        raise ValueError(
            f"{origin.name} is of kind {kind}; steppe blackbox searches prompts of encoders and "
            "decoders"
        )
    if config.words and kind != "decoder":
        raise ValueError(
            f"words={config.words[0]} ... are what a decoder says next; {origin.name} is an "
            "encoder, whose classes are means of the shots: leave words out"
        )
    tokenizer = setup.fitting(config.data, origin, bare)
    assert tokenizer is not None
    found = setup.records(config.data)
    task = setup.task(config.data, found)
    parts = setup.divide(config.data, found)
    rows = shots(parts["train"], task, config)
    rows |= {name: parts[name] for name in ("valid", "test")}
    splits = {
        name: setup.encode(task, records, tokenizer, config.data, training=False)
        for name, records in rows.items()
    }
    plan = mesh.plan(config_.parse_mesh(config.mesh, len(jax.devices())), bare.build().axes)
    head = HeadConfig("classification", task.num_labels, None, 0.0)
    if kind == "decoder":
        model, params, said = _verbaliser(config, origin, task, tokenizer, head)
        fresh: tuple[str, ...] = ()
    else:
        loaded = pretrained.load(origin.weights, head=head)
        model, params = loaded.model, loaded.params
        fresh = tuple(p for p in loaded.fresh if not p.startswith("head/"))
        said = "means of the classes' examples (no word is predicted)"
    hashed = overlays.base_hash(params)
    overlay, first = _overlay(config, kind, tokenizer, params, hashed)
    bound = overlay.bind(model)
    whole = dataclasses.replace(plan, rules=tuple(bound.axes))
    everything = whole.place({BASE: params, OVERLAY: first})
    batches = {name: _batch(splits[name], whole) for name in SHARES}
    fitted = None
    if kind == "encoder":
        features = np.asarray(_features(bound, everything, batches["train"]))
        labels = np.asarray(batches["train"]["labels"])
        fitted = blackbox.prototypes(features, labels, task.num_labels)
        out = {"kernel": jnp.asarray(fitted.kernel), "bias": jnp.asarray(fitted.bias)}
        everything = {**everything, BASE: {**everything[BASE], "head": {"out": out}}}
        everything = whole.place(everything)
    opened = Opened(
        origin, model, bound, everything, overlay, task, tokenizer, splits, batches, whole, hashed,
        fresh, said, fitted,
    )  # fmt: skip
    blackbox.check_rank(config.rank, int(np.prod(opened.shape[1:])))
    return opened


def shots(
    records: list[dict[str, Any]], task: Any, config: BlackboxConfig
) -> dict[str, list[dict[str, Any]]]:
    """``shots`` records of every class to train on and as many others to choose with, by the seed.

    Raises:
      ValueError: a class that has fewer.
    """
    labels = np.asarray(columns.classes(records, task.label, task.labels))
    order = np.random.default_rng(config.seed).permutation(len(records))
    chosen: dict[str, list[int]] = {name: [] for name in SHARES}
    for number, name in enumerate(task.label_names):
        own = [int(i) for i in order if labels[i] == number]
        if len(own) < 2 * config.shots:
            raise ValueError(
                f"shots={config.shots} takes {config.shots} examples of every class to train on "
                f"and {config.shots} to choose with, but the training split of "
                f"{config.data.source} has {len(own)} of class {name!r}; lower shots to "
                f"{len(own) // 2} or less"
            )
        chosen["train"] += own[: config.shots]
        chosen["dev"] += own[config.shots : 2 * config.shots]
    return {name: [records[i] for i in sorted(rows)] for name, rows in chosen.items()}


def space(config: BlackboxConfig, opened: Opened) -> tuple[Space, np.ndarray]:
    """The random subspaces of the prompts, and the spread sigma_hat of what they are added to."""
    count, length, width = opened.shape
    size = length * width
    delta = opened.params[OVERLAY]
    start = jnp.zeros((count, size))
    if "prompt" in delta:
        start = jnp.asarray(delta["prompt"], jnp.float32).reshape(1, size)
    hats = jax.jit(
        lambda params, batch: blackbox.scales(opened.model, params, batch, deep=config.deep)
    )(opened.params, opened.batches["train"])
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1), count)
    made = []
    for key, hat in zip(keys, np.asarray(hats), strict=True):
        std: Any = None
        if config.projection == "normal":
            std = float(
                blackbox.projection_std(float(hat), config.rank, config.step, config.spread)
            )
        made.append(blackbox.random_projection(key, size, config.rank, std))
    placed: Space = jax.device_put(Space(jnp.stack(made), start), opened.plan.replicated)
    return placed, np.asarray(hats)


def export(opened: Opened, config: BlackboxConfig, rows: jax.Array, target: Path) -> None:
    """Writes the prompt as the folder of an overlay, which ``steppe evaluate`` opens."""
    params = jax.device_get(with_prompt(opened.params, rows))
    kept = {p: v for p, v in tree.flatten(params[BASE]).items() if p.startswith("head/")}
    kept |= {p: v for p, v in tree.flatten(params[BASE]).items() if p in opened.fresh}
    own, given = opened.origin.tokenizer, config.model
    held = tree.unflatten(kept)
    overlays.save(
        target,
        opened.overlay,
        {BASE: held, OVERLAY: params[OVERLAY]},
        base=given if given.startswith("asset:") else str(Path(given).expanduser().resolve()),
        hashed=opened.base_hash,
        model=opened.base,
        labels=opened.task.label_names,
        tokenizer_dir=own if own.is_dir() else None,
        top=overlays.top_hash(params[BASE], held),
    )
    if own.is_file():  # inside a file of weights
        opened.tokenizer.save(target)


def _overlay(
    config: BlackboxConfig, kind: str, tokenizer: Any, params: Params, hashed: str
) -> tuple[Overlay, Params]:
    """The overlay and its first delta.

    Args:
      hashed: of the base, which rows to start at must have been trained on.
    """
    if config.inject == "concat":
        overlay = prompt.overlay(length=config.length)
        made = overlay.init(jax.random.key(0), params)["prompt"]
        rows = jnp.zeros_like(made)
        if config.start:
            saved = files.load(config.start, fingerprint=hashed).params.get(OVERLAY, {})
            given = saved.get("prompt")
            if given is None or set(saved) != {"prompt"} or given.shape != rows.shape:
                held = "no prompt" if given is None else f"rows of shape {given.shape}"
                raise ValueError(
                    f"start={config.start} holds {held}, but the search needs {rows.shape}: give "
                    "the model/ folder of a run with --overlay prompt and its length"
                )
            rows = jnp.asarray(given, jnp.float32)
        return overlay, {"prompt": rows}
    ids = tuple(range(config.first_id, config.first_id + config.length))
    decoder = kind == "decoder"
    overlay = added_prompt.overlay(
        length=config.length,
        deep=config.deep,
        first=0 if decoder else 1,
        ids=ids + _tokens(tokenizer, " . "),
        after=_tokens(tokenizer, config.suffix) if decoder and config.suffix else (),
    )
    return overlay, overlay.init(jax.random.key(0), params)


def _verbaliser(
    config: BlackboxConfig, origin: setup.Origin, task: Any, tokenizer: Any, head: HeadConfig
) -> tuple[Any, Params, str]:
    """A decoder whose classes are the next words: (model, params, what the scores are)."""
    names = config.words or task.label_names
    if len(names) != task.num_labels:
        raise ValueError(
            f"words must name the {task.num_labels} classes ({', '.join(task.label_names)}) in "
            f"their order, got {len(names)}"
        )
    ids = [_one_token(tokenizer, name, given=bool(config.words)) for name in names]
    if len(set(ids)) < len(ids):
        raise ValueError(f"words {', '.join(names)} are not all different tokens; choose others")
    loaded = pretrained.load(origin.weights, head="lm")
    if loaded.fresh:
        raise ValueError(f"{origin.name} holds no output layer ({loaded.fresh[0]} is missing)")
    bare = loaded.model.config
    if bare.softcap is not None:
        raise ValueError(f"{origin.name} caps its logits, which a head of some words does not")
    params = {name: leaf for name, leaf in loaded.params.items() if name != "head"}
    chosen = jnp.asarray(ids)
    kernel = (
        loaded.params["head"]["out"]["kernel"][:, chosen]
        if "head" in loaded.params
        else params["embed"]["word"]["table"][chosen].T
    )
    said = f"logits of the next word after {config.suffix.strip()!r}: {', '.join(names)}"
    return bare.with_head(head).build(), {**params, "head": {"out": {"kernel": kernel}}}, said


def _one_token(tokenizer: Any, name: str, *, given: bool) -> int:
    """The token that ``name`` is as the next word: its score is one column of the logits.

    Args:
      given: as a word; else it is the name of a class.
    """
    ids = _tokens(tokenizer, f" {name.strip()}")
    if len(ids) > 1:
        pieces = " ".join(repr(tokenizer.backend.id_to_token(i)) for i in ids)
        raise ValueError(
            f"{'words has' if given else 'the class'} {name!r}, which is {len(ids)} tokens "
            f"({pieces}), but a class is scored by one next token: "
            f"{'choose a word that is one' if given else 'give words, one for each class'}"
        )
    return ids[0]


def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    ids = tuple(int(i) for i in tokenizer.encode_batch([text], special=False)[0]["input_ids"])
    if not ids:
        raise ValueError(f"the tokenizer makes no token of {text!r}")
    return ids


def _batch(dataset: Any, plan: mesh.MeshPlan) -> Batch:
    """All examples as one batch, on every device."""
    longest = collate.choose_buckets(dataset.lengths, 1)[0]
    made = collate.collate(dataset, np.arange(len(dataset)), longest, seed=0, epoch=0, train=False)
    inputs = {k: v for k, v in made.items() if k != "example_index"}
    placed: Batch = jax.device_put(inputs, plan.replicated)
    return placed


def _features(model: Any, params: Params, batch: Batch) -> jax.Array:
    """What the head reads."""
    sites = {"logits": Site(lambda delta, x, base, context: x, ())}
    found: jax.Array = jax.jit(lambda p, b: model.apply(p, b, sites=sites).logits)(params, batch)
    return found
