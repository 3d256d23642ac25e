"""The expert-parallel engine of one node: peer windows in shared memory, moved and summed by compiled code."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from hal.ep.engine import (
    EpCombined,
    EpDispatched,
    EpEngine,
    EpLowLatencyCombined,
    EpLowLatencyDispatched,
    Finish,
)
from hal.ep.faults import KINDS, PHASES, EpFaults
from hal.ep.layout import count_layout
from hal.ep.nodes import NodeEngine, NodesEngine, Relayed
from hal.ep.rendezvous import Doorbell, agree, exchange_over, host_identity
from hal.ep.topology import Topology
from hal.spec.capability import EpCapabilities, Ints
from hal.spec.ep import (
    CASTS,
    FP8,
    OVERFLOW,
    SCALE_GROUP,
    EpBufferArgs,
    EpCombineArgs,
    EpDispatchArgs,
    EpHandle,
    EpLayout,
    EpLowLatencyCombineArgs,
    EpLowLatencyDispatchArgs,
    EpLowLatencyHandle,
)
from hal.spec.errors import RankFailure, SpecError
from hal_cpu.ep_parts import (
    COMBINE_FIELDS,
    DISPATCH_FIELDS,
    OPERATIONS,
    PACKED_COMBINE_FIELDS,
    PACKED_FIELDS,
    Fields,
    PackedState,
    Sources,
    nothing,
    record_of,
    refusal,
    translated,
)

CAPABILITIES: Final = EpCapabilities(
    modes=("normal", "low_latency"),
    layouts=("rank", "expand"),
    dtypes=("bfloat16", "float16", "float32", "float8_e4m3fn"),
    casts=CASTS,
    transports=("shm", "torch.distributed"),
    overflow=OVERFLOW,
    ranks=Ints(1, 512),
    nodes=Ints(1, 64),
    topk=Ints(1),
    num_experts=Ints(1),
    row_bytes=Ints(16, multiple_of=16),
    recv_hook=True,
    async_finish=True,
    cached_handle=True,
    mask_ranks=True,
    zero_copy_combine=True,
    pre_reduce=True,
    across_nodes=("normal", "low_latency", "error", "drop", "grow", "mask_ranks"),
)

_TYPES: Final = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_BYTES, _INT32, _INT64 = 3, 4, 5
launches: Counter[str] = Counter()
"""Calls of this process, by name and instruction set."""

_WINDOW_FROM: Final = 1 << 20
_CAST_OF: Final = {name: i for i, name in enumerate(CASTS)}


def missing() -> str | None:
    """Why there is no compiled engine, or None if there is one."""
    if importlib.util.find_spec("hal_cpu._ep") is None:
        return "hal-cpu was installed without compiled kernels: no C++17 compiler, or the build failed"
    try:
        import hal_cpu._ep  # noqa: F401  (whether it loads is the question)
    except ImportError as error:
        return f"the compiled engine does not load here ({error})"
    return None


def open_engine(args: EpBufferArgs) -> EpEngine:
    """The engine of a group: of its one node, or of all its nodes."""
    if args.num_nodes == 1:
        return CpuEpEngine(args)
    # A rank that waits for one of another node is not to be taken for lost by those of its own.
    patient = replace(args, timeout=2 * args.timeout) if args.mask_ranks else args
    return NodesEngine(args, CpuEpEngine(patient))


class CpuEpEngine(NodeEngine):
    """One rank's end of a buffer whose ranks, those of a node, are processes of this machine.

    Raises
    ------
    SpecError
        The ranks of the node do not share a machine.
    RankFailure
        A rank did not come to the rendezvous.
    """

    def __init__(self, args: EpBufferArgs) -> None:
        from hal_cpu import _ep

        self._native = _ep
        self._args = args
        exchange = exchange_over(args.group, args.timeout)
        topology = Topology(args.num_ranks, args.ranks_per_node, args.mask_ranks)
        peers = topology.ranks(topology.node(args.rank))
        self._first = first = peers[0]
        self._ranks = ranks = len(peers)
        here = args.rank - first
        blocks = [topology.sources(peer) for peer in peers]
        self._sources = len(blocks[0])
        # The rank whose tokens each block carries, -1 for none: block s * ranks + i is what peer i sends for source s.
        self._origins = torch.tensor(
            [-1 if block[s] is None else block[s] for s in range(self._sources) for block in blocks], dtype=torch.int32
        )
        # The block through which the tokens of each rank of the group come here: its own, or what this rank speaks for.
        origins = self._origins.view(self._sources, ranks).tolist()
        self._blocks = torch.tensor([_block_of(origins, rank, here) for rank in range(args.num_ranks)])
        crowded = ranks > len(os.sched_getaffinity(0))
        # One rank's secret serves the group; every rank brings one, so that none needs to be asked first.
        doorbell = Doorbell(args.num_ranks)
        try:
            everyone = exchange((host_identity(), doorbell.name, secrets.token_bytes(32)))
            for rank, (host, _, _) in enumerate(everyone):
                head = rank // args.ranks_per_node * args.ranks_per_node
                if host != everyone[head][0]:
                    legal = f"ranks {head} and {rank} on one machine and in one network namespace"
                    raise SpecError("ranks_per_node", args.ranks_per_node, legal)
            token = everyone[first][2]
            self._engine = _ep.Engine(
                here,
                ranks,
                self._sources,
                args.local_experts,
                first * args.local_experts,
                first,
                args.timeout,
                args.mask_ranks,
                args.max_recv_tokens,
                OVERFLOW.index(args.overflow),
                crowded,
                args.num_ranks,
                token,
            )
            failure: dict[str, Any] = {}
            try:
                names = [name for _, name, _ in everyone[first : first + ranks]]
                found = doorbell.trade(self._engine.fd(), here, names, token, args.timeout)
                for peer, (window, pidfd) in found.items():
                    try:
                        self._engine.attach(peer, window, pidfd)
                    except ValueError as error:
                        raise SpecError(
                            "group", f"a window of rank {first + peer} where {error}", "a peer's window"
                        ) from None
                    finally:
                        os.close(window)
                        if pidfd >= 0:
                            os.close(pidfd)
            except SpecError as error:
                failure = {"group": error}
            except RankFailure as error:
                exchange.leave(error)
                raise
            agree(exchange, failure)
        finally:
            doorbell.close()
        if isinstance(args.faults, EpFaults):
            self._engine.set_faults(
                [
                    (KINDS.index(f.kind), PHASES.index(f.phase), f.operation, f.target, f.seconds)
                    for f in args.faults.faults
                ]
            )
        self._owner = object()
        self._names = tuple(f"{call}_{_ep.isa}" for call in OPERATIONS[1:])

    @property
    def owner(self) -> object:
        """Identity of this engine."""
        return self._owner

    def layout(self, topk_idx: Tensor) -> EpLayout:
        """Count in torch."""
        return count_layout(self._args, topk_idx)

    def dispatch(self, args: EpDispatchArgs) -> EpDispatched:
        """Exchange counts, write rows into the receivers' windows, and leave the wait for the others' rows."""
        return self._dispatch(args, (0, len(args.topk_idx)), 0, 0)

    def relay(self, args: EpDispatchArgs, tokens: Relayed) -> EpDispatched:
        """As `dispatch`, for tokens of several ranks."""
        positions, sent = tokens.positions.contiguous(), tokens.sent.contiguous()
        return self._dispatch(args, tokens.begin, positions.data_ptr(), sent.data_ptr())

    def _dispatch(self, args: EpDispatchArgs, begin: Sequence[int], positions: int, sent: int) -> EpDispatched:
        x, scales, idx, weights, handle = args.x, args.scales, args.topk_idx, args.topk_weights, args.handle
        n, topk = idx.shape
        row_bytes = x.shape[1] * x.itemsize
        scale_bytes = 0 if scales is None else scales.shape[1] * 4
        fields = [
            weights is not None,
            topk,
            3 if scales is not None else _TYPES[x.dtype],
            scale_bytes,
            scales is not None and scales.dtype == torch.int32,
            args.expand,
            args.expert_alignment,
            args.num_worst_tokens,
            0 if handle is None else _routes(handle).id,
        ]
        now = not (args.async_finish or args.return_recv_hook)
        try:
            launches[self._names[0]] += 1
            op, rows, recv_x, recv_scales, recv_idx, recv_weights, counts, dropped = self._engine.dispatch(
                x.data_ptr(),
                n,
                x.stride(0) * x.itemsize,
                row_bytes,
                0 if scales is None else scales.data_ptr(),
                0 if scales is None else scales.stride(0) * 4,
                scale_bytes,
                idx.data_ptr(),
                topk,
                0 if weights is None else weights.data_ptr(),
                args.expand,
                args.expert_alignment,
                args.num_worst_tokens,
                self._args.num_experts,
                begin,
                positions,
                sent,
                _BYTES if scales is not None else _TYPES[x.dtype],
                _INT32 if scales is None or scales.dtype == torch.int32 else _TYPES[torch.float32],
                now,
                weights is not None,
                None if handle is None else _routes(handle),
                fields,
            )
        except Exception as error:
            raise self._translated(error, DISPATCH_FIELDS) from None
        made = EpHandle(
            self._owner,
            n,
            rows,
            topk,
            args.expand,
            args.expert_alignment,
            args.num_worst_tokens,
            counts,
            dropped,
            idx,
            op.routes,
            Sources(op.routes, rows, self._origins, self._blocks, self._args),
        )
        return EpDispatched(
            recv_x if scales is None else recv_x.view(FP8),
            recv_scales,
            recv_idx,
            recv_weights,
            made,
            nothing if now else self._finish(op, DISPATCH_FIELDS),
        )

    def combine(self, args: EpCombineArgs) -> EpCombined:
        """Stage the rows where peers can read them; the finish fetches and sums."""
        handle, x = args.handle, args.x if args.x.is_contiguous() else args.x.contiguous()
        out = self._empty(handle.num_tokens, x.dtype)
        weights = (
            None if args.topk_weights is None else torch.empty(handle.num_tokens, handle.topk, dtype=torch.float32)
        )
        bias = [(one.data_ptr(), one.stride(0) * one.itemsize) for one in args.bias] + [(0, 0)] * 2
        kind = _TYPES[x.dtype]
        routes = _routes(handle)
        now = not (args.async_finish or args.return_recv_hook)
        try:
            launches[self._names[1]] += 1
            op = self._engine.combine(
                x.data_ptr(),
                x.shape[1] * x.itemsize,
                x.shape[1],
                kind,
                kind,
                routes,
                0 if args.topk_weights is None else args.topk_weights.data_ptr(),
                0 if weights is None else weights.data_ptr(),
                *bias[0],
                *bias[1],
                out.data_ptr(),
                x.shape[1] * x.itemsize,
                False,
                now,
                (weights is not None, routes.id),
            )
        except Exception as error:
            raise self._translated(error, COMBINE_FIELDS) from None
        if now:
            return EpCombined(out, weights, nothing)
        return EpCombined(out, weights, self._finish(op, COMBINE_FIELDS, (x, out, weights, args.bias)))

    def gather(self, x: Tensor, handle: EpHandle) -> Tensor:
        """One fetch into zeros; rows that a choice does not have stay 0."""
        out = torch.zeros(handle.num_tokens, handle.topk, x.shape[1], dtype=x.dtype)
        self._fetch(x.contiguous(), handle, out, x.shape[1] * x.itemsize, 2, True)
        return out

    def partial(self, x: Tensor, handle: EpHandle) -> Tensor:
        """The sum of `combine`, left in float32."""
        out = torch.empty(handle.num_tokens, x.shape[1], dtype=torch.float32)
        self._fetch(x.contiguous(), handle, out, x.shape[1] * 4, _TYPES[torch.float32], False)
        return out

    def _fetch(self, x: Tensor, handle: EpHandle, out: Tensor, stride: int, out_type: int, gather: bool) -> None:
        routes = _routes(handle)
        row = x.shape[1] * x.itemsize
        addresses = (x.data_ptr(), row, x.shape[1], _TYPES[x.dtype], out_type, routes, 0, 0, 0, 0, 0, 0)
        try:
            self._engine.combine(*addresses, out.data_ptr(), stride, gather, True, (2 + gather, routes.id))
        except Exception as error:
            raise self._translated(error, COMBINE_FIELDS) from None

    def low_latency_dispatch(self, args: EpLowLatencyDispatchArgs) -> EpLowLatencyDispatched:
        """Write rows, cast where asked, into the packed slots of the receivers' windows."""
        made = self._packed_outputs()
        waits = args.dispatch_wait_recv_cost_stats
        op = self._send_packed(args, made, (0, len(args.x)), 0, waits, None)
        finish = self._finish(op, PACKED_FIELDS, (made, args))
        return self._packed_result(args, op, *made, finish)

    def reserve_packed(self, args: EpLowLatencyDispatchArgs) -> EpLowLatencyDispatched:
        """Take one of the two slots."""
        op = self._engine.packed_reserve(self._args.hidden, _TYPES[args.x.dtype], _CAST_OF[args.cast], self._slots)
        if not op.reserved:
            got = f"a third result while two are live on rank {self._args.rank}"
            raise SpecError("low_latency_dispatch", got, "at most two: combine one, or let go of it, first")
        ranges = torch.zeros(self._args.local_experts, self._args.num_ranks, dtype=torch.int64)
        count = torch.zeros(self._args.local_experts, dtype=torch.int32)
        return self._packed_result(args, op, count, ranges, nothing)

    def relay_packed(self, args: EpLowLatencyDispatchArgs, reserved: EpLowLatencyDispatched, tokens: Relayed) -> Finish:
        """Send several ranks' tokens into a reserved slot."""
        made, positions = self._packed_outputs(), tokens.positions.contiguous()
        waits = torch.zeros(self._ranks, dtype=torch.int64)
        op = self._send_packed(
            replace(args, async_finish=False, return_recv_hook=False),
            made,
            tokens.begin,
            positions.data_ptr(),
            waits,
            _state(reserved.handle).op,
        )
        _state(reserved.handle).ranges = made[1]
        finish = self._finish(op, PACKED_FIELDS, (made, args, positions))

        def run() -> None:
            finish()
            reserved.recv_count.copy_(made[0])
            reserved.handle.layout_range.copy_(made[1].flatten(1)[:, self._blocks])
            if args.dispatch_wait_recv_cost_stats is not None:
                args.dispatch_wait_recv_cost_stats[self._first : self._first + self._ranks] += waits

        return run

    @property
    def _slots(self) -> int:
        return self._args.num_ranks * self._args.max_tokens_per_rank

    def _packed_outputs(self) -> tuple[Tensor, Tensor]:
        """Counts by expert and ranges by block, to be filled."""
        local = self._args.local_experts
        count = torch.empty(local, dtype=torch.int32)
        return count, torch.empty(local, self._sources * self._ranks, dtype=torch.int64)

    def _send_packed(
        self,
        args: EpLowLatencyDispatchArgs,
        made: tuple[Tensor, Tensor],
        begin: Sequence[int],
        positions: int,
        waits: Tensor | None,
        reserved: Any,
    ) -> Any:
        x, idx, stats = args.x, args.topk_idx, args.cumulative_local_expert_recv_stats
        cast = _CAST_OF[args.cast]
        try:
            launches[self._names[2]] += 1
            return self._engine.packed_dispatch(
                x.data_ptr(),
                len(x),
                x.stride(0) * x.itemsize,
                self._args.hidden,
                _TYPES[x.dtype],
                cast,
                idx.data_ptr(),
                idx.shape[1],
                self._args.num_experts,
                self._slots,
                0 if stats is None else stats.data_ptr(),
                0 if waits is None else waits.data_ptr(),
                args.return_recv_hook or args.async_finish,
                made[0].data_ptr(),
                made[1].data_ptr(),
                begin,
                positions,
                reserved,
                (idx.shape[1], cast),
            )
        except Exception as error:
            raise self._translated(error, PACKED_FIELDS) from None

    def _packed_result(
        self, args: EpLowLatencyDispatchArgs, op: Any, count: Tensor, ranges: Tensor, finish: Finish
    ) -> EpLowLatencyDispatched:
        """Tensors over an operation's slot."""
        local, slots, hidden, scales = self._args.local_experts, self._slots, self._args.hidden, None
        if args.cast == "none":
            rows = op.x(_TYPES[args.x.dtype], (local, slots, hidden))
        else:
            rows = op.x(_BYTES, (local, slots, hidden)).view(FP8)
            groups = -(-hidden // SCALE_GROUP)
            words, code = (-(-groups // 4), _INT32) if args.cast == "fp8_ue8m0" else (groups, _TYPES[torch.float32])
            scales = op.scales(code, (local, slots, words), (slots * words, 1, slots))
        handle = EpLowLatencyHandle(
            self._owner,
            op.idx(_INT32, (local, slots)),
            ranges,
            self._args.max_tokens_per_rank,
            hidden,
            self._args.num_experts,
            len(args.x),
            args.topk_idx.shape[1],
            PackedState(op.routes, op if finish is nothing else None, ranges),
        )
        return EpLowLatencyDispatched(rows, scales, count, handle, finish)

    def low_latency_combine(self, args: EpLowLatencyCombineArgs) -> EpLowLatencyCombined:
        """Stage packed rows, or take the lent memory as it is; the finish fetches and sums."""
        now = not (args.async_finish or args.return_recv_hook)
        stride = args.out.stride(0) * args.out.itemsize
        finish = self._fetch_packed(args, args.combine_wait_recv_cost_stats, args.out, stride, False, now)
        return EpLowLatencyCombined(args.out, finish)

    def gather_packed(self, args: EpLowLatencyCombineArgs) -> Tensor:
        """One fetch into zeros; rows that a choice does not have stay 0."""
        out = torch.zeros(*args.topk_idx.shape, self._args.hidden, dtype=args.x.dtype)
        counter = args.combine_wait_recv_cost_stats
        waits = None if counter is None else torch.zeros(self._ranks, dtype=torch.int64)
        self._fetch_packed(args, waits, out, 0, True, True)()
        if counter is not None and waits is not None:
            counter[self._first : self._first + self._ranks] += waits
        return out

    def _fetch_packed(
        self, args: EpLowLatencyCombineArgs, waits: Tensor | None, out: Tensor, stride: int, gather: bool, now: bool
    ) -> Finish:
        x, packed, lent = args.x, _state(args.handle), None
        if args.zero_copy:
            lent, packed.lent = packed.lent, None
            if lent is None or lent.address != x.data_ptr():
                error = SpecError("x", "other memory", "with zero_copy, the tensor low_latency_combine_buffer returned")
                raise self.refuse("low_latency_combine", error)
        try:
            launches[self._names[3]] += 1
            op = self._engine.packed_combine(
                x.data_ptr(),
                self._args.hidden,
                x.shape[1],
                _TYPES[x.dtype],
                packed.routes,
                args.topk_idx.data_ptr(),
                args.topk_weights.data_ptr(),
                out.data_ptr(),
                stride,
                0 if waits is None else waits.data_ptr(),
                lent,
                packed.ranges.data_ptr(),
                gather,
                now,
                (packed.routes.id,),
            )
        except Exception as error:
            raise self._translated(error, PACKED_COMBINE_FIELDS) from None
        return self._finish(op, PACKED_COMBINE_FIELDS, (args, out, waits, packed))

    def low_latency_combine_buffer(self, handle: EpLowLatencyHandle) -> Tensor:
        """Memory of the own window for the handle's next combine."""
        buffer, packed = self._args, _state(handle)
        shape = (buffer.local_experts, buffer.num_ranks * buffer.max_tokens_per_rank, buffer.hidden)
        if packed.lent is None:
            packed.lent = self._engine.lend(shape[0] * shape[1] * shape[2] * buffer.dtype.itemsize, False)
        tensor: Tensor = self._native.Engine.lent_tensor(packed.lent, _TYPES[buffer.dtype], shape)
        return tensor

    def refuse(self, phase: str, error: SpecError) -> SpecError:
        """Post the error in place of the call."""
        try:
            self._engine.refuse(error.argument, error.got, error.legal)
        except self._native.Refused as refused:
            return self._refusal(refused)
        except Exception as other:
            raise self._translated(other, ()) from None
        return error

    def set_mask(self, rank: int, masked: bool) -> None:
        """Mark the rank, and tell it."""
        self._engine.set_mask(rank - self._first, masked)

    def masked(self) -> Sequence[bool]:
        """As the engine decides; of ranks elsewhere it knows nothing."""
        found = [False] * self._args.num_ranks
        found[self._first : self._first + self._ranks] = self._engine.masked()
        return found

    def records(self) -> Sequence[Mapping[str, object]]:
        """Read every peer's recorder from its window."""
        found = []
        for rank in range(self._ranks):
            found += [record_of(self._first, rank, one) for one in self._engine.records(rank)]
        return sorted(found, key=lambda record: record["begin_ns"])

    def memory(self) -> Mapping[str, int]:
        """The window's size and the part in use."""
        return {"window": self._engine.bytes(), "in_use": self._engine.in_use()}

    def close(self) -> None:
        """Tell the peers and let the windows go."""
        self._engine.close()

    def _empty(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Memory for sums. Large ones come from the window, whose pages are in place and used again."""
        hidden = self._args.hidden
        size = rows * hidden * dtype.itemsize
        if size < _WINDOW_FROM:
            return torch.empty(rows, hidden, dtype=dtype)
        tensor: Tensor = self._native.Engine.lent_tensor(self._engine.lend(size, True), _TYPES[dtype], (rows, hidden))
        return tensor

    def _finish(self, op: Any, fields: Fields, keep: object = None) -> Finish:
        finish = self._engine.finish

        def run() -> None:
            nonlocal keep
            try:
                finish(op)
            except Exception as error:
                raise self._translated(error, fields) from None
            keep = None

        return run

    def _translated(self, error: Exception, fields: Fields) -> Exception:
        return translated(self._native, self._first, error, fields)

    def _refusal(self, error: Exception) -> SpecError:
        return refusal(self._first, error, ())


def _block_of(origins: list[list[int]], rank: int, here: int) -> int:
    """The block of a rank's tokens: the one of peer ``here``, if several peers speak for it."""
    peers = len(origins[0])
    found = [s * peers + peer for s, block in enumerate(origins) for peer, one in enumerate(block) if one == rank]
    return next((block for block in found if block % peers == here), found[0])


def _routes(handle: EpHandle) -> Any:
    return handle.state


def _state(handle: EpLowLatencyHandle) -> PackedState:
    assert isinstance(handle.state, PackedState)
    return handle.state


__all__ = ["CAPABILITIES", "CpuEpEngine", "launches", "missing", "open_engine"]
