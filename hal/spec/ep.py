"""What expert-parallel communication means: its arguments, their shapes and dtypes, and every way they can be wrong.

Names and layouts follow the published DeepEP interfaces (V1 ``Buffer``, V2 ``ElasticBuffer``). A buffer fixes the
geometry of a group once (`check_buffer`); each call is then checked in one pass against it, and an engine trusts what
it receives.

Symbols: R ranks, E experts, L = ceil(E / R) local experts, n tokens of this rank, H hidden, K experts a token,
M = max_tokens_per_rank. Expert e lives on rank e // L, where its local id is e % L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import Tensor

from hal.spec.capability import EpCapabilities
from hal.spec.errors import SpecError, UnsupportedError
from hal.spec.tensors import (
    dtype_name,
    require_bool,
    require_choice,
    require_device,
    require_int,
    require_shape,
    require_tensor,
    require_values,
    require_writable,
)
from hal.spec.validation import Level, validation_level

PLAIN_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
"""Element types of token rows that are not quantised; combine takes only these."""

FP8: Final = torch.float8_e4m3fn
MODES: Final = ("normal", "low_latency")
OVERFLOW: Final = ("error", "drop", "grow")
"""What happens when a rank would receive more rows than its window holds: all ranks raise, the rows last in order are
dropped and counted, or the window grows."""

CASTS: Final = ("none", "fp8", "fp8_pow2", "fp8_ue8m0")
"""What low-latency dispatch turns rows into: nothing, or FP8 with float32, power-of-two or packed UE8M0 scales."""

SCALE_GROUP: Final = 128
"""Columns that share one scale."""

ROW_ALIGNMENT: Final = 16
"""A token row is a multiple of this many bytes."""

_INT64: Final = (torch.int64,)
_INT32: Final = (torch.int32,)
_FLOAT32: Final = (torch.float32,)
_ROWS: Final = (*PLAIN_DTYPES, FP8)
_SCALARS: Final = (bool, int, str)
_ADMITTED_LIMIT: Final = 4096
_MAX_INT32: Final = 2**31 - 1


@runtime_checkable
class EpEvent(Protocol):
    """Completion of an asynchronous call."""

    def wait(self) -> None:
        """Return when the work is done and its results may be used."""


@dataclass(slots=True)
class EpBufferArgs:
    """The geometry and the policies of one buffer, equal on every rank but for ``rank``; read-only.

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
        Rows the receiving side has room for in one normal dispatch; R · M never overflows in the rank layout.
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
    admitted: set[object] = field(default_factory=set, compare=False, repr=False)

    @property
    def local_experts(self) -> int:
        """L, the same on every rank; where R does not divide E the last ranks have experts that are never chosen."""
        return -(-self.num_experts // self.num_ranks)

    @property
    def num_nodes(self) -> int:
        """Nodes the group spans."""
        return -(-self.num_ranks // self.ranks_per_node)


@dataclass(frozen=True, slots=True, eq=False)
class EpLayout:
    """Where the tokens of this rank go.

    Attributes
    ----------
    num_tokens_per_rank : Tensor
        [R] int32; a token counts once for a rank however many of its experts live there.
    num_tokens_per_node : Tensor or None
        [nodes] int32; None where the group is one node.
    num_tokens_per_expert : Tensor
        [E] int32; a token counts once for an expert.
    is_token_in_rank : Tensor
        [n, R] bool.
    """

    num_tokens_per_rank: Tensor
    num_tokens_per_node: Tensor | None
    num_tokens_per_expert: Tensor
    is_token_in_rank: Tensor


@dataclass(slots=True, eq=False)
class EpHandle:
    """What a normal dispatch leaves behind for combine, for its backward, and for a dispatch over the same routes.

    Read-only; not frozen only because freezing costs microseconds a call.

    Attributes
    ----------
    owner : object
        Identity of the engine that made it, the only one that may use it.
    num_tokens, num_recv_tokens : int
        Rows sent in and rows of ``recv_x`` (with padding in the expand layout).
    topk : int
        K of the call.
    expand : bool
    expert_alignment, num_worst_tokens : int
    num_recv_tokens_per_expert : tuple of int
        L counts, each rounded up to the alignment.
    num_dropped : int
        Rows meant for this rank that overflow policy ``drop`` left out.
    topk_idx : Tensor
        [n, K], the routes.
    state : object
        The engine's own data.
    """

    owner: object
    num_tokens: int
    num_recv_tokens: int
    topk: int
    expand: bool
    expert_alignment: int
    num_worst_tokens: int
    num_recv_tokens_per_expert: tuple[int, ...]
    num_dropped: int
    topk_idx: Tensor
    state: object

    def check(self, owner: object) -> None:
        """Refuse another buffer's handle."""
        if self.owner is not owner:
            raise SpecError("handle", "a handle of another or a closed buffer", "one this buffer's dispatch returned")


@dataclass(slots=True, eq=False)
class EpLowLatencyHandle:
    """What a low-latency dispatch leaves behind for its combine. Read-only.

    Attributes
    ----------
    owner : object
        Identity of the engine that made it.
    src_info : Tensor
        [L, R · M] int32: position at the source of each received row.
    layout_range : Tensor
        [L, R] int64: ``begin << 32 | count`` of the rows of each source rank.
    num_max_dispatch_tokens_per_rank, hidden, num_experts : int
        The geometry, as the published handle carries it.
    num_tokens, topk : int
        n and K of the call.
    state : object
        The engine's own data.
    """

    owner: object
    src_info: Tensor
    layout_range: Tensor
    num_max_dispatch_tokens_per_rank: int
    hidden: int
    num_experts: int
    num_tokens: int
    topk: int
    state: object

    def check(self, owner: object) -> None:
        """Refuse another buffer's handle."""
        if self.owner is not owner:
            legal = "one this buffer's low_latency_dispatch returned"
            raise SpecError("handle", "a handle of another or a closed buffer", legal)


@dataclass(slots=True)
class EpDispatchArgs:
    """One validated normal dispatch, as an engine receives it; read-only.

    Attributes
    ----------
    x : Tensor
        [n, H] of the buffer's dtype, or float8_e4m3fn. Last dimension contiguous.
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
        [n, H] of the buffer's dtype, n ≤ M.
    topk_idx : Tensor
        [n, K] int64 contiguous; -1 is no expert.
    cast : str
        Member of `CASTS`.
    cumulative_local_expert_recv_stats : Tensor or None
        [L] int32, to which the received counts are added.
    dispatch_wait_recv_cost_stats : Tensor or None
        [R] int64, to which the microseconds waited for each rank are added.
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
        [L, R · M, H] of the buffer's dtype; rows past the received count are never read. With ``zero_copy`` the tensor
        that the engine lent for this handle.
    topk_idx, topk_weights : Tensor
        [n, K] int64 and float32, contiguous.
    handle : EpLowLatencyHandle
    zero_copy : bool
    out : Tensor
        [n, H] of the buffer's dtype.
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
    combine_wait_recv_cost_stats: Tensor | None
    async_finish: bool
    return_recv_hook: bool


def check_buffer(
    group: Any,
    num_ranks: Any,
    rank: Any,
    num_experts: Any,
    hidden: Any,
    topk: Any,
    max_tokens_per_rank: Any,
    dtype: Any = torch.bfloat16,
    modes: Any = MODES,
    max_recv_tokens: Any = None,
    ranks_per_node: Any = None,
    pre_reduce: Any = False,
    overflow: Any = "error",
    timeout: Any = 30.0,
    mask_ranks: Any = False,
    device: Any = None,
    faults: Any = None,
) -> EpBufferArgs:
    """Check the geometry of a buffer; always in full, since it happens once.

    Raises
    ------
    SpecError
        An argument of the wrong type or out of range.
    """
    require_int("num_ranks", num_ranks, 1)
    require_int("rank", rank, 0, num_ranks - 1)
    require_int("num_experts", num_experts, 1, _MAX_INT32)
    require_int("hidden", hidden, 1, _MAX_INT32)
    require_int("topk", topk, 1, _MAX_INT32)
    require_int("max_tokens_per_rank", max_tokens_per_rank, 1, _MAX_INT32 // num_ranks)
    if dtype not in PLAIN_DTYPES:
        raise SpecError("dtype", dtype, " or ".join(map(dtype_name, PLAIN_DTYPES)))
    if (hidden * dtype.itemsize) % ROW_ALIGNMENT:
        raise SpecError("hidden", hidden, f"a row of a multiple of {ROW_ALIGNMENT} bytes")
    if not isinstance(modes, (tuple, list)) or not modes:
        raise SpecError("modes", repr(modes), f"some of {', '.join(MODES)}")
    for mode in modes:
        require_choice("modes", mode, MODES)
    most = num_ranks * max_tokens_per_rank
    if max_recv_tokens is not None:
        require_int("max_recv_tokens", max_recv_tokens, 1, _MAX_INT32)
    if ranks_per_node is not None:
        require_int("ranks_per_node", ranks_per_node, 1)
    require_bool("pre_reduce", pre_reduce)
    require_choice("overflow", overflow, OVERFLOW)
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
        raise SpecError("timeout", repr(timeout), "a positive finite number of seconds")
    require_bool("mask_ranks", mask_ranks)
    return EpBufferArgs(
        group=group,
        num_ranks=num_ranks,
        rank=rank,
        num_experts=num_experts,
        hidden=hidden,
        topk=topk,
        max_tokens_per_rank=max_tokens_per_rank,
        dtype=dtype,
        modes=tuple(modes),
        max_recv_tokens=most if max_recv_tokens is None else max_recv_tokens,
        ranks_per_node=num_ranks if ranks_per_node is None else min(ranks_per_node, num_ranks),
        pre_reduce=pre_reduce,
        overflow=overflow,
        timeout=float(timeout),
        mask_ranks=mask_ranks,
        device=torch.device("cpu") if device is None else torch.device(device),
        faults=faults,
    )


def check_layout(buffer: EpBufferArgs, topk_idx: Any) -> Tensor:
    """Check one call of ``EpBuffer.layout`` and return topk_idx contiguous.

    Raises
    ------
    SpecError
        As in `check_dispatch`.
    """
    level = validation_level()
    if level:
        _check_topk(buffer, topk_idx, None)
    if level is Level.FULL:
        _check_experts(buffer, topk_idx)
    return _contiguous(topk_idx)


def check_dispatch(
    buffer: EpBufferArgs,
    owner: object,
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    handle: Any,
    expand: Any,
    expert_alignment: Any,
    num_worst_tokens: Any,
    previous_event: Any,
    async_finish: Any,
    return_recv_hook: Any,
) -> EpDispatchArgs:
    """Check one normal dispatch; ``owner`` is the identity that handles of this engine carry.

    Raises
    ------
    SpecError
        An argument of the wrong type, shape, dtype, device or layout; a foreign handle; at level ``full`` also an
        expert out of range.
    """
    level = validation_level()
    scales = None
    if isinstance(x, (tuple, list)):
        if len(x) != 2:
            raise SpecError("x", f"{len(x)} tensors", "a tensor, or the two (fp8 rows, scales)")
        x, scales = x
    form = None
    if level and handle is None and scales is None and previous_event is None:
        form = _form(
            x, topk_idx, topk_weights, expand, expert_alignment, num_worst_tokens, async_finish, return_recv_hook
        )
    if level and (form is None or form not in buffer.admitted):
        _check_rows(buffer, x, scales)
        if handle is not None:
            if not isinstance(handle, EpHandle):
                raise SpecError("handle", type(handle).__name__, "an EpHandle or None")
            handle.check(owner)
            _check_cached(x, topk_idx, handle)
        else:
            _check_topk(buffer, topk_idx, len(x))
            require_bool("expand", expand)
            require_int("expert_alignment", expert_alignment, 1, _MAX_INT32)
            require_int("num_worst_tokens", num_worst_tokens, 0, _MAX_INT32)
            if expand and num_worst_tokens:
                raise SpecError("num_worst_tokens", num_worst_tokens, "0 in the expand layout")
        _check_async(previous_event, async_finish, return_recv_hook)
        if topk_weights is not None:
            topk = handle.topk if handle is not None else topk_idx.shape[1]
            _check_weights(topk_weights, (len(x), topk), "[n, K]", x.device)
        _admit(buffer, form)
    if handle is not None:
        topk_idx, expand = handle.topk_idx, handle.expand
        expert_alignment, num_worst_tokens = handle.expert_alignment, handle.num_worst_tokens
    elif level is Level.FULL:
        _check_experts(buffer, topk_idx)
    return EpDispatchArgs(
        x,
        scales,
        _contiguous(topk_idx),
        None if topk_weights is None else _contiguous(topk_weights),
        handle,
        expand,
        expert_alignment,
        num_worst_tokens,
        previous_event,
        async_finish,
        return_recv_hook,
    )


def check_combine(
    buffer: EpBufferArgs,
    owner: object,
    x: Any,
    handle: Any,
    topk_weights: Any,
    bias: Any,
    previous_event: Any,
    async_finish: Any,
    return_recv_hook: Any,
) -> EpCombineArgs:
    """Check one normal combine.

    Raises
    ------
    SpecError
        An argument of the wrong type, shape, dtype, device or layout, or a foreign handle.
    """
    biases = bias if isinstance(bias, (tuple, list)) else () if bias is None else (bias,)
    if validation_level():
        if not isinstance(handle, EpHandle):
            raise SpecError("handle", type(handle).__name__, "the EpHandle that dispatch returned")
        handle.check(owner)
        require_tensor("x", x, (buffer.dtype,), 2, "[num_recv_tokens, hidden]")
        require_shape("x", x, (handle.num_recv_tokens, buffer.hidden), "[num_recv_tokens, hidden]")
        require_device("x", x, buffer.device, "the buffer")
        if topk_weights is not None:
            if handle.expand:
                _check_weights(topk_weights, (handle.num_recv_tokens,), "[num_recv_tokens]", x.device)
            else:
                shape = (handle.num_recv_tokens, handle.topk)
                _check_weights(topk_weights, shape, "[num_recv_tokens, K]", x.device)
        if len(biases) > 2:
            raise SpecError("bias", f"{len(biases)} tensors", "at most two")
        for one in biases:
            require_tensor("bias", one, (buffer.dtype,), 2, "[n, hidden]")
            require_shape("bias", one, (handle.num_tokens, buffer.hidden), "[n, hidden]")
            require_device("bias", one, x.device, "x")
        _check_async(previous_event, async_finish, return_recv_hook)
    return EpCombineArgs(
        x,
        handle,
        None if topk_weights is None else _contiguous(topk_weights),
        tuple(biases),
        previous_event,
        async_finish,
        return_recv_hook,
    )


def check_low_latency_dispatch(
    buffer: EpBufferArgs,
    x: Any,
    topk_idx: Any,
    use_fp8: Any,
    round_scale: Any,
    use_ue8m0: Any,
    cumulative_local_expert_recv_stats: Any,
    dispatch_wait_recv_cost_stats: Any,
    async_finish: Any,
    return_recv_hook: Any,
) -> EpLowLatencyDispatchArgs:
    """Check one low-latency dispatch.

    Raises
    ------
    SpecError
        An argument of the wrong type, shape, dtype, device or layout; more tokens than M; at level ``full`` also an
        expert out of range.
    """
    level = validation_level()
    form = None
    if level and cumulative_local_expert_recv_stats is None and dispatch_wait_recv_cost_stats is None:
        form = _form(x, topk_idx, None, "low_latency", use_fp8, round_scale, use_ue8m0, async_finish, return_recv_hook)
    if level and (form is None or form not in buffer.admitted):
        require_tensor("x", x, (buffer.dtype,), 2, "[n, hidden]")
        if x.shape[1] != buffer.hidden:
            raise SpecError("x", f"shape {list(x.shape)}", f"[n, hidden] with hidden = {buffer.hidden}")
        if len(x) > buffer.max_tokens_per_rank:
            raise SpecError("x", f"{len(x)} tokens", f"at most max_tokens_per_rank = {buffer.max_tokens_per_rank}")
        require_device("x", x, buffer.device, "the buffer")
        _check_topk(buffer, topk_idx, len(x))
        require_bool("use_fp8", use_fp8)
        require_bool("round_scale", round_scale)
        require_bool("use_ue8m0", use_ue8m0)
        if use_ue8m0 and not (round_scale and use_fp8):
            raise SpecError("use_ue8m0", True, "False, unless use_fp8 and round_scale are True")
        if round_scale and not use_fp8:
            raise SpecError("round_scale", True, "False, unless use_fp8 is True")
        if use_fp8 and buffer.hidden % ROW_ALIGNMENT:
            raise SpecError("use_fp8", True, f"False, unless hidden is a multiple of {ROW_ALIGNMENT}")
        name = "cumulative_local_expert_recv_stats"
        _check_stats(name, cumulative_local_expert_recv_stats, _INT32, buffer.local_experts, "[L]", x)
        name = "dispatch_wait_recv_cost_stats"
        _check_stats(name, dispatch_wait_recv_cost_stats, _INT64, buffer.num_ranks, "[R]", x)
        _check_async(None, async_finish, return_recv_hook)
        _admit(buffer, form)
    if level is Level.FULL:
        _check_experts(buffer, topk_idx)
    return EpLowLatencyDispatchArgs(
        x,
        _contiguous(topk_idx),
        "fp8_ue8m0" if use_ue8m0 else "fp8_pow2" if round_scale else "fp8" if use_fp8 else "none",
        cumulative_local_expert_recv_stats,
        dispatch_wait_recv_cost_stats,
        async_finish,
        return_recv_hook,
    )


def check_low_latency_combine(
    buffer: EpBufferArgs,
    owner: object,
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    handle: Any,
    zero_copy: Any,
    out: Any,
    combine_wait_recv_cost_stats: Any,
    async_finish: Any,
    return_recv_hook: Any,
) -> EpLowLatencyCombineArgs:
    """Check one low-latency combine, allocating ``out`` where the caller gave none.

    Raises
    ------
    SpecError
        An argument of the wrong type, shape, dtype, device or layout; a foreign handle; topk_idx of another size than
        the dispatch had.
    """
    level = validation_level()
    if level:
        if not isinstance(handle, EpLowLatencyHandle):
            raise SpecError("handle", type(handle).__name__, "the handle that low_latency_dispatch returned")
        handle.check(owner)
        slots = buffer.num_ranks * buffer.max_tokens_per_rank
        require_tensor("x", x, (buffer.dtype,), 3, "[L, R · M, hidden]")
        require_shape("x", x, (buffer.local_experts, slots, buffer.hidden), "[L, R · M, hidden]")
        require_device("x", x, buffer.device, "the buffer")
        if not x.is_contiguous():
            raise SpecError("x", f"strides {list(x.stride())}", "a contiguous tensor")
        _check_topk(buffer, topk_idx, handle.num_tokens)
        if topk_idx.shape[1] != handle.topk:
            raise SpecError(
                "topk_idx", f"shape {list(topk_idx.shape)}", f"the dispatch's [n, K] with K = {handle.topk}"
            )
        _check_weights(topk_weights, (handle.num_tokens, handle.topk), "[n, K]", x.device)
        require_bool("zero_copy", zero_copy)
        if out is not None:
            require_tensor("out", out, (buffer.dtype,), 2, "[n, hidden]")
            require_shape("out", out, (handle.num_tokens, buffer.hidden), "[n, hidden]")
            require_device("out", out, x.device, "x")
            require_writable("out", out, {"x": x})
        name = "combine_wait_recv_cost_stats"
        _check_stats(name, combine_wait_recv_cost_stats, _INT64, buffer.num_ranks, "[R]", x)
        _check_async(None, async_finish, return_recv_hook)
    if level is Level.FULL:
        _check_experts(buffer, topk_idx)
    return EpLowLatencyCombineArgs(
        x,
        _contiguous(topk_idx),
        _contiguous(topk_weights),
        handle,
        zero_copy,
        x.new_empty(handle.num_tokens, buffer.hidden) if out is None else out,
        combine_wait_recv_cost_stats,
        async_finish,
        return_recv_hook,
    )


def _form(x: Any, idx: Any, weights: Any, *scalars: Any) -> object:
    """Everything a check looks at but the values; None for what is not plainly tensors and needs the full check."""
    if type(x) is not Tensor or type(idx) is not Tensor or x.is_neg() or x.is_nested or idx.is_nested:
        return None
    for scalar in scalars:
        if type(scalar) not in _SCALARS:
            return None
    # Types of the scalars matter: True equals 1.
    form = (
        *(x.layout, x.dtype, x.shape, x.stride(), x.device),
        *(idx.layout, idx.dtype, idx.shape, idx.stride(), idx.device),
        *scalars,
        *map(type, scalars),
    )
    if weights is None:
        return form
    if type(weights) is not Tensor or weights.is_neg() or weights.is_nested:
        return None
    return (*form, weights.layout, weights.dtype, weights.shape, weights.stride(), weights.device)


def _admit(buffer: EpBufferArgs, form: object) -> None:
    if form is not None:
        if len(buffer.admitted) >= _ADMITTED_LIMIT:
            buffer.admitted.clear()
        buffer.admitted.add(form)


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _check_rows(buffer: EpBufferArgs, x: Any, scales: Any) -> None:
    require_tensor("x", x, _ROWS if scales is not None else PLAIN_DTYPES, 2, "[n, hidden], or (fp8 rows, scales)")
    if x.shape[1] != buffer.hidden:
        raise SpecError("x", f"shape {list(x.shape)}", f"[n, hidden] with hidden = {buffer.hidden}")
    if len(x) > buffer.max_tokens_per_rank and buffer.overflow != "grow":
        raise SpecError("x", f"{len(x)} tokens", f"at most max_tokens_per_rank = {buffer.max_tokens_per_rank}")
    require_device("x", x, buffer.device, "the buffer")
    if scales is None:
        if x.dtype != buffer.dtype:
            raise SpecError("x", f"dtype {dtype_name(x.dtype)}", f"the buffer's {dtype_name(buffer.dtype)}, or fp8")
        return
    if x.dtype != FP8:
        raise SpecError("x", f"dtype {dtype_name(x.dtype)} with scales", "dtype float8_e4m3fn")
    if buffer.hidden % ROW_ALIGNMENT:
        raise SpecError("x", f"fp8 rows of {buffer.hidden} bytes", f"a multiple of {ROW_ALIGNMENT} bytes")
    require_tensor("scales", scales, (*_FLOAT32, *_INT32), 2, "[n, scales a row]")
    groups = -(-buffer.hidden // SCALE_GROUP)
    width = groups if scales.dtype == torch.float32 else -(-groups // 4)
    require_shape("scales", scales, (len(x), width), f"{dtype_name(scales.dtype)} scales [n, {width}]")
    require_device("scales", scales, x.device, "x")


def _check_cached(x: Tensor, topk_idx: Any, handle: EpHandle) -> None:
    if topk_idx is not None:
        raise SpecError("topk_idx", "a tensor together with handle", "None for a cached dispatch")
    if len(x) != handle.num_tokens:
        raise SpecError("handle", f"a handle of {handle.num_tokens} tokens", f"one of {len(x)} tokens, as x")


def _check_topk(buffer: EpBufferArgs, topk_idx: Any, tokens: int | None) -> None:
    require_tensor("topk_idx", topk_idx, _INT64, 2, "[n, K]")
    if tokens is not None and len(topk_idx) != tokens:
        raise SpecError("topk_idx", f"shape {list(topk_idx.shape)}", f"[n, K] with n = {tokens}")
    if not 1 <= topk_idx.shape[1] <= buffer.topk:
        raise SpecError("topk_idx", f"shape {list(topk_idx.shape)}", f"[n, K] with K = 1…{buffer.topk}")
    require_device("topk_idx", topk_idx, buffer.device, "the buffer")


def _check_experts(buffer: EpBufferArgs, topk_idx: Tensor) -> None:
    bad = (topk_idx < -1) | (topk_idx >= buffer.num_experts)
    require_values("topk_idx", bad, topk_idx, f"-1 (no expert) or 0…{buffer.num_experts - 1}")


def _check_weights(weights: Any, shape: tuple[int, ...], layout: str, device: torch.device) -> None:
    require_tensor("topk_weights", weights, _FLOAT32, len(shape), layout)
    require_shape("topk_weights", weights, shape, layout)
    require_device("topk_weights", weights, device, "x")


def _check_stats(name: str, stats: Any, dtypes: tuple[torch.dtype, ...], size: int, layout: str, x: Tensor) -> None:
    if stats is not None:
        require_tensor(name, stats, dtypes, 1, layout)
        require_shape(name, stats, (size,), layout)
        require_device(name, stats, x.device, "x")


def _check_async(previous_event: Any, async_finish: Any, return_recv_hook: Any) -> None:
    if previous_event is not None and not isinstance(previous_event, EpEvent):
        raise SpecError("previous_event", type(previous_event).__name__, "an object with wait(), or None")
    require_bool("async_finish", async_finish)
    require_bool("return_recv_hook", return_recv_hook)
    if async_finish and return_recv_hook:
        raise SpecError("return_recv_hook", True, "False together with async_finish")


EpCallArgs = EpDispatchArgs | EpCombineArgs | EpLowLatencyDispatchArgs | EpLowLatencyCombineArgs


def require_ep_declared(args: EpBufferArgs, declared: EpCapabilities | None, backend: str) -> None:
    """Refuse a buffer that this backend does not declare.

    Raises
    ------
    UnsupportedError
        Names the argument that decides, its value, and what the backend declares for it.
    """
    if declared is None:
        raise UnsupportedError(backend, "group", "an expert-parallel buffer", "no expert-parallel communication")
    for mode in args.modes:
        if mode not in declared.modes:
            raise UnsupportedError(backend, "modes", repr(mode), ", ".join(declared.modes))
    dtype = dtype_name(args.dtype)
    if dtype not in declared.dtypes:
        raise UnsupportedError(backend, "dtype", dtype, ", ".join(declared.dtypes))
    sizes = (
        ("group", "ranks", args.num_ranks, declared.ranks),
        ("ranks_per_node", "nodes", args.num_nodes, declared.nodes),
        ("topk", "topk", args.topk, declared.topk),
        ("num_experts", "num_experts", args.num_experts, declared.num_experts),
        ("hidden", "row bytes", args.hidden * args.dtype.itemsize, declared.row_bytes),
    )
    for argument, size, value, legal in sizes:
        if value not in legal:
            raise UnsupportedError(backend, argument, f"{size} {value}", f"{size} {legal}")
    if args.overflow not in declared.overflow:
        raise UnsupportedError(backend, "overflow", repr(args.overflow), ", ".join(declared.overflow))
    if args.pre_reduce and not declared.pre_reduce:
        raise UnsupportedError(backend, "pre_reduce", True, False)
    if args.mask_ranks and not declared.mask_ranks:
        raise UnsupportedError(backend, "mask_ranks", True, False)
    if args.num_nodes > 1:
        asked = [("modes", mode) for mode in args.modes] + [("overflow", args.overflow)]
        asked += [("mask_ranks", "mask_ranks")] * args.mask_ranks
        for argument, name in asked:
            if name not in declared.across_nodes:
                got = f"{name!r} over {args.num_nodes} nodes"
                raise UnsupportedError(backend, argument, got, f"over nodes {', '.join(declared.across_nodes)}")


def require_ep_call_declared(args: EpCallArgs, declared: EpCapabilities, backend: str) -> None:
    """Refuse a call on a declared buffer that uses what this backend does not declare.

    Raises
    ------
    UnsupportedError
        As in `require_ep_declared`.
    """
    if args.async_finish and not declared.async_finish:
        raise UnsupportedError(backend, "async_finish", True, False)
    if args.return_recv_hook and not declared.recv_hook:
        raise UnsupportedError(backend, "return_recv_hook", True, False)
    if isinstance(args, EpDispatchArgs):
        layout = "expand" if args.expand else "rank"
        if layout not in declared.layouts:
            raise UnsupportedError(backend, "expand", args.expand, f"layouts {', '.join(declared.layouts)}")
        if args.handle is not None and not declared.cached_handle:
            raise UnsupportedError(backend, "handle", "a handle", None)
        if args.scales is not None:
            _require_fp8(args.x.shape[1], declared, backend, "x")
    elif isinstance(args, EpLowLatencyDispatchArgs):
        if args.cast not in declared.casts:
            raise UnsupportedError(backend, "use_fp8", f"cast {args.cast!r}", ", ".join(declared.casts))
    elif isinstance(args, EpLowLatencyCombineArgs) and args.zero_copy and not declared.zero_copy_combine:
        raise UnsupportedError(backend, "zero_copy", True, False)


def _require_fp8(row_bytes: int, declared: EpCapabilities, backend: str, argument: str) -> None:
    if dtype_name(FP8) not in declared.dtypes:
        raise UnsupportedError(backend, argument, f"dtype {dtype_name(FP8)}", ", ".join(declared.dtypes))
    if row_bytes not in declared.row_bytes:
        raise UnsupportedError(backend, argument, f"row bytes {row_bytes}", f"row bytes {declared.row_bytes}")
