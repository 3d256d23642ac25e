"""The portable engine over the host's driver, ranks as processes: the cases of the CPU's engine, bit for bit."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ep_cases
import portable_backends
import pytest
import torch
import torch.distributed as dist
from ep_cases import Case
from ep_ranks import run_ranks
from portable_backends import DEVICES, SOCKETS

from hal import EpFault, EpFaults, RankFailure, SpecError, UnsupportedError, plugins
from hal.portable import ep_node
from hal.portable.ep_kernels import EpKernels, Rows
from hal.portable.runtime import ForeignWindow, Handle
from hal.portable.shared import SharedMemory
from hal.spec.errors import CompileError, DeviceError

FIBRES = Case(backend=portable_backends.name(32))
# Few kernels: each takes a second to compile, and test_portable_ep_kernels has them all.
NORMAL = [
    replace(FIBRES, tokens=(0, 9), bias=2, experts=7, topk=7, routing="distinct"),
    replace(FIBRES, fp8="fp8_ue8m0", hidden=1024, routing="zipf", worst=64),
    replace(FIBRES, expand=True, alignment=4, hidden=72, bias=1),
    replace(FIBRES, room=6, overflow="drop", expand=True, hidden=8),
    replace(FIBRES, routing="none", weights=False),
]
PACKED = [
    (replace(FIBRES, hidden=1024, routing="distinct", tokens=(0, 9)), "fp8_ue8m0"),
    (replace(FIBRES, routing="one", topk=2), "none"),
]


def meets_on_devices() -> bool:
    """Whether this rank's engine is the one whose ranks meet on their devices."""
    return hasattr(plugins.select(FIBRES.backend).backend.device, "mailbox")  # type: ignore[attr-defined]


def registered(folder: str, meeting: str, rank: int) -> None:
    """The backends of `portable_backends` in this process."""
    os.environ["HAL_KERNEL_CACHE"] = folder
    plugins._registry = portable_backends.registry(meeting)


@pytest.fixture(scope="module", params=[SOCKETS, DEVICES])
def before(kernels: str, request: pytest.FixtureRequest) -> partial[None]:
    return partial(registered, kernels, request.param)


@pytest.fixture(scope="module")
def sockets(kernels: str) -> partial[None]:
    """Where there is nothing else."""
    return partial(registered, kernels, SOCKETS)


@pytest.mark.long(4)
def test_both_modes_are_the_oracle(before: partial[None]) -> None:
    run_ranks(2, ep_cases.normal, NORMAL, limit=90, before=before)
    run_ranks(2, ep_cases.packed, PACKED, limit=90, before=before)


@pytest.mark.sampled
def test_what_a_call_was_given_may_be_used_again_when_it_returned(before: partial[None]) -> None:
    run_ranks(2, ep_cases.arguments_used_again, None, FIBRES.backend, limit=60, before=before)


def test_other_group_sizes(before: partial[None]) -> None:
    run_ranks(1, ep_cases.normal, [replace(FIBRES, ranks=1, tokens=(5,))], limit=60, before=before)
    three = replace(FIBRES, ranks=3, tokens=(5, 0, 9), experts=10, topk=4, room=7, overflow="drop")
    run_ranks(3, ep_cases.normal, [three], limit=60, before=before)
    run_ranks(3, ep_cases.packed, [(replace(three, room=None, overflow="error"), "none")], limit=60, before=before)


@pytest.mark.sampled
def test_nodes(sockets: partial[None]) -> None:
    four = replace(FIBRES, ranks=4, tokens=(5, 0, 9, 3), experts=10, topk=4, per_node=2)
    cases = [replace(four, expand=True, alignment=4), replace(four, pre_reduce=True)]
    run_ranks(4, ep_cases.normal, cases, limit=90, before=sockets)
    run_ranks(4, ep_cases.packed, [(four, "none")], limit=90, before=sockets)


