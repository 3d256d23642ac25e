"""The NEON kernel: cross-compiled here and executed under an emulator."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[1] / "native"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-static", "-pthread"]


@pytest.mark.sampled
@pytest.mark.long(15)
def test_neon_agrees_with_plain_loops(tmp_path: Path) -> None:
    if platform.machine() == "aarch64":
        pytest.skip("every other test already runs NEON on this machine")
    if not (shutil.which(COMPILER) and shutil.which(EMULATOR)):
        pytest.skip(f"{COMPILER} or {EMULATOR} is missing: apt-get install g++-aarch64-linux-gnu qemu-user")
    units = ("selftest", "decode", "isa", "schedule", "threads", "torch_team", "kernel_baseline", "kernel_neon")
    program = tmp_path / "selftest"
    sources = [str(NATIVE / f"{unit}.cpp") for unit in units]
    subprocess.run([COMPILER, *FLAGS, *sources, "-o", str(program)], check=True, timeout=200)
    done = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neon: worst error" in done.stdout
