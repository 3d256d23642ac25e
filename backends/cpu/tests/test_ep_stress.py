"""The engine's ranks as threads under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import platform
import random
import shutil
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[1] / "native" / "ep"
pytestmark = pytest.mark.long(10)
PARTS = ("stress", "engine", "mail", "dispatch", "combine", "packed", "window", "kernels")
SOURCES = [str(NATIVE / f"{part}.cpp") for part in PARTS]
FLAGS = ["-std=c++17", "-O0", "-g1", "-ffp-contract=off", "-pthread", "-DHAL_EP_BASELINE"]


def build(folder: Path, *flags: str, sources: list[str] = SOURCES) -> str:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = str(folder / "stress")
    made = subprocess.run([compiler, *FLAGS, *flags, *sources, "-o", program], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return program


def run(program: str, ranks: int, rounds: int) -> subprocess.CompletedProcess[str]:
    # ThreadSanitizer of older compilers knows only the narrower address space randomisation.
    fixed = [shutil.which("setarch"), platform.machine(), "-R"] if shutil.which("setarch") else []
    seed = str(random.SystemRandom().randrange(2**31))
    done = subprocess.run([*fixed, program, str(ranks), str(rounds), seed], capture_output=True, text=True, timeout=120)
    done.args = [*done.args, f"seed {seed}"]
    return done


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_stress_runs_clean(tmp_path: Path, sanitizer: str) -> None:
    program = build(tmp_path, f"-fsanitize={sanitizer}")
    for ranks in (2, 3):
        done = run(program, ranks, 80)
        assert done.returncode == 0, f"{done.args}\n{done.stdout}{done.stderr}"
        assert "Sanitizer" not in done.stderr, done.stderr


def test_the_stress_would_notice_a_missing_release(tmp_path: Path) -> None:
    text = (NATIVE / "dispatch.cpp").read_text()
    for flaw in ("done.store(op.seq, std::memory_order_", "done.load(std::memory_order_"):
        assert flaw + "seq_cst" in text
        text = text.replace(flaw + "seq_cst", flaw + "relaxed")
    flawed = tmp_path / "dispatch.cpp"
    flawed.write_text(text)
    sources = [str(flawed) if source.endswith("dispatch.cpp") else source for source in SOURCES]
    program = build(tmp_path, "-fsanitize=thread", f"-I{NATIVE}", sources=sources)
    assert "data race" in run(program, 2, 60).stderr
