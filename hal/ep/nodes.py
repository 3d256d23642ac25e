"""Expert parallelism over several nodes: torch.distributed between them, a node engine inside each.

Rank i of a node talks to rank i of every other node. A token bound for several ranks of a remote node crosses once, to
the rank with the same number there, which relays it inside its node; rows come back the same way. Everything here is
torch, so it serves every vendor; what happens inside a node is the vendor's `NodeEngine`.
"""

from __future__ import annotations

import contextlib
import struct
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hal.ep.engine import EpCombined, EpDispatched, EpEngine, EpLowLatencyCombined, EpLowLatencyDispatched
from hal.ep.layout import count_layout
from hal.spec.ep import (
    EpBufferArgs,
    EpCombineArgs,
    EpDispatchArgs,
    EpHandle,
    EpLayout,
    EpLowLatencyCombineArgs,
    EpLowLatencyDispatchArgs,
    EpLowLatencyHandle,
)
from hal.spec.errors import RankFailure, SpecError, UnsupportedError


class NodeEngine(EpEngine):
    """An engine of one node's ranks that can also relay tokens of ranks elsewhere.

    Its ``dispatch`` takes tokens of one rank of every node (``begin`` tells where each node's tokens start) and orders
    what it delivers by the source's rank in the whole group.
    """

    @abstractmethod
    def relay(self, args: EpDispatchArgs, begin: Sequence[int]) -> EpDispatched:
        """Dispatch within the node tokens that came from several nodes; experts elsewhere are ignored."""

    @abstractmethod
    def gather(self, x: Tensor, handle: EpHandle) -> Tensor:
        """Bring the rows of x [num_recv_tokens, C] back unsummed: [n, K, C], 0 where a choice has no row here."""

    @abstractmethod
    def partial(self, x: Tensor, handle: EpHandle) -> Tensor:
        """Bring the rows of x back and sum those of this node, in top-k order: float32 [n, C]."""


_T = TypeVar("_T")


@dataclass(slots=True, eq=False)
class _Routes:
    """What a handle of this engine carries: the relayed dispatch, and who sent what."""

    inner: EpHandle
    begin: list[int]
    chosen: list[Tensor]  # for each node the positions of this rank's tokens that go there


_KIND: Final = {"dispatch": 1, "combine": 2, "refused": 3, "failed": 4}
_LAST_WAIT: Final = timedelta(seconds=1)
_HEADERS, _ROWS = 1, 2  # tags: a header is never taken for rows
_FIELDS: Final = (
    "call",
    "topk_weights",
    "topk_idx",
    "x",
    "x",
    "x",
    "expand",
    "expert_alignment",
    "num_worst_tokens",
    "handle",
)


