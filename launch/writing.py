"""Texts by a model: prompts to token ids, batches of similar lengths, token ids to texts.

What ``steppe generate``, ``steppe chat`` and the samples of a run share, on top of
``steppe.models.decoding``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from steppe.data.text import Tokenizer
from steppe.models import decoding
from steppe.models.decoding import Settings
from steppe.models.model import Decode
from steppe.models.tree import Params


class Written(NamedTuple):
    """One text.

    Attributes:
      text: without special tokens and without its stop string.
      tokens: number of new tokens, the one that ended the text included.
      reason: why it ended: "eos", "length" or "stop".
    """

    text: str
    tokens: int
    reason: str


def sizes(length: int) -> int:
    """Padded length: powers of two from 32 on, beyond 128 in steps of half a power as well.

    A file of prompts, or a chat, then meets few programs; short prompts cost little either way.
    """
    if length > 128:
        return decoding.bucket(length)
    return max(32, 1 << (length - 1).bit_length())


@functools.lru_cache(maxsize=8)
def _generator(decode: Decode, source: bool, limit: int | None) -> decoding.Generator:
    # Kept by the functions: a run writes before and after its training with one program.
    rows = decoding.rows_bucket
    return decoding.Generator(decode, source=source, limit=limit, sizes=sizes, rows=rows)


def check_settings(settings: Settings, stop: Sequence[str] = (), beams: int = 1) -> None:
    """Tells a bad value before anything is loaded or computed.

    Raises:
      ValueError: a setting out of range, an empty stop string, settings that beam search has
        no use for.
    """
    settings.rows(1)
    if not all(stop):
        raise ValueError("stop must not be empty: every text ends before an empty string")
    if beams < 1:
        raise ValueError(f"beams must be >= 1, got {beams}")
    if beams > 1 and float(np.max(settings.temperature)) > 0:
        raise ValueError(f"beams={beams} searches, temperature samples: give one of the two")
    if beams > 1 and stop:
        raise ValueError("stop strings do not go with beams; give one of the two")


class Writer:
    """A model that writes, with its tokenizer.

    Attributes:
      source: whether prompts are sources of an encoder-decoder.
      limit: positions of the model, prompt and new tokens together; None = no limit.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        settings: Settings | int = 64,
        *,
        stop: Sequence[str] = (),
        beams: int = 1,
        rows: int = 8,
    ) -> None:
        """
        Args:
          settings: of all rows, or just ``max_new_tokens``.
          stop: texts end before these strings.
          beams: above 1 = beam search.
          rows: prompts of a batch.

        Raises:
          ValueError: a setting out of range, an empty stop string, settings that beam search
            has no use for.
        """
        made = Settings(max_new_tokens=settings) if isinstance(settings, int) else settings
        check_settings(made, stop, beams)
        if rows < 1:
            raise ValueError(f"rows must be >= 1, got {rows}")
        self.model, self.tokenizer, self.settings = model, tokenizer, made
        self.source = any(site.startswith("encoder.") for site in model.sites)
        self.limit = model.config.max_length
        self._stop, self._beams, self._rows = tuple(stop), beams, rows
        self._run = _generator(model.decode, self.source, self.limit)

    @property
    def more(self) -> int:
        """New tokens at most."""
        return int(np.max(self.settings.max_new_tokens))

    def encode(self, text: str, *, special: bool = True) -> np.ndarray:
        """Token ids of a prompt, or of a source with its end token.

        Args:
          special: whether the tokenizer's own special tokens are added; not where a chat
            template has written them.

        Raises:
          ValueError: no token is left of the text.
        """
        found = self.tokenizer.encode_batch([text], special=special)[0]["input_ids"]
        end = self.tokenizer.eos_id
        if self.source and end >= 0 and found and found[-1] != end:
            found = [*found, end]
        ids = np.asarray(found, np.int32)
        if not text.strip() or not len(ids):
            raise ValueError("the prompt is empty; give at least one word")
        return ids

    def check(self, prompts: Sequence[np.ndarray]) -> None:
        """
        Raises:
          ValueError: no prompts, an empty one, or one that leaves no room for the new tokens.
        """
        if not prompts:
            raise ValueError("there are no prompts; give at least one")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {i + 1} is empty; give at least one word")
            need = len(prompt) if self.source else len(prompt) + self.more
            if self.limit is not None and need > self.limit:
                more = "" if self.source else f" and {self.more} new ones (max_new_tokens)"
                raise ValueError(
                    f"prompt {i + 1} has {len(prompt)} tokens; they{more} do not fit into the "
                    f"{self.limit} positions of the model; shorten it"
                    + ("" if self.source else " or lower max_new_tokens")
                )

    def write(self, params: Params, prompts: Sequence[np.ndarray]) -> list[Written]:
        """One text for each prompt, in their order; batches hold prompts of similar lengths.

        A text depends on its own prompt and seed alone: row i has the seed ``settings.seed + i``.

        Raises:
          ValueError: as :meth:`check`.
        """
        self.check(prompts)
        order = np.argsort([len(p) for p in prompts], kind="stable")
        found: list[Written | None] = [None] * len(prompts)
        for begin in range(0, len(order), self._rows):
            rows = order[begin : begin + self._rows]
            for place, said in zip(rows, self._batch(params, prompts, rows), strict=True):
                found[place] = said
        return [said for said in found if said is not None]

    def stream(self, params: Params, prompt: np.ndarray, show: Callable[[str], Any]) -> Written:
        """One text, shown piece by piece as it is written.

        Args:
          show: gets each new piece of text; an exception that it raises ends the writing.
        """
        self.check([prompt])
        if self._beams > 1:  # the best beam is known at the end only
            (said,) = self.write(params, [prompt])
            show(said.text)
            return said
        stops = set(self.tokenizer.stop_ids)
        pieces = decoding.TextStream(self._decode, self._stop)
        ended = False

        def on_token(step: int, tokens: np.ndarray) -> None:
            nonlocal ended
            token = int(tokens[0])
            ended = ended or token in stops
            if not ended:
                piece = pieces.push(token)
                if piece:
                    show(piece)

        (said,) = self._batch(params, [prompt], np.array([0]), on_token=on_token, every=1)
        rest = pieces.flush()
        if rest:
            show(rest)
        return said

    def _batch(
        self, params: Params, prompts: Sequence[np.ndarray], rows: np.ndarray, **options: Any
    ) -> list[Written]:
        chosen = [prompts[i] for i in rows]
        pad, eos = self.tokenizer.pad_id, self.tokenizer.stop_ids or None
        batch = (
            _right(chosen, pad) if self.source else decoding.pad_prompts(chosen, pad, sizes=None)
        )
        if self._beams > 1:
            best = decoding.beam_search(
                self.model,
                params,
                batch,
                beams=self._beams,
                max_new_tokens=self.more,
                repetition_penalty=float(np.max(self.settings.repetition_penalty)),
                eos_id=eos,
                pad_id=pad,
                sizes=sizes,
            )
            ids = [t[0][: n[0]].tolist() for t, n in zip(best.tokens, best.lengths, strict=True)]
            ends = set(self.tokenizer.stop_ids)
            ended = [bool(x) and x[-1] in ends for x in ids]
            return [
                Written(self._decode(x[:-1] if end else x), len(x), "eos" if end else "length")
                for x, end in zip(ids, ended, strict=True)
            ]
        first = 0 if self.settings.seed is None else int(np.max(self.settings.seed))
        settings = dataclasses.replace(self.settings, seed=[first + int(i) for i in rows])
        made = self._run(
            params,
            batch,
            settings,
            eos_id=eos,
            pad_id=pad,
            stop=self._stop,
            decode=self._decode,
            key=jax.random.key(0),
            **options,
        )
        assert made.texts is not None
        return [
            Written(*said)
            for said in zip(made.texts, map(int, made.lengths), made.reasons, strict=True)
        ]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def _right(prompts: Sequence[np.ndarray], pad: int) -> dict[str, np.ndarray]:
    """Sources as a batch that is padded on the right."""
    width = max(map(len, prompts))
    mask = (np.arange(width) < np.array([[len(p)] for p in prompts])).astype(np.int32)
    ids = np.full(mask.shape, pad, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return {"input_ids": ids, "attention_mask": mask}
