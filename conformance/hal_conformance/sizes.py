"""How large what was compared is, along every axis a port may be wrong on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from hal.spec.capability import Capabilities, Ints
from hal_conformance.case import MlaCase
from hal_conformance.ep_case import EpCase

_DECLARED: Final = {
    **dict.fromkeys(("head_dim", "head_dim_v", "h_q", "h_kv", "s_q", "page_size"), "mla_dense"),
    **dict.fromkeys(("ranks", "topk", "num_experts", "row_bytes"), "ep"),
}
"""Axes that a backend declares, and where; of the others every size is legal."""


_FEWER: Final = ("s_q", "topk")
"""Of which a call may have fewer than its buffer, or its longest sequence, is declared for."""

_WITHIN: Final = {
    "head_dim_v": "head_dim",
    "h_kv": "h_q",
    "pages of a sequence": "cache_seqlens",
    "experts of a rank": "num_experts",
}
"""Axes that never go further than others."""


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
            for name, size in ((name, self.largest[name]) for name in _axes() if name in self.largest)
        ]


def _ints(declared: Capabilities | None, name: str) -> Ints | None:
    """What is declared of an axis, or None where every size is legal."""
    section = getattr(declared, _DECLARED[name]) if name in _DECLARED else None
    return None if section is None else getattr(section, name)


def _declared(declared: Capabilities | None, name: str) -> str:
    found = _ints(declared, name)
    return "any size" if found is None else str(found)


def impossible(rows: list[dict[str, Any]], declared: Capabilities) -> Iterator[str]:
    """What in the rows of a report (`Sizes.against`) no calls within the declaration can have."""
    names = [row["axis"] for row in rows]
    if names != [name for name in _axes() if name in names]:
        yield f"the sizes are not those of {', '.join(_axes())}, each once and in this order"
        return
    largest = {row["axis"]: row["largest"] for row in rows}
    for row in rows:
        name, ends, legal = row["axis"], (row["least"], row["largest"]), _ints(declared, row["axis"])
        if row["declared"] != _declared(declared, name):
            yield f"{name} {_declared(declared, name)} is declared, and the sizes say {row['declared']}"
        if ends[0] > ends[1]:
            yield f"the smallest {name} that was compared is {ends[0]}, the largest {ends[1]}"
        beyond = [n for n in ends if legal is not None and not (n in legal or (name in _FEWER and n <= _end(legal)))]
        if beyond:
            yield f"{name} {beyond[0]} was compared, and {legal} is declared"
    for part, whole in _WITHIN.items():
        if part in largest and largest[part] > largest.get(whole, 0):
            yield f"{part} went up to {largest[part]}, and {whole} to {largest.get(whole, 0)}"


def _axes() -> dict[str, int]:
    return MlaCase().sizes() | EpCase(scales="float32").sizes()


def _end(legal: Ints) -> float:
    return max(legal.only) if legal.only else float("inf") if legal.high is None else legal.high


def sentence(rows: Iterable[dict[str, Any]]) -> str:
    """All of it in one line."""
    return ", ".join(f"{row['axis']} {row['least']}…{row['largest']} (declared: {row['declared']})" for row in rows)
