"""The ranks of a node: who they are, whose tokens each delivers, and how they come to hold files of each other."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

from hal.ep.rendezvous import Doorbell, Exchange, exchange_over, host_identity
from hal.ep.topology import Topology
from hal.spec.ep import EpBufferArgs
from hal.spec.errors import RankFailure, SpecError

_SHARE: Final = 0.75
"""Of the timeout: who is missing in a node is told before other nodes give up those who wait for it."""


class Neighbours:
    """The ranks of one rank's node.

    Attributes
    ----------
    first, ranks, here : int
        The first rank's number in the whole group, how many there are, and this rank's number among them.
    sources : int
        Ranks of the whole group for which each of them speaks, at most.
    origins : Tensor
        int32: the rank whose tokens each block carries, -1 for none; block s · ranks + i is what i sends for source s.
    blocks : Tensor
        The block through which the tokens of each rank of the group come here: its own, or of what this rank speaks
        for.
    """

    def __init__(self, args: EpBufferArgs) -> None:
        topology = Topology(args.num_ranks, args.ranks_per_node, args.mask_ranks)
        peers = topology.ranks(topology.node(args.rank))
        self.first = peers[0]
        self.ranks = len(peers)
        self.here = args.rank - self.first
        sources = [topology.sources(peer) for peer in peers]
        self.sources = len(sources[0])
        self.origins = torch.tensor(
            [-1 if block[s] is None else block[s] for s in range(self.sources) for block in sources],
            dtype=torch.int32,
            device="cpu",
        )
        origins = self.origins.view(self.sources, self.ranks).tolist()
        self.blocks = torch.tensor(
            [_block_of(origins, rank, self.here) for rank in range(args.num_ranks)], device="cpu"
        )


@dataclass(frozen=True, slots=True)
class Introduction:
    """The ranks of a node while they open a buffer.

    Attributes
    ----------
    exchange : Exchange
        Over the whole group.
    token : bytes
        The node's secret.
    first : int
        Number of the node's first rank in the whole group.
    """

    exchange: Exchange
    token: bytes
    first: int
    _doorbell: Doorbell
    _names: tuple[str, ...]
    _rank: int
    _timeout: float

    def trade(self, file: int) -> dict[int, tuple[int, int]]:
        """Give every neighbour a file, and get theirs. See `Doorbell.trade`.

        Raises
        ------
        RankFailure
            A neighbour does not answer; the group has been told.
        """
        try:
            return self._doorbell.trade(file, self._rank, self._names, self.token, _SHARE * self._timeout)
        except RankFailure as failure:
            # The others may have given this rank up, and gone.
            told = self.exchange.told() or RankFailure(self.first + failure.rank, failure.phase, failure.reason)
            self.exchange.leave(told)
            raise told from failure


@contextmanager
def introduced(args: EpBufferArgs, near: Neighbours) -> Iterator[Introduction]:
    """Meet the ranks of the node. Collective over the whole group.

    Raises
    ------
    SpecError
        The ranks of a node do not share a machine.
    RankFailure
        A rank did not come.
    """
    exchange = exchange_over(args.group, args.timeout)
    # One rank's secret serves the node; every rank brings one, so that none needs to be asked first.
    doorbell = Doorbell(args.num_ranks)
    try:
        everyone = exchange((host_identity(), doorbell.name, secrets.token_bytes(32)))
        for rank, (host, _, _) in enumerate(everyone):
            head = rank // args.ranks_per_node * args.ranks_per_node
            if host != everyone[head][0]:
                legal = f"ranks {head} and {rank} on one machine and in one network namespace"
                raise SpecError("ranks_per_node", args.ranks_per_node, legal)
        names = tuple(name for _, name, _ in everyone[near.first : near.first + near.ranks])
        secret = everyone[near.first][2]
        yield Introduction(exchange, secret, near.first, doorbell, names, near.here, args.timeout)
    finally:
        doorbell.close()


def _block_of(origins: list[list[int]], rank: int, here: int) -> int:
    """The block of a rank's tokens: the one of peer ``here``, if several peers speak for it."""
    peers = len(origins[0])
    found = [s * peers + peer for s, block in enumerate(origins) for peer, one in enumerate(block) if one == rank]
    return next((block for block in found if block % peers == here), found[0])
