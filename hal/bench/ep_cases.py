"""The cases of ``hal bench ep``: operations, sizes and routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """One row of the table."""

    operation: str  # dispatch, combine, low_latency_dispatch, low_latency_combine
    tokens: int
    experts: int = 64
    topk: int = 8
    hidden: int = 7168
    fp8: bool = False
    routing: str = "uniform"

    @property
    def name(self) -> str:
        """How the table calls it."""
        kind = "fp8" if self.fp8 else "bf16"
        return f"{self.operation} {kind} T={self.tokens} top-{self.topk}/{self.experts} {self.routing}"


QUICK: Final = (
    Shape("dispatch", 1),
    Shape("dispatch", 128),
    Shape("combine", 128),
    Shape("low_latency_dispatch", 128, fp8=True),
    Shape("dispatch", 1024),
    Shape("combine", 1024),
    Shape("dispatch", 1024, routing="zipf"),
)
TOKENS: Final = (1, 16, 128, 1024, 4096)
FULL: Final = (
    *(Shape(op, t) for op in ("dispatch", "combine") for t in sorted((*TOKENS, 8, 32, 2048))),
    *(Shape("dispatch", t, fp8=True) for t in TOKENS),
    *(Shape(op, t, experts=256) for op in ("dispatch", "combine") for t in TOKENS),
    *(Shape("dispatch", t, experts=256, fp8=True) for t in TOKENS),
    *(Shape(op, t, routing="zipf") for op in ("dispatch", "combine") for t in TOKENS),
    *(Shape("dispatch", t, fp8=True, routing="zipf") for t in TOKENS),
    *(Shape(op, t, experts=256, routing="zipf") for op in ("dispatch", "combine") for t in TOKENS),
    *(Shape("low_latency_dispatch", t, fp8=True) for t in (1, 16, 128)),
    *(Shape("low_latency_combine", t) for t in (1, 16, 128)),
)
OVERLAPS: Final = (Shape("low_latency_dispatch", 128, fp8=True), Shape("dispatch", 1024))
"""Whose receive compute is to hide."""


def routes(shape: Shape, rank: int) -> Tensor:
    """Distinct experts of every token, uniform or with a Zipf law over experts."""
    seed = torch.Generator().manual_seed(17 + rank)
    law = torch.ones(shape.experts)
    if shape.routing == "zipf":
        law = 1.0 / torch.arange(1, shape.experts + 1)
    return torch.multinomial(law.expand(shape.tokens, -1), shape.topk, generator=seed)