def test_two_results_and_no_third(before: partial[None]) -> None:
    run_ranks(2, let_go, limit=60, before=before)


def let_go(rank: int) -> None:
    """Results let go without ever running their hooks give their rooms back, and a third is refused."""
    mine = FIBRES.inputs()[rank]
    with FIBRES.buffer() as buffer:
        for _ in range(5):
            buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False, return_recv_hook=True)
        held = [buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False) for _ in range(2)]
        with pytest.raises(SpecError, match="a third result"):
            buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        del held
        got = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        back = buffer.low_latency_combine(got.recv_x, mine.topk_idx, mine.topk_weights, got.handle)
        times = torch.where(mine.topk_idx >= 0, mine.topk_weights, 0.0).sum(1, keepdim=True)
        assert torch.allclose(back.combined_x.float(), mine.x.float() * times, rtol=0.02, atol=0.02)
    dist.barrier()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_gone_is_named_within_the_timeout(how: signal.Signals, before: partial[None]) -> None:
    outcomes = run_ranks(3, gone, int(how), limit=60, check=False, before=before)
    for rank, outcome in enumerate(outcomes[:2]):
        assert outcome.error is None, f"rank {rank}: {outcome.error}"
        assert outcome.value == [2, 2]


def gone(rank: int, how: int) -> list[int]:
    """Rank 2 ends or stops before the second dispatch: whom the others blame, at once and later."""
    timeout = 2.0
    case = replace(FIBRES, ranks=3, tokens=(5, 7, 6))
    mine, named = case.inputs()[rank], []
    buffer = case.buffer(timeout=timeout)
    buffer.dispatch(mine.x, mine.topk_idx)
    processes: list[int] = [0] * 3
    dist.all_gather_object(processes, os.getpid())
    if rank == 2:
        os.kill(os.getpid(), how)
    for _ in range(2):
        begin = time.monotonic()
        with pytest.raises(RankFailure) as caught:
            buffer.dispatch(mine.x, mine.topk_idx)
        assert time.monotonic() - begin < timeout
        named.append(caught.value.rank)
    with contextlib.suppress(ProcessLookupError):
        os.kill(processes[2], signal.SIGKILL)
    buffer.close()
    assert not ep_node._parting
    return named


@pytest.mark.sampled
def test_memory_that_is_lacking_on_one_rank_is_an_error_on_all(before: partial[None]) -> None:
    run_ranks(2, lacking, limit=60, before=before)


