"""``steppe chat``: a conversation with a model, in a terminal or through a pipe.

Answers appear as they are written. Ctrl-C ends an answer, not the chat; the end of the input
ends the chat. The conversation is kept as far as it fits into the model's context.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

import numpy as np

from steppe.data import chat
from steppe.data.text import Tokenizer
from steppe.launch import generate, opening, writing
from steppe.launch.sampling import ChatConfig

HELP = "/reset forgets the conversation, /system TEXT sets the system message, /quit ends"


@dataclass
class Conversation:
    """The turns so far, and how they become a prompt.

    Attributes:
      tokenizer: has the chat template.
      room: tokens that a prompt may have.
      system: the system message; empty = what the template does without one.
      turns: messages of user and assistant, oldest first.
      template: Jinja source or a name; None = the tokenizer's own.
    """

    tokenizer: Tokenizer
    room: int
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    template: str | None = None

    def prompt(self, said: str) -> tuple[np.ndarray, int]:
        """Adds what the user said; token ids of the whole, and how many turns were dropped.

        The oldest turns go first, a question always with its answer.

        Raises:
          ValueError: what was said does not fit even alone; the conversation stays as it was.
        """
        turns = [*self.turns, {"role": "user", "content": said}]
        dropped = 0
        while True:
            head = [{"role": "system", "content": self.system}] if self.system else []
            ids = chat.encode_prompt(self.tokenizer, [*head, *turns], template=self.template)
            if len(ids) <= self.room:
                self.turns = turns
                return np.asarray(ids, np.int32), dropped
            if len(turns) == 1:
                raise ValueError(
                    f"that has {len(ids)} tokens with its template, the context leaves "
                    f"{self.room}; say less, or lower max_new_tokens"
                )
            dropped += 1
            turns = turns[1:]
            while turns[0]["role"] == "assistant":
                turns = turns[1:]

    def answer(self, text: str) -> None:
        """Adds what the model said; nothing said is taken as nothing asked."""
        if text.strip():
            self.turns.append({"role": "assistant", "content": text})
        elif self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()


def run(config: ChatConfig, source: TextIO | None = None, target: TextIO | None = None) -> int:
    """The whole command; returns the exit status.

    Args:
      source, target: in place of standard input and output.

    Raises:
      ValueError: a model that writes no text or is no decoder, a missing chat template, a
        setting out of range.
    """
    if source is None:
        source = sys.stdin
        if isinstance(source, io.TextIOWrapper):
            source.reconfigure(errors="surrogateescape")  # refused turn by turn, not at once
    target = sys.stdout if target is None else target
    settings = generate.settings(config)
    writing.check_settings(settings, config.stops)
    opened = opening.open_writer(config.model, config.dtype)
    if opened.kind != "decoder":
        raise ValueError(f"chat is for decoders; {config.model} is of kind {opened.kind}")
    template = generate.template(config, opened.tokenizer)
    writer = writing.Writer(opened.model, opened.tokenizer, settings, stop=config.stops)
    limit = writer.limit or 2**20
    room = limit - writer.more
    if room < 1:
        raise ValueError(
            f"max_new_tokens={writer.more} leaves no room in the model's {limit} positions"
        )
    talk = Conversation(opened.tokenizer, room, config.system, template=template)
    terminal = source.isatty() and target.isatty()
    if terminal:
        target.write(f"{config.model}: {HELP}\n")
    while True:
        try:
            line = _line(source, target, terminal)
        except KeyboardInterrupt:
            target.write("\n/quit, or the end of the input (Ctrl-D), ends the chat\n")
            continue
        if line is None:
            return 0
        if not line.strip():
            continue
        if line.startswith("/"):
            if _command(line, talk, target):
                return 0
            continue
        _turn(line, talk, writer, opened.params, target)


def _line(source: TextIO, target: TextIO, terminal: bool) -> str | None:
    """The next line, or None at the end of the input."""
    if terminal:
        try:
            return input("> ")  # with the line editing of the terminal
        except EOFError:
            target.write("\n")
            return None
    line = source.readline()
    return line.rstrip("\n") if line else None


def _command(line: str, talk: Conversation, target: TextIO) -> bool:
    """Whether the command ends the chat."""
    name, _, rest = line.partition(" ")
    if name == "/quit":
        return True
    if name == "/reset":
        talk.turns.clear()
        target.write("(the conversation is forgotten)\n")
    elif name == "/system":
        talk.system = rest.strip()
        talk.turns.clear()
        what = "set" if talk.system else "removed"
        target.write(f"(the system message is {what}, the conversation begins anew)\n")
    else:
        target.write(f"({name} is no command; {HELP})\n")
    target.flush()
    return False


def _turn(
    line: str, talk: Conversation, writer: writing.Writer, params: Any, target: TextIO
) -> None:
    try:
        ids, dropped = talk.prompt(line)
    except ValueError as error:
        target.write(f"({error})\n")
        target.flush()
        return
    if dropped:
        turns = "the oldest turn" if dropped == 1 else f"the {dropped} oldest turns"
        target.write(f"({turns} no longer fit into the context and are forgotten)\n")
    pieces: list[str] = []
    show = _shower(pieces, target)
    try:
        writer.stream(params, ids, show)
    except KeyboardInterrupt:
        target.write(" (stopped)")
    talk.answer("".join(pieces).strip())
    target.write("\n")
    target.flush()


def _shower(pieces: list[str], target: TextIO) -> Callable[[str], None]:
    def show(piece: str) -> None:
        pieces.append(piece)
        target.write(piece)
        target.flush()

    return show
