"""Draws sizes from what a backend declares: the values kernels are built for, and those they are not."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from hal.spec.capability import Ints, MlaCapabilities
from hal_conformance.case import MlaCase

HEADS: Final = (16, 128, 64, 32, 8, 1, 3, 9, 63, 126, 5, 2, 4, 24, 48, 96, 7, 17, 33, 65, 112)
KV_HEADS: Final = (1, 2, 3, 8, 4)
HEAD_DIMS: Final = ((576, 512), (512, 512), (576, 576), (512, 256), (192, 128), (128, 64), (80, 48), (65, 33), (16, 16))
PAGES: Final = (64, 16, 32, 128, 1, 2, 256, 7, 100)
QUERIES: Final = (1, 2, 4, 3, 8)
SEARCH: Final = 4096
"""How far to look for a member of a declared set none of the usual values is in."""


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
    return found


def head_pairs(declared: MlaCapabilities, kv_heads: tuple[int, ...] = (1,)) -> list[tuple[int, int]]:
    """Declared pairs of h_q and h_kv that divide."""
    kv = [n for n in members(declared.h_kv, kv_heads) if n in kv_heads] or members(declared.h_kv, KV_HEADS)
    queries = members(declared.h_q, HEADS)
    pairs = [(q, k) for k in kv for q in queries if q % k == 0]
    if not pairs:
        pairs = [(n * k, k) for k in kv for n in range(1, SEARCH) if n * k in declared.h_q][:1]
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
    """

    rng: random.Random
    declared: MlaCapabilities
    index: int
    device: str
    gentle: bool = False

    def base(self, *, small: bool = True) -> MlaCase:
        """A case with everything plain: the first declared dtype in turn, usual head dims, some heads, one query."""
        pairs = head_pairs(self.declared)
        usual = [p for p in pairs if p[0] <= 16] if small else []
        h_q, h_kv = self.rng.choice(usual or pairs[:3])
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

    def page(self, *, usual: bool = True) -> int:
        """A page size: 64 where declared, or any usual one."""
        found = members(self.declared.page_size, PAGES)
        return found[0] if usual else self.rng.choice(found)

    def queries(self) -> list[int]:
        """Declared numbers of queries a sequence, smallest first."""
        return sorted(members(self.declared.s_q, QUERIES))

    def several_queries(self) -> int:
        """A declared s_q above 1, or 1 if there is none."""
        found = [n for n in self.queries() if n > 1]
        return self.rng.choice(found) if found else self.queries()[0]

    def lengths(self, most: int = 320, batch: tuple[int, int] = (1, 5)) -> tuple[int, ...]:
        """Some lengths from 1 to ``most``."""
        return self.ordinary(self.rng.randint(1, most) for _ in range(self.rng.randint(*batch)))

    def ordinary(self, lengths: Iterable[int]) -> tuple[int, ...]:
        """These lengths; where attacks are for later, none of them next to a multiple of a usual page."""
        found = tuple(lengths)
        return tuple(n + 3 if n > 16 and n % 16 in (1, 15) else n for n in found) if self.gentle else found

    def heads(self, kv_heads: tuple[int, ...] = (1,)) -> dict[str, int]:
        """Any declared h_q with one of these h_kv."""
        h_q, h_kv = self.rng.choice(head_pairs(self.declared, kv_heads))
        return {"h_q": h_q, "h_kv": h_kv}

    def dims(self) -> dict[str, int]:
        """Any declared d and head_dim_v."""
        d, d_v = self.rng.choice(head_dims(self.declared))
        return {"d": d, "d_v": d_v}

    def data(self) -> str:
        """Ordinary numbers or ones that make single tokens matter."""
        return self.rng.choice(("normal", "needle", "needle", "hot"))
