"""The published V2 ``ElasticBuffer``: dispatch and combine in the rank and the expand layout."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from hal.compat.deep_ep import domains
from hal.compat.deep_ep.config import round_up
from hal.compat.deep_ep.elsewhere import Elsewhere
from hal.compat.deep_ep.event import Completion, EventHandle, EventOverlap, overlap, wait_for
from hal.compat.deep_ep.handle import EPHandle, Route
from hal.compat.deep_ep.metadata import Metadata
from hal.compat.deep_ep.pool import Pool, published, unsupported
from hal.compat.deep_ep.rows import Rows, given_rows, padded, tma_aligned
from hal.compat.flags import zero_or_one_methods
from hal.ep.buffer import EpBuffer
from hal.plugins import select
from hal.spec.errors import SpecError
from hal.spec.tensors import require_bool, require_device, require_int, require_shape, require_tensor

_NAMES: Final = {
    "scales": "x",
    "hidden": "x",
    "dtype": "x",
    "topk": "topk_idx",
    "max_tokens_per_rank": "num_max_tokens_per_rank",
    "expand": "do_expand",
}
_PAGE: Final = 2 << 20
_MOST_TOPK: Final = 32
_SMS: Final = 20


@zero_or_one_methods
class ElasticBuffer(Elsewhere):
    """Expert-parallel communication between the ranks of a group, as V2 of the published interface has it.

    Parameters
    ----------
    group : ProcessGroup
    num_bytes : int, optional
        A multiple of 2 MiB; checked, memory follows from the calls.
    num_cpu_bytes : int
        Must be 0.
    num_max_tokens_per_rank, hidden, num_topk : int
        The default of the calls; the others are checked.
    use_fp8_dispatch, allow_hybrid_mode, allow_multiple_reduction, prefer_overlap_with_compute : bool
        Checked. Sums are always one float32 sum with one rounding.
    deterministic : bool
        Every call is.
    sl_idx, num_allocated_qps, num_cpu_timeout_secs : int
        Checked; without effect.
    num_gpu_timeout_secs : int
        Seconds to wait for another rank.
    explicitly_destroy : bool

    Raises
    ------
    SpecError, UnsupportedError
    """

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        if num_bytes is not None:
            require_int("num_bytes", num_bytes, 1)
            if num_bytes % _PAGE:
                raise SpecError("num_bytes", num_bytes, f"a multiple of {_PAGE}")
        require_int("num_cpu_bytes", num_cpu_bytes, 0)
        if num_cpu_bytes:
            raise unsupported("num_cpu_bytes", num_cpu_bytes, 0)
        for name, value in {"num_max_tokens_per_rank": num_max_tokens_per_rank, "hidden": hidden}.items():
            require_int(name, value, 1 if num_bytes is None else 0)
        require_int("num_topk", num_topk, 0)
        flags = {
            "use_fp8_dispatch": use_fp8_dispatch,
            "deterministic": deterministic,
            "allow_hybrid_mode": allow_hybrid_mode,
            "allow_multiple_reduction": allow_multiple_reduction,
            "prefer_overlap_with_compute": prefer_overlap_with_compute,
            "explicitly_destroy": explicitly_destroy,
        }
        for name, flag in flags.items():
            require_bool(name, flag)
        require_int("sl_idx", sl_idx, 0)
        require_int("num_allocated_qps", num_allocated_qps, 0)
        require_int("num_cpu_timeout_secs", num_cpu_timeout_secs, 1)
        require_int("num_gpu_timeout_secs", num_gpu_timeout_secs, 1)
        self._pool = Pool(group, float(num_gpu_timeout_secs))
        self.group = group
        self.rank_idx, self.num_ranks = self._pool.rank, self._pool.size
        self.num_bytes = num_bytes
        if num_bytes is None:
            self.num_bytes = self.get_buffer_size_hint(group, num_max_tokens_per_rank, hidden, num_topk)
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.deterministic = deterministic
        self.allow_hybrid_mode = allow_hybrid_mode
        self.allow_multiple_reduction = allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.explicitly_destroy = explicitly_destroy
        self.num_allocated_qps = num_allocated_qps or (129 if allow_hybrid_mode else 17)
        self.num_scaleout_ranks, self.num_scaleup_ranks = self.get_logical_domain_size()
        self.scaleout_rank_idx, self.scaleup_rank_idx = divmod(self.rank_idx, self.num_scaleup_ranks)
        self.num_rdma_ranks, self.num_nvlink_ranks = self.get_physical_domain_size()

    def destroy(self) -> None:
        """Release all memory; needs ``explicitly_destroy=True``. Idempotent."""
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
        raise unsupported("runtime", "the compiled object", "the methods of ElasticBuffer")

    @property
    def nccl_comm_handle(self) -> Any:
        """The published buffer's communicator, which has no counterpart.

        Raises
        ------
        UnsupportedError
            Always.
        """
        raise unsupported("nccl_comm_handle", "the communicator", "the methods of ElasticBuffer")

    @staticmethod
    def get_buffer_size_hint(
        group: Any,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes that one dispatch and one combine take here at most, in the rank layout; a multiple of 2 MiB."""
        if not isinstance(group, dist.ProcessGroup):
            raise SpecError("group", type(group).__name__, "a torch.distributed.ProcessGroup this process belongs to")
        require_int("num_topk", num_topk, 0)
        ranks = group.size()
        with published({"max_tokens_per_rank": "num_max_tokens_per_rank"}):
            found = EpBuffer.size_hint(
                ranks, ranks, hidden, num_topk or _MOST_TOPK, num_max_tokens_per_rank, modes=("normal",)
            )
        return round_up(found["total"], _PAGE)

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        """Wait until every rank is here."""
        self._pool.require_open()
        dist.barrier(self.group)

    @staticmethod
    def capture() -> EventHandle:
        """Return the event of everything asked for so far."""
        return EventHandle()

    def get_comm_stream(self) -> Any:
        """Return the stream of communication: on the host, where calls complete in order, the current one."""
        device = select().capabilities.device_types[0]
        if device != "cpu":
            raise unsupported("get_comm_stream", f"a stream of device {device}", "events")
        return torch.cpu.current_stream()

    def get_physical_domain_size(self) -> tuple[int, int]:
        """Nodes, and ranks of a node."""
        return domains.get_physical_domain_size(self.group)

    def get_logical_domain_size(self) -> tuple[int, int]:
        """One domain of all ranks: crossing nodes is the buffer's own business."""
        return domains.get_logical_domain_size(self.group)

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """Return a number that is legal as ``num_sms``: the published default, whatever the figures."""
        require_int("num_experts", num_experts, 1)
        require_int("num_topk", num_topk, 1)
        require_int("num_scaleout_topk", num_scaleout_topk, 0, 0)
        return _SMS

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Return a number that is legal as ``num_qps``; engines here take none."""
        require_int("num_sms", num_sms, 1)
        wanted = num_sms * 16 + 1 if self.allow_hybrid_mode else min(num_sms, 9)
        return min(wanted, self.num_allocated_qps)

    def dispatch(
        self,
        x: Rows,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Rows, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        """Send every token to the ranks of its experts, or to each of its experts.

        Parameters
        ----------
        x : Tensor or (Tensor, Tensor)
            [n, hidden], or (float8_e4m3fn [n, hidden], scales).
        topk_idx : Tensor
            [n, K] int64, -1 is no expert. None with ``handle``.
        topk_weights : Tensor, optional
            [n, K] float32.
        cumulative_local_expert_recv_stats : Tensor, optional
            [L] int32, to which the counts are added.
        num_experts, num_max_tokens_per_rank, expert_alignment : int, optional
            With ``handle`` those of the handle; otherwise needed, the buffer's, and 1.
        num_sms, num_qps : int
            Processors of the device that kernels take, 0 for all; queue pairs: checked, without effect.
        previous_event, previous_event_before_epilogue : EventHandle, optional
            Waited for before x is read. The first one asks for ``allocate_on_comm_stream``.
        async_with_compute_stream, allocate_on_comm_stream : bool
            Return before the rows are there; wait for the event before using them.
        handle : EPHandle, optional
            Of an earlier dispatch, to use its routes again.
        do_handle_copy : bool
            Keep a copy of topk_idx in the handle.
        do_cpu_sync : bool, optional
            False: return as many rows as can come at most, and no counts. By default True without a handle.
        do_expand, do_zero_padding : bool
            A row per (token, local expert), grouped by expert. Padding is always zero.
        use_tma_aligned_col_major_sf : bool
            Scales in column-major order, columns a multiple of four rows apart.

        Returns
        -------
        recv_x : Tensor or (Tensor, Tensor)
        recv_topk_idx : Tensor or None
            [rows, K] local expert ids, -1 elsewhere; None in the expand layout.
        recv_topk_weights : Tensor or None
            [rows, K], or [rows] in the expand layout.
        handle : EPHandle
        event : EventOverlap
        """
        with self._pool.checking("normal", _buffer_of(handle)):
            _check_figures(num_sms, num_qps, previous_event, async_with_compute_stream, allocate_on_comm_stream)
            flags = {
                "do_handle_copy": do_handle_copy,
                "do_expand": do_expand,
                "do_zero_padding": do_zero_padding,
                "use_tma_aligned_col_major_sf": use_tma_aligned_col_major_sf,
            }
            for name, flag in flags.items():
                require_bool(name, flag)
            if do_zero_padding and not do_expand:
                raise SpecError("do_zero_padding", True, "False, unless do_expand is True")
            x, hidden, dtype = given_rows(x)
            n = len(x[0] if isinstance(x, tuple) else x)
            if handle is not None:
                if do_cpu_sync:
                    raise SpecError("do_cpu_sync", True, "False or None together with handle")
                if not isinstance(handle, EPHandle) or handle._route is None:
                    raise SpecError("handle", type(handle).__name__, "the EPHandle that dispatch returned")
                same = {
                    "num_experts": num_experts,
                    "num_max_tokens_per_rank": num_max_tokens_per_rank,
                    "expert_alignment": expert_alignment,
                    "do_expand": do_expand,
                }
                for name, value in same.items():
                    if value is not None and value != getattr(handle, name):
                        raise SpecError(name, value, f"{getattr(handle, name)}, as in the handle")
                num_experts = handle.num_experts
            elif num_experts is None:
                raise SpecError("num_experts", None, "the number of experts, or a handle")
            require_int("num_experts", num_experts, 1)
            if num_experts % self.num_ranks:
                raise SpecError("num_experts", num_experts, f"a multiple of {self.num_ranks} ranks")
            stats = cumulative_local_expert_recv_stats
            if stats is not None:
                name = "cumulative_local_expert_recv_stats"
                require_tensor(name, stats, (torch.int32,), 1, "[L]")
                require_shape(name, stats, (num_experts // self.num_ranks,), "[L]")
                require_device(name, stats, (x[0] if isinstance(x, tuple) else x).device, "x")
            wait_for("previous_event", previous_event)
            wait_for("previous_event_before_epilogue", previous_event_before_epilogue)
            if handle is not None and topk_idx is not None:
                raise SpecError("topk_idx", "a tensor together with handle", "None for a cached dispatch")
            most = self.num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank
            alignment = 1 if expert_alignment is None else expert_alignment
            sync = True if do_cpu_sync is None else do_cpu_sync
            if handle is None:
                require_tensor("topk_idx", topk_idx, (torch.int64,), 2, "[n, K]")
                require_int("num_max_tokens_per_rank", most, 1)
                if n > most:
                    raise SpecError("x", f"{n} tokens", f"at most num_max_tokens_per_rank = {most}")
                require_int("expert_alignment", alignment, 1)
                require_bool("do_cpu_sync", sync)

        if handle is not None:
            assert handle._route is not None
            with published(_NAMES):
                handle._route.buffer.num_sms = num_sms or None
                sent = handle._route.buffer.dispatch(
                    x, topk_weights=topk_weights, handle=handle._route.handle, async_finish=True
                )
            learn = None
        else:
            assert topk_idx is not None
            with published(_NAMES):
                buffer = self._pool.normal(num_experts, hidden, max(topk_idx.shape[1], 1), dtype)
                routes = topk_idx.clone() if do_handle_copy else topk_idx
                buffer.num_sms = num_sms or None
                sent = buffer.dispatch(
                    x, routes, topk_weights, expand=do_expand, expert_alignment=alignment, async_finish=True
                )
                layout = buffer.layout(routes)
            meta = Metadata(
                ranks=self.num_ranks,
                local_experts=num_experts // self.num_ranks,
                most=most,
                alignment=alignment,
                expand=do_expand,
                exact=sync,
            )
            handle = meta.handle(num_experts, routes, num_sms or _SMS, layout.is_token_in_rank, sent)
            handle._route = Route(buffer, sent.handle)

            def learn() -> None:
                meta.fill(handle, sent)

        rows = handle.num_expanded_tokens if handle.do_expand else handle.num_recv_tokens
        steps = [sent.event.wait] if learn is None else [sent.event.wait, learn]
        recv_x, weights = sent.recv_x, sent.recv_topk_weights
        recv_idx = None if handle.do_expand else sent.recv_topk_idx
        data, scales = recv_x if isinstance(recv_x, tuple) else (recv_x, None)
        data = padded(data, rows, 0, steps)
        if scales is not None:
            scales = (
                tma_aligned(scales, rows, steps) if use_tma_aligned_col_major_sf else padded(scales, rows, 0, steps)
            )
        recv_idx = None if recv_idx is None else padded(recv_idx, rows, -1, steps)
        weights = None if weights is None else padded(weights, rows, 0, steps)
        if stats is not None:
            steps.append(partial(_count, stats, handle))
        with published(_NAMES):
            event = overlap(Completion(*steps), async_with_compute_stream)
        return data if scales is None else (data, scales), recv_idx, weights, handle, event

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Bring rows back to their tokens and sum them, unweighted.

        Parameters
        ----------
        x : Tensor
            One row for every received row.
        handle : EPHandle
            Of the dispatch.
        topk_weights : Tensor, optional
            Like the received ones; sent back and summed likewise.
        bias : Tensor or tuple of two, optional
            [n, hidden], added first.
        num_sms, num_qps, previous_event, previous_event_before_epilogue
            As in `dispatch`.
        async_with_compute_stream, allocate_on_comm_stream : bool
            As in `dispatch`.

        Returns
        -------
        combined_x : Tensor
            [n, hidden].
        combined_topk_weights : Tensor or None
            [n, K].
        event : EventOverlap
        """
        with self._pool.checking("normal", _buffer_of(handle)):
            _check_figures(num_sms, num_qps, previous_event, async_with_compute_stream, allocate_on_comm_stream)
            if not isinstance(handle, EPHandle) or handle._route is None:
                raise SpecError("handle", type(handle).__name__, "the EPHandle that dispatch returned")
            wait_for("previous_event", previous_event)
            wait_for("previous_event_before_epilogue", previous_event_before_epilogue)
            rows = handle.num_expanded_tokens if handle.do_expand else handle.num_recv_tokens
            real = handle._route.handle.num_recv_tokens
            if rows != real:
                # Received with room for more than came: only what came goes back.
                for name, one in {"x": x, "topk_weights": topk_weights}.items():
                    if isinstance(one, Tensor) and one.dim() and len(one) != rows:
                        raise SpecError(name, f"shape {list(one.shape)}", f"{rows} rows, as received")
                x = x[:real] if isinstance(x, Tensor) and x.dim() else x
                topk_weights = (
                    topk_weights[:real] if isinstance(topk_weights, Tensor) and topk_weights.dim() else topk_weights
                )
        with published(_NAMES):
            handle._route.buffer.num_sms = num_sms or None
            sent = handle._route.buffer.combine(
                x, handle._route.handle, topk_weights=topk_weights, bias=bias, async_finish=True
            )
            event = overlap(Completion(sent.event.wait), async_with_compute_stream)
        return sent.combined_x, sent.combined_topk_weights, event


def _buffer_of(handle: object) -> EpBuffer | None:
    """The buffer to which a call with this handle goes."""
    return handle._route.buffer if isinstance(handle, EPHandle) and handle._route is not None else None


def _check_figures(num_sms: Any, num_qps: Any, previous_event: Any, asynchronous: Any, on_comm_stream: Any) -> None:
    require_int("num_sms", num_sms, 0)
    require_int("num_qps", num_qps, 0)
    require_bool("async_with_compute_stream", asynchronous)
    require_bool("allocate_on_comm_stream", on_comm_stream)
    if previous_event is not None and not on_comm_stream:
        raise SpecError("allocate_on_comm_stream", False, "True together with previous_event")


def _count(stats: Tensor, handle: EPHandle) -> None:
    stats.add_(handle.num_unaligned_recv_tokens_per_expert)
