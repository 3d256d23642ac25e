"""Calls of CUDA's driver and runtime through cupy: their errors as the HAL's, and the device they are made on."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import torch

from hal.spec.errors import DeviceError, first_line

T = TypeVar("T")

_RAW_STREAM: Final = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_DEVICE: Final = getattr(torch._C, "_cuda_getDevice", None)
"""What torch's own compilers ask: calls shorter by microseconds than those that make an object of a stream."""

_seen: Final = threading.local()


def missing() -> str:
    """Why there is no driver, in words; empty if there is one."""
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed"
    try:
        import cupy  # noqa: F401  (whether it loads is the question)
    except Exception as error:  # it may fail at its import in any way
        return f"cupy does not import: {first_line(error)}"
    return ""


def checked(name: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call the driver.

    Raises
    ------
    DeviceError
        It refused; names the call and the driver's own error.
    """
    try:
        return function(*arguments)
    except (RuntimeError, OSError) as error:
        # cupy's driver, runtime and compiler errors are all RuntimeErrors.
        raise DeviceError(f"{name}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def current(device: int) -> Iterator[None]:
    """Make a device this thread's, and its context too.

    The runtime's calls bring a context to a thread by themselves, and torch counts on that. The driver's launches do
    not: in a thread that has only taken memory from torch's cache they fail with ``CUDA_ERROR_INVALID_CONTEXT``.
    """
    from cupy.cuda import runtime

    with torch.cuda.device(device):
        checked("cudaSetDevice", runtime.setDevice, device)
        _seen.device = device
        yield


def raw_stream(device: int) -> int:
    """Address of torch's current stream of a device."""
    if _RAW_STREAM is None:
        return torch.cuda.current_stream(device).cuda_stream
    return int(_RAW_STREAM(device))


def is_current(device: int) -> bool:
    """Whether this thread has been at `current` before, and has not gone to another device since."""
    return _DEVICE is not None and getattr(_seen, "device", None) == device == _DEVICE()
