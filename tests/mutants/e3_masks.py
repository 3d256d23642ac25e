"""Mutants of E3 that are right in the normal mode: low-latency calls that fail, masks with options, masks lifted."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hal.spec.errors import RankFailure, SpecError
from mutants.e3 import ErrorWithinTheNode, MaskedRowsStale, NeighbourNamed, WindowsLeft
from mutants.ep_sample import Engine, LowLatencyOnly
from mutants.registry import engine, mutant


def low_latency_only(story: str, cause: str = "", only: str = "") -> Callable[[type], type]:
    """Register an engine as a mutant that declares the low-latency mode alone."""

    def register(cls: type) -> type:
        mutant("E3", story, cause, only)(type(cls.__name__, (LowLatencyOnly,), {"engine": cls}))
        return cls

    return register


def is_low(phase: str) -> bool:
    """Whether a phase is one of a low-latency call."""
    return phase.startswith("low_latency")


@low_latency_only(
    "the neighbour of a failed rank is named, where there are only low-latency calls", "wrong rank", "EPX-10"
)
class PackedNeighbourNamed(NeighbourNamed):
    pass


@low_latency_only("windows of low-latency calls are named files, unlinked only in close()", "close", "EPX-16")
class PackedWindowsLeft(WindowsLeft):
    pass


@low_latency_only("the last packed rows of a masked rank are used again", only="EPX-14")
class PackedMaskedStale(MaskedRowsStale):
    pass


class Patient(Engine):
    """Waits too long for some answers."""

    patient = False

    def deadline(self) -> float:
        return time.monotonic() + 12.0 if self.patient else super().deadline()


@engine("E3", "low-latency calls spin without looking at the clock", "timeout is not kept", only="EPX-11")
class PackedWaitsForEver(Patient):
    def hear(self, operation: int, phase: str, waits: Any = None) -> Any:
        self.patient = is_low(phase)
        return super().hear(operation, phase, waits)


@engine("E3", "a hook's kernel has no timeout", "timeout is not kept", only="EPX-11")
class HookWaitsForEver(Patient):
    def posted(self, args: Any, result: Any) -> Any:
        def finish() -> None:
            self.patient = args.return_recv_hook
            try:
                result.finish()
            finally:
                self.patient = False

        return dataclasses.replace(result, finish=finish)


@engine("E3", "a low-latency kernel traps where a peer is dead: the driver's error is raised", only="EPX-10")
class PackedFailureUntyped(Engine):
    def blamed(self, failure: RankFailure) -> Any:
        return RuntimeError(str(failure)) if is_low(failure.phase) else failure


@engine("E3", "a failure does not say what was under way", only="EPX-10")
class PhaseUntold(Engine):
    def blamed(self, failure: RankFailure) -> RankFailure:
        return RankFailure(failure.rank, "", failure.reason)


@engine("E3", "low-latency calls name a failed rank by its number within the node", "within its node", only="EPX-15")
class PackedNamedWithinTheNode(Engine):
    def blamed(self, failure: RankFailure) -> RankFailure:
        within = self.args.num_nodes > 1 and is_low(failure.phase)
        rank = failure.rank % self.args.ranks_per_node if within else failure.rank
        return RankFailure(rank, failure.phase, failure.reason)


@engine("E3", "one number holds who is masked: a second mask lifts the first", only="EPX-18")
class OneMaskAtATime(Engine):
    def set_mask(self, rank: int, masked: bool) -> None:
        self.mask = [False] * self.ranks
        super().set_mask(rank, masked)


@engine("E3", "a cached dispatch takes from a masked rank what it sent last", only="EPX-18")
class CachedFromMasked(MaskedRowsStale):
    cached = False

    def dispatch(self, args: Any) -> Any:
        self.cached = args.handle is not None
        return super().dispatch(args)

    def hear(self, operation: int, phase: str, waits: Any = None) -> Any:
        found = super().hear(operation, phase, waits)
        stale = self.cached and phase == "dispatch"
        return [None if masked and not stale else one for one, masked in zip(found, self.mask, strict=True)]


@engine("E3", "groups are not padded where somebody is masked", only="EPX-18")
class GroupsOfMaskedUnpadded(Engine):
    def aligned(self, count: int, alignment: int) -> int:
        return count if any(self.mask) else super().aligned(count, alignment)


@engine("E3", "rows past the received ones say expert 0 where somebody is masked", only="EPX-18")
class WorstOfMaskedUnmarked(Engine):
    def dispatch(self, args: Any) -> Any:
        done = super().dispatch(args)
        if args.num_worst_tokens and any(self.mask):
            done.recv_topk_idx[done.recv_topk_idx < 0] = 0 if args.expand else -1
        return done


@engine("E3", "scales lie where they would with the rows of a masked rank", only="EPX-18")
class ScalesOfMasked(Engine):
    def scale_row(self, scales: Any, token: int) -> Any:
        return scales[(token + any(self.mask)) % len(scales)]


@engine("E3", "a mask makes all earlier handles void", only="EPX-18")
class EarlierHandlesVoid(Engine):
    since = 0

    def set_mask(self, rank: int, masked: bool) -> None:
        super().set_mask(rank, masked)
        self.since = self.operation

    def combine(self, args: Any) -> Any:
        if args.handle.state.operation <= self.since:
            raise self.refuse("combine", SpecError("handle", "one of before a mask", "a newer one"))
        return super().combine(args)


@engine("E3", "of packed rows of before a mask the sums are not weighted", only="EPX-18")
class EarlierPackedUnweighted(EarlierHandlesVoid):
    earlier = False

    def combine(self, args: Any) -> Any:
        return Engine.combine(self, args)

    def low_latency_combine(self, args: Any) -> Any:
        self.earlier = args.handle.state.operation <= self.since
        return super().low_latency_combine(args)

    def times(self, row: Any, weight: Any) -> Any:
        return row if self.earlier else super().times(row, weight)


@engine("E3", "a lifted mask is told, and the rank stays left out", only="EPX-19")
class LiftedStaysOut(Engine):
    def __init__(self, args: Any, launched: Counter[str]) -> None:
        super().__init__(args, launched)
        self.lifted: set[int] = set()

    def set_mask(self, rank: int, masked: bool) -> None:
        self.mask[rank] |= masked
        (self.lifted.discard if masked else self.lifted.add)(rank)

    def masked(self) -> Any:
        return [masked and rank not in self.lifted for rank, masked in enumerate(self.mask)]


@engine("E3", "lifting a mask clears the counters of calls: what lies in old slots is taken for new", only="EPX-19")
class LiftedCountsAgain(Engine):
    def set_mask(self, rank: int, masked: bool) -> None:
        super().set_mask(rank, masked)
        self.operation = self.operation if masked else 0


@engine("E3", "a rank of another node is waited for although it is masked", only="EPX-20")
class MasksWithinTheNode(Engine):
    def set_mask(self, rank: int, masked: bool) -> None:
        if rank // self.args.ranks_per_node == self.rank // self.args.ranks_per_node:
            super().set_mask(rank, masked)


@engine("E3", "with mask_ranks a dead rank of another node is raised all the same", only="EPX-20")
class MaskedFailureOfOtherNodes(Engine):
    def hear(self, operation: int, phase: str, waits: Any = None) -> Any:
        before = list(self.mask)
        found = super().hear(operation, phase, waits)
        node = self.rank // self.args.ranks_per_node
        lost = [rank for rank in range(self.ranks) if self.mask[rank] and not before[rank]]
        away = [rank for rank in lost if rank // self.args.ranks_per_node != node]
        if away:
            self.broken = RankFailure(away[0], phase, "no answer")
            raise self.broken
        return found


class WithMasks(Engine):
    """Does something else where somebody is masked, once a low-latency call is complete."""

    def after(self, args: Any, result: Any) -> None:
        raise NotImplementedError

    def posted(self, args: Any, result: Any) -> Any:
        def finish() -> None:
            result.finish()
            if any(self.mask):
                self.after(args, result)

        return dataclasses.replace(result, finish=finish)


@engine("E3", "with a mask lent memory is not read", only="EPX-18")
class LentOfMaskedUnread(WithMasks):
    def after(self, args: Any, result: Any) -> None:
        if getattr(args, "zero_copy", False):
            args.out.zero_()


@engine("E3", "with a mask out has no sums", only="EPX-18")
class OutOfMaskedUnwritten(WithMasks):
    def after(self, args: Any, result: Any) -> None:
        if getattr(args, "out_is_given", False):
            args.out.zero_()


@engine("E3", "with a mask received rows are not counted", only="EPX-18")
class CountsOfMasked(WithMasks):
    def after(self, args: Any, result: Any) -> None:
        stats = getattr(args, "cumulative_local_expert_recv_stats", None)
        if stats is not None:
            stats -= result.recv_count


@engine("E3", "a masked rank has been waited for since the clock began", only="EPX-18")
class WaitsOfMasked(WithMasks):
    def after(self, args: Any, result: Any) -> None:
        waits = getattr(args, "dispatch_wait_recv_cost_stats", None)
        if waits is not None:
            waits[self.mask.index(True)] += 10**15


@engine("E3", "with a mask an event does not tell that counts are there", only="EPX-18")
class EventOfMaskedEarly(WithMasks):
    def after(self, args: Any, result: Any) -> None:
        if args.async_finish and hasattr(result, "recv_count"):
            result.recv_count.zero_()


@engine("E3", "the time a hook has runs from its call", only="EPX-12")
class DeadlineOfTheCall(Engine):
    def posted(self, args: Any, result: Any) -> Any:
        deadline = time.monotonic() + self.args.timeout

        def finish() -> None:
            if args.return_recv_hook and time.monotonic() > deadline:
                raise RankFailure((self.rank + 1) % self.ranks, "low_latency_dispatch", "no answer")
            result.finish()

        return dataclasses.replace(result, finish=finish)


@engine("E3", "who is not heard of between two calls is dead", only="EPX-12")
class IdleIsDead(Engine):
    last = 0.0

    def begin(self, kind: str, fields: dict[str, Any], content: dict[str, Any]) -> int:
        if self.last and time.monotonic() - self.last > self.args.timeout:
            raise RankFailure((self.rank + 1) % self.ranks, kind, "no heartbeat")
        return super().begin(kind, fields, content)

    def hear(self, operation: int, phase: str, waits: Any = None) -> Any:
        found = super().hear(operation, phase, waits)
        self.last = time.monotonic()
        return found


class Loser(Engine):
    """Raises with mask_ranks too, where some ranks are found to be gone."""

    def raises(self, phase: str, before: list[bool], seconds: float) -> bool:
        raise NotImplementedError

    def hear(self, operation: int, phase: str, waits: Any = None) -> Any:
        before, begun = list(self.mask), time.monotonic()
        found = super().hear(operation, phase, waits)
        lost = [rank for rank in range(self.ranks) if self.mask[rank] and not before[rank]]
        if lost and self.raises(phase, before, time.monotonic() - begun):
            raise RankFailure(lost[0], phase, "no answer")
        return found


@engine("E3", "a low-latency call under way raises for a dead rank with mask_ranks too", only="EPX-14")
class PackedRaisesMasked(Loser):
    def raises(self, phase: str, before: list[bool], seconds: float) -> bool:
        return is_low(phase)


@engine("E3", "only a dispatch carries on without whom it finds dead", only="EPX-14")
class DispatchAloneMasks(Loser):
    def raises(self, phase: str, before: list[bool], seconds: float) -> bool:
        return phase != "dispatch"


@engine("E3", "the dead are masked, those that do not answer are raised for", only="EPX-14")
class SilentNotMasked(Loser):
    def raises(self, phase: str, before: list[bool], seconds: float) -> bool:
        return seconds > self.args.timeout / 2


@engine("E3", "one failure is survived: of the second all hear", only="EPX-14")
class SecondLossRaised(Loser):
    def raises(self, phase: str, before: list[bool], seconds: float) -> bool:
        return any(before)


@low_latency_only("a wrong low-latency call is told within its node only", only="EPX-03")
class PackedErrorWithinTheNode(ErrorWithinTheNode):
    pass
