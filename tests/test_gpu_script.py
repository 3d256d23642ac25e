"""What `scripts/gpu/mla.sh` refuses before the first stage runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "gpu" / "mla.sh"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("OUT doctro", "no stage is called doctro; there are: install doctor conform"),
        ("OUT install --quick", "no stage is called --quick"),
        ("--frob OUT", "what is --frob?"),
        ("--backend", "--backend needs a value"),
        ("--limit 0 OUT", "--limit 0: a number of seconds, 1 or more"),
        ("--wheels . OUT", "--wheels .: a folder with wheels"),
        ("/proc/nothing/here install", "no folder to write to"),
        ("", "mla.sh [--backend NAME]"),
    ],
)
def test_a_wrong_command_line_starts_nothing(arguments: str, says: str, tmp_path: Path) -> None:
    done = run(tmp_path, *arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_its_folder_is_where_the_caller_stands(tmp_path: Path) -> None:
    done = run(tmp_path, "OUT", "install")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "OUT" / "verdict.txt").read_text().endswith("install: not asked for (no --wheels)\n")
