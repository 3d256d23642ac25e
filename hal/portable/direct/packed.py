"""The calls of the low-latency mode, of ranks that meet on their devices: the host takes no part in what they count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hal.ep.engine import EpLowLatencyCombined, EpLowLatencyDispatched, Finish
from hal.portable.direct.bins import Bins
from hal.portable.direct.captured import Channel
from hal.portable.direct.kernels import DirectKernels, Staging, Turn
from hal.portable.direct.normal import DirectNormalCalls
from hal.portable.direct.receive import Follow, Receive
from hal.portable.direct.ways import Ways
from hal.portable.ep_post import Operation
from hal.portable.ep_slots import PackedState, state_of
from hal.portable.runtime import Memory, Queue
from hal.spec.ep import CASTS, SCALE_GROUP, EpLowLatencyCombineArgs, EpLowLatencyDispatchArgs
from hal.spec.ep.terms import MAX_INT32
from hal.spec.errors import SpecError


class DirectPackedCalls(DirectNormalCalls):
    """Dispatch and combine of packed slots."""

    def low_latency_dispatch(self, args: EpLowLatencyDispatchArgs) -> EpLowLatencyDispatched:
        """Stage rows, cast where asked; the finish fetches what is for this rank's experts into their slots."""
        with self._calling("low_latency_dispatch"):
            op = self._begin("low_latency_dispatch")
            op.record["tokens"] = len(args.x)
            error = self._third()
            if error is not None and not self._capturing:
                # What is under way for a result that was let go of keeps its memory.
                self._let_go()
                error = self._third()
            if error is not None:
                raise error if self._capturing else self._refused(op, error)
            made = self._slots(args)
            try:
                # A result of its own: what completes it holds the tensors, which are not to hold that.
                return replace(made, finish=self._send_packed(op, args, made))
            except SpecError:
                # Whoever keeps the error has no result with it that counts.
                state_of(made.handle).released = True
                raise

    def _send_packed(self, op: Operation, args: EpLowLatencyDispatchArgs, made: EpLowLatencyDispatched) -> Finish:
        kernels, x, (n, topk) = self._kernels, args.x, args.topk_idx.shape
        groups = -(-x.shape[1] // SCALE_GROUP)
        casts = args.cast != "none"
        scale = 0 if not casts else 4 * -(-groups // 4) if args.cast == "fp8_ue8m0" else 4 * groups
        staging = Staging(n, x.shape[1] * (1 if casts else x.itemsize), scale, topk)
        ranks, local, most = self._near.ranks, self._args.local_experts, self._args.max_tokens_per_rank
        bins = Bins(ranks, local, 0, 0, ranks * local, True, True)
        ways = self._ways(op, bins, most, topk, n)

        def stage(queue: Queue, to: int) -> None:
            rows = None if casts else x
            if casts:
                kernels.cast_into(queue, to, staging, x if x.stride(1) == 1 else x.contiguous(), groups, args.cast)
            kernels.stage(queue, to, staging, rows, None, args.topk_idx, None, ways.routes, self._args.num_experts)

        fields = [topk, CASTS.index(args.cast)]
        waits, room = args.dispatch_wait_recv_cost_stats, Staging(most, x.shape[1] * x.itemsize, 4 * groups, topk).size
        channel = self._sent(op, staging, fields, stage, room, waits)
        ways.stream = kernels.stream
        turn = channel.turn if channel else Turn.of(op.number)
        state, stats = state_of(made.handle), args.cumulative_local_expert_recv_stats
        unpack = _unpacks(kernels, turn, op.number, made, staging, ways)
        receive = self._received_by(op, channel, staging, most, unpack, ways.all_routes)

        def finish() -> None:
            try:
                self._pulled(op, channel, receive, staging, waits)
            except SpecError:
                state.released = True
                raise
            state.routes = ways
            if stats is not None:
                stats.add_(made.recv_count)

        return self._finished_by(op, channel, finish, receive, args, waits)

    def _sent(
        self,
        op: Operation,
        staging: Staging,
        fields: list[int],
        stage: Callable[[Queue, int], None],
        most: int,
        waits: Tensor | None,
    ) -> Channel | None:
        """Publish a call of which there are at most so many bytes; by which channel, where it is captured."""
        if self._capturing:
            channel = self._begin_captured(op, staging, waits)
            self._publish_captured(op, channel, staging, fields, stage)
            return channel
        self._put_aside(op, most)
        self._publish(op, staging, fields, stage).finish()
        return None

    def _received_by(
        self, op: Operation, channel: Channel | None, staging: Staging, most: int, follow: Follow, routes: int = 0
    ) -> Receive:
        """What is to be launched to pull the rows of a call that was `_sent`."""
        if channel is None:
            return self._receive(op, staging, most, follow, routes)
        return self._receive_captured(channel, staging, most, follow, routes)

    def _finished_by(
        self,
        op: Operation,
        channel: Channel | None,
        body: Callable[[], None],
        receive: Receive,
        args: EpLowLatencyDispatchArgs | EpLowLatencyCombineArgs,
        waits: Tensor | None,
    ) -> Finish:
        """What completes a call. Where that is put off, rows are pulled meanwhile, unless the host is to see when."""
        ahead = (args.return_recv_hook or args.async_finish) and waits is None
        if channel is None:
            return self._later(op, body, receive if ahead else None)
        if ahead:
            receive.launch_beside(self._turns)
        return self._finish(op, body)

    def _pulled(
        self, op: Operation, channel: Channel | None, receive: Receive, staging: Staging, waits: Tensor | None
    ) -> None:
        """Meet the others, and do what follows."""
        if channel is not None:
            self._meet_captured(channel, receive)
            return
        self._meet(op, receive, staging, waits).finish()
        self._see_all_aside(op)

    def low_latency_combine(self, args: EpLowLatencyCombineArgs) -> EpLowLatencyCombined:
        """Stage the rows that came; the finish fetches those of this rank's tokens and sums them, weighted."""
        x, kernels = args.x, self._kernels
        with self._calling("low_latency_combine"):
            op = self._begin("low_latency_combine")
            state = state_of(args.handle)
            error = _wrong(args, state)
            if error is not None:
                raise error if self._capturing else self._refused(op, error)
            ways = state.routes
            assert isinstance(ways, Ways)
            staging = Staging(x.shape[0] * x.shape[1], x.shape[2] * x.itemsize)

            def stage(queue: Queue, to: int) -> None:
                kernels.compare(queue, args.topk_idx, ways.routes)
                valid = (ways.totals, self._near.here * x.shape[0], x.shape[1])
                kernels.stage(queue, to, staging, x.flatten(0, 1), valid=valid)

            # A captured dispatch has a number of its own on every rank, and in no replay.
            waits, number = args.combine_wait_recv_cost_stats, 0 if self._capturing else ways.number
            channel = self._sent(op, staging, [number], stage, staging.size, waits)
            turn = channel.turn if channel else Turn.of(op.number)
            state.released = True
            if args.zero_copy:
                state.lent = None
            self._kernels.lend(ways)

            # Rows are pulled and summed ahead of the hook, and the caller's memory is not written before it.
            sums = torch.empty_like(args.out) if args.return_recv_hook and args.out_is_given else args.out

            def gather(queue: Queue, met: Memory | int) -> None:
                kernels.gather(queue, met, ways, sums, None, 0, (), args.topk_idx, args.topk_weights)
                kernels.done(queue, turn, met, False)

            receive = self._received_by(op, channel, staging, MAX_INT32, gather)

            def finish() -> None:
                try:
                    self._pulled(op, channel, receive, staging, waits)
                except SpecError:
                    # Refused, it has used nothing up.
                    state.released = False
                    if args.zero_copy:
                        state.lent = x
                    raise
                if sums is not args.out:
                    args.out.copy_(sums)

            return EpLowLatencyCombined(args.out, self._finished_by(op, channel, finish, receive, args, waits))


def _unpacks(
    kernels: DirectKernels, turn: Turn, number: int, made: EpLowLatencyDispatched, staging: Staging, ways: Ways
) -> Follow:
    """What counts the rows of a dispatch and fetches those for this rank's experts into their slots.

    It holds the tensors of the result alone: what is under way is not to keep the result itself.
    """
    x, scales, count, sources, ranges = (
        made.recv_x,
        made.recv_scales,
        made.recv_count,
        made.handle.src_info,
        made.handle.layout_range,
    )
    slots, words = x.shape[1], 0 if scales is None else scales.shape[2]

    def unpack(queue: Queue, met: Memory | int) -> None:
        kernels.count(queue, met, ways)
        ranges_at, count_at = (queue.write(one)[0] for one in (ranges, count))
        kernels.places(queue, met, ways, ranges_at, count_at, 0, 1, slots, number)
        rows = queue.write(x.view(torch.uint8).flatten(0, 1), partly=True)[0]
        # [L, words, slots] in memory: the kernel counts rows from the first slot of their expert on.
        turned: Any = 0 if scales is None else queue.write(scales.transpose(1, 2), partly=True)[0]
        to = [rows, turned, 0, 0, queue.write(sources, partly=True)[0], 0]
        kernels.fetch(queue, met, ways, to, staging, False, (words * slots, 1, slots))
        kernels.done(queue, turn, met, False)

    return unpack


def _wrong(args: EpLowLatencyCombineArgs, state: PackedState) -> SpecError | None:
    """What this rank knows to be wrong; of routes the device finds out."""
    if state.routes is None:
        return SpecError("handle", "one whose dispatch is not finished", "one whose hook or event was waited for")
    if args.zero_copy and (state.lent is None or state.lent.data_ptr() != args.x.data_ptr()):
        return SpecError("x", "other memory", "with zero_copy, the tensor low_latency_combine_buffer returned")
    return None
