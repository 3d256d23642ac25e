"""The buffers of a process: one for each geometry and mode, shared by all layers, opened by the first that sends."""

from __future__ import annotations

from typing import Any

import torch

import hal

_open: dict[tuple[Any, ...], hal.EpBuffer] = {}
_TOKENS = 4096


def normal(group: Any, num_experts: int, hidden: int, topk: int, dtype: torch.dtype) -> hal.EpBuffer:
    """The buffer of prefill; its windows grow to what is sent."""
    return _get(group, num_experts, hidden, topk, dtype, _TOKENS, "normal")


def low_latency(group: Any, num_experts: int, hidden: int, topk: int, dtype: torch.dtype, tokens: int) -> hal.EpBuffer:
    """The buffer of decode, for at most ``tokens`` of them a rank."""
    return _get(group, num_experts, hidden, topk, dtype, tokens, "low_latency")


def _get(
    group: Any, num_experts: int, hidden: int, topk: int, dtype: torch.dtype, tokens: int, mode: str
) -> hal.EpBuffer:
    key = group, num_experts, hidden, topk, dtype, tokens, mode
    if key not in _open:
        _open[key] = hal.EpBuffer(
            group,
            num_experts=num_experts,
            hidden=hidden,
            topk=topk,
            max_tokens_per_rank=tokens,
            dtype=dtype,
            modes=(mode,),
            overflow="grow" if mode == "normal" else "error",
        )
    return _open[key]


def close() -> None:
    """Close all buffers of this process."""
    while _open:
        _open.popitem()[1].close()