def lacking(rank: int) -> None:
    """Rank 1 gets no window to begin with, then none for what comes, then none for what goes back; later it does."""
    case = replace(FIBRES, tokens=(300, 300), hidden=256, routing="distinct")
    mine = case.inputs()[rank]
    device: Any = plugins.select(case.backend).backend.device  # type: ignore[attr-defined]

    def none(size: int) -> None:
        raise DeviceError(f"no {size} bytes")

    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr(device, "window", none)
        with pytest.raises(SpecError, match="device: got no"):
            case.buffer()
    with case.buffer(modes=("normal",)) as buffer:
        with pytest.MonkeyPatch.context() as patch:
            if rank:
                patch.setattr(device, "window", none)
            lacks = "bytes to stage on rank 1" if meets_on_devices() else "which rank 1 lacks memory"
            with pytest.raises(SpecError, match=lacks):
                buffer.dispatch(mine.x, mine.topk_idx)
        got = buffer.dispatch(mine.x, mine.topk_idx)
        more = buffer.dispatch(mine.x, mine.topk_idx, async_finish=True)
        with pytest.MonkeyPatch.context() as patch:
            if rank:
                patch.setattr(device, "window", none)
            with pytest.raises(SpecError, match="bytes to stage on rank 1"):
                buffer.combine(got.recv_x, got.handle)
        more.event.wait()
        back = buffer.combine(got.recv_x, got.handle)
        here = torch.stack([mine.topk_idx // 4 == r for r in range(2)]).any(2).sum(0)
        assert torch.equal(back.combined_x, (mine.x.float() * here[:, None]).to(mine.x.dtype))
    dist.barrier()


@pytest.mark.parametrize("foreign", [False, True], ids=["lacks", "foreign"])
def test_a_window_that_cannot_be_opened_is_the_fault_of_whose_it_is(foreign: bool, before: partial[None]) -> None:
    run_ranks(2, unopened, foreign, limit=90, before=before)


def unopened(rank: int, foreign: bool) -> None:
    """Rank 1 does not open rank 0's windows, for lack of memory, or because they are none."""
    case = replace(FIBRES, tokens=(300, 300), hidden=256, routing="distinct")
    mine = case.inputs()[rank]
    device: Any = plugins.select(case.backend).backend.device  # type: ignore[attr-defined]
    culprit = 0 if foreign else 1

    def refused(handle: Handle) -> None:
        raise (ForeignWindow if foreign else DeviceError)(f"no window of {handle.size} bytes")

    with case.buffer(modes=("normal",), timeout=60.0) as buffer, pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr(device, "peer", refused)
        begin = time.monotonic()
        # Ranks that meet on their devices fetch: rank 0 may have all its rows before rank 1 opens its window in vain.
        calls = 2 if rank == 0 and meets_on_devices() else 1
        with pytest.raises(DeviceError if rank == culprit == 1 else RankFailure, match="no window of"):
            _ = [buffer.dispatch(mine.x, mine.topk_idx) for _ in range(calls)]
        assert time.monotonic() - begin < 30  # kernels may have to be compiled
        with pytest.raises(RankFailure, match="no window of") as caught:
            buffer.dispatch(mine.x, mine.topk_idx)
        assert caught.value.rank == culprit
        dist.barrier()
    with pytest.MonkeyPatch.context() as patch:
        if rank:
            patch.setattr(device, "peer", refused)
        with pytest.raises(RankFailure if foreign else SpecError, match="no window of") as opening:
            case.buffer(timeout=20.0)
    assert opening.value.rank == 0 if foreign else "on rank 1" in str(opening.value)


# Where it goes wrong: of rank 1 the driver's method, and from which call of it on, counted from the first dispatch.
BROKEN = {
    "compiler": ("build", CompileError("no compiler", log="its log", source_path="k.h"), False),
    "device": ("launch", DeviceError("the device is lost"), False),
    "memory": ("queue", MemoryError("no memory"), True),
}


@pytest.mark.parametrize("how", BROKEN)
def test_an_error_of_one_rank_is_told_to_all(how: str, before: partial[None]) -> None:
    outcomes = run_ranks(3, erring, how, limit=60, before=before)
    assert len(outcomes) == 3


def erring(rank: int, how: str) -> None:
    """Rank 1 raises what it came upon, the others name it with the reason, at once; nobody goes on afterwards."""
    case = replace(FIBRES, ranks=3, tokens=(5, 7, 6))
    method, error, packed = BROKEN[how]
    device: Any = plugins.select(case.backend).backend.device  # type: ignore[attr-defined]
    mine = case.inputs()[rank]

    def broken(*given: Any) -> None:
        raise error

    with case.buffer(timeout=30.0) as buffer, pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(device, method, broken)
            patch.setattr(buffer._engine._kernels, "_programs", {})

        def call() -> None:
            if packed:
                buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False, return_recv_hook=True)[-1]()
            else:
                buffer.dispatch(mine.x, mine.topk_idx)

        begin = time.monotonic()
        with pytest.raises(type(error) if rank == 1 else RankFailure) as caught:
            call()
        assert rank == 1 or (caught.value.rank == 1 and str(error).splitlines()[0] in caught.value.reason)
        assert time.monotonic() - begin < 15
        if rank == 1:
            patch.undo()
        for again in (call, lambda: buffer.refuse(SpecError("x", 1, 2))):
            with pytest.raises(RankFailure, match="rank 1 failed in .*" + type(error).__name__) as caught:
                again()
            assert caught.value.rank == 1
        dist.barrier()


def test_an_error_in_what_completes_a_call_is_told_too(before: partial[None]) -> None:
    run_ranks(2, completing, limit=60, before=before)


def completing(rank: int) -> None:
    """Of a combine whose rows are there, and of a dispatch whose rows are sent behind the caller's back."""
    mine = FIBRES.inputs()[rank]
    device: Any = plugins.select(FIBRES.backend).backend.device  # type: ignore[attr-defined]

    def broken(*given: Any) -> None:
        raise DeviceError("the device is lost")

    with FIBRES.buffer(timeout=30.0) as buffer:
        got = buffer.dispatch(mine.x, mine.topk_idx)
        back = buffer.combine(got.recv_x, got.handle, async_finish=True)
        with pytest.MonkeyPatch.context() as patch:
            if rank:
                dist.barrier()
                patch.setattr(device, "launch", broken)
                with pytest.raises(DeviceError, match="is lost"):
                    back.event.wait()
            else:
                # Nothing of this call is lacking once rank 1 goes wrong: the next one hears of it.
                back.event.wait()
                dist.barrier()
                with pytest.raises(RankFailure, match="rank 1 failed in combine: DeviceError: the device is lost"):
                    buffer.dispatch(mine.x, mine.topk_idx)
        dist.barrier()
    if meets_on_devices():
        return  # nothing is sent behind the caller's back
    with FIBRES.buffer(timeout=30.0) as buffer:
        held = [buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False) for _ in range(2)]
        for one in held:
            buffer.low_latency_combine(one.recv_x, mine.topk_idx, mine.topk_weights, one.handle)
        engine: Any = buffer._engine
        posted = threading.Event()
        with pytest.MonkeyPatch.context() as patch:
            if rank:
                patch.setattr(engine, "_free_rooms", [[], []])
                patch.setattr(engine, "_send_rows", lambda *given: posted.wait(20) and broken())
            later = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False, return_recv_hook=True)
            dist.barrier()
            posted.set()
            for _ in range(2):
                with pytest.raises(RankFailure, match="rank 1 failed in low_latency_dispatch: DeviceError: the device"):
                    later.hook()
        dist.barrier()


