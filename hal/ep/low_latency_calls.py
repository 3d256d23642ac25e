"""The low-latency mode of `hal.EpBuffer`."""

from __future__ import annotations

from torch import Tensor

from hal.ep.calls import Calls
from hal.ep.results import (
    EpLowLatencyCombineResult,
    EpLowLatencyDispatchResult,
)
from hal.spec.ep import (
    EpLowLatencyHandle,
    check_low_latency_combine,
    check_low_latency_dispatch,
    require_ep_call_declared,
)
from hal.spec.errors import RankFailure, SpecError, UnsupportedError


class LowLatencyCalls(Calls):
    """Dispatch and combine of packed slots of fixed capacity."""

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        *,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> EpLowLatencyDispatchResult:
        """Send every token to its experts' packed slots, cast to FP8 on the way unless told otherwise.

        A result is live until a combine with its handle, or until its tensors are let go; two may be live at a time. A
        live one stays as it is, also after `close`.

        Parameters
        ----------
        x : Tensor
            [n, H], n at most ``max_tokens_per_rank``.
        topk_idx : Tensor
            [n, K] int64.
        use_fp8, round_scale, use_ue8m0 : bool
            FP8 rows; their scales rounded up to powers of two; those packed as exponents.
        cumulative_local_expert_recv_stats : Tensor, optional
            [L] int32, counts are added.
        dispatch_wait_recv_cost_stats : Tensor, optional
            [R] int64, microseconds waited for each rank are added: by the call or, where it ends later, by its hook or
            event, which do not count what the caller did before them.
        async_finish, return_recv_hook : bool
            As in `dispatch`.

        Returns
        -------
        EpLowLatencyDispatchResult
            recv_x [L, R · M, H]; of expert e the first ``recv_count[e]`` rows are valid.
        """
        self._require_own()
        try:
            self._require_mode("low_latency")
            args = check_low_latency_dispatch(
                self._args,
                x,
                topk_idx,
                use_fp8,
                round_scale,
                use_ue8m0,
                cumulative_local_expert_recv_stats,
                dispatch_wait_recv_cost_stats,
                async_finish,
                return_recv_hook,
            )
            require_ep_call_declared(args, self._declared, self._backend)
        except (SpecError, UnsupportedError) as error:
            raise self._refused("low_latency_dispatch", error) from None
        try:
            done = self._engine.low_latency_dispatch(args)
            event, hook = self._completion(done.finish, async_finish, return_recv_hook)
        except RankFailure as failure:
            self._record(failure)
            raise
        rows = done.recv_x if done.recv_scales is None else (done.recv_x, done.recv_scales)
        return EpLowLatencyDispatchResult(rows, done.recv_count, done.handle, event, hook)

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: EpLowLatencyHandle,
        *,
        zero_copy: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> EpLowLatencyCombineResult:
        """Bring packed rows back and sum them weighted, in float32 and in top-k order.

        Parameters
        ----------
        x : Tensor
            [L, R · M, H] of the buffer's dtype. With ``zero_copy`` the tensor of `low_latency_combine_buffer`.
        topk_idx, topk_weights : Tensor
            [n, K] as in the dispatch, and float32.
        handle : EpLowLatencyHandle
            Of the dispatch. May be combined again, with other rows, until a later dispatch has taken its memory; from
            then on it is right still or, on all ranks alike, refused with a SpecError that names it.
        out : Tensor, optional
            [n, H], where to write.
        combine_wait_recv_cost_stats : Tensor, optional
            [R] int64, as in the dispatch.
        zero_copy, async_finish, return_recv_hook : bool
            As in `dispatch`; ``topk_idx`` and ``topk_weights`` stay as they are until the hook has run, as does memory
            that was lent.
        """
        self._require_own()
        try:
            self._require_mode("low_latency")
            args = check_low_latency_combine(
                self._args,
                self._engine.owner,
                x,
                topk_idx,
                topk_weights,
                handle,
                zero_copy,
                out,
                combine_wait_recv_cost_stats,
                async_finish,
                return_recv_hook,
            )
            require_ep_call_declared(args, self._declared, self._backend)
        except (SpecError, UnsupportedError) as error:
            raise self._refused("low_latency_combine", error) from None
        try:
            done = self._engine.low_latency_combine(args)
            event, hook = self._completion(done.finish, async_finish, return_recv_hook)
        except RankFailure as failure:
            self._record(failure)
            raise
        return EpLowLatencyCombineResult(done.out, event, hook)

    def low_latency_combine_buffer(self, handle: EpLowLatencyHandle) -> Tensor:
        """Memory [L, R · M, H] to write expert outputs into, for the next combine with ``zero_copy=True``. Local.

        It may be asked for before the dispatch's hook has run, and is the same until that combine; after it, memory is
        lent anew.
        """
        if not isinstance(handle, EpLowLatencyHandle):
            raise SpecError("handle", type(handle).__name__, "the handle that low_latency_dispatch returned")
        handle.check(self._engine.owner)
        self._require_own()
        return self._engine.low_latency_combine_buffer(handle)
