"""The rule of the root conftest: a missing part is a skip for a developer and a failure in CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SAMPLE = """
import pytest

def test_missing():
    pytest.skip("the tool is missing")

def test_elsewhere():
    pytest.skip("not applicable: another processor")
"""


SAMPLED = """
import pytest

@pytest.mark.sampled
@pytest.mark.parametrize("seconds", [pytest.param(n, marks=pytest.mark.long(n)) for n in (1, 9) * 5])
def test_of_many(seconds):
    assert seconds == 1

def test_always():
    pass
"""

WHOLE_FILE = """
import pytest

pytest.importorskip("a_part_that_is_missing")
"""


def outcome(tmp_path: Path, ci: str, sample: str = SAMPLE, *options: str) -> str:
    (tmp_path / "conftest.py").write_text((Path(__file__).parents[1] / "conftest.py").read_text())
    (tmp_path / "test_sample.py").write_text(sample)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path), *options]
    run = subprocess.run(
        command,
        # Without the plugins that are installed, which take longer to import than pytest.
        env={**os.environ, "CI": ci, "PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return run.stdout.splitlines()[-1]


def test_ci_fails_on_what_is_missing(tmp_path: Path) -> None:
    assert outcome(tmp_path, "true").startswith("1 failed, 1 skipped")


def test_a_developer_skips(tmp_path: Path) -> None:
    assert outcome(tmp_path, "").startswith("2 skipped")


def test_ci_fails_on_a_whole_file_that_is_skipped(tmp_path: Path) -> None:
    assert "1 error" in outcome(tmp_path, "true", WHOLE_FILE)
    assert outcome(tmp_path, "", WHOLE_FILE).startswith("1 skipped")


def test_a_fifth_of_the_sampled_tests_are_run_where_that_is_asked_for_of_short_and_long_alike(tmp_path: Path) -> None:
    assert outcome(tmp_path, "true", SAMPLED, "--sample").startswith("1 failed, 2 passed, 8 deselected")
    assert outcome(tmp_path, "true", SAMPLED).startswith("5 failed, 6 passed")
