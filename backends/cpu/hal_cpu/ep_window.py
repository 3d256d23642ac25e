"""The opened window of the CPU's expert-parallel engine, and what is no call of either mode."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hal.ep.engine import (
    Finish,
)
from hal.ep.faults import KINDS, PHASES, EpFaults
from hal.ep.fields import OPERATIONS, Fields
from hal.ep.layout import count_layout
from hal.ep.neighbours import Neighbours, introduced
from hal.ep.relay import NodeEngine
from hal.ep.rendezvous import by_all
from hal.spec.ep import (
    OVERFLOW,
    EpBufferArgs,
    EpLayout,
)
from hal.spec.errors import SpecError
from hal_cpu.ep_parts import (
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
        near = Neighbours(args)
        self._first, self._ranks, self._sources = near.first, near.ranks, near.sources
        self._origins, self._blocks = near.origins, near.blocks
        crowded = near.ranks > len(os.sched_getaffinity(0))
        with introduced(args, near) as met:
            with by_all(met.exchange, args.rank):
                self._engine = _ep.Engine(
                    near.here,
                    near.ranks,
                    near.sources,
                    args.local_experts,
                    near.first * args.local_experts,
                    near.first,
                    args.timeout,
                    args.mask_ranks,
                    args.max_recv_tokens,
                    OVERFLOW.index(args.overflow),
                    crowded,
                    args.num_ranks,
                    met.token,
                )
            found = met.trade(self._engine.fd())
            with by_all(met.exchange, args.rank):
                self._attach(found)
        # Closes it where nobody else does, before the memory goes that its thread may still write to.
        weakref.finalize(self, self._engine.close)
        # Operations write into their tensors whether or not anybody still wants their results.
        self._under_way: dict[int, tuple[Any, object]] = {}
        if isinstance(args.faults, EpFaults):
            self._engine.set_faults(
                [
                    (KINDS.index(f.kind), PHASES.index(f.phase), f.operation, f.target, f.seconds)
                    for f in args.faults.faults
                ]
            )
        self._owner = object()
        self._names = tuple(f"{call}_{_ep.isa}" for call in OPERATIONS[1:])

    def _attach(self, found: Mapping[int, tuple[int, int]]) -> None:
        try:
            for peer, (window, pidfd) in found.items():
                try:
                    self._engine.attach(peer, window, pidfd)
                except ValueError as error:
                    what = f"a window of rank {self._first + peer} where {error}"
                    raise SpecError("group", what, "a peer's window") from None
        finally:
            for pair in found.values():
                for file in pair:
                    if file >= 0:
                        os.close(file)

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
        self._under_way.clear()

    def _finish(self, op: Any, fields: Fields, keep: object = None) -> Finish:
        """What completes a posted call; ``keep`` is what it reads and writes until then."""
        finish = self._engine.finish
        self._let_go()
        self._under_way[op.seq] = op, keep

        def run() -> None:
            try:
                finish(op)
            except Exception as error:
                raise self._translated(error, fields) from None
            finally:
                self._let_go()

        return run

    def _let_go(self) -> None:
        for number, (op, _) in list(self._under_way.items()):
            if op.finished:
                self._under_way.pop(number, None)

    def _translated(self, error: Exception, fields: Fields) -> Exception:
        return translated(self._native, self._first, error, fields)

    def _refusal(self, error: Exception) -> SpecError:
        return refusal(self._first, error, ())
