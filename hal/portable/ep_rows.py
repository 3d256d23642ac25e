"""Rows on their way into peers' windows, out of the own one, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hal.ep.lines import Message
from hal.ep.relay import NodeEngine
from hal.portable.ep_kernels import Rows
from hal.portable.ep_node import NodeCalls
from hal.portable.ep_post import Operation
from hal.portable.ep_routes import Routes
from hal.portable.runtime import Memory, Queue

_TABLE: Final = 64 << 20
"""Bytes of rows that are fetched before they are summed."""

Fetched = tuple[slice, Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """Room for rows in a window: ``capacity`` rows of ``row`` bytes, then as many of ``aux`` 32-bit words.

    Attributes
    ----------
    memory : Memory
    capacity, row, aux : int
    first : int
        The row from which on this rank may write.
    at : int
        The byte where it begins.
    """

    memory: Memory
    capacity: int
    row: int
    aux: int
    first: int = 0
    at: int = 0

    @staticmethod
    def size(capacity: int, row: int, aux: int) -> int:
        """Bytes of the whole; no row takes none."""
        return _up16(capacity * row) + _up16(4 * capacity * aux)

    def rows(self, begin: int = 0) -> Rows:
        """The rows from one on."""
        return Rows(self.memory, self.row, self.at + (self.first + begin) * self.row)

    def words(self, begin: int = 0) -> Rows:
        """What goes with them."""
        after = self.at + _up16(self.capacity * self.row)
        return Rows(self.memory, 4 * self.aux, after + (self.first + begin) * 4 * self.aux)


class RowCalls(NodeCalls, NodeEngine):
    """What the calls of both modes do with rows."""

    def _push(self, queue: Queue, op: Operation, routes: Routes, x: Tensor, aux: Tensor, into: Sequence[Place]) -> None:
        """Send every token to the neighbours it is for, once each, and tell them."""
        rows, words = self._kernels.rows_of(queue, x), self._kernels.rows_of(queue, aux)
        for peer, place in enumerate(into):
            done = 0
            for s, chosen in enumerate(routes.lists):
                begin, end = routes.begin[s : s + 2]
                count = routes.ranks[s][peer]
                for to, source in ((place.rows(done), rows), (place.words(done), words)):
                    part = Rows(source.memory, source.row_bytes, source.at + begin * source.stride, source.stride)
                    self._kernels.copy(queue, to, part, chosen, peer * (end - begin), count, end - begin, False)
                done += count
        self._signal(queue, op)

    def _expect(self, op: Operation, routes: Routes) -> None:
        """What to say of a rank whose rows do not come."""
        near, local = self._near, self._args.local_experts
        for peer in range(near.ranks):
            op.expected.append(sum(row[near.here] for row in routes.all_ranks[peer]))
            mine = [row[near.here * local : (near.here + 1) * local] for row in routes.all_experts[peer]]
            first = next((e for e in range(local) if any(row[e] for row in mine)), None)
            op.expert.append(-1 if first is None else self._args.rank * local + first)

    def _words(self, queue: Queue, places: Sequence[Place], rows: Sequence[Tensor]) -> Tensor:
        """What came with the rows, of each from the place whose list has it."""
        count = len(rows[0])
        found = torch.empty(max(count, 1), places[0].aux, dtype=torch.int32, device=rows[0].device)
        to = Rows(queue.write(found)[0], 4 * places[0].aux)
        for place, chosen in zip(places, rows, strict=True):
            self._kernels.copy(queue, to, place.words(), chosen, 0, count, place.capacity, False)
        queue.finish()
        return found[:count]

    def _pull(self, queue: Queue, out: Tensor, places: Sequence[Place], rows: Sequence[Tensor], clear: bool) -> None:
        """Fill rows [m, …] of ``out`` from the place whose list has them; those of none become 0 with ``clear``."""
        count = len(rows[0])
        if not count:
            return
        to = Rows(queue.write(out, partly=True)[0], places[0].row)
        for place, chosen in zip(places, rows, strict=True):
            self._kernels.copy(queue, to, place.rows(), chosen, 0, count, place.capacity, clear)
            clear = False

    def _fetched(
        self, op: Operation, letters: Mapping[int, Message], x: Tensor, rank: Tensor, row: Tensor, aux: int = 0
    ) -> Iterator[Fetched]:
        """Rows of this rank's tokens from where the neighbours ``rank`` [n, K] have staged them, at ``row`` [n, K].

        Some tokens at a time, so that memory does not grow with them: which, their rows [m, K, C] like those of x, the
        words that go with these, and their part of ``row``. After the last all neighbours are told.
        """
        topk, width = row.shape[1], x.shape[-1]
        size = width * x.itemsize
        places = []
        for peer in range(self._near.ranks):
            number, there, count = letters[peer]["stage"]
            if Place.size(count, size, aux) > there:
                raise self._fail(self._lost(op, peer, "its rows lie outside its window"))
            if count:
                places.append((peer, Place(self._window_of(op, peer, number).memory, count, size, aux)))
        step = max(1, _TABLE // (topk * size))
        for begin in range(0, len(row), step):
            part = slice(begin, begin + step)
            place = row[part].contiguous()
            table = torch.zeros(len(place), topk, width, dtype=x.dtype, device=x.device)
            words = torch.zeros(len(place), topk, aux, dtype=torch.float32, device=x.device)
            queue = self._kernels.device.queue()
            to = Rows(queue.write(table, partly=True)[0], size)
            words_to = Rows(queue.write(words, partly=True)[0], 4 * aux) if aux else None
            for peer, staged in places:
                chosen = place.masked_fill(rank[part] != peer, -1).flatten()
                self._kernels.copy(queue, to, staged.rows(), chosen, 0, len(chosen), staged.capacity, False)
                if words_to is not None:
                    self._kernels.copy(queue, words_to, staged.words(), chosen, 0, len(chosen), staged.capacity, False)
            self._kernels.finish(queue)
            yield part, table, words, place
        self._read(op)

    def _local(self, idx: Tensor) -> Tensor:
        """Of experts of the group those of this rank, by their numbers here; -1 for others."""
        local = self._args.local_experts
        here = idx - self._args.rank * local
        return here.masked_fill((here < 0) | (here >= local), -1)


def chosen_of(rows: Tensor, selected: Tensor) -> Tensor:
    """``rows[selected]``, -1 where nothing is selected."""
    if not len(rows):
        return torch.full_like(selected, -1)
    return rows[selected.clamp(min=0).long()].masked_fill(selected < 0, -1)


def _up16(size: int) -> int:
    return -(-size // 16) * 16
