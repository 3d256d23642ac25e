"""The memory a buffer will need, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hal.spec.ep import MODES, check_buffer


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
