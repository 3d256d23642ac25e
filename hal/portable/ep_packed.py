"""The low-latency mode on any device: packed slots, and what several nodes need of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hal.ep.engine import EpLowLatencyCombined, EpLowLatencyDispatched, Finish
from hal.ep.fields import PACKED_COMBINE_FIELDS, PACKED_FIELDS
from hal.ep.relay import Relayed
from hal.portable.ep_post import GRANT, Operation
from hal.portable.ep_rooms import Rooms
from hal.portable.ep_routes import Routes
from hal.portable.ep_rows import Fetched, Place, chosen_of
from hal.portable.ep_slots import PackedState, SlotCalls, state_of
from hal.spec.ep import (
    CASTS,
    EpLowLatencyCombineArgs,
    EpLowLatencyDispatchArgs,
)
from hal.spec.errors import SpecError


class PackedCalls(Rooms, SlotCalls):
    """The calls of the low-latency mode."""

    def low_latency_dispatch(self, args: EpLowLatencyDispatchArgs) -> EpLowLatencyDispatched:
        """Send rows, cast where asked, to the receivers' rooms; the finish packs them."""
        n = len(args.x)
        with self._calling("low_latency_dispatch"):
            positions = torch.arange(n, dtype=torch.int32, device=args.x.device)
            error = self._third() or self._bad_experts(args.topk_idx)
            if error is not None:
                raise self._refused(self._begin("low_latency_dispatch"), error)
            made = self._slots(args)
            tokens = Relayed([0, n], positions, torch.empty(0, dtype=torch.float32, device="cpu"))
            # A result of its own: what completes it holds the tensors, which are not to hold that.
            return replace(
                made, finish=self._send_packed(args, made, tokens, args.async_finish or args.return_recv_hook)
            )

    def reserve_packed(self, args: EpLowLatencyDispatchArgs) -> EpLowLatencyDispatched:
        """Make the tensors."""
        with self._calling("low_latency_dispatch"):
            error = self._third()
            if error is not None:
                raise error
            return self._slots(args)

    def relay_packed(self, args: EpLowLatencyDispatchArgs, reserved: EpLowLatencyDispatched, tokens: Relayed) -> Finish:
        """Send several ranks' tokens."""
        with self._calling("low_latency_dispatch"):
            return self._send_packed(args, reserved, tokens, False)

    def _send_packed(
        self, args: EpLowLatencyDispatchArgs, made: EpLowLatencyDispatched, tokens: Relayed, deferred: bool
    ) -> Finish:
        near, idx = self._near, args.topk_idx.to(torch.int32)
        op = self._begin("low_latency_dispatch")
        op.record["tokens"] = len(args.x)
        routes = Routes(self._args, near, tokens.begin, idx)
        routes.count(self._kernels, True, True)
        routes.number = op.number
        state = state_of(made.handle)
        state.routes = routes
        self._unfinished[op.number] = weakref.ref(state)
        self._listen(0)
        self._return_rooms()
        x, aux = self._cast(args, idx, tokens)
        fields = [idx.shape[1], CASTS.index(args.cast)]
        letter = {"fields": fields, "ranks": routes.ranks, "experts": routes.experts}
        rooms: list[int | None] = [free.pop(0) if free else None for free in self._free_rooms]
        self._post(op, letter, own=lambda peer: {"room": rooms[peer]})
        if None not in rooms or not deferred:
            self._send_rows(op, routes, x, aux, rooms)
        else:
            # Somebody has not emptied a room yet; the caller is not to wait for that.
            kept = x.clone() if x is args.x else x
            self._kernels.settle()
            self._job = self._put_off(lambda: self._send_rows(op, routes, kept, aux, rooms))
        return self._finish(op, self._unpacking(op, args, made, routes, x.shape[1] * x.itemsize, aux.shape[1]))

    def _cast(self, args: EpLowLatencyDispatchArgs, idx: Tensor, tokens: Relayed) -> tuple[Tensor, Tensor]:
        """Rows as they travel, and the words that go with them: scales, position, choices."""
        words = [tokens.positions.view(-1, 1).to(torch.int32), idx]
        if args.cast == "none":
            return args.x, torch.cat(words, 1)
        queue = self._kernels.device.queue()
        x = args.x if args.x.stride(1) == 1 else args.x.contiguous()
        rows, scales = self._kernels.cast(queue, x, args.cast)
        queue.finish()
        return rows, torch.cat([scales, *words], 1)

    def _unpacking(
        self,
        op: Operation,
        args: EpLowLatencyDispatchArgs,
        made: EpLowLatencyDispatched,
        routes: Routes,
        row: int,
        aux: int,
    ) -> Any:
        """What fills the tensors of a dispatch."""
        near, local, topk = self._near, self._args.local_experts, args.topk_idx.shape[1]
        state, handle, device = state_of(made.handle), made.handle, args.x.device
        slots, waits = made.recv_x.shape[1], args.dispatch_wait_recv_cost_stats
        stats = args.cumulative_local_expert_recv_stats
        job = self._job

        def finish() -> None:
            if job is not None:
                job.result()
            letters = self._await_letters(op, waits=waits)
            try:
                self._agreed(op, letters, PACKED_FIELDS)
            except SpecError:
                state.released = True
                raise
            finally:
                self._unfinished.pop(op.number, None)
            routes.all_ranks = [letters[peer]["ranks"] for peer in range(near.ranks)]
            routes.all_experts = [letters[peer]["experts"] for peer in range(near.ranks)]
            self._expect(op, routes)
            for peer in range(near.ranks):
                if op.expected[peer] > self._capacity:
                    raise self._fail(self._lost(op, peer, "it announces more rows than there can be"))
            self._await_flags(op, waits)
            late = [peer for peer in range(near.ranks) if letters[peer]["room"] is None]
            granted = self._await_letters(op, GRANT, late)
            rooms = [granted[p]["room"] if p in late else letters[p]["room"] for p in range(near.ranks)]
            arrived = routes.arrivals([p * self._capacity for p in range(near.ranks)], device)
            sender, at = arrived // self._capacity, arrived % self._capacity
            places = [self._place(self._rooms[rooms[p]].window.memory, p, row, aux) for p in range(near.ranks)]
            parts = [at.masked_fill(sender != p, -1) for p in range(near.ranks)]
            queue = self._kernels.device.queue()
            words = self._words(queue, places, parts)
            width = aux - 1 - topk
            starts = slots * torch.arange(local, dtype=torch.int32, device=device)
            idx = self._local(words[:, width + 1 :]).contiguous()
            selected = self._kernels.layout(queue, idx, starts, local * slots, 0, 1, local, False)[2]
            queue.finish()
            chosen = [chosen_of(part, selected) for part in parts]
            self._pull(queue, made.recv_x.view(torch.uint8).flatten(0, 1), places, chosen, False)
            self._kernels.finish(queue)
            for peer, room in enumerate(rooms):
                self._empty(op, peer, room)
            there = selected >= 0
            if len(words):
                taken = words[selected.clamp(min=0).long()]
                handle.src_info.copy_(taken[:, width].masked_fill(~there, -1).view(local, slots))
                if made.recv_scales is not None:
                    scales = taken[:, :width].view(local, slots, width).view(made.recv_scales.dtype)
                    made.recv_scales.copy_(scales)
            ranges, count = self._ranges(routes)
            handle.layout_range.copy_(ranges)
            made.recv_count.copy_(count)
            state.selected = selected
            if stats is not None:
                stats.add_(made.recv_count)

        return finish

    def _ranges(self, routes: Routes) -> tuple[Tensor, Tensor]:
        """``begin << 32 | count`` [L, R] of the rows of each rank, and rows [L]."""
        counts = torch.tensor(routes.blocks(True), dtype=torch.int64, device="cpu")
        ends = counts.cumsum(0)
        ranges = ((ends - counts) << 32 | counts)[self._near.blocks]
        return ranges.T, ends[-1]

    def low_latency_combine(self, args: EpLowLatencyCombineArgs) -> EpLowLatencyCombined:
        """Stage packed rows; the finish fetches and sums."""
        with self._calling("low_latency_combine"):
            op = self._offer_packed(args)

        def finish() -> None:
            for part, table, _, place in self._fetch_packed(op, args):
                queue = self._kernels.device.queue()
                self._kernels.reduce(queue, args.out[part], table, place, args.topk_weights[part])
                queue.finish()

        return EpLowLatencyCombined(args.out, self._finish(op, finish))

    def gather_packed(self, args: EpLowLatencyCombineArgs) -> Tensor:
        """One fetch into zeros."""
        with self._calling("low_latency_combine"):
            op = self._offer_packed(args)
            try:
                tables = [table for _, table, _, _ in self._fetch_packed(op, args)]
            finally:
                self._done(op)
            return torch.cat([args.x.new_zeros(0, args.topk_idx.shape[1], args.x.shape[2]), *tables])

    def _offer_packed(self, args: EpLowLatencyCombineArgs) -> Operation:
        """Stage the rows that there are."""
        state, x = state_of(args.handle), args.x
        op = self._begin("low_latency_combine")
        error = self._wrong(args, state)
        if error is not None:
            raise self._refused(op, error)
        rows, row = x.shape[0] * x.shape[1], x.shape[2] * x.itemsize
        lease = self._stage(op, rows * row)
        assert lease is not None
        every = torch.arange(rows, dtype=torch.int32, device=x.device).masked_fill(state.selected < 0, -1)
        queue = self._kernels.device.queue()
        place = Place(lease.window.memory, rows, row, 0)
        source = self._kernels.rows_of(queue, x.view(rows, -1))
        self._kernels.copy(queue, place.rows(), source, every, 0, rows, rows, False)
        self._signal(queue, op)
        queue.finish()
        self._post(op, {"fields": [state.routes.number], "stage": [lease.number, lease.size, rows]})
        state.released = True
        if args.zero_copy:
            state.lent = None
        return op

    def _wrong(self, args: EpLowLatencyCombineArgs, state: PackedState) -> SpecError | None:
        if state.selected is None:
            return SpecError("handle", "one whose dispatch is not finished", "one whose hook or event was waited for")
        if args.zero_copy and (state.lent is None or state.lent.data_ptr() != args.x.data_ptr()):
            return SpecError("x", "other memory", "with zero_copy, the tensor low_latency_combine_buffer returned")
        if bool(((args.topk_idx != state.routes.idx) & (args.topk_idx >= 0)).any()):
            got = f"other routes on rank {self._args.rank}"
            return SpecError("topk_idx", got, "what the dispatch of this handle was given, or -1")
        return None

    def _fetch_packed(self, op: Operation, args: EpLowLatencyCombineArgs) -> Iterator[Fetched]:
        """Once all neighbours have staged theirs, what `_fetched` brings."""
        x, waits = args.x, args.combine_wait_recv_cost_stats
        letters = self._await_letters(op, waits=waits)
        try:
            self._agreed(op, letters, PACKED_COMBINE_FIELDS)
        except SpecError:
            # Refused, it has used nothing up.
            state_of(args.handle).released = False
            if args.zero_copy:
                state_of(args.handle).lent = x
            raise
        self._await_flags(op, waits)
        starts = [[e * x.shape[1] for e in range(x.shape[0])]] * self._near.ranks
        rank, row = state_of(args.handle).routes.places(starts)
        return self._fetched(op, letters, x, rank, row.masked_fill(args.topk_idx < 0, -1))
