"""Combine in the normal mode, on any device: rows are staged where peers can read them, fetched, and summed."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hal.ep.engine import EpCombined
from hal.ep.fields import COMBINE_FIELDS
from hal.ep.sums import spread, summed
from hal.portable.ep_kernels import Rows
from hal.portable.ep_post import Operation
from hal.portable.ep_routes import Routes
from hal.portable.ep_rows import Place, RowCalls
from hal.portable.ep_windows import Lease
from hal.spec.ep import EpCombineArgs, EpHandle

_PLAIN, _WEIGHTED, _PARTIAL, _GATHERED = range(4)
"""Kinds of combine, as `COMBINE_FIELDS` names them."""


class CombineCalls(RowCalls):
    """The call, and what several nodes need of it."""

    def combine(self, args: EpCombineArgs) -> EpCombined:
        """Stage the rows where peers can read them; the finish fetches and sums."""
        handle, weights = args.handle, args.topk_weights
        out = torch.empty(handle.num_tokens, self._args.hidden, dtype=args.x.dtype, device=args.x.device)
        sums = None
        if weights is not None:
            sums = torch.empty(handle.num_tokens, handle.topk, dtype=torch.float32, device=args.x.device)
        with self._calling():
            op = self._begin("combine")
            aux = self._offer(op, handle, args.x, weights, _PLAIN if weights is None else _WEIGHTED)

        def finish() -> None:
            table, columns, place = self._fetch(op, handle, args.x, aux, False)
            queue = self._kernels.device.queue()
            biases = [one if one.stride(1) == 1 else one.contiguous() for one in args.bias]
            self._kernels.reduce(queue, out, table, place, None, biases)
            queue.finish()
            if sums is not None and columns is not None:
                first = place >= 0
                if handle.expand:
                    sums.copy_(spread(columns[:, :, 0], routes_of(handle).idx, first))
                else:
                    sums.copy_(summed(columns, first))

        return EpCombined(out, sums, self._finish(op, finish))

    def gather(self, x: Tensor, handle: EpHandle) -> Tensor:
        """One fetch into zeros."""
        with self._calling():
            op = self._begin("combine")
            self._offer(op, handle, x, None, _GATHERED)
            try:
                return self._fetch(op, handle, x, 0, True)[0]
            finally:
                self._done(op)

    def partial(self, x: Tensor, handle: EpHandle) -> Tensor:
        """The sum of `combine`, left in float32."""
        out = torch.empty(handle.num_tokens, x.shape[1], dtype=torch.float32, device=x.device)
        with self._calling():
            op = self._begin("combine")
            self._offer(op, handle, x, None, _PARTIAL)
            try:
                table, _, place = self._fetch(op, handle, x, 0, False)
            finally:
                self._done(op)
            queue = self._kernels.device.queue()
            self._kernels.reduce(queue, out, table, place)
            queue.finish()
        return out

    def _offer(self, op: Operation, handle: EpHandle, x: Tensor, weights: Tensor | None, kind: int) -> int:
        """Stage rows, and the weights that go back with them, and tell everybody where."""
        row = x.shape[1] * x.itemsize
        aux = 0 if weights is None else 1 if handle.expand else handle.topk
        count = len(x)
        lease = self._stage(op, Place.size(count, row, aux))
        op.record["tokens"] = count
        queue = self._kernels.device.queue()
        if lease is not None:
            place = Place(lease.window.memory, count, row, aux)
            every = torch.arange(count, dtype=torch.int32, device=x.device)
            self._kernels.copy(queue, place.rows(), self._kernels.rows_of(queue, x), every, 0, count, count, False)
            if weights is not None:
                words = self._kernels.rows_of(queue, weights.view(count, aux))
                self._kernels.copy(queue, place.words(), words, every, 0, count, count, False)
        self._signal(queue, op)
        queue.finish()
        fields = [kind, routes_of(handle).number]
        self._post(op, {"fields": fields, "stage": [*named(lease), count]})
        return aux

    def _fetch(
        self, op: Operation, handle: EpHandle, x: Tensor, aux: int, zeros: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Rows [n, K, C] of this rank's tokens from all neighbours, what goes with them, and which there are."""
        routes = routes_of(handle)
        letters = self._await_letters(op)
        self._agreed(op, letters, COMBINE_FIELDS)
        self._await_flags(op)
        n, topk = routes.idx.shape
        starts = [starts_of(routes, peer, handle.expand, handle.expert_alignment) for peer in range(self._near.ranks)]
        rank, row = routes.places(starts)
        make = torch.zeros if zeros else torch.empty
        table = make(n, topk, x.shape[1], dtype=x.dtype, device=x.device)
        columns = torch.zeros(n, topk, aux, dtype=torch.float32, device=x.device) if aux else None
        if n:
            queue = self._kernels.device.queue()
            to = Rows(queue.write(table)[0], x.shape[1] * x.itemsize)
            words_to = None if columns is None else Rows(queue.write(columns)[0], 4 * aux)
            for peer in range(self._near.ranks):
                number, size, count = letters[peer]["stage"]
                if not count:
                    continue
                chosen = row.masked_fill(rank != peer, -1).flatten()
                memory = self._window_of(op, peer, number).memory
                place = Place(memory, self._checked(op, peer, count, size, to.row_bytes, aux), to.row_bytes, aux)
                self._kernels.copy(queue, to, place.rows(), chosen, 0, n * topk, count, False)
                if words_to is not None:
                    self._kernels.copy(queue, words_to, place.words(), chosen, 0, n * topk, count, False)
            self._kernels.finish(queue)
        self._read(op)
        return table, columns, row

    def _checked(self, op: Operation, peer: int, count: int, size: int, row: int, aux: int) -> int:
        if Place.size(count, row, aux) > size:
            raise self._fail(self._lost(op, peer, "its rows lie outside its window"))
        return count


def starts_of(routes: Routes, peer: int, expand: bool, alignment: int) -> list[int]:
    """Where a neighbour's rows begin, of every expert or altogether, and their end."""
    if not expand:
        return [0, routes.total(peer)]
    return [0, *accumulate(-(-count // alignment) * alignment for count in routes.per_expert(peer))]


def named(lease: Lease | None) -> list[int]:
    """What peers are told of a window: its number and size."""
    return [0, 0] if lease is None else [lease.number, lease.size]


def routes_of(handle: EpHandle) -> Routes:
    """What a handle carries."""
    state: Any = handle.state
    assert isinstance(state, Routes)
    return state
