from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hal_cpu.native import NativeKernel, missing

sys.path.insert(0, str(Path(__file__).parent))  # cpu_cases, for whatever import mode the run uses

from cpu_cases import Kernel, TorchKernel

_ABSENT = missing()
ISAS = [] if _ABSENT else NativeKernel()._native.isas()


def pytest_report_header() -> str:
    return f"hal-cpu: {_ABSENT or 'compiled for ' + ', '.join(ISAS)}"


@pytest.fixture(autouse=True)
def quiet_torch() -> Iterator[None]:
    """One thread for the reference: on a busy machine torch's threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def native() -> Iterator[Kernel]:
    """The compiled kernel at its best instruction set; whatever a test chooses is undone."""
    if _ABSENT:
        pytest.skip(_ABSENT)
    kernel = NativeKernel()
    kernel._threads = 2
    before = kernel._native.isa()
    yield kernel
    kernel._native.set_isa(before)


@pytest.fixture(params=[*ISAS, "torch"])
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """Every way this machine can compute, one after the other."""
    if request.param == "torch":
        yield TorchKernel("a test asked for it")
        return
    native: Kernel = request.getfixturevalue("native")
    assert native._native.set_isa(request.param)
    yield native


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, native: Kernel) -> Kernel:
    """The compiled kernel at every instruction set."""
    assert native._native.set_isa(request.param)
    return native
