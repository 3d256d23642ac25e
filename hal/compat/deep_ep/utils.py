"""Names that callers import from ``deep_ep.utils``."""

from __future__ import annotations

from hal.compat.deep_ep.event import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
