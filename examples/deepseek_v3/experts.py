"""The routed experts over all ranks: every rank holds its share of them, tokens travel by dispatch and combine.

They are called as transformers' experts are, with what the model's own router decided.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import hal

TILE = 8
"""Rows an expert computes at once, zeros where there are fewer: the same matrix shape, hence the same bits, always."""


def most_rows(config: Any, ranks: int, tokens: int) -> int:
    """Rows that may arrive at a rank in one step of so many tokens a rank, every expert's rounded up to a tile."""
    share = -(-config.n_routed_experts // ranks)
    most: int = ranks * tokens * min(config.num_experts_per_tok, share) + share * (TILE - 1)
    return most


class LocalExperts(nn.Module):
    """One rank's share of a layer's experts: gated feed-forward networks, their weights stacked.

    Parameters
    ----------
    original : Module
        All of the layer's experts, as transformers stacks them.
    rank, ranks : int
    """

    def __init__(self, original: Any, rank: int, ranks: int) -> None:
        super().__init__()
        share = -(-original.num_experts // ranks)
        mine = slice(rank * share, (rank + 1) * share)
        # In float32 whatever the model is in: rows are rounded when they arrive and when they leave, not in between.
        self.gate_up = nn.Buffer(original.gate_up_proj[mine].float().clone())
        self.down = nn.Buffer(original.down_proj[mine].float().clone())
        self._act = original.act_fn

    def forward(self, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Apply expert e to its ``counts[e]`` rows, a multiple of `TILE`; rows of one expert lie together.

        Returns float32.
        """
        x = x.float()
        out = torch.empty_like(x)
        start = 0
        for expert, count in enumerate(counts):
            for begin in range(start, start + count, TILE):
                tile = slice(begin, begin + TILE)
                gate, up = nn.functional.linear(x[tile], self.gate_up[expert]).chunk(2, -1)
                out[tile] = nn.functional.linear(self._act(gate) * up, self.down[expert])
            start += count
        return out


class HalExperts(nn.Module):
    """Stands in for ``DeepseekV3Experts`` or ``DeepseekV2Experts``: dispatch, local experts, combine.

    Parameters
    ----------
    original : Module
        The experts it replaces.
    buffer : hal.EpBuffer
        Open between the ranks; this call is collective.
    """

    live: int = 0
    """Token rows in use; those after them are sent to no expert."""

    def __init__(self, original: Any, buffer: hal.EpBuffer) -> None:
        super().__init__()
        self.local = LocalExperts(original, buffer.args.rank, buffer.args.num_ranks)
        self._buffer = buffer

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum, for every row of [rows, hidden], its experts' outputs times their weights."""
        n = self.live
        out = torch.zeros_like(hidden_states)
        sent = self._buffer.dispatch(
            hidden_states[:n], top_k_index[:n], top_k_weights[:n].float(), expand=True, expert_alignment=TILE
        )
        assert isinstance(sent.recv_x, Tensor) and sent.recv_topk_weights is not None
        rows = self.local(sent.recv_x, sent.num_recv_tokens_per_expert)
        weighted = (rows * sent.recv_topk_weights[:, None]).to(hidden_states.dtype)
        out[:n] = self._buffer.combine(weighted, sent.handle).combined_x
        return out
