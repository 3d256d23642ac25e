"""Tuning figures and size hints of the published V1 interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hal.spec.errors import SpecError
from hal.spec.tensors import require_int

# Per number of ranks: chunk sizes of dispatch and of combine, as published.
_DISPATCH: Final = {
    2: (24, 256, 6, 128),
    4: (6, 256, 6, 128),
    8: (6, 256, 6, 128),
    16: (36, 288, 20, 128),
    24: (32, 288, 8, 128),
    32: (32, 288, 8, 128),
    48: (32, 288, 8, 128),
    64: (32, 288, 8, 128),
    96: (20, 480, 12, 128),
    128: (20, 560, 12, 128),
    144: (32, 720, 12, 128),
    160: (28, 720, 12, 128),
}
_COMBINE: Final = {
    2: (10, 256, 6, 128),
    4: (9, 256, 6, 128),
    8: (4, 256, 6, 128),
    16: (4, 288, 12, 128),
    24: (1, 288, 8, 128),
    32: (1, 288, 8, 128),
    48: (1, 288, 8, 128),
    64: (1, 288, 8, 128),
    96: (1, 480, 8, 128),
    128: (1, 560, 8, 128),
    144: (2, 720, 8, 128),
    160: (2, 720, 8, 128),
}
_PEERS: Final = 8
_ALIGNMENT: Final = 128
_META_BYTES: Final = 8
# For every token in a chunk besides its row: 128 indices of 8 bytes, 128 weights and 128 scales of 4, and its source.
_EXTRA_BYTES: Final = _META_BYTES + 128 * 8 + 128 * 4 + 128 * 4


@dataclass
class Config:
    """Processors that a normal call may take, and chunk sizes of the published kernels, which have no effect here.

    Parameters
    ----------
    num_sms : int
        See `hal.EpBuffer.num_sms`; 0 for all.
    num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens : int
    num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens : int
        The last is rounded up to a multiple of the one before.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        require_int("num_sms", self.num_sms, 0)
        for kind in ("nvl", "rdma"):
            send, recv = f"num_max_{kind}_chunked_send_tokens", f"num_max_{kind}_chunked_recv_tokens"
            require_int(send, getattr(self, send), 1)
            require_int(recv, getattr(self, recv), getattr(self, send) + 1)
        send_tokens = self.num_max_rdma_chunked_send_tokens
        self.num_max_rdma_chunked_recv_tokens = round_up(self.num_max_rdma_chunked_recv_tokens, send_tokens)

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes the published kernels need within a node for rows of ``hidden_bytes``."""
        self._check(hidden_bytes, num_ranks)
        nodes, peers = max(num_ranks // _PEERS, 1), min(num_ranks, _PEERS)
        per_token = hidden_bytes + _EXTRA_BYTES
        per_channel = (2 * nodes + 3) * 4 + self.num_max_nvl_chunked_recv_tokens * per_token
        return round_up(self.num_sms // 2 * peers * per_channel, _ALIGNMENT)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes the published kernels need between nodes; 0 for one node of up to 8 ranks."""
        self._check(hidden_bytes, num_ranks)
        if num_ranks <= _PEERS:
            return 0
        per_token = hidden_bytes + _EXTRA_BYTES + 16
        per_channel = (_PEERS * 2 + 2) * 4 + self.num_max_rdma_chunked_recv_tokens * per_token
        return round_up(self.num_sms // 2 * (num_ranks // _PEERS) * per_channel * 2, _ALIGNMENT)

    def _check(self, hidden_bytes: int, num_ranks: int) -> None:
        require_int("hidden_bytes", hidden_bytes, 0)
        require_int("num_ranks", num_ranks, 1)
        if num_ranks > _PEERS and num_ranks % _PEERS:
            raise SpecError("num_ranks", num_ranks, f"up to {_PEERS}, or a multiple of {_PEERS}")
        if num_ranks > _PEERS and self.num_sms % 2:
            raise SpecError("num_sms", self.num_sms, "an even number")


def dispatch_config(num_ranks: int, num_sms: int) -> Config:
    """The published choice for dispatch."""
    return _chosen(_DISPATCH, num_ranks, num_sms)


def combine_config(num_ranks: int, num_sms: int) -> Config:
    """The published choice for combine."""
    return _chosen(_COMBINE, num_ranks, num_sms)


def _chosen(table: dict[int, tuple[int, int, int, int]], num_ranks: int, num_sms: int) -> Config:
    """The entry of this number of ranks, or of the next larger one listed: any number is legal here."""
    require_int("num_ranks", num_ranks, 1)
    listed = next((n for n in table if n >= num_ranks), max(table))
    return Config(num_sms, *table[listed])


def low_latency_size(tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """Bytes of the published low-latency buffers: two halves of send, receive and signal memory.

    Parameters
    ----------
    tokens, hidden, num_ranks, num_experts : int
        ``num_max_dispatch_tokens_per_rank`` and the geometry.
    """
    require_int("num_max_dispatch_tokens_per_rank", tokens, 1)
    require_int("hidden", hidden, 1)
    require_int("num_ranks", num_ranks, 1)
    require_int("num_experts", num_experts, 1)
    scales = hidden // 128 * 4
    dispatch = 16 + max(2 * hidden, hidden + scales)
    combine = scales + 2 * hidden
    send = max(tokens * dispatch, num_experts * tokens * combine)
    receive = num_experts * tokens * max(dispatch, combine)
    total = 2 * (send + receive + round_up(num_experts * 4, _ALIGNMENT))
    return (total + _ALIGNMENT) // _ALIGNMENT * _ALIGNMENT  # a multiple already grows by one: so it is published


def round_up(value: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-value // step) * step
