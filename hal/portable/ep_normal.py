"""Dispatch in the normal mode, on any device, and what several nodes need of it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from hal.ep.engine import EpDispatched
from hal.ep.fields import DISPATCH_FIELDS
from hal.ep.lines import Message
from hal.ep.relay import Relayed
from hal.portable.ep_combine import CombineCalls, named, routes_of, starts_of
from hal.portable.ep_post import AGAIN, GRANT, Operation
from hal.portable.ep_routes import Routes, Sources
from hal.portable.ep_rows import Place, chosen_of
from hal.portable.ep_windows import Lease
from hal.portable.runtime import Memory
from hal.spec.ep import FP8, PLAIN_DTYPES, EpDispatchArgs, EpHandle
from hal.spec.errors import DeviceError, SpecError

_DTYPES: Final = (*PLAIN_DTYPES, FP8)


class NormalCalls(CombineCalls):
    """The calls of the normal mode."""

    def dispatch(self, args: EpDispatchArgs) -> EpDispatched:
        """Exchange counts, write rows into the receivers' windows; the finish puts them in order."""
        n = len(args.topk_idx)
        with self._calling("dispatch"):
            positions = torch.arange(n, dtype=torch.int32, device=args.x.device)
            return self._dispatch(args, Relayed([0, n], positions, torch.empty(0, dtype=torch.float32, device="cpu")))

    def relay(self, args: EpDispatchArgs, tokens: Relayed) -> EpDispatched:
        """As `dispatch`, for tokens of several ranks."""
        with self._calling("dispatch"):
            return self._dispatch(args, tokens)

    def _dispatch(self, args: EpDispatchArgs, tokens: Relayed) -> EpDispatched:
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
            routes = routes_of(cached).again()
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
            0 if cached is None else routes_of(cached).number,
        ]
        letter: Message = {"fields": [int(one) for one in fields], "offer": named(offer)}
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
            rows = starts_of(routes, peer, args.expand, args.expert_alignment)[-1]
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
                self._post(op, {"offer": named(offer)}, GRANT)
            except DeviceError as error:
                got = f"{routes.total(near.here)} rows, for which rank {self._args.rank} lacks memory ({error})"
                self._post(op, {"refused": ["max_recv_tokens", got, "what fits in memory"]}, GRANT)
        if larger:
            granted = self._await_letters(op, GRANT, larger)
            for peer in larger:
                if "refused" in granted[peer]:
                    self._windows.give_back(offer)
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
        starts = starts_of(routes, near.here, args.expand, args.expert_alignment)
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
                expert = (
                    torch.arange(local, device="cpu").repeat_interleave(torch.tensor(sizes, device="cpu")).to(device)
                )
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
        # A cached dispatch reads it again, when the caller may have used its own for something else.
        idx = args.topk_idx.clone() if args.handle is None else args.topk_idx
        handle = EpHandle(
            self._owner,
            idx.shape[0],
            rows,
            topk,
            args.expand,
            align,
            args.num_worst_tokens,
            per_expert,
            routes.dropped,
            idx,
            routes,
            Sources(routes),
        )
        return EpDispatched(recv_x, recv_scales, recv_idx, recv_weights, handle, self._finish(op, finish))


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


def _learn(routes: Routes, letters: Mapping[int, Message]) -> None:
    routes.all_ranks = [letters[peer]["ranks"] for peer in sorted(letters)]
    routes.all_experts = [letters[peer]["experts"] for peer in sorted(letters)]


def _picked(table: Tensor, selected: Tensor) -> Tensor:
    """Rows of a table, any row where none is selected."""
    if not len(table):
        return table.new_zeros(len(selected), *table.shape[1:])
    return table[selected.clamp(min=0).long()]
