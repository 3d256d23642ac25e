"""Memory of several processes on the simulator, and expert parallelism over it."""

from __future__ import annotations

import os
from dataclasses import replace

import ep_cases
import pytest
from ep_cases import Case
from ep_ranks import run_ranks

from hal.portable import sim
from hal.portable.bindings import BoundDevice, Torch
from hal.portable.runtime import Handle, Source
from hal.spec.errors import DeviceError

pytest.importorskip("hip", reason="hip-python is not installed")
from hal_rocm.backend import RocmBackend, vendor


def device() -> BoundDevice:
    """As with a torch for ROCm, but that its tensors are the host's, and its stream the usual one."""
    return BoundDevice(RocmBackend().runtime, 0, Torch("cpu", "cuda_stream"), vendor().tunings)


def on_simulator(rank: int) -> None:
    os.environ[sim.ENV] = "hip:gfx942"


def looked_at(rank: int) -> None:
    on_simulator(rank)
    os.environ[sim.CHECK_ENV] = "all"
    os.environ["HAL_SIM_SEED"] = str(rank)


def flags_without_release(rank: int) -> None:
    """The library's own flags, stored with nothing that orders the rows before them."""
    looked_at(rank)
    original = Source.text

    def text(source: Source, dialect: str) -> str:
        return original(source, dialect).replace("__ATOMIC_RELEASE", "__ATOMIC_RELAXED")

    Source.text = text  # type: ignore[method-assign]


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


@pytest.mark.long(8)
def test_expert_parallelism_over_ipc_memory() -> None:
    case = Case(backend="rocm")
    cases = [replace(case, bias=1), replace(case, expand=True, tokens=(0, 9))]
    run_ranks(2, ep_cases.normal, cases, limit=120, before=on_simulator)
    three = replace(case, ranks=3, tokens=(5, 0, 9), experts=10)
    run_ranks(3, ep_cases.packed, [(three, "none")], limit=120, before=on_simulator)


@pytest.mark.long(20)
def test_expert_parallelism_is_looked_at_and_nothing_found() -> None:
    case = Case(backend="rocm", tokens=(5, 7))
    run_ranks(2, ep_cases.normal, [replace(case, bias=1)], limit=300, before=looked_at)
    run_ranks(2, ep_cases.packed, [(case, "none"), (case, "fp8")], limit=300, before=looked_at)
    # Of every other kernel and of what becomes of choices that there is no room for.
    expanded = replace(case, expand=True, alignment=4, bias=2)
    cases = [expanded, replace(case, fp8="fp8", hidden=128), replace(case, room=4, overflow="drop")]
    run_ranks(2, ep_cases.normal, cases, limit=300, before=looked_at)
    casts = [(replace(case, hidden=128), cast) for cast in ("fp8_pow2", "fp8_ue8m0")]
    run_ranks(2, ep_cases.packed, casts, limit=300, before=looked_at)
    with pytest.raises(AssertionError, match=r"ep_await_all: .* a flag that was not released: ep_announce: "):
        run_ranks(2, ep_cases.normal, [case], limit=300, before=flags_without_release)
