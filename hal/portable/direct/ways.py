"""The ways of a call's tokens, as a device has counted them; kept by handles."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hal.portable.direct.bins import Bins
from hal.portable.runtime import Memory


@dataclass(slots=True, eq=False)
class Ways:
    """Where tokens go, at which rows they lie there, and where what comes in came from.

    Attributes
    ----------
    number : int
        Of the operation that counted, the same on all ranks.
    here : int
        This rank.
    most : int
        Tokens of a rank that there is room for below.
    bins : Bins
    topk : int
    memory : Memory
        In which the following are, by address, the first where it begins: given to kernels in its place it is kept by
        their queue.
    all_routes, counted, begins, listed, totals : int
        What `ep_count` and `ep_places` leave for `ep_fetch`.
    routes, order : int
        [n, K] of this rank's tokens: experts, -1 where dropped, and places.
    bases : int
        [spots]: where this rank's rows begin at each bin.
    counts : ndarray
        [R, bins]: what comes of what every rank sends, where the host was told.
    sent : ndarray
        [R, R]: how many tokens each rank sends to each, also those that there is no room for.
    before : Ways or None
        Whose memory has some of it: a larger one took its place.
    dropped : int
        Rows that this rank has no room for.
    stream : object
        Current when the memory was given, which is freed in its order.
    position, choice : Tensor
        [rows] int32: where each received row came from.
    """

    number: int
    here: int
    most: int
    bins: Bins
    topk: int
    memory: Memory
    all_routes: int
    counted: int
    begins: int
    listed: int
    totals: int
    routes: int
    order: int
    bases: int
    counts: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    sent: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    before: Ways | None = None
    dropped: int = 0
    stream: object = None
    position: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32, device="cpu"))
    choice: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32, device="cpu"))

    @staticmethod
    def words(bins: Bins, most: int, topk: int, n: int) -> tuple[int, ...]:
        """How much memory each of its pieces takes, in their order."""
        ranks, own, spots = bins.ranks, bins.own, bins.spots
        everybody = ranks * -(-most * topk // 4) * 4
        return (everybody, ranks * bins.all, ranks * own, ranks * own * most, spots + own, n * topk, n * topk, spots)

    def again(self) -> Ways:
        """The same ways for another dispatch."""
        return replace(self)

    def between_ranks(self) -> npt.NDArray[np.int32]:
        """[R, R]: how many tokens of each rank come to each."""
        return self.counts[:, : self.bins.ranks]

    def of_own_experts(self) -> npt.NDArray[np.int32]:
        """[R, L]: tokens of each rank for each of this rank's experts."""
        begin = self.bins.by_rank + self.here * self.bins.local - self.bins.first
        return self.counts[:, begin : begin + self.bins.local]

    def starts(self, rank: int, alignment: int) -> list[int]:
        """Where a rank's rows begin, of every expert or altogether, and their end."""
        if not self.bins.expanded:
            return [0, int(self.between_ranks()[:, rank].sum())]
        begin = self.bins.by_rank + rank * self.bins.local
        each = self.counts[:, begin : begin + self.bins.local].sum(0)
        return [0, *accumulate(-(-int(count) // alignment) * alignment for count in each)]

    # What a handle tells of its rows: hal.spec.ep.EpSources.

    def rank(self) -> Tensor:
        """Source rank of each row: rows stand by expert where they are ordered so, then by source."""
        counts: Any = self.of_own_experts().T if self.bins.expanded else self.between_ranks()[:, self.here][None]
        ranks = np.tile(np.arange(self.bins.ranks, dtype=np.int32), len(counts)).repeat(counts.flatten())
        position = self.position.cpu()
        found = torch.full((len(position),), -1, dtype=torch.int32, device="cpu")
        there = position >= 0
        found[there] = torch.from_numpy(ranks)
        return found.to(self.position.device)

    def sources(self) -> Sources:
        """For a handle."""
        return Sources(self)


class Sources:
    """See `hal.spec.ep.EpSources`."""

    __slots__ = ("_ways",)

    def __init__(self, ways: Ways) -> None:
        self._ways = ways

    def rank(self) -> Tensor:
        """By the counts."""
        return self._ways.rank()

    def position(self) -> Tensor:
        """As the kernel has written them."""
        return self._ways.position

    def choice(self) -> Tensor:
        """Likewise."""
        return self._ways.choice

    def counts(self) -> Tensor:
        """Of this rank's experts."""
        return torch.from_numpy(self._ways.of_own_experts().copy())

    def sent(self) -> Tensor:
        """Between ranks."""
        return torch.from_numpy(self._ways.sent.copy())
