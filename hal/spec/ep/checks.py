"""Checks that the calls share, and the memory of forms that passed them."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from hal.spec.ep.arguments import EpBufferArgs
from hal.spec.ep.handles import EpHandle
from hal.spec.ep.terms import FLOAT32, FP8, INT32, INT64, PLAIN_DTYPES, ROW_ALIGNMENT, SCALE_GROUP, EpEvent
from hal.spec.errors import SpecError
from hal.spec.forms import with_room
from hal.spec.tensors import dtype_name, require_bool, require_device, require_shape, require_tensor, require_values

_ROWS: Final = (*PLAIN_DTYPES, FP8)


def admit(buffer: EpBufferArgs, form: object) -> None:
    """Remember a form that passed."""
    if form is not None:
        with_room(buffer.admitted).add(form)


def contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself, or a contiguous copy."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def check_rows(buffer: EpBufferArgs, x: Any, scales: Any) -> None:
    """Rows of a normal dispatch, and their scales."""
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
    require_tensor("scales", scales, (*FLOAT32, *INT32), 2, "[n, scales a row]")
    groups = -(-buffer.hidden // SCALE_GROUP)
    width = groups if scales.dtype == torch.float32 else -(-groups // 4)
    require_shape("scales", scales, (len(x), width), f"{dtype_name(scales.dtype)} scales [n, {width}]")
    require_device("scales", scales, x.device, "x")


def check_cached(x: Tensor, topk_idx: Any, handle: EpHandle) -> None:
    """What a dispatch with a handle brings must fit the handle."""
    if topk_idx is not None:
        raise SpecError("topk_idx", "a tensor together with handle", "None for a cached dispatch")
    if len(x) != handle.num_tokens:
        raise SpecError("handle", f"a handle of {handle.num_tokens} tokens", f"one of {len(x)} tokens, as x")


def check_topk(buffer: EpBufferArgs, topk_idx: Any, tokens: int | None) -> None:
    """Shape, dtype and device of topk_idx."""
    require_tensor("topk_idx", topk_idx, INT64, 2, "[n, K]")
    if tokens is not None and len(topk_idx) != tokens:
        raise SpecError("topk_idx", f"shape {list(topk_idx.shape)}", f"[n, K] with n = {tokens}")
    if not 1 <= topk_idx.shape[1] <= buffer.topk:
        raise SpecError("topk_idx", f"shape {list(topk_idx.shape)}", f"[n, K] with K = 1…{buffer.topk}")
    require_device("topk_idx", topk_idx, buffer.device, "the buffer")


def check_experts(buffer: EpBufferArgs, topk_idx: Tensor) -> None:
    """Values of topk_idx."""
    bad = (topk_idx < -1) | (topk_idx >= buffer.num_experts)
    require_values("topk_idx", bad, topk_idx, f"-1 (no expert) or 0…{buffer.num_experts - 1}")


def check_weights(weights: Any, shape: tuple[int, ...], layout: str, device: torch.device) -> None:
    """Shape, dtype and device of topk_weights."""
    require_tensor("topk_weights", weights, FLOAT32, len(shape), layout)
    require_shape("topk_weights", weights, shape, layout)
    require_device("topk_weights", weights, device, "x")


def check_stats(name: str, stats: Any, dtypes: tuple[torch.dtype, ...], size: int, layout: str, x: Tensor) -> None:
    """A counter of the caller, if there is one."""
    if stats is not None:
        require_tensor(name, stats, dtypes, 1, layout)
        require_shape(name, stats, (size,), layout)
        require_device(name, stats, x.device, "x")


def check_async(previous_event: Any, async_finish: Any, return_recv_hook: Any) -> None:
    """How a call may end."""
    if previous_event is not None and not isinstance(previous_event, EpEvent):
        raise SpecError("previous_event", type(previous_event).__name__, "an object with wait(), or None")
    require_bool("async_finish", async_finish)
    require_bool("return_recv_hook", return_recv_hook)
    if async_finish and return_recv_hook:
        raise SpecError("return_recv_hook", True, "False together with async_finish")
