"""Compile, load and launch CUDA C++ through cupy: torch tensors by address, on torch's current stream.

Every call of the driver or the compiler goes through `checked`, which turns its error into one of the HAL's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from hal.spec.errors import CompileError, DeviceError

CACHE_ENV: Final = "HAL_CUDA_CACHE"

T = TypeVar("T")


def missing() -> str:
    """Why there is no driver, in words; empty if there is one."""
    try:
        import cupy  # noqa: F401  (whether it loads is the question)
    except ImportError as error:
        return f"cupy does not import: {str(error).splitlines()[0]}"
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


def cache_folder(arch: str) -> Path | None:
    """Where compiled code of an architecture is kept: ours alone, or None where there can be no such folder.

    Code in it is run, so nobody else may be able to write there.
    """
    chosen = os.environ.get(CACHE_ENV)
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kernel-hal"
    folder = base / "cuda" / arch
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    private = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if private else None


def compile_source(
    source: Path, arch: str, options: Sequence[str] = (), headers: Mapping[str, str] | None = None
) -> bytes:
    """Compile one file with NVRTC, or find it compiled already. Needs no device.

    Parameters
    ----------
    source : Path
    arch : str
        For instance ``sm_90a``.
    options : sequence of str
        Of the compiler.
    headers : mapping of str to str, optional
        Texts of included files, by the name they are included as.

    Returns
    -------
    bytes
        A cubin.

    Raises
    ------
    CompileError
        Carries the compiler's log and the path of the source.
    """
    from cupy.cuda import nvrtc

    text, headers = source.read_text(), dict(headers or {})
    flags = (f"-arch={arch}", "-std=c++17", *options)
    version = ".".join(map(str, checked("nvrtcVersion", nvrtc.getVersion)))
    parts = (version, *flags, source.name, text, *(part for item in sorted(headers.items()) for part in item))
    # Lengths keep two different lists of parts from being one text.
    key = hashlib.sha256("\0".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()
    folder = cache_folder(arch)
    kept = None if folder is None else folder / f"{key}.cubin"
    if kept is not None and kept.is_file():
        return kept.read_bytes()
    made = _compile(nvrtc, text, source, flags, headers)
    if kept is not None:
        _keep(kept, made)
    return made


def _compile(nvrtc: Any, text: str, source: Path, flags: tuple[str, ...], headers: dict[str, str]) -> bytes:
    names, texts = (tuple(part.encode() for part in parts) for parts in (headers, headers.values()))
    program = checked("nvrtcCreateProgram", nvrtc.createProgram, text, source.name, texts, names)
    try:
        nvrtc.compileProgram(program, flags)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise CompileError(f"NVRTC: {error} for {' '.join(flags)}", log=log, source_path=str(source)) from error
    cubin: bytes = checked("nvrtcGetCUBIN", nvrtc.getCUBIN, program)
    checked("nvrtcDestroyProgram", nvrtc.destroyProgram, program)
    # cupy leaves out the last byte, as it does with the zero that ends a text; here it is the last of a program header.
    return cubin + b"\0"


def _keep(path: Path, content: bytes) -> None:
    """Write beside and rename, so that nobody ever reads half a file. A full disk costs only the next compilation."""
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise


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

    def launch(
        self, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], arguments: Sequence[Any], shared: int = 0
    ) -> None:
        """Queue a kernel on torch's current stream of the device; tensors are passed by address.

        ``arguments`` other than tensors must be of the kernel's own types: numpy scalars, or ints for 64-bit integers.

        Raises
        ------
        DeviceError
        """
        import cupy

        with torch.cuda.device(self.device):
            function = self._function(kernel, shared)
            stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(self.device).cuda_stream, self.device)
            plain = tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
            with stream:
                checked(f"cuLaunchKernel({kernel})", lambda: function(grid, block, plain, shared_mem=shared))

    def _function(self, kernel: str, shared: int) -> Any:
        from cupy.cuda import function as cupy_function

        if self._module is None:
            module = cupy_function.Module()
            checked("cuModuleLoadData", module.load, self.cubin)
            self._module = module
        if kernel not in self._functions:
            self._functions[kernel] = checked(f"cuModuleGetFunction({kernel})", self._module.get_function, kernel)
        found = self._functions[kernel]
        if shared > 48 << 10:
            # More than the default has to be asked for.
            checked(f"cuFuncSetAttribute({kernel})", _allow_shared, found, shared)
        return found


def _allow_shared(function: Any, shared: int) -> None:
    from cupy.cuda import driver

    attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    driver.funcSetAttribute(function.ptr, attribute, shared)
