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
    routing: str = "uniform"  # uniform, zipf, groups

    @property
    def name(self) -> str:
        """How the table calls it."""
        kind = "fp8" if self.fp8 else "bf16"
        return f"{self.operation} {kind} T={self.tokens} top-{self.topk}/{self.experts} {self.routing}"

    @property
    def low_latency(self) -> bool:
        """Of which mode it is."""
        return self.operation.startswith("low_latency")


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
PUBLISHED: Final = {
    Shape("dispatch", 4096, experts=256, fp8=True, routing="groups"): "153 GB/s",
    Shape("dispatch", 4096, experts=256, routing="groups"): "",
    Shape("combine", 4096, experts=256, routing="groups"): "158 GB/s",
    Shape("low_latency_dispatch", 128, experts=256, fp8=True): "77 µs",
    Shape("low_latency_combine", 128, experts=256): "114 µs",
}
"""The cases by which engines are compared, and what DeepEP's authors published of V1 with 8 ranks of one node."""

GROUPS: Final = 8
TOP_GROUPS: Final = 4
"""Groups of experts, and how many of them a token may choose from where routes are ``groups``."""

OVERLAPS: Final = (Shape("low_latency_dispatch", 128, fp8=True), Shape("dispatch", 1024))
"""Whose receive compute is to hide."""


def routes(shape: Shape, rank: int) -> Tensor:
    """Distinct experts of every token: uniform, with a Zipf law over experts, or all of `TOP_GROUPS` groups."""
    seed = torch.Generator().manual_seed(17 + rank)
    if shape.routing == "groups":
        scores = torch.rand(shape.tokens, GROUPS, shape.experts // GROUPS, generator=seed)
        best = scores.amax(2).topk(TOP_GROUPS).indices
        chosen = torch.full_like(scores, -1.0).scatter(1, best[:, :, None].expand(-1, -1, scores.shape[2]), 1.0)
        return (scores * chosen).flatten(1).topk(shape.topk).indices
    law = torch.ones(shape.experts)
    if shape.routing == "zipf":
        law = 1.0 / torch.arange(1, shape.experts + 1)
    return torch.multinomial(law.expand(shape.tokens, -1), shape.topk, generator=seed)