def test_an_error_of_one_rank_is_told_to_other_nodes(sockets: partial[None]) -> None:
    run_ranks(4, far_away, limit=60, before=sockets)


def far_away(rank: int) -> None:
    """Of what happens inside rank 1's node, and of what happens to rank 2 between nodes."""
    four = replace(FIBRES, ranks=4, tokens=(5, 0, 9, 3), per_node=2)
    mine = four.inputs()[rank]
    device: Any = plugins.select(four.backend).backend.device  # type: ignore[attr-defined]

    def broken(*given: Any) -> None:
        raise DeviceError("the device is lost")

    for culprit, where in ((1, device), (2, None)):
        with four.buffer(timeout=15.0) as buffer, pytest.MonkeyPatch.context() as patch:
            if rank == culprit:
                patch.setattr(*((where, "launch") if where else (buffer._engine._crossing, "share")), broken)
            begin = time.monotonic()
            # Those who have got what they wait for hear of it in the next call.
            calls = (buffer.dispatch(mine.x, mine.topk_idx) for _ in range(2))
            with pytest.raises(DeviceError if rank == culprit else RankFailure, match="the device is lost") as caught:
                list(calls)
            assert rank == culprit or caught.value.rank == culprit
            assert time.monotonic() - begin < 12
            with pytest.raises(RankFailure, match=f"rank {culprit} failed in .* the device is lost"):
                buffer.dispatch(mine.x, mine.topk_idx)
        dist.barrier()


@pytest.mark.parametrize("begin", [2**31 - 3, 2**32 - 3])
def test_operations_are_numbered_without_end(begin: int, before: partial[None]) -> None:
    run_ranks(2, numbered, begin, limit=60, before=before)


