"""The handle of a V1 dispatch between nodes, in its published form of ten tensors.

The published kernels have a rank of each node relay rows to the others; handles say who relayed what. Here relaying is
the engine's, so every rank counts as the relay of the rows it received.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hal.compat.deep_ep.handle import Route, attach

_META_BYTES = 8


@dataclass(frozen=True, slots=True)
class Internode:
    """The ranks of a group over several nodes.

    Attributes
    ----------
    rank, size, per_node : int
        This rank, ranks in all and of a node; the last node may have fewer.
    """

    rank: int
    size: int
    per_node: int

    def handle(self, in_rank: Tensor, rows: int, route: Route) -> tuple[Tensor, ...]:
        """The handle, with what only the sources know still empty.

        Parameters
        ----------
        in_rank : Tensor
            [n, R] bool.
        rows : int
            Received rows.
        route : Route

        Returns
        -------
        tuple of Tensor
            ``(is_token_in_rank [n, R], rdma_channel_prefix_matrix [nodes, 1], gbl_channel_prefix_matrix [R, 1],
            recv_rdma_channel_prefix_matrix [nodes, 1], recv_rdma_rank_prefix_sum [nodes],
            recv_gbl_channel_prefix_matrix [R, 1], recv_gbl_rank_prefix_sum [R], recv_src_meta [rows, 8] uint8,
            send_rdma_head [n, nodes], send_nvl_head [rows, ranks of a node])``, int32 where nothing else is said.
        """
        in_node = torch.stack([part.any(1) for part in torch.split(in_rank, self.per_node, 1)], 1)
        order = in_node.cumsum(0, dtype=torch.int32) - 1
        per_node, per_rank = in_node.sum(0, dtype=torch.int32), in_rank.sum(0, dtype=torch.int32)
        relayed = per_node.new_full((rows, self.per_node), -1)
        relayed[:, self.rank % self.per_node] = torch.arange(rows, device=relayed.device)
        return (
            in_rank,
            per_node[:, None],
            per_rank[:, None],
            torch.zeros_like(per_node)[:, None],
            torch.zeros_like(per_node),
            torch.zeros_like(per_rank)[:, None],
            torch.zeros_like(per_rank),
            attach(torch.zeros(rows, _META_BYTES, dtype=torch.uint8, device=in_rank.device), route),
            order.where(in_node, -1),
            relayed,
        )

    def fill(self, handle: tuple[Tensor, ...], counts: Tensor) -> None:
        """Write what the sources told: how many rows [R] came from each rank."""
        ends = counts.cumsum(0, dtype=torch.int32)
        handle[5][:, 0] = ends - counts
        handle[6].copy_(ends)
        last = torch.arange(self.per_node, self.size + self.per_node, self.per_node, device=ends.device)
        handle[4].copy_(ends[last.clamp(max=self.size) - 1])
        handle[3][:, 0] = handle[4].diff(prepend=handle[4].new_zeros(1))
        node = torch.arange(self.size, device=ends.device, dtype=torch.int32) // self.per_node
        meta = handle[7].view(torch.int32)
        number = int(ends[-1])
        meta[:number, 0] = torch.repeat_interleave(node, counts.long())
        meta[:number, 1] = 1 << self.rank % self.per_node
