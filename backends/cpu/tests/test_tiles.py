"""The AMX kernel: compiled for the processor's tiles, and executed with tiles made of plain loops."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from hal_cpu import _native

NATIVE = Path(__file__).parents[1] / "native"
PLAIN = ("selftest", "decode", "isa", "schedule", "threads", "torch_team", "kernel_baseline")
FLAGS = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
PROCESSOR = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"]
TILES = ["-mamx-tile", "-mamx-bf16"]


def compiler() -> str:
    if platform.machine() != "x86_64":
        pytest.skip("not applicable: another processor")
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("no C++ compiler")
    return found


def test_it_is_made_of_the_processors_products(tmp_path: Path) -> None:
    made = tmp_path / "kernel.s"
    command = [compiler(), *FLAGS, *PROCESSOR, *TILES, "-S", str(NATIVE / "kernel_amx.cpp"), "-o", str(made)]
    subprocess.run(command, check=True, timeout=200)
    text = made.read_text()
    assert text.count("tdpbf16ps") == 18
    assert text.count("ldtilecfg") == text.count("tilerelease") == 1


def test_emulated_it_agrees_with_plain_loops(tmp_path: Path) -> None:
    if "avx512bf16" not in _native.isas():
        pytest.skip("not applicable: the rest of the kernel needs AVX-512 with bf16")
    defined = ["-DHAL_CPU_AMX", "-DHAL_CPU_EMULATED_TILES"]
    kernel, program = tmp_path / "kernel.o", tmp_path / "selftest"
    line = [compiler(), *FLAGS, *defined]
    subprocess.run(
        [*line, *PROCESSOR, "-c", str(NATIVE / "kernel_amx.cpp"), "-o", str(kernel)], check=True, timeout=200
    )
    sources = [str(NATIVE / f"{unit}.cpp") for unit in PLAIN]
    subprocess.run([*line, *sources, str(kernel), "-o", str(program)], check=True, timeout=200)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "amx: worst error" in done.stdout
