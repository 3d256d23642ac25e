"""The kernels in Oclgrind, an OpenCL device that looks for data races, accesses out of bounds and wrong calls."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LIBRARY = Path(os.environ.get("HAL_TEST_OCLGRIND") or "/usr/lib/oclgrind/liboclgrind-rt-icd.so")
# pyopencl asks every device for what only newer ones know, and every program of which it has no source for that.
OF_PYOPENCL = {"clGetDeviceInfo CL_INVALID_VALUE", "clCreateKernel CL_INVALID_KERNEL_NAME '_source'"}


def run(what: str, folder: Path) -> tuple[str, set[str], str]:
    """What was printed, which wrong calls there were, and what Oclgrind says of the kernels."""
    if not LIBRARY.exists():
        pytest.skip("Oclgrind is not installed (apt-get install oclgrind)")
    (folder / "oclgrind.icd").write_text(f"{LIBRARY}\n")
    log = folder / "log"
    added = {
        "OCL_ICD_VENDORS": str(folder),
        "OCLGRIND_DATA_RACES": "1",
        "OCLGRIND_CHECK_API": "1",
        "OCLGRIND_LOG": str(log),
        "HAL_OPENCL_PLATFORM": "Oclgrind",
        "HAL_MUSA_SIMULATE": "1",
        "HAL_KERNEL_CACHE": str(folder / "kernels"),
        "PYTHONPATH": str(Path(__file__).parents[3] / "tests"),
    }
    line = [sys.executable, str(Path(__file__).parent / "in_oclgrind.py"), what]
    done = subprocess.run(line, env=os.environ | added, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    pattern = r"Function: (\w+)\s+Error:\s+(\w+)(?:\s+Kernel ('\w+') not found)?"
    wrong = {" ".join(filter(None, found)) for found in re.findall(pattern, done.stderr)}
    return done.stdout, wrong, log.read_text()


@pytest.mark.sampled
@pytest.mark.long(3)
def test_it_finds_nothing(tmp_path: Path) -> None:
    printed, wrong, log = run("decode", tmp_path)
    assert printed == "7 right\n"
    assert wrong <= OF_PYOPENCL
    assert log == ""


@pytest.mark.sampled
@pytest.mark.long(5)
def test_it_finds_nothing_in_expert_parallelism(tmp_path: Path) -> None:
    printed, wrong, log = run("communicate", tmp_path)
    assert printed == "right\n"
    assert wrong <= OF_PYOPENCL
    assert log == ""


def test_it_would_find_a_race(tmp_path: Path) -> None:
    assert "data race" in run("race", tmp_path)[2]
