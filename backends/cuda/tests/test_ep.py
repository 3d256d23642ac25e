"""Expert parallelism over CUDA's driver without a device: its host code, played by the host, and what is declared."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import ep_cases
import played_ep
import pytest
import torch
from ep_cases import Case
from ep_ranks import run_ranks
from hal_cuda import driver, ipc
from hal_cuda.backend import CudaBackend

from hal.ep.streams import current_stream
from hal.portable.runtime import Handle
from hal.spec.errors import DeviceError

cupy = pytest.importorskip("cupy", reason="cupy is not installed")


def test_it_is_declared() -> None:
    declared = CudaBackend().capabilities().ep
    assert declared is not None and declared.transports[0] == "ipc"


def test_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    played_ep.put_in(monkeypatch.setattr)
    device = driver.CudaDevice(0)
    mine = device.window(4096)
    assert mine.handle.size == 4096 and len(mine.handle.data) == 64
    with pytest.raises(DeviceError, match=r"cudaIpcOpenMemHandle.*InvalidDevice"):
        device.peer(mine.handle)  # a process does not open its own
    with pytest.raises(DeviceError, match="0 bytes of handle, not 64"):
        device.peer(Handle(4096))
    mine.close()
    mine.close()
    with pytest.raises(DeviceError, match="cudaIpcGetMemHandle"):
        _ = mine.handle
    with pytest.raises(DeviceError, match=f"cudaMalloc.*{1 << 62} bytes"):
        device.window(1 << 62)


def test_windows_are_of_the_rank_s_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever card the runtime of cupy took for current, which may be another than torch's."""
    on: list[int] = [0]
    asked: list[tuple[str, int]] = []

    class Runtime:
        def setDevice(self, device: int) -> None:  # noqa: N802
            on[0] = device

        def __getattr__(self, name: str) -> object:
            return lambda *given: asked.append((name, on[0])) or 1

    monkeypatch.setattr(cupy.cuda, "runtime", Runtime())
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    there = ipc.CudaIpc(3)
    there.make(16)
    there.open(b"")
    there.shut(1)
    there.free(1)
    assert [name for name, _ in asked] == [
        "malloc",
        "memset",
        "deviceSynchronize",
        "ipcOpenMemHandle",
        "ipcCloseMemHandle",
        "free",
    ]
    assert {device for _, device in asked} == {3}


@pytest.mark.parametrize("elsewhere", [False, True])
def test_who_waits_for_whom(elsewhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beside waits for the caller; the caller, and whoever takes its results over, for what is beside."""
    played_ep.put_in(monkeypatch.setattr)
    device, caller, other = driver.CudaDevice(0), played_ep.Stream(), played_ep.Stream()
    other.cuda_stream = 7
    with torch.cuda.stream(caller):
        fork = device.fork()
        with fork:
            beside = torch.cuda.current_stream(0)
            assert beside is not caller and beside.waited == [caller]
        assert torch.cuda.current_stream(0) is caller and not caller.waited
    with torch.cuda.stream(other if elsewhere else caller):
        fork.join()
    assert caller.waited == [beside] and other.waited == [beside] * elsewhere
    with torch.cuda.stream(caller):
        assert device.fork()._side is beside, "of one stream in order"
        monkeypatch.setattr(device, "capturing", lambda: True)
        assert device.fork()._side is not beside, "a capture catches nothing else"
    monkeypatch.setattr(device, "capturing", lambda: False)
    with torch.cuda.stream(other):
        assert device.fork()._side is not beside, "others wait for nobody's queue but their own"


def test_a_stream_that_refuses_is_the_device_s_error(monkeypatch: pytest.MonkeyPatch) -> None:
    played_ep.put_in(monkeypatch.setattr)
    device, caller = driver.CudaDevice(0), torch.cuda.current_stream(0)

    def refuse(*given: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    fork = device.fork()
    monkeypatch.setattr(fork._done, "record", refuse)
    with pytest.raises(DeviceError, match=r"cudaEventRecord.*illegal"), fork:
        pass
    assert torch.cuda.current_stream(0) is caller
    monkeypatch.setattr(played_ep.Stream, "wait_stream", refuse)
    with pytest.raises(DeviceError, match=r"cudaStreamWaitEvent.*illegal"):
        device.fork()


def test_memory_of_another_stream_is_kept_for_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    current = SimpleNamespace(current_stream=lambda device: f"the current one of {device}")
    monkeypatch.setattr(torch, "get_device_module", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append(stream))
    device = driver.CudaDevice(0)
    device.used_here(torch.empty(4, device="meta"))
    device.used_here(torch.empty(4))
    assert kept == ["the current one of meta"]


def test_what_is_put_off_to_a_thread_stays_on_the_stream_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    @contextlib.contextmanager
    def stream(which: str) -> Iterator[None]:
        entered.append((which, threading.get_ident()))
        yield

    streams = {threading.get_ident(): "the caller's"}
    current = lambda device: streams.get(threading.get_ident(), "a thread's own")  # noqa: E731
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: SimpleNamespace(stream=stream, current_stream=current)
    )
    within = current_stream(torch.device("cuda:0"))
    with ThreadPoolExecutor(1) as pool:
        worker = pool.submit(lambda: (within.__enter__(), threading.get_ident())[1]).result()
    assert entered == [("the caller's", worker)]


@pytest.mark.long(8)
def test_ranks_exchange_rows_through_each_others_windows() -> None:
    case = Case(backend="played")
    run_ranks(
        2,
        ep_cases.normal,
        [replace(case, bias=1), replace(case, expand=True, tokens=(0, 9))],
        limit=120,
        before=played_ep.opened,
    )
    three = replace(case, ranks=3, tokens=(5, 0, 9), experts=10)
    run_ranks(3, ep_cases.packed, [(three, "none")], limit=120, before=played_ep.opened)
