"""What is counted of a call."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bins:
    """What is counted of a call.

    Attributes
    ----------
    ranks, local : int
        Of the group, and experts of each.
    by_rank : int
        How many of the bins are ranks: all or none.
    first, experts : int
        The others are these experts.
    expanded : bool
        Whether rows are ordered by expert instead of by rank.
    repeat : bool
        Whether a token's second choice of an expert has the place of the first.
    """

    ranks: int
    local: int
    by_rank: int
    first: int
    experts: int
    expanded: bool
    repeat: bool

    @property
    def all(self) -> int:
        """How many there are."""
        return self.by_rank + self.experts

    @property
    def own(self) -> int:
        """How many of those that rows are ordered by are this rank's."""
        return self.local if self.expanded else 1

    @property
    def spots(self) -> int:
        """How many rows are ordered by."""
        return self.experts if self.expanded else self.ranks
