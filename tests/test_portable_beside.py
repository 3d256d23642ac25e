"""What the engine whose ranks meet on their devices receives beside what its caller computes."""

from __future__ import annotations

import gc
import random
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import ep_cases
import pytest
import torch
import torch.distributed as dist
from ep_ranks import run_ranks
from portable_backends import MeetingHost
from seeds import SEED
from test_portable_direct import FIBRES, again, before, close, returned, weighted

from hal import RankFailure, SpecError, plugins
from hal.portable.host import HostEvent
from hal.reference import ep as oracle
from hal.spec.errors import DeviceError

__all__ = ["before"]

pytestmark = pytest.mark.long(5)

CASE = replace(FIBRES, tokens=(5, 9))


class TwoStreams(MeetingHost):
    """What it is given beside the first stream it does when somebody waits for that, or at any time before.

    Memory that nobody has any more is filled with ones.
    """

    def __init__(self, sooner: float = 0.0) -> None:
        super().__init__(32)
        self._draw, self._sooner = random.Random(SEED), sooner
        self._given: list[torch.Tensor] = []
        self.beside: list[tuple[Any, ...]] = []
        self.within = False
        self.first: list[str] = []
        """Kernels launched on the first stream."""

    def empty(self, size: int) -> torch.Tensor:
        self._given.append(super().empty(size))  # stays, so that who comes late harms nobody
        given = self._given[-1].view(torch.uint8)
        weakref.finalize(given, self._given[-1].view(torch.uint8).fill_, 255)
        return given

    def fork(self) -> Fork:
        return Fork(self)

    def launch(self, *given: Any) -> Any:
        if self.within:
            self.beside.append(given)
            return HostEvent()
        if self._draw.random() < self._sooner:
            self.join()
        self.first.append(given[1])
        return super().launch(*given)

    def join(self) -> None:
        beside, self.beside = self.beside, []
        for given in beside:
            super().launch(*given)


class Fork:
    def __init__(self, device: TwoStreams) -> None:
        self._device = device

    def __enter__(self) -> None:
        self._device.within = True

    def __exit__(self, *raised: object) -> None:
        self._device.within = False

    def join(self) -> None:
        self._device.join()


def on(device: TwoStreams) -> TwoStreams:
    """The device of this rank's backend from now on."""
    backend: Any = plugins.select(CASE.backend).backend
    backend.device = device
    return device


def test_hooks_launch_nothing(before: partial[None]) -> None:
    run_ranks(2, ahead, limit=60, before=before)


def ahead(rank: int) -> None:
    """Once all ranks have made the call: what there is to receive stands beside, and the hook waits for it alone."""
    mine, device = CASE.inputs()[rank], on(TwoStreams())
    with CASE.buffer(modes=("low_latency", "normal")) as buffer:

        def hooked(last: str, call: Callable[..., Any], *args: Any, **more: Any) -> Any:
            got = call(*args, return_recv_hook=True, **more)
            assert [given[1] for given in device.beside][-2:] == [last, "ep_done"]
            dist.barrier()
            device.first.clear()
            got.hook()
            assert not device.first and not device.beside
            return got

        x, idx, weights = mine.x, mine.topk_idx, mine.topk_weights
        # What is shown of windows in the first calls is not known to kernels that were launched before.
        for _ in range(5):
            got = buffer.low_latency_dispatch(x, idx, use_fp8=False)
            buffer.low_latency_combine(got.recv_x, idx, weights, got.handle)
            buffer.combine(buffer.dispatch(x, idx).recv_x, buffer.dispatch(x, idx).handle)
        for turn in range(1, 4):
            packed = hooked("ep_fetch", buffer.low_latency_dispatch, x * turn, idx, use_fp8=False)
            back = hooked("ep_gather", buffer.low_latency_combine, packed.recv_x, idx, weights, packed.handle)
            close(back.combined_x, weighted(mine) * turn)
            for expand in (False, True):
                got = hooked("ep_fetch", buffer.dispatch, x, idx, weights, expand=expand)
                rows = oracle.dispatch(CASE.inputs(), CASE.experts, expand=expand)[rank]
                ep_cases.same("recv_x", got.recv_x, rows.x)
            got = hooked("ep_fetch", buffer.dispatch, x, idx, weights)
            again = hooked("ep_fetch", buffer.dispatch, x * 2, handle=got.handle)
            ep_cases.same("recv_x", again.recv_x, got.recv_x * 2)
            sums = hooked("ep_gather", buffer.combine, again.recv_x, again.handle)
            assert torch.equal(sums.combined_x, returned(mine, CASE) * 2)
        # What is done beside writes to nothing that the caller gave.
        packed = hooked("ep_fetch", buffer.low_latency_dispatch, x, idx, use_fp8=False)
        out = torch.full((len(x), CASE.hidden), 7.0, dtype=x.dtype)
        back = buffer.low_latency_combine(packed.recv_x, idx, weights, packed.handle, out=out, return_recv_hook=True)
        dist.barrier()
        device.join()
        assert bool((out == 7.0).all())
        back.hook()
        close(out, weighted(mine))
        # Where nothing is put off nothing stands beside.
        buffer.low_latency_dispatch(x, idx, use_fp8=False)
        assert not device.beside
        dist.barrier()
    dist.barrier()


