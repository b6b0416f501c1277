"""SQL as text: tokens, a normal form to compare, the order and the constants that a query asks for.

The tokens are those of SQLite: ``'text'``, ``"name or text"``, ``[name]``, `` `name` ``, numbers,
words, operators; comments and white space are dropped. Nothing here checks the grammar: whether
a query is valid is for the database to say (see ``sql``).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

_TOKEN = re.compile(
    r"""
    (?P<space>\s+|--[^\n]*|/\*.*?(?:\*/|\Z))
  | (?P<blob>[xX]'[0-9a-fA-F]*')
  | (?P<text>'(?:[^']|'')*')
  | (?P<quoted>"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^\]]*\])
  | (?P<number>0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
  | (?P<word>[^\W\d][\w$]*)
  | (?P<sign>\|\||<>|!=|==|<=|>=|<<|>>|->>|->|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_SAME = {"<>": "!=", "==": "="}
# Words that change nothing: the default direction, and the long spellings of joins.
_SILENT = {"as", "asc", "inner", "outer"}
COMPARISONS = ("=", "!=", "<", ">", "<=", ">=", "like", "between", "in")
_SETS = ("union", "intersect", "except")


class Token(NamedTuple):
    """A token.

    Attributes:
      kind: ``word`` (lower case), ``quoted``, ``text``, ``number``, ``blob`` or ``sign``.
      value: without quotation marks.
      depth: how many parentheses are open around it; a parenthesis counts as outside.
    """

    kind: str
    value: str
    depth: int


class Condition(NamedTuple):
    """``column comparison constant`` in a query; column as it is written, alias included."""

    column: str
    comparison: str
    constants: tuple[str | int | float, ...]


def tokens(query: str) -> list[Token]:
    """The tokens of a query, without comments and a final semicolon."""
    found: list[Token] = []
    depth = 0
    for match in _TOKEN.finditer(query):
        kind, value = match.lastgroup or "sign", match.group()
        if kind == "space":
            continue
        if kind == "word":
            value = value.lower()
        elif kind in ("text", "quoted"):
            mark = value[-1]
            value = value[1:-1].replace(mark * 2, mark) if mark != "]" else value[1:-1]
        if value == ")" and kind == "sign":
            depth = max(depth - 1, 0)
        found.append(Token(kind, value, depth))
        if value == "(" and kind == "sign":
            depth += 1
    while found and found[-1][:2] == ("sign", ";"):
        found.pop()
    return found


def normalise(query: str) -> str:
    """The text that :func:`exact_match` compares.

    Words are in lower case (what stands in quotation marks keeps its case), spaces single, both
    kinds of quotation marks alike (SQLite reads ``"x"`` as a text where no column has that
    name), ``<>`` is ``!=`` and ``==`` is ``=``; comments, a final semicolon, and the words AS,
    ASC, INNER, OUTER are dropped. Names of aliases and the order of conditions count.
    """
    out = []
    for kind, value, _ in tokens(query):
        if kind == "word" and value in _SILENT:
            continue
        if kind in ("text", "quoted"):
            value = "'" + value.replace("'", "''") + "'"
        out.append(_SAME.get(value, value) if kind == "sign" else value)
    return " ".join(out)


def exact_match(prediction: str, gold: str) -> float:
    """1.0 if the queries are equal after :func:`normalise`, else 0.0."""
    return float(normalise(prediction) == normalise(gold))


def is_ordered(query: str) -> bool:
    """Whether the result has an order: an ORDER BY outside all parentheses."""
    top = [t.value for t in tokens(query) if t.depth == 0 and t.kind == "word"]
    return any(a == "order" and b == "by" for a, b in itertools.pairwise(top))


def parts(found: Sequence[Token]) -> list[list[Token]]:
    """The SELECTs that UNION, INTERSECT and EXCEPT join, whatever parentheses are around."""
    out: list[list[Token]] = [[]]
    for token in found:
        if token.kind == "word" and token.value in _SETS:
            out.append([])
        else:
            out[-1].append(token)
    return [part for part in out if part]


def sources(found: Sequence[Token]) -> list[tuple[str, str]]:
    """(table, alias) of every table after FROM, JOIN or a comma, in lower case; the alias of a
    table without one is its name."""
    out = []
    reading: int | None = None  # depth of the FROM clause that we are in
    for i, (kind, value, depth) in enumerate(found):
        opens = kind == "word" and value in ("from", "join")
        if opens:
            reading = depth
        elif kind == "word" and value in ("where", "group", "order", "having", "limit"):
            reading = None
        opens = opens or (kind == "sign" and value == "," and reading == depth)
        if not opens or i + 1 >= len(found) or found[i + 1].kind not in ("word", "quoted"):
            continue
        table = alias = found[i + 1].value.lower()
        after = [t.value if t.kind == "word" else "" for t in found[i + 2 : i + 4]]
        if len(after) == 2 and after[0] == "as":
            alias = found[i + 3].value.lower()
        elif after and after[0] and after[0] not in _AFTER_TABLE:
            alias = after[0]
        out.append((table, alias))
    return out


_AFTER_TABLE = {
    "as", "join", "on", "where", "group", "order", "having", "limit", "union", "intersect",
    "except", "left", "right", "full", "inner", "outer", "cross", "natural", "using",
}  # fmt: skip


def conditions(found: Sequence[Token]) -> list[Condition]:
    """Every ``column comparison constant``; ``count(*) > 3`` has the column ``count(*)``."""
    out = []
    for i, token in enumerate(found):
        word = token.value if token.kind in ("word", "sign") else ""
        comparison = _SAME.get(word, word)
        if comparison not in COMPARISONS or i == 0:
            continue
        end = i - 1
        if found[end].value == "not":
            end -= 1
        column = _column(found, end)
        if column is None:
            continue
        values: list[str | int | float] = []
        at = i + 1
        if comparison == "in":
            at += 1
        while at < len(found):
            value, at = _constant(found, at)
            if value is None:
                break
            values.append(value)
            joined = at < len(found) and found[at].value == ("," if comparison == "in" else "and")
            if not joined or comparison not in ("in", "between") or len(values) == 64:
                break
            at += 1
            if comparison == "between" and len(values) == 2:
                break
        if values:
            out.append(Condition(column, comparison, tuple(values)))
    return out


def joins(found: Sequence[Token]) -> list[tuple[str, str]]:
    """The pairs of columns of ``a.x = b.y``, as they are written."""
    out = []
    for i, token in enumerate(found):
        if token.kind != "sign" or token.value not in ("=", "=="):
            continue
        left, right = _column(found, i - 1), None
        if i + 3 < len(found) and found[i + 2].value == ".":
            right = _column(found, i + 3)
        if left is not None and right is not None and "." in left and "(" not in left:
            out.append((left, right))
    return out


def _column(found: Sequence[Token], end: int) -> str | None:
    """The column whose last token is ``end``, in lower case, or an aggregate over one."""
    if end < 0:
        return None
    if found[end].value == ")" and found[end].kind == "sign":
        start = end - 1
        while start > 0 and found[start].value != "(":
            start -= 1
        if start > 0 and found[start - 1].value in ("count", "sum", "avg", "min", "max"):
            return "".join(t.value.lower() for t in found[start - 1 : end + 1])
        return None
    if found[end].kind not in ("word", "quoted"):
        return None
    name = found[end].value.lower()
    if end >= 2 and found[end - 1].value == "." and found[end - 2].kind in ("word", "quoted"):
        return f"{found[end - 2].value.lower()}.{name}"
    return name


def _constant(found: Sequence[Token], at: int) -> tuple[str | int | float | None, int]:
    """The constant at a place and the place after it."""
    sign = ""
    if at < len(found) and found[at].kind == "sign" and found[at].value in "+-":
        sign, at = found[at].value, at + 1
    if at >= len(found):
        return None, at
    kind, value, _ = found[at]
    if kind == "number" and not value.lower().startswith("0x"):
        number = float(sign + value)
        whole = number.is_integer() and "." not in value and abs(number) < 2**53
        return (int(number) if whole else number), at + 1
    dotted = at + 1 < len(found) and found[at + 1].value == "."
    if kind in ("text", "quoted") and not sign and not dotted:
        return value, at + 1
    return None, at
