"""Mutants of E3: nodes and failing ranks."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections import Counter
from typing import Any

from hal.spec.errors import RankFailure
from mutants.ep_sample import Engine
from mutants.registry import LEFT, engine


@engine("E3", "node sums are added by the number of the node", "nodes are summed by number")
class NodesByNumber(Engine):
    def nodes(self, nodes: list[int]) -> list[int]:
        return sorted(set(nodes))


@engine("E3", "pre_reduce is ignored: the sum is flat", "flat")
class PreReduceIgnored(Engine):
    def nodes(self, nodes: list[int]) -> list[int]:
        return []

    def summed(self, out: Any, token: int, total: Any, terms: Any) -> None:
        for _, _, row in terms:
            total = total + row.float()
        out[token] = total.to(out.dtype)


@engine("E3", "rows of this node come before those of others", "order")
class OwnNodeFirst(Engine):
    def arrivals(self, idx: Any, rank: int) -> Any:
        node = rank // self.args.ranks_per_node
        found = super().arrivals(idx, rank)
        return sorted(found, key=lambda at: (at[0] // self.args.ranks_per_node != node, at))


@engine("E3", "a token for several ranks of a remote node arrives at the first of them only")
class FirstRankOfNode(Engine):
    def homes(self, row: Any) -> list[int]:
        found: list[int] = []
        for home in super().homes(row):
            node = home // self.args.ranks_per_node
            if self.args.num_nodes == 1 or all(other // self.args.ranks_per_node != node for other in found):
                found.append(home)
        return found


@engine("E3", "low-latency sums across nodes have no weights yet")
class WeightsWithinTheNode(Engine):
    def times(self, row: Any, weight: Any) -> Any:
        return row if self.args.num_nodes > 1 else super().times(row, weight)


@engine("E3", "of a low-latency expert the first row alone comes from another node")
class PackedOnceAcrossNodes(Engine):
    def packed_tokens(self, message: Any, expert: int) -> Any:
        found = super().packed_tokens(message, expert)
        return found[:1] if self.args.num_nodes > 1 else found


@engine("E3", "a cached dispatch across nodes finds the rows of the one that was cached")
class CachedRowsOfTheFirst(Engine):
    first: Any = None

    def dispatch(self, args: Any) -> Any:
        done = super().dispatch(args)
        if self.args.num_nodes > 1:
            if args.handle is None:
                self.first = done.recv_x.clone()
            elif self.first.shape == done.recv_x.shape:
                done.recv_x.copy_(self.first)
        return done


@engine("E3", "expert_alignment is left to the node that sends")
class AlignedWithinTheNode(Engine):
    def aligned(self, count: int, alignment: int) -> int:
        return count if self.args.num_nodes > 1 else super().aligned(count, alignment)


@engine("E3", "rows past the received ones say expert 0 where there are nodes", only="EPX-01")
class WorstAcrossNodesUnmarked(Engine):
    def dispatch(self, args: Any) -> Any:
        done = super().dispatch(args)
        if args.num_worst_tokens and self.args.num_nodes > 1:
            done.recv_topk_idx[done.recv_topk_idx.amax(1) < 0] = 0
        return done


@engine("E3", "a mask cannot be lifted")
class MaskedForGood(Engine):
    def set_mask(self, rank: int, masked: bool) -> None:
        if masked:
            super().set_mask(rank, masked)


@engine("E3", "a wrong call is told within its node only")
class ErrorWithinTheNode(Engine):
    def refuse(self, phase: str, error: Any) -> Any:
        if self.args.num_nodes == 1:
            return super().refuse(phase, error)
        self.operation += 1
        return error


@engine("E3", "a failed rank is named by its number within the node", "within its node")
class NamedWithinTheNode(Engine):
    def blamed(self, failure: RankFailure) -> RankFailure:
        rank = failure.rank % self.args.ranks_per_node if self.args.num_nodes > 1 else failure.rank
        return RankFailure(rank, failure.phase, failure.reason)


@engine("E3", "the neighbour of the failed rank is named", "wrong rank")
class NeighbourNamed(Engine):
    def blamed(self, failure: RankFailure) -> RankFailure:
        return RankFailure((failure.rank + 1) % self.ranks, failure.phase, failure.reason)


@engine("E3", "a default timeout is compiled in", "timeout is not kept")
class TimeoutIgnored(Engine):
    def deadline(self) -> float:
        return time.monotonic() + 15.0


@engine("E3", "a tenth of the timeout is enough, thinks the author")
class TooImpatient(Engine):
    def deadline(self) -> float:
        return time.monotonic() + self.args.timeout / 10


@engine("E3", "a failure is forgotten: every later call waits for the dead rank again")
class FailureForgotten(Engine):
    def hear(self, operation: int, phase: str, waits: Any = None) -> Any:
        self.mail.alive = lambda rank: True  # type: ignore[method-assign]
        try:
            return super().hear(operation, phase, waits)
        finally:
            self.broken = None


@engine("E3", "a dead peer takes the others along")
class FailureAborts(Engine):
    def blamed(self, failure: RankFailure) -> RankFailure:
        os.abort()


@engine("E3", "a dead peer raises what the transport raised")
class FailureUntyped(Engine):
    def blamed(self, failure: RankFailure) -> Any:
        return ConnectionError(str(failure))


@engine("E3", "the last message of a masked rank is used again")
class MaskedRowsStale(Engine):
    def hear(self, operation: int, phase: str, waits: Any = None) -> Any:
        found = super().hear(operation, phase, waits)
        kept = self.__dict__.setdefault("kept", {})
        for rank, message in enumerate(found):
            if message is not None:
                kept[rank, message["call"]] = message
            else:
                found[rank] = kept.get((rank, phase))
        return found


@engine("E3", "masked() does not tell what was masked after a failure")
class MaskUntold(Engine):
    def masked(self) -> list[bool]:
        return [False] * self.ranks


@engine("E3", "with mask_ranks a failure is raised all the same")
class MaskIgnored(Engine):
    def hear(self, operation: int, phase: str, waits: Any = None) -> Any:
        before = list(self.mask)
        found = super().hear(operation, phase, waits)
        if self.mask != before and self.args.mask_ranks:
            self.broken = RankFailure(self.mask.index(True), phase, "no answer")
            raise self.broken
        return found


@engine("E3", "peer windows are named files, unlinked only in close()", "close")
class WindowsLeft(Engine):
    def __init__(self, args: Any, launched: Counter[str]) -> None:
        super().__init__(args, launched)
        from hal.ep.rendezvous import exchange_over

        exchange = exchange_over(args.group, args.timeout)
        self.path = f"{LEFT}{self.mail.folder.name}-{self.rank}"
        with open(self.path, "wb") as file:
            file.truncate(4096)
        self.maps = []
        for path in exchange(self.path):
            with open(path, "r+b") as file:
                self.maps.append(mmap.mmap(file.fileno(), 4096))
        exchange(None)

    def close(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        super().close()


@engine("E3", "after a failure no other buffer opens in this process")
class NoLaterBuffer(Engine):
    failed = False

    def __init__(self, args: Any, launched: Counter[str]) -> None:
        if NoLaterBuffer.failed:
            raise RuntimeError("the device context is in an error state")
        super().__init__(args, launched)

    def blamed(self, failure: RankFailure) -> RankFailure:
        NoLaterBuffer.failed = True
        return failure
