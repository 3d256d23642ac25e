"""The Triton kernels executed in Triton's interpreter: their own tests, and the conformance suite."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conforming import HELD, conform
from interpreted import NAME
from seeds import SEED

triton = pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
ROOT = HERE.parents[2]

# What the suite asks for hundreds of times over is left to hardware; in_interpreter has small ones of their kind.
TOO_LONG = {"MLA-33", "MLA-36", "MLA-37", "MLA-44", "MLA-45", "MLA-46", "MLA-47"}


def drawn(obligation: str) -> bool:
    """Whether it is in the quarter that the seed of this run draws; ``HAL_SWEEP=all`` takes the others in too."""
    return os.environ.get("HAL_SWEEP") == "all" or random.Random(f"{SEED} {obligation}").random() < 0.25


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of processes that have the kernels as a backend, in the interpreter."""
    site = tmp_path_factory.mktemp("site")
    info = site / "hal_interpreted-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hal-interpreted\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[hal.backends]\n{NAME} = interpreted:plugin\n")
    path = os.pathsep.join([str(site), str(HERE), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    added = {"PYTHONPATH": path.rstrip(os.pathsep), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in added.items():
            patch.setenv(name, value)
        yield dict(os.environ)


@pytest.mark.sampled
@pytest.mark.long(30)
@pytest.mark.timeout(600)
def test_the_kernels_own_tests(simulated: dict[str, str]) -> None:
    line = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(HERE), str(HERE / "in_interpreter.py")]
    done = subprocess.run(
        [sys.executable, *line], env=simulated, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.sampled
@pytest.mark.long(10)
@pytest.mark.timeout(900)
@pytest.mark.parametrize("level", ["L0", "L1", "L2"])
def test_the_kernels_conform(level: str, simulated: dict[str, str]) -> None:
    from hal_conformance.table import of_level

    only = [o.id for o in of_level(level) if o.id not in TOO_LONG and (o.gate or drawn(o.id))]
    assert conform(NAME, only, (*HELD, "REFUSED"))["evidence"] == "simulation"
