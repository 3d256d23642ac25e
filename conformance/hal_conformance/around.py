"""Settings of a process that others there may have made when a backend is called; no result may depend on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final, TypeVar

import torch

Value = TypeVar("Value")


@contextlib.contextmanager
def _set(put: Callable[[Value], object], there: Value, value: Value) -> Iterator[None]:
    put(value)
    try:
        yield
    finally:
        put(there)


SETTINGS: Final[dict[str, Callable[[], AbstractContextManager[object]]]] = {
    "torch.inference_mode()": torch.inference_mode,
    "float64 as torch's default dtype": lambda: _set(torch.set_default_dtype, torch.get_default_dtype(), torch.float64),
    "bfloat16 as torch's default dtype": lambda: _set(
        torch.set_default_dtype, torch.get_default_dtype(), torch.bfloat16
    ),
    "another default device": lambda: torch.device("meta"),
    "1 thread of torch": lambda: _set(torch.set_num_threads, torch.get_num_threads(), 1),
    "5 threads of torch": lambda: _set(torch.set_num_threads, torch.get_num_threads(), 5),
    "torch.no_grad()": torch.no_grad,
}
"""By name, each as what a ``with`` takes."""
