"""Combine in the normal mode, on any device: rows are staged where peers can read them, fetched, and summed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hal.ep.engine import EpCombined
from hal.ep.fields import COMBINE_FIELDS
from hal.ep.sums import spread, summed
from hal.portable.ep_post import Operation
from hal.portable.ep_routes import Routes
from hal.portable.ep_rows import Fetched, Place, RowCalls
from hal.portable.ep_windows import Lease
from hal.spec.ep import EpCombineArgs, EpHandle

_PLAIN, _WEIGHTED, _PARTIAL, _GATHERED = range(4)
"""Kinds of combine, as `COMBINE_FIELDS` names them."""


class CombineCalls(RowCalls):
    """The call, and what several nodes need of it."""

    def combine(self, args: EpCombineArgs) -> EpCombined:
        """Stage the rows where peers can read them; the finish fetches and sums."""
        handle, weights, sums = args.handle, args.topk_weights, None
        with self._calling("combine"):
            out = torch.empty(handle.num_tokens, self._args.hidden, dtype=args.x.dtype, device=args.x.device)
            if weights is not None:
                sums = torch.empty(handle.num_tokens, handle.topk, dtype=torch.float32, device=args.x.device)
            op = self._begin("combine")
            aux = self._offer(op, handle, args.x, weights, _PLAIN if weights is None else _WEIGHTED)

        def finish() -> None:
            idx, biases = routes_of(handle).idx, [one if one.stride(1) == 1 else one.contiguous() for one in args.bias]
            for part, table, columns, place in self._fetch(op, handle, args.x, aux):
                queue = self._kernels.device.queue()
                self._kernels.reduce(queue, out[part], table, place, None, [one[part] for one in biases])
                queue.finish()
                if sums is not None and handle.expand:
                    sums[part] = spread(columns[:, :, 0], idx[part], place >= 0)
                elif sums is not None:
                    sums[part] = summed(columns, place >= 0)

        return EpCombined(out, sums, self._finish(op, finish))

    def gather(self, x: Tensor, handle: EpHandle) -> Tensor:
        """One fetch into zeros."""
        with self._calling("combine"):
            op = self._begin("combine")
            self._offer(op, handle, x, None, _GATHERED)
            try:
                tables = [table for _, table, _, _ in self._fetch(op, handle, x, 0)]
            finally:
                self._done(op)
            return torch.cat([x.new_zeros(0, handle.topk, x.shape[1]), *tables])

    def partial(self, x: Tensor, handle: EpHandle) -> Tensor:
        """The sum of `combine`, left in float32."""
        with self._calling("combine"):
            out = torch.empty(handle.num_tokens, x.shape[1], dtype=torch.float32, device=x.device)
            op = self._begin("combine")
            self._offer(op, handle, x, None, _PARTIAL)
            try:
                for part, table, _, place in self._fetch(op, handle, x, 0):
                    queue = self._kernels.device.queue()
                    self._kernels.reduce(queue, out[part], table, place)
                    queue.finish()
            finally:
                self._done(op)
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

    def _fetch(self, op: Operation, handle: EpHandle, x: Tensor, aux: int) -> Iterator[Fetched]:
        """Once all neighbours have staged theirs, what `_fetched` brings."""
        routes = routes_of(handle)
        letters = self._await_letters(op)
        self._agreed(op, letters, COMBINE_FIELDS)
        self._await_flags(op)
        order = range(self._near.ranks)
        rank, row = routes.places([starts_of(routes, peer, handle.expand, handle.expert_alignment) for peer in order])
        return self._fetched(op, letters, x, rank, row, aux)


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
