"""Dispatch and combine as one writes them over an ``all_to_all`` of bytes: what the HAL's are to be compared with.

The same tensors go in and the same come out, in the same order. Counts travel first, then token rows, then what belongs
to them, so that nothing is copied only to be sent together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Exchange: TypeAlias = Callable[[Tensor, Tensor, Sequence[int], Sequence[int]], object]
"""Into, from, rows received from each rank, rows sent to each."""


def over_group(into: Tensor, rows: Tensor, received: Sequence[int], sent: Sequence[int]) -> object:
    """`torch.distributed.all_to_all_single` of the default group."""
    return dist.all_to_all_single(into, rows, list(received), list(sent))


def over_mpi(world: Any) -> Exchange:
    """``Alltoallv`` of a communicator."""
    from mpi4py import MPI

    def exchange(into: Tensor, rows: Tensor, received: Sequence[int], sent: Sequence[int]) -> object:
        width = rows[0].numel() * rows.element_size() if len(rows) else 0
        width = width or (into[0].numel() * into.element_size() if len(into) else 0)
        sides = [
            [tensor.view(torch.uint8).numpy(), ([count * width for count in counts], None), MPI.BYTE]
            for tensor, counts in ((rows, sent), (into, received))
        ]
        return world.Alltoallv(*sides)

    return exchange


@dataclass(frozen=True, slots=True)
class Sent:
    """What combine needs of a dispatch: which token each row was, and rows by rank in both directions."""

    tokens: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ByAllToAll:
    """A group's dispatch and combine over an exchange.

    Attributes
    ----------
    exchange : callable
    rank, ranks, local_experts : int
    """

    exchange: Exchange
    rank: int
    ranks: int
    local_experts: int

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, scales: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Sent]:
        """Rows, local experts, weights and scales of the tokens received, by source rank and then by position."""
        where = topk_idx.div(self.local_experts, rounding_mode="floor")
        bound = torch.stack([(where == rank).any(1) for rank in range(self.ranks)])
        tokens = bound.nonzero()[:, 1]
        # Not every device takes FP8 rows by a list.
        plain = x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
        counts = bound.sum(1)
        each = [1] * self.ranks
        coming = self._moved(counts[:, None], each, each)[:, 0]
        sent, received = tuple(counts.tolist()), tuple(coming.tolist())
        made = [self._moved(one[tokens], received, sent) for one in (plain, topk_idx, topk_weights)]
        moved_scales = None if scales is None else self._moved(scales[tokens], received, sent)
        local = made[1] - self.rank * self.local_experts
        local[(local < 0) | (local >= self.local_experts)] = -1
        made[2][local < 0] = 0
        return made[0].view(x.dtype), local, made[2], moved_scales, Sent(tokens, sent, received, len(x))

    def combine(self, y: Tensor, given: Sent) -> Tensor:
        """The sum, in float32, of the rows that come back for each token, in y's dtype."""
        back = self._moved(y, given.sent, given.received)
        total = torch.zeros(given.num_tokens, y.shape[1], dtype=torch.float32, device=y.device)
        return total.index_add_(0, given.tokens, back.float()).to(y.dtype)

    def _moved(self, rows: Tensor, received: Sequence[int], sent: Sequence[int]) -> Tensor:
        into = rows.new_empty(sum(received), *rows.shape[1:])
        self.exchange(into.view(torch.uint8), rows.view(torch.uint8), received, sent)
        return into


def require_same(calls: Mapping[str, Callable[[], object]]) -> None:
    """Nothing is timed beside what does something else.

    Raises
    ------
    AssertionError
        Says which of the calls gives something else than ``ours``, and where.
    """
    found = {name: _tensors(call()) for name, call in calls.items()}
    for name, theirs in found.items():
        for mine, other in zip(found["ours"], theirs, strict=True):
            # Sums are rounded to bf16 once each, and differ by no more than the order of additions.
            torch.testing.assert_close(other, mine, rtol=0.01, atol=0.01, msg=partial("{}: {}".format, name))


def _tensors(result: Any) -> list[Tensor]:
    """What a dispatch or a combine gave, the HAL's or a peer's, in the peers' order."""
    if hasattr(result, "recv_topk_idx"):
        x = result.recv_x if isinstance(result.recv_x, tuple) else (result.recv_x,)
        result = (x[0], result.recv_topk_idx, result.recv_topk_weights, *x[1:])
    given = result if isinstance(result, tuple) else (result,)
    found = [one for one in given if isinstance(one, Tensor)]
    return [one.float() if one.dtype == torch.float8_e4m3fn else one for one in found]
