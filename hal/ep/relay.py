"""What an engine of one node's ranks must do besides, so that several nodes can be made of it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from hal.ep.engine import EpDispatched, EpEngine, EpLowLatencyDispatched, Finish
from hal.spec.ep import EpDispatchArgs, EpHandle, EpLowLatencyCombineArgs, EpLowLatencyDispatchArgs
from hal.spec.errors import RankFailure


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

    def fail(self, failure: RankFailure) -> None:
        """Tell the node's other ranks at once of what happened to this one between nodes."""

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
