"""Handles in the published forms, and how they lead back to the engine's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from hal.ep.buffer import EpBuffer
from hal.spec.ep import EpHandle, EpLowLatencyHandle
from hal.spec.errors import SpecError

_ATTRIBUTE: Final = "_hal_route"


@dataclass(slots=True, eq=False)
class Route:
    """A buffer and the handle of one of its dispatches.

    Attributes
    ----------
    buffer : EpBuffer
    handle : EpHandle or EpLowLatencyHandle
    has_topk : bool
        Whether the routes are the caller's top-k; otherwise they stand for ``is_token_in_rank``.
    lent : bool
        Whether the memory for a zero-copy combine was asked for.
    """

    buffer: EpBuffer
    handle: Any
    has_topk: bool = True
    lent: bool = False


def attach(tensor: Tensor, route: Route) -> Tensor:
    """An alias of a tensor that leads to a route: handles are plain tuples, which callers take apart and rebuild."""
    alias = tensor.view(tensor.shape)
    setattr(alias, _ATTRIBUTE, route)
    return alias


def attached(handle: Any, kind: type[EpHandle] | type[EpLowLatencyHandle], made_by: str) -> Route:
    """The route of a handle tuple.

    Raises
    ------
    SpecError
        It is not a handle of this kind.
    """
    if isinstance(handle, (tuple, list)):
        for part in handle:
            route = getattr(part, _ATTRIBUTE, None)
            if isinstance(route, Route) and isinstance(route.handle, kind):
                return route
    got = f"a {type(handle).__name__}" + (" of other parts" if isinstance(handle, (tuple, list)) else "")
    raise SpecError("handle", got, f"the handle that {made_by} returned")


def buffer_of(handle: Any, kind: type[EpHandle] | type[EpLowLatencyHandle]) -> EpBuffer | None:
    """The buffer to which a call with this handle goes, or None where the handle is none of this kind."""
    try:
        return attached(handle, kind, "").buffer
    except SpecError:
        return None


class EPHandle:
    """What `ElasticBuffer.dispatch` leaves for combine and for dispatches over the same routes.

    Attributes
    ----------
    do_expand : bool
        A row per (token, local expert) instead of per (token, rank).
    num_experts, expert_alignment, num_max_tokens_per_rank, num_sms : int
        As dispatched.
    topk_idx : Tensor
        [n, K], the routes.
    num_recv_tokens, num_expanded_tokens : int
        Rows in the rank layout and in the expand layout, or room for the most there can be without ``do_cpu_sync``.
    num_recv_tokens_per_expert_list : list of int
        Counts rounded up to the alignment; empty without ``do_cpu_sync``.
    psum_num_recv_tokens_per_scaleup_rank : Tensor
        [R] int32, rows received from this and all earlier ranks.
    psum_num_recv_tokens_per_expert : Tensor
        [L] int32, where each expert ends: rounded up to the alignment, or in the expand layout before the padding.
    num_unaligned_recv_tokens_per_expert : Tensor
        [L] int32, counts as they came.
    recv_src_metadata : Tensor
        [num_recv_tokens, K + 2] int32: ``source rank * num_max_tokens_per_rank + position``; ``source rank * K + first
        choice that led here``; per choice the row in the expand layout, -1 where there is none.
    dst_buffer_slot_idx : Tensor
        [n, K] int32: per choice, how many earlier tokens of this rank go to that rank; -1 for none or a rank again.
    token_metadata_at_forward, channel_linked_list : None
        Of the published kernels between nodes.
    cached_recv_src_metadata_before_sort : None
        Of the published sort: here nothing is left to sort.
    """

    def __init__(
        self,
        do_expand: bool,
        num_experts: int,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
        topk_idx: Tensor,
        num_recv_tokens: int,
        num_expanded_tokens: int,
        num_recv_tokens_per_expert_list: list[int],
        psum_num_recv_tokens_per_scaleup_rank: Tensor,
        psum_num_recv_tokens_per_expert: Tensor,
        num_unaligned_recv_tokens_per_expert: Tensor,
        recv_src_metadata: Tensor,
        dst_buffer_slot_idx: Tensor,
        token_metadata_at_forward: Tensor | None,
        channel_linked_list: Tensor | None,
    ) -> None:
        self.do_expand = do_expand
        self.num_experts = num_experts
        self.expert_alignment = expert_alignment
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.num_sms = num_sms
        self.topk_idx = topk_idx
        self.num_recv_tokens = num_recv_tokens
        self.num_expanded_tokens = num_expanded_tokens
        self.num_recv_tokens_per_expert_list = num_recv_tokens_per_expert_list
        self.psum_num_recv_tokens_per_scaleup_rank = psum_num_recv_tokens_per_scaleup_rank
        self.psum_num_recv_tokens_per_expert = psum_num_recv_tokens_per_expert
        self.num_unaligned_recv_tokens_per_expert = num_unaligned_recv_tokens_per_expert
        self.recv_src_metadata = recv_src_metadata
        self.dst_buffer_slot_idx = dst_buffer_slot_idx
        self.token_metadata_at_forward = token_metadata_at_forward
        self.channel_linked_list = channel_linked_list
        self.cached_recv_src_metadata_before_sort: Tensor | None = None
        self._route: Route | None = None

    def deterministic_sort(
        self,
        do_cpu_sync: bool,
        is_cached_dispatch: bool,
        recv_x: Tensor,
        recv_sf: Tensor | None,
        recv_topk_idx: Tensor,
        recv_topk_weights: Tensor,
        channel_linked_list: Tensor | None,
    ) -> None:
        """Nothing is left to sort: rows come by source rank and source position, on every run."""
