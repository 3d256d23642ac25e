"""The ways of a call's tokens: where they go, at which rows they lie there, and where what comes in came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hal.ep.neighbours import Neighbours
from hal.portable.ep_kernels import EpKernels
from hal.spec.ep import EpBufferArgs

Counts = list[list[list[int]]]
"""By sending neighbour and source: how many rows for each bin."""


class Routes:
    """The ways of one dispatch, kept by its handle.

    Attributes
    ----------
    begin : list of int
        Where the tokens of each source begin, and their end.
    idx : Tensor
        [n, K] int32, without choices that were dropped.
    lists : list of Tensor
        Of each source, the tokens for each neighbour p from ``p · tokens of the source`` on, counted from its begin.
    order : Tensor
        [n, K]: the place of a choice's row among those of its source in its bin, -1 where it has none.
    bins : Tensor
        [n, K]: the neighbour or, by experts, the expert among the node's; 0 where there is none.
    ranks, experts : list of list of int
        [sources, neighbours] and [sources, neighbours · L]: what this rank sends.
    by_expert : bool
    number : int
        Of the operation, the same on all ranks.
    all_ranks, all_experts : Counts
        What every neighbour sends, once they have told.
    sent : list
        By neighbour and source: tokens for each rank of the group.
    rows : int
        Received.
    dropped : int
    position, choice : Tensor
        [rows] int32: where each received row came from, once it is there.
    """

    def __init__(self, args: EpBufferArgs, near: Neighbours, begin: Sequence[int], idx: Tensor) -> None:
        self._args, self._near = args, near
        self.begin = list(begin)
        self.idx = idx
        self.number = self.rows = self.dropped = 0
        self.all_ranks: Counts = []
        self.all_experts: Counts = []
        self.sent: list[list[list[int]]] = []
        self.position = self.choice = torch.empty(0, dtype=torch.int32, device="cpu")

    def count(self, kernels: EpKernels, by_expert: bool, repeat: bool) -> None:
        """Find the ways of all tokens to this node's ranks."""
        near, local, device = self._near, self._args.local_experts, self.idx.device
        base = near.first * local
        queue = kernels.device.queue()
        found: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
        for s in range(near.sources):
            part = self.idx[self.begin[s] : self.begin[s + 1]]
            n = len(part)
            starts = n * torch.arange(near.ranks, dtype=torch.int32, device=device)
            ranks = kernels.layout(queue, part, starts, n * near.ranks, base, local, near.ranks, False)
            bins = near.ranks * local
            starts = n * torch.arange(bins, dtype=torch.int32, device=device)
            experts = kernels.layout(queue, part, starts, n * bins, base, 1, bins, repeat)
            found.append((ranks, experts))
        queue.finish()
        self.by_expert = by_expert
        self.lists = [ranks[2] for ranks, _ in found]
        self.order = torch.cat([(experts if by_expert else ranks)[1] for ranks, experts in found])
        bins_of = self.idx - base
        there = (self.idx >= 0) & (bins_of >= 0) & (bins_of < near.ranks * local)
        self.bins = torch.where(there, bins_of if by_expert else bins_of // local, 0).long()
        self.ranks = [ranks[0].tolist() for ranks, _ in found]
        self.experts = [experts[0].tolist() for _, experts in found]

    def without(self, kernels: EpKernels, accepted: Sequence[Sequence[int]]) -> Routes:
        """The same ways, but only the first ``accepted[s][p]`` tokens of source s to neighbour p."""
        near, local = self._near, self._args.local_experts
        idx = self.idx.clone()
        for s in range(near.sources):
            n = self.begin[s + 1] - self.begin[s]
            part = idx[self.begin[s] : self.begin[s + 1]]
            for p in range(near.ranks):
                late = self.lists[s][p * n + accepted[s][p] : p * n + self.ranks[s][p]].long()
                rows = part[late]
                part[late] = torch.where((rows >= 0) & (rows // local == near.first + p), -1, rows)
        fewer = Routes(self._args, near, self.begin, idx)
        fewer.count(kernels, self.by_expert, False)
        return fewer

    def again(self) -> Routes:
        """The same ways for another dispatch."""
        same = Routes(self._args, self._near, self.begin, self.idx)
        for name in ("lists", "order", "bins", "ranks", "experts", "by_expert", "all_ranks", "all_experts", "sent"):
            setattr(same, name, getattr(self, name))
        same.dropped = self.dropped
        return same

    def total(self, peer: int) -> int:
        """Tokens that come to a neighbour."""
        return sum(row[peer] for sources in self.all_ranks for row in sources)

    def per_expert(self, peer: int) -> list[int]:
        """Rows that come for each of its experts."""
        local = self._args.local_experts
        found = [0] * local
        for sources in self.all_experts:
            for row in sources:
                for e in range(local):
                    found[e] += row[peer * local + e]
        return found

    def window_rows(self, peer: int) -> list[int]:
        """Where the tokens of each neighbour begin in the window of a dispatch to ``peer``, and their end."""
        begin = [0]
        for sources in self.all_ranks:
            begin.append(begin[-1] + sum(row[peer] for row in sources))
        return begin

    def arrivals(self, begin: Sequence[int], device: torch.device) -> Tensor:
        """Rows of this rank's window in the order of blocks, that is, of source and sender."""
        near = self._near
        at = list(begin)
        parts = []
        for s in range(near.sources):
            for p in range(near.ranks):
                count = self.all_ranks[p][s][near.here]
                parts.append(torch.arange(at[p], at[p] + count, dtype=torch.int32, device="cpu"))
                at[p] += count
        return torch.cat(parts).to(device)

    def places(self, groups: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Neighbour and row there [n, K] of every choice, -1 where there is none.

        Parameters
        ----------
        groups : sequence of sequence of int
            For each neighbour where the rows of each of its experts begin; by ranks, where all begin.
        """
        near, local, here = self._near, self._args.local_experts, self._near.here
        spans = local if self.by_expert else 1
        counts = self.all_experts if self.by_expert else self.all_ranks
        table = torch.zeros(near.sources, near.ranks * spans, dtype=torch.int32, device="cpu")
        for d in range(near.ranks):
            for e in range(spans):
                at, column = groups[d][e], d * spans + e
                for s in range(near.sources):
                    for p in range(near.ranks):
                        if p == here:
                            table[s, column] = at
                        at += counts[p][s][column]
        device = self.idx.device
        table = table.to(device)
        source = torch.cat(
            [
                torch.full((self.begin[s + 1] - self.begin[s],), s, dtype=torch.long, device="cpu")
                for s in range(near.sources)
            ]
        ).to(device)
        row = table[source[:, None], self.bins] + self.order
        rank = (self.bins // spans).to(torch.int32)
        return rank.masked_fill(self.order < 0, -1), row.masked_fill(self.order < 0, -1)

    def blocks(self, by_expert: bool) -> list[Any]:
        """What came, by block: rows or, by expert, rows for each local expert."""
        near, local = self._near, self._args.local_experts
        found: list[Any] = []
        for s in range(near.sources):
            for p in range(near.ranks):
                if by_expert:
                    found.append(self.all_experts[p][s][near.here * local : (near.here + 1) * local])
                else:
                    found.append(self.all_ranks[p][s][near.here])
        return found

    # What a handle tells of its rows: hal.spec.ep.EpSources.

    def rank(self) -> Tensor:
        """Source rank of each row."""
        near = self._near
        if self.by_expert:
            order = [(e, block) for e in range(self._args.local_experts) for block in range(len(near.origins))]
            counts = self.blocks(True)
            sizes = [counts[block][e] for e, block in order]
            ranks = near.origins[[block for _, block in order]]
        else:
            sizes, ranks = self.blocks(False), near.origins
        found = torch.full((len(self.position),), -1, dtype=torch.int32, device="cpu")
        position = self.position.cpu()
        there = position >= 0
        found[there] = ranks.repeat_interleave(torch.tensor(sizes, device="cpu"))[: int(there.sum())]
        return found.to(self.position.device)

    def counts(self) -> Tensor:
        """Tokens of each rank for each local expert."""
        return torch.tensor(self.blocks(True), dtype=torch.int32, device="cpu")[self._near.blocks]

    def sent_counts(self) -> Tensor:
        """Tokens of each rank for each rank."""
        near = self._near
        by_block = [self.sent[p][s] for s in range(near.sources) for p in range(near.ranks)]
        return torch.tensor(by_block, dtype=torch.int32, device="cpu")[near.blocks]


class Sources:
    """See `hal.spec.ep.EpSources`."""

    __slots__ = ("_routes",)

    def __init__(self, routes: Routes) -> None:
        self._routes = routes

    def rank(self) -> Tensor:
        """By the counts of blocks."""
        return self._routes.rank()

    def position(self) -> Tensor:
        """As the senders wrote them."""
        return self._routes.position

    def choice(self) -> Tensor:
        """By the choices that came."""
        return self._routes.choice

    def counts(self) -> Tensor:
        """As the senders told."""
        return self._routes.counts()

    def sent(self) -> Tensor:
        """As the senders told."""
        return self._routes.sent_counts()
