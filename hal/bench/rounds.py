"""Interleaved timing: in every round each contender has one turn, so that a disturbance falls on all of them alike.

The order is reversed every other round, so that nobody always follows the same neighbour. A turn rests a moment
(threads of the one before may still be spinning), warms up with a call that is not counted, then times calls one by
one; the median of a turn is the contender's sample of the round. Ratios are taken between samples of one round.
"""

from __future__ import annotations

import functools
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

FILLS: Final = 2
FILL_BYTES: Final = 256 << 20
"""What keeps a device busy for each call queued behind it: some 0.1 ms a fill, more than queueing a call takes."""


class Clock(Protocol):
    """How long calls take."""

    def times(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """For each call, in order, the seconds from its start until its result is complete."""
        ...


class _OneByOne:
    """For clocks of the host, where a call is over when it returns."""

    def times(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """One after the other."""
        return [self.time(call) for call in calls]

    def time(self, call: Callable[[], object]) -> float:
        """One call."""
        raise NotImplementedError


class HostClock(_OneByOne):
    """For work that is complete when the call returns."""

    def time(self, call: Callable[[], object]) -> float:
        """Wall-clock seconds of the call."""
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) * 1e-9


class CpuClock(_OneByOne):
    """For work of one thread on a machine shared with others: processor time, which does not run while it waits.

    What it does not see is time lost to caches and memory bandwidth that others use.
    """

    def time(self, call: Callable[[], object]) -> float:
        """Seconds of processor time that all threads of the process took during the call."""
        start = time.process_time_ns()
        call()
        return (time.process_time_ns() - start) * 1e-9


class EventClock:
    """For work queued on a device: the time between events on its current stream.

    The device is kept busy with something else while the calls are queued, so that what is timed is its work and not
    the host's: an engine queues far ahead, or replays a graph.

    Parameters
    ----------
    device : torch.device
        An accelerator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._filler: torch.Tensor | None = None

    def times(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Device seconds between an event recorded before each call and one recorded after it."""
        marks = [self._mark() for _ in range(2 * len(calls))]
        for _ in range(FILLS * len(calls)):
            self._fill()
        for number, call in enumerate(calls):
            marks[2 * number].record()
            call()
            marks[2 * number + 1].record()
        marks[-1].synchronize()
        return [before.elapsed_time(after) * 1e-3 for before, after in zip(marks[::2], marks[1::2], strict=True)]

    def _mark(self) -> torch.Event:
        return torch.Event(self._device, enable_timing=True)

    def _fill(self) -> None:
        if self._filler is None:
            self._filler = torch.empty(FILL_BYTES, dtype=torch.uint8, device=self._device)
        self._filler.zero_()


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

    def timed(self, clock: Clock, count: int) -> list[float]:
        """Seconds of so many calls."""
        numbers = range(self.calls, self.calls + count)
        self.calls += count
        return clock.times([functools.partial(self.call, number) for number in numbers])


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
        contender.timed(clock, 1)
    return statistics.median(contender.timed(clock, size or 1))
