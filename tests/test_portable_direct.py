"""What is particular to the engine whose ranks meet on their devices: its ring, its windows, its headers."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import ep_cases
import portable_backends
import pytest
import torch
import torch.distributed as dist
from ep_cases import Case
from ep_ranks import run_ranks
from portable_backends import DEVICES, SOCKETS
from seeds import SEED

from hal import RankFailure, SpecError, plugins
from hal.portable.direct.board import COUNT, FIELDS, KIND, WINDOW, Told
from hal.portable.direct.kernels import AGREE, HEAD, RING, signed
from hal.portable.ep_windows import Windows
from hal.portable.host import HostEvent
from hal.portable.runtime import HoldingQueue, Queue
from hal.reference import ep as oracle
from hal.reference.ep import RankInput

FIBRES = Case(backend=portable_backends.name(32), hidden=16)


def registered(folder: str, rank: int, meeting: str = DEVICES) -> None:
    """The backends of `portable_backends` in this process."""
    os.environ["HAL_KERNEL_CACHE"] = folder
    plugins._registry = portable_backends.registry(meeting)


@pytest.fixture(scope="module")
def before(kernels: str) -> partial[None]:
    return partial(registered, kernels)


def returned(mine: RankInput, case: Case) -> torch.Tensor:
    """What a combine makes of rows that come back as they were sent."""
    local = -(-case.experts // case.ranks)
    here = torch.stack([(mine.topk_idx >= 0) & (mine.topk_idx // local == r) for r in range(case.ranks)])
    return (mine.x.float() * here.any(2).sum(0)[:, None]).to(mine.x.dtype)


def weighted(mine: RankInput) -> torch.Tensor:
    """What a low-latency combine makes of them."""
    assert mine.topk_weights is not None
    return mine.x.float() * torch.where(mine.topk_idx >= 0, mine.topk_weights, 0.0).sum(1, keepdim=True)


def again(times: int, call: Callable[[], object]) -> None:
    """Some errors of another rank come to light in the next call."""
    for _ in range(times):
        call()


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02)


@pytest.mark.long(5)
def test_the_ring_goes_round(before: partial[None]) -> None:
    run_ranks(3, round_and_round, limit=90, before=before)


def round_and_round(rank: int) -> None:
    """More calls than the ring has places, with ranks late at random; of some nobody ever takes the result."""
    case = replace(FIBRES, ranks=3, tokens=(3, 0, 4))
    mine = case.inputs()[rank]
    late = random.Random(SEED + rank)
    with case.buffer() as buffer:
        for turn in range(2 * RING):
            if late.random() < 0.05:
                time.sleep(late.random() * 0.02)
            x = mine.x * (turn % 5 + 1)
            if turn % 2:
                got = buffer.dispatch(x, mine.topk_idx)
                back = buffer.combine(got.recv_x, got.handle)
                assert torch.equal(back.combined_x, returned(replace(mine, x=x), case))
            elif turn % 8 == rank:
                # Whoever lets go does so alone: the others have the rows, and are not kept waiting for it later.
                buffer.low_latency_dispatch(x, mine.topk_idx, use_fp8=False, return_recv_hook=True)
            else:
                buffer.low_latency_dispatch(x, mine.topk_idx, use_fp8=False)
    dist.barrier()


def test_what_is_let_go_of_blocks_nobody(before: partial[None]) -> None:
    run_ranks(2, letting_go, limit=60, before=before)


def letting_go(rank: int) -> None:
    """Rank 1 runs none of its hooks, for longer than the ring; whatever was staged is given back all the same."""
    mine = FIBRES.inputs()[rank]
    with FIBRES.buffer() as buffer:
        got = buffer.dispatch(mine.x, mine.topk_idx)
        for _ in range(RING + 9):
            low = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False, return_recv_hook=True)
            back = buffer.combine(got.recv_x, got.handle, return_recv_hook=True)
            if rank == 0:
                assert low.hook is not None and back.hook is not None
                low.hook()
                back.hook()
                assert torch.equal(back.combined_x, returned(mine, FIBRES))
        del low, back
        engine: Any = buffer._engine
        buffer.dispatch(mine.x, mine.topk_idx)
        dist.barrier()
        buffer.dispatch(mine.x, mine.topk_idx)
        assert len(engine._staged) <= 3 and len(engine._pending) <= 2
    dist.barrier()


def test_a_call_that_is_not_finished_for_long_is_refused_in_time(before: partial[None]) -> None:
    run_ranks(2, unfinished, limit=180, before=before)


def unfinished(rank: int) -> None:
    """Nobody waits for itself: all ranks are told before the ring is full, and all is well once it is finished."""
    mine = FIBRES.inputs()[rank]
    for obstinate in (False, True):
        with FIBRES.buffer(timeout=80.0) as buffer:
            begin = time.monotonic()
            got = buffer.dispatch(mine.x, mine.topk_idx)
            kept = [buffer.combine(got.recv_x, got.handle, async_finish=True)]
            if rank == 0:
                kept[0].event.wait()
            with pytest.raises(SpecError, match=r"56 calls after one that rank 1 has not finished") as caught:
                again(RING, lambda: buffer.dispatch(mine.x, mine.topk_idx))
            assert caught.value.argument == "dispatch"
            with pytest.raises(SpecError, match=r"57 calls after one that rank 1 has not finished"):
                buffer.low_latency_dispatch(mine.x, mine.topk_idx)
            if obstinate:
                # Told often enough: there is no more place to say it in.
                for _ in range(6):
                    with pytest.raises(SpecError):
                        buffer.combine(got.recv_x, got.handle)
                dist.barrier()
                with pytest.raises(RankFailure, match=r"rank 1 failed in combine: .* one that it has not finished"):
                    buffer.combine(got.recv_x, got.handle)
            else:
                kept[0].event.wait()
                assert torch.equal(kept[0].combined_x, returned(mine, FIBRES))
                for _ in range(RING):
                    back = buffer.combine(got.recv_x, got.handle)
                assert torch.equal(back.combined_x, returned(mine, FIBRES))
            assert time.monotonic() - begin < 60
        dist.barrier()


def test_refusals_alone_go_round_too(before: partial[None]) -> None:
    run_ranks(1, refusing, limit=30, before=before)


def refusing(rank: int) -> None:
    """With nobody to disagree with, a refused call is over like any other."""
    case = replace(FIBRES, ranks=1, tokens=(3,))
    mine = case.inputs()[rank]
    with case.buffer(timeout=2.0) as buffer:
        for turn in range(2 * RING):
            if turn % 3 == 0:
                with pytest.raises(SpecError, match="expert_alignment"):
                    buffer.dispatch(mine.x, mine.topk_idx, expert_alignment=0)
            got = buffer.dispatch(mine.x, mine.topk_idx)
        assert len(got.recv_x)
        with pytest.raises(SpecError, match="topk_idx: got an expert out of range on rank 0"):
            buffer.dispatch(mine.x, torch.full_like(mine.topk_idx, 99))
        back = buffer.combine(got.recv_x, got.handle)
        assert torch.equal(back.combined_x, returned(mine, case))


def test_many_windows(before: partial[None]) -> None:
    run_ranks(2, many, limit=60, before=before)


def many(rank: int) -> None:
    """More staged at once than the table of addresses began with."""
    mine = FIBRES.inputs()[rank]
    with FIBRES.buffer() as buffer:
        got = buffer.dispatch(mine.x, mine.topk_idx)
        kept = [buffer.combine(got.recv_x * (i % 4), got.handle, async_finish=True) for i in range(40)]
        engine: Any = buffer._engine
        assert engine._windows._count > 32
        for i, one in enumerate(kept):
            one.event.wait()
            assert torch.equal(one.combined_x, returned(replace(mine, x=mine.x * (i % 4)), FIBRES))
    dist.barrier()


def test_a_buffer_opened_in_inference_mode_is_used_outside_of_it(before: partial[None]) -> None:
    run_ranks(2, out_of_inference, limit=60, before=before)


def out_of_inference(rank: int) -> None:
    """Torch does not write outside of that mode to tensors that were made in it."""
    mine = FIBRES.inputs()[rank]
    with torch.inference_mode():
        buffer = FIBRES.buffer()
        got = buffer.dispatch(mine.x, mine.topk_idx)
    got = buffer.dispatch(mine.x, mine.topk_idx)
    back = buffer.combine(got.recv_x, got.handle)
    assert torch.equal(back.combined_x, returned(mine, FIBRES))
    kept = [buffer.combine(got.recv_x, got.handle, async_finish=True) for _ in range(20)]
    for one in kept:
        one.event.wait()
    buffer.close()
    dist.barrier()


def test_more_tokens_than_was_said(before: partial[None]) -> None:
    run_ranks(2, growing, limit=60, before=before)


def growing(rank: int) -> None:
    """With overflow='grow' on one rank alone, in turn, back and forth."""
    for tokens in ((50, 3), (3, 50), (40, 45)):
        case = replace(FIBRES, tokens=tokens, topk=4, overflow="grow")
        inputs = case.inputs()
        mine = inputs[rank]
        want = oracle.dispatch(inputs, case.experts)[rank]
        with case.buffer(max_tokens_per_rank=4) as buffer:
            for count in (1, None, 2):
                few = mine if count is None else RankInput(*(g[:count] for g in (mine.x, mine.topk_idx)), None)
                got = buffer.dispatch(few.x, few.topk_idx, few.topk_weights)
                if count is None:
                    ep_cases.check_received(case, got, want)
                    again = buffer.dispatch(few.x, handle=got.handle)
                    assert torch.equal(again.recv_x, got.recv_x)
                back = buffer.combine(got.recv_x, got.handle)
                assert torch.equal(back.combined_x, returned(few, case))
    dist.barrier()


CASES = [
    replace(FIBRES, experts=7, topk=3, routing="random", room=4, overflow="drop", bias=1),
    replace(FIBRES, experts=7, topk=3, routing="random", room=4, overflow="drop", expand=True, alignment=4),
    replace(FIBRES, routing="one", topk=4, expand=True, alignment=8, worst=64),
    replace(FIBRES, routing="one", topk=4, worst=32),
    replace(FIBRES, routing="zipf", tokens=(9, 1), dtype="float32", hidden=20),
    replace(FIBRES, routing="random", dtype="float16", expand=True, bias=2),
]


@pytest.mark.sampled
@pytest.mark.long(3)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_oracle_agrees(ranks: int, before: partial[None]) -> None:
    tokens = {1: (6,), 2: (5, 7), 3: (5, 0, 9), 5: (2, 0, 9, 1, 4)}[ranks]
    cases = [replace(one, ranks=ranks, tokens=tokens) for one in CASES]
    run_ranks(ranks, ep_cases.normal, cases, limit=120, before=before)
    packed = replace(FIBRES, ranks=ranks, tokens=tokens, experts=7, hidden=144)
    run_ranks(ranks, ep_cases.packed, [(packed, "fp8"), (replace(packed, topk=1), "none")], limit=120, before=before)


def test_a_handle_serves_other_rows(before: partial[None]) -> None:
    run_ranks(2, cached, limit=60, before=before)


def cached(rank: int) -> None:
    """FP8 after bfloat16, weights after none, fewer choices than the buffer's, again and again; x with odd strides."""
    case = replace(FIBRES, hidden=256, topk=5, experts=7)
    inputs = replace(case, topk=2).inputs()
    mine = inputs[rank]
    want = oracle.dispatch(inputs, case.experts)[rank]
    fp8 = [RankInput(*oracle.fp8_cast(g.x, "fp8")[:1], g.topk_idx, g.topk_weights) for g in inputs]
    scales = [oracle.fp8_cast(g.x, "fp8")[1] for g in inputs]
    wide = torch.zeros(len(mine.x), 2 * case.hidden + 8, dtype=mine.x.dtype)
    wide[:, 8 : 8 + case.hidden] = mine.x
    between = torch.full((len(mine.x), scales[rank].shape[1] + 3), 9.0)
    between[:, 1:-2] = scales[rank]
    apart = torch.full((len(mine.x), 7), 3)
    apart[:, 3:5] = mine.topk_idx
    with case.buffer() as buffer:
        got = buffer.dispatch(wide[:, 8 : 8 + case.hidden], apart[:, 3:5])
        for _ in range(2):
            again = buffer.dispatch((fp8[rank].x, between[:, 1:-2]), handle=got.handle)
            assert isinstance(again.recv_x, tuple)
            cast, factors = oracle.fp8_cast(want.x, "fp8")
            ep_cases.same("rows", again.recv_x[0], cast)
            ep_cases.same("scales", again.recv_x[1], factors)
            more = buffer.dispatch(mine.x, handle=got.handle)
            ep_cases.same("rows", more.recv_x, want.x)
            weights = torch.where(want.topk_idx >= 0, 1.0, 0.0)
            for one in (got, again, more):
                back = buffer.combine(want.x, one.handle, topk_weights=weights)
                assert torch.equal(back.combined_x, returned(mine, case))
                assert torch.equal(back.combined_topk_weights, (mine.topk_idx >= 0).float())
    dist.barrier()


