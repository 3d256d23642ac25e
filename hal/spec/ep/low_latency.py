"""Checking the calls of the low-latency mode."""

from __future__ import annotations

from typing import Any

from hal.spec.ep.arguments import EpBufferArgs, EpLowLatencyCombineArgs, EpLowLatencyDispatchArgs
from hal.spec.ep.checks import (
    admit,
    check_async,
    check_experts,
    check_stats,
    check_topk,
    check_weights,
    contiguous,
)
from hal.spec.ep.handles import EpLowLatencyHandle
from hal.spec.ep.terms import INT32, INT64, ROW_ALIGNMENT
from hal.spec.errors import SpecError
from hal.spec.forms import form_of
from hal.spec.tensors import require_bool, require_device, require_shape, require_tensor, require_writable
from hal.spec.validation import Level, validation_level


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
        flags = ("low_latency", use_fp8, round_scale, use_ue8m0, async_finish, return_recv_hook)
        form = form_of((x, topk_idx), flags)
    if level and (form is None or form not in buffer.admitted):
        require_tensor("x", x, (buffer.dtype,), 2, "[n, hidden]")
        if x.shape[1] != buffer.hidden:
            raise SpecError("x", f"shape {list(x.shape)}", f"[n, hidden] with hidden = {buffer.hidden}")
        if len(x) > buffer.max_tokens_per_rank:
            raise SpecError("x", f"{len(x)} tokens", f"at most max_tokens_per_rank = {buffer.max_tokens_per_rank}")
        require_device("x", x, buffer.device, "the buffer")
        check_topk(buffer, topk_idx, len(x))
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
        check_stats(name, cumulative_local_expert_recv_stats, INT32, buffer.local_experts, "[L]", x)
        name = "dispatch_wait_recv_cost_stats"
        check_stats(name, dispatch_wait_recv_cost_stats, INT64, buffer.num_ranks, "[R]", x)
        check_async(None, async_finish, return_recv_hook)
        admit(buffer, form)
    if level is Level.FULL:
        check_experts(buffer, topk_idx)
    return EpLowLatencyDispatchArgs(
        x,
        contiguous(topk_idx),
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
    form = None
    own = type(handle) is EpLowLatencyHandle and handle.owner is owner
    if level and own and out is None and combine_wait_recv_cost_stats is None:
        flags = ("low_latency_combine", handle.num_tokens, handle.topk, zero_copy, async_finish, return_recv_hook)
        form = form_of((x, topk_idx, topk_weights), flags)
    if level and (form is None or form not in buffer.admitted):
        if not isinstance(handle, EpLowLatencyHandle):
            raise SpecError("handle", type(handle).__name__, "the handle that low_latency_dispatch returned")
        handle.check(owner)
        slots = buffer.num_ranks * buffer.max_tokens_per_rank
        require_tensor("x", x, (buffer.dtype,), 3, "[L, R · M, hidden]")
        require_shape("x", x, (buffer.local_experts, slots, buffer.hidden), "[L, R · M, hidden]")
        require_device("x", x, buffer.device, "the buffer")
        if not x.is_contiguous():
            raise SpecError("x", f"strides {list(x.stride())}", "a contiguous tensor")
        check_topk(buffer, topk_idx, handle.num_tokens)
        if topk_idx.shape[1] != handle.topk:
            raise SpecError(
                "topk_idx", f"shape {list(topk_idx.shape)}", f"the dispatch's [n, K] with K = {handle.topk}"
            )
        check_weights(topk_weights, (handle.num_tokens, handle.topk), "[n, K]", x.device)
        require_bool("zero_copy", zero_copy)
        if out is not None:
            require_tensor("out", out, (buffer.dtype,), 2, "[n, hidden]")
            require_shape("out", out, (handle.num_tokens, buffer.hidden), "[n, hidden]")
            require_device("out", out, x.device, "x")
            require_writable("out", out, {"x": x})
        name = "combine_wait_recv_cost_stats"
        check_stats(name, combine_wait_recv_cost_stats, INT64, buffer.num_ranks, "[R]", x)
        check_async(None, async_finish, return_recv_hook)
        admit(buffer, form)
    if level is Level.FULL:
        check_experts(buffer, topk_idx)
    return EpLowLatencyCombineArgs(
        x,
        contiguous(topk_idx),
        contiguous(topk_weights),
        handle,
        zero_copy,
        x.new_empty(handle.num_tokens, buffer.hidden) if out is None else out,
        out is not None,
        combine_wait_recv_cost_stats,
        async_finish,
        return_recv_hook,
    )
