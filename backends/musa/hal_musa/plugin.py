"""The entry point ``musa`` in the group ``hal.backends``."""

from __future__ import annotations

from hal.backend import Backend
from hal.plugins import hookimpl
from hal_musa.backend import MusaBackend


@hookimpl
def hal_backend() -> Backend:
    """Return the MUSA backend; platforms are looked for by the first probe."""
    return MusaBackend()
