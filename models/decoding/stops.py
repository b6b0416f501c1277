"""Stop strings and streamed text: what needs text instead of tokens, on the host.

A stop string may begin in the middle of a token and end in the middle of another, so the text
of a row is decoded again with every token and cut at the first match in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Decoder = Callable[[list[int]], str]
# What decoders write for bytes that are no character yet.
UNFINISHED = "\ufffd"


def check(stop: Sequence[str] | str, decode: Decoder | None) -> tuple[str, ...]:
    """The stop strings as a tuple.

    Raises:
      ValueError: an empty stop string, or stop strings without ``decode``.
    """
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(
                f"stop must hold strings of at least one character, got {string!r}: an empty "
                "string would end every text before its first token; leave it out"
            )
    if strings and decode is None:
        raise ValueError("stop strings are matched in text: give decode, (token ids) -> str")
    return strings


def find(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins in ``text``; None if there is none."""
    places = [at for at in (text.find(string) for string in stop) if at >= 0]
    return min(places) if places else None


class Matcher:
    """Finds the token with which each row's text first holds a stop string.

    The answer for a row depends on its tokens alone, not on how many arrive at a time.

    Attributes:
      lengths: tokens up to the one that completed the stop string, [B]; -1 = not stopped.
      texts: the text before the stop string; None where not stopped.
    """

    def __init__(
        self, stop: Sequence[str], decode: Decoder, rows: int, eos: Sequence[int] = ()
    ) -> None:
        self.stop = tuple(stop)
        self.decode = decode
        self.lengths = np.full(rows, -1, np.int32)
        self.texts: list[str | None] = [None] * rows
        self._eos = frozenset(int(i) for i in eos)
        self._read = np.zeros(rows, np.int64)

    def update(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Reads the tokens [B, N] of which ``lengths`` are there; bool [B], rows stopped."""
        for row in np.flatnonzero(self.lengths < 0):
            for length in range(int(self._read[row]) + 1, int(lengths[row]) + 1):
                if int(tokens[row, length - 1]) in self._eos:
                    continue
                text = self.decode(tokens[row, :length].tolist())
                at = find(text, self.stop)
                if at is not None:
                    self.lengths[row], self.texts[row] = length, text[:at]
                    break
            self._read[row] = lengths[row]
        return self.lengths >= 0


class TextStream:
    """Text of one row, piece by piece, as its tokens arrive.

    Held back are bytes that do not form a character yet, and an end that may turn out to be
    the beginning of a stop string.

    Attributes:
      stopped: whether a stop string was met; nothing more comes then.
    """

    def __init__(self, decode: Decoder, stop: Sequence[str] | str = ()) -> None:
        self.stopped = False
        self._stop = check(stop, decode)
        self._decode = decode
        self._tokens: list[int] = []
        self._sent = 0

    def push(self, *tokens: int) -> str:
        """Adds tokens; the new text that is certain."""
        if self.stopped:
            return ""
        self._tokens += [int(t) for t in tokens]
        text = self._decode(self._tokens)
        at = find(text, self._stop)
        if at is not None:
            self.stopped = True
            return self._send(text[:at])
        if text.endswith(UNFINISHED):
            return ""
        return self._send(text[: len(text) - self._held(text)])

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
        return "" if self.stopped else self._send(self._decode(self._tokens))

    def _send(self, text: str) -> str:
        piece = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return piece

    def _held(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-size:]) for s in self._stop):
                return size
        return 0