@pytest.mark.parametrize("meeting", [SOCKETS, DEVICES])
def test_a_low_latency_combine_leaves_choices_out(meeting: str, before: partial[None]) -> None:
    run_ranks(2, leaving_out, limit=60, before=partial(before, meeting=meeting))


def leaving_out(rank: int) -> None:
    """It may, and may make no others; what is refused has used nothing up, neither the result nor the memory lent."""
    mine = replace(FIBRES, routing="distinct").inputs()[rank]
    fewer = mine.topk_idx.clone()
    fewer[:, 1] = -1
    with FIBRES.buffer() as buffer:
        for lent in (False, True):
            got = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
            rows = got.recv_x
            assert isinstance(rows, torch.Tensor)
            if lent:
                rows = buffer.low_latency_combine_buffer(got.handle).copy_(rows)
            wide = torch.full((len(mine.x), FIBRES.hidden + 3), 7.0, dtype=mine.x.dtype)
            other = mine.topk_idx if rank == 0 else mine.topk_idx.roll(1, 1)
            for _ in range(2):
                with pytest.raises(SpecError, match="topk_idx: got other routes on rank 1"):
                    buffer.low_latency_combine(rows, other, mine.topk_weights, got.handle, zero_copy=lent)
            if lent and rank == 1:
                with pytest.raises(SpecError, match="x: got other memory"):
                    buffer.low_latency_combine(rows.clone(), fewer, mine.topk_weights, got.handle, zero_copy=True)
            elif lent:
                with pytest.raises(SpecError, match="x: got other memory"):
                    buffer.low_latency_combine(rows, fewer, mine.topk_weights, got.handle, zero_copy=True)
            out = wide[:, 2 : 2 + FIBRES.hidden]
            buffer.low_latency_combine(rows, fewer, mine.topk_weights, got.handle, zero_copy=lent, out=out)
            close(out, weighted(replace(mine, topk_idx=fewer)))
            assert (wide[:, :2] == 7).all() and (wide[:, -1] == 7).all()
    dist.barrier()


