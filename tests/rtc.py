"""Run-time compilers without their devices: NVRTC and hiprtc, which have one interface under two names."""

from __future__ import annotations

import ctypes
from typing import Any


class Rtc:
    """A compiler in a shared library.

    Parameters
    ----------
    library : str
        What the loader is given.
    prefix : str
        ``nvrtc`` or ``hiprtc``.
    code : str
        What its machine code is called: ``CUBIN`` or ``Code``.
    """

    def __init__(self, library: str, prefix: str, code: str) -> None:
        self._library = ctypes.CDLL(library)
        self._prefix = prefix
        self._code = code

    def compile(self, text: str, *options: str) -> bytes:
        """Machine code; an AssertionError with the compiler's log where it finds fault."""
        program = ctypes.c_void_p()
        assert self._call("CreateProgram", ctypes.byref(program), text.encode(), b"kernels", 0, None, None) == 0
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = self._call("CompileProgram", program, len(options), flags)
        assert not failed, self._read(program, "ProgramLog").decode()
        return self._read(program, self._code)

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        assert self._call(f"Get{what}Size", program, ctypes.byref(size)) == 0
        content = ctypes.create_string_buffer(size.value)
        assert self._call(f"Get{what}", program, content) == 0
        return content.raw

    def _call(self, name: str, *arguments: Any) -> int:
        return int(getattr(self._library, self._prefix + name)(*arguments))
