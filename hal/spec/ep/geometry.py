"""Checking what a buffer is made with; once, and always in full."""

from __future__ import annotations

from typing import Any

import torch

from hal.spec.ep.arguments import EpBufferArgs
from hal.spec.ep.terms import MAX_INT32, MAX_TIMEOUT, MODES, OVERFLOW, PLAIN_DTYPES, ROW_ALIGNMENT
from hal.spec.errors import SpecError, shown
from hal.spec.tensors import dtype_name, require_bool, require_choice, require_int


def is_timeout(value: Any) -> bool:
    """Whether ranks may be waited for so many seconds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= MAX_TIMEOUT


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
    require_int("num_experts", num_experts, 1, MAX_INT32)
    require_int("hidden", hidden, 1, MAX_INT32)
    require_int("topk", topk, 1, MAX_INT32)
    require_int("max_tokens_per_rank", max_tokens_per_rank, 1, MAX_INT32 // num_ranks)
    if dtype not in PLAIN_DTYPES:
        raise SpecError("dtype", dtype, " or ".join(map(dtype_name, PLAIN_DTYPES)))
    if (hidden * dtype.itemsize) % ROW_ALIGNMENT:
        raise SpecError("hidden", hidden, f"a row of a multiple of {ROW_ALIGNMENT} bytes")
    if not isinstance(modes, (tuple, list)) or not modes:
        raise SpecError("modes", shown(modes), f"some of {', '.join(MODES)}")
    for mode in modes:
        require_choice("modes", mode, MODES)
    most = num_ranks * max_tokens_per_rank
    if max_recv_tokens is not None:
        require_int("max_recv_tokens", max_recv_tokens, 1, MAX_INT32)
    if ranks_per_node is not None:
        require_int("ranks_per_node", ranks_per_node, 1)
    require_bool("pre_reduce", pre_reduce)
    require_choice("overflow", overflow, OVERFLOW)
    if not is_timeout(timeout):
        raise SpecError("timeout", shown(timeout), f"a positive number of seconds, at most {MAX_TIMEOUT:.0f}")
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
