"""What a dispatch leaves behind, and where tokens go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hal.spec.errors import SpecError


@dataclass(frozen=True, slots=True, eq=False)
class EpLayout:
    """Where the tokens of this rank go.

    Attributes
    ----------
    num_tokens_per_rank : Tensor
        [R] int32; a token counts once for a rank however many of its experts live there.
    num_tokens_per_node : Tensor or None
        [nodes] int32; None where the group is one node.
    num_tokens_per_expert : Tensor
        [E] int32; a token counts once for an expert.
    is_token_in_rank : Tensor
        [n, R] bool.
    """

    num_tokens_per_rank: Tensor
    num_tokens_per_node: Tensor | None
    num_tokens_per_expert: Tensor
    is_token_in_rank: Tensor


class EpSources(Protocol):
    """Where received rows came from. Asked for only when somebody wants to know."""

    def rank(self) -> Tensor:
        """[rows] int32: source rank of each received row, -1 for a row that no token came for."""

    def position(self) -> Tensor:
        """[rows] int32: position of each received row's token at its source, -1 likewise."""

    def choice(self) -> Tensor:
        """[rows] int32: the first of the token's choices that led to each row, -1 likewise."""

    def counts(self) -> Tensor:
        """[R, L] int32: tokens of each rank for each local expert."""

    def sent(self) -> Tensor:
        """[R, R] int32: tokens of each rank for each rank of the group."""


@dataclass(slots=True, eq=False)
class EpHandle:
    """What a normal dispatch leaves behind for combine, for its backward, and for a dispatch over the same routes.

    Read-only; not frozen only because freezing costs microseconds a call.

    Attributes
    ----------
    owner : object
        Identity of the engine that made it, the only one that may use it.
    num_tokens, num_recv_tokens : int
        Rows sent in and rows of ``recv_x`` (with padding in the expand layout).
    topk : int
        K of the call.
    expand : bool
    expert_alignment, num_worst_tokens : int
    num_recv_tokens_per_expert : tuple of int
        L counts, each rounded up to the alignment.
    num_dropped : int
        Rows meant for this rank that overflow policy ``drop`` left out.
    topk_idx : Tensor
        [n, K], the routes. Of an engine that never reads it again it may be the caller's own tensor.
    state : object
        The engine's own data.
    sources : EpSources or None
        Where the received rows came from; an engine tells it of every dispatch.
    """

    owner: object
    num_tokens: int
    num_recv_tokens: int
    topk: int
    expand: bool
    expert_alignment: int
    num_worst_tokens: int
    num_recv_tokens_per_expert: tuple[int, ...]
    num_dropped: int
    topk_idx: Tensor
    state: object
    sources: EpSources | None = None

    @property
    def recv_src_rank(self) -> Tensor:
        """[rows] int32: source rank of each received row, -1 for padding and for rows that never came."""
        return self._told().rank()

    @property
    def recv_src_position(self) -> Tensor:
        """[rows] int32: position at its source of each received row, -1 as above. Complete when the rows are."""
        return self._told().position()

    @property
    def recv_src_choice(self) -> Tensor:
        """[rows] int32: the first of the token's K choices that led to each row, -1 as above. Complete likewise."""
        return self._told().choice()

    @property
    def sent_counts(self) -> Tensor:
        """[R, R] int32: how many tokens each rank sent to each rank of the group, those dropped there among them."""
        return self._told().sent()

    @property
    def recv_counts(self) -> Tensor:
        """[R, L] int32: how many tokens of each rank came, and were not dropped, for each local expert of this one."""
        return self._told().counts()

    def _told(self) -> EpSources:
        if self.sources is None:
            raise SpecError("handle", "a handle without sources", "one that a dispatch returned")
        return self.sources

    def check(self, owner: object) -> None:
        """Refuse another buffer's handle."""
        if self.owner is not owner:
            raise SpecError("handle", "a handle of another or a closed buffer", "one this buffer's dispatch returned")


@dataclass(slots=True, eq=False)
class EpLowLatencyHandle:
    """What a low-latency dispatch leaves behind for its combine. Read-only.

    Attributes
    ----------
    owner : object
        Identity of the engine that made it.
    src_info : Tensor
        [L, R · M] int32: position at the source of each received row.
    layout_range : Tensor
        [L, R] int64: ``begin << 32 | count`` of the rows of each source rank.
    num_max_dispatch_tokens_per_rank, hidden, num_experts : int
        The geometry, as the published handle carries it.
    num_tokens, topk : int
        n and K of the call.
    state : object
        The engine's own data.
    """

    owner: object
    src_info: Tensor
    layout_range: Tensor
    num_max_dispatch_tokens_per_rank: int
    hidden: int
    num_experts: int
    num_tokens: int
    topk: int
    state: object

    def check(self, owner: object) -> None:
        """Refuse another buffer's handle."""
        if self.owner is not owner:
            legal = "one this buffer's low_latency_dispatch returned"
            raise SpecError("handle", "a handle of another or a closed buffer", legal)
