"""What ``pytest --pyargs hal_conformance`` collects: one test for every obligation, in the order of the levels."""

from __future__ import annotations

import pytest

from hal_conformance.plugin import current
from hal_conformance.table import OBLIGATIONS


@pytest.mark.parametrize("obligation", OBLIGATIONS, ids=[o.id for o in OBLIGATIONS])
def test_obligation(obligation, request):  # type: ignore[no-untyped-def]
    """Hold one obligation."""
    session = current(request.config)
    if session is None:
        pytest.fail("name the backend to test: --hal-backend NAME", pytrace=False)
    result = session.run_one(obligation)
    if result.status in ("REFUSED", "UNCOVERED", "BLOCKED", "SKIPPED"):
        pytest.skip(f"{result.status}: {result.message}")
    if result.status == "WAIVED":
        pytest.xfail(result.message)
    if result.status != "PASS":
        lines = [f"{obligation.id} {obligation.title}: {result.status}: {result.message}", obligation.sentence]
        for failure in result.failures[:1]:
            cause = (failure.get("diagnosis") or {}).get("cause")
            lines += [f"likely cause: {cause}"] if cause else []
            lines += [failure["reproduce"]]
        pytest.fail("\n".join(lines), pytrace=False)
