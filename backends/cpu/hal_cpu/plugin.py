"""The entry point ``cpu`` in the group ``hal.backends``."""

from __future__ import annotations

from hal.backend import Backend
from hal.plugins import hookimpl
from hal_cpu.backend import CpuBackend


@hookimpl
def hal_backend() -> Backend:
    """Return the CPU backend; its compiled part is loaded by the first probe or call."""
    return CpuBackend()
