"""Distillation from a store: the teacher runs once over the data, and never beside the student.

  L = sum_t m_t D_t(p', q'),   p' the teacher's k most probable tokens and the remainder
                               (see ``topk`` for the divergence, ``store`` for what is kept)

``write`` runs the teacher over batches; ``columns`` puts what it said of a batch's rows beside
them; ``stored_kd`` is the objective. Epochs, shuffling and padding do not matter: rows are found
by ``example_index``, and their tokens are compared with those that the teacher saw: labels one
by one, all that it read by a hash (which stores of earlier versions lack).

Hinton et al. 2015 (arXiv 1503.02531); the store takes the place of the teacher's forward pass.

Deviations: none.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from steppe.models.families.faithful import essence
from steppe.models.model import Model
from steppe.train import checkpoint
from steppe.train.distill import topk
from steppe.train.distill.divergences import check, masked_token_sum, shown, unlike
from steppe.train.distill.pairs import STUDENT
from steppe.train.distill.store import Example, Identity, Store, StoreError, Writer
from steppe.train.types import Batch, LossOut, Objective, Params

COLUMNS = ("teacher_ids", "teacher_log_p", "teacher_log_rest", "teacher_mask")
# (rows done, tokens done)
Progress = Callable[[int, int], None]


def teacher_hash(model: Model, params: Params) -> str:
    """Hash of a teacher: what its configuration computes, and the bits of its parameters.

    The same weights in another dtype are another teacher: they predict something else.
    """
    config = model.config
    plain = essence(config) if hasattr(config, "__dataclass_fields__") else repr(config)
    text = json.dumps([plain, checkpoint.fingerprint(params)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of a vocabulary: every token with its id, added ones too.

    Args:
      tokenizer: a ``steppe.data.text.Tokenizer``.
    """
    table = sorted(tokenizer.backend.get_vocab(with_added_tokens=True).items())
    return hashlib.sha256(json.dumps(table).encode()).hexdigest()[:16]


def dataset_hash(dataset: Any) -> str:
    """Hash of what is learnt: inputs, labels and masks of a ``steppe.data.dataset.Dataset``."""
    digest = hashlib.sha256()
    for part in dataset.content():
        digest.update(f"{part.dtype} {part.shape}".encode())
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()[:16]


