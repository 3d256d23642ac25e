"""Compile CUDA C++ with NVRTC, or find it compiled already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from hal.portable import cache, compiling
from hal_cuda.calls import checked

CACHE_ENV: Final = "HAL_CUDA_CACHE"
"""Folder of what was compiled; `hal.portable.cache` says where it is by default and who may write there."""


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
    return compile_text(source.read_text(), source, arch, options, headers)


def compile_text(
    text: str, source: Path, arch: str, options: Sequence[str] = (), headers: Mapping[str, str] | None = None
) -> bytes:
    """As `compile_source`, of a text that was put together; ``source`` is what errors name."""
    flags, headers = (f"-arch={arch}", "-std=c++17", *options), dict(headers or {})
    parts = (version(), *flags, source.name, text, *(part for item in sorted(headers.items()) for part in item))
    folder = cache.private_folder("cuda", arch, variable=CACHE_ENV)
    return cache.kept(folder, f"{cache.key(*parts)}.bin", lambda: _compile(text, source, flags, headers))


def version() -> str:
    """Of the compiler."""
    from cupy.cuda import nvrtc

    return "NVRTC " + ".".join(map(str, checked("nvrtcVersion", nvrtc.getVersion)))


def _compile(text: str, source: Path, flags: tuple[str, ...], headers: dict[str, str]) -> bytes:
    from cupy.cuda import nvrtc

    names, texts = (tuple(part.encode() for part in parts) for parts in (headers, headers.values()))
    program = checked("nvrtcCreateProgram", nvrtc.createProgram, text, source.name, texts, names)
    try:
        nvrtc.compileProgram(program, flags)
        cubin: bytes = checked("nvrtcGetCUBIN", nvrtc.getCUBIN, program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        message, fix = f"NVRTC: {error} for {' '.join(flags)}", "the compiler is the NVRTC that cupy loads"
        raise compiling.refusal(message, log, text, str(source), fix) from error
    finally:
        checked("nvrtcDestroyProgram", nvrtc.destroyProgram, program)
    # cupy leaves out the last byte, as it does with the zero that ends a text; here it is the last of a program header.
    return cubin + b"\0"
