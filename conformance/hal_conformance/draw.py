"""Draws sizes from what a backend declares: the values kernels are built for, those they are not, and any others.

Three sources, so that no port can be right only where this file looks. *Notable* values are those that kernels are
built for or break on, and both ends of what is declared. *Hands* deal every value of a declared range, in an order
nobody knows before the run, to the cases of one obligation: those of a default run hold all of them. Everything else is
*free*: any declared value.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Final, TypeVar

from hal.spec.capability import Ints, MlaCapabilities
from hal_conformance.case import MlaCase

Value = TypeVar("Value")

HEADS: Final = (16, 128, 64, 32, 8, 1, 3, 9, 63, 126, 5, 2, 4, 24, 48, 96, 7, 17, 33, 65, 112)
KV_HEADS: Final = (1, 2, 3, 8, 4)
HEAD_DIMS: Final = ((576, 512), (512, 512), (576, 576), (512, 256), (192, 128), (128, 64), (80, 48), (65, 33), (16, 16))
PAGES: Final = (64, 16, 32, 128, 1, 2, 256, 7, 100)
QUERIES: Final = (1, 2, 4, 3, 8)
LENGTHS: Final = tuple(range(64, 2561, 64))
"""Whole tiles, and whole splits of several tiles."""

SEARCH: Final = 4096
"""How far to look for a member of a declared set none of the usual values is in."""

MOST_HEADS: Final = 160
MOST_KV_HEADS: Final = 16
MOST_DIM: Final = 576
MOST_PAGE: Final = 256
MOST_QUERIES: Final = 64
"""How far a range is drawn from where it is declared without an upper end, or with one far beyond."""

BATCHES: Final = (65, 300)
"""A batch that fills more than a warp's worth of anything: its sequences are short."""

HUGE_BATCHES: Final = (513, 640)
"""More than any block has threads; of one head and hardly any token."""


