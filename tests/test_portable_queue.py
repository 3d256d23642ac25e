"""A queue of a device that addresses the host's memory and runs behind the host: nothing goes before it was used."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch

from hal.portable.host import HostEvent
from hal.portable.runtime import Argument, Event, HoldingQueue, InPlace, Program
from hal.spec.errors import DeviceError


class Late(InPlace):
    """Does nothing before it is waited for; ``there`` says whose memory was still there then."""

    def __init__(self, error: str = "") -> None:
        self._queued: list[weakref.ref[torch.Tensor]] = []
        self._error = error
        self.there: list[bool] = []
        self.waits = 0

    def launch(self, program: Program, kernel: str, groups: int, threads: int, arguments: Sequence[Argument]) -> Event:
        self._queued += [weakref.ref(one) for one in arguments if isinstance(one, torch.Tensor)]
        return HostEvent()

    def finish(self) -> None:
        self.waits += 1
        gc.collect()
        self.there += [one() is not None for one in self._queued]
        self._queued.clear()
        if self._error:
            raise DeviceError(self._error)


def given(queue: HoldingQueue) -> weakref.ref[torch.Tensor]:
    """Launch something with tensors that are forgotten at once."""
    to = torch.zeros(4)
    queue.launch(None, "mine", 1, 1, (queue.read(torch.ones(4)), queue.write(to)[0]))  # type: ignore[arg-type]
    return weakref.ref(to)


def test_what_was_given_is_there_until_it_was_waited_for() -> None:
    device = Late()
    queue = HoldingQueue(device)
    last = [given(queue), given(queue)][-1]
    queue.finish()
    assert device.there == [True] * 4
    assert last() is None


def test_a_queue_that_is_left_half_way_waits() -> None:
    device = Late(error="it failed, which whoever waited would have been told")
    given(HoldingQueue(device))
    assert device.there == [True] * 2


def test_a_failure_is_told_and_nothing_is_freed_before() -> None:
    device = Late(error="a fault")
    queue = HoldingQueue(device)
    given(queue)
    with pytest.raises(DeviceError, match="a fault"):
        queue.finish()
    assert device.there == [True] * 2
    # It was waited for, and what fails next is not this queue's to hear.
    del queue
    gc.collect()
    assert device.waits == 1
