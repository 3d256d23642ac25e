"""Counting where tokens go, in torch, on whatever device topk_idx lives."""

from __future__ import annotations

import torch
from torch import Tensor

from hal.spec.ep import EpBufferArgs, EpLayout
from hal.spec.errors import SpecError


def count_layout(buffer: EpBufferArgs, topk_idx: Tensor) -> EpLayout:
    """Tokens of [n, K] for each rank, node and expert, a token counting once for each.

    Raises
    ------
    SpecError
        An expert out of range.
    """
    n = len(topk_idx)
    experts, ranks, local = buffer.num_experts, buffer.num_ranks, buffer.local_experts
    if n and bool(((topk_idx < -1) | (topk_idx >= experts)).any()):
        raise SpecError("topk_idx", "an expert out of range", f"-1 (no expert) or 0…{experts - 1}")
    # A last column takes the holes; columns between E and R · L are experts that do not exist.
    chosen = torch.zeros(n, ranks * local + 1, dtype=torch.bool, device=topk_idx.device)
    chosen.scatter_(1, topk_idx.where(topk_idx >= 0, ranks * local), True)
    chosen = chosen[:, :-1]
    in_rank = chosen.view(n, ranks, local).any(2) if n else chosen.new_zeros(0, ranks)
    per_node = None
    if buffer.num_nodes > 1:
        per_node = torch.stack(
            [part.any(1).sum(dtype=torch.int32) for part in torch.split(in_rank, buffer.ranks_per_node, 1)]
        )
    return EpLayout(
        in_rank.sum(0, dtype=torch.int32),
        per_node,
        chosen[:, :experts].sum(0, dtype=torch.int32),
        in_rank,
    )
