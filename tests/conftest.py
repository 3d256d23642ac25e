"""Fixtures of more than one test file."""

from __future__ import annotations

import os

import pytest
from distributions import Interpreter, bare_site
from seeds import ENV, SEED

# More threads than torch may use here, so that contexts are split and merged as they are on a real machine.
os.environ.setdefault("HAL_CPU_THREADS", "3")


def pytest_report_header() -> str:
    """Say how to repeat this run; hypothesis prints its own line for what it finds."""
    return f"seed: {ENV}={SEED}"


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    """An interpreter with the HAL and what it needs, and nothing that extends it."""
    return Interpreter((bare_site(tmp_path_factory.mktemp("bare") / "site"),))