def test_memory_that_is_lacking_is_told_and_leaves_the_buffer_usable(before: partial[None]) -> None:
    run_ranks(2, lacking, limit=60, before=before)


def lacking(rank: int) -> None:
    """For what a low-latency call stages; whoever keeps the errors does not keep the results that they stand for."""
    case = replace(FIBRES, tokens=(40, 40), hidden=1024)
    mine = case.inputs()[rank]
    errors = []
    with case.buffer(modes=("low_latency",)) as buffer:
        for _ in range(3):
            with pytest.MonkeyPatch.context() as patch:
                if rank:
                    patch.setattr(Windows, "take", refuse_memory)
                with pytest.raises(SpecError, match=r"x: got \d+ bytes to stage on rank 1 .no memory") as caught:
                    buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
                errors.append(caught.value)
        got = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        with pytest.MonkeyPatch.context() as patch:
            if rank:
                patch.setattr(Windows, "take", refuse_memory)
            with pytest.raises(SpecError, match="bytes to stage on rank 1"):
                buffer.low_latency_combine(got.recv_x, mine.topk_idx, mine.topk_weights, got.handle)
        back = buffer.low_latency_combine(got.recv_x, mine.topk_idx, mine.topk_weights, got.handle)
        close(back.combined_x, weighted(mine))
    dist.barrier()


