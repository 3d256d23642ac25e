"""The published V1 ``Buffer``: normal mode, and the low-latency family of `hal.compat.deep_ep.low_latency`."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from hal.compat.deep_ep.config import Config, combine_config, dispatch_config, low_latency_size, round_up
from hal.compat.deep_ep.event import Completion, EventHandle, EventOverlap, overlap, wait_for
from hal.compat.deep_ep.handle import Route, attach, attached, buffer_of
from hal.compat.deep_ep.internode import Internode
from hal.compat.deep_ep.low_latency import LowLatency
from hal.compat.deep_ep.pool import Pool, published, unsupported
from hal.compat.deep_ep.rows import Rows, given_rows
from hal.compat.flags import zero_or_one_methods
from hal.ep.launch import launched_ranks_per_node
from hal.ep.layout import count_layout
from hal.ep.results import EpDispatchResult
from hal.plugins import select
from hal.spec.ep import FP8, EpHandle, EpLayout, check_buffer
from hal.spec.errors import SpecError
from hal.spec.tensors import dtype_name, require_bool, require_int, require_shape, require_tensor
from hal.spec.validation import validation_level

_NAMES: Final = {"scales": "x", "hidden": "x", "dtype": "x", "topk": "topk_idx", "num_experts": "num_tokens_per_expert"}
_COUNTS_A_STEP: Final = 4
_INT32: Final = (torch.int32,)


@zero_or_one_methods
class Buffer(LowLatency):
    """Expert-parallel communication between the ranks of a group, as V1 of the published interface has it.

    Parameters
    ----------
    group : ProcessGroup
        Of torch.distributed, any backend.
    num_nvl_bytes, num_rdma_bytes, num_qps_per_rank : int
        Checked; memory follows from the calls.
    low_latency_mode : bool
        Whether low-latency calls will be made.
    allow_nvlink_for_low_latency_mode, allow_mnnvl : bool
        Checked; without effect.
    explicitly_destroy : bool
        `destroy` will be called; otherwise memory goes when this object does.
    enable_shrink : bool
        Low-latency calls carry on without a failed rank.
    comm : None
        Only torch.distributed groups are supported.

    Raises
    ------
    SpecError
        A wrong argument.
    UnsupportedError
        The backend in force has no expert-parallel communication, or ``comm`` was given.
    """

    num_sms: int = 20

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        use_fabric: bool = False,
    ) -> None:
        require_int("num_nvl_bytes", num_nvl_bytes, 0)
        require_int("num_rdma_bytes", num_rdma_bytes, 0)
        require_bool("low_latency_mode", low_latency_mode)
        require_int("num_qps_per_rank", num_qps_per_rank, 1)
        require_bool("allow_nvlink_for_low_latency_mode", allow_nvlink_for_low_latency_mode)
        require_bool("allow_mnnvl", allow_mnnvl)
        require_bool("explicitly_destroy", explicitly_destroy)
        require_bool("enable_shrink", enable_shrink)
        require_bool("use_fabric", use_fabric)
        if group is None and comm is not None:
            raise unsupported("comm", type(comm).__name__, "a torch.distributed group")
        self._pool = Pool(group, mask_ranks=enable_shrink)
        self.group = group
        self.rank, self.group_size = self._pool.rank, self._pool.size
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink

    def destroy(self) -> None:
        """Release all memory; needs ``explicitly_destroy=True``."""
        if not self.explicitly_destroy:
            raise SpecError("explicitly_destroy", False, "True when the buffer is made")
        self._pool.close()

    @property
    def runtime(self) -> Any:
        """The published object behind the buffer, which has no counterpart.

        Raises
        ------
        UnsupportedError
            Always.
        """
        raise unsupported("runtime", "the compiled object", "the methods of Buffer")

    @property
    def nvshmem_qp_depth(self) -> Any:
        """The depth of the published buffer's queue pairs, which have no counterpart.

        Raises
        ------
        UnsupportedError
            Always.
        """
        raise unsupported("nvshmem_qp_depth", "the depth of queue pairs", "the methods of Buffer")

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether FP8 rows can be sent, which is what callers ask this for."""
        declared = select().capabilities.ep
        return declared is not None and dtype_name(FP8) in declared.dtypes

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set how many processors of the device calls without a configuration take, 0 for all; it has to be even."""
        require_int("new_num_sms", new_num_sms, 0)
        if new_num_sms % 2:
            raise SpecError("new_num_sms", new_num_sms, "an even number")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """Return the event of everything asked for so far."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes the published low-latency buffers take; `hal.EpBuffer.size_hint` says what this one takes."""
        return low_latency_size(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    def get_comm_stream(self) -> Any:
        """Return the stream of communication: on the host, where calls complete in order, the current one."""
        device = select().capabilities.device_types[0]
        if device != "cpu":
            raise unsupported("get_comm_stream", f"a stream of device {device}", "events")
        return torch.cpu.current_stream()

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: torch.Size | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        """Raw memory of the published buffer, which has no counterpart.

        Raises
        ------
        UnsupportedError
            Always.
        """
        raise unsupported("get_local_buffer_tensor", "the raw buffer", "tensors that calls return")

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """Return the published choice; for a number of ranks that is not listed, that of the next larger one."""
        return dispatch_config(num_ranks, Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """Return the published choice; for a number of ranks that is not listed, that of the next larger one."""
        return combine_config(num_ranks, Buffer.num_sms)

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """Count where tokens go. Local.

        Parameters
        ----------
        topk_idx : Tensor
            [n, K] int64, -1 is no expert.
        num_experts : int
        previous_event, async_finish, allocate_on_comm_stream
            As in `dispatch`.

        Returns
        -------
        num_tokens_per_rank : Tensor
            [R] int32.
        num_tokens_per_rdma_rank : Tensor or None
            [nodes] int32; None within one node.
        num_tokens_per_expert : Tensor
            [E] int32.
        is_token_in_rank : Tensor
            [n, R] bool.
        event : EventOverlap
        """
        self._pool.require_open()
        _check_streams(previous_event, async_finish, allocate_on_comm_stream)
        require_int("num_experts", num_experts, 1)
        require_tensor("topk_idx", topk_idx, (torch.int64,), 2, "[n, K]")
        wait_for("previous_event", previous_event)
        found = self._layout(topk_idx, num_experts)
        event = overlap(Completion(), async_finish)
        return (
            found.num_tokens_per_rank,
            found.num_tokens_per_node,
            found.num_tokens_per_expert,
            found.is_token_in_rank,
            event,
        )

    def _layout(self, topk_idx: Tensor, num_experts: int) -> EpLayout:
        geometry = check_buffer(
            self.group,
            self.group_size,
            self.rank,
            num_experts,
            8,
            max(topk_idx.shape[1], 1),
            1,
            ranks_per_node=launched_ranks_per_node(self.group_size),
        )
        return count_layout(geometry, topk_idx)

    def dispatch(
        self,
        x: Rows,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, list[int] | None, tuple[Any, ...] | None, EventOverlap]:
        """Send every token to the ranks of its experts, once a rank.

        Parameters
        ----------
        x : Tensor or (Tensor, Tensor)
            [n, hidden], or (float8_e4m3fn [n, hidden], scales [n, hidden / 128]).
        handle : tuple, optional
            Of an earlier dispatch, to use its routes again; ``topk_idx`` and ``topk_weights`` must then be None.
        num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert : Tensor
            What `get_dispatch_layout` returned.
        topk_idx, topk_weights : Tensor, optional
            [n, K] int64 and float32. Without them tokens go where ``is_token_in_rank`` says.
        expert_alignment : int
            Counts per expert are rounded up to it.
        num_worst_tokens : int
            When positive, that many rows are returned whatever came.
        config : Config, optional
            Its ``num_sms`` is how many processors of the device kernels take; the published default without it.
        previous_event : EventOverlap, optional
            Waited for before x is read.
        async_finish : bool
            Return before the rows are there; wait for the event before using them.
        allocate_on_comm_stream : bool
            Legal together with the two before it.

        Returns
        -------
        recv_x : Tensor or (Tensor, Tensor)
            Rows by source rank, then source position.
        recv_topk_idx, recv_topk_weights : Tensor or None
            [rows, K]: local expert ids, -1 elsewhere, and weights. None for a cached dispatch, as the next two.
        num_recv_tokens_per_expert_list : list of int or None
            Empty with ``num_worst_tokens``.
        handle : tuple or None
            ``(rank_prefix_matrix [R, R], channel_prefix_matrix [R, 1], recv_channel_prefix_matrix [R, 1],
            recv_src_idx [rows], is_token_in_rank [n, R], send_head [n, R])``, with one channel; between nodes the ten
            of `hal.compat.deep_ep.internode`.
        event : EventOverlap
        """
        with self._pool.checking("normal", buffer_of(handle, EpHandle)):
            _check_config(config)
            _check_streams(previous_event, async_finish, allocate_on_comm_stream)
            x, hidden, dtype = given_rows(x)
            if handle is not None:
                for name, value in (("topk_idx", topk_idx), ("topk_weights", topk_weights)):
                    if value is not None:
                        raise SpecError(name, "a tensor together with handle", "None for a cached dispatch")
                route = attached(handle, EpHandle, "dispatch")
            wait_for("previous_event", previous_event)
        if handle is not None:
            with published(_NAMES):
                route.buffer.num_sms = _processors(config)
                sent = route.buffer.dispatch(x, handle=route.handle, async_finish=True)
                event = overlap(Completion(sent.event.wait), async_finish)
            return sent.recv_x, None, None, None, None, event

        size, n = self.group_size, len(x[0] if isinstance(x, tuple) else x)
        with self._pool.checking("normal"):
            require_tensor("num_tokens_per_rank", num_tokens_per_rank, _INT32, 1, "[R]")
            require_tensor("is_token_in_rank", is_token_in_rank, (torch.bool,), 2, "[n, R]")
            require_tensor("num_tokens_per_expert", num_tokens_per_expert, _INT32, 1, "[E]")
            assert (
                num_tokens_per_rank is not None and is_token_in_rank is not None and num_tokens_per_expert is not None
            )
            require_shape("num_tokens_per_rank", num_tokens_per_rank, (size,), "[R]")
            require_shape("is_token_in_rank", is_token_in_rank, (n, size), "[n, R]")
            if topk_idx is None and topk_weights is not None:
                raise SpecError("topk_weights", "a tensor without topk_idx", "None, or both")
            require_int("num_worst_tokens", num_worst_tokens, 0)
            require_int("expert_alignment", expert_alignment, 1)
            if topk_idx is not None:
                require_tensor("topk_idx", topk_idx, (torch.int64,), 2, "[n, K]")
                if validation_level() and len(topk_idx) == n:
                    experts = len(num_tokens_per_expert)
                    with published(_NAMES):
                        found = self._layout(topk_idx, experts)
                    _check_routes(is_token_in_rank, found.is_token_in_rank)
        # Where tokens go, as experts of a geometry that has one on each rank.
        to_rank = torch.where(is_token_in_rank, torch.arange(size, device=is_token_in_rank.device), -1)
        with published(_NAMES):
            if topk_idx is None:
                buffer = self._pool.normal(size, hidden, size, dtype)
            else:
                buffer = self._pool.normal(len(num_tokens_per_expert), hidden, max(topk_idx.shape[1], 1), dtype)
            buffer.num_sms = _processors(config)
            sent = buffer.dispatch(
                x,
                to_rank if topk_idx is None else topk_idx,
                topk_weights,
                expert_alignment=expert_alignment,
                num_worst_tokens=num_worst_tokens,
                async_finish=True,
            )
            told = None if topk_idx is not None else self._tell_counts(num_tokens_per_expert)
        to_ranks = is_token_in_rank.sum(0, dtype=torch.int32)
        route = Route(buffer, sent.handle, has_topk=topk_idx is not None)
        between = Internode(self.rank, size, buffer.args.ranks_per_node) if buffer.args.num_nodes > 1 else None
        prefix = torch.zeros(size, size, dtype=torch.int32, device=to_rank.device)
        position = prefix.new_full((sent.handle.num_recv_tokens,), -1)
        per_expert: list[int] = list(sent.num_recv_tokens_per_expert)

        def learn() -> None:
            nonlocal per_expert
            prefix.copy_(sent.handle.sent_counts.cumsum(0))
            position.copy_(sent.handle.recv_src_position)
            if between is not None:
                between.fill(made, sent.handle.sent_counts[:, self.rank])
            if told is not None and not num_worst_tokens:
                told.event.wait()
                assert isinstance(told.recv_x, Tensor)
                local = -(-len(num_tokens_per_expert) // size)
                total = told.recv_x.view(torch.int32)[:, : len(num_tokens_per_expert)].sum(0)
                mine = total[self.rank * local : (self.rank + 1) * local].tolist()
                per_expert = [round_up(int(one), expert_alignment) for one in mine + [0] * (local - len(mine))]

        made: tuple[Tensor, ...]
        if between is not None:
            made = between.handle(is_token_in_rank, len(position), route)
        else:
            order = is_token_in_rank.cumsum(0, dtype=torch.int32) - 1
            made = (
                prefix,
                to_ranks.view(size, 1),
                prefix.new_zeros(size, 1),
                attach(position, route),
                is_token_in_rank,
                order.where(is_token_in_rank, -1),
            )
        finish = Completion(sent.event.wait, learn)
        if topk_idx is None and not num_worst_tokens:
            finish()  # the list is the host's, so the host waits for it
        with published(_NAMES):
            event = overlap(finish, async_finish)
        recv_idx = None if topk_idx is None else sent.recv_topk_idx
        return sent.recv_x, recv_idx, sent.recv_topk_weights, per_expert, made, event

    def _tell_counts(self, num_tokens_per_expert: Tensor) -> EpDispatchResult:
        """Send every rank this one's counts by expert, which routes without top-k do not tell."""
        size, words = self.group_size, round_up(len(num_tokens_per_expert), _COUNTS_A_STEP)
        row = num_tokens_per_expert.new_zeros(1, words)
        row[0, : len(num_tokens_per_expert)] = num_tokens_per_expert
        everyone = torch.arange(size, device=row.device)[None]
        # The bits of the integers travel as float32: rows are moved, never computed with.
        return self._pool.beside(size, words, size, torch.float32).dispatch(
            row.view(torch.float32), everyone, async_finish=True
        )

    def combine(
        self,
        x: Tensor,
        handle: tuple[Any, ...],
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Bring rows back to their tokens and sum them, unweighted.

        Parameters
        ----------
        x : Tensor
            One row for every received row.
        handle : tuple
            Of the dispatch.
        topk_weights : Tensor, optional
            Like the received ones; sent back and summed likewise.
        bias : Tensor or tuple of two, optional
            [n, hidden], added first.
        config, previous_event, async_finish, allocate_on_comm_stream
            As in `dispatch`.

        Returns
        -------
        combined_x : Tensor
            [n, hidden].
        combined_topk_weights : Tensor or None
            [n, K].
        event : EventOverlap
        """
        with self._pool.checking("normal", buffer_of(handle, EpHandle)):
            _check_config(config)
            _check_streams(previous_event, async_finish, allocate_on_comm_stream)
            route = attached(handle, EpHandle, "dispatch")
            if topk_weights is not None and not route.has_topk:
                raise unsupported("topk_weights", "weights for a dispatch without topk_idx", "None")
            wait_for("previous_event", previous_event)
        with published(_NAMES):
            route.buffer.num_sms = _processors(config)
            sent = route.buffer.combine(x, route.handle, topk_weights=topk_weights, bias=bias, async_finish=True)
            event = overlap(Completion(sent.event.wait), async_finish)
        return sent.combined_x, sent.combined_topk_weights, event

    def internode_dispatch(
        self,
        x: Rows,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, list[int] | None, tuple[Any, ...] | None, EventOverlap]:
        """As `dispatch`, which crosses nodes by itself."""
        return self.dispatch(
            x,
            handle,
            num_tokens_per_rank,
            num_tokens_per_rdma_rank,
            is_token_in_rank,
            num_tokens_per_expert,
            topk_idx,
            topk_weights,
            expert_alignment,
            0,
            config,
            previous_event,
            async_finish,
            allocate_on_comm_stream,
        )

    def internode_combine(
        self,
        x: Tensor,
        handle: tuple[Any, ...],
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """As `combine`, which crosses nodes by itself."""
        return self.combine(
            x, handle, topk_weights, bias, config, previous_event, async_finish, allocate_on_comm_stream
        )


def _check_config(config: Any) -> None:
    if config is not None and not isinstance(config, Config):
        raise SpecError("config", type(config).__name__, "a Config or None")


def _processors(config: Config | None) -> int | None:
    """As `hal.EpBuffer` takes them; 0 is no limit."""
    return (Buffer.num_sms if config is None else config.num_sms) or None


def _check_streams(previous_event: Any, async_finish: Any, allocate_on_comm_stream: Any) -> None:
    require_bool("async_finish", async_finish)
    require_bool("allocate_on_comm_stream", allocate_on_comm_stream)
    if allocate_on_comm_stream and (previous_event is None or not async_finish):
        raise SpecError(
            "allocate_on_comm_stream", True, "False, unless previous_event is given and async_finish is True"
        )


def _check_routes(is_token_in_rank: Tensor, counted: Tensor) -> None:
    if not torch.equal(counted, is_token_in_rank):
        raise SpecError("is_token_in_rank", "other routes than topk_idx", "what get_dispatch_layout returned")
