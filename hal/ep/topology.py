"""How the ranks of a group lie on nodes, and which rank speaks for which others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranks of a node are consecutive; the last node may have fewer.

    A token crosses to a remote node once, to the rank there that relays it. Ranks of the sending node take turns over
    the ranks of the receiving one, so that what a node delivers can be put in the order of the source's rank: in block
    b of a source node the i-th rank of the receiving node speaks for the source node's rank b · size + i.

    Where ranks may be lost a token crosses to each rank it is for instead, so that no rank's end takes the tokens of
    another: every rank speaks for all ranks of other nodes, and only to itself.

    Parameters
    ----------
    num_ranks : int
    ranks_per_node : int
    direct : bool
        Whether ranks may be lost.
    """

    num_ranks: int
    ranks_per_node: int
    direct: bool = False

    @property
    def num_nodes(self) -> int:
        """Nodes the group spans."""
        return -(-self.num_ranks // self.ranks_per_node)

    def node(self, rank: int) -> int:
        """The node of a rank."""
        return rank // self.ranks_per_node

    def ranks(self, node: int) -> range:
        """The ranks of a node."""
        first = node * self.ranks_per_node
        return range(first, min(first + self.ranks_per_node, self.num_ranks))

    def relay(self, rank: int, node: int) -> int:
        """The rank of a node to which a rank sends its tokens; itself on its own node."""
        there = self.ranks(node)
        return there[(rank - self.ranks(self.node(rank))[0]) % len(there)]

    def gate(self, rank: int, to: int) -> int:
        """The rank to which a rank sends tokens that are for ``to``; itself where that is on its own node."""
        node = self.node(to)
        return to if self.direct and node != self.node(rank) else self.relay(rank, node)

    def sources(self, rank: int) -> list[int | None]:
        """For each block of tokens that the ranks of this node deliver: the rank for which this one speaks, if any."""
        here = self.ranks(self.node(rank))
        if self.direct and self.num_nodes > 1:
            return [one if one == rank or one not in here else None for one in range(self.num_ranks)]
        found: list[int | None] = []
        for node in range(self.num_nodes):
            there = self.ranks(node)
            for begin in range(0, len(there), len(here)):
                at = begin + rank - here[0]
                found.append(there[at] if at < len(there) else None)
        return found