def refuse_memory(*given: Any) -> Any:
    from hal.spec.errors import DeviceError

    raise DeviceError("no memory")


def test_all_refuse_what_one_has_no_room_for(before: partial[None]) -> None:
    run_ranks(2, slow_to_refuse, limit=60, before=before)


def slow_to_refuse(rank: int) -> None:
    """Rank 0 goes on to other routes at once, while rank 1 has yet to count those that are refused."""
    case = replace(FIBRES, routing="one", tokens=(7, 7), room=3)
    mine = case.inputs()[rank]
    few = torch.full_like(mine.topk_idx, -1)
    with case.buffer(timeout=5.0) as buffer:
        engine: Any = buffer._engine
        await_all = engine._kernels.await_all

        def late(*given: Any) -> None:
            time.sleep(0.3)
            await_all(*given)

        for _ in range(2):
            with pytest.MonkeyPatch.context() as patch:
                if rank:
                    patch.setattr(engine._kernels, "await_all", late)
                with pytest.raises(SpecError, match="max_recv_tokens: got 3, while rank 1 would receive 14 rows"):
                    buffer.dispatch(mine.x, mine.topk_idx)
            assert len(buffer.dispatch(mine.x, few).recv_x) == 0
    dist.barrier()


# What rank 1's header says instead: which word, what, and what is said of it.
DAMAGED = {
    "window": (WINDOW, 5, "window 5 that it has not shown"),
    "no window": (WINDOW, -7, "window -7 that it has not shown"),
    "far window": (WINDOW, 1 << 30, "window 1073741824 that it has not shown"),
    "count": (COUNT, 8, "its 8 rows lie outside its window, or are too many"),
    "large count": (COUNT, 1 << 28, "its 268435456 rows lie outside"),
    "no count": (COUNT, -3, "its -3 rows lie outside"),
    "kind": (KIND, 77, "its header is damaged"),
    "no kind": (KIND, -1, "its header is damaged"),
    "field": (FIELDS + 2, 99, "its header is damaged"),
    "hidden": (FIELDS + 8, 5, "its header is damaged"),
}


