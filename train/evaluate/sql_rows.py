"""The rows of a made database: witnesses of queries, then seeded filler. See ``sql_database``.

A *witness* of a query is one row of each of its tables in which its conditions hold, or all but
one of them. Columns that a foreign key or a join of a query ties together form a domain: in a
witness they have one value, so that the rows join. For ``HAVING count(*) > n`` there are groups
of n - 1, n and n + 1 witnesses that differ in the keys of one table only; several constants of
one column give one witness each.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from steppe.train.evaluate import sql_text
from steppe.train.evaluate.sql_text import Condition, Token

Value: TypeAlias = str | int | float | None
Column: TypeAlias = tuple[int, str, bool]  # table, name, whether it is a text

MOST = 12  # kinds of witnesses of one SELECT, and the largest group of them
NULLS = 0.04  # share of NULL in the filler of columns that are no key
WORDS = (
    "Alder", "Birch", "Cedar", "Dogwood", "Elm", "Fir", "Ginkgo", "Hazel", "Ivy", "Juniper",
    "Larch", "Maple", "Oak", "Pine", "Rowan", "Spruce", "Tamarack", "Willow", "Yew", "Zelkova",
)  # fmt: skip


class Row(NamedTuple):
    """Values by column, and the columns whose value a query asks for."""

    values: dict[int, Value]
    fixed: set[int]


class Rows:
    """The rows of all tables while they grow.

    Args:
      columns: of all tables.
      primary: columns that are a key by themselves.
      foreign: pairs (column, the column that it points at).
      seed: of everything that is drawn.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        primary: frozenset[int],
        foreign: Sequence[tuple[int, int]],
        *,
        seed: int,
    ) -> None:
        self.columns, self.foreign = columns, list(foreign)
        self._random = random.Random(seed)
        targets, pointing = {b for _, b in foreign}, {a for a, _ in foreign}
        # Of a key of several columns, such as (concert, singer), schemas list the first only.
        self.unique = targets | (set(primary) - pointing)
        self._rows: list[list[Row]] = [[] for _ in range(max(t for t, _, _ in columns) + 1)]
        self._witnesses = [0] * len(self._rows)  # how many of the rows they are
        self._index: dict[tuple[int, Value], Row] = {}
        self._domain = list(range(len(columns)))
        self._tied: set[int] = set()
        for a, b in foreign:
            self._tie(a, b)
        self._fresh: dict[int, int] = {}
        self._wanted: dict[int, list[Value]] = {}

    # Reading queries -------------------------------------------------------------------------

    def read(self, tables: Sequence[str], queries: Sequence[str]) -> None:
        """Makes the witnesses."""
        names = {name.lower(): number for number, name in enumerate(tables)}
        asked = []
        for query in dict.fromkeys(queries):
            for part in sql_text.parts(sql_text.tokens(query)):
                scope: dict[str, list[int]] = {}
                for table, alias in sql_text.sources(part):
                    if table in names:
                        scope.setdefault(alias, []).append(names[table])
                asked.append((query, part, scope))
        # All ties and constants first: they decide what a domain is and what its values are.
        for _, part, scope in asked:
            for left, right in sql_text.joins(part):
                for a, b in zip(self._resolve(left, scope), self._resolve(right, scope)):
                    self._tie(a, b)
        for _, part, scope in asked:
            for condition in sql_text.conditions(part):
                for column in self._resolve(condition.column, scope):
                    values = [*_inside(condition), *condition.constants, *_beside(condition)]
                    if condition.comparison == "like":
                        values = [v for v in values if v not in condition.constants]
                    held = self._wanted.setdefault(column, [])
                    held.extend(self._as(column, v) for v in values)
        base: dict[tuple[str, int], Value] = {}
        for query, part, scope in asked:
            self._witness(query, part, scope, base)

    def _witness(
        self,
        query: str,
        part: Sequence[Token],
        scope: Mapping[str, list[int]],
        base: dict[tuple[str, int], Value],
    ) -> None:
        used = list(dict.fromkeys(t for held in scope.values() for t in held))
        inside: dict[int, list[Value]] = {}
        beside: dict[int, list[Value]] = {}
        sizes = [1]
        for condition in sql_text.conditions(part):
            if condition.column.startswith("count("):
                n = next((v for v in condition.constants if isinstance(v, int)), 1)
                sizes = [size for size in (n - 1, n, n + 1) if 1 <= size <= MOST] or [1]
            for column in self._resolve(condition.column, scope):
                for held, made in ((inside, _inside(condition)), (beside, _beside(condition))):
                    held.setdefault(column, []).extend(self._as(column, v) for v in made)
        several = max([1, *map(len, inside.values())])
        turns = [
            {c: values[turn % len(values)] for c, values in inside.items() if values}
            for turn in range(several)
        ]
        # One condition after the other just fails, while the others hold.
        turns += [{**turns[0], c: value} for c, values in beside.items() for value in values]
        own = [c for c, (table, _, _) in enumerate(self.columns) if table in used]
        spread: dict[int, set[int]] = {}
        for column in own:
            if self._is_key(column):
                spread.setdefault(self._root(column), set()).add(self.columns[column][0])
        # Where two columns of a table point at one key (from, to), the one that the query does
        # not join has a key of its own: else nobody could tell them apart.
        joined = {c for pair in sql_text.joins(part) for n in pair for c in self._resolve(n, scope)}
        places = [(self.columns[c][0], self._root(c)) for c in own]
        lone = {
            c
            for c, place in zip(own, places, strict=True)
            if places.count(place) > 1 and c not in joined and c not in self.unique
        }
        for fixed in turns[:MOST]:
            for size in sizes:
                shared: dict[int, Value] = {}
                for column, value in fixed.items():
                    if self._is_key(column):
                        shared.setdefault(self._root(column), value)
                for domain, tables in spread.items():
                    if len(tables) > 1 and domain not in shared:
                        shared[domain] = self._new(domain)
                for _ in range(size):
                    alone: dict[int, Value] = {}
                    for table in used:
                        values = {
                            c: self._witness_value(query, c, fixed, shared, alone, base)
                            for c in own
                            if self.columns[c][0] == table and (c in fixed or c not in lone)
                        }
                        self._add(table, Row(values, set(fixed) & set(values)))

    def _witness_value(
        self,
        query: str,
        column: int,
        fixed: Mapping[int, Value],
        shared: Mapping[int, Value],
        alone: dict[int, Value],
        base: dict[tuple[str, int], Value],
    ) -> Value:
        """A value that the query asks for, else the key of the witness, else one of the query.

        Args:
          fixed: values of columns under a condition.
          shared: keys of the domains that several tables of the query have.
          alone: keys of the domains that only one table has, new for every witness.
          base: values of all other columns, the same for all witnesses of a query, so that an
            INTERSECT of its parts is not empty.
        """
        if column in fixed:
            return fixed[column]
        domain = self._root(column)
        if domain in shared:
            return self._as(column, shared[domain])
        if self._is_key(column):
            if domain not in alone:
                alone[domain] = self._new(domain)
            return self._as(column, alone[domain])
        if (query, column) not in base:
            base[query, column] = self._draw(column)
        return base[query, column]

    def _resolve(self, name: str, scope: Mapping[str, list[int]]) -> list[int]:
        """The columns that a name can mean: of its alias, or of all tables of the query."""
        alias, _, short = name.rpartition(".")
        held = scope.get(alias, []) if alias else [t for group in scope.values() for t in group]
        found = {t: c for c, (t, column, _) in enumerate(self.columns) if column.lower() == short}
        return [found[table] for table in dict.fromkeys(held) if table in found]

    # Filling ---------------------------------------------------------------------------------

    def fill(self, rows: int) -> None:
        """Adds filler to every table, and the rows that foreign keys point at."""
        self._witnesses = [len(held) for held in self._rows]
        for table in range(len(self._rows)):
            for _ in range(rows):
                values = {c: self._new(self._root(c)) for c in self._of(table) if c in self.unique}
                values = {c: self._as(c, v) for c, v in values.items()}
                self._add(table, Row(dict(values), set()))
        # Only now are all values of the keys known that others may point at.
        for table in range(len(self._rows)):
            for row in self._rows[table]:
                for column in self._of(table):
                    if column not in row.values:
                        row.values[column] = self._fill_in(column)
        for _ in range(len(self._rows) + 1):  # a row that is added may point at another one
            if not sum(self._mend(a, b) for a, b in self.foreign):
                break

    def _fill_in(self, column: int) -> Value:
        if not self._is_key(column):
            return None if self._random.random() < NULLS else self._draw(column)
        pool = self._pool(self._root(column))
        return self._as(column, pool[self._skewed(len(pool))])

    def _mend(self, column: int, target: int) -> int:
        """Adds the rows that ``column`` points at and that do not exist; their number."""
        table = self.columns[target][0]
        missing = {
            self._as(target, row.values[column])
            for row in self._rows[self.columns[column][0]]
            if row.values[column] is not None
        }
        missing = {v for v in missing if (target, v) not in self._index}
        for value in sorted(missing, key=str):
            values: dict[int, Value] = {target: value}
            for other in self._of(table):
                if other == target:
                    continue
                if other in self.unique:
                    values[other] = self._as(other, self._new(self._root(other)))
                else:
                    values[other] = self._fill_in(other)
            self._add(table, Row(values, {target}))
        return len(missing)

    def tables(self) -> list[list[list[Value]]]:
        """Rows of every table, in a seeded order, their values in the order of the columns."""
        out = []
        for table, held in enumerate(self._rows):
            order = self._of(table)
            rows = [[row.values[c] for c in order] for row in held]
            self._random.shuffle(rows)
            out.append(rows)
        return out

    # Values ----------------------------------------------------------------------------------

    def _add(self, table: int, row: Row) -> None:
        for column in self.unique & set(row.values):
            old = self._index.get((column, row.values[column]))
            if old is not None:  # a row with that key: it may take over what a query asks for
                for c in row.fixed - old.fixed - self.unique:
                    old.values[c] = row.values[c]
                    old.fixed.add(c)
                return
        self._rows[table].append(row)
        for column in self.unique & set(row.values):
            self._index[column, row.values[column]] = row

    def _of(self, table: int) -> list[int]:
        return [c for c, (t, _, _) in enumerate(self.columns) if t == table]

    def _is_key(self, column: int) -> bool:
        return column in self.unique or column in self._tied

    def _tie(self, a: int, b: int) -> None:
        self._domain[self._root(a)] = self._root(b)
        self._tied |= {a, b}

    def _root(self, column: int) -> int:
        while self._domain[column] != column:
            column = self._domain[column]
        return column

    def _members(self, domain: int) -> list[int]:
        return [c for c in range(len(self.columns)) if self._root(c) == domain]

    def _pool(self, domain: int) -> list[Value]:
        """Keys that filler may point at: those of filler, so that groups of witnesses keep
        their sizes."""
        members = self._members(domain)
        targets = [c for c in members if c in self.unique] or members
        found: dict[Value, None] = {}
        for column in targets:
            table = self.columns[column][0]
            for row in self._rows[table][self._witnesses[table] :]:
                if row.values.get(column) is not None:
                    found[row.values[column]] = None
        return list(found) or [self._new(domain) for _ in range(6)]

    def _new(self, domain: int) -> Value:
        """A key that was not given out before, and that no query names."""
        named = {str(v) for c in self._members(domain) for v in self._wanted.get(c, ())}
        text = all(self.columns[c][2] for c in self._members(domain))
        while True:
            number = self._fresh[domain] = self._fresh.get(domain, 0) + 1
            value = f"{WORDS[number % len(WORDS)]} {number}" if text else number
            if str(value) not in named:
                return value

    def _draw(self, column: int) -> Value:
        """A value of a column that is no key: one that queries ask for, or filler."""
        asked = self._wanted.get(column, [])
        if asked and self._random.random() < 0.5:
            return asked[self._skewed(len(asked))]
        _, name, text = self.columns[column]
        if "date" in name.lower() or "time" in name.lower():
            day, hour = self._random.randrange(1, 29), self._random.randrange(24)
            month, year = self._random.randrange(1, 13), self._random.randrange(1990, 2020)
            return f"{year}-{month:02d}-{day:02d} {hour:02d}:00:00"
        if text:
            return WORDS[self._skewed(len(WORDS))]
        numbers = [v for v in asked if isinstance(v, int | float)]
        low, high = (min(numbers), max(numbers)) if numbers else (1, 100)
        if not numbers and "year" in name.lower():
            low, high = 1990, 2020
        reach = max(5.0, (high - low) / 4)
        return self._random.randint(int(max(low - reach, min(low, 0))), int(high + reach))

    def _skewed(self, size: int) -> int:
        """A place, the first ones more often."""
        return int(size * self._random.random() ** 2)

    def _as(self, column: int, value: Value) -> Value:
        """The value as the column would hold it."""
        if value is None:
            return None
        if self.columns[column][2]:
            return str(value)
        return _number(value) if isinstance(value, str) else value