def within(declared: Ints, most: int) -> list[int]:
    """Every declared value up to ``most``; a range that ends a little later is taken whole."""
    if declared.only:
        return sorted(n for n in declared.only if n > 0)
    step = declared.multiple_of
    first = -(-max(declared.low, 1) // step) * step
    top = declared.high if declared.high is not None and declared.high <= 2 * most else most
    return list(range(first, top + 1, step)) or ([first] if first in declared else [])


def notable(declared: Ints, usual: Iterable[int], most: int) -> list[int]:
    """The usual values that are declared, and both ends of the declared range as far as it is drawn from."""
    every = within(declared, most)
    ends = every[:1] + (every[-1:] if declared.only or declared.high == every[-1] else []) if every else []
    return sorted({*(n for n in usual if n in declared), *ends})


def members(declared: Ints, preferred: tuple[int, ...]) -> list[int]:
    """The preferred values that are declared, else the smallest declared one, else nothing."""
    found = [n for n in preferred if n in declared]
    if not found:
        found = list(declared.only[:1]) or [n for n in range(1, SEARCH) if n in declared][:1]
    return found


def head_dims(declared: MlaCapabilities) -> list[tuple[int, int]]:
    """Declared pairs of d and head_dim_v, the usual ones first."""
    found = [(d, v) for d, v in HEAD_DIMS if d in declared.head_dim and v in declared.head_dim_v]
    if not found:
        dims = members(declared.head_dim, (576, 512))
        found = [(d, v) for d in dims for v in members(declared.head_dim_v, (512, d)) if v <= d]
    if not found:
        every = product(within(declared.head_dim, MOST_DIM), within(declared.head_dim_v, MOST_DIM))
        found = list(islice(((d, v) for d, v in every if v <= d), 1))
    return found


def head_pairs(declared: MlaCapabilities, kv_heads: tuple[int, ...] = (1,)) -> list[tuple[int, int]]:
    """Declared pairs of h_q and h_kv that divide."""
    kv = [n for n in members(declared.h_kv, kv_heads) if n in kv_heads] or members(declared.h_kv, KV_HEADS)
    queries = members(declared.h_q, HEADS)
    pairs = [(q, k) for k in kv for q in queries if q % k == 0]
    if not pairs:
        kv += within(declared.h_kv, MOST_KV_HEADS)
        pairs = list(islice(((n * k, k) for k in kv for n in range(1, SEARCH) if n * k in declared.h_q), 1))
    return pairs


@dataclass(slots=True)
class Draw:
    """A source of declared sizes for one case. Systematic in ``index``, random in ``rng``.

    Attributes
    ----------
    rng : random.Random
    declared : MlaCapabilities
    index : int
    device : str
    gentle : bool
        Whether attacks are for a later level: unused memory holds zeros, lengths keep off the edges of pages.
    deal : str
        What the hands of this obligation are shuffled by.
    cases : int
        How many cases of a default run share what is dealt.
    most : int
        The largest hand; smaller where a run is to be quick.
    """

    rng: random.Random
    declared: MlaCapabilities
    index: int
    device: str
    gentle: bool = False
    deal: str = ""
    cases: int = 24
    most: int = SEARCH

    def base(self, *, small: bool = True) -> MlaCase:
        """A case with everything plain: the first declared dtype in turn, usual head dims, some heads, one query."""
        h_q, h_kv = self.some_heads(16 if small else 128)
        d, d_v = head_dims(self.declared)[0]
        return MlaCase(
            dtype=self.declared.dtypes[self.index % len(self.declared.dtypes)],
            lengths=self.lengths(),
            s_q=self.queries()[0],
            h_q=h_q,
            h_kv=h_kv,
            d=d,
            d_v=d_v,
            page=self.page(),
            lse_base="e" if "e" in self.declared.lse_bases else self.declared.lse_bases[0],
            device=self.device,
            poison="zero" if self.gentle else "nan",
            garbage=0 if self.gentle else 2147480000,
        )

    def hand(self, name: str, values: Sequence[Value]) -> list[Value]:
        """Deal this case its share of ``values``: the cases of a default run are dealt all of them."""
        order = list(values)
        random.Random(f"{self.deal}/{name}").shuffle(order)
        size = -(-len(order) // self.cases)
        at = self.index * size % max(len(order), 1)
        return order[at : at + min(size, self.most)]

    def free(self, declared: Ints, most: int, least: int = 1) -> int:
        """Any declared value from ``least`` to ``most``, or the one nearest to them."""
        every = within(declared, most)
        found = [n for n in every if least <= n <= most]
        return self.rng.choice(found) if found else every[-1]

    def page(self, *, usual: bool = True) -> int:
        """A page size: 64 where declared, or any usual one, or any."""
        found = members(self.declared.page_size, PAGES)
        if usual:
            return found[0]
        return self.rng.choice(found) if self.rng.random() < 0.6 else self.free(self.declared.page_size, MOST_PAGE)

    def queries(self) -> list[int]:
        """Declared numbers of queries a sequence that kernels are built for, smallest first."""
        return sorted(members(self.declared.s_q, QUERIES))

    def several_queries(self, most: int = 40) -> int:
        """A declared s_q above 1, or 1 if there is none; now and then a few dozens."""
        found = [n for n in self.queries() if n > 1]
        if not found or self.rng.random() < 0.3:
            return self.free(self.declared.s_q, most, 2)
        return self.rng.choice(found)

    def lengths(self, most: int = 320, batch: tuple[int, int] = (1, 5), page: int = 0) -> tuple[int, ...]:
        """Some lengths from 1 to ``most``, whole tiles among them."""
        whole = [n for n in LENGTHS if n <= most] or [most]
        drawn = (
            self.rng.choice(whole) if self.rng.random() < 0.2 else self.rng.randint(1, most)
            for _ in range(self.rng.randint(*batch))
        )
        return self.ordinary(drawn, page)

    def large_batch(self, batches: tuple[int, int] = BATCHES, most: int = 24) -> tuple[int, ...]:
        """Lengths of more sequences than a block has threads of one kind, each of a few tokens."""
        return self.ordinary(self.rng.randint(1, most) for _ in range(self.rng.randint(*batches)))

    def ordinary(self, lengths: Iterable[int], page: int = 0) -> tuple[int, ...]:
        """These lengths; where attacks are for later, none of them next to a multiple of the page or a usual one."""
        page = page or self.page()
        return tuple(self._off_the_edges(n, page) if self.gentle else n for n in lengths)

    @staticmethod
    def _off_the_edges(length: int, page: int) -> int:
        units = {16, page} if page >= 16 else {16}
        while length > 16 and any(length % unit in (1, unit - 1) for unit in units):
            length += 1
        return length

    def heads(self, kv_heads: tuple[int, ...] = (1,)) -> dict[str, int]:
        """Any declared h_q, usual or not, with one of these h_kv."""
        h_q, h_kv = self.rng.choice(head_pairs(self.declared, kv_heads))
        if self.rng.random() < 0.5:
            h_q = self.heads_for(h_kv)
        return {"h_q": h_q, "h_kv": h_kv}

    def heads_for(self, h_kv: int, most: int = MOST_HEADS) -> int:
        """Any declared h_q that ``h_kv`` divides; at most ``most`` where there is one."""
        every = [n for n in within(self.declared.h_q, MOST_HEADS) if n % h_kv == 0]
        return self.rng.choice([n for n in every if n <= most] or every[:1] or [n_of(self.declared.h_q, h_kv)])

    def some_heads(self, most: int) -> tuple[int, int]:
        """One usual KV head, or whatever is declared instead, with at most so many heads, usual ones more often."""
        pairs = head_pairs(self.declared)
        usual = [p for p in pairs if p[0] <= most][: 3 if most > 16 else None] or pairs[:3]
        h_q, h_kv = self.rng.choice(usual)
        return (h_q if self.rng.random() < 0.7 else self.heads_for(h_kv, most)), h_kv

    def dims(self) -> dict[str, int]:
        """Any declared d and head_dim_v, usual or not."""
        d, d_v = self.rng.choice(head_dims(self.declared))
        if self.rng.random() < 0.5:
            d, d_v = self.with_values(self.free(self.declared.head_dim, MOST_DIM))
        return {"d": d, "d_v": d_v}

    def smallest_dims(self) -> tuple[int, int]:
        """The smallest usual d and head_dim_v that are declared."""
        return min(head_dims(self.declared))

    def with_values(self, d: int) -> tuple[int, int]:
        """A declared d and any declared head_dim_v of at most that; a usual pair where there is none."""
        found = [n for n in within(self.declared.head_dim_v, MOST_DIM) if n <= d]
        return (d, self.rng.choice(found)) if found else head_dims(self.declared)[0]

    def data(self) -> str:
        """Ordinary numbers or ones that make single tokens matter."""
        return self.rng.choice(("normal", "needle", "needle", "hot"))

    def starts(self, *names: str) -> dict[str, int]:
        """Where these tensors begin: at no multiple of 16 bytes, whether an element has 2 or 4 of them."""
        return {f"{name}_start": self.rng.choice([n for n in range(1, 16) if n % 4]) for name in names}


def n_of(declared: Ints, h_kv: int) -> int:
    """The smallest declared multiple of ``h_kv``, or itself."""
    return next((n for n in range(h_kv, SEARCH, h_kv) if n in declared), h_kv)
