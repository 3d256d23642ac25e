"""Expert parallelism over several nodes: torch.distributed between them, a node engine inside each.

A token bound for several ranks of a remote node crosses once, to the rank that `hal.ep.topology` names, which relays it
inside its node; rows come back the same way. Where failed ranks are masked it crosses to every rank it is for, so that
nobody's end takes another's tokens. Everything here is torch, so it serves every vendor; what happens inside a node is
the vendor's `NodeEngine`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from hal.ep.carrier import carrier
from hal.ep.crossing import Crossed, Crossing
from hal.ep.engine import (
    EpCombined,
    EpDispatched,
    EpEngine,
    EpLowLatencyCombined,
    EpLowLatencyDispatched,
    Finish,
)
from hal.ep.layout import count_layout
from hal.ep.relay import NodeEngine, Relayed
from hal.ep.rendezvous import connected
from hal.ep.streams import current_stream
from hal.ep.sums import spread, summed
from hal.ep.wire import Wire
from hal.spec.ep import (
    CASTS,
    EpBufferArgs,
    EpCombineArgs,
    EpDispatchArgs,
    EpHandle,
    EpLayout,
    EpLowLatencyCombineArgs,
    EpLowLatencyDispatchArgs,
    EpLowLatencyHandle,
)
from hal.spec.errors import SpecError

_T = TypeVar("_T")

_WAITS: Final = ("dispatch_wait_recv_cost_stats", "combine_wait_recv_cost_stats")
_COUNTERS: Final = ("cumulative_local_expert_recv_stats", *_WAITS)

Settle = Callable[[float], None]
"""Comes after a call, where the caller waits; is told how many seconds of the call had passed before that."""


class NodesEngine(EpEngine):
    """All nodes of a group.

    Parameters
    ----------
    args : EpBufferArgs
    node : NodeEngine
        Of this rank's node.
    """

    def __init__(self, args: EpBufferArgs, node: NodeEngine) -> None:
        self._args = args
        self._node_engine = node
        first = args.rank // args.ranks_per_node * args.ranks_per_node
        self._here = range(first, min(first + args.ranks_per_node, args.num_ranks))
        self._owner = object()
        self._wire = Wire(args, connected(args), carrier(args))
        self._crossing = Crossing(args, self._wire)
        self._worker: ThreadPoolExecutor | None = None

    @property
    def owner(self) -> object:
        """Identity of this engine."""
        return self._owner

    def layout(self, topk_idx: Tensor) -> EpLayout:
        """Count in torch."""
        return count_layout(self._args, topk_idx)

    def dispatch(self, args: EpDispatchArgs) -> EpDispatched:
        """Send tokens to their nodes, once each, and relay them there."""
        return self._run(lambda: self._dispatch(args))

    def _dispatch(self, args: EpDispatchArgs) -> EpDispatched:
        x, scales, idx, weights, cached = args.x, args.scales, args.topk_idx, args.topk_weights, args.handle
        n, topk = idx.shape
        state: Crossed | None = None if cached is None else _state(cached)
        if state is None:
            self._require_experts("dispatch", idx)
        chosen = self._crossing.choose(idx) if state is None else state.chosen
        fields = [
            int(weights is not None),
            topk,
            x.itemsize,
            0 if scales is None else scales.shape[1],
            int(scales is not None and scales.dtype == torch.int32),
            int(args.expand),
            args.expert_alignment,
            args.num_worst_tokens,
            0 if state is None else 1,
        ]
        counts = self._agree("dispatch", fields, self._crossing.counts(chosen, idx))
        optional = [(one, 0) for one in (scales, weights) if one is not None]
        parts, blank = zip((x, 0), (idx, -1), *optional, strict=True)
        merged, tokens = self._crossing.exchange(parts, blank, chosen, counts, "dispatch")
        merged[1] = self._crossing.share(merged[1], tokens.begin)
        relay = replace(
            args,
            x=merged[0],
            topk_idx=merged[1],
            scales=None if scales is None else merged[2],
            topk_weights=None if weights is None else merged[-1],
            handle=None,
        )
        inner = self._wire.inside(lambda: self._node_engine.relay(relay, tokens))
        routes = Crossed(inner.handle, merged[1], tokens.begin, chosen)
        # The caller may use its topk_idx for something else; a cached handle's is nobody else's.
        kept = idx.clone() if cached is None else idx
        handle = replace(inner.handle, owner=self._owner, num_tokens=n, topk_idx=kept, state=routes)
        return replace(inner, handle=handle, finish=lambda: self._wire.inside(inner.finish))

    def combine(self, args: EpCombineArgs) -> EpCombined:
        """Bring rows to the ranks that relayed them, from there to their tokens' ranks, and sum."""
        return self._run(lambda: self._combine(args))

    def _combine(self, args: EpCombineArgs) -> EpCombined:
        handle, state = args.handle, _state(args.handle)
        n, topk = handle.num_tokens, handle.topk
        weights = args.topk_weights
        fields = [int(weights is not None), topk, 0, 0, 0, int(handle.expand)]
        self._agree("combine", fields, ())
        total = torch.zeros(n, self._args.hidden, dtype=torch.float32, device=args.x.device)
        for bias in args.bias:
            total += bias.float()
        idx, first = handle.topk_idx, self._crossing.first_rows(handle.topk_idx, handle.expand)
        if self._args.pre_reduce and not self._args.mask_ranks:
            sums_here = self._wire.inside(lambda: self._node_engine.partial(args.x, state.inner))
            self._crossing.add_nodes(total, self._crossing.give_back(sums_here, state, "combine"), idx, state)
        else:
            table = self._rows(args.x, state, handle.expand)
            if self._args.pre_reduce:
                self._crossing.add_in_order(total, self._crossing.sums_of_nodes(table, idx), idx)
            else:
                for k in range(topk):
                    total += table[:, k].float().where(first[:, k, None], 0.0)
        sums = None
        if weights is not None:
            table = self._rows(weights[:, None] if handle.expand else weights, state, handle.expand)
            sums = spread(table[:, :, 0], idx, first) if handle.expand else summed(table, first)
        return EpCombined(total.to(args.x.dtype), sums, lambda: None)

    def _rows(self, x: Tensor, state: Crossed, expand: bool) -> Tensor:
        """Rows [n, K, C] of this rank's tokens, from wherever they are."""
        sent = self._wire.inside(lambda: self._node_engine.gather(x, state.inner))
        return self._crossing.table(sent, state, lambda idx: self._crossing.first_rows(idx, expand), "combine")

    def low_latency_dispatch(self, args: EpLowLatencyDispatchArgs) -> EpLowLatencyDispatched:
        """Send tokens to their nodes, once each and uncast, and relay them there into packed slots."""
        self._require_experts("low_latency_dispatch", args.topk_idx)
        try:
            reserved = self._node_engine.reserve_packed(args)
        except SpecError as error:
            raise self.refuse("low_latency_dispatch", error) from None
        state = Crossed(reserved.handle, args.topk_idx, [], self._crossing.choose(args.topk_idx))
        deferred = args.async_finish or args.return_recv_hook
        # A call that returns has no more use for what it was given, and writes none of it before its hook runs.
        given, settle = (args, _settled) if not deferred else _with_own_counters(_sent(args, "x", "topk_idx"))

        def send() -> None:
            fields = [0, given.topk_idx.shape[1], CASTS.index(given.cast)]
            counts = self._crossing.counts(state.chosen, given.topk_idx)
            waits = given.dispatch_wait_recv_cost_stats
            announced = self._agree("low_latency_dispatch", fields, counts, waits)
            parts = [given.x, given.topk_idx]
            merged, tokens = self._crossing.exchange(parts, (0, -1), state.chosen, announced, "low_latency_dispatch")
            state.idx, state.begin = self._crossing.share(merged[1], tokens.begin), tokens.begin
            relay = replace(given, x=merged[0], topk_idx=state.idx)
            self._wire.inside(lambda: self._node_engine.relay_packed(relay, reserved, tokens)())

        finish = self._post(send, deferred, settle)
        handle = replace(
            reserved.handle, owner=self._owner, num_tokens=len(args.x), topk=args.topk_idx.shape[1], state=state
        )
        return replace(reserved, handle=handle, finish=finish)

    def low_latency_combine(self, args: EpLowLatencyCombineArgs) -> EpLowLatencyCombined:
        """Bring packed rows to the ranks that relayed them, from there to their tokens' ranks, and sum weighted."""
        handle, state = args.handle, _state(args.handle)
        deferred = args.async_finish or args.return_recv_hook
        total = torch.zeros(handle.num_tokens, self._args.hidden, dtype=torch.float32, device=args.x.device)
        given = args
        settle: Settle = _settled
        if deferred:
            # What was lent for this handle is the caller's again only once the sums are there.
            given, settle = _with_own_counters(args if args.zero_copy else _sent(args, "x"))

        def fetch() -> None:
            mine = self._crossing.own_idx(state)
            idx = given.topk_idx
            if bool(((idx != mine) & (idx >= 0)).any()):
                legal = "what the dispatch of this handle was given, or -1"
                raise self._refused("low_latency_combine", SpecError("topk_idx", "other routes", legal))
            waits = given.combine_wait_recv_cost_stats
            self._agree("low_latency_combine", [0, handle.topk], (), waits)
            relay = replace(given, topk_idx=state.idx, handle=state.inner)
            sent = self._wire.inside(lambda: self._node_engine.gather_packed(relay))
            table = self._crossing.table(sent, state, lambda idx: idx >= 0, "low_latency_combine")
            for k in range(handle.topk):
                weighted = table[:, k].float() * given.topk_weights[:, k, None]
                total.add_(weighted.where((idx[:, k] >= 0)[:, None], 0.0))

        def write(unawaited: float) -> None:
            args.out.copy_(total)
            settle(unawaited)

        return EpLowLatencyCombined(args.out, self._post(fetch, deferred, write))

    def low_latency_combine_buffer(self, handle: EpLowLatencyHandle) -> Tensor:
        """Memory of the node engine."""
        return self._node_engine.low_latency_combine_buffer(_state(handle).inner)

    def refuse(self, phase: str, error: SpecError) -> SpecError:
        """Tell every rank of every node."""
        return self._run(lambda: self._refused(phase, error))

    def _refused(self, phase: str, error: SpecError) -> SpecError:
        try:
            self._wire.agree("refused", (), (), error)
        except SpecError as agreed:
            return agreed
        return error

    def set_mask(self, rank: int, masked: bool) -> None:
        """Leave a rank out of the wire's calls, and of the node's where it is one of them."""
        self._run(lambda: self._set_mask(rank, masked))

    def _set_mask(self, rank: int, masked: bool) -> None:
        if masked:
            self._wire.absent.add(rank)
        else:
            self._wire.absent.discard(rank)
        if rank in self._here:
            self._node_engine.set_mask(rank, masked)

    def masked(self) -> Sequence[bool]:
        """Those that the wire or the node engine carries on without."""
        inside = self._node_engine.masked()
        return [rank in self._wire.absent or inside[rank] for rank in range(self._args.num_ranks)]

    def records(self) -> Sequence[Mapping[str, object]]:
        """The flight recorder of this node."""
        return self._node_engine.records()

    def memory(self) -> Mapping[str, int]:
        """The node engine's windows."""
        return self._node_engine.memory()

    def close(self) -> None:
        """Close the node engine, which ends what still runs behind the caller's back."""
        self._node_engine.close()
        self._wire.close()
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)

    def _run(self, job: Callable[[], _T]) -> _T:
        """Make a call after all that were deferred before it."""
        if self._worker is None:
            return self._wire.blamed(job, self._node_engine.fail)
        return self._submit(self._worker, job).result()

    def _post(self, job: Callable[[], None], deferred: bool, settle: Settle) -> Finish:
        """Make a call now, or behind the caller's back, in the order of the calls; what is returned waits for it.

        ``settle`` comes after it, where the caller waits: it alone writes to what the caller gave.
        """
        if not deferred:
            self._run(job)
            settle(0.0)
            return _nothing
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "hal-ep-nodes")
        begun: list[float] = []

        def timed() -> None:
            begun.append(time.monotonic())
            job()

        under_way = self._submit(self._worker, timed)

        def finish() -> None:
            asked = time.monotonic()
            under_way.result()
            settle(max(0.0, asked - begun[0]))

        return finish

    def _submit(self, worker: ThreadPoolExecutor, job: Callable[[], _T]) -> Future[_T]:
        within, mode = current_stream(self._args.device), torch.inference_mode(torch.is_inference_mode_enabled())

        def run() -> _T:
            # Of a tensor made in inference mode nothing is written outside it, and a thread has a mode of its own.
            with within, mode:
                return self._wire.blamed(job, self._node_engine.fail)

        return worker.submit(run)

    def _agree(
        self, kind: str, fields: Sequence[int], counts: Sequence[int], waits: Tensor | None = None
    ) -> list[list[int]]:
        """Exchange headers; whoever is lost to the wire or to the node is lost to both."""
        lost = {rank for rank, masked in enumerate(self._node_engine.masked()) if masked}
        self._wire.absent |= lost
        found = self._wire.agree(kind, fields, counts, waits=waits)
        for rank in self._wire.absent.intersection(self._here) - lost:
            self._node_engine.set_mask(rank, True)
        return found

    def _require_experts(self, phase: str, idx: Tensor) -> None:
        if len(idx) and bool(((idx < -1) | (idx >= self._args.num_experts)).any()):
            legal = f"-1 (no expert) or 0…{self._args.num_experts - 1}"
            error = SpecError("topk_idx", f"an expert out of range on rank {self._args.rank}", legal)
            raise self._refused(phase, error) if phase == "dispatch" else self.refuse(phase, error)


