"""The device simulator: a vendor's runtime by its C names, with the host for a device.

``HAL_SIM=runtime:chip`` asks for it, where the runtime is one of `dialects` and the chip one of those it lists. The
library is built when first asked for, by the C++ compiler that also compiles the kernels. ``docs/simulator.md`` tells
what it looks at and how to put another runtime behind it.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Final

from hal.portable import cache, compiling
from hal.portable.host import FIX, compiler
from hal.spec.errors import BackendUnavailable, SpecError

ENV: Final = "HAL_SIM"
"""``runtime:chip``, for instance of the runtime whose C names are in ``dialects/runtime.cpp``."""
CHECK_ENV: Final = "HAL_SIM_CHECK"
"""What is looked at: some of `CHECKS`, or ``all``."""
CHECKS: Final = ("memory", "races", "uninitialised", "order", "streams", "fences")
SEED_ENV: Final = "HAL_SIM_SEED"
"""A number that orders are drawn from; 0 if unset."""

CACHE_ENV: Final = "HAL_SIM_CACHE"
"""Folder of the simulator's libraries; ``kernel-hal`` in the user's cache folder if unset."""

MARK: Final = "halSimulator"
"""A function that only the simulator's libraries have."""

_HERE: Final = Path(__file__).parent
_CHIP: Final = re.compile(r'^    \{"(\w+)", "', re.M)
_FLAGS: Final = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-pthread", f'-DHAL_SIM_FOLDER="{_HERE}"')


def asked(runtime: str) -> str:
    """The chip that is asked for under this runtime; empty if none is.

    Raises
    ------
    SpecError
        `ENV` names no chip there is, `CHECK_ENV` nothing that can be looked at, or `SEED_ENV` is no number.
    """
    wanted = os.environ.get(ENV) or ""
    if wanted and wanted not in (legal := _chips()):
        raise SpecError(ENV, repr(wanted), f"{', '.join(legal)}, or unset")
    looks = os.environ.get(CHECK_ENV) or ""
    if looks not in ("", "all") and not set(looks.split(",")) <= set(CHECKS):
        raise SpecError(CHECK_ENV, repr(looks), f"all, or some of {','.join(CHECKS)}, without blanks; or unset")
    seed = os.environ.get(SEED_ENV) or "0"
    if not re.fullmatch(r"[0-9]{1,10}", seed) or int(seed) >= 2**32:
        raise SpecError(SEED_ENV, repr(seed), "a number from 0 to 4294967295, or unset")
    name, _, chip = wanted.partition(":")
    return chip if name == runtime else ""


@lru_cache(maxsize=1)
def _chips() -> list[str]:
    """What `ENV` may say, as the dialects list it."""
    found = ((path.stem, path.read_text()) for path in sorted((_HERE / "dialects").glob("*.cpp")))
    return [f"{runtime}:{chip}" for runtime, text in found for chip in _CHIP.findall(text)]


def version() -> str:
    """What compiled kernels depend on besides their source: the simulator, the compiler, the processor, the checks."""
    checks = ",".join(sorted(filter(None, (os.environ.get(CHECK_ENV) or "").split(","))))
    return f"simulator {_digest()} of {checks or 'nothing'}"


def library(runtime: str, name: str = "") -> Path:
    """The library with the C names of this runtime, built if it is not there.

    Parameters
    ----------
    runtime : str
    name : str
        What it calls itself: once it is loaded, whoever asks for that name is given it.

    Raises
    ------
    BackendUnavailable
        There is no C++ compiler, or no folder to keep the library in.
    CompileError
    """
    named = (f"-Wl,-soname,{name}",) if name else ()
    return _built(f"{name or f'lib{runtime}.so'}-{_digest()}", runtime, "-shared", *named)


def program(name: str) -> Path:
    """As `library`, for a program that stands for one of a vendor's: a compiler, usually.

    Raises
    ------
    BackendUnavailable, CompileError
    """
    return _built(f"{name}-{_digest()}", name)


def _built(name: str, dialect: str, *flags: str) -> Path:
    core = _made(f"core-{_digest()}.o", *sorted(map(str, _HERE.glob("*.cpp"))), "-r")
    return _made(name, str(_HERE / "dialects" / f"{dialect}.cpp"), str(core), *flags)


def _made(name: str, *line: str) -> Path:
    """What the compiler makes of this line, kept."""
    try:
        folder = cache.safe_folder("simulator", variable=CACHE_ENV)
    except OSError as error:
        where = f"no private folder to build the simulator in: {error}; set {CACHE_ENV}"
        raise BackendUnavailable(f"{ENV}: {where}") from error
    made = folder / name
    if made.exists():
        return made
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several processes makes it, the others take it
        if made.exists():
            return made
        with tempfile.TemporaryDirectory(dir=folder) as work:
            output = Path(work, name)
            whole = [compiler(), *_FLAGS, *line, "-o", str(output)]
            given = "".join(f'#line 1 "{one}"\n' for one in line if one.endswith(".cpp"))
            compiling.output(whole, output, given, "the simulator does not build", line[0], FIX).replace(made)
    return made


@lru_cache(maxsize=1)
def _digest() -> str:
    """What the library is made from."""
    files = [path.read_text() for path in sorted(_HERE.rglob("*")) if path.suffix in (".cpp", ".h")]
    known = compiling.version(compiler(), FIX)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return cache.key(*files, *_FLAGS, known, platform.machine(), processor)[:16]
