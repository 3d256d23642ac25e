"""Caches larger than memory: on the host only the pages that are touched exist; on a device all of it is allocated."""

from __future__ import annotations

import mmap
from typing import Final

import torch
from torch import Tensor

from hal.spec.errors import first_line

_NORESERVE: Final = getattr(mmap, "MAP_NORESERVE", 0x4000)
_ROOM: Final = 1.25
"""Times a cache that must be free on a device: what a backend needs beside it."""


class NoRoom(Exception):
    """The machine does not give so much; the text says why."""


def reserve(elements: int, dtype: torch.dtype, device: str) -> Tensor:
    """A one-dimensional tensor of so many elements, of which hardly any will be touched.

    Raises
    ------
    NoRoom
        Neither address space nor memory is there for it.
    """
    size = elements * dtype.itemsize
    if torch.device(device).type == "cpu":
        return _mapped(size, dtype)
    # The host has to have it too: cases are judged again there.
    _mapped(size, dtype)
    free = _free(device)
    if free is None:
        raise NoRoom(f"how much memory {device} has free is not known")
    if free < size * _ROOM:
        raise NoRoom(f"{device} has {free / 2**30:.1f} GiB free, and {size * _ROOM / 2**30:.1f} are needed")
    try:
        return torch.empty(elements, dtype=dtype, device=device)
    except RuntimeError as error:
        raise NoRoom(f"{device}: {first_line(error)}") from error


def _mapped(size: int, dtype: torch.dtype) -> Tensor:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except (OSError, ValueError, OverflowError) as error:
        raise NoRoom(f"the host refuses {size / 2**30:.1f} GiB of address space: {error}") from error
    return torch.frombuffer(memory, dtype=dtype)


def _free(device: str) -> int | None:
    """Bytes a device has free, where torch can tell."""
    tell = getattr(torch.get_device_module(device), "mem_get_info", None)
    return None if tell is None else int(tell(torch.device(device))[0])
