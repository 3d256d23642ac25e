"""What each rank of an expert-parallel obligation does."""

from __future__ import annotations

from typing import Any

import hal
from hal_conformance.context import refused
from hal_conformance.ranks import Rank


def open_buffer(rank: Rank) -> str:
    """Open a small buffer that must be refused; what it did instead, or nothing."""
    rank.join()
    rank.phase("open a buffer")
    buffer: Any = getattr(hal, "EpBuffer")  # noqa: B009 - a HAL without it has no obligation that gets here
    sizes = {"num_experts": 2 * rank.world, "hidden": 256, "topk": 2, "max_tokens_per_rank": 8}
    mode, backend = rank.payload["mode"], rank.payload["backend"]
    return refused(lambda: buffer(**sizes, modes=(mode,), timeout=20.0, backend=backend).close())
