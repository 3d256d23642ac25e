"""`hal.EpBuffer`: expert-parallel communication as the user calls it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from hal import plugins
from hal.ep.doctor import write_dump
from hal.ep.engine import EpEngine, Finish
from hal.ep.launch import launched_ranks_per_node, resolved_device
from hal.ep.rendezvous import agree, exchange_over
from hal.ep.results import (
    DONE,
    EpCombineResult,
    EpCompletion,
    EpDispatchResult,
    EpLowLatencyCombineResult,
    EpLowLatencyDispatchResult,
)
from hal.spec.ep import (
    MODES,
    EpBufferArgs,
    EpHandle,
    EpLayout,
    EpLowLatencyHandle,
    check_buffer,
    check_combine,
    check_dispatch,
    check_layout,
    check_low_latency_combine,
    check_low_latency_dispatch,
    require_ep_call_declared,
    require_ep_declared,
)
from hal.spec.errors import RankFailure, SpecError, UnsupportedError

_TIMEOUT: Final = 30.0


class EpBuffer:
    """Dispatch and combine over the ranks of a group; use as a context manager, the same on every rank.

    All calls but `layout` are collective: every rank makes the same calls in the same order. A wrong call on one rank
    raises the same SpecError on all; a rank that dies or stalls raises a RankFailure that names it.

    The gradient of a dispatch is a combine with its handle; the gradient of a combine is a dispatch with the handle.

    Parameters
    ----------
    group : ProcessGroup, optional
        Of torch.distributed, any backend; None is the default group.
    num_experts, hidden, topk : int
        Experts in all, columns of a token, the most experts a token may have.
    max_tokens_per_rank : int
        The most tokens a rank sends in one call.
    dtype : torch.dtype
        Of unquantised rows: bfloat16, float16 or float32.
    modes : tuple of str
        ``"normal"`` and ``"low_latency"``, those that will be used.
    max_recv_tokens : int, optional
        Tokens a rank has room for in one normal dispatch, a token counting once in either layout; by default all that
        can come.
    overflow : {"error", "drop", "grow"}
        What happens beyond that.
    ranks_per_node : int, optional
        Default: ``HAL_EP_RANKS_PER_NODE``, else what torchrun says (``LOCAL_WORLD_SIZE``), else one node.
    pre_reduce : bool
        Between nodes combine sends a partial sum a node: fewer bytes, another order of summation.
    timeout : float
        Seconds within which a rank that does not answer is named, here too.
    mask_ranks : bool
        Carry on without failed ranks.
    device : torch.device, optional
        Default: the backend's first device type.
    faults : EpFaults, optional
        Things to do wrong, for tests.
    backend : str, optional
        Overrides `hal.use` and ``HAL_BACKEND``.

    Raises
    ------
    SpecError
        An argument is wrong, or differs between ranks.
    UnsupportedError
        The backend does not declare what is asked.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        num_experts: int,
        hidden: int,
        topk: int,
        max_tokens_per_rank: int,
        dtype: torch.dtype = torch.bfloat16,
        modes: Sequence[str] = MODES,
        max_recv_tokens: int | None = None,
        overflow: str = "error",
        ranks_per_node: int | None = None,
        pre_reduce: bool = False,
        timeout: float = _TIMEOUT,
        mask_ranks: bool = False,
        device: torch.device | str | None = None,
        faults: object = None,
        backend: str | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise SpecError("group", "no initialised torch.distributed", "call torch.distributed.init_process_group")
        group = dist.group.WORLD if group is None else group
        if not isinstance(group, dist.ProcessGroup):
            raise SpecError("group", type(group).__name__, "a torch.distributed.ProcessGroup this process belongs to")
        exchange = exchange_over(group, float(timeout) if _is_number(timeout) and timeout > 0 else _TIMEOUT)
        num_ranks = dist.get_world_size(group)
        try:
            if ranks_per_node is None:
                ranks_per_node = launched_ranks_per_node(num_ranks)
            chosen = plugins.select(backend)
            args = check_buffer(
                group,
                num_ranks,
                dist.get_rank(group),
                num_experts,
                hidden,
                topk,
                max_tokens_per_rank,
                dtype,
                modes,
                max_recv_tokens,
                ranks_per_node,
                pre_reduce,
                overflow,
                timeout,
                mask_ranks,
                resolved_device(device, chosen.capabilities.device_types, chosen.name),
                faults,
            )
            require_ep_declared(args, chosen.capabilities.ep, chosen.name)
        except SpecError as error:
            agree(exchange, {error.argument: error})
            raise
        except Exception as error:
            with contextlib.suppress(SpecError):
                agree(exchange, {"backend": SpecError("backend", str(error), "one that can open this buffer")})
            raise
        agree(exchange, {"backend": chosen.name, **_agreed(args)})
        assert chosen.capabilities.ep is not None
        self._args = args
        self._backend = chosen.name
        self._recorded = False
        self._declared = chosen.capabilities.ep
        self._engine: EpEngine = chosen.backend.ep_buffer(args)

    def __enter__(self) -> EpBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the windows. Tensors received before stay valid. Idempotent; waits for nobody."""
        self._engine.close()

    @property
    def args(self) -> EpBufferArgs:
        """The resolved geometry and policies."""
        return self._args

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._backend

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
            Return before the rows are there; wait for ``event`` or call ``hook`` before using them.

        Returns
        -------
        EpDispatchResult
            Rows by source rank, then source position.
        """
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
            As in `dispatch`.
        """
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

        A result is live until a combine with its handle, or until its tensors are let go; two may be live at a time.

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
            [R] int64, microseconds waited for each rank are added.
        async_finish, return_recv_hook : bool
            As in `dispatch`.

        Returns
        -------
        EpLowLatencyDispatchResult
            recv_x [L, R · M, H]; of expert e the first ``recv_count[e]`` rows are valid.
        """
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
            Of the dispatch.
        out : Tensor, optional
            [n, H], where to write.
        combine_wait_recv_cost_stats : Tensor, optional
            [R] int64.
        zero_copy, async_finish, return_recv_hook : bool
        """
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
        """Memory [L, R · M, H] to write expert outputs into, for the next combine with ``zero_copy=True``. Local."""
        if not isinstance(handle, EpLowLatencyHandle):
            raise SpecError("handle", type(handle).__name__, "the handle that low_latency_dispatch returned")
        handle.check(self._engine.owner)
        return self._engine.low_latency_combine_buffer(handle)

    def refuse(self, error: SpecError) -> NoReturn:
        """Make every rank's call raise this error, in place of a call that this rank cannot make. Collective.

        For callers that check arguments of their own: a rank that simply raised would leave the others waiting.

        Raises
        ------
        SpecError
            ``error``, or what another rank refused at the same time: the same on every rank.
        """
        if not isinstance(error, SpecError):
            raise SpecError("error", type(error).__name__, "a SpecError")
        raise self._engine.refuse("refuse", error)

    @staticmethod
    def refuse_opening(group: Any, error: SpecError, timeout: float = _TIMEOUT) -> NoReturn:
        """As `refuse`, in place of a buffer that the other ranks are opening. Collective.

        Raises
        ------
        SpecError
            What the first rank in number that refuses gave.
        RankFailure
            A rank does not open one within ``timeout`` seconds.
        """
        agree(exchange_over(group, timeout), {error.argument: error})
        raise error

    def set_mask(self, rank: int, masked: bool = True) -> None:
        """Carry on without a rank, or with it again; needs ``mask_ranks=True``. Local."""
        if not self._args.mask_ranks:
            raise SpecError("mask_ranks", False, "True when the buffer is made")
        if not isinstance(rank, int) or not 0 <= rank < self._args.num_ranks or rank == self._args.rank:
            raise SpecError("rank", rank, f"another rank of 0…{self._args.num_ranks - 1}")
        self._engine.set_mask(rank, bool(masked))

    def masked(self) -> list[bool]:
        """For each rank, whether this one carries on without it."""
        return list(self._engine.masked())

    def records(self) -> list[Mapping[str, object]]:
        """The flight recorder: the last operations of every rank of this node, oldest first."""
        return list(self._engine.records())

    def memory(self) -> dict[str, int]:
        """Bytes this rank's windows hold now, by purpose."""
        return dict(self._engine.memory())

    @staticmethod
    def size_hint(
        num_ranks: int,
        num_experts: int,
        hidden: int,
        topk: int,
        max_tokens_per_rank: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        modes: Sequence[str] = MODES,
        max_recv_tokens: int | None = None,
        expand: bool = False,
        expert_alignment: int = 1,
    ) -> dict[str, int]:
        """Bytes a rank needs at most for one call of each kind, by purpose, before anything is allocated.

        ``expand`` and ``expert_alignment`` are those of the dispatches to come.

        Returns
        -------
        dict of str to int
            ``normal_recv`` (rows and their routes of one dispatch; each result that is kept holds its own),
            ``normal_combine`` (rows on their way back), ``low_latency_recv`` and ``low_latency_combine`` (both halves
            of the double buffers; only touched pages count), ``total``.
        """
        args = check_buffer(
            None, num_ranks, 0, num_experts, hidden, topk, max_tokens_per_rank, dtype, tuple(modes), max_recv_tokens
        )
        row = hidden * dtype.itemsize
        groups = -(-hidden // 128)
        rows, columns = args.max_recv_tokens, topk
        if expand:
            rows, columns = rows * min(topk, args.local_experts) + (expert_alignment - 1) * args.local_experts, 1
        cells = args.local_experts * num_ranks * max_tokens_per_rank
        normal, low_latency = "normal" in args.modes, "low_latency" in args.modes
        found = {
            "normal_recv": rows * (max(row, hidden + 4 * groups) + 12 * columns + 4) * normal,
            "normal_combine": rows * (row + 4 * columns) * normal,
            "low_latency_recv": 2 * cells * (max(row, hidden + 4 * groups) + 4) * low_latency,
            "low_latency_combine": 2 * cells * row * low_latency,
        }
        return {**found, "total": sum(found.values())}

    def _require_mode(self, mode: str) -> None:
        if mode not in self._args.modes:
            raise SpecError("modes", self._args.modes, f"a buffer made with {mode!r} among its modes")

    def _refused(self, phase: str, error: SpecError | UnsupportedError) -> Exception:
        """Tell the other ranks what is wrong with a call here, since they would wait otherwise."""
        if isinstance(error, SpecError):
            return self._engine.refuse(phase, error)
        self._engine.refuse(phase, SpecError(error.argument, error.got, error.supported))
        return error

    def _completion(
        self, finish: Finish, async_finish: bool, return_recv_hook: bool
    ) -> tuple[EpCompletion, EpCompletion | None]:
        if return_recv_hook:
            hook = EpCompletion(partial(self._late, finish))
            return hook, hook
        if async_finish:
            return EpCompletion(partial(self._late, finish)), None
        finish()
        return DONE, None

    def _late(self, finish: Finish) -> None:
        try:
            finish()
        except RankFailure as failure:
            self._record(failure)
            raise

    def _record(self, failure: RankFailure) -> None:
        """Leave a dump for ``hal ep doctor``, once."""
        if not self._recorded:
            self._recorded = True
            write_dump(failure, self._args.rank, self._args.num_ranks, self.records())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _agreed(args: EpBufferArgs) -> dict[str, Any]:
    alike = (
        "num_experts",
        "hidden",
        "topk",
        "max_tokens_per_rank",
        "dtype",
        "modes",
        "max_recv_tokens",
        "ranks_per_node",
        "pre_reduce",
        "overflow",
        "mask_ranks",
    )
    return {name: getattr(args, name) for name in alike}
