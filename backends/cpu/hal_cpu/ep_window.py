"""The opened window of the CPU's expert-parallel engine, and what is no call of either mode."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hal.ep.engine import (
    Finish,
)
from hal.ep.faults import KINDS, PHASES, EpFaults
from hal.ep.layout import count_layout
from hal.ep.relay import NodeEngine
from hal.ep.rendezvous import Doorbell, agree, exchange_over, host_identity
from hal.ep.topology import Topology
from hal.spec.ep import (
    OVERFLOW,
    EpBufferArgs,
    EpLayout,
)
from hal.spec.errors import RankFailure, SpecError
from hal_cpu.ep_parts import (
    OPERATIONS,
    Fields,
    record_of,
    refusal,
    translated,
)


class WindowEngine(NodeEngine):
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
