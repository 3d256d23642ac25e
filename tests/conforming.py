"""The suite within one test: a quick run of a few obligations, of which none may fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hal_conformance.context import Settings
from hal_conformance.session import Session
from seeds import SEED

from hal import plugins

HELD = ("PASS", "UNCOVERED")


def conform(backend: str, obligations: Sequence[str], held: Sequence[str] = HELD) -> dict[str, Any]:
    """The facts of the run; every obligation was judged, and none otherwise than ``held``."""
    plugins.reset()
    session = Session(Settings(backend, SEED, "quick", patience=6.0), list(obligations))
    try:
        session.run()
    finally:
        session.close()
        plugins.reset()
    seen = {r.id: (r.status, r.message) for r in session.results.values() if r.status != "SKIPPED"}
    assert set(seen) == set(obligations)
    wrong = {name: found for name, found in seen.items() if found[0] not in held}
    assert not wrong, wrong
    return session.facts
