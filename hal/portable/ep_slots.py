"""Results of the low-latency mode: their tensors, how many may be live, and the memory a combine may be lent."""

from __future__ import annotations

import gc
import weakref
from typing import Any, Final

import torch
from torch import Tensor

from hal.ep.engine import EpLowLatencyDispatched
from hal.portable.ep_node import NodeCalls
from hal.portable.runtime import SharingDevice
from hal.spec.ep import FP8, SCALE_GROUP, EpBufferArgs, EpLowLatencyDispatchArgs, EpLowLatencyHandle
from hal.spec.errors import SpecError

ROOMS: Final = 2
"""Results that may be live at a time."""


class PackedState:
    """What a low-latency handle carries.

    Attributes
    ----------
    routes : Routes
    selected : Tensor
        [L · slots], -1 where a slot has no row.
    lent : Tensor or None
        Memory lent to combine.
    released : bool
        Whether a combine was made.
    """

    __slots__ = ("__weakref__", "lent", "released", "routes", "selected")

    def __init__(self) -> None:
        self.routes: Any = None
        self.selected: Any = None
        self.lent: Tensor | None = None
        self.released = False


class SlotCalls(NodeCalls):
    """What both engines do for them."""

    def __init__(self, args: EpBufferArgs, device: SharingDevice) -> None:
        self._live: list[tuple[weakref.ref[PackedState], weakref.ref[Tensor]]] = []
        super().__init__(args, device)

    def _third(self) -> SpecError | None:
        """What is wrong with one more result."""
        for turn in range(2):
            self._live = [
                (state, rows)
                for state, rows in self._live
                if ((there := state()) is None and rows() is not None) or (there is not None and not there.released)
            ]
            if len(self._live) < ROOMS:
                return None
            if not turn:
                gc.collect()  # a result let go in a cycle is let go
        got = f"a third result while two are live on rank {self._args.rank}"
        return SpecError("low_latency_dispatch", got, "at most two: combine one, or let go of it, first")

    def _slots(self, args: EpLowLatencyDispatchArgs) -> EpLowLatencyDispatched:
        """Tensors that a finish fills."""
        buffer, device = self._args, args.x.device
        local, hidden = buffer.local_experts, buffer.hidden
        slots, scales = buffer.num_ranks * buffer.max_tokens_per_rank, None
        rows = torch.empty(local, slots, hidden, dtype=args.x.dtype if args.cast == "none" else FP8, device=device)
        if args.cast != "none":
            groups = -(-hidden // SCALE_GROUP)
            packed = args.cast == "fp8_ue8m0"
            words, dtype = (-(-groups // 4), torch.int32) if packed else (groups, torch.float32)
            scales = torch.empty(local, words, slots, dtype=dtype, device=device).transpose(1, 2)
        state = PackedState()
        handle = EpLowLatencyHandle(
            self._owner,
            torch.empty(local, slots, dtype=torch.int32, device=device),
            torch.empty(local, buffer.num_ranks, dtype=torch.int64, device=device),
            buffer.max_tokens_per_rank,
            hidden,
            buffer.num_experts,
            len(args.x),
            args.topk_idx.shape[1],
            state,
        )
        self._live.append((weakref.ref(state), weakref.ref(rows)))
        count = torch.empty(local, dtype=torch.int32, device=device)
        return EpLowLatencyDispatched(rows, scales, count, handle, _nothing)

    def low_latency_combine_buffer(self, handle: EpLowLatencyHandle) -> Tensor:
        """Memory for the handle's next combine."""
        buffer, state = self._args, state_of(handle)
        if state.lent is None:
            slots = buffer.num_ranks * buffer.max_tokens_per_rank
            state.lent = torch.empty(
                buffer.local_experts, slots, buffer.hidden, dtype=buffer.dtype, device=handle.src_info.device
            )
        return state.lent


def _nothing() -> None:
    """The finish of what is only reserved."""


def state_of(handle: EpLowLatencyHandle) -> PackedState:
    """What a handle carries."""
    assert isinstance(handle.state, PackedState)
    return handle.state