def test_results_that_are_let_go_of_keep_their_memory_until_kernels_are_through(before: partial[None]) -> None:
    run_ranks(2, forgotten, limit=60, before=before)


def forgotten(rank: int) -> None:
    mine, device = CASE.inputs()[rank], on(TwoStreams())
    x, idx, weights = mine.x, mine.topk_idx, mine.topk_weights
    with CASE.buffer(modes=("low_latency", "normal"), timeout=20.0) as buffer:
        for turn in range(20):
            got = buffer.low_latency_dispatch(x, idx, use_fp8=False, return_recv_hook=True)
            rows = weakref.ref(got.recv_x)
            del got
            assert rows() is not None and device.beside
            if turn % 3 == 0:
                sent = buffer.dispatch(x, idx, async_finish=True)
                assert rows() is None
                sent.event.wait()
                back = buffer.combine(sent.recv_x, sent.handle, async_finish=True)
                sums = weakref.ref(back.combined_x)
                del back
                assert sums() is not None
        # No more than two results are live, and none of these is: the memory of two may be kept.
        for _ in range(3):
            buffer.low_latency_dispatch(x, idx, use_fp8=False, return_recv_hook=True)
        packed = buffer.low_latency_dispatch(x, idx, use_fp8=False)
        close(buffer.low_latency_combine(packed.recv_x, idx, weights, packed.handle).combined_x, weighted(mine))
        dist.barrier()
    dist.barrier()


def test_a_buffer_that_is_forgotten_waits_for_what_is_under_way(before: partial[None]) -> None:
    run_ranks(2, unclosed, limit=60, before=before)


def unclosed(rank: int) -> None:
    mine, device = CASE.inputs()[rank], on(TwoStreams())
    for call in ("low_latency_dispatch", "combine"):
        buffer = CASE.buffer(modes=("low_latency", "normal"))
        got: Any = buffer.dispatch(mine.x, mine.topk_idx)
        if call == "combine":
            got = buffer.combine(got.recv_x, got.handle, async_finish=True)
            written = weakref.ref(got.combined_x)
        else:
            got = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False, async_finish=True)
            written = weakref.ref(got.recv_x)
        dist.barrier()
        del got
        assert device.beside and written() is not None
        engine = weakref.ref(buffer._engine)
        del buffer
        gc.collect()
        assert engine() is None and not device.beside and written() is None
        dist.barrier()


def test_the_table_of_windows_that_is_read_beside_stays_when_windows_come(before: partial[None]) -> None:
    run_ranks(2, tables, limit=60, before=before)


def tables(rank: int) -> None:
    mine, device = CASE.inputs()[rank], on(TwoStreams())
    with CASE.buffer(modes=("low_latency", "normal")) as buffer:
        kernels = buffer._engine._kernels  # type: ignore[attr-defined]
        got = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False, return_recv_hook=True)
        table = weakref.ref(kernels.windows)
        for _ in range(3):
            buffer._engine._know(buffer._engine._windows.take(1 << 16))  # type: ignore[attr-defined]
        gc.collect()
        assert kernels.windows is not table() and table() is not None and device.beside
        dist.barrier()
        got.hook()
        buffer.dispatch(mine.x, mine.topk_idx)
        assert table() is None
        dist.barrier()
    dist.barrier()


def test_a_hook_that_comes_at_the_wrong_time_may_come_again(before: partial[None]) -> None:
    run_ranks(2, untimely, limit=60, before=before)


def untimely(rank: int) -> None:
    """And what is captured before the call that puts memory aside is finished everywhere is refused."""
    mine, device = CASE.inputs()[rank], on(TwoStreams())
    with CASE.buffer() as buffer:

        def dispatch(times: int) -> Any:
            return buffer.low_latency_dispatch(mine.x * times, mine.topk_idx, use_fp8=False, return_recv_hook=True)

        if rank == 1:
            dist.barrier()
        got = dispatch(1)
        device.in_capture = True
        if rank == 0:
            with pytest.raises(SpecError, match="before all ranks have shown the memory"):
                dispatch(2)
            dist.barrier()
        with pytest.raises(SpecError, match="run while a graph is captured"):
            got.hook()
        device.in_capture = False
        got.hook()
        got.hook()
        back = buffer.low_latency_combine(got.recv_x, mine.topk_idx, mine.topk_weights, got.handle)
        close(back.combined_x, weighted(mine))
        dist.barrier()
    dist.barrier()


@pytest.mark.sampled
@pytest.mark.parametrize("late", [None, 0, 1])
def test_ranks_come_when_they_come(late: int | None, before: partial[None]) -> None:
    run_ranks(2, whenever, late, limit=90, before=before)


