"""Expert parallelism over several nodes: torch.distributed between them, a node engine inside each.

A token bound for several ranks of a remote node crosses once, to the rank that `hal.ep.topology` names, which relays it
inside its node; rows come back the same way. Everything here is torch, so it serves every vendor; what happens inside a
node is the vendor's `NodeEngine`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

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
from hal.ep.layout import count_layout
from hal.ep.topology import Topology
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
from hal.spec.errors import SpecError, UnsupportedError

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class Relayed:
    """Tokens of several ranks for which one rank of this node speaks.

    Attributes
    ----------
    begin : list of int
        Where the tokens of each of `Topology.sources` begin, and their end.
    positions : Tensor
        int32: position of each token at its source.
    sent : Tensor
        [sources, R] int32: how many tokens each source sends to each rank of the group.
    """

    begin: list[int]
    positions: Tensor
    sent: Tensor


class NodeEngine(EpEngine):
    """An engine of one node's ranks that can also relay tokens of ranks elsewhere.

    It delivers what it relays in the order of `Topology.sources`, that is, of the source's rank in the whole group.
    """

    @abstractmethod
    def relay(self, args: EpDispatchArgs, tokens: Relayed) -> EpDispatched:
        """Dispatch relayed tokens within the node; experts elsewhere are ignored."""

    @abstractmethod
    def gather(self, x: Tensor, handle: EpHandle) -> Tensor:
        """Bring the rows of x [num_recv_tokens, C] back unsummed: [n, K, C], 0 where a choice has no row here."""

    @abstractmethod
    def partial(self, x: Tensor, handle: EpHandle) -> Tensor:
        """Bring the rows of x back and sum those of this node, in top-k order: float32 [n, C]."""

    @abstractmethod
    def reserve_packed(self, args: EpLowLatencyDispatchArgs) -> EpLowLatencyDispatched:
        """The result of a coming `relay_packed`, its tensors empty and its ``finish`` of no use.

        Raises
        ------
        SpecError
            Two results are live already.
        """

    @abstractmethod
    def relay_packed(self, args: EpLowLatencyDispatchArgs, reserved: EpLowLatencyDispatched, tokens: Relayed) -> Finish:
        """Send relayed tokens to the packed slots of this node's experts, filling a reserved result."""

    @abstractmethod
    def gather_packed(self, args: EpLowLatencyCombineArgs) -> Tensor:
        """Bring packed rows back unsummed: [n, K, H] of the relayed tokens, 0 where a choice has no row here."""


