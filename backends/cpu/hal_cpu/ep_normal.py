"""The normal mode on peer windows: dispatch and combine, and what several nodes need of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from hal.ep.engine import (
    EpCombined,
    EpDispatched,
)
from hal.ep.fields import COMBINE_FIELDS, DISPATCH_FIELDS
from hal.ep.relay import Relayed
from hal.spec.ep import (
    FP8,
    EpCombineArgs,
    EpDispatchArgs,
    EpHandle,
)
from hal_cpu.ep_parts import (
    BYTES,
    INT32,
    TYPES,
    Sources,
    launches,
    nothing,
)
from hal_cpu.ep_window import WindowEngine

_WINDOW_FROM: Final = 1 << 20


class NormalCalls(WindowEngine):
    """The calls of the normal mode."""

    def dispatch(self, args: EpDispatchArgs) -> EpDispatched:
        """Exchange counts, write rows into the receivers' windows, and leave the wait for the others' rows."""
        return self._dispatch(args, (0, args.topk_idx.shape[0]), 0, 0)

    def relay(self, args: EpDispatchArgs, tokens: Relayed) -> EpDispatched:
        """As `dispatch`, for tokens of several ranks."""
        positions, sent = tokens.positions.contiguous(), tokens.sent.contiguous()
        return self._dispatch(args, tokens.begin, positions.data_ptr(), sent.data_ptr())

    def _dispatch(self, args: EpDispatchArgs, begin: Sequence[int], positions: int, sent: int) -> EpDispatched:
        x, scales, idx, weights, handle = args.x, args.scales, args.topk_idx, args.topk_weights, args.handle
        n, topk = idx.shape
        row_bytes = x.shape[1] * x.itemsize
        scale_bytes = 0 if scales is None else scales.shape[1] * 4
        fields = [
            weights is not None,
            topk,
            3 if scales is not None else TYPES[x.dtype],
            scale_bytes,
            scales is not None and scales.dtype == torch.int32,
            args.expand,
            args.expert_alignment,
            args.num_worst_tokens,
            0 if handle is None else _routes(handle).id,
        ]
        now = not (args.async_finish or args.return_recv_hook)
        try:
            launches[self._names[0]] += 1
            op, rows, recv_x, recv_scales, recv_idx, recv_weights, counts, dropped = self._engine.dispatch(
                x.data_ptr(),
                n,
                x.stride(0) * x.itemsize,
                row_bytes,
                0 if scales is None else scales.data_ptr(),
                0 if scales is None else scales.stride(0) * 4,
                scale_bytes,
                idx.data_ptr(),
                topk,
                0 if weights is None else weights.data_ptr(),
                args.expand,
                args.expert_alignment,
                args.num_worst_tokens,
                self._args.num_experts,
                begin,
                positions,
                sent,
                BYTES if scales is not None else TYPES[x.dtype],
                INT32 if scales is None or scales.dtype == torch.int32 else TYPES[torch.float32],
                now,
                weights is not None,
                None if handle is None else _routes(handle),
                fields,
            )
        except Exception as error:
            raise self._translated(error, DISPATCH_FIELDS) from None
        made = EpHandle(
            self._owner,
            n,
            rows,
            topk,
            args.expand,
            args.expert_alignment,
            args.num_worst_tokens,
            counts,
            dropped,
            idx,
            op.routes,
            Sources(op.routes, rows, self._origins, self._blocks, self._args),
        )
        return EpDispatched(
            recv_x if scales is None else recv_x.view(FP8),
            recv_scales,
            recv_idx,
            recv_weights,
            made,
            nothing if now else self._finish(op, DISPATCH_FIELDS),
        )

    def combine(self, args: EpCombineArgs) -> EpCombined:
        """Stage the rows where peers can read them; the finish fetches and sums."""
        handle, x = args.handle, args.x if args.x.is_contiguous() else args.x.contiguous()
        out = self._empty(handle.num_tokens, x.dtype)
        weights = (
            None
            if args.topk_weights is None
            else torch.empty(handle.num_tokens, handle.topk, dtype=torch.float32, device="cpu")
        )
        bias = [(one.data_ptr(), one.stride(0) * one.itemsize) for one in args.bias] + [(0, 0)] * 2
        kind = TYPES[x.dtype]
        routes = _routes(handle)
        now = not (args.async_finish or args.return_recv_hook)
        try:
            launches[self._names[1]] += 1
            op = self._engine.combine(
                x.data_ptr(),
                x.shape[1] * x.itemsize,
                x.shape[1],
                kind,
                kind,
                routes,
                0 if args.topk_weights is None else args.topk_weights.data_ptr(),
                0 if weights is None else weights.data_ptr(),
                *bias[0],
                *bias[1],
                out.data_ptr(),
                x.shape[1] * x.itemsize,
                False,
                now,
                (weights is not None, routes.id),
            )
        except Exception as error:
            raise self._translated(error, COMBINE_FIELDS) from None
        if now:
            return EpCombined(out, weights, nothing)
        return EpCombined(out, weights, self._finish(op, COMBINE_FIELDS, (x, out, weights, args.bias)))

    def gather(self, x: Tensor, handle: EpHandle) -> Tensor:
        """One fetch into zeros; rows that a choice does not have stay 0."""
        out = torch.zeros(handle.num_tokens, handle.topk, x.shape[1], dtype=x.dtype, device="cpu")
        self._fetch(x.contiguous(), handle, out, x.shape[1] * x.itemsize, 2, True)
        return out

    def partial(self, x: Tensor, handle: EpHandle) -> Tensor:
        """The sum of `combine`, left in float32."""
        out = torch.empty(handle.num_tokens, x.shape[1], dtype=torch.float32, device="cpu")
        self._fetch(x.contiguous(), handle, out, x.shape[1] * 4, TYPES[torch.float32], False)
        return out

    def _fetch(self, x: Tensor, handle: EpHandle, out: Tensor, stride: int, out_type: int, gather: bool) -> None:
        routes = _routes(handle)
        row = x.shape[1] * x.itemsize
        addresses = (x.data_ptr(), row, x.shape[1], TYPES[x.dtype], out_type, routes, 0, 0, 0, 0, 0, 0)
        try:
            self._engine.combine(*addresses, out.data_ptr(), stride, gather, True, (2 + gather, routes.id))
        except Exception as error:
            raise self._translated(error, COMBINE_FIELDS) from None

    def _empty(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Memory for sums. Large ones come from the window, whose pages are in place and used again."""
        hidden = self._args.hidden
        size = rows * hidden * dtype.itemsize
        if size < _WINDOW_FROM:
            return torch.empty(rows, hidden, dtype=dtype, device="cpu")
        tensor: Tensor = self._native.Engine.lent_tensor(self._engine.lend(size, True), TYPES[dtype], (rows, hidden))
        return tensor


def _routes(handle: EpHandle) -> Any:
    return handle.state