@pytest.mark.parametrize("overflow", ["error", "grow"])
def test_a_header_that_cannot_be_is_its_ranks_fault(overflow: str, before: partial[None]) -> None:
    for packed in (False, True):
        run_ranks(2, damaged, overflow, packed, limit=60, before=before)


def lying(announce: Any, word: int, value: int, queue: Any, call: int, *given: Any) -> None:
    """Announce a call with another word in its header."""
    kind, window, count, fields = given
    head = [call, kind, 0, window, count, *fields, *(0,) * AGREE][:HEAD]
    head[word] = value
    announce(queue, call, head[KIND], head[WINDOW], head[COUNT], head[FIELDS : FIELDS + AGREE])


def damaged(rank: int, overflow: str, packed: bool) -> None:
    """Rank 0 says so at once and reads nothing that is not there; so does rank 1, which hears of it."""
    case = replace(FIBRES, overflow=overflow)
    mine = case.inputs()[rank]
    for what, (word, value, said) in DAMAGED.items():
        if packed and what == "field":
            word = FIELDS + 1
        if not packed and (what == "hidden" or (what == "count" and overflow == "grow")):
            continue  # there is no word that nobody looks at; there may be so many
        with case.buffer(timeout=20.0) as buffer, pytest.MonkeyPatch.context() as patch:
            engine: Any = buffer._engine
            if rank:
                # Its own header, which it sees too, is as wrong to itself.
                patch.setattr(engine._kernels, "announce", partial(lying, engine._kernels.announce, word, value))
            dispatch = partial(buffer.low_latency_dispatch, use_fp8=False) if packed else buffer.dispatch
            begin = time.monotonic()
            with pytest.raises(RankFailure, match=said) as caught:
                again(2, partial(dispatch, mine.x, mine.topk_idx))
            assert caught.value.rank == 1, what
            assert time.monotonic() - begin < 5, what
            dist.barrier()


def test_a_window_of_an_absurd_number_is_a_damaged_message(before: partial[None]) -> None:
    run_ranks(2, absurd, limit=30, before=before)


def absurd(rank: int) -> None:
    mine = FIBRES.inputs()[rank]
    with FIBRES.buffer(timeout=10.0) as buffer, pytest.MonkeyPatch.context() as patch:
        engine: Any = buffer._engine
        if rank:
            announcement = engine._windows.announcement

            def absurd() -> Any:
                told, files = announcement()
                return [[1 << 40, *one[1:]] for one in told], files

            patch.setattr(engine._windows, "announcement", absurd)
        with pytest.raises(RankFailure, match="rank 1 failed in message: its message is damaged"):
            again(2, lambda: buffer.dispatch(mine.x, mine.topk_idx))
        dist.barrier()


