"""How much of a call is checked: ``HAL_VALIDATE=off|shapes|full``.

``off`` trusts the caller entirely: a wrong call is then undefined behaviour. ``shapes`` (the default) looks at
everything that is known without reading tensor memory. ``full`` also reads the index tensors, which waits for the
device, and asks whether ``out`` may be written.
"""

from __future__ import annotations

import enum
import os
from typing import Final

from hal.spec.errors import SpecError, shown

ENV: Final = "HAL_VALIDATE"


class Level(enum.IntEnum):
    """Validation levels in order of strictness."""

    OFF = 0
    SHAPES = 1
    FULL = 2


_current: Level | None = None


def validation_level() -> Level:
    """The level in force: the last `set_validation`, else ``HAL_VALIDATE`` as it was at the first call, else shapes."""
    if _current is None:
        return set_validation(os.environ.get(ENV) or "shapes")
    return _current


def set_validation(level: str | Level) -> Level:
    """Set the level for this process and return it.

    Raises
    ------
    SpecError
        The level is none of ``off``, ``shapes``, ``full``.
    """
    global _current
    try:
        _current = level if isinstance(level, Level) else Level[level.upper()]
    except (KeyError, AttributeError):
        raise SpecError(ENV, shown(level), "off, shapes or full") from None
    return _current
