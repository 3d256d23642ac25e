"""The entry point ``rocm`` in the group ``hal.backends``."""

from __future__ import annotations

from hal.backend import Backend
from hal.plugins import hookimpl
from hal_rocm.backend import RocmBackend


@hookimpl
def hal_backend() -> Backend:
    """Return the ROCm backend; its libraries are looked for by the first probe."""
    return RocmBackend()
