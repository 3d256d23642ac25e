"""The normal mode of `hal.EpBuffer`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hal.ep.calls import Calls
from hal.ep.results import (
    EpCombineResult,
    EpDispatchResult,
)
from hal.spec.ep import (
    EpHandle,
    EpLayout,
    check_combine,
    check_dispatch,
    check_layout,
    require_ep_call_declared,
)
from hal.spec.errors import RankFailure, SpecError, UnsupportedError


class NormalCalls(Calls):
    """Dispatch and combine of as many tokens as come."""

    def layout(self, topk_idx: Tensor) -> EpLayout:
        """Count where the tokens of topk_idx [n, K] go. Local."""
        return self._engine.layout(check_layout(self._args, topk_idx))

    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        handle: EpHandle | None = None,
        expand: bool = False,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        previous_event: Any = None,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> EpDispatchResult:
        """Send every token to the ranks of its experts, once a rank however many of them live there.

        Parameters
        ----------
        x : Tensor or (Tensor, Tensor)
            [n, H] of the buffer's dtype, or (float8_e4m3fn [n, H], scales [n, H / 128]).
        topk_idx : Tensor
            [n, K] int64, -1 is no expert. None with ``handle``.
        topk_weights : Tensor, optional
            [n, K] float32, travel along.
        handle : EpHandle, optional
            Of an earlier dispatch, to use its routes again.
        expand : bool
            A row per (token, local expert), grouped by expert, instead of per (token, rank).
        expert_alignment : int
            Counts per expert, and in the expand layout groups, are rounded up to it.
        num_worst_tokens : int
            When positive, that many rows are returned whatever came; those past the end have topk_idx -1.
        previous_event : object with wait(), optional
            Waited for before x is read.
        async_finish, return_recv_hook : bool
            Return before the rows are there; wait for ``event`` or call ``hook`` before using them. What the call was
            given may be used for something else once it returned a hook, or once the event was waited for.

        Returns
        -------
        EpDispatchResult
            Rows by source rank, then source position.
        """
        self._require_own()
        try:
            self._require_mode("normal")
            args = check_dispatch(
                self._args,
                self._engine.owner,
                x,
                topk_idx,
                topk_weights,
                handle,
                expand,
                expert_alignment,
                num_worst_tokens,
                previous_event,
                async_finish,
                return_recv_hook,
            )
            require_ep_call_declared(args, self._declared, self._backend)
        except (SpecError, UnsupportedError) as error:
            raise self._refused("dispatch", error) from None
        if previous_event is not None:
            previous_event.wait()
        try:
            done = self._engine.dispatch(args)
            event, hook = self._completion(done.finish, async_finish, return_recv_hook)
        except RankFailure as failure:
            self._record(failure)
            raise
        return EpDispatchResult(
            done.recv_x if done.recv_scales is None else (done.recv_x, done.recv_scales),
            done.recv_topk_idx,
            done.recv_topk_weights,
            done.handle.num_recv_tokens_per_expert,
            done.handle,
            event,
            hook,
        )

    def combine(
        self,
        x: Tensor,
        handle: EpHandle,
        *,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, ...] | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> EpCombineResult:
        """Bring rows back to their tokens and sum them, unweighted, in float32 and in top-k order.

        Parameters
        ----------
        x : Tensor
            One row for every received row, of the buffer's dtype.
        handle : EpHandle
            Of the dispatch.
        topk_weights : Tensor, optional
            Like the received ones; sent back and summed likewise.
        bias : Tensor or tuple of two, optional
            [n, H], added first.
        previous_event, async_finish, return_recv_hook
            As in `dispatch`; ``bias`` stays as it is until the hook has run.
        """
        self._require_own()
        try:
            self._require_mode("normal")
            args = check_combine(
                self._args,
                self._engine.owner,
                x,
                handle,
                topk_weights,
                bias,
                previous_event,
                async_finish,
                return_recv_hook,
            )
            require_ep_call_declared(args, self._declared, self._backend)
        except (SpecError, UnsupportedError) as error:
            raise self._refused("combine", error) from None
        if previous_event is not None:
            previous_event.wait()
        try:
            done = self._engine.combine(args)
            event, hook = self._completion(done.finish, async_finish, return_recv_hook)
        except RankFailure as failure:
            self._record(failure)
            raise
        return EpCombineResult(done.out, done.topk_weights, event, hook)
