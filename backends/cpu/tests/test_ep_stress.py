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
pytestmark = [pytest.mark.sampled, pytest.mark.long(8)]
PARTS = ("stress", "engine", "mail", "dispatch", "combine", "packed", "window", "kernels")
SOURCES = [NATIVE / f"{part}.cpp" for part in PARTS]
FLAGS = ["-std=c++17", "-O0", "-g1", "-ffp-contract=off", "-pthread", "-DHAL_EP_BASELINE", f"-I{NATIVE}"]
ROUNDS = 300


def built(folder: Path, sanitizer: str, sources: list[Path] = SOURCES) -> str:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    # As one file, which spares the compiler all headers but once.
    whole, program = folder / "whole.cpp", folder / "stress"
    whole.write_text("".join(f'#include "{source}"\n' for source in sources))
    command = [compiler, *FLAGS, f"-fsanitize={sanitizer}", str(whole), "-o", str(program)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return str(program)


def run(program: str, ranks: int, mask: bool = False) -> subprocess.CompletedProcess[str]:
    # ThreadSanitizer of older compilers knows only the narrower address space randomisation.
    fixed = [shutil.which("setarch"), platform.machine(), "-R"] if shutil.which("setarch") else []
    seed = str(random.SystemRandom().randrange(2**31))
    # One finding is enough.
    env = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    command = [*fixed, program, str(ranks), str(ROUNDS), seed, str(int(mask))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    done.args = [*done.args, f"seed {seed}"]
    return done


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_stress_runs_clean(tmp_path: Path, sanitizer: str) -> None:
    program = built(tmp_path, sanitizer)
    for ranks, mask in ((2, False), (2, True), (3, False)):
        done = run(program, ranks, mask)
        assert done.returncode == 0, f"{done.args}\n{done.stdout}{done.stderr}"
        assert "Sanitizer" not in done.stderr, done.stderr


def test_the_stress_would_notice_a_missing_release(tmp_path: Path) -> None:
    text = (NATIVE / "dispatch.cpp").read_text()
    for flaw in ("done.store(op.seq, std::memory_order_", "done.load(std::memory_order_"):
        assert flaw + "seq_cst" in text
        text = text.replace(flaw + "seq_cst", flaw + "relaxed")
    flawed = tmp_path / "dispatch.cpp"
    flawed.write_text(text)
    sources = [flawed if source.name == flawed.name else source for source in SOURCES]
    assert "data race" in run(built(tmp_path, "thread", sources), 2).stderr
