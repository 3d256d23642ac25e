"""Keeps the suite's own small arithmetic on one host thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hal_conformance.case import MlaCase

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
