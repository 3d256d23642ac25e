"""Interleaved timing: in every round each contender has one turn, so that a disturbance falls on all of them alike.

The order is reversed every other round, so that nobody always follows the same neighbour. A turn rests a moment
(threads of the one before may still be spinning), warms up with a call that is not counted, then times calls one by
one; the median of a turn is the contender's sample of the round. Ratios are taken between samples of one round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch

TURN_SECONDS: Final = 0.02
MOST_CALLS: Final = 32
REST_SECONDS: Final = 0.002
FEWEST_ROUNDS: Final = 3


class Clock(Protocol):
    """How long one call takes."""

    def time(self, call: Callable[[], object]) -> float:
        """Seconds from the start of the call until its result is complete."""
        ...


class HostClock:
    """For work that is complete when the call returns."""

    def time(self, call: Callable[[], object]) -> float:
        """Wall-clock seconds of the call."""
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) * 1e-9


class CpuClock:
    """For work of one thread on a machine shared with others: processor time, which does not run while it waits.

    What it does not see is time lost to caches and memory bandwidth that others use.
    """

    def time(self, call: Callable[[], object]) -> float:
        """Seconds of processor time that all threads of the process took during the call."""
        start = time.process_time_ns()
        call()
        return (time.process_time_ns() - start) * 1e-9


class EventClock:
    """For work queued on a device: the time between two events on its current stream.

    Parameters
    ----------
    device : torch.device
        An accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def time(self, call: Callable[[], object]) -> float:
        """Device seconds between an event recorded before the call and one recorded after it."""
        before = torch.Event(self._device, enable_timing=True)
        after = torch.Event(self._device, enable_timing=True)
        before.record()
        call()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) * 1e-3


def clock_for(device: torch.device, cpu_time: bool = False) -> Clock:
    """The clock that is right for work on this device; ``cpu_time`` asks for processor time on the host."""
    if device.type != "cpu":
        return EventClock(device)
    return CpuClock() if cpu_time else HostClock()


@dataclass(slots=True)
class Contender:
    """Something to be timed.

    Attributes
    ----------
    key : hashable
        Its identity in the result.
    call : callable
        Does the work once; its argument counts the calls, so that successive calls can use different memory.
    enter : callable, optional
        Run before each turn, not timed: for instance sets the number of threads.
    """

    key: Hashable
    call: Callable[[int], object]
    enter: Callable[[], object] | None = None
    calls: int = field(default=0, init=False)

    def once(self, clock: Clock) -> float:
        """One timed call."""
        number = self.calls
        self.calls += 1
        return clock.time(lambda: self.call(number))


@dataclass(slots=True)
class Outcome:
    """What a run measured.

    Attributes
    ----------
    samples : dict
        Per contender one sample a round, in seconds; all of the same length.
    failed : dict
        Contenders that raised, with what they raised; they have no samples.
    rounds : int
    """

    samples: dict[Hashable, list[float]]
    failed: dict[Hashable, Exception]
    rounds: int


@dataclass(slots=True)
class Watcher:
    """Who is told how far a run is. Every member may be replaced."""

    stage: Callable[[str, int], None] = lambda text, steps: None
    step: Callable[[], None] = lambda: None


def interleave(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    clock: Clock,
    deadline: float | None = None,
    fewest: int = FEWEST_ROUNDS,
    most_calls: int = MOST_CALLS,
    on_turn: Callable[[], None] | None = None,
) -> Outcome:
    """Time every contender in every round.

    Parameters
    ----------
    contenders : sequence of Contender
    rounds : int
        Counted rounds; one more before them sizes the turns and is thrown away.
    clock : Clock
    deadline : float, optional
        ``time.monotonic()`` after which no further round is begun, once there are ``fewest``.
    fewest : int
    most_calls : int
        A turn has no more calls than this, and no more than fit in `TURN_SECONDS`.
    on_turn : callable, optional
        Told of each completed turn.

    Returns
    -------
    Outcome
    """
    running = list(contenders)
    failed: dict[Hashable, Exception] = {}
    sizes: dict[Hashable, int] = {}
    samples: dict[Hashable, list[float]] = {contender.key: [] for contender in contenders}

    def turn(contender: Contender, size: int | None) -> None:
        try:
            taken = _turn(contender, size, clock)
        except Exception as error:
            # A peer that breaks must not cost the others their results; the error is reported in its place.
            failed[contender.key] = error
        else:
            if size is None:
                sizes[contender.key] = max(1, min(most_calls, int(TURN_SECONDS / max(taken, 1e-9))))
            else:
                samples[contender.key].append(taken)
        if on_turn is not None:
            on_turn()

    done = 0
    for number in range(-1, rounds):
        if number >= fewest and deadline is not None and time.monotonic() > deadline:
            break
        for contender in _ordered(running, number):
            turn(contender, sizes.get(contender.key))
        running = [contender for contender in running if contender.key not in failed]
        done = number + 1
    for key in failed:
        del samples[key]
    return Outcome(samples, failed, done)


def _ordered(contenders: Sequence[Contender], number: int) -> Iterable[Contender]:
    return reversed(contenders) if number % 2 else contenders


def _turn(contender: Contender, size: int | None, clock: Clock) -> float:
    """The median of a turn of ``size`` calls; of None, the time of the second of two calls."""
    time.sleep(REST_SECONDS)
    if contender.enter is not None:
        contender.enter()
    if size is None or size > 1:
        # A call as long as a whole turn needs no warming: what it costs to wake threads is lost in it.
        contender.once(clock)
    return statistics.median(contender.once(clock) for _ in range(size or 1))
