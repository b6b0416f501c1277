"""Plain text for the terminal: wrapped on words to its width, paragraph by paragraph."""

from __future__ import annotations

import shutil
import textwrap

# Wider lines are hard to read, however wide the terminal is.
MOST = 100


def columns() -> int:
    """Characters a line: the terminal's (or ``$COLUMNS``; 80 where neither is known), at most
    :data:`MOST`."""
    return min(shutil.get_terminal_size().columns, MOST)


def fill(text: str, first: str = "", rest: str | None = None) -> str:
    """One paragraph, never broken inside a word: a word longer than the line stands out.

    Args:
      text: words; line breaks count as spaces.
      first: put in front of the first line.
      rest: of the others; None = as many spaces as ``first`` has characters.
    """
    return textwrap.fill(
        " ".join(text.split()),
        columns(),
        initial_indent=first,
        subsequent_indent=" " * len(first) if rest is None else rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def reflow(text: str) -> str:
    """A docstring with its paragraphs filled again.

    Paragraphs with an indented line (equations, tables, lists, code) stay as they are.
    """
    blocks: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    kept = (any(line[0].isspace() for line in block) for block in blocks if block)
    return "\n\n".join(
        "\n".join(block) if as_is else fill(" ".join(block))
        for block, as_is in zip(filter(None, blocks), kept, strict=True)
    )