@dataclass(slots=True, eq=False)
class _Routes:
    """What a handle of this engine carries: the relayed dispatch, and who sent what."""

    inner: Any
    idx: Tensor  # of the relayed tokens
    begin: list[int]
    chosen: list[Tensor]  # for each node the positions of this rank's tokens that go there


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
        self._topology = Topology(args.num_ranks, args.ranks_per_node)
        self._node = self._topology.node(args.rank)
        self._sources = self._topology.sources(args.rank)
        self._own = self._sources.index(args.rank)
        self._owner = object()
        self._wire = Wire(args)
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
        state: _Routes | None = None if cached is None else _state(cached)
        if state is None:
            self._require_experts("dispatch", idx)
        chosen = self._chosen(idx) if state is None else state.chosen
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
        counts = self._wire.agree("dispatch", fields, self._counts(chosen, idx))
        parts = [x, idx] + ([] if scales is None else [scales]) + ([] if weights is None else [weights])
        merged, tokens = self._exchange(parts, chosen, counts, "dispatch")
        relay = replace(
            args,
            x=merged[0],
            topk_idx=merged[1],
            scales=None if scales is None else merged[2],
            topk_weights=None if weights is None else merged[-1],
            handle=None,
        )
        inner = self._wire.inside(lambda: self._node_engine.relay(relay, tokens))
        routes = _Routes(inner.handle, merged[1], tokens.begin, chosen)
        handle = replace(inner.handle, owner=self._owner, num_tokens=n, topk_idx=idx, state=routes)
        return replace(inner, handle=handle, finish=lambda: self._wire.inside(inner.finish))

    def combine(self, args: EpCombineArgs) -> EpCombined:
        """Bring rows to the ranks that relayed them, from there to their tokens' ranks, and sum."""
        return self._run(lambda: self._combine(args))

    def _combine(self, args: EpCombineArgs) -> EpCombined:
        handle, state = args.handle, _state(args.handle)
        n, topk = handle.num_tokens, handle.topk
        weights = args.topk_weights
        fields = [int(weights is not None), topk, 0, 0, 0, int(handle.expand)]
        self._wire.agree("combine", fields, ())
        total = torch.zeros(n, self._args.hidden, dtype=torch.float32, device=args.x.device)
        for bias in args.bias:
            total += bias.float()
        first = self._first_rows(handle)
        if self._args.pre_reduce:
            sums_here = self._wire.inside(lambda: self._node_engine.partial(args.x, state.inner))
            self._add_nodes(total, self._return(sums_here, state, "combine"), handle.topk_idx, state)
        else:
            sent = self._wire.inside(lambda: self._node_engine.gather(args.x, state.inner))
            table = self._table(sent, handle.topk_idx, state, "combine")
            for k in range(topk):
                total += table[:, k].float().where(first[:, k, None], 0.0)
        sums = None
        if weights is not None:
            columns = weights[:, None] if handle.expand else weights
            sent = self._wire.inside(lambda: self._node_engine.gather(columns, state.inner))
            table = self._table(sent, handle.topk_idx, state, "combine")
            if handle.expand:
                sums = self._spread(table[:, :, 0], handle.topk_idx, first)
            else:
                sums = torch.zeros(n, topk, dtype=torch.float32, device=args.x.device)
                for k in range(topk):
                    sums += table[:, k].where(first[:, k, None], 0.0)
        return EpCombined(total.to(args.x.dtype), sums, lambda: None)

    def low_latency_dispatch(self, args: EpLowLatencyDispatchArgs) -> EpLowLatencyDispatched:
        """Send tokens to their nodes, once each and uncast, and relay them there into packed slots."""
        self._require_experts("low_latency_dispatch", args.topk_idx)
        try:
            reserved = self._node_engine.reserve_packed(args)
        except SpecError as error:
            raise self.refuse("low_latency_dispatch", error) from None
        state = _Routes(reserved.handle, args.topk_idx, [], self._chosen(args.topk_idx))
        deferred = args.async_finish or args.return_recv_hook
        # A call that returns has no more use for what it was given.
        given = replace(args, x=args.x.clone(), topk_idx=args.topk_idx.clone()) if deferred else args

        def send() -> None:
            fields = [0, given.topk_idx.shape[1], CASTS.index(given.cast)]
            counts = self._counts(state.chosen, given.topk_idx)
            waits = given.dispatch_wait_recv_cost_stats
            announced = self._wire.agree("low_latency_dispatch", fields, counts, waits=waits)
            parts = [given.x, given.topk_idx]
            merged, tokens = self._exchange(parts, state.chosen, announced, "low_latency_dispatch")
            state.idx, state.begin = merged[1], tokens.begin
            relay = replace(given, x=merged[0], topk_idx=merged[1])
            self._wire.inside(lambda: self._node_engine.relay_packed(relay, reserved, tokens)())

        finish = self._post(send, deferred)
        handle = replace(
            reserved.handle, owner=self._owner, num_tokens=len(args.x), topk=args.topk_idx.shape[1], state=state
        )
        return replace(reserved, handle=handle, finish=finish)

    def low_latency_combine(self, args: EpLowLatencyCombineArgs) -> EpLowLatencyCombined:
        """Bring packed rows to the ranks that relayed them, from there to their tokens' ranks, and sum weighted."""
        handle, state = args.handle, _state(args.handle)
        deferred = args.async_finish or args.return_recv_hook

        def fetch() -> None:
            mine = state.idx[state.begin[self._own] : state.begin[self._own + 1]]
            idx = args.topk_idx
            if bool(((idx != mine) & (idx >= 0)).any()):
                legal = "what the dispatch of this handle was given, or -1"
                raise self._refused("low_latency_combine", SpecError("topk_idx", "other routes", legal))
            waits = args.combine_wait_recv_cost_stats
            self._wire.agree("low_latency_combine", [0, handle.topk], (), waits=waits)
            relay = replace(args, topk_idx=state.idx, handle=state.inner)
            sent = self._wire.inside(lambda: self._node_engine.gather_packed(relay))
            table = self._table(sent, mine, state, "low_latency_combine")
            total = torch.zeros(len(idx), self._args.hidden, dtype=torch.float32, device=args.x.device)
            for k in range(handle.topk):
                weighted = table[:, k].float() * args.topk_weights[:, k, None]
                total += weighted.where((idx[:, k] >= 0)[:, None], 0.0)
            args.out.copy_(total)

        return EpLowLatencyCombined(args.out, self._post(fetch, deferred))

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
        """Refuse: a buffer over several nodes masks nobody."""
        raise UnsupportedError("nodes", "mask_ranks", True, False)

    def masked(self) -> Sequence[bool]:
        """Nobody."""
        return [False] * self._args.num_ranks

    def records(self) -> Sequence[Mapping[str, object]]:
        """The flight recorder of this node."""
        return self._node_engine.records()

    def memory(self) -> Mapping[str, int]:
        """The node engine's windows."""
        return self._node_engine.memory()

    def close(self) -> None:
        """Close the node engine, which ends what still runs behind the caller's back."""
        self._node_engine.close()
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)

    def _run(self, job: Callable[[], _T]) -> _T:
        """Make a call after all that were deferred before it."""
        return job() if self._worker is None else self._worker.submit(job).result()

    def _post(self, job: Callable[[], None], deferred: bool) -> Finish:
        """Make a call now, or behind the caller's back, in the order of the calls; what is returned waits for it."""
        if not deferred:
            self._run(job)
            return lambda: None
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "hal-ep-nodes")
        posted: Future[None] = self._worker.submit(job)
        return posted.result

    def _require_experts(self, phase: str, idx: Tensor) -> None:
        if len(idx) and bool(((idx < -1) | (idx >= self._args.num_experts)).any()):
            legal = f"-1 (no expert) or 0…{self._args.num_experts - 1}"
            error = SpecError("topk_idx", f"an expert out of range on rank {self._args.rank}", legal)
            raise self._refused(phase, error) if phase == "dispatch" else self.refuse(phase, error)

    def _node_of(self, idx: Tensor) -> Tensor:
        """The node of each choice, -1 for none."""
        span = self._args.ranks_per_node * self._args.local_experts
        return torch.where(idx >= 0, idx // span, -1)

    def _chosen(self, idx: Tensor) -> list[Tensor]:
        node = self._node_of(idx)
        return [(node == one).any(1).nonzero()[:, 0] for one in range(self._args.num_nodes)]

    def _counts(self, chosen: list[Tensor], idx: Tensor) -> list[int]:
        """Tokens of this rank for each node, then for each rank."""
        per_rank: list[int] = count_layout(self._args, idx).num_tokens_per_rank.tolist()
        return [len(one) for one in chosen] + per_rank

    def _first_rows(self, handle: EpHandle) -> Tensor:
        """[n, K] bool: the choices that carry a row, the first of each rank or, expanded, of each expert."""
        idx = handle.topk_idx
        key = idx if handle.expand else torch.where(idx >= 0, idx // self._args.local_experts, -1)
        earlier = (key[:, :, None] == key[:, None, :]).tril(-1).any(2)
        return (idx >= 0) & ~earlier

    def _spread(self, values: Tensor, idx: Tensor, first: Tensor) -> Tensor:
        """Give every choice of an expert the value of the first one."""
        same = (idx[:, :, None] == idx[:, None, :]) & first[:, None, :]
        return torch.where(idx >= 0, (same * values[:, None, :]).sum(2), 0.0)

    def _table(self, gathered: Tensor, idx: Tensor, state: _Routes, phase: str) -> Tensor:
        """Rows [n, K, C] of this rank's tokens from what every node gathered for it."""
        parts = self._return(gathered, state, phase)
        table = parts[self._node].clone()
        node_of = self._node_of(idx)
        for node, rows in enumerate(parts):
            if node != self._node:
                # A choice has a row on one node only, and everything else is 0.
                chosen = state.chosen[node]
                table[chosen] = torch.where((node_of[chosen] == node)[:, :, None], rows, table[chosen])
        return table

    def _add_nodes(self, total: Tensor, parts: list[Tensor], idx: Tensor, state: _Routes) -> None:
        """Add node sums in the order in which nodes first appear among a token's choices."""
        node = self._node_of(idx)
        first = ~(node[:, :, None] == node[:, None, :]).tril(-1).any(2)
        dense = []
        for one, part in enumerate(parts):
            rows = torch.zeros_like(total)
            if one == self._node:
                rows.copy_(part)
            else:
                rows[state.chosen[one]] = part
            dense.append(rows)
        for k in range(idx.shape[1]):
            for one, rows in enumerate(dense):
                total += rows.where(((node[:, k] == one) & first[:, k])[:, None], 0.0)

    def _exchange(
        self, parts: list[Tensor], chosen: list[Tensor], counts: list[list[int]], phase: str
    ) -> tuple[list[Tensor], Relayed]:
        """Send each node its chosen tokens; all tokens for which this rank speaks, in the order of their sources."""
        n, device = len(parts[0]), parts[0].device
        parts = [*parts, torch.arange(n, dtype=torch.int32, device=device)[:, None]]
        sends, receives = [], []
        for node, tokens in enumerate(chosen):
            if node != self._node:
                peer = self._topology.relay(self._args.rank, node)
                sends += [(peer, part[tokens].contiguous()) for part in parts]
        blocks: list[list[Tensor]] = []
        begin = [0]
        for source in self._sources:
            if source == self._args.rank:
                blocks.append(parts)
            else:
                count = 0 if source is None else counts[source][self._node]
                blocks.append([part.new_empty((count, part.shape[1])) for part in parts])
                receives += [] if source is None else [(source, part) for part in blocks[-1]]
            begin.append(begin[-1] + len(blocks[-1][0]))
        self._wire.trade(sends, receives, phase)
        merged = [torch.cat([block[i] for block in blocks]) for i in range(len(parts))]
        nothing = [0] * self._args.num_ranks
        sent = [nothing if source is None else counts[source][self._args.num_nodes :] for source in self._sources]
        return merged[:-1], Relayed(begin, merged[-1][:, 0], torch.tensor(sent, dtype=torch.int32))

    def _return(self, rows: Tensor, state: _Routes, phase: str) -> list[Tensor]:
        """Send relayed tokens' rows back to where they came from; for each node what came for this rank."""
        begin, sends, receives, found = state.begin, [], [], []
        for i, source in enumerate(self._sources):
            if source is not None and source != self._args.rank:
                sends.append((source, rows[begin[i] : begin[i + 1]].contiguous()))
        for node in range(self._args.num_nodes):
            if node == self._node:
                found.append(rows[begin[self._own] : begin[self._own + 1]])
                continue
            found.append(rows.new_empty((len(state.chosen[node]), *rows.shape[1:])))
            receives.append((self._topology.relay(self._args.rank, node), found[-1]))
        self._wire.trade(sends, receives, phase)
        return found


def _state(handle: EpHandle | EpLowLatencyHandle) -> _Routes:
    assert isinstance(handle.state, _Routes)
    return handle.state


__all__: Final = ["NodeEngine", "NodesEngine", "Relayed"]
