"""The normal mode on any device: dispatch and combine, and what several nodes need of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any, Final

import torch
from torch import Tensor

from hal.ep.engine import EpCombined, EpDispatched
from hal.ep.fields import COMBINE_FIELDS, DISPATCH_FIELDS
from hal.ep.lines import Message
from hal.ep.relay import Relayed
from hal.ep.sums import spread, summed
from hal.portable.ep_kernels import Rows
from hal.portable.ep_post import AGAIN, GRANT, Operation
from hal.portable.ep_routes import Routes, Sources
from hal.portable.ep_rows import Place, RowCalls, chosen_of
from hal.portable.ep_windows import Lease
from hal.portable.runtime import Memory
from hal.spec.ep import FP8, PLAIN_DTYPES, EpCombineArgs, EpDispatchArgs, EpHandle
from hal.spec.errors import DeviceError, SpecError

_DTYPES: Final = (*PLAIN_DTYPES, FP8)
_PLAIN, _WEIGHTED, _PARTIAL, _GATHERED = range(4)
"""Kinds of combine, as `COMBINE_FIELDS` names them."""


class NormalCalls(RowCalls):
    """The calls of the normal mode."""

    def dispatch(self, args: EpDispatchArgs) -> EpDispatched:
        """Exchange counts, write rows into the receivers' windows; the finish puts them in order."""
        n = len(args.topk_idx)
        positions = torch.arange(n, dtype=torch.int32, device=args.x.device)
        return self._dispatch(args, Relayed([0, n], positions, torch.empty(0)))

    def relay(self, args: EpDispatchArgs, tokens: Relayed) -> EpDispatched:
        """As `dispatch`, for tokens of several ranks."""
        return self._dispatch(args, tokens)

    def _dispatch(self, args: EpDispatchArgs, tokens: Relayed) -> EpDispatched:
        with self._calling():
            op = self._begin("dispatch")
            op.record["tokens"] = len(args.x)
            bad = self._bad_experts(args.topk_idx)
            if bad is not None:
                raise self._refused(op, bad)
            offer = self._windows.largest()
            try:
                routes = self._meet(op, args, tokens, offer)
                into, lease = self._granted(op, args, routes, offer)
            except SpecError:
                self._windows.give_back(offer)
                self._done(op)
                raise
            queue = self._kernels.device.queue()
            self._push(queue, op, routes, args.x, _aux(args, tokens), into)
            queue.finish()
            self._expect(op, routes)
            return self._receive(op, args, routes, into[self._near.here], lease)

    def _bad_experts(self, idx: Tensor) -> SpecError | None:
        if not len(idx) or not bool(((idx < -1) | (idx >= self._args.num_experts)).any()):
            return None
        legal = f"-1 (no expert) or 0…{self._args.num_experts - 1}"
        return SpecError("topk_idx", f"an expert out of range on rank {self._args.rank}", legal)

    def _meet(self, op: Operation, args: EpDispatchArgs, tokens: Relayed, offer: Lease | None) -> Routes:
        """Agree on the call and on who sends how much."""
        x, scales, cached = args.x, args.scales, args.handle
        if cached is None:
            routes = Routes(self._args, self._near, tokens.begin, args.topk_idx.to(torch.int32))
            routes.count(self._kernels, args.expand, False)
        else:
            routes = _routes(cached).again()
        routes.number = op.number
        fields = [
            args.topk_weights is not None,
            args.topk_idx.shape[1],
            _DTYPES.index(x.dtype),
            0 if scales is None else 4 * scales.shape[1],
            scales is not None and scales.dtype == torch.int32,
            args.expand,
            args.expert_alignment,
            args.num_worst_tokens,
            0 if cached is None else _routes(cached).number,
        ]
        letter: Message = {"fields": [int(one) for one in fields], "offer": _named(offer)}
        if cached is None:
            sent = tokens.sent.tolist() if len(tokens.sent) else routes.ranks
            letter |= {"ranks": routes.ranks, "experts": routes.experts, "sent": sent}
        self._post(op, letter)
        letters = self._await_letters(op)
        self._agreed(op, letters, DISPATCH_FIELDS)
        self._offers = [tuple(letters[peer]["offer"]) for peer in range(self._near.ranks)]
        if cached is None:
            routes.sent = [letters[peer]["sent"] for peer in range(self._near.ranks)]
            _learn(routes, letters)
            routes = self._fitting(op, args, routes)
        return routes

    def _fitting(self, op: Operation, args: EpDispatchArgs, routes: Routes) -> Routes:
        """The ways of what there is room for.

        Raises
        ------
        SpecError
            The same on all ranks, where there must be room for all.
        """
        room, ranks = self._args.max_recv_tokens, range(self._near.ranks)
        totals = [routes.total(peer) for peer in ranks]
        if self._args.overflow == "error" and max(totals) > room:
            peer = next(peer for peer in ranks if totals[peer] > room)
            got = f"{room}, while rank {self._near.first + peer} would receive {totals[peer]} rows"
            raise SpecError("max_recv_tokens", got, "room for what is sent, or overflow='drop' or 'grow'")
        if self._args.overflow == "drop" and max(totals) > room:
            fewer = routes.without(self._kernels, self._accepted(routes, room))
            fewer.number, fewer.sent = routes.number, routes.sent
            fewer.dropped = max(0, totals[self._near.here] - room)
            self._post(op, {"ranks": fewer.ranks, "experts": fewer.experts}, AGAIN)
            _learn(fewer, self._await_letters(op, AGAIN))
            routes = fewer
        for peer in ranks:
            rows = _starts(routes, peer, args.expand, args.expert_alignment)[-1]
            if 0 < args.num_worst_tokens < rows:
                got = f"{args.num_worst_tokens}, while rank {self._near.first + peer} would receive {rows} rows"
                raise SpecError("num_worst_tokens", got, "room for what is sent")
        return routes

    def _accepted(self, routes: Routes, room: int) -> list[list[int]]:
        """By source and receiver, how many of this rank's tokens are not beyond the room, in the order of blocks."""
        near = self._near
        left = [room] * near.ranks
        accepted = [[0] * near.ranks for _ in range(near.sources)]
        for s in range(near.sources):
            for p in range(near.ranks):
                for d in range(near.ranks):
                    fits = min(left[d], routes.all_ranks[p][s][d])
                    left[d] -= fits
                    if p == near.here:
                        accepted[s][d] = fits
        return accepted

    def _granted(
        self, op: Operation, args: EpDispatchArgs, routes: Routes, offer: Lease | None
    ) -> tuple[list[Place], Lease | None]:
        """Where to write at every neighbour: the window it offered or, where that is too small, another."""
        near, (row, aux) = self._near, _widths(args)
        sizes = [Place.size(routes.total(peer), row, aux) for peer in range(near.ranks)]
        larger = [peer for peer in range(near.ranks) if sizes[peer] > self._offers[peer][1]]
        numbers = [number for number, _ in self._offers]
        if near.here in larger:
            self._windows.give_back(offer)
            try:
                offer = self._windows.take(sizes[near.here])
                self._post(op, {"offer": _named(offer)}, GRANT)
            except DeviceError as error:
                got = f"{routes.total(near.here)} rows, for which rank {self._args.rank} lacks memory ({error})"
                self._post(op, {"refused": ["max_recv_tokens", got, "what fits in memory"]}, GRANT)
        if larger:
            granted = self._await_letters(op, GRANT, larger)
            for peer in larger:
                if "refused" in granted[peer]:
                    raise SpecError(*granted[peer]["refused"])
                numbers[peer] = granted[peer]["offer"][0]
        into = []
        for peer, size in enumerate(sizes):
            begin = routes.window_rows(peer)
            memory: Memory = self._flags.window.memory  # of no use where nothing comes
            if size:
                memory = self._window_of(op, peer, numbers[peer]).memory
            into.append(Place(memory, begin[-1], row, aux, begin[near.here]))
        return into, offer

    def _receive(
        self, op: Operation, args: EpDispatchArgs, routes: Routes, mine: Place, lease: Lease | None
    ) -> EpDispatched:
        """The tensors of a dispatch, and what fills them."""
        near, x, scales, topk = self._near, args.x, args.scales, args.topk_idx.shape[1]
        device, local = x.device, self._args.local_experts
        starts = _starts(routes, near.here, args.expand, args.expert_alignment)
        routes.rows = rows = args.num_worst_tokens or starts[-1]
        recv_x = torch.empty(rows, x.shape[1], dtype=x.dtype, device=device)
        recv_scales = None if scales is None else scales.new_empty(rows, scales.shape[1])
        shape = (rows,) if args.expand else (rows, topk)
        recv_idx = torch.empty(shape, dtype=torch.int64, device=device)
        recv_weights = None if args.topk_weights is None else torch.empty(shape, dtype=torch.float32, device=device)
        weighted, expand, width = recv_weights is not None, args.expand, 0 if scales is None else scales.shape[1]
        whole = Place(mine.memory, mine.capacity, mine.row, mine.aux)
        begin = routes.window_rows(near.here)

        def finish() -> None:
            self._await_flags(op)
            queue = self._kernels.device.queue()
            arrived = routes.arrivals(begin, device)
            words = self._words(queue, [whole], [arrived])
            idx = self._local(words[:, width + 1 : width + 1 + topk]).contiguous()
            weights = words[:, width + 1 + topk :].contiguous().view(torch.float32) if weighted else None
            if expand:
                first = torch.tensor(starts[:-1], dtype=torch.int32, device=device)
                selected = self._kernels.layout(queue, idx, first, rows, 0, 1, local, False)[2][:rows]
                queue.finish()
            else:
                selected = torch.arange(rows, dtype=torch.int32, device=device)
                selected = selected.masked_fill(selected >= len(words), -1)
            self._pull(queue, recv_x.view(torch.uint8), [whole], [chosen_of(arrived, selected)], True)
            self._kernels.finish(queue)
            self._windows.give_back(lease)
            there = selected >= 0
            words, idx = _picked(words, selected), _picked(idx, selected).masked_fill(~there[:, None], -1)
            if recv_scales is not None:
                recv_scales.copy_((words[:, :width] * there[:, None]).view(recv_scales.dtype))
            routes.position = words[:, width].masked_fill(~there, -1)
            if expand:
                sizes = [b - a for a, b in pairwise(starts)]
                expert = torch.arange(local).repeat_interleave(torch.tensor(sizes)).to(device)
                expert = torch.nn.functional.pad(expert, (0, rows - len(expert)), value=-1).masked_fill(~there, -1)
                recv_idx.copy_(expert)
                hit = (idx == expert[:, None]) & there[:, None]
            else:
                recv_idx.copy_(idx)
                hit = idx >= 0
            # argmax of equal values may be any of them.
            choices = torch.arange(topk, dtype=torch.int32, device=device).expand_as(hit)
            routes.choice = choices.where(hit, topk).amin(1).masked_fill(~there, -1)
            if recv_weights is not None and weights is not None:
                kept = _picked(weights, selected).where(hit, 0.0)
                if expand:
                    total = torch.zeros(rows, dtype=torch.float32, device=device)
                    for k in range(topk):
                        total += kept[:, k]
                    kept = total
                recv_weights.copy_(kept)

        counts = routes.per_expert(near.here)
        align = args.expert_alignment
        per_expert = () if args.num_worst_tokens else tuple(-(-count // align) * align for count in counts)
        handle = EpHandle(
            self._owner,
            args.topk_idx.shape[0],
            rows,
            topk,
            args.expand,
            align,
            args.num_worst_tokens,
            per_expert,
            routes.dropped,
            args.topk_idx,
            routes,
            Sources(routes),
        )
        return EpDispatched(recv_x, recv_scales, recv_idx, recv_weights, handle, self._finish(op, finish))

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
                    sums.copy_(spread(columns[:, :, 0], _routes(handle).idx, first))
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
        fields = [kind, _routes(handle).number]
        self._post(op, {"fields": fields, "stage": [*_named(lease), count]})
        return aux

    def _fetch(
        self, op: Operation, handle: EpHandle, x: Tensor, aux: int, zeros: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Rows [n, K, C] of this rank's tokens from all neighbours, what goes with them, and which there are."""
        routes = _routes(handle)
        letters = self._await_letters(op)
        self._agreed(op, letters, COMBINE_FIELDS)
        self._await_flags(op)
        n, topk = routes.idx.shape
        starts = [_starts(routes, peer, handle.expand, handle.expert_alignment) for peer in range(self._near.ranks)]
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


def _aux(args: EpDispatchArgs, tokens: Relayed) -> Tensor:
    """What goes with a row: scales, position, choices, weights, as 32-bit words."""
    n = len(args.topk_idx)
    parts = [] if args.scales is None else [args.scales.contiguous().view(torch.int32)]
    parts += [tokens.positions.view(n, 1).to(torch.int32), args.topk_idx.to(torch.int32)]
    if args.topk_weights is not None:
        parts.append(args.topk_weights.view(torch.int32))
    return torch.cat(parts, 1)


def _widths(args: EpDispatchArgs) -> tuple[int, int]:
    """Bytes of a row, and words that go with it."""
    scales = 0 if args.scales is None else args.scales.shape[1]
    topk = args.topk_idx.shape[1]
    return args.x.shape[1] * args.x.itemsize, scales + 1 + topk * (1 if args.topk_weights is None else 2)


def _starts(routes: Routes, peer: int, expand: bool, alignment: int) -> list[int]:
    """Where a neighbour's rows begin, of every expert or altogether, and their end."""
    if not expand:
        return [0, routes.total(peer)]
    return [0, *accumulate(-(-count // alignment) * alignment for count in routes.per_expert(peer))]


def _learn(routes: Routes, letters: Mapping[int, Message]) -> None:
    routes.all_ranks = [letters[peer]["ranks"] for peer in sorted(letters)]
    routes.all_experts = [letters[peer]["experts"] for peer in sorted(letters)]


def _named(lease: Lease | None) -> list[int]:
    return [0, 0] if lease is None else [lease.number, lease.size]


def _picked(table: Tensor, selected: Tensor) -> Tensor:
    """Rows of a table, any row where none is selected."""
    if not len(table):
        return table.new_zeros(len(selected), *table.shape[1:])
    return table[selected.clamp(min=0).long()]


def _routes(handle: EpHandle) -> Routes:
    state: Any = handle.state
    assert isinstance(state, Routes)
    return state
