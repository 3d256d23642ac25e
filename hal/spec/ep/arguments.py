"""Calls as an engine receives them: validated, complete, read-only."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hal.spec.ep.handles import EpHandle, EpLowLatencyHandle
from hal.spec.ep.terms import EpEvent


@dataclass(slots=True)
class EpBufferArgs:
    """The geometry and the policies of one buffer; read-only but for ``num_sms``.

    Equal on every rank but for ``rank``, ``device``, ``timeout`` and ``faults``.

    Attributes
    ----------
    group : object
        The torch.distributed ProcessGroup that connects the ranks.
    num_ranks, rank : int
        R and this rank's number within the group.
    num_experts, hidden, topk, max_tokens_per_rank : int
        E, H, the most experts a token may have, and M.
    dtype : torch.dtype
        Element type of unquantised rows: of x, unless x is FP8, and of what combine takes and returns.
    modes : tuple of str
        The modes memory is reserved for.
    max_recv_tokens : int
        Tokens the receiving side has room for in one normal dispatch, a token counting once in either layout; R · M,
        the default, never overflows.
    ranks_per_node : int
        Ranks of a node are consecutive; the last node may have fewer.
    pre_reduce : bool
        Between nodes combine sends one float32 partial sum a node instead of every row.
    overflow : str
        Member of `OVERFLOW`.
    timeout : float
        Seconds within which a rank that does not answer is named; it may come to that after three quarters of them.
    mask_ranks : bool
        Carry on without a rank that failed instead of raising.
    device : torch.device
        Where all tensors of the calls live.
    faults : object
        Fault injection for tests, or None.
    num_sms : int or None
        Processors of its device that a call's kernels may take, as of when it is made; None for all. Each rank's own.
    admitted : set
        Forms of calls that passed every check that does not read values; the same form is not checked again.
    """

    group: object
    num_ranks: int
    rank: int
    num_experts: int
    hidden: int
    topk: int
    max_tokens_per_rank: int
    dtype: torch.dtype
    modes: tuple[str, ...]
    max_recv_tokens: int
    ranks_per_node: int
    pre_reduce: bool
    overflow: str
    timeout: float
    mask_ranks: bool
    device: torch.device
    faults: object
    num_sms: int | None = field(default=None, compare=False)
    admitted: set[object] = field(default_factory=set, compare=False, repr=False)

    @property
    def local_experts(self) -> int:
        """L, the same on every rank; where R does not divide E the last ranks have experts that are never chosen."""
        return -(-self.num_experts // self.num_ranks)

    @property
    def num_nodes(self) -> int:
        """Nodes the group spans."""
        return -(-self.num_ranks // self.ranks_per_node)


@dataclass(slots=True)
class EpDispatchArgs:
    """One validated normal dispatch, as an engine receives it; read-only.

    Attributes
    ----------
    x : Tensor
        [n, H] of the buffer's dtype, or float8_e4m3fn. Last dimension contiguous; rows any number of elements apart, 0
        among them, from any element of memory on, as those of every tensor that is not said to be contiguous.
    scales : Tensor or None
        For FP8 rows: float32 [n, ceil(H / 128)], or packed UE8M0 int32 [n, ceil(H / 512)]. Moved, never interpreted.
    topk_idx : Tensor
        [n, K] int64 contiguous; -1 is no expert. A handle's own for a cached dispatch.
    topk_weights : Tensor or None
        [n, K] float32 contiguous.
    handle : EpHandle or None
        Routes of an earlier dispatch to use again.
    expand : bool
        A row per (token, local expert) instead of per (token, rank).
    expert_alignment : int
        Counts per expert are rounded up to it; in the expand layout so are the groups of rows.
    num_worst_tokens : int
        When positive, recv_x has exactly this many rows and no counts are returned to the host.
    previous_event : EpEvent or None
        To wait for before x is read.
    async_finish, return_recv_hook : bool
        Return before the rows are there, with an event or with a hook that completes the receive.
    """

    x: Tensor
    scales: Tensor | None
    topk_idx: Tensor
    topk_weights: Tensor | None
    handle: EpHandle | None
    expand: bool
    expert_alignment: int
    num_worst_tokens: int
    previous_event: EpEvent | None
    async_finish: bool
    return_recv_hook: bool


@dataclass(slots=True)
class EpCombineArgs:
    """One validated normal combine, as an engine receives it; read-only.

    Attributes
    ----------
    x : Tensor
        [num_recv_tokens, H] of the buffer's dtype.
    handle : EpHandle
    topk_weights : Tensor or None
        What is sent back beside the rows: float32 [num_recv_tokens, K], or [num_recv_tokens] in the expand layout.
    bias : tuple of Tensor
        None, one or two [n, H] of the buffer's dtype, added before the rows.
    previous_event, async_finish, return_recv_hook
        As in `EpDispatchArgs`.
    """

    x: Tensor
    handle: EpHandle
    topk_weights: Tensor | None
    bias: tuple[Tensor, ...]
    previous_event: EpEvent | None
    async_finish: bool
    return_recv_hook: bool


@dataclass(slots=True)
class EpLowLatencyDispatchArgs:
    """One validated low-latency dispatch, as an engine receives it; read-only.

    Attributes
    ----------
    x : Tensor
        [n, H] of the buffer's dtype, n ≤ M; in memory as in `EpDispatchArgs`.
    topk_idx : Tensor
        [n, K] int64 contiguous; -1 is no expert.
    cast : str
        Member of `CASTS`.
    cumulative_local_expert_recv_stats : Tensor or None
        [L] int32, to which the received counts are added.
    dispatch_wait_recv_cost_stats : Tensor or None
        [R] int64, to which the microseconds waited for each rank are added; of a call that ends later, those that its
        ``finish`` waits.
    async_finish, return_recv_hook : bool
        As in `EpDispatchArgs`.
    """

    x: Tensor
    topk_idx: Tensor
    cast: str
    cumulative_local_expert_recv_stats: Tensor | None
    dispatch_wait_recv_cost_stats: Tensor | None
    async_finish: bool
    return_recv_hook: bool


@dataclass(slots=True)
class EpLowLatencyCombineArgs:
    """One validated low-latency combine, as an engine receives it; read-only.

    Attributes
    ----------
    x : Tensor
        [L, R · M, H] of the buffer's dtype, contiguous; rows past the received count are never read. With ``zero_copy``
        the tensor that the engine lent for this handle.
    topk_idx, topk_weights : Tensor
        [n, K] int64 and float32, contiguous.
    handle : EpLowLatencyHandle
    zero_copy : bool
    out : Tensor
        [n, H] of the buffer's dtype; no two of its elements share memory.
    out_is_given : bool
        Whether it is the caller's, who may see it before its hook has run.
    combine_wait_recv_cost_stats : Tensor or None
        [R] int64, as in dispatch.
    async_finish, return_recv_hook : bool
        As in `EpDispatchArgs`.
    """

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    handle: EpLowLatencyHandle
    zero_copy: bool
    out: Tensor
    out_is_given: bool
    combine_wait_recv_cost_stats: Tensor | None
    async_finish: bool
    return_recv_hook: bool


EpCallArgs = EpDispatchArgs | EpCombineArgs | EpLowLatencyDispatchArgs | EpLowLatencyCombineArgs
