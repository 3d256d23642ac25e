"""Memory of several processes on the simulator, and the portable engine of expert parallelism over it.

The backend does not declare expert parallelism yet: the suite has not judged it here.
"""

from __future__ import annotations

import os
import types
from dataclasses import replace
from importlib.metadata import EntryPoint

import ep_cases
import portable_backends
import pytest
import torch
from ep_cases import Case
from ep_ranks import run_ranks

from hal import plugins
from hal.backend import Backend
from hal.plugins import hookimpl
from hal.portable import sim
from hal.portable.bindings import BoundDevice, Torch
from hal.portable.runtime import Handle
from hal.spec.errors import DeviceError

pytest.importorskip("hip", reason="hip-python is not installed")
from hal_rocm.backend import RocmBackend, vendor


def device() -> BoundDevice:
    """As with a torch for ROCm, but that its tensors are the host's, and its stream the usual one."""
    return BoundDevice(RocmBackend().runtime, 0, Torch("cpu", "cuda_stream"), vendor().tunings)


def test_windows_of_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sim.ENV, "hip:gfx942")
    mine = device().window(4096)
    assert mine.handle.size == 4096 and len(mine.handle.data) == 64
    with pytest.raises(DeviceError, match="hipIpcOpenMemHandle: hipErrorInvalidValue"):
        device().peer(mine.handle)  # this process has it already
    with pytest.raises(DeviceError, match="0 bytes of handle"):
        device().peer(Handle(4096))
    mine.close()
    mine.close()
    with pytest.raises(DeviceError, match="hipIpcGetMemHandle"):
        _ = mine.handle


class OnSimulator:
    """The plugin of a backend whose device is the simulated one."""

    @hookimpl
    def hal_backend(self) -> Backend:
        return portable_backends.OnFibres(device())


on_simulator = OnSimulator()


def opened(rank: int) -> None:
    # Tensors of the host are looked at without waiting for anything.
    os.environ |= {sim.ENV: "hip:gfx942", "HAL_SIM_EAGER": "1"}
    torch.cpu.current_stream = lambda index: types.SimpleNamespace(cuda_stream=0)  # type: ignore[assignment]
    plugins._registry = plugins.Registry([EntryPoint("simulated", "test_windows:on_simulator", plugins.GROUP)])


@pytest.mark.long(8)
def test_expert_parallelism_over_ipc_memory() -> None:
    case = Case(backend="simulated")
    cases = [replace(case, bias=1), replace(case, expand=True, tokens=(0, 9))]
    run_ranks(2, ep_cases.normal, cases, limit=120, before=opened)
    three = replace(case, ranks=3, tokens=(5, 0, 9), experts=10)
    run_ranks(3, ep_cases.packed, [(three, "none")], limit=120, before=opened)
