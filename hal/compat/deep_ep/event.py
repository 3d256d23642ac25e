"""Events: what asynchronous calls return and what later calls wait for."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hal.spec.errors import SpecError

Wait = Callable[[], None]


class EventHandle:
    """A point in time: everything asked of this process before it was made.

    Calls of the HAL hold their arguments by the time they return, so on the host there is nothing to record; with an
    accelerator the current stream's position is.
    """

    def __init__(self) -> None:
        self._finish: Wait | None = None
        self._recorded: torch.Event | None = None
        if torch.accelerator.is_available():
            self._recorded = torch.Event(torch.accelerator.current_accelerator())
            self._recorded.record()

    @classmethod
    def _of(cls, finish: Wait) -> EventHandle:
        """The completion of a call."""
        made = cls.__new__(cls)
        made._finish, made._recorded = finish, None
        return made

    def current_stream_wait(self) -> None:
        """Let what follows in this process come after the event. The first waiter completes the call it belongs to."""
        if self._finish is not None:
            self._finish()
        if self._recorded is not None:
            self._recorded.wait()

    wait = current_stream_wait


class EventOverlap:
    """An event with the conveniences of the published wrapper: a ``with`` block that waits at its end, a last hook.

    Parameters
    ----------
    event : EventHandle, optional
        None for a call that was not asynchronous.
    extra_tensors : tuple of Tensor, optional
        Kept alive as long as this object.
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[Tensor, ...] | None = None) -> None:
        if event is not None and not isinstance(event, EventHandle):
            raise SpecError("event", type(event).__name__, "an EventHandle or None")
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Callable[[], Any] | None = None
        self._release = False

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Return when the results of the call may be used; then run the hook, once.

        Raises
        ------
        SpecError
            There is no event: the call was not asynchronous, or its event was released.
        RankFailure
            The call failed.
        """
        if self.event is None:
            raise SpecError("event", None, "the event of an asynchronous call, not yet released")
        self.event.current_stream_wait()
        hook, self.hook_after_wait = self.hook_after_wait, None
        if hook is not None:
            hook()
        if release_handle:
            self.event = None

    def register_hook_after_wait(self, hook_after_wait: Callable[[], Any]) -> None:
        """Have something run when the event has been waited for."""
        if self.hook_after_wait is not None:
            raise SpecError("hook_after_wait", "a second hook", "one hook an event")
        self.hook_after_wait = hook_after_wait

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """Choose what the end of the coming ``with`` block does with the event."""
        self._release = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        release, self._release = self._release, False
        if self.event is not None:
            self.current_stream_wait(release)


def wait_for(name: str, event: Any) -> None:
    """Wait for the event a caller passed as ``name``, in either published form; None is no event.

    Raises
    ------
    SpecError
        It is something else.
    """
    if isinstance(event, EventOverlap):
        if event.event is not None:
            event.current_stream_wait()
    elif isinstance(event, EventHandle):
        event.current_stream_wait()
    elif event is not None:
        raise SpecError(name, type(event).__name__, "an EventOverlap, an EventHandle or None")


class Completion:
    """Runs the steps that complete a call, once; later calls raise what the first raised."""

    __slots__ = ("_error", "_steps")

    def __init__(self, *steps: Wait) -> None:
        self._steps: tuple[Wait, ...] = steps
        self._error: BaseException | None = None

    def __call__(self) -> None:
        """Complete the call."""
        if self._error is not None:
            raise self._error
        steps, self._steps = self._steps, ()
        try:
            for step in steps:
                step()
        except BaseException as error:
            self._error = error
            raise


def overlap(completion: Wait, asynchronous: bool) -> EventOverlap:
    """The event of a call; one that is not asynchronous is completed here."""
    if asynchronous:
        return EventOverlap(EventHandle._of(completion))
    completion()
    return EventOverlap()
