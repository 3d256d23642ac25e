"""How large what was compared is, along every axis a port may be wrong on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from hal.spec.capability import Capabilities

_DECLARED: Final = {
    **dict.fromkeys(("head_dim", "head_dim_v", "h_q", "h_kv", "s_q", "page_size"), "mla_dense"),
    **dict.fromkeys(("ranks", "topk", "num_experts", "row_bytes"), "ep"),
}
"""Axes that a backend declares, and where; of the others every size is legal."""


class Sized(Protocol):
    """A case that says how large it is along every axis."""

    def sizes(self) -> dict[str, int]:
        """By the name of the axis."""
        ...


@dataclass(slots=True)
class Sizes:
    """The largest and the smallest of every axis, over calls."""

    least: dict[str, int] = field(default_factory=dict)
    largest: dict[str, int] = field(default_factory=dict)

    def add(self, case: Sized) -> None:
        """Take in a call."""
        self._take(case.sizes(), case.sizes())

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

    def against(self, declared: Capabilities | None) -> list[dict[str, Any]]:
        """For every axis what is declared, and the smallest and largest that was compared."""
        return [
            {"axis": name, "declared": _declared(declared, name), "least": self.least[name], "largest": size}
            for name, size in self.largest.items()
        ]


def _declared(declared: Capabilities | None, name: str) -> str:
    section = getattr(declared, _DECLARED[name]) if name in _DECLARED else None
    return "any size" if section is None else str(getattr(section, name))


def sentence(rows: Iterable[dict[str, Any]]) -> str:
    """All of it in one line."""
    return ", ".join(f"{row['axis']} {row['least']}…{row['largest']} (declared: {row['declared']})" for row in rows)