def test_no_number_of_a_call_is_there_before_it_is_told() -> None:
    """Also where its last 32 bits are nothing but zeros."""
    told = Told(torch.zeros(Told.size(3), dtype=torch.int32), 3)
    for call in (1, 64, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 3 * 2**32):
        told.clear(call)
        assert not told.complete(call) and told.missing(call) == [0, 1, 2]
        told.words[:3] = signed(call)
        assert told.complete(call)


def test_closing_with_a_hook_to_come(before: partial[None]) -> None:
    run_ranks(2, closing, limit=60, before=before)


def closing(rank: int) -> None:
    """Its hook refuses; the other rank has the rows, and hears at its next call. A child can do no harm."""
    mine = FIBRES.inputs()[rank]
    buffer = FIBRES.buffer(timeout=10.0)
    got = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False, return_recv_hook=True)
    child = os.fork()
    if not child:
        try:
            with pytest.raises(SpecError, match="another process"):
                got.hook()  # type: ignore[misc]
            buffer.close()
            del got, buffer
            gc.collect()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    dist.barrier()
    assert got.hook is not None
    if rank == 0:
        buffer.close()
        dist.barrier()
        with pytest.raises(SpecError, match="a closed buffer"):
            got.hook()
    else:
        dist.barrier()
        got.hook()
        back = buffer.low_latency_combine(got.recv_x, mine.topk_idx, mine.topk_weights, got.handle, async_finish=True)
        with pytest.raises(RankFailure, match="rank 0 failed in low_latency_combine: it closed its buffer"):
            back.event.wait()
        buffer.close()
    dist.barrier()


def test_a_hook_may_run_on_another_stream(before: partial[None]) -> None:
    run_ranks(2, elsewhere, limit=60, before=before)


def elsewhere(rank: int) -> None:
    """It is waited for then, as memory is freed in the order of the call's stream; at the end all streams are."""
    mine = FIBRES.inputs()[rank]
    device: Any = plugins.select(FIBRES.backend).backend.device  # type: ignore[attr-defined]
    current, waited, launch = [1], [], device.launch

    class Event:
        def __init__(self) -> None:
            self.stream = current[0]

        def wait(self) -> None:
            waited.append(self.stream)

    def launched(*given: Any) -> Event:
        launch(*given)
        return Event()

    buffer = FIBRES.buffer()
    device.launch = launched
    got = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False, return_recv_hook=True)
    assert got.hook is not None
    dist.barrier()
    waited.clear()
    current[0] = 2
    got.hook()
    assert waited[:2] == [2, 1]
    waited.clear()
    dist.barrier()
    back = buffer.low_latency_combine(got.recv_x, mine.topk_idx, mine.topk_weights, got.handle, return_recv_hook=True)
    dist.barrier()
    assert back.hook is not None
    back.hook()
    assert not waited, "on one stream nothing is waited for"
    current[0] = 3
    del back
    buffer.dispatch(mine.x, mine.topk_idx)
    waited.clear()
    dist.barrier()
    buffer.close()
    assert set(waited) == {2, 3}
    dist.barrier()


def test_several_threads_finish_and_let_go(before: partial[None]) -> None:
    run_ranks(2, threaded, limit=60, before=before)


def threaded(rank: int) -> None:
    """Hooks run, or are forgotten, on threads of their own while the next calls are made."""
    mine = FIBRES.inputs()[rank]
    with FIBRES.buffer() as buffer:
        got = buffer.dispatch(mine.x, mine.topk_idx)
        wrong: list[BaseException] = []

        def finished(back: list[Any], run: bool) -> None:
            try:
                if run:
                    back[0].event.wait()
                    assert torch.equal(back[0].combined_x, returned(mine, FIBRES))
                back.clear()
            except BaseException as error:
                wrong.append(error)

        threads = []
        for turn in range(RING + 20):
            held = [buffer.combine(got.recv_x, got.handle, async_finish=True)]
            threads.append(threading.Thread(target=finished, args=(held, turn % 3 > 0)))
            threads[-1].start()
            del held
            if turn % 16 == 15:
                for thread in threads:
                    thread.join()
        for thread in threads:
            thread.join()
        assert not wrong, wrong
        assert torch.equal(buffer.combine(got.recv_x, got.handle).combined_x, returned(mine, FIBRES))
    dist.barrier()


