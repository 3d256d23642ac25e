"""The engine of one node whose ranks meet on their devices."""

from __future__ import annotations

from typing import Final

from hal.portable.direct.packed import DirectPackedCalls

MOST_BINS: Final = 1 << 16
"""Experts of a group, with room for those that are none: so many counts a rank are kept."""
MOST_CHOICES: Final = 1024
"""Experts of a token: a group keeps the places of their rows in local memory."""


class DirectEpEngine(DirectPackedCalls):
    """All calls of one node."""