def numbered(rank: int, begin: int) -> None:
    """Whatever fits into a flag: calls before, at and after it."""
    mine = FIBRES.inputs()[rank]
    here = torch.stack([mine.topk_idx // 4 == r for r in range(2)]).any(2).sum(0)
    expected = (mine.x.float() * here[:, None]).to(mine.x.dtype)
    times = torch.where(mine.topk_idx >= 0, mine.topk_weights, 0.0).sum(1, keepdim=True)
    with FIBRES.buffer() as buffer:
        engine: Any = buffer._engine
        # Of two numbers 2**31 apart neither is the later; no flag stays so far behind.
        for start in (begin // 2, begin):
            engine._number = start
            for turn in range(3):
                # One of them is late: its flags are of the operation before when they are first looked at.
                if turn % 2 == rank:
                    time.sleep(0.05)
                got = buffer.dispatch(mine.x, mine.topk_idx)
                back = buffer.combine(got.recv_x, got.handle)
                assert torch.equal(back.combined_x, expected)
                packed = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
                back = buffer.low_latency_combine(packed.recv_x, mine.topk_idx, mine.topk_weights, packed.handle)
                assert torch.allclose(back.combined_x.float(), mine.x.float() * times, rtol=0.02, atol=0.02)
        assert engine._number > begin + 6
    dist.barrier()


@pytest.mark.long(4)
def test_kernels_take_no_more_processors_than_they_may(before: partial[None]) -> None:
    run_ranks(2, limited, limit=90, before=before)


def limited(rank: int) -> None:
    """The same bits from no more groups than are allowed, also of what a hook completes after that has changed."""
    device: Any = plugins.select(FIBRES.backend).backend.device  # type: ignore[attr-defined]
    launched: list[tuple[str, int]] = []
    launch = device.launch

    def counted(program: Any, kernel: str, groups: int, threads: int, arguments: Any) -> Any:
        launched.append((kernel, groups))
        return launch(program, kernel, groups, threads, arguments)

    device.launch = counted
    case = replace(FIBRES, tokens=(40, 33), hidden=512)
    mine = case.inputs()[rank]
    found = []
    with case.buffer() as buffer:
        for most in (None, 1):
            launched.clear()
            buffer.num_sms = most
            got = buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights, return_recv_hook=True)
            buffer.num_sms = None
            assert got.hook is not None
            got.hook()
            buffer.num_sms = most
            assert isinstance(got.recv_x, torch.Tensor)
            back = buffer.combine(got.recv_x, got.handle)
            packed = buffer.low_latency_dispatch(mine.x, mine.topk_idx)
            assert isinstance(packed.recv_x, tuple)
            rows = packed.recv_x[0].float().to(mine.x.dtype)
            summed = buffer.low_latency_combine(rows, mine.topk_idx, mine.topk_weights, packed.handle)
            found.append((got.recv_x, back.combined_x, summed.combined_x))
            groups = {kernel: max(n for name, n in launched if name == kernel) for kernel, _ in launched}
            expected = {"ep_stage", "ep_count", "ep_fetch", "ep_gather", "ep_cast"}
            expected = expected if meets_on_devices() else {"ep_layout", "ep_copy", "ep_reduce", "ep_cast"}
            assert groups.keys() >= expected
            few = ("ep_await", "ep_signal", "ep_announce", "ep_await_all", "ep_done", "ep_places", "ep_compare")
            moving = [n for kernel, n in groups.items() if kernel not in few]
            assert max(moving) <= 1 if most else min(moving) > 1
            assert not (most and meets_on_devices()) or max(groups.values()) == 1
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(SpecError, match="num_sms"):
            buffer.num_sms = wrong  # type: ignore[assignment]
    dist.barrier()


def test_a_flag_is_not_seen_before_what_it_tells_of(sockets: partial[None]) -> None:
    run_ranks(2, ordered, limit=60, before=sockets)


def ordered(rank: int) -> None:
    """Rows and a flag after them, many times over in the same place: whoever sees the flag sees all of the rows."""
    device: Any = plugins.select(FIBRES.backend).backend.device  # type: ignore[attr-defined]
    kernels, rows, row = EpKernels(device), 8, 256
    mine = device.window(rows * row + 4096)
    with Path(f"/proc/{os.getpid()}/fd/{mine.handle.files[0]}").open("rb+") as file:
        told: list[Any] = [None, None]
        dist.all_gather_object(told, (os.getpid(), file.fileno(), mine.handle.size))
        process, number, size = told[1 - rank]
        there = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
        dist.barrier()
    theirs = device.peer(Handle(size, files=(there,)))
    os.close(there)
    every = torch.arange(rows, dtype=torch.int32)
    for turn in range(1, 40):
        queue = device.queue()
        if turn % 2 == rank:
            content = torch.full((rows, row // 4), turn, dtype=torch.int32)
            to = Rows(theirs.memory, row)
            kernels.copy(queue, to, kernels.rows_of(queue, content), every, 0, rows, rows, False)
            kernels.signal(queue, theirs.memory, rows * row // 4, turn)
            queue.finish()
        else:
            flags = mine.memory[rows * row :]
            while kernels.seen(flags, 1, 1, turn, torch.device("cpu")) < [turn]:
                pass
            assert (mine.memory[: rows * row].view(torch.int32) == turn).all()
    dist.barrier()


def closing(rank: int) -> None:
    """The handler of a signal closes the buffer whose call it interrupts: the call ends, and rank 1 hears of it."""
    mine = FIBRES.inputs()[rank]
    buffer = FIBRES.buffer(timeout=20.0)
    if rank == 0:
        signal.signal(signal.SIGALRM, lambda number, frame: buffer.close())
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        begin = time.monotonic()
        with pytest.raises(SpecError, match="a closed buffer"):
            buffer.dispatch(mine.x, mine.topk_idx)
        assert time.monotonic() - begin < 10
        dist.barrier()
    else:
        dist.barrier()
        if meets_on_devices():
            buffer.dispatch(mine.x, mine.topk_idx)  # rank 0 had staged its rows before it was interrupted
        with pytest.raises(RankFailure, match="rank 0 failed in dispatch: it closed its buffer"):
            buffer.dispatch(mine.x, mine.topk_idx)
    buffer.close()
    assert not ep_node._parting


def test_a_handler_may_close_the_buffer_that_it_interrupts(before: partial[None]) -> None:
    run_ranks(2, closing, limit=30, before=before)


def test_faults_to_inject_are_refused(before: partial[None]) -> None:
    run_ranks(1, no_faults, limit=60, before=before)


def no_faults(rank: int) -> None:
    with pytest.raises(UnsupportedError, match="faults"):
        replace(FIBRES, ranks=1, tokens=(5,)).buffer(faults=EpFaults(EpFault("kill")))


def test_what_is_closed_is_given_back(before: partial[None]) -> None:
    run_ranks(2, descriptors, limit=60, before=before)


def descriptors(rank: int) -> None:
    """Buffers opened and closed again and again leave no open file behind."""
    mine = FIBRES.inputs()[rank]
    counts = []
    for _ in range(3):
        with FIBRES.buffer() as buffer:
            got = buffer.dispatch(mine.x, mine.topk_idx)
            buffer.combine(got.recv_x, got.handle)
            assert buffer.memory()["window"] > 0
        del got
        dist.barrier()
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    assert counts[0] == counts[-1], counts


def test_a_window_that_cannot_be_made_closes_nothing_of_others() -> None:
    for size in (1 << 60, 1 << 62, 1 << 70):
        with pytest.raises(DeviceError, match=f"of {size} bytes") as caught:
            SharedMemory.make(size)
        with Path(os.devnull).open() as others:
            del caught
            gc.collect()
            os.fstat(others.fileno())
