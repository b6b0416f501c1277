"""Settings of the commands that write texts: ``steppe generate`` and ``steppe chat``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SamplingConfig:
    """How texts are written; the defaults take the most probable token each time.

    Attributes:
      max_new_tokens: most tokens of a text.
      temperature: 0 = greedy; above, samples.
      top_k: sample among the k most probable tokens; 0 = all.
      top_p: sample among the most probable tokens of this total probability; 1 = all.
      min_p: sample among tokens at least this probable relative to the best one.
      repetition_penalty: above 1, tokens that were there already become less probable.
      stop: texts end before any of these strings (backslash n is a new line).
      seed: of the samples; prompt number i has the seed ``seed + i``.
      dtype: of the parameters and of the computation.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if not all(self.stop):
            raise ValueError("stop must not be empty: every text ends before an empty string")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, with new lines and tabs as such."""
        return tuple(s.replace("\\n", "\n").replace("\\t", "\t") for s in self.stop)


@dataclass(frozen=True)
class GenerateConfig(SamplingConfig):
    """``steppe generate``: go on with prompts, answer them, or translate them.

    Attributes:
      model: run folder, model folder, file of weights, or ``asset:NAME``.
      prompt: one text; what is written for it appears as it is written. None = not given.
      prompts: file of several: one a line, or ``.jsonl`` with a column of them.
      column: of that file; a chat may stand there as a list of messages.
      chat: prompts are what a user says, put into the model's chat template.
      system: the system message of such chats.
      template: of such chats: ``chatml`` or Jinja source; None = the model's own.
      prefix: put in front of every prompt, as T5 wants ("translate English to German: ").
      beams: above 1 = beam search in place of greedy; 64 at most.
      batch_size: prompts that are gone on with at once.
      out: file for the texts as JSON lines; without it those of a file go to the terminal.
    """

    model: str = ""
    prompt: str | None = None
    prompts: str = ""
    column: str = "prompt"
    chat: bool = False
    system: str = ""
    template: str | None = None
    prefix: str = ""
    beams: int = 1
    batch_size: int = 8
    out: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.beams <= 64:
            raise ValueError(f"beams must be 1 to 64, got {self.beams}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")


@dataclass(frozen=True)
class ChatConfig(SamplingConfig):
    """``steppe chat``: talk to a model.

    Attributes:
      model: run folder, model folder, file of weights, or ``asset:NAME``.
      system: the system message.
      template: ``chatml`` or Jinja source; None = the model's own.
    """

    model: str = ""
    system: str = ""
    template: str | None = None
    max_new_tokens: int = 256
