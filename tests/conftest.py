"""Fixtures of more than one test file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributions import Interpreter, bare_site
from hal_conformance.process import Worker
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


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where ranks keep compiled kernels: compiled in this run, but once for all of its processes."""
    mine = tmp_path_factory.getbasetemp()
    folder: Path = (mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine) / "kernels"
    folder.mkdir(mode=0o700, exist_ok=True)
    return str(folder)


@pytest.fixture(scope="session")
def kept_worker() -> Iterator[Worker]:
    """A process of the suite that stays, with the ranks it started, which what wrong engines do to theirs survives."""
    with Worker() as worker:
        yield worker
