"""How the ranks of a group lie on nodes, and which rank speaks for which others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranks of a node are consecutive; the last node may have fewer.

    A token crosses to a remote node once, to the rank there that relays it. Ranks of the sending node take turns over
    the ranks of the receiving one, so that what a node delivers can be put in the order of the source's rank: in block
    b of a source node the i-th rank of the receiving node speaks for the source node's rank b · size + i.

    Parameters
    ----------
    num_ranks : int
    ranks_per_node : int
    """

    num_ranks: int
    ranks_per_node: int

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

    def sources(self, rank: int) -> list[int | None]:
        """For each block of tokens that the ranks of this node deliver: the rank for which this one speaks, if any."""
        here = self.ranks(self.node(rank))
        found: list[int | None] = []
        for node in range(self.num_nodes):
            there = self.ranks(node)
            for begin in range(0, len(there), len(here)):
                at = begin + rank - here[0]
                found.append(there[at] if at < len(there) else None)
        return found