class NodesEngine(EpEngine):
    """All nodes of a group.

    Parameters
    ----------
    args : EpBufferArgs
    node : NodeEngine
        Of this rank's node.

    Raises
    ------
    UnsupportedError
        Nodes of different sizes.
    """

    def __init__(self, args: EpBufferArgs, node: NodeEngine) -> None:
        self._args = args
        self._node_engine = node
        self._per_node = args.ranks_per_node
        self._node, self._local = divmod(args.rank, self._per_node)
        self._owner = object()
        self._calls = 0
        self._timeout = timedelta(seconds=args.timeout)
        self._broken: RankFailure | None = None

    @staticmethod
    def require(args: EpBufferArgs, backend: str) -> None:
        """Refuse what there is no path for, before any rank waits for another."""
        if args.num_ranks % args.ranks_per_node:
            raise UnsupportedError(backend, "ranks_per_node", args.ranks_per_node, "nodes of equal size")

    @property
    def owner(self) -> object:
        """Identity of this engine."""
        return self._owner

    def layout(self, topk_idx: Tensor) -> EpLayout:
        """Count in torch."""
        return count_layout(self._args, topk_idx)

    def dispatch(self, args: EpDispatchArgs) -> EpDispatched:
        """Send tokens to their nodes, once each, and relay them there."""
        x, scales, idx, weights = args.x, args.scales, args.topk_idx, args.topk_weights
        n, topk = idx.shape
        cached = args.handle
        state: _Routes | None = None if cached is None else _state(cached)
        bad = None
        if state is None and n and bool(((idx < -1) | (idx >= self._args.num_experts)).any()):
            legal = f"-1 (no expert) or 0…{self._args.num_experts - 1}"
            bad = SpecError("topk_idx", f"an expert out of range on rank {self._args.rank}", legal)
        if bad is not None:
            raise self.refuse("dispatch", bad)
        chosen = self._chosen(idx) if state is None else state.chosen
        fields = [
            _KIND["dispatch"],
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
        headers = self._agree(fields, [len(one) for one in chosen])
        parts = [x, idx] + ([] if scales is None else [scales]) + ([] if weights is None else [weights])
        relayed = self._exchange(parts, chosen, headers)
        begin = [0]
        for node, rows in enumerate(relayed):
            begin.append(begin[-1] + (n if node == self._node else len(rows[0])))
        merged = [
            torch.cat([parts[i] if node == self._node else rows[i] for node, rows in enumerate(relayed)])
            for i in range(len(parts))
        ]
        relay = replace(
            args,
            x=merged[0],
            topk_idx=merged[1],
            scales=None if scales is None else merged[2],
            topk_weights=None if weights is None else merged[-1],
            handle=None,
        )
        inner = self._inside(lambda: self._node_engine.relay(relay, begin))
        handle = replace(
            inner.handle, owner=self._owner, num_tokens=n, topk_idx=idx, state=_Routes(inner.handle, begin, chosen)
        )
        return replace(inner, handle=handle, finish=lambda: self._inside(inner.finish))

    def combine(self, args: EpCombineArgs) -> EpCombined:
        """Bring rows to the ranks that relayed them, from there to their tokens' ranks, and sum."""
        handle, state = args.handle, _state(args.handle)
        n, topk = handle.num_tokens, handle.topk
        weights = args.topk_weights
        fields = [_KIND["combine"], int(weights is not None), topk, 0, 0, 0, int(handle.expand), 0, 0, 0]
        self._agree(fields, [len(one) for one in state.chosen])
        total = torch.zeros(n, self._args.hidden, dtype=torch.float32, device=args.x.device)
        for bias in args.bias:
            total += bias.float()
        first = self._first_rows(handle)
        if self._args.pre_reduce:
            parts = self._return(self._inside(lambda: self._node_engine.partial(args.x, state.inner)), state)
            self._add_nodes(total, parts, handle.topk_idx, state)
        else:
            table = self._table(self._inside(lambda: self._node_engine.gather(args.x, state.inner)), state, n)
            for k in range(topk):
                total += table[:, k].float().where(first[:, k, None], 0.0)
        sums = None
        if weights is not None:
            columns = weights[:, None] if handle.expand else weights
            sent = self._table(self._inside(lambda: self._node_engine.gather(columns, state.inner)), state, n)
            if handle.expand:
                sums = self._spread(sent[:, :, 0], handle.topk_idx, first)
            else:
                sums = torch.zeros(n, topk, dtype=torch.float32, device=args.x.device)
                for k in range(topk):
                    sums += sent[:, k].where(first[:, k, None], 0.0)
        return EpCombined(total.to(args.x.dtype), sums, lambda: None)

    def low_latency_dispatch(self, args: EpLowLatencyDispatchArgs) -> EpLowLatencyDispatched:
        """Never reached: a buffer with this mode is refused."""
        raise UnsupportedError("nodes", "modes", "'low_latency' over several nodes", "'normal'")

    def low_latency_combine(self, args: EpLowLatencyCombineArgs) -> EpLowLatencyCombined:
        """Never reached: a buffer with this mode is refused."""
        raise UnsupportedError("nodes", "modes", "'low_latency' over several nodes", "'normal'")

    def low_latency_combine_buffer(self, handle: EpLowLatencyHandle) -> Tensor:
        """Never reached: a buffer with this mode is refused."""
        raise UnsupportedError("nodes", "modes", "'low_latency' over several nodes", "'normal'")

    def refuse(self, phase: str, error: SpecError) -> SpecError:
        """Tell every rank of every node."""
        try:
            self._agree([_KIND["refused"]] + [0] * (len(_FIELDS) - 1), [0] * self._args.num_nodes, error)
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
        """Close the node engine."""
        self._node_engine.close()

    def _chosen(self, idx: Tensor) -> list[Tensor]:
        span = self._per_node * self._args.local_experts
        node = torch.where(idx >= 0, idx // span, -1)
        return [(node == one).any(1).nonzero()[:, 0] for one in range(self._args.num_nodes)]

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

    def _table(self, gathered: Tensor, state: _Routes, n: int) -> Tensor:
        """Rows [n, K, C] of this rank's tokens from what every node gathered for it."""
        parts = self._return(gathered, state)
        table = parts[self._node].clone()
        for node, rows in enumerate(parts):
            if node != self._node:
                # A choice has a row on one node only, and everything else is 0.
                chosen = state.chosen[node]
                table[chosen] = torch.where(self._on_node(state, node)[:, :, None], rows, table[chosen])
        assert len(table) == n
        return table

    def _on_node(self, state: _Routes, node: int) -> Tensor:
        span = self._per_node * self._args.local_experts
        own = state.inner.topk_idx[state.begin[self._node] : state.begin[self._node + 1]]
        idx = own[state.chosen[node]]
        return (idx >= 0) & (idx // span == node)

    def _add_nodes(self, total: Tensor, parts: list[Tensor], idx: Tensor, state: _Routes) -> None:
        """Add node sums in the order in which nodes first appear among a token's choices."""
        span = self._per_node * self._args.local_experts
        node = torch.where(idx >= 0, idx // span, -1)
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

    def _return(self, rows: Tensor, state: _Routes) -> list[Tensor]:
        """Send relayed tokens' rows back to where they came from; for each node what came for this rank."""
        begin = state.begin
        found = []
        sends = []
        for node in range(self._args.num_nodes):
            if node == self._node:
                found.append(rows[begin[node] : begin[node + 1]])
                continue
            peer = node * self._per_node + self._local
            outgoing = rows[begin[node] : begin[node + 1]].contiguous()
            incoming = rows.new_empty((len(state.chosen[node]), *rows.shape[1:]))
            sends.append((peer, outgoing, incoming))
            found.append(incoming)
        self._broken = self._trade(sends, "combine", _ROWS)
        if self._broken is not None:
            raise self._broken
        return found

    def _exchange(self, parts: list[Tensor], chosen: list[Tensor], headers: list[list[int]]) -> list[list[Tensor]]:
        """Send each node its chosen tokens; for each node what its rank of this number sent."""
        found: list[list[Tensor]] = []
        sends = []
        for node in range(self._args.num_nodes):
            rows: list[Tensor] = []
            found.append(rows)
            if node == self._node:
                continue
            peer = node * self._per_node + self._local
            count = headers[peer][len(_FIELDS) + 1 + self._node]
            for part in parts:
                incoming = part.new_empty((count, part.shape[1]))
                rows.append(incoming)
                sends.append((peer, part[chosen[node]].contiguous(), incoming))
        self._broken = self._trade(sends, "dispatch", _ROWS)
        if self._broken is not None:
            raise self._broken
        return found

    def _agree(self, fields: list[int], counts: list[int], error: SpecError | None = None) -> list[list[int]]:
        """Exchange headers with every rank; raise what anyone's header says is wrong, the same everywhere."""
        if self._broken is not None:
            raise self._broken
        self._calls += 1
        phase = next(name for name, kind in _KIND.items() if kind == fields[0])
        text = () if error is None else (error.argument, error.got, error.legal)
        mine = self._header(fields, counts, text)
        landing = {r: torch.zeros_like(mine) for r in range(self._args.num_ranks) if r != self._args.rank}
        failure = self._trade([(r, mine, landing[r]) for r in landing], phase, _HEADERS)
        landing[self._args.rank] = mine
        headers = [landing[r].tolist() for r in range(self._args.num_ranks)]
        for header in headers:
            if header[0] == _KIND["failed"]:
                # Whoever told of it may be gone by now; the one he named is to blame.
                rank, where, reason = _text(header)
                failure = RankFailure(int(rank), where, reason)
        if failure is not None:
            self._broken = failure
            raise failure
        for header in headers:
            if header[-65]:
                raise SpecError(*_text(header))
        for r, header in enumerate(headers):
            for name, value, other in zip(_FIELDS, header, headers[0], strict=False):
                if value != other:
                    raise SpecError(name, f"{value} on rank {r}", f"{other}, as on rank 0")
        return headers

    def _header(self, fields: list[int], counts: list[int], text: Sequence[str]) -> Tensor:
        """Fields, the number of the call, tokens for each node, and a text of up to 512 bytes."""
        said = "\0".join(text).encode()[:512].ljust(512, b"\0")
        words = list(struct.unpack("<64q", said))
        return torch.tensor([*fields, self._calls, *counts, len(text), *words], device=self._args.device)

    def _inside(self, call: Callable[[], _T]) -> _T:
        """Run a call of the node engine; what fails there is told to the other nodes, who cannot see it."""
        try:
            return call()
        except RankFailure as failure:
            self._broken = failure
            fields = [_KIND["failed"]] + [0] * (len(_FIELDS) - 1)
            text = (str(failure.rank), failure.phase, failure.reason)
            header = self._header(fields, [0] * self._args.num_nodes, text)
            group: Any = self._args.group
            works = []
            for rank in range(self._args.num_ranks):
                if rank // self._per_node != self._node:
                    with contextlib.suppress(Exception):  # whoever is gone need not be told
                        works.append(dist.isend(header.view(torch.uint8), group=group, group_dst=rank, tag=_HEADERS))
            # A message leaves when its receiver asks for it; whoever is still computing will not be waited for long.
            end = time.monotonic() + min(self._args.timeout, 5.0)
            for work in works:
                with contextlib.suppress(Exception):
                    if work is not None:
                        work.wait(timedelta(seconds=max(end - time.monotonic(), 0.001)))
            raise

    def _trade(self, sends: list[tuple[int, Tensor, Tensor]], phase: str, tag: int) -> RankFailure | None:
        """Send and receive, all at once; the first peer that does not answer is named."""
        group: Any = self._args.group
        works = []
        failure = None

        def attempt(peer: int, step: Callable[[], _T]) -> _T | None:
            nonlocal failure
            try:
                return step()
            except Exception as error:
                reason = str(error).split("\n")[0][:200]
                failure = failure or RankFailure(peer, f"{phase} (between nodes)", f"no answer from it ({reason})")
                return None

        for peer, outgoing, incoming in sends:
            # Bytes, because every communication library moves those.
            into, out_of = incoming.view(torch.uint8), outgoing.view(torch.uint8)
            if into.numel():
                works.append((peer, attempt(peer, partial(dist.irecv, into, group=group, group_src=peer, tag=tag))))
            if out_of.numel():
                works.append((peer, attempt(peer, partial(dist.isend, out_of, group=group, group_dst=peer, tag=tag))))
        for peer, work in works:
            if work is not None:
                attempt(peer, partial(work.wait, self._timeout if failure is None else _LAST_WAIT))
        return failure


def _text(header: Sequence[int]) -> tuple[str, str, str]:
    said = struct.pack("<64q", *header[-64:]).rstrip(b"\0").decode(errors="replace")
    first, second, third = (*said.split("\0"), "", "")[:3]
    return first, second, third


def _state(handle: EpHandle) -> _Routes:
    assert isinstance(handle.state, _Routes)
    return handle.state
