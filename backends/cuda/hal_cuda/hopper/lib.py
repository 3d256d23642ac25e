"""The driver calls that cupy does not offer: tensor maps, and launches that overlap.

By ctypes on ``libcuda.so.1``, which every driver installs; nothing here is touched before a device was found.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

from hal.spec.errors import DeviceError

_PROGRAMMATIC_SERIALIZATION: Final = 6
_MAX_DYNAMIC_SHARED: Final = 8
_UINT16: Final = 1
_SWIZZLE_128B: Final = 3
_PROMOTE_128B: Final = 2


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class TensorMap(ctypes.Structure):
    """A ``CUtensorMap``: 128 bytes on a 64-byte boundary."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def check(code: int, call: str) -> None:
    """Turn a driver's result into a `DeviceError` that names the call and the error."""
    if code:
        name = ctypes.c_char_p()
        _library().cuGetErrorName(code, ctypes.byref(name))
        raise DeviceError(f"{call} failed: {name.value.decode() if name.value else 'error'} ({code})")


class Kernel:
    """A loaded kernel, launched so that it may begin while the kernel before it ends.

    Parameters
    ----------
    handle : int
        The ``CUfunction``.
    name : str
        For errors.
    threads : int
        Threads of a block.
    shared_bytes : int
        Dynamic shared memory of a block; above 48 KiB the limit is raised here.
    """

    def __init__(self, handle: int, name: str, threads: int, shared_bytes: int = 0) -> None:
        self._handle = ctypes.c_void_p(handle)
        self._name = name
        self._attribute = _Attribute(id=_PROGRAMMATIC_SERIALIZATION)
        self._attribute.value[0] = 1
        self._attributes = ctypes.pointer(self._attribute)
        self._threads = threads
        self._shared = shared_bytes
        self._launch = _library().cuLaunchKernelEx
        if shared_bytes > 48 * 1024:
            code = _library().cuFuncSetAttribute(self._handle, _MAX_DYNAMIC_SHARED, shared_bytes)
            check(code, f"cuFuncSetAttribute({name}, {shared_bytes} bytes of shared memory)")

    def __call__(
        self, grid: tuple[int, int, int], stream: int, *arguments: ctypes.Structure | ctypes._SimpleCData[Any]
    ) -> None:
        """Launch on a stream (a ``CUstream``); the arguments are copied before this returns. From any thread."""
        # One of its own for every call: the driver reads it without the interpreter's lock.
        config = _Config(grid, (self._threads, 1, 1), self._shared, stream, self._attributes, 1)
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        check(self._launch(ctypes.byref(config), self._handle, pointers, None), f"launch of {self._name}")


def tensor_map(address: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> TensorMap:
    """Describe a tensor of 16-bit elements to the copy engine, which lays boxes down swizzled in rows of 128 bytes.

    Parameters
    ----------
    address : int
        On a 16-byte boundary.
    sizes : sequence of int
        Innermost first.
    strides : sequence of int
        In bytes, of every dimension but the innermost; multiples of 16.
    box : sequence of int
        What one copy takes; the innermost 64 elements.

    Raises
    ------
    DeviceError
        The driver refuses the description.
    """
    rank = len(sizes)
    memory = (ctypes.c_char * 192)()
    aligned = (ctypes.addressof(memory) + 63) & ~63
    code = _library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        _UINT16,
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*([1] * rank)),
        0,
        _SWIZZLE_128B,
        _PROMOTE_128B,
        0,
    )
    check(code, f"cuTensorMapEncodeTiled(sizes {list(sizes)}, strides {list(strides)}, box {list(box)})")
    return TensorMap.from_buffer_copy(ctypes.string_at(aligned, 128))