def test_captured_calls_are_the_same_without_the_host(before: partial[None]) -> None:
    run_ranks(3, captured, limit=90, before=before)


def captured(rank: int) -> None:
    """Rounds of both kinds, in two ways of overlapping, among calls that are not captured; ranks late at random."""
    case = replace(FIBRES, ranks=3, experts=10, tokens=(5, 0, 9))
    mine = case.inputs()[rank]
    device: Any = plugins.select(case.backend).backend.device  # type: ignore[attr-defined]
    draw = random.Random(f"{SEED} {rank}")
    with case.buffer(modes=("low_latency", "normal"), timeout=20.0) as buffer:

        def dispatch(turn: int, hook: bool = False) -> Any:
            time.sleep(draw.random() * 0.003)
            return buffer.low_latency_dispatch(mine.x * turn, mine.topk_idx, use_fp8=False, return_recv_hook=hook)

        def combined(got: Any) -> torch.Tensor:
            weights = mine.topk_weights
            return buffer.low_latency_combine(got.recv_x, mine.topk_idx, weights, got.handle).combined_x

        # Which puts aside what captured calls need.
        close(combined(dispatch(1)), weighted(mine))
        for turn in range(2, 30):
            device.in_capture = turn % 5 != 0
            if turn % 3:
                close(combined(dispatch(turn)), weighted(mine) * turn)
            else:
                first, second = dispatch(turn, hook=True), dispatch(1, hook=True)
                first.hook()
                second.hook()
                close(combined(first), weighted(mine) * turn)
                close(combined(second), weighted(mine))
        device.in_capture = True
        with pytest.raises(SpecError, match="dispatch: got a stream that is being captured; legal: low-latency calls"):
            buffer.dispatch(mine.x, mine.topk_idx)
        device.in_capture = False
        assert torch.equal(buffer.dispatch(mine.x, mine.topk_idx).handle.topk_idx, mine.topk_idx)
    dist.barrier()


def test_a_captured_call_wants_another_before_it(before: partial[None]) -> None:
    run_ranks(1, at_once, limit=30, before=before)


def at_once(rank: int) -> None:
    case = replace(FIBRES, ranks=1, tokens=(5,))
    mine = case.inputs()[rank]
    device: Any = plugins.select(case.backend).backend.device  # type: ignore[attr-defined]
    with case.buffer() as buffer:
        device.in_capture = True
        with pytest.raises(
            SpecError, match="a captured call before any other; legal: low_latency_dispatch once before"
        ):
            buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        device.in_capture = False
        got = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        device.in_capture = True
        with pytest.raises(SpecError, match="call before any other; legal: low_latency_combine once before"):
            buffer.low_latency_combine(got.recv_x, mine.topk_idx, mine.topk_weights, got.handle)


def test_a_rank_that_is_not_there_when_a_graph_is_replayed_is_named_afterwards(before: partial[None]) -> None:
    run_ranks(2, absent, limit=60, before=before)


def absent(rank: int) -> None:
    """Rank 1 does not make a call that rank 0 replays."""
    mine = FIBRES.inputs()[rank]
    device: Any = plugins.select(FIBRES.backend).backend.device  # type: ignore[attr-defined]
    with FIBRES.buffer(timeout=1.0) as buffer:
        buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        dist.barrier()
        if rank == 0:
            device.in_capture = True
            begin = time.monotonic()
            buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
            assert time.monotonic() - begin < 10
            device.in_capture = False
            with pytest.raises(RankFailure, match=r"rank 1 failed in .*nothing from it .*in a replayed graph"):
                buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        dist.barrier()


def test_a_graph_is_refused_what_would_come_out_wrong_in_it(before: partial[None]) -> None:
    run_ranks(2, refused_in_graphs, limit=60, before=before)