def _number(text: str) -> Value:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text


def _inside(condition: Condition) -> Iterator[Value]:
    """Values for which the condition holds (or, after NOT, does not)."""
    for value in condition.constants:
        if condition.comparison in ("<", ">"):
            yield _step(value, 1 if condition.comparison == ">" else -1)
        elif condition.comparison == "like":
            for word in ("Ash", "Elk"):
                yield str(value).replace("%", word).replace("_", word[0])
        elif condition.comparison == "!=":
            yield _other(value)
        else:
            yield value


def _beside(condition: Condition) -> Iterator[Value]:
    """Values for which it does not hold, as near to the others as can be."""
    first, last = condition.constants[0], condition.constants[-1]
    kind = condition.comparison
    if kind in ("<", ">", "!="):
        yield first
    elif kind in ("<=", ">="):
        yield _step(first, 1 if kind == "<=" else -1)
    elif kind == "between":
        yield _step(first, -1)
        yield _step(last, 1)
    else:
        yield _other(first)


def _other(value: str | int | float) -> Value:
    """Another value of its kind."""
    if isinstance(value, str) and isinstance(_number(value), str):
        return WORDS[len(value) % len(WORDS)]
    return _step(value, 1)


def _step(value: str | int | float, sign: int) -> Value:
    """The next larger or smaller value, roughly."""
    number = _number(value) if isinstance(value, str) else value
    if isinstance(number, int | float):
        moved = number + sign
        return str(moved) if isinstance(value, str) else moved
    return f"{value}~" if sign > 0 else str(value)[:-1]
