"""Threads: the suite's own small arithmetic stays on one, and calls side by side have one each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import TypeVar

import torch

from hal_conformance.case import MlaCase

Made = TypeVar("Made")

_SMALL = 2e9
"""Operations of a case below which waking a second thread takes longer than the work; on a busy machine much longer."""


def is_small(case: MlaCase) -> bool:
    """Whether one thread is enough for the suite's part of a case."""
    return case.flops() < _SMALL


@contextmanager
def few_threads(few: bool) -> Iterator[None]:
    """One thread for torch on the host, or as many as before; never around a call of the backend."""
    threads = torch.get_num_threads()
    if few:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(calls: Sequence[Callable[[], Made]]) -> list[Made | BaseException]:
    """Make each call in a thread of its own, all at once; what each gave, or raised."""
    start = Barrier(len(calls))

    def begin(call: Callable[[], Made]) -> Made:
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        made = [threads.submit(begin, call) for call in calls]
        return [one.exception() or one.result() for one in made]
