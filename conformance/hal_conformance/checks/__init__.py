"""The checks, one for every obligation of the table, found by its id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hal_conformance.context import Context


@dataclass(frozen=True, slots=True)
class Check:
    """How an obligation is held.

    Attributes
    ----------
    run : callable
        Checks one case; notes problems in the context.
    count : callable or None
        How many cases there are, for obligations whose table row leaves that to the check.
    """

    run: Callable[[Context], None]
    count: Callable[[Context], int] | None = None


CHECKS: Final[dict[str, Check]] = {}


Run = Callable[[Context], None]


def holds(obligation: str, count: Callable[[Context], int] | None = None) -> Callable[[Run], Run]:
    """Register the check of an obligation."""

    def register(run: Run) -> Run:
        assert obligation not in CHECKS, f"two checks for {obligation}"
        CHECKS[obligation] = Check(run, count)
        return run

    return register


def load() -> dict[str, Check]:
    """Every check."""
    from hal_conformance.checks import (  # noqa: F401
        basic,
        capability,
        edges,
        ep_calls,
        ep_faults,
        ep_low_latency,
        ep_masks,
        ep_misuse,
        ep_nodes,
        ep_normal,
        ep_pairs,
        ep_results,
        ep_surroundings,
        ep_unlike,
        ep_waits,
        huge,
        metamorphic,
        numbers,
        options,
        pairs,
        surroundings,
        sweep,
    )

    return CHECKS


def planned(context: Context) -> int:
    """How many cases a run has of the obligation of a context."""
    count = load()[context.obligation.id].count
    return context.obligation.count(context.settings.mode) if count is None else count(context)
