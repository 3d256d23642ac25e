"""What holds for every test of the repository.

In CI nothing is skipped because a part is missing. With ``--sample`` a fifth of the tests that take long and have
others of their kind are run, another fifth each time. Tests of a module that share a fixture run in one process. Torch
keeps to one thread, since tests run side by side and its threads would only wait for each other.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import TypeVar

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
CI = os.environ.get("CI", "").lower() in ("1", "true")
# The conformance suite skips by its own rules: what a backend does not declare, or what a filter leaves out.
SUITE = Path(__file__).parent / "conformance"

Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say that the run has to end soon."""
    parser.addoption("--sample", action="store_true", help="of the tests marked sampled, run the fifth the seed draws")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start what takes long first, so that at the end no worker is left alone with it."""
    if config.getoption("--sample"):
        _sample(config, items)
    together = Counter[str]()
    for item in items:
        _keep_together(item)
        together[_group(item)] += _seconds(item)
    items.sort(key=lambda item: together[_group(item)], reverse=True)


def _sample(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out four of every five sampled tests that take about as long, so that every draw takes about as long."""
    from seeds import SEED

    sampled = sorted((item for item in items if item.get_closest_marker("sampled")), key=_seconds, reverse=True)
    draw = random.Random(SEED)
    drawn = [draw.choice(sampled[i : i + 5]) for i in range(0, len(sampled), 5)]
    left_out = [item for item in sampled if item not in drawn]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _keep_together(item: pytest.Item) -> None:
    """Let one worker run all tests of a module that share a fixture of it, which each worker would make for itself."""
    made = getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009  (not pytest's public interface)
    if any(definitions[-1].scope == "module" for definitions in made) and not item.get_closest_marker("xdist_group"):
        item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def _group(item: pytest.Item) -> str:
    mark = item.get_closest_marker("xdist_group")
    return item.nodeid if mark is None else str(mark.args[0])


def _seconds(item: pytest.Item) -> float:
    """The argument of a test's mark ``long``, else what a test takes in the mean."""
    mark = item.get_closest_marker("long")
    return 0.3 if mark is None else float(mark.args[0])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Hold a test to the rule of CI."""
    return _judged((yield), item)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Hold a whole file to the rule of CI."""
    return _judged((yield), collector)


def _judged(report: Report, node: pytest.Item | pytest.Collector) -> Report:
    """Turn a skip into a failure in CI, unless its reason begins with "not applicable"."""
    ours = not node.path.is_relative_to(SUITE)
    if CI and ours and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not reason.removeprefix("Skipped: ").startswith("not applicable"):
            report.outcome = "failed"
            report.longrepr = f"CI skips nothing that is missing: {reason}"
    return report
