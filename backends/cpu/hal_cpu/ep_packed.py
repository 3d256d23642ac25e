"""The low-latency mode on peer windows: packed slots, and what several nodes need of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from hal.ep.engine import (
    EpLowLatencyCombined,
    EpLowLatencyDispatched,
    Finish,
)
from hal.ep.fields import PACKED_COMBINE_FIELDS, PACKED_FIELDS
from hal.ep.relay import Relayed
from hal.spec.ep import (
    CASTS,
    FP8,
    SCALE_GROUP,
    EpLowLatencyCombineArgs,
    EpLowLatencyDispatchArgs,
    EpLowLatencyHandle,
)
from hal.spec.errors import SpecError
from hal_cpu.ep_parts import (
    BYTES,
    INT32,
    TYPES,
    PackedState,
    launches,
    nothing,
)
from hal_cpu.ep_window import WindowEngine

_CAST_OF: Final = {name: i for i, name in enumerate(CASTS)}


class PackedCalls(WindowEngine):
    """The calls of the low-latency mode."""

    def low_latency_dispatch(self, args: EpLowLatencyDispatchArgs) -> EpLowLatencyDispatched:
        """Write rows, cast where asked, into the packed slots of the receivers' windows."""
        made = self._packed_outputs()
        waits, now = args.dispatch_wait_recv_cost_stats, not (args.async_finish or args.return_recv_hook)
        op = self._send_packed(args, made, (0, args.x.shape[0]), 0, waits, None, now)
        finish = nothing if now else self._finish(op, PACKED_FIELDS, (made, args))
        return self._packed_result(args, op, *made, PackedState(op.routes, None, made[1]), finish)

    def reserve_packed(self, args: EpLowLatencyDispatchArgs) -> EpLowLatencyDispatched:
        """Take one of the two slots."""
        op = self._engine.packed_reserve(self._args.hidden, TYPES[args.x.dtype], _CAST_OF[args.cast], self._slots)
        if not op.reserved:
            got = f"a third result while two are live on rank {self._args.rank}"
            raise SpecError("low_latency_dispatch", got, "at most two: combine one, or let go of it, first")
        ranges = torch.zeros(self._args.local_experts, self._args.num_ranks, dtype=torch.int64, device="cpu")
        count = torch.zeros(self._args.local_experts, dtype=torch.int32, device="cpu")
        return self._packed_result(args, op, count, ranges, PackedState(op.routes, op, ranges), nothing)

    def relay_packed(self, args: EpLowLatencyDispatchArgs, reserved: EpLowLatencyDispatched, tokens: Relayed) -> Finish:
        """Send several ranks' tokens into a reserved slot."""
        made, positions = self._packed_outputs(), tokens.positions.contiguous()
        waits = torch.zeros(self._ranks, dtype=torch.int64, device="cpu")
        op = self._send_packed(
            replace(args, async_finish=False, return_recv_hook=False),
            made,
            tokens.begin,
            positions.data_ptr(),
            waits,
            _state(reserved.handle).op,
            False,
        )
        _state(reserved.handle).ranges = made[1]
        finish = self._finish(op, PACKED_FIELDS, (made, args, positions))

        def run() -> None:
            finish()
            reserved.recv_count.copy_(made[0])
            reserved.handle.layout_range.copy_(made[1].flatten(1)[:, self._blocks])
            if args.dispatch_wait_recv_cost_stats is not None:
                args.dispatch_wait_recv_cost_stats[self._first : self._first + self._ranks] += waits

        return run

    @property
    def _slots(self) -> int:
        return self._args.num_ranks * self._args.max_tokens_per_rank

    def _packed_outputs(self) -> tuple[Tensor, Tensor]:
        """Counts by expert and ranges by block, to be filled. Even of a call that failed, combine reads the ranges."""
        local = self._args.local_experts
        count = torch.empty(local, dtype=torch.int32, device="cpu")
        return count, torch.zeros(local, self._sources * self._ranks, dtype=torch.int64, device="cpu")

    def _send_packed(
        self,
        args: EpLowLatencyDispatchArgs,
        made: tuple[Tensor, Tensor],
        begin: Sequence[int],
        positions: int,
        waits: Tensor | None,
        reserved: Any,
        now: bool,
    ) -> Any:
        x, idx, stats = args.x, args.topk_idx, args.cumulative_local_expert_recv_stats
        cast = _CAST_OF[args.cast]
        try:
            launches[self._names[2]] += 1
            return self._engine.packed_dispatch(
                x.data_ptr(),
                x.shape[0],
                x.stride(0) * x.itemsize,
                self._args.hidden,
                TYPES[x.dtype],
                cast,
                idx.data_ptr(),
                idx.shape[1],
                self._args.num_experts,
                self._slots,
                0 if stats is None else stats.data_ptr(),
                0 if waits is None else waits.data_ptr(),
                args.return_recv_hook or args.async_finish,
                now,
                made[0].data_ptr(),
                made[1].data_ptr(),
                begin,
                positions,
                reserved,
                (idx.shape[1], cast),
            )
        except Exception as error:
            raise self._translated(error, PACKED_FIELDS) from None

    def _packed_result(
        self,
        args: EpLowLatencyDispatchArgs,
        op: Any,
        count: Tensor,
        ranges: Tensor,
        state: PackedState,
        finish: Finish,
    ) -> EpLowLatencyDispatched:
        """Tensors over an operation's slot."""
        local, slots, hidden, scales = self._args.local_experts, self._slots, self._args.hidden, None
        if args.cast == "none":
            rows = op.x(TYPES[args.x.dtype], (local, slots, hidden))
        else:
            rows = op.x(BYTES, (local, slots, hidden)).view(FP8)
            groups = -(-hidden // SCALE_GROUP)
            words, code = (-(-groups // 4), INT32) if args.cast == "fp8_ue8m0" else (groups, TYPES[torch.float32])
            scales = op.scales(code, (local, slots, words), (slots * words, 1, slots))
        handle = EpLowLatencyHandle(
            self._owner,
            op.idx(INT32, (local, slots)),
            ranges,
            self._args.max_tokens_per_rank,
            hidden,
            self._args.num_experts,
            args.x.shape[0],
            args.topk_idx.shape[1],
            state,
        )
        return EpLowLatencyDispatched(rows, scales, count, handle, finish)

    def low_latency_combine(self, args: EpLowLatencyCombineArgs) -> EpLowLatencyCombined:
        """Stage packed rows, or take the lent memory as it is; the finish fetches and sums."""
        now = not (args.async_finish or args.return_recv_hook)
        stride = args.out.stride(0) * args.out.itemsize
        finish = self._fetch_packed(args, args.combine_wait_recv_cost_stats, args.out, stride, False, now)
        return EpLowLatencyCombined(args.out, finish)

    def gather_packed(self, args: EpLowLatencyCombineArgs) -> Tensor:
        """One fetch into zeros; rows that a choice does not have stay 0."""
        out = torch.zeros(*args.topk_idx.shape, self._args.hidden, dtype=args.x.dtype, device="cpu")
        counter = args.combine_wait_recv_cost_stats
        waits = None if counter is None else torch.zeros(self._ranks, dtype=torch.int64, device="cpu")
        self._fetch_packed(args, waits, out, 0, True, True)()
        if counter is not None and waits is not None:
            counter[self._first : self._first + self._ranks] += waits
        return out

    def _fetch_packed(
        self, args: EpLowLatencyCombineArgs, waits: Tensor | None, out: Tensor, stride: int, gather: bool, now: bool
    ) -> Finish:
        x, packed, lent = args.x, _state(args.handle), None
        if args.zero_copy:
            lent, packed.lent = packed.lent, None
            if lent is None or lent.address != x.data_ptr():
                error = SpecError("x", "other memory", "with zero_copy, the tensor low_latency_combine_buffer returned")
                raise self.refuse("low_latency_combine", error)
        try:
            launches[self._names[3]] += 1
            op = self._engine.packed_combine(
                x.data_ptr(),
                self._args.hidden,
                x.shape[1],
                TYPES[x.dtype],
                packed.routes,
                args.topk_idx.data_ptr(),
                args.topk_weights.data_ptr(),
                out.data_ptr(),
                stride,
                0 if waits is None else waits.data_ptr(),
                lent,
                packed.ranges.data_ptr(),
                gather,
                now,
                (packed.routes.id,),
            )
        except Exception as error:
            raise self._translated(error, PACKED_COMBINE_FIELDS) from None
        return nothing if now else self._finish(op, PACKED_COMBINE_FIELDS, (args, out, waits, packed))

    def low_latency_combine_buffer(self, handle: EpLowLatencyHandle) -> Tensor:
        """Memory of the own window for the handle's next combine."""
        buffer, packed = self._args, _state(handle)
        shape = (buffer.local_experts, buffer.num_ranks * buffer.max_tokens_per_rank, buffer.hidden)
        if packed.lent is None:
            packed.lent = self._engine.lend(shape[0] * shape[1] * shape[2] * buffer.dtype.itemsize, False)
        tensor: Tensor = self._native.Engine.lent_tensor(packed.lent, TYPES[buffer.dtype], shape)
        return tensor


def _state(handle: EpLowLatencyHandle) -> PackedState:
    assert isinstance(handle.state, PackedState)
    return handle.state
