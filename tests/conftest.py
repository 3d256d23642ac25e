"""Fixtures of more than one test file."""

from __future__ import annotations

import pytest
from distributions import Interpreter, bare_site
from seeds import ENV, SEED


def pytest_report_header() -> str:
    """Say how to repeat this run; hypothesis prints its own line for what it finds."""
    return f"seed: {ENV}={SEED}"


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    """An interpreter with the HAL and what it needs, and nothing that extends it."""
    return Interpreter((bare_site(tmp_path_factory.mktemp("bare") / "site"),))