_Packed = TypeVar("_Packed", EpLowLatencyDispatchArgs, EpLowLatencyCombineArgs)


def _nothing() -> None:
    """Of a call that is complete."""


def _settled(unawaited: float) -> None:
    """Of a call that wrote what it was to write."""


def _sent(args: _Packed, *names: str) -> _Packed:
    """The call with tensors of its own in place of these, which the caller may use for something else."""
    return replace(args, **{name: getattr(args, name).clone() for name in names})


def _with_own_counters(args: _Packed) -> tuple[_Packed, Settle]:
    """The call with counters of its own, and what adds them to the caller's: of waits, those that the caller saw."""
    counters = {name: given for name in _COUNTERS if (given := getattr(args, name, None)) is not None}
    mine: dict[str, Any] = {name: torch.zeros_like(given) for name, given in counters.items()}

    def add(unawaited: float) -> None:
        for name, given in counters.items():
            unseen = int(unawaited * 1e6) if name in _WAITS else 0
            given.add_((mine[name] - unseen).clamp_(min=0))

    return replace(args, **mine), add


def _state(handle: EpHandle | EpLowLatencyHandle) -> Crossed:
    assert isinstance(handle.state, Crossed)
    return handle.state


__all__: Final = ["NodeEngine", "NodesEngine", "Relayed"]
