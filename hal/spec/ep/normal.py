"""Checking the calls of the normal mode."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hal.spec.ep.arguments import EpBufferArgs, EpCombineArgs, EpDispatchArgs
from hal.spec.ep.checks import (
    admit,
    check_async,
    check_cached,
    check_experts,
    check_rows,
    check_topk,
    check_weights,
    contiguous,
)
from hal.spec.ep.handles import EpHandle
from hal.spec.ep.terms import MAX_INT32
from hal.spec.errors import SpecError
from hal.spec.forms import form_of
from hal.spec.tensors import require_bool, require_device, require_int, require_shape, require_tensor
from hal.spec.validation import Level, validation_level


def check_layout(buffer: EpBufferArgs, topk_idx: Any) -> Tensor:
    """Check one call of ``EpBuffer.layout`` and return topk_idx contiguous.

    Raises
    ------
    SpecError
        As in `check_dispatch`.
    """
    level = validation_level()
    if level:
        check_topk(buffer, topk_idx, None)
    if level is Level.FULL:
        check_experts(buffer, topk_idx)
    return contiguous(topk_idx)


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
    if level and handle is None and previous_event is None:
        flags = (expand, expert_alignment, num_worst_tokens, async_finish, return_recv_hook)
        form = form_of((x, scales, topk_idx, topk_weights), flags)
    if level and (form is None or form not in buffer.admitted):
        check_rows(buffer, x, scales)
        if handle is not None:
            if not isinstance(handle, EpHandle):
                raise SpecError("handle", type(handle).__name__, "an EpHandle or None")
            handle.check(owner)
            check_cached(x, topk_idx, handle)
        else:
            check_topk(buffer, topk_idx, len(x))
            require_bool("expand", expand)
            require_int("expert_alignment", expert_alignment, 1, MAX_INT32)
            require_int("num_worst_tokens", num_worst_tokens, 0, MAX_INT32)
        check_async(previous_event, async_finish, return_recv_hook)
        if topk_weights is not None:
            topk = handle.topk if handle is not None else topk_idx.shape[1]
            check_weights(topk_weights, (len(x), topk), "[n, K]", x.device)
        admit(buffer, form)
    if handle is not None:
        topk_idx, expand = handle.topk_idx, handle.expand
        expert_alignment, num_worst_tokens = handle.expert_alignment, handle.num_worst_tokens
    elif level is Level.FULL:
        check_experts(buffer, topk_idx)
    return EpDispatchArgs(
        x,
        scales,
        contiguous(topk_idx),
        None if topk_weights is None else contiguous(topk_weights),
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
    form = None
    if previous_event is None and bias is None and type(handle) is EpHandle and handle.owner is owner:
        form = form_of(
            (x, topk_weights),
            ("combine", handle.num_recv_tokens, handle.topk, handle.expand, async_finish, return_recv_hook),
        )
    if validation_level() and (form is None or form not in buffer.admitted):
        if not isinstance(handle, EpHandle):
            raise SpecError("handle", type(handle).__name__, "the EpHandle that dispatch returned")
        handle.check(owner)
        require_tensor("x", x, (buffer.dtype,), 2, "[num_recv_tokens, hidden]")
        require_shape("x", x, (handle.num_recv_tokens, buffer.hidden), "[num_recv_tokens, hidden]")
        require_device("x", x, buffer.device, "the buffer")
        if topk_weights is not None:
            if handle.expand:
                check_weights(topk_weights, (handle.num_recv_tokens,), "[num_recv_tokens]", x.device)
            else:
                shape = (handle.num_recv_tokens, handle.topk)
                check_weights(topk_weights, shape, "[num_recv_tokens, K]", x.device)
        if len(biases) > 2:
            raise SpecError("bias", f"{len(biases)} tensors", "at most two")
        for one in biases:
            require_tensor("bias", one, (buffer.dtype,), 2, "[n, hidden]")
            require_shape("bias", one, (handle.num_tokens, buffer.hidden), "[n, hidden]")
            require_device("bias", one, x.device, "x")
        check_async(previous_event, async_finish, return_recv_hook)
        admit(buffer, form)
    return EpCombineArgs(
        x,
        handle,
        None if topk_weights is None else contiguous(topk_weights),
        tuple(biases),
        previous_event,
        async_finish,
        return_recv_hook,
    )