def whenever(rank: int, late: int | None) -> None:
    """What stands beside may look for a rank that has not come yet: then the hook meets it."""
    mine, device = CASE.inputs()[rank], on(TwoStreams(sooner=0.3))
    draw = random.Random(f"{SEED} {rank}")
    x, idx, weights = mine.x, mine.topk_idx, mine.topk_weights
    with CASE.buffer(modes=("low_latency", "normal"), timeout=20.0) as buffer:
        for turn in range(1, 25):
            time.sleep(draw.random() * (0.02 if rank == late else 0.002))
            captured = turn > 4 and turn % 4 != 0
            device.in_capture = captured
            packed = buffer.low_latency_dispatch(x * turn, idx, use_fp8=False, return_recv_hook=True)
            if rank != late:
                device.join()
            time.sleep(draw.random() * 0.002)
            packed.hook()
            back = buffer.low_latency_combine(packed.recv_x, idx, weights, packed.handle, return_recv_hook=True)
            back.hook()
            close(back.combined_x, weighted(mine) * turn)
            device.in_capture = False
            if not captured:
                got = buffer.dispatch(x * turn, idx, async_finish=True)
                if rank != late:
                    device.join()
                got.event.wait()
                sums = buffer.combine(got.recv_x, got.handle, async_finish=True)
                sums.event.wait()
                assert torch.equal(sums.combined_x, returned(replace_x(mine, turn), CASE))
        dist.barrier()
    dist.barrier()


def replace_x(mine: Any, times: int) -> Any:
    return replace(mine, x=mine.x * times)


def test_what_went_wrong_in_a_replay_stays_told(before: partial[None]) -> None:
    run_ranks(2, sticking, limit=60, before=before)


def sticking(rank: int) -> None:
    """Rank 1 comes too late for one replay, and in time for all that come after."""
    mine = CASE.inputs()[rank]
    device: Any = plugins.select(CASE.backend).backend.device  # type: ignore[attr-defined]
    with CASE.buffer(timeout=1.0) as buffer:

        def dispatch() -> Any:
            return buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)

        dispatch()
        dist.barrier()
        device.in_capture = True
        if rank == 0:
            dispatch()
            dist.barrier()
        else:
            dist.barrier()
            dispatch()
        for _ in range(4):
            dispatch()
        device.in_capture = False
        dist.barrier()
        if rank == 0:
            with pytest.raises(RankFailure, match=r"rank 1 failed in .*nothing from it .*in a replayed graph"):
                dispatch()
        dist.barrier()


def test_ways_that_another_stream_counted_are_kept_for_this_one(before: partial[None]) -> None:
    run_ranks(2, lent, limit=60, before=before)


def lent(rank: int) -> None:
    mine = CASE.inputs()[rank]
    device: Any = plugins.select(CASE.backend).backend.device  # type: ignore[attr-defined]
    current, kept, launch = [1], [], device.launch

    class Event:
        def __init__(self) -> None:
            self.stream = current[0]

        def wait(self) -> None:
            pass

    def launched(*given: Any) -> Event:
        launch(*given)
        return Event()

    with CASE.buffer(modes=("low_latency", "normal")) as buffer:
        device.launch, device.used_here = launched, kept.append
        packed = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        got = buffer.dispatch(mine.x, mine.topk_idx)
        back = buffer.combine(got.recv_x, got.handle)
        assert not kept and torch.equal(back.combined_x, returned(mine, CASE))
        current[0] = 2
        buffer.combine(got.recv_x, got.handle)
        assert [memory is got.handle.state.memory for memory in kept] == [True]
        buffer.dispatch(mine.x, handle=got.handle)
        assert len(kept) == 2
        buffer.low_latency_combine(packed.recv_x, mine.topk_idx, mine.topk_weights, packed.handle)
        assert len(kept) == 3
        dist.barrier()
    dist.barrier()


@pytest.mark.parametrize("kind", ["combine", "low_latency_combine"])
def test_a_device_that_fails_there_is_its_ranks_fault(kind: str, before: partial[None]) -> None:
    run_ranks(2, failing, kind, limit=60, before=before)


def failing(rank: int, kind: str) -> None:
    """The call itself raises what its device says, and all others hear of it at once."""
    mine, device = CASE.inputs()[rank], on(TwoStreams())
    x, idx, weights = mine.x, mine.topk_idx, mine.topk_weights
    with CASE.buffer(modes=("low_latency", "normal"), timeout=60.0) as buffer:
        got, packed = buffer.dispatch(x, idx), buffer.low_latency_dispatch(x, idx, use_fp8=False)
        dist.barrier()
        if rank == 1:

            def broken() -> Any:
                raise DeviceError("cudaStreamWaitEvent: gone")

            device.fork = broken  # type: ignore[method-assign]

        def call() -> Any:
            if kind == "combine":
                return buffer.combine(got.recv_x, got.handle, return_recv_hook=True)
            return buffer.low_latency_combine(packed.recv_x, idx, weights, packed.handle, return_recv_hook=True)

        if rank == 1:
            with pytest.raises(DeviceError, match="gone"):
                call()
        else:
            with pytest.raises(RankFailure, match=f"rank 1 failed in {kind}.*gone"):
                again(2, lambda: call().hook())
        dist.barrier()
