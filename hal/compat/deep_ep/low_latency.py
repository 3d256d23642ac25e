"""The low-latency family of the published V1 ``Buffer``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from hal.compat.deep_ep.config import low_latency_size
from hal.compat.deep_ep.event import Completion, EventOverlap, overlap
from hal.compat.deep_ep.handle import Route, attach, attached, buffer_of
from hal.compat.deep_ep.pool import Pool, published, unsupported
from hal.compat.flags import zero_or_one_methods
from hal.spec.ep import PLAIN_DTYPES, EpLowLatencyHandle
from hal.spec.errors import SpecError
from hal.spec.tensors import require_bool, require_int, require_shape, require_tensor

_NAMES: Final = {
    "scales": "x",
    "hidden": "x",
    "dtype": "x",
    "topk": "topk_idx",
    "max_tokens_per_rank": "num_max_dispatch_tokens_per_rank",
    "mask_ranks": "enable_shrink",
    "modes": "low_latency_mode",
    "rank": "rank_to_mask",
}

Hook = Callable[[], None]
PackedHandle = tuple[Tensor, Tensor, int, int, int]


@zero_or_one_methods
class LowLatency:
    """Dispatch and combine for decoding: packed slots of fixed capacity, hooks, masks."""

    low_latency_mode: bool
    enable_shrink: bool
    _pool: Pool

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        *,
        topk_weights: Tensor | None = None,
        x_global_scale: Tensor | None = None,
        use_nvfp4: bool = False,
        use_ue8m0_for_sf: bool = False,
        use_eager: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, PackedHandle, EventOverlap, Hook | None]:
        """Send every token to its experts' packed slots, cast to FP8 on the way unless told otherwise.

        Parameters
        ----------
        x : Tensor
            [n, hidden], n at most ``num_max_dispatch_tokens_per_rank``.
        topk_idx : Tensor
            [n, K] int64, -1 is no expert.
        num_max_dispatch_tokens_per_rank, num_experts : int
            M and E, the same on every rank.
        cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats : Tensor, optional
            [L] int32 and [R] int64, to which counts and waited microseconds are added.
        use_fp8, round_scale, use_ue8m0, async_finish, return_recv_hook : bool
            As in `hal.EpBuffer.low_latency_dispatch`.
        topk_weights, x_global_scale, use_nvfp4, use_ue8m0_for_sf, use_eager
            Of branches of the published code; anything but the default is refused.

        Returns
        -------
        recv_x : Tensor or (Tensor, Tensor)
            [L, R · M, hidden], and with FP8 its scales [L, R · M, …], whose last two dimensions are column-major.
        recv_count : Tensor
            [L] int32; of expert e the first ``recv_count[e]`` rows are valid.
        handle : tuple
            ``(src_info, layout_range, M, hidden, E)``.
        event : EventOverlap
        hook : callable or None
            With ``return_recv_hook``: completes the receive.

        Raises
        ------
        SpecError
            A wrong argument, or a third result while two are live.
        """
        extras = {
            "topk_weights": topk_weights,
            "x_global_scale": x_global_scale,
            "use_nvfp4": use_nvfp4,
            "use_ue8m0_for_sf": use_ue8m0_for_sf,
            "use_eager": use_eager,
        }
        with self._pool.checking("low_latency"):
            self._require_low_latency()
            _refuse(extras)
            require_int("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, 1)
            require_int("num_experts", num_experts, 1)
            require_tensor("x", x, PLAIN_DTYPES, 2, "[n, hidden]")
            require_tensor("topk_idx", topk_idx, (torch.int64,), 2, "[n, K]")
        with published(_NAMES):
            buffer = self._pool.low_latency(
                num_experts, x.shape[1], topk_idx.shape[1], x.dtype, num_max_dispatch_tokens_per_rank
            )
            sent = buffer.low_latency_dispatch(
                x,
                topk_idx,
                use_fp8=use_fp8,
                round_scale=round_scale,
                use_ue8m0=use_ue8m0,
                cumulative_local_expert_recv_stats=cumulative_local_expert_recv_stats,
                dispatch_wait_recv_cost_stats=dispatch_wait_recv_cost_stats,
                async_finish=async_finish,
                return_recv_hook=return_recv_hook,
            )
        made = sent.handle
        handle = (
            attach(made.src_info, Route(buffer, made)),
            made.layout_range,
            num_max_dispatch_tokens_per_rank,
            x.shape[1],
            num_experts,
        )
        return sent.recv_x, sent.recv_count, handle, *_completion(sent, async_finish, return_recv_hook)

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: PackedHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
        *,
        overlap: bool = False,
        packed_recv_count: Tensor | None = None,
        comp_signal: Tensor | None = None,
        block_m: int = 64,
        threshold: int = 0,
        num_sms: int = 3,
        src_signals: Tensor | None = None,
        src_signal_expect_value: int = 0,
        use_eager: bool = False,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Bring packed rows back and sum them weighted.

        Parameters
        ----------
        x : Tensor
            [L, R · M, hidden]. With ``zero_copy`` what counts is the memory of `get_next_low_latency_combine_buffer`.
        topk_idx, topk_weights : Tensor
            [n, K] as in the dispatch, and float32.
        handle : tuple
            Of the dispatch.
        zero_copy, async_finish, return_recv_hook, out, combine_wait_recv_cost_stats
            As in `hal.EpBuffer.low_latency_combine`.
        use_logfmt, overlap, src_signals, use_eager
            Refused. The figures that go with an overlap are looked at only with it.

        Returns
        -------
        combined_x : Tensor
            [n, hidden].
        event : EventOverlap
        hook : callable or None
        """
        with self._pool.checking("low_latency", buffer_of(handle, EpLowLatencyHandle)):
            self._require_low_latency()
            _refuse({"use_logfmt": use_logfmt, "overlap": overlap, "src_signals": src_signals, "use_eager": use_eager})
            require_bool("zero_copy", zero_copy)
            route = attached(handle, EpLowLatencyHandle, "low_latency_dispatch")
            if zero_copy:
                if not route.lent:
                    legal = "False, unless get_next_low_latency_combine_buffer was filled for this combine"
                    raise SpecError("zero_copy", True, legal)
                lent = route.buffer.low_latency_combine_buffer(route.handle)
                require_tensor("x", x, (lent.dtype,), 3, "[L, R · M, hidden]")
                require_shape("x", x, tuple(lent.shape), "[L, R · M, hidden]")
                route.lent, x = False, lent
        with published(_NAMES):
            sent = route.buffer.low_latency_combine(
                x,
                topk_idx,
                topk_weights,
                route.handle,
                zero_copy=zero_copy,
                out=out,
                combine_wait_recv_cost_stats=combine_wait_recv_cost_stats,
                async_finish=async_finish,
                return_recv_hook=return_recv_hook,
            )
        return sent.combined_x, *_completion(sent, async_finish, return_recv_hook)

    def get_next_low_latency_combine_buffer(self, handle: object) -> Tensor:
        """Memory [L, R · M, hidden] to write expert outputs into, for the next combine with ``zero_copy=True``."""
        self._require_low_latency()
        route = attached(handle, EpLowLatencyHandle, "low_latency_dispatch")
        route.lent = True
        return route.buffer.low_latency_combine_buffer(route.handle)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing to do: windows need no cleaning between modes. The arguments are checked."""
        self._require_low_latency()
        low_latency_size(num_max_dispatch_tokens_per_rank, hidden, self._pool.size, num_experts)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Carry on without a rank, or with it again. Local; needs ``enable_shrink=True``."""
        self._require_shrink()
        require_bool("mask", mask)
        require_int("rank_to_mask", rank_to_mask, 0, self._pool.size - 1)
        if rank_to_mask == self._pool.rank:
            raise SpecError("rank_to_mask", f"{rank_to_mask}, this rank", "another rank")
        with published(_NAMES):
            self._pool.set_mask(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Write into mask_status [R] int32 for each rank 1 where this one carries on without it, else 0."""
        self._require_shrink()
        require_tensor("mask_status", mask_status, (torch.int32,), 1, "[R]")
        require_shape("mask_status", mask_status, (self._pool.size,), "[R]")
        mask_status.copy_(torch.tensor(self._pool.masked(), dtype=torch.int32))

    def low_latency_clean_mask_buffer(self) -> None:
        """Carry on with every rank again."""
        self._require_shrink()
        for rank, masked in enumerate(self._pool.masked()):
            if masked:
                self._pool.set_mask(rank, False)

    def _require_low_latency(self) -> None:
        self._pool.require_open()
        if not self.low_latency_mode:
            raise SpecError("low_latency_mode", False, "True when the buffer is made")

    def _require_shrink(self) -> None:
        self._pool.require_open()
        if not self.enable_shrink:
            raise SpecError("enable_shrink", False, "True when the buffer is made")


def _refuse(extras: dict[str, Any]) -> None:
    for name, value in extras.items():
        if value is not None and value is not False:
            raise unsupported(name, "a tensor" if isinstance(value, Tensor) else value, "the default")


def _completion(sent: Any, async_finish: bool, return_recv_hook: bool) -> tuple[EventOverlap, Hook | None]:
    if return_recv_hook:
        return EventOverlap(), sent.hook
    return overlap(Completion(sent.event.wait), async_finish), None
