"""Which values meet in one call: a plan of few cases in which every legal pair of notable values meets.

A port is often right for each value and wrong for two together. A plan is a covering array, built greedily: every case
is chosen to bring together as many pairs as possible that none before it did, so that its first cases cover most. Ties
are decided by the seed of the run. What a run really tried is counted from its calls (`Cover.labels`), not from a plan.
What is chosen for a call of decode and of expert parallelism say `hal_conformance.cover_mla` and
`hal_conformance.cover_ep`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any, Final, Generic, TypeVar

OTHER: Final = "other"
"""Stands for every declared value that is not notable."""

MOST_CASES: Final = 400
"""Cases of a plan at most; what they leave out is said in the report."""

_FULL: Final = 4
"""Plans of a full run."""

_CANDIDATES: Final = 4
"""Cases built for each place of the plan, of which the best is kept."""

Case = TypeVar("Case")

Pair = tuple[str, str, str, str]
"""A factor and its value, and another factor and its value; in the order of the factors."""

Labels = tuple[str, ...]
"""A value for each factor, in order."""


@dataclass(frozen=True, slots=True)
class Factor(Generic[Case]):
    """One thing that is chosen for a call.

    Attributes
    ----------
    name : str
    values : tuple of str
        What is notable of it.
    of : callable
        Which of them a case has.
    size : callable
        By how much a value at least multiplies the elements of a case.
    """

    name: str
    values: tuple[str, ...]
    of: Callable[[Case], str]
    size: Callable[[str], int] = lambda value: 1


@dataclass(frozen=True, slots=True, eq=False)
class Cover(Generic[Case]):
    """Everything that is chosen for one kind of call, as far as a backend declares it.

    Attributes
    ----------
    factors : tuple of Factor
        With at least one value each.
    allowed : callable
        Whether a call may have these values, of some factors or of all, by their names.
    elements : int
        How large a planned case may be, by the sizes of its factors: several large sizes at once take long and show no
        more than each two.
    first : tuple of str
        Factors that decide what others may be, and are chosen before them, so that no choice has to be taken back late.
    """

    factors: tuple[Factor[Case], ...]
    allowed: Callable[[Mapping[str, str]], bool]
    elements: int
    first: tuple[str, ...] = ()

    def labels(self, case: Case) -> Labels:
        """What a case has of each factor."""
        return tuple(factor.of(case) for factor in self.factors)

    def chosen(self, row: Labels) -> dict[str, str]:
        """The values of a row by the names of their factors."""
        return {factor.name: value for factor, value in zip(self.factors, row, strict=True)}

    def values(self) -> dict[str, tuple[str, ...]]:
        """What is notable, by the name of the factor."""
        return {factor.name: factor.values for factor in self.factors}

    def pairs_of(self, row: Labels) -> set[Pair]:
        """The pairs that meet in one case, as far as they are notable."""
        named = [(f.name, value) for f, value in zip(self.factors, row, strict=True) if value in f.values]
        return {(*one, *other) for one, other in combinations(named, 2)}

    def legal_pairs(self) -> tuple[Pair, ...]:
        """Every pair of values of two factors that some legal call has."""
        return _legal_pairs(self)

    def plan(self, seed: str) -> tuple[Labels, ...]:
        """Cases, as values of each factor, in which every legal pair meets; the seed decides which, and their order."""
        return _plan(self, seed)

    def count(self, seed: int, mode: str, quick: int) -> int:
        """How many cases a run makes: one plan, its first ``quick`` ones, or the several plans of a full run."""
        every = sum(len(self.plan(f"{seed}/{turn}")) for turn in range(_FULL if mode == "full" else 1))
        return min(every, quick) if mode == "quick" else every

    def row(self, seed: int, index: int) -> Labels:
        """What case ``index`` of a run is to be."""
        turn = 0
        while index >= len(self.plan(f"{seed}/{turn}")):
            index -= len(self.plan(f"{seed}/{turn}"))
            turn += 1
        return self.plan(f"{seed}/{turn}")[index]


@cache
def _legal_pairs(cover: Cover[Any]) -> tuple[Pair, ...]:
    every = [(f.name, a, g.name, b) for f, g in combinations(cover.factors, 2) for a in f.values for b in g.values]
    return tuple(pair for pair in every if _whole(cover, pair, cover.factors, lambda factor, _: factor.values))


@cache
def _plan(cover: Cover[Any], seed: str) -> tuple[Labels, ...]:
    rng = random.Random(seed)
    wanted = set(cover.legal_pairs())
    open_pairs = list(cover.legal_pairs())
    rng.shuffle(open_pairs)
    rows: list[Labels] = []
    while wanted and len(rows) < MOST_CASES:
        while open_pairs[-1] not in wanted:
            open_pairs.pop()
        built = [_row(cover, open_pairs[-1], wanted, rng) for _ in range(_CANDIDATES)]
        best = max(built, key=lambda row: len(cover.pairs_of(row) & wanted))
        rows.append(best)
        wanted -= cover.pairs_of(best)
    return tuple(rows)


def _row(cover: Cover[Any], first: Pair, wanted: set[Pair], rng: random.Random) -> Labels:
    """A case with the pair ``first``; each further value is the one that meets most that is still wanted."""
    place = {factor.name: at for at, factor in enumerate(cover.factors)}
    order = list(cover.factors)
    rng.shuffle(order)

    def gain(name: str, value: str, chosen: Mapping[str, str]) -> int:
        met = ((name, value, o, c) if place[name] < place[o] else (o, c, name, value) for o, c in chosen.items())
        return sum(pair in wanted for pair in met)

    def best_first(factor: Factor[Any], chosen: Mapping[str, str]) -> list[str]:
        so_far = math.prod(f.size(chosen[f.name]) for f in cover.factors if f.name in chosen)
        drawn = rng.sample(factor.values, len(factor.values))
        too_large = {value: so_far * factor.size(value) > cover.elements for value in drawn}
        return sorted(drawn, key=lambda value: (too_large[value], -gain(factor.name, value, chosen)))

    found = _whole(cover, first, order, best_first)
    assert found is not None, f"{first} was found to be legal"
    return tuple(found[factor.name] for factor in cover.factors)


def _whole(
    cover: Cover[Any],
    pair: Pair,
    order: Sequence[Factor[Any]],
    values: Callable[[Factor[Any], Mapping[str, str]], Sequence[str]],
) -> dict[str, str] | None:
    """All values of a call with this pair, each the first one that leaves a call allowed; None if there is none."""
    chosen = {pair[0]: pair[1], pair[2]: pair[3]}
    rest = [factor for factor in order if factor.name not in chosen]
    rest.sort(key=lambda factor: factor.name not in cover.first)

    def choose(at: int) -> bool:
        if at == len(rest):
            return True
        factor = rest[at]
        for value in values(factor, chosen):
            chosen[factor.name] = value
            if cover.allowed(chosen) and choose(at + 1):
                return True
            del chosen[factor.name]
        return False

    return chosen if cover.allowed(chosen) and choose(0) else None
