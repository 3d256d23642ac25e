"""How tokens of one rank cross to other nodes, and how their rows come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hal.ep.layout import count_layout
from hal.ep.relay import Relayed
from hal.ep.topology import Topology
from hal.ep.wire import Wire
from hal.spec.ep import EpBufferArgs


@dataclass(slots=True, eq=False)
class Crossed:
    """What is known of a dispatch over several nodes.

    Attributes
    ----------
    inner : object
        The node engine's handle.
    idx : Tensor
        topk_idx of all tokens for which this rank speaks.
    begin : list of int
        Where those of each source begin, and their end.
    chosen : dict of int to Tensor
        By the rank they are sent to, positions of this rank's tokens; under its own those for its own node.
    """

    inner: Any
    idx: Tensor
    begin: list[int]
    chosen: dict[int, Tensor]


class Crossing:
    """One rank's way over the wire.

    Parameters
    ----------
    args : EpBufferArgs
    wire : Wire
    """

    def __init__(self, args: EpBufferArgs, wire: Wire) -> None:
        self._args, self._wire, self._rank = args, wire, args.rank
        topology = Topology(args.num_ranks, args.ranks_per_node, args.mask_ranks)
        self._sources = topology.sources(args.rank)
        self._own = self._sources.index(args.rank)
        self._gate = [topology.gate(args.rank, to) for to in range(args.num_ranks)]
        self._gates = sorted(set(self._gate))

    def choose(self, idx: Tensor) -> dict[int, Tensor]:
        """Positions of the tokens [n, K] that go to each rank across nodes, and to the own node."""
        gate = self._gate_of(idx)
        return {one: (gate == one).any(1).nonzero()[:, 0] for one in self._gates}

    def counts(self, chosen: dict[int, Tensor], idx: Tensor) -> list[int]:
        """Tokens sent to each rank across nodes, then tokens for each rank: what a header tells."""
        per_rank: list[int] = count_layout(self._args, idx).num_tokens_per_rank.tolist()
        return [len(chosen.get(rank, ())) for rank in range(self._args.num_ranks)] + per_rank

    def exchange(
        self,
        parts: Sequence[Tensor],
        blank: Sequence[int],
        chosen: dict[int, Tensor],
        counts: list[list[int]],
        phase: str,
    ) -> tuple[list[Tensor], Relayed]:
        """Send each gate its chosen tokens, and gather those for which this rank speaks.

        Parameters
        ----------
        parts : sequence of Tensor
            [n, …] each.
        blank : sequence of int
            What each part of a token says that never came.
        chosen : dict of int to Tensor
        counts : list of list of int
            Of every rank, as its header told.
        phase : str

        Returns
        -------
        list of Tensor
            The parts of all tokens for which this rank speaks, in the order of their sources.
        Relayed
        """
        n, device, ranks = len(parts[0]), parts[0].device, self._args.num_ranks
        parts = [*parts, torch.arange(n, dtype=torch.int32, device=device)[:, None]]
        sends = [
            (gate, part[tokens].contiguous()) for gate, tokens in chosen.items() if gate != self._rank for part in parts
        ]
        receives = []
        blocks: list[list[Tensor]] = []
        begin = [0]
        for source in self._sources:
            if source == self._rank:
                blocks.append(parts)
            else:
                count = 0 if source is None else counts[source][self._rank]
                blocks.append([part.new_empty((count, part.shape[1])) for part in parts])
                receives += [] if source is None else [(source, part) for part in blocks[-1]]
            begin.append(begin[-1] + len(blocks[-1][0]))
        lost = self._wire.trade(sends, receives, phase)
        for i, source in enumerate(self._sources):
            if source in lost:  # in other memory: something may still arrive in this one
                blocks[i] = [torch.full_like(part, value) for part, value in zip(blocks[i], (*blank, -1), strict=True)]
        merged = [torch.cat([block[i] for block in blocks]) for i in range(len(parts))]
        nothing = [0] * ranks
        sent = [nothing if source is None else counts[source][ranks:] for source in self._sources]
        return merged[:-1], Relayed(begin, merged[-1][:, 0], torch.tensor(sent, dtype=torch.int32, device="cpu"))

    def share(self, idx: Tensor, begin: Sequence[int]) -> Tensor:
        """Of tokens [n, K] for which this rank speaks, the choices that it is to deliver; the others -1."""
        if not self._args.mask_ranks:
            return idx
        here = idx // self._args.local_experts == self._rank
        here[begin[self._own] : begin[self._own + 1]] = True
        return torch.where(here, idx, -1)

    def give_back(self, rows: Tensor, crossed: Crossed, phase: str) -> dict[int, Tensor]:
        """Return relayed tokens' rows to where they came from; what came for this rank, by gate."""
        begin, sends = crossed.begin, []
        for i, source in enumerate(self._sources):
            if source is not None and source != self._rank:
                sends.append((source, rows[begin[i] : begin[i + 1]].contiguous()))
        found = {self._rank: rows[begin[self._own] : begin[self._own + 1]]}
        for gate, tokens in crossed.chosen.items():
            if gate != self._rank:
                found[gate] = rows.new_empty((len(tokens), *rows.shape[1:]))
        receives = [(gate, part) for gate, part in found.items() if gate != self._rank]
        for gate in self._wire.trade(sends, receives, phase):
            found[gate] = torch.zeros_like(found[gate])
        return found

    def own_idx(self, crossed: Crossed) -> Tensor:
        """topk_idx of this rank's own tokens, as dispatched."""
        return crossed.idx[crossed.begin[self._own] : crossed.begin[self._own + 1]]

    def table(self, gathered: Tensor, crossed: Crossed, rows_of: Callable[[Tensor], Tensor], phase: str) -> Tensor:
        """Rows [n, K, C] of this rank's tokens from what every gate gathered for it; 0 where a choice has none.

        Parameters
        ----------
        gathered : Tensor
            [m, K, C], of all tokens for which this rank speaks.
        crossed : Crossed
        rows_of : callable
            Of topk_idx [m, K] the choices that have rows; only those cross.
        phase : str
        """
        begin, per_node = crossed.begin, self._args.ranks_per_node * self._args.local_experts
        here = rows_of(crossed.idx) & (crossed.idx // per_node == self._rank // self._args.ranks_per_node)
        sends = []
        for i, source in enumerate(self._sources):
            if source is not None and source != self._rank:
                part = slice(begin[i], begin[i + 1])
                sends.append((source, gathered[part][here[part]]))
        own = slice(begin[self._own], begin[self._own + 1])
        table, idx = gathered[own].clone(), crossed.idx[own]
        there, gate_of = rows_of(idx), self._gate_of(idx)
        gates = [gate for gate in crossed.chosen if gate != self._rank]
        places = {gate: (there & (gate_of == gate)).nonzero(as_tuple=True) for gate in gates}
        found = {gate: gathered.new_empty((len(at), gathered.shape[2])) for gate, (at, _) in places.items()}
        lost = self._wire.trade(sends, list(found.items()), phase)
        for gate, rows in found.items():
            if gate not in lost:
                table[places[gate]] = rows
        return table

    def add_nodes(self, total: Tensor, parts: dict[int, Tensor], idx: Tensor, crossed: Crossed) -> None:
        """Add the sums of nodes in the order in which nodes first appear among a token's choices."""
        dense = []
        for gate, part in parts.items():
            rows = torch.zeros_like(total)
            rows[slice(None) if gate == self._rank else crossed.chosen[gate]] = part
            dense.append((self._gate.index(gate) // self._args.ranks_per_node, rows))
        self.add_in_order(total, dense, idx)

    def add_in_order(self, total: Tensor, dense: Sequence[tuple[int, Tensor]], idx: Tensor) -> None:
        """Add [n, H] of every (node, sum) in the order in which nodes first appear among a token's choices."""
        span = self._args.ranks_per_node * self._args.local_experts
        node = torch.where(idx >= 0, idx // span, -1)
        first = ~(node[:, :, None] == node[:, None, :]).tril(-1).any(2)
        for k in range(idx.shape[1]):
            for one, rows in dense:
                total += rows.where(((node[:, k] == one) & first[:, k])[:, None], 0.0)

    def sums_of_nodes(self, table: Tensor, idx: Tensor) -> list[tuple[int, Tensor]]:
        """Of every node the float32 sum of its rows of [n, K, H], in top-k order."""
        span = self._args.ranks_per_node * self._args.local_experts
        node = torch.where(idx >= 0, idx // span, -1)
        found = []
        for one in range(self._args.num_nodes):
            rows = torch.zeros(len(idx), table.shape[2], dtype=torch.float32, device=table.device)
            for k in range(idx.shape[1]):
                rows += table[:, k].float().where((node[:, k] == one)[:, None], 0.0)
            found.append((one, rows))
        return found

    def first_rows(self, idx: Tensor, expand: bool) -> Tensor:
        """[n, K] bool: the choices that carry a row, the first of each rank or, expanded, of each expert."""
        key = idx if expand else torch.where(idx >= 0, idx // self._args.local_experts, -1)
        earlier = (key[:, :, None] == key[:, None, :]).tril(-1).any(2)
        return (idx >= 0) & ~earlier

    def _gate_of(self, idx: Tensor) -> Tensor:
        """The rank to which each choice is sent, -1 for none."""
        gate = torch.tensor(self._gate, device=idx.device)
        return torch.where(idx >= 0, gate[idx.clamp(min=0) // self._args.local_experts], -1)
