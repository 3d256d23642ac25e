"""The tensors of an `EPHandle`: made when a dispatch is posted, filled when its sources are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hal.compat.deep_ep.config import round_up
from hal.compat.deep_ep.handle import EPHandle
from hal.ep.results import EpDispatchResult


@dataclass(frozen=True, slots=True)
class Metadata:
    """The sizes of one dispatch.

    Attributes
    ----------
    ranks, local_experts, most, alignment : int
        R, L, ``num_max_tokens_per_rank`` and ``expert_alignment``.
    expand, exact : bool
        The expand layout; as many rows as came, not as can come.
    """

    ranks: int
    local_experts: int
    most: int
    alignment: int
    expand: bool
    exact: bool

    def handle(
        self, num_experts: int, topk_idx: Tensor, num_sms: int, in_rank: Tensor, sent: EpDispatchResult
    ) -> EPHandle:
        """The handle, its tensors still empty. What the host knows is there at once.

        In the expand layout the number of rows by token is not known yet; `fill` sets it.
        """
        topk = topk_idx.shape[1]
        per_expert = list(sent.num_recv_tokens_per_expert) if self.exact else []
        by_token, by_expert = self.most * self.ranks, sum(per_expert)
        if not self.exact:
            room = by_token * min(topk, self.local_experts) + (self.alignment - 1) * self.local_experts
            by_expert = round_up(room, self.alignment)
        elif not self.expand:
            by_token = sent.handle.num_recv_tokens
        empty = torch.zeros(self.local_experts, dtype=torch.int32, device=topk_idx.device)
        return EPHandle(
            self.expand,
            num_experts,
            self.alignment,
            self.most,
            num_sms,
            topk_idx,
            by_token,
            by_expert,
            per_expert,
            empty.new_zeros(self.ranks),
            empty,
            empty.clone(),
            empty.new_full((by_token, topk + 2), -1),
            self._slots(topk_idx, in_rank),
            None,
            None,
        )

    def _slots(self, topk_idx: Tensor, in_rank: Tensor) -> Tensor:
        """For each choice how many earlier tokens go to its rank; -1 for none, or for a rank chosen before."""
        earlier = in_rank.cumsum(0, dtype=torch.int32) - 1
        rank = topk_idx.div(self.local_experts, rounding_mode="floor")
        found = earlier.gather(1, rank.clamp(min=0)) if len(topk_idx) else earlier.new_empty(topk_idx.shape)
        again = (rank[:, :, None] == rank[:, None, :]).tril(-1).any(2)
        return found.masked_fill((topk_idx < 0) | again, -1)

    def fill(self, handle: EPHandle, sent: EpDispatchResult) -> None:
        """Write what the dispatch told of its rows into the handle's tensors."""
        made = sent.handle
        rank, position, choice = made.recv_src_rank, made.recv_src_position, made.recv_src_choice
        counts = made.recv_counts.sum(0, dtype=torch.int32)
        aligned = -(-counts // self.alignment) * self.alignment
        begin = aligned.cumsum(0, dtype=torch.int32) - aligned
        handle.num_unaligned_recv_tokens_per_expert.copy_(counts)
        handle.psum_num_recv_tokens_per_expert.copy_(begin + (counts if self.expand else aligned))
        came = torch.unique(rank.long() * self.most + position, return_inverse=True) if self.expand else None
        if came is None:
            number, first = len(rank), choice
            source = rank * self.most + position
        else:
            # Padding is from nobody: rank and position -1, the first of what is unique.
            padded = int((rank < 0).any())
            source, token = came[0][padded:], came[1] - padded
            number = len(source)
            there = rank >= 0
            rows = torch.full((number, handle.topk_idx.shape[1]), -1, dtype=torch.int32, device=rank.device)
            rows[token[there], choice[there]] = torch.arange(len(rank), dtype=torch.int32, device=rank.device)[there]
            first = (rows >= 0).int().argmax(1) if number else source
            rank = source.div(self.most, rounding_mode="floor")
        per_rank = torch.bincount(rank, minlength=self.ranks)
        handle.psum_num_recv_tokens_per_scaleup_rank.copy_(per_rank.cumsum(0))
        if self.exact and self.expand:
            handle.num_recv_tokens = number
            handle.recv_src_metadata = handle.recv_src_metadata[:number]
        told = handle.recv_src_metadata
        told[:number, 0] = source
        told[:number, 1] = rank * handle.topk_idx.shape[1] + first
        if came is not None:
            told[:number, 2:] = rows
