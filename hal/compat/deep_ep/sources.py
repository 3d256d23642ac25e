"""Where received rows came from: a second dispatch of 16 bytes a row, over the same routes.

`hal.EpBuffer` returns rows in the order of source rank and position but says neither; published handles expose both,
and how many tokens every rank sent every other. So each rank sends, ahead of a row with the position of each token,
rows with its counts to all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hal.compat.deep_ep.pool import Pool

_WORDS: Final = 4


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """What the second dispatch told.

    Attributes
    ----------
    counts : Tensor
        [R, words] int32: what each rank passed.
    position : Tensor
        [rows] int32, position at the source.
    rank : Tensor
        [rows] int64, source rank.
    topk_idx : Tensor
        [rows, K] local expert ids or -1.
    """

    counts: Tensor
    position: Tensor
    rank: Tensor
    topk_idx: Tensor


def exchange(pool: Pool, num_experts: int, topk_idx: Tensor, counts: Tensor) -> Callable[[], Sources]:
    """Post the second dispatch and return what completes it.

    Parameters
    ----------
    pool : Pool
    num_experts : int
        A multiple of R.
    topk_idx : Tensor
        [n, K] int64.
    counts : Tensor
        [words] int32; the first R are tokens of this rank for each rank, and all ranks pass as many.
    """
    (n, topk), words, size = topk_idx.shape, len(counts), pool.size
    ahead = -(-words // _WORDS)
    device = topk_idx.device
    rows = torch.zeros(ahead + n, _WORDS, dtype=torch.int32, device=device)
    rows[:ahead].view(-1)[:words] = counts
    rows[ahead:, 0] = torch.arange(n, device=device)
    routes = torch.full((ahead + n, max(topk, size)), -1, dtype=torch.int64, device=device)
    routes[:ahead, :size] = torch.arange(size, device=device) * (num_experts // size)
    routes[ahead:, :topk] = topk_idx
    buffer = pool.normal(num_experts, _WORDS, routes.shape[1], torch.float32)
    # The bits of the integers travel as float32: rows are moved, never computed with.
    sent = buffer.dispatch(rows.view(torch.float32), routes, async_finish=True)

    def complete() -> Sources:
        sent.event.wait()
        assert isinstance(sent.recv_x, Tensor)
        got = sent.recv_x.view(torch.int32)
        told, keep, at = [], [], 0
        for _ in range(size):
            told.append(got[at : at + ahead].reshape(-1)[:words])
            number = int(told[-1][pool.rank])
            keep.append(torch.arange(at + ahead, at + ahead + number, device=device))
            at += ahead + number
        where = torch.cat(keep)
        lengths = torch.tensor([len(one) for one in keep], device=device)
        return Sources(
            torch.stack(told),
            got[where, 0],
            torch.repeat_interleave(torch.arange(size, device=device), lengths),
            sent.recv_topk_idx[where, :topk],
        )

    return complete