def refused_in_graphs(rank: int) -> None:
    mine = FIBRES.inputs()[rank]
    device: Any = plugins.select(FIBRES.backend).backend.device  # type: ignore[attr-defined]
    with FIBRES.buffer(timeout=10.0) as buffer:

        def dispatch(**more: Any) -> Any:
            return buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False, **more)

        def combine(got: Any, times: int = 1, **more: Any) -> Any:
            return buffer.low_latency_combine(got.recv_x * times, mine.topk_idx, mine.topk_weights, got.handle, **more)

        if rank == 0:
            # This rank alone: the others do not hear of it, and it has made no call.
            device.in_capture = True
            with pytest.raises(SpecError, match="a captured call before any other"):
                dispatch()
            device.in_capture = False
        got = dispatch()
        close(combine(got).combined_x, weighted(mine))
        late = dispatch(return_recv_hook=True)
        device.in_capture = True
        with pytest.raises(SpecError, match="hook or event: got run while a graph is captured"):
            late.hook()
        with pytest.raises(SpecError, match="wait_recv_cost_stats: got a tensor; legal: None while"):
            combine(got, combine_wait_recv_cost_stats=torch.zeros(2, dtype=torch.int64))
        results = [combine(got, times, return_recv_hook=True) for times in (1, 2)]
        with pytest.raises(SpecError, match="captured call while the one 2 before it is not finished"):
            combine(got, 3, return_recv_hook=True)
        for times, result in enumerate(results, 1):
            result.hook()
            close(result.combined_x, weighted(mine) * times)
        outside = combine(got, 3, return_recv_hook=True)
        device.in_capture = False
        with pytest.raises(SpecError, match="hook or event: got run after the capture of its call"):
            outside.hook()
    dist.barrier()


def test_the_table_in_a_graph_stays_when_windows_come(before: partial[None]) -> None:
    run_ranks(2, more_windows, limit=60, before=before)


def more_windows(rank: int) -> None:
    mine = FIBRES.inputs()[rank]
    device: Any = plugins.select(FIBRES.backend).backend.device  # type: ignore[attr-defined]
    with FIBRES.buffer(timeout=10.0, modes=("low_latency", "normal")) as buffer:
        buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        kernels = buffer._engine._kernels  # type: ignore[attr-defined]
        device.in_capture = True
        buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        device.in_capture = False
        table = weakref.ref(kernels.windows)
        got = buffer.dispatch(mine.x, mine.topk_idx)
        for back in [buffer.combine(got.recv_x, got.handle, return_recv_hook=True) for _ in range(6)]:
            back.hook()
        gc.collect()
        assert kernels.windows is not table() and table() is not None
    dist.barrier()


class LateHost(portable_backends.MeetingHost):
    """Runs kernels when somebody waits, and fills memory with ones as soon as nobody has it any more."""

    def __init__(self) -> None:
        super().__init__(32)
        self._later: list[tuple[Any, ...]] = []
        self._memory: list[torch.Tensor] = []

    def queue(self) -> Queue:
        return HoldingQueue(self)

    def empty(self, size: int) -> torch.Tensor:
        self._memory.append(super().empty(size))  # stays, so that who comes late harms nobody
        given = self._memory[-1].view(torch.uint8)
        weakref.finalize(given, self._memory[-1].view(torch.uint8).fill_, 255)
        return given

    def launch(self, *given: Any) -> Any:
        self._later.append(given)
        return HostEvent()

    def finish(self) -> None:
        later, self._later = self._later, []
        for given in later:
            super().launch(*given)


def test_what_kernels_use_is_there_when_they_run(before: partial[None]) -> None:
    run_ranks(2, late, limit=60, before=before)


def late(rank: int) -> None:
    """Results of a dispatch are waited for when all else of it was let go."""
    case = replace(FIBRES, tokens=(5, 9))
    mine = case.inputs()[rank]
    backend: Any = plugins.select(case.backend).backend
    backend.device = LateHost()
    with case.buffer() as buffer:
        for expand in (False, True):
            got = buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights, expand=expand, return_recv_hook=True)
            gc.collect()
            assert got.hook is not None
            got.hook()
            assert isinstance(got.recv_x, torch.Tensor)
            rows = oracle.dispatch(case.inputs(), case.experts, expand=expand)[rank]
            ep_cases.same("recv_x", got.recv_x, rows.x)
            back = buffer.combine(got.recv_x, got.handle, topk_weights=got.recv_topk_weights, async_finish=True)
            gc.collect()
            back.event.wait()
            if not expand:
                assert torch.equal(back.combined_x, returned(mine, case))
        packed = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False, return_recv_hook=True)
        gc.collect()
        packed.hook()
        sums = buffer.low_latency_combine(packed.recv_x, mine.topk_idx, mine.topk_weights, packed.handle)
        close(sums.combined_x, weighted(mine))
    dist.barrier()
