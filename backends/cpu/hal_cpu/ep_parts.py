"""Parts of the CPU's expert-parallel engine that need no engine: errors, handles, the recorder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from hal.ep.fields import OPERATIONS, Fields, differing
from hal.spec.ep import EpBufferArgs
from hal.spec.errors import RankFailure, SpecError

# Element types as the compiled engine numbers them.
TYPES: Final = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
BYTES, INT32 = 3, 4

launches: Counter[str] = Counter()
"""Calls of this process, by name and instruction set."""


def translated(native: Any, first: int, error: Exception, fields: Fields) -> Exception:
    """An error of the compiled engine, whose ranks count from ``first``, as the specification has it."""
    if isinstance(error, native.Refused):
        return refusal(first, error, fields)
    if isinstance(error, native.RankFailed):
        rank, phase, reason, expert, expected, received = error.args
        return RankFailure(
            first + rank,
            phase,
            reason,
            expert=None if expert < 0 else expert,
            expected=None if expected < 0 else expected,
            received=None if received < 0 else received,
        )
    return error


def refusal(first: int, error: Exception, fields: Fields) -> SpecError:
    """The error that all ranks raise for a refused call."""
    argument, got, legal, field, rank, against, value, other = error.args
    if field < 0:
        return SpecError(argument, got, legal)
    return differing(fields, field, value, first + rank, other, first + against)


class PackedState:
    """What a low-latency handle carries: its routes, ranges by block, a reserved slot, the memory lent to combine."""

    __slots__ = ("lent", "op", "ranges", "routes")

    def __init__(self, routes: Any, op: Any, ranges: Tensor) -> None:
        self.routes = routes
        self.op = op
        self.ranges = ranges
        self.lent: Any = None


class Sources:
    """Where the rows of a dispatch came from."""

    __slots__ = ("_args", "_blocks", "_origins", "_routes", "_rows")

    def __init__(self, routes: Any, rows: int, origins: Tensor, blocks: Tensor, args: EpBufferArgs) -> None:
        self._routes, self._rows, self._origins, self._blocks, self._args = routes, rows, origins, blocks, args

    def rank(self) -> Tensor:
        """Blocks are known from the counts; the rows of a rank that was lost meanwhile are nobody's."""
        block = torch.empty(self._rows, dtype=torch.int32, device="cpu")
        self._routes.blocks_of_rows(block.data_ptr(), self._rows)
        rank = self._origins[block.clamp(min=0)]
        return rank.masked_fill_((block < 0) | (self.position() < 0), -1)

    def position(self) -> Tensor:
        """As the senders wrote them."""
        return self._told()[:, 0]

    def choice(self) -> Tensor:
        """As the senders wrote them."""
        return self._told()[:, 1]

    def _told(self) -> Tensor:
        found = torch.full((self._rows, 2), -1, dtype=torch.int32, device="cpu")
        self._routes.sources(found.data_ptr())
        return found

    def counts(self) -> Tensor:
        """Blocks put in the order of their ranks."""
        return self._by_rank(self._routes.counts_of_blocks, self._args.local_experts)

    def sent(self) -> Tensor:
        """Blocks put in the order of their ranks."""
        return self._by_rank(self._routes.sent_by_blocks, self._args.num_ranks)

    def _by_rank(self, fill: Callable[[int], None], columns: int) -> Tensor:
        by_block = torch.empty(len(self._origins), columns, dtype=torch.int32, device="cpu")
        fill(by_block.data_ptr())
        return by_block[self._blocks]


def nothing() -> None:
    """The finish of what is only reserved, or already finished."""


def record_of(first: int, rank: int, fields: Sequence[Any]) -> dict[str, Any]:
    """One entry of the flight recorder, in the numbering of the whole group."""
    seq, kind, phase, waits_for, tokens, expert, expected, received, begin, end = fields
    waits = not end and waits_for >= 0
    awaits_rows = waits and phase == "receive"
    return {
        "rank": first + rank,
        "operation": seq,
        "kind": OPERATIONS[kind] if kind < len(OPERATIONS) else "?",
        "phase": phase,
        "waits_for": first + waits_for if waits else None,
        "expert": expert if awaits_rows and expert >= 0 else None,
        "expected": expected if awaits_rows else None,
        "received": received if awaits_rows else None,
        "tokens": tokens,
        "begin_ns": begin,
        "microseconds": (end - begin) / 1000 if end else None,
    }
