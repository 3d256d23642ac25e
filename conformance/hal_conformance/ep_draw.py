"""Draws sizes of expert-parallel cases from what a backend declares."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Final

from hal.spec.capability import EpCapabilities, Ints
from hal_conformance.cover_ep import legal_columns, node_sizes, plain, scalable, shared_among
from hal_conformance.draw import members, within
from hal_conformance.ep_case import EpCase

RANKS: Final = (3, 2, 4, 1)
ROWS: Final = (128, 48, 272, 16, 528, 1040)
"""Bytes of a row; all but the first are an odd multiple of 16."""

TOPK: Final = (3, 2, 5, 1, 8)
EXPERTS: Final = (8, 9, 7, 16, 12, 5, 64)

MOST_RANKS: Final = 8
MOST_EXPERTS: Final = 1024
MOST_TOPK: Final = 16
MOST_TOKENS: Final = 1300
MOST_ROW: Final = 16384
"""Up to where sizes are drawn, from the upper half: what no short list holds, a block of threads or one pass of it."""

_TOGETHER: Final = {"experts": 256, "tokens": 160}
"""How far experts and tokens go in groups of many ranks: a low-latency result has room for all of them."""

_QUANTISED: Final = (272, 656, 144, 1168, 2064)
"""Columns of rows that have scales: whole groups of 128 and parts of one, fewer and more than a warp half holds."""


@dataclass(slots=True)
class EpDraw:
    """A source of declared sizes. Systematic in ``index``, random in ``rng``."""

    rng: random.Random
    declared: EpCapabilities
    index: int
    ranks: int = 0

    def base(self, ranks: tuple[int, ...] = RANKS, **changes: Any) -> EpCase:
        """A case of usual sizes, with as many ranks as this index has its turn with."""
        found = members(self.declared.ranks, ranks)
        if self.ranks and len(ranks) > 1:
            found = members(self.declared.ranks, (self.ranks,))
        world = found[self.index % len(found)]
        case = EpCase(
            ranks=world,
            experts=self.rng.choice(members(self.declared.num_experts, EXPERTS[:4])),
            topk=self.rng.choice(members(self.declared.topk, TOPK[:2])),
            tokens=tuple(self.rng.choice((1, 4, 7, 12, 17)) for _ in range(world)),
            dtype=plain(self.declared)[0],
        )
        return self.sized(case.but(**changes))

    def cast(self) -> str:
        """Of low-latency calls whose cast does not matter: none at all where that is declared."""
        casts = self.declared.casts
        return "none" if "low_latency" not in self.declared.modes or "none" in casts else casts[0]

    def casts(self) -> list[str]:
        """Declared casts, of which there are rows to be cast."""
        possible = scalable(self.declared, "cast")
        return [cast for cast in self.declared.casts if cast == "none" or possible]

    def sends_fp8(self) -> bool:
        """Whether FP8 rows are declared, of columns that others may have too."""
        return "float8_e4m3fn" in self.declared.dtypes and scalable(self.declared, "sent")

    def across(self, ranks: tuple[int, ...] = (4, 2), *, alone: bool = False, **changes: Any) -> EpCase:
        """A case over several nodes, of one rank each if they are to be alone, else of several where declared."""
        usual = shared_among(self.declared, ranks)
        case = self.base((usual[self.index % len(usual)],), **changes)
        sizes = node_sizes(self.declared, case.ranks)
        several = [n for n in sizes if n > 1]
        return case.but(per_node=1 if 1 in sizes and (alone or not several) else self.rng.choice(several))

    def odd(self, case: EpCase) -> EpCase:
        """Sizes nobody tunes for; now and then fewer choices than the buffer has."""
        topk = self.rng.choice(members(self.declared.topk, (1, 3, 5, 7)))
        wider = [n for n in (0, 0, topk + 1, topk + 2, topk + 5) if not n or n in self.declared.topk]
        experts = self.rng.choice(members(self.declared.num_experts, (5, 7, 9, 13, 1, 11)))
        return self.sized(case.but(experts=experts, topk=topk, width=self.rng.choice(wider)), ROWS[1:])

    def lying(self, case: EpCase) -> EpCase:
        """Of tensors that begin off 16 bytes; rows whole groups of elements apart, or fewer, or all the same one."""
        pad = (self.rng.randint(1, 7), 8 * self.rng.randint(1, 3), 0)[self.index % 3]
        return case.but(pad=pad, start=self.rng.choice((1, 2, 3, 5, 7)), once=not pad)

    def apart(self, case: EpCase) -> EpCase:
        """Sizes nobody tunes for that are other ones than those of a case, as far as there are others."""
        drawn = [self.odd(case) for _ in range(8)]
        return max(drawn, key=lambda one: (one.local != case.local) + (one.hidden != case.hidden))

    def unlike(self, case: EpCase) -> list[EpCase]:
        """Calls of one buffer, each unlike the one before: many tokens, then few or none, fewer choices, no weights."""
        most = 24
        case = case.but(capacity=most, width=case.topk)
        empty = self.rng.randrange(case.ranks)
        some = tuple(self.rng.randint(2, 9) for _ in range(case.ranks))
        with_none = tuple(0 if rank == empty else n for rank, n in enumerate(some))
        every = [
            case.but(tokens=(most,) * case.ranks, routing="distinct"),
            case.but(tokens=with_none, routing="mixed"),
            case.but(tokens=some, topk=max(1, case.topk - 1)),
            case.but(tokens=(1,) * case.ranks, routing="one"),
            case.but(tokens=with_none[::-1], pad=8),
        ]
        self.rng.shuffle(every)
        return every

    def many(self, case: EpCase) -> EpCase:
        """As many ranks as a node has, with more experts, choices and tokens than a group of threads; of short rows."""
        world = self.ranks or self._upper(self.declared.ranks, MOST_RANKS)
        crowded = self.rng.randrange(world)
        most = _TOGETHER["tokens"]
        tokens = tuple(self.rng.randint(most // 2, most) if r == crowded else r % 3 for r in range(world))
        experts = self._upper(self.declared.num_experts, _TOGETHER["experts"])
        topk = self._upper(self.declared.topk, MOST_TOPK)
        return self._short(case.but(ranks=world, experts=experts, topk=topk, tokens=tokens))

    def crowd(self, case: EpCase) -> EpCase:
        """So many tokens on a rank that no block of threads has one each; of short rows."""
        crowded = self.rng.randrange(case.ranks)
        tokens = (self.rng.randint(MOST_TOKENS // 2, MOST_TOKENS) if r == crowded else 3 for r in range(case.ranks))
        return self._short(case.but(tokens=tuple(tokens)))

    def wide(self, case: EpCase) -> EpCase:
        """So many experts that on few ranks each has more than a group of threads."""
        tokens = tuple(max(8, n) for n in case.tokens)
        return case.but(experts=self._upper(self.declared.num_experts, MOST_EXPERTS), tokens=tokens)

    def long(self, case: EpCase) -> EpCase:
        """A few rows, longer than what a group of threads copies at once."""
        size = case.torch_dtype.itemsize
        every = range(MOST_ROW // 2 + 16, MOST_ROW + 1, 16)
        # So that the bytes of the same columns as FP8 are a multiple of 16 too.
        rows = [n for n in every if n in self.declared.row_bytes and n % (16 * size) == 0]
        few = case.but(tokens=tuple(self.rng.randint(1, 3) for _ in case.tokens))
        return few.but(hidden=self.rng.choice(rows) // size) if rows else few

    def _short(self, case: EpCase) -> EpCase:
        """Of short rows, since there are many; where they have scales, of as few columns as may be."""
        case = self.sized(case, ROWS[1:4:2])
        if case.scales or case.cast != "none":
            case = case.but(hidden=min(legal_columns(self.declared, case.dtype, "sent" if case.scales else "cast")))
        return case

    def _upper(self, declared: Ints, most: int) -> int:
        """A declared value of the upper half up to ``most``, or the one nearest to it."""
        every = within(declared, most)
        found = [n for n in every if most < 2 * n <= 2 * most]
        return self.rng.choice(found) if found else min(every, key=lambda n: abs(n - most))

    def sized(self, case: EpCase, rows: tuple[int, ...] = (128, 256)) -> EpCase:
        """With a declared hidden, of FP8 rows too where the case has some; of another dtype if this one has none."""
        if case.scales or case.cast != "none":
            scaled = "sent" if case.scales else "cast"
            for dtype in (case.dtype, *plain(self.declared)):
                every = legal_columns(self.declared, dtype, scaled)
                found = [n for n in _QUANTISED if n in every] or every[:1]
                if found:
                    return case.but(dtype=dtype, hidden=self.rng.choice(found))
        size = case.torch_dtype.itemsize
        found = [n for n in members(self.declared.row_bytes, rows) if n % 16 == 0]
        return case.but(hidden=(self.rng.choice(found) if found else self._smallest()) // size)

    def _smallest(self) -> int:
        return next(n for n in range(16, 1 << 20, 16) if n in self.declared.row_bytes)
