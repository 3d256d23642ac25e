"""The entry point ``dcu`` in the group ``hal.backends``."""

from __future__ import annotations

from hal.backend import Backend
from hal.plugins import hookimpl
from hal_dcu.backend import DcuBackend


@hookimpl
def hal_backend() -> Backend:
    """Return the DCU backend; its libraries are looked for by the first probe."""
    return DcuBackend()
