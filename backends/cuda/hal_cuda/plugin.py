"""The entry point ``cuda`` in the group ``hal.backends``."""

from __future__ import annotations

from hal.backend import Backend
from hal.plugins import hookimpl
from hal_cuda.backend import CudaBackend


@hookimpl
def hal_backend() -> Backend:
    """Return the CUDA backend; driver and compilers are looked for by the first probe."""
    return CudaBackend()
