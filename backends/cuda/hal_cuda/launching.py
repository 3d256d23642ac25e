"""Loaded code, and how its kernels are launched: torch tensors by address, on torch's current stream."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from hal.portable.ipc import IpcWindow
from hal.portable.runtime import Words
from hal.spec.errors import DeviceError
from hal_cuda.calls import checked, current, is_current, raw_stream

_BUFFER_POINTER, _BUFFER_SIZE = 1, 2
"""``CU_LAUNCH_PARAM_…``"""
_FORMS: Final = {"i": "i", "l": "q", "q": "q", "f": "f", "d": "d"}
"""Of struct, for the types of numpy."""


@dataclass(slots=True)
class Module:
    """Loaded code on one device.

    Parameters
    ----------
    cubin : bytes
    device : int
    """

    cubin: bytes
    device: int
    _module: Any = field(default=None, init=False)
    _functions: dict[str, Any] = field(default_factory=dict, init=False)
    _calls: dict[str, Call] = field(default_factory=dict, init=False)
    _lock: Any = field(default_factory=threading.Lock, init=False)

    def launch(self, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], arguments: Sequence[Any]) -> None:
        """Queue a kernel on torch's current stream of the device; tensors and windows are passed by address.

        ``arguments`` other than those must be of the kernel's own types: `Words`, numpy scalars, or ints for 64-bit
        integers. They are of the same types at every launch of a kernel.

        Raises
        ------
        DeviceError
        """
        if is_current(self.device):
            self._queue(kernel, grid, block, arguments)
        else:
            with current(self.device):
                self._queue(kernel, grid, block, arguments)

    def _queue(self, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], arguments: Sequence[Any]) -> None:
        values, stream = plain(arguments), raw_stream(self.device)
        with self._lock:
            call = self._calls.get(kernel)
            if call is None:
                call = self._calls[kernel] = Call(self.function(kernel).ptr, arguments)
            call.form.pack_into(call.values, 0, *values)
            try:
                call.launch(call.function, *grid, *block, 0, stream, 0, call.extra)
            except RuntimeError as error:
                raise DeviceError(f"cuLaunchKernel({kernel}): {type(error).__name__}: {error}") from error

    def function(self, kernel: str) -> Any:
        """One of its kernels, loaded once; the device must be `current`.

        Raises
        ------
        DeviceError
        """
        from cupy.cuda import function as cupy_function

        if self._module is None:
            module = cupy_function.Module()
            checked("cuModuleLoadData", module.load, self.cubin)
            self._module = module
        if kernel not in self._functions:
            self._functions[kernel] = checked(f"cuModuleGetFunction({kernel})", self._module.get_function, kernel)
        return self._functions[kernel]


def plain(arguments: Sequence[Any]) -> list[Any]:
    """Numbers that a launch's arguments come to."""
    values: list[Any] = []
    for argument in arguments:
        kind = type(argument)
        if kind is int:
            values.append(argument)
        elif kind is Words:
            values += argument
        elif kind is Tensor:
            values.append(argument.data_ptr())
        else:
            values.append(_plain(argument))
    return values


def _plain(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return int(argument) if isinstance(argument, IpcWindow) else argument.item()


def form_of(arguments: Sequence[Any]) -> str:
    """How they lie one after the other, as struct has it."""
    form = "@"
    for argument in arguments:
        if isinstance(argument, Words):
            form += "i" * len(argument)
        else:
            form += "q" if isinstance(argument, (Tensor, int)) else _FORMS[argument.dtype.char]
    return form


class Call:
    """Arguments of a kernel in one piece of memory, as the driver takes them: laid out like the members of a C struct.

    Parameters
    ----------
    function : int
        The driver's.
    arguments : sequence
        Of any launch, for their types.

    Attributes
    ----------
    form : Struct
    values : ctypes array
        Where it is to be packed; the driver reads it during the call.
    extra : int
        Address of what ``cuLaunchKernel`` is given.
    launch : callable
        That.
    """

    __slots__ = ("_extra", "_size", "extra", "form", "function", "launch", "values")

    def __init__(self, function: int, arguments: Sequence[Any]) -> None:
        from cupy.cuda import driver

        self.launch, self.function, self.form = driver.launchKernel, function, struct.Struct(form_of(arguments))
        self.values = (ctypes.c_char * max(self.form.size, 1))()
        self._size = ctypes.c_size_t(self.form.size)
        given = (_BUFFER_POINTER, ctypes.addressof(self.values), _BUFFER_SIZE, ctypes.addressof(self._size), 0)
        self._extra = (ctypes.c_void_p * 5)(*given)
        self.extra = ctypes.addressof(self._extra)
