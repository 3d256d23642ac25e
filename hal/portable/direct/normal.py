"""The calls of the normal mode, of ranks that meet on their devices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from hal.ep.engine import EpCombined, EpDispatched, Finish
from hal.portable.direct.bins import Bins
from hal.portable.direct.captured import CapturedCalls
from hal.portable.direct.kernels import Staging, Turn, signed
from hal.portable.direct.receive import Beside, Follow, Receive
from hal.portable.direct.ways import Ways
from hal.portable.ep_post import Operation
from hal.portable.runtime import Memory, Queue
from hal.spec.ep import FP8, PLAIN_DTYPES, EpCombineArgs, EpDispatchArgs, EpHandle
from hal.spec.ep.terms import MAX_INT32
from hal.spec.errors import SpecError

_DTYPES: Final = (*PLAIN_DTYPES, FP8)
_PLAIN, _WEIGHTED = range(2)
"""Kinds of combine, as `COMBINE_FIELDS` names them."""


@dataclass(slots=True)
class _Received:
    """The tensors of a dispatch; see `EpDispatched`."""

    x: Tensor
    scales: Tensor | None
    idx: Tensor
    weights: Tensor | None
    position: Tensor
    choice: Tensor


class DirectNormalCalls(CapturedCalls):
    """Dispatch and combine."""

    def dispatch(self, args: EpDispatchArgs) -> EpDispatched:
        """Stage rows, count where those of all ranks go, and fetch what is for this one."""
        self._require_not_captured("dispatch")
        with self._calling("dispatch"):
            op = self._begin("dispatch")
            op.record["tokens"] = len(args.x)
            deferred = args.async_finish or args.return_recv_hook
            if args.handle is None:
                ways, met, staging = self._counted(op, args)
                received = self._room_for(args, ways)
                finish = self._fetched(op, met, ways, received, self._fetches(op, staging, ways, received), deferred)
            else:
                staging = self._offer(op, args, 0)
                ways = ways_of(args.handle).again()
                self._kernels.lend(ways)
                received = self._room_for(args, ways)
                receive = self._receive(op, staging, MAX_INT32, self._fetches(op, staging, ways, received))
                finish = self._met_later(op, receive, staging, deferred)
            ways.number, ways.position, ways.choice = op.number, received.position, received.choice
            handle = self._handle(args, ways, len(received.x))
            return EpDispatched(received.x, received.scales, received.idx, received.weights, handle, finish)

    def _fetched(
        self, op: Operation, met: Memory, ways: Ways, received: _Received, fetch: Follow, deferred: bool
    ) -> Finish:
        """Fetch rows of a call whose ranks have met; beside what the caller computes where that puts the finish off."""
        device = self._kernels.device

        def launch() -> Queue:
            queue = device.queue()
            fetch(queue, met)
            return queue

        beside = Beside.launched(device, launch, (met, ways, received)) if deferred else None
        finish = self._finish(op, launch().finish if beside is None else beside.join)
        self._keep(finish, beside)
        return finish

    def _met_later(self, op: Operation, receive: Receive, staging: Staging, deferred: bool) -> Finish:
        """Meet the others, and do what follows, once the call is finished."""
        return self._later(op, lambda: self._meet(op, receive, staging).finish(), receive if deferred else None)

    def _offer(self, op: Operation, args: EpDispatchArgs, routes: int) -> Staging:
        """Stage rows and, unless all ranks know them, their routes; the device leaves these at ``routes``, checked."""
        scales, (n, topk) = args.scales, args.topk_idx.shape
        new, experts = args.handle is None, self._args.num_experts
        scale, weight = 0 if scales is None else 4 * scales.shape[1], 0 if args.topk_weights is None else 4 * topk
        staging = Staging(n, args.x.shape[1] * args.x.itemsize, scale, topk if new else 0, weight)
        idx = args.topk_idx if new else None

        def stage(queue: Queue, to: int) -> None:
            self._kernels.stage(queue, to, staging, args.x, scales, idx, args.topk_weights, routes, experts)

        fields = [
            args.topk_weights is not None,
            topk,
            _DTYPES.index(args.x.dtype),
            scale,
            scales is not None and scales.dtype == torch.int32,
            args.expand,
            args.expert_alignment,
            args.num_worst_tokens,
            0 if args.handle is None else ways_of(args.handle).number,
        ]
        self._publish(op, staging, [int(one) for one in fields], stage).finish()
        return staging

    def _counted(self, op: Operation, args: EpDispatchArgs) -> tuple[Ways, Memory, Staging]:
        """Stage rows, meet the other ranks, and count who sends what to whom."""
        here, ranks, local, (n, topk) = self._near.here, self._near.ranks, self._args.local_experts, args.topk_idx.shape
        # By rank, what comes for this rank's own experts is counted besides; the others' are nobody's concern.
        first, experts = (0, ranks * local) if args.expand else (here * local, local)
        bins = Bins(ranks, local, ranks, first, experts, args.expand, False)
        counter = self._counter_for(ranks * bins.all)
        ways = [self._ways(op, bins, max(self._args.max_tokens_per_rank, n), topk, n)]
        staging = self._offer(op, args, ways[0].routes)
        stream = ways[0].stream = self._kernels.stream

        def room(most: int) -> int:
            if most > ways[0].most:
                larger = self._ways(op, bins, most, topk, n)
                ways[0] = replace(larger, routes=ways[0].routes, before=ways[0], stream=stream)
            return ways[0].all_routes

        def count(queue: Queue, at: Memory | int) -> None:
            self._count(queue, op, at, ways[0], args.expert_alignment, counter)

        grows = self._args.overflow == "grow"
        receive = self._receive(op, staging, ways[0].most, count, room if grows else ways[0].all_routes)
        queue = self._meet(op, receive, staging)
        self._learn_counts(op, queue, counter, ways[0])
        try:
            self._fit(op, receive.memory, args, ways[0], counter)
        except SpecError:
            # What was staged stays: ranks that have not met yet still have to count these routes to refuse likewise.
            self._kernels.done(queue, Turn.of(op.number), receive.memory, True)
            queue.finish()
            self._done(op)
            raise
        return ways[0], receive.memory, staging

    def _counter_for(self, words: int) -> Tensor:
        if len(self._counter) < 1 + words:
            self._counter = self._kernels.device.mailbox(1 + words)
        return self._counter

    def _ways(self, op: Operation, bins: Bins, most: int, topk: int, n: int) -> Ways:
        """Room for what is to be counted."""
        memory, pieces = self._kernels.carved(*Ways.words(bins, most, topk, n))
        everybody, counted, begins, listed, totals, routes, order, bases = pieces
        own = (everybody, counted, begins, listed, totals, routes, order, bases)
        return Ways(op.number, self._near.here, most, bins, topk, memory, *own)

    def _count(
        self, queue: Queue, op: Operation, met: Memory | int, ways: Ways, alignment: int, counter: Tensor
    ) -> None:
        """Count, and find places."""
        counter[0] = signed(op.number - 1)
        told = queue.write(counter, partly=True)[0]
        self._kernels.count(queue, met, ways)
        self._kernels.places(queue, met, ways, 0, 0, told, alignment, 0, op.number)

    def _learn_counts(self, op: Operation, queue: Queue, counter: Tensor, ways: Ways) -> None:
        """Once the device has told them."""
        self._until_told(queue, counter, op.number)
        ranks, bins = self._near.ranks, ways.bins.all
        ways.counts = counter[1 : 1 + ranks * bins].view(ranks, bins).numpy().copy()

    def _fit(self, op: Operation, met: Memory | int, args: EpDispatchArgs, ways: Ways, counter: Tensor) -> None:
        """Make them the ways of what there is room for.

        Raises
        ------
        SpecError
            The same on all ranks, where there must be room for all.
        """
        room, near, counts = self._args.max_recv_tokens, self._near, ways.between_ranks()
        ways.sent = counts
        totals = counts.sum(0)
        if self._args.overflow == "error" and totals.max() > room:
            peer = int((totals > room).argmax())
            got = f"{room}, while rank {near.first + peer} would receive {totals[peer]} rows"
            raise SpecError("max_recv_tokens", got, "room for what is sent, or overflow='drop' or 'grow'")
        if self._args.overflow == "drop" and totals.max() > room:
            before = counts.cumsum(0) - counts
            accepted = torch.from_numpy(counts.clip(max=(room - before).clip(min=0)).astype("int32"))
            accepted, queue = accepted.to(args.x.device), self._kernels.device.queue()
            self._kernels.drop(queue, met, ways, accepted)
            self._count(queue, op, met, ways, args.expert_alignment, counter)
            self._learn_counts(op, queue, counter, ways)
            ways.dropped = max(0, int(totals[near.here]) - room)
        for peer in range(near.ranks if args.num_worst_tokens else 0):
            rows = ways.starts(peer, args.expert_alignment)[-1]
            if rows > args.num_worst_tokens:
                got = f"{args.num_worst_tokens}, while rank {near.first + peer} would receive {rows} rows"
                raise SpecError("num_worst_tokens", got, "room for what is sent")

    def _room_for(self, args: EpDispatchArgs, ways: Ways) -> _Received:
        """Tensors, filled with what rows have that no token comes for, where there are such."""
        x, scales, weights, topk = args.x, args.scales, args.topk_weights, args.topk_idx.shape[1]
        coming = ways.starts(self._near.here, args.expert_alignment)[-1]
        rows = args.num_worst_tokens or coming
        counts = ways.of_own_experts() if args.expand else ways.between_ranks()[:, self._near.here]
        padded = rows > int(counts.sum())
        device = x.device

        def made(shape: tuple[int, ...], dtype: torch.dtype, empty: int = 0) -> Tensor:
            if padded and dtype.itemsize == 1:
                return torch.zeros(shape, dtype=torch.uint8, device=device).view(dtype)
            return (
                torch.full(shape, empty, dtype=dtype, device=device)
                if padded
                else torch.empty(shape, dtype=dtype, device=device)
            )

        each = (rows,) if args.expand else (rows, topk)
        return _Received(
            made((rows, x.shape[1]), x.dtype),
            None if scales is None else made((rows, scales.shape[1]), scales.dtype),
            made(each, torch.int64, -1),
            None if weights is None else made(each, torch.float32),
            made((rows,), torch.int32, -1),
            made((rows,), torch.int32, -1),
        )

    def _fetches(self, op: Operation, staging: Staging, ways: Ways, received: _Received) -> Follow:
        """What fills the tensors of a dispatch, and tells the others that their rows are read."""
        kernels, turn = self._kernels, Turn.of(op.number)
        wanted = (
            received.x.view(torch.uint8),
            received.scales,
            received.idx,
            received.weights,
            received.position,
            received.choice,
        )
        width = 0 if received.scales is None else received.scales.shape[1]

        def fetch(queue: Queue, met: Memory | int) -> None:
            to = [0 if one is None else queue.write(one, partly=True)[0] for one in wanted]
            kernels.fetch(queue, met, ways, to, staging, True, (0, width, 1))
            kernels.done(queue, turn, met, False)

        return fetch

    def _handle(self, args: EpDispatchArgs, ways: Ways, rows: int) -> EpHandle:
        align = args.expert_alignment
        counts = ways.of_own_experts().sum(0)
        per_expert = () if args.num_worst_tokens else tuple(-(-int(count) // align) * align for count in counts)
        n, topk = args.topk_idx.shape
        places = (args.expand, align, args.num_worst_tokens, per_expert, ways.dropped)
        return EpHandle(self._owner, n, rows, topk, *places, args.topk_idx, ways, ways.sources())

    def combine(self, args: EpCombineArgs) -> EpCombined:
        """Stage rows; the finish fetches those of this rank's tokens and sums them."""
        handle, weights, sums, x = args.handle, args.topk_weights, None, args.x
        ways = ways_of(handle)
        self._require_not_captured("combine")
        with self._calling("combine"):
            out = torch.empty(handle.num_tokens, self._args.hidden, dtype=x.dtype, device=x.device)
            if weights is not None:
                sums = torch.empty(handle.num_tokens, handle.topk, dtype=torch.float32, device=x.device)
            op = self._begin("combine")
            op.record["tokens"] = len(x)
            weight = 0 if weights is None else 4 * (1 if handle.expand else handle.topk)
            staging = Staging(len(x), x.shape[1] * x.itemsize, weight=weight)

            def stage(queue: Queue, to: int) -> None:
                self._kernels.stage(queue, to, staging, x, None, None, weights)

            fields = [_PLAIN if weights is None else _WEIGHTED, ways.number]
            self._publish(op, staging, fields, stage).finish()
            self._kernels.lend(ways)

            kernels, turn = self._kernels, Turn.of(op.number)

            def gather(queue: Queue, met: Memory | int) -> None:
                biases = [one if one.stride(1) == 1 else one.contiguous() for one in args.bias]
                kernels.gather(queue, met, ways, out, sums, weight, biases)
                kernels.done(queue, turn, met, False)

            receive = self._receive(op, staging, MAX_INT32, gather)
            deferred = args.async_finish or args.return_recv_hook
            return EpCombined(out, sums, self._met_later(op, receive, staging, deferred))


def ways_of(handle: EpHandle) -> Ways:
    """What a handle carries."""
    assert isinstance(handle.state, Ways)
    return handle.state
