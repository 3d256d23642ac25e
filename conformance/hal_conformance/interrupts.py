"""What a keyboard and batch systems send to end a run: it stops then, and its report is written whatever follows."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final

WRITING: Final = 30
"""Seconds at most, also on a busy machine, from the first signal to the report."""

_ENDING: Final = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While entered, the first signal raises `KeyboardInterrupt` in what `running` holds, and none raises it elsewhere.

    One that came before is heard there too, and what comes after it has ended is only answered.
    """

    def __init__(self) -> None:
        self._heard = self._running = self._ended = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in _ENDING:
            # Who is started in the background is deaf to some, and stays so.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """What the first signal ends."""
        self._running = True
        try:
            if self._heard:
                raise KeyboardInterrupt
            yield
        finally:
            self._running, self._ended = False, True

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = True
        if self._running:
            self._running = False
            raise KeyboardInterrupt
        if self._ended:
            # Printing is not for handlers: what they interrupt may be printing.
            with contextlib.suppress(OSError):
                os.write(2, b"  the report is being written\n")