def write(
    folder: str | os.PathLike[str],
    teacher: Any,
    batches: Iterable[Batch],
    *,
    tokenizer: str,
    dataset: str,
    k: int,
    dtype: str = "float16",
    temperature: float = 1.0,
    shift: bool = True,
    shard_tokens: int = 1 << 18,
    progress: Progress | None = None,
) -> Path:
    """Runs a teacher over batches and stores what it says of the labelled tokens.

    An interrupted call goes on where it was: batches whose rows are all there are not computed.
    One process writes a store; the teacher may be sharded over that process's devices.

    Args:
      folder: of the store.
      teacher: a model with a head and its parameters (``pretrained.Loaded``).
      batches: one pass over the data (``data.batches.evaluate``); each with ``input_ids``,
        ``labels``, ``label_mask`` [B, T] and ``example_index`` [B], -1 for padding rows.
      tokenizer, dataset: their hashes.
      k, dtype, temperature, shift, shard_tokens: see ``store.Writer``.
      progress: called after every batch.

    Raises:
      ValueError: a teacher without a head, a number out of range, or batches without a column.
      StoreError: the folder holds a store of something else, or a complete one.
      OSError: the disk is full; finished shards stand.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
    identity = Identity(teacher_hash(teacher.model, teacher.params), tokenizer, dataset)
    apply = teacher.model.apply

    @jax.jit
    def best(params: Params, inputs: Batch) -> topk.TopK:
        logits = apply(params, inputs).logits
        if logits is None:
            raise ValueError("the teacher has no head, so it returns no logits; load it with head=")
        return topk.top_k(logits, k, temperature=temperature)

    writer: Writer | None = None
    for batch in batches:
        missing = [c for c in ("labels", "label_mask", "example_index") if c not in batch]
        if missing:
            raise ValueError(f"the batches must hold {', '.join(missing)}; got {sorted(batch)}")
        inputs = {n: v for n, v in batch.items()
                  if n not in ("labels", "label_mask", "example_index")}  # fmt: skip
        if writer is None:
            shape = jax.eval_shape(lambda p, b: apply(p, b).logits, teacher.params, inputs)
            writer = Writer(
                folder,
                identity,
                k=k,
                vocab_size=k if shape is None else shape.shape[-1],
                dtype=dtype,
                temperature=temperature,
                shift=shift,
                shard_tokens=shard_tokens,
            )
        new = [(at, row) for at, row in enumerate(np.asarray(batch["example_index"]).tolist())
               if row >= 0 and row not in writer]  # fmt: skip
        if new:
            found = [np.asarray(x) for x in best(teacher.params, inputs)]
            for at, row in new:
                labels, places = _labelled(batch, at, shift)
                ids, log_p, log_rest = (x[at, places] for x in found)
                said = Example(labels, ids, log_p, log_rest, _read(batch, at, places))
                writer.add(row, said)
        if progress is not None:
            progress(len(writer), writer.tokens)
    if writer is None:
        raise ValueError("batches must not be empty: there is nothing to store")
    return writer.finish()


def columns(store: Store, batch: Batch) -> dict[str, np.ndarray]:
    """What the teacher said of a batch, in the columns of the student's logits.

    Args:
      batch: rows of the stored data, padded and ordered in any way; as for :func:`write`.

    Returns:
      ``teacher_ids`` int32 [B, T, k], ``teacher_log_p`` float32 [B, T, k], ``teacher_log_rest``
      and ``teacher_mask`` float32 [B, T]; to be merged into the batch. With ``shift``, what is
      said of the token at t stands at t - 1.

    Raises:
      StoreError: a row that is not in the store, or whose tokens are others.
    """
    shape = tuple(np.shape(batch["labels"]))
    # Where nothing is stored: any distribution without zeros, so that masked terms are finite.
    even = -np.log(np.float32(store.k + 1))
    out = {
        "teacher_ids": np.broadcast_to(
            np.arange(store.k, dtype=np.int32), (*shape, store.k)
        ).copy(),
        "teacher_log_p": np.full((*shape, store.k), even, np.float32),
        "teacher_log_rest": np.full(shape, even, np.float32),
        "teacher_mask": np.zeros(shape, np.float32),
    }
    for at, row in enumerate(np.asarray(batch["example_index"]).tolist()):
        if row < 0:
            continue
        example = store.example(row)
        labels, places = _labelled(batch, at, store.shift)
        if not np.array_equal(labels, example.labels):
            raise StoreError(
                f"row {row} has {len(labels)} labelled tokens that are not the "
                f"{len(example.labels)} of the store at {store.folder}: train on the data that "
                "it was written for"
            )
        if example.read and example.read != _read(batch, at, places):
            raise StoreError(
                f"row {row} has the labelled tokens of the store at {store.folder}, but the "
                "teacher read them behind another prompt, or cut elsewhere: train on the data "
                "that it was written for, with the same max_length"
            )
        out["teacher_ids"][at, places] = example.ids
        out["teacher_log_p"][at, places] = example.log_p
        out["teacher_log_rest"][at, places] = example.log_rest
        out["teacher_mask"][at, places] = 1.0
    return out


def stored_kd(
    student: Model,
    store: Store,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    scale_tau2: bool = False,
) -> Objective:
    """Distillation from the columns of a store; weight = number of stored tokens of the batch.

    aux: ``kd``, the divergence (before T^2). Add the cross entropy with ``weighted``.

    Args:
      student: the model to train, with a head over the teacher's vocabulary.
      store: says the temperature; its rows come with the batch, see :func:`columns`.
      kind, beta, alpha: see ``divergences``.
      scale_tau2: multiply by temperature^2, which keeps the gradient's size.

    Raises:
      ValueError: an unknown kind, a number out of range, or another vocabulary; when called, a
        batch without the columns, or a student without a head.
    """
    temperature = store.temperature
    check(kind, temperature, beta, alpha)
    size = getattr(student.config, "vocab_size", store.manifest["vocab_size"])
    if size != store.manifest["vocab_size"]:
        raise ValueError(unlike(size, store.manifest["vocab_size"]))
    divergence = functools.partial(
        topk.stored_divergence, kind, temperature=temperature, beta=beta, alpha=alpha
    )

    def objective(params: Params, batch: Batch, key: jax.Array | None) -> LossOut:
        missing = [c for c in COLUMNS if c not in batch]
        if missing:
            raise ValueError(
                f"the batch lacks {', '.join(missing)}: add offline.columns(store, batch) to it"
            )
        ids, log_p, log_rest, mask = (batch[c] for c in COLUMNS)
        own = params.get(STUDENT, params)
        logits = student.apply(own, batch, rng=key, train=key is not None).logits
        if logits is None:
            raise ValueError("the student has no head, so it returns no logits; load it with head=")
        value = divergence(shown(mask, logits), topk.TopK(ids, log_p, log_rest))
        total, weight = masked_token_sum(value, mask)
        aux = {"kd": (jax.lax.stop_gradient(total), weight)}
        return LossOut(total * (temperature**2 if scale_tau2 else 1.0), weight, aux)

    return objective


def _labelled(batch: Batch, at: int, shift: bool) -> tuple[np.ndarray, np.ndarray]:
    """Labels that count in a row, and the columns of the logits that answer for them."""
    labels = np.asarray(batch["labels"])[at]
    # As in ``pairs.targets``: a negative label counts as masked.
    places = np.flatnonzero((np.asarray(batch["label_mask"])[at] > 0) & (labels >= 0))
    if shift:
        places = places[places > 0]  # nothing stands before the first token
    return labels[places].astype(np.int32), places - int(shift)


def _read(batch: Batch, at: int, places: np.ndarray) -> int:
    """Hash of the tokens that a teacher reads of a row, prompt and padding told apart; not 0.

    Without an attention mask those up to the last column that answers for a label.
    """
    ids = np.asarray(batch["input_ids"])[at]
    if "attention_mask" in batch:
        ids = ids[np.asarray(batch["attention_mask"])[at] != 0]
    else:
        ids = ids[: places[-1] + 1 if len(places) else 0]
    found = hashlib.sha256(ids.astype("<i4").tobytes()).digest()
    return int.from_bytes(found[:8], "little", signed=True) or 1
