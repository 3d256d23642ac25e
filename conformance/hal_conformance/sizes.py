"""How large what was compared is, along every axis a port may be wrong on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from hal.spec.capability import MlaCapabilities
from hal_conformance.case import MlaCase

_DECLARED: Final = ("head_dim", "head_dim_v", "h_q", "h_kv", "s_q", "page_size")
"""Axes that a backend declares; of the others every size is legal."""


@dataclass(slots=True)
class Sizes:
    """The largest and the smallest of every axis, over calls."""

    least: dict[str, int] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)

    def add(self, case: MlaCase) -> None:
        """Take in a call."""
        longest = max(case.lengths, default=0)
        sizes = {"head_dim": case.d, "head_dim_v": case.d_v, "h_q": case.h_q, "h_kv": case.h_kv}
        sizes |= {"s_q": max(case.queries, default=0), "page_size": case.page, "batch": case.batch}
        sizes |= {"cache_seqlens": longest, "pages of a sequence": -(-longest // case.page)}
        self._take(sizes, sizes)

    def merge(self, other: dict[str, dict[str, int]]) -> None:
        """Take in what `to_dict` gave."""
        self._take(other["least"], other["largest"])

    def _take(self, least: dict[str, int], largest: dict[str, int]) -> None:
        for name, size in least.items():
            self.least[name] = min(size, self.least.get(name, size))
        for name, size in largest.items():
            self.largest[name] = max(size, self.largest.get(name, size))

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Plain data."""
        return {"least": self.least, "largest": self.largest}

    def against(self, declared: MlaCapabilities | None) -> list[dict[str, Any]]:
        """For every axis what is declared, and the smallest and largest that was compared."""
        return [
            {"axis": name, "declared": _declared(declared, name), "least": self.least[name], "largest": size}
            for name, size in self.largest.items()
        ]


def _declared(declared: MlaCapabilities | None, name: str) -> str:
    return str(getattr(declared, name)) if declared is not None and name in _DECLARED else "any size"


def sentence(rows: Iterable[dict[str, Any]]) -> str:
    """All of it in one line."""
    return ", ".join(f"{row['axis']} {row['least']}…{row['largest']} (declared: {row['declared']})" for row in rows)
