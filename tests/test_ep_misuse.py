"""Buffers used as nobody should: results dropped, forks, threads, signals, junk, and machines that lack memory."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ep_cases import Case, same
from ep_ranks import run_ranks

from hal import EpFault, EpFaults, HalError, RankFailure, SpecError
from hal.ep.launch import RANKS_PER_NODE_ENV
from hal.reference import ep as oracle

CASE = Case(tokens=(6, 6), hidden=64, experts=8)


def dropping(rank: int) -> None:
    """Nobody waits for a combine, nor keeps what it returned: the next call completes it all the same."""
    case = Case(tokens=(64, 64), hidden=256, dtype="float32")
    mine = case.inputs()[rank]
    with case.buffer() as buffer:
        got = buffer.dispatch(mine.x, mine.topk_idx)
        rows = got.recv_x.clone()
        for _ in range(30):
            buffer.combine(rows, got.handle, async_finish=True)
            low = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False, return_recv_hook=True)
            buffer.low_latency_combine(low.recv_x, mine.topk_idx, mine.topk_weights, low.handle, async_finish=True)
            del low
            gc.collect()
            others = [torch.full((64, 256), 7.0) for _ in range(4)]
            buffer.dispatch(mine.x, mine.topk_idx)
            assert all((one == 7).all() for one in others), "a result that was dropped was written to"
        assert len(buffer._engine._under_way) <= 3  # type: ignore[attr-defined]  # of the last round


def test_a_dropped_result_is_written_nowhere_else() -> None:
    run_ranks(2, dropping)


def forking(rank: int) -> list[str]:
    """A child calls, closes, lets go of and exits with its parent's buffer, in vain; the parent goes on."""
    mine = CASE.inputs()[rank]
    want = oracle.dispatch(CASE.inputs(), CASE.experts)[rank]
    said: list[str] = []
    buffer = CASE.buffer(timeout=10.0)
    # The engine's own thread is there, and is not in the child.
    if rank == 1:
        time.sleep(0.2)
    low = buffer.low_latency_dispatch(mine.x, mine.topk_idx, return_recv_hook=True)
    assert low.hook is not None
    low.hook()
    if rank == 0:
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            with contextlib.suppress(BaseException):
                for call in (
                    lambda: buffer.dispatch(mine.x, mine.topk_idx),
                    lambda: buffer.low_latency_combine_buffer(low.handle),
                    lambda: buffer.refuse(SpecError("x", "this", "that")),
                ):
                    try:
                        call()
                        os.write(writes, b"done\n")
                    except HalError as error:
                        os.write(writes, f"{error}\n".encode())
                buffer.close()
                del buffer, low
                gc.collect()
                os.write(writes, b"closed\n")
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        said = os.read(reads, 4096).decode().splitlines()
    dist.barrier()
    same("recv_x", buffer.dispatch(mine.x, mine.topk_idx).recv_x, want.x)
    buffer.close()
    return said


def test_a_forked_child_has_no_buffer() -> None:
    *refused, closed = run_ranks(2, forking)[0].value
    assert len(refused) == 3 and all("buffer: got one that another process opened" in line for line in refused), refused
    assert closed == "closed"


def waiting_twice(rank: int) -> list[float]:
    """Seconds until each of two threads that call the same hook has its rows; rank 1 comes a second late."""
    mine = CASE.inputs()[rank]
    seconds: list[float] = []
    with CASE.buffer() as buffer:
        if rank == 1:
            time.sleep(1)
        low = buffer.low_latency_dispatch(mine.x, mine.topk_idx, return_recv_hook=True)
        assert low.hook is not None
        begin = time.monotonic()

        def wait() -> None:
            low.hook()
            seconds.append(time.monotonic() - begin)

        threads = [threading.Thread(target=wait) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        dist.barrier()
    return seconds


def test_two_threads_that_wait_both_wait() -> None:
    assert min(run_ranks(2, waiting_twice)[0].value) > 0.5


def interrupted(rank: int) -> str:
    """A signal's handler closes the buffer whose call waits: the call ends, and so does the buffer."""
    mine = CASE.inputs()[rank]
    buffer = CASE.buffer(timeout=20.0)
    if rank == 1:
        time.sleep(2)
        return ""
    signal.signal(signal.SIGALRM, lambda number, frame: buffer.close())
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    begin = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        buffer.dispatch(mine.x, mine.topk_idx)
    assert time.monotonic() - begin < 5
    buffer.close()
    return str(caught.value)


def test_a_handler_may_close_the_buffer_that_it_interrupts() -> None:
    assert "this buffer is closed" in run_ranks(2, interrupted, limit=15)[0].value


def reentrant(rank: int) -> str:
    """A signal's handler calls the buffer whose call waits: refused, and the call goes on."""
    mine = CASE.inputs()[rank]
    said: list[str] = []
    with CASE.buffer(timeout=20.0) as buffer:

        def handler(number: int, frame: object) -> None:
            try:
                buffer.dispatch(mine.x, mine.topk_idx)
            except RuntimeError as error:
                said.append(str(error))

        if rank == 1:
            time.sleep(2)
        else:
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, 0.5)
        buffer.dispatch(mine.x, mine.topk_idx)
    return " ".join(said)


def test_a_handler_may_not_call_the_buffer_that_it_interrupts() -> None:
    assert "a signal's handler calls the buffer" in run_ranks(2, reentrant, limit=15)[0].value


JUNK: dict[str, dict[str, Any]] = {
    "timeout": {"timeout": 1e10},
    "timeout ": {"timeout": 10**400},
    "faults": {"faults": "kill"},
    "device": {"num_experts": 2**31 - 1},
}


def junk(rank: int) -> list[str]:
    """The argument that each wrong buffer is refused for, on this rank."""
    said = []
    for given in JUNK.values():
        with pytest.raises(SpecError) as caught:
            CASE.buffer(**given)
        said.append(str(caught.value))
    CASE.buffer().close()
    return said


def test_junk_is_refused_alike() -> None:
    first, second = (outcome.value for outcome in run_ranks(2, junk))
    assert first == second
    assert [text.split(":")[0] for text in first] == [name.strip() for name in JUNK]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: EpFault("delay", seconds=float("nan")),
        lambda: EpFault("delay", seconds=-1),
        lambda: EpFault("delay", seconds="1"),  # type: ignore[arg-type]
        lambda: EpFaults("kill"),  # type: ignore[arg-type]
    ],
)
def test_faults_that_are_none_are_refused(wrong: Callable[[], object]) -> None:
    with pytest.raises(SpecError, match=r"^(seconds|faults): "):
        wrong()


def odd_environment(rank: int, said: str) -> str:
    os.environ[RANKS_PER_NODE_ENV] = said
    with pytest.raises(SpecError) as caught:
        CASE.buffer()
    return caught.value.argument


@pytest.mark.parametrize("said", ["", "two", "-1", "0", "²", "٣", " 2", "9" * 5000], ids=range(8))
def test_an_odd_environment_is_refused(said: str) -> None:
    assert [outcome.value for outcome in run_ranks(2, odd_environment, said)] == [RANKS_PER_NODE_ENV] * 2


def lacking(rank: int, method: str) -> tuple[str, float]:
    """Opens a buffer while rank 1 lacks memory for its own window, or for another's; later it does not."""
    from hal_cpu import _ep

    def lacks(*given: object) -> None:
        raise OSError("mmap: Cannot allocate memory")

    begin = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(_ep, "Engine", type("Engine", (_ep.Engine,), {method: lacks}))
        with pytest.raises(SpecError) as caught:
            CASE.buffer(timeout=20.0)
    seconds = time.monotonic() - begin
    mine = CASE.inputs()[rank]
    with CASE.buffer(timeout=20.0) as buffer:
        buffer.dispatch(mine.x, mine.topk_idx)
    return str(caught.value), seconds


@pytest.mark.parametrize("method", ["__init__", "attach"])
def test_a_rank_that_lacks_memory_is_named_at_once_on_all(method: str) -> None:
    (first, seconds), (second, _) = (outcome.value for outcome in run_ranks(2, lacking, method))
    assert first == second
    assert first.startswith("device: got mmap: Cannot allocate memory, on rank 1")
    assert seconds < 10


FOUR = Case(ranks=4, tokens=(6, 6, 6, 6), experts=8, per_node=2)


def dying_while_trading(rank: int) -> int:
    """Rank 3, the second of the second node, ends before it gives its window: whom the others name."""
    from hal.ep.rendezvous import Doorbell

    if rank == 3:
        Doorbell.trade = lambda *given: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,method-assign]
    with pytest.raises(RankFailure) as caught:
        FOUR.buffer(timeout=3.0)
    return caught.value.rank


def test_who_gives_no_window_is_named_by_its_number_in_the_group() -> None:
    outcomes = run_ranks(4, dying_while_trading, check=False)
    assert [outcome.value for outcome in outcomes[:3]] == [3, 3, 3], outcomes


def reserving(rank: int) -> None:
    """Over nodes: a second call takes its slot while the first, behind the caller's back, waits inside the node."""
    mine = FOUR.inputs()[rank]
    faults = EpFaults(EpFault("delay", "push", 1, seconds=1.5)) if rank == 1 else None
    want = oracle.low_latency_dispatch(FOUR.inputs(), FOUR.experts, 6)
    with FOUR.buffer(timeout=10.0, faults=faults) as buffer:
        first = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False, return_recv_hook=True)
        time.sleep(0.5)
        begin = time.monotonic()
        second = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False, return_recv_hook=True)
        assert time.monotonic() - begin < 5
        for one in (first, second):
            assert one.hook is not None
            one.hook()
            same("recv_count", one.recv_count, want[rank].count)
    dist.barrier()


def test_a_slot_is_taken_while_a_call_waits_inside_the_node() -> None:
    run_ranks(4, reserving, limit=20)


def two_groups(rank: int) -> tuple[str, float]:
    """Rank 2 opens its buffer over another group of the same ranks; afterwards over the same."""
    case = Case(ranks=3, tokens=(6, 6, 6), experts=9)
    one, other = (dist.new_group([0, 1, 2]) for _ in range(2))
    begin = time.monotonic()
    with pytest.raises(SpecError) as caught:
        case.buffer(group=other if rank == 2 else one, timeout=2.0)
    seconds = time.monotonic() - begin
    dist.barrier()  # whoever still waited would meet those who come again
    mine = case.inputs()[rank]
    with case.buffer(group=one) as buffer:
        buffer.dispatch(mine.x, mine.topk_idx)
    return str(caught.value), seconds


def test_ranks_of_different_groups_are_told_alike() -> None:
    outcomes = [outcome.value for outcome in run_ranks(3, two_groups)]
    said = {text for text, _ in outcomes}
    assert len(said) == 1, said
    text = said.pop()
    assert text.startswith("group: got group ") and "on rank 2; legal: group " in text, text
    assert max(seconds for _, seconds in outcomes) < 4


def alone(rank: int) -> int:
    """Rank 1 opens a buffer for which nobody else comes: no group is wrong."""
    one = dist.new_group([0, 1])
    if rank == 0:
        CASE.buffer(group=dist.new_group([0], use_local_synchronization=True)).close()
        dist.barrier()
        return 0
    with pytest.raises(RankFailure) as caught:
        CASE.buffer(group=one, timeout=1.5)
    dist.barrier()
    return caught.value.rank


def test_a_group_for_which_nobody_comes_is_no_mismatch() -> None:
    assert [outcome.value for outcome in run_ranks(2, alone)] == [0, 0]


def stale(rank: int) -> list[str]:
    """A result that was combined is combined again: at once, and after its memory was taken on rank 1."""
    mine = CASE.inputs()[rank]
    said = []
    with CASE.buffer() as buffer:
        low = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        assert isinstance(low.recv_x, torch.Tensor)
        first = buffer.low_latency_combine(low.recv_x, mine.topk_idx, mine.topk_weights, low.handle)
        again = buffer.low_latency_combine(low.recv_x, mine.topk_idx, mine.topk_weights, low.handle)
        same("combined_x", again.combined_x, first.combined_x)
        later = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        for handle in (low.handle, later.handle if rank else low.handle):
            with pytest.raises(SpecError) as caught:
                buffer.low_latency_combine(low.recv_x, mine.topk_idx, mine.topk_weights, handle)
            said.append(str(caught.value))
        assert isinstance(later.recv_x, torch.Tensor)
        buffer.low_latency_combine(later.recv_x, mine.topk_idx, mine.topk_weights, later.handle)
    return said


def test_a_stale_handle_is_refused_alike() -> None:
    first, second = (outcome.value for outcome in run_ranks(2, stale))
    assert first == second
    assert all(text.startswith("handle: got one that was combined") for text in first), first


def refused_and_right(rank: int) -> None:
    """A combine that was refused has used nothing up; a result that had been combined before stays so."""
    mine = CASE.inputs()[rank]
    short = mine.topk_weights[1:] if rank else mine.topk_weights
    with CASE.buffer() as buffer:
        low = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        assert isinstance(low.recv_x, torch.Tensor)
        with pytest.raises(SpecError, match="topk_weights"):
            buffer.low_latency_combine(low.recv_x, mine.topk_idx, short, low.handle)
        other = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        with pytest.raises(SpecError, match="a third result while two are live"):
            buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        assert isinstance(other.recv_x, torch.Tensor)
        right = [
            buffer.low_latency_combine(of.recv_x, mine.topk_idx, mine.topk_weights, of.handle).combined_x
            for of in (low, other)
        ]
        same("combined_x", right[0], right[1])
        with pytest.raises(SpecError, match="topk_weights"):
            buffer.low_latency_combine(other.recv_x, mine.topk_idx, short, other.handle)
        for _ in range(2):
            buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)


def test_a_combine_that_was_refused_used_nothing_up() -> None:
    run_ranks(2, refused_and_right)


def combining_what_failed(rank: int) -> str:
    """A deferred dispatch that all refused leaves rank 0 a handle, which combines nothing."""
    mine = CASE.inputs()[rank]
    empty = torch.empty

    def dirty(*shape: Any, **given: Any) -> torch.Tensor:
        made = empty(*shape, **given)
        return made.fill_(2**24) if made.dtype == torch.int64 else made

    with CASE.buffer() as buffer, pytest.MonkeyPatch.context() as patch:
        rows = torch.zeros(4, 12, 64, dtype=torch.bfloat16)
        patch.setattr(torch, "empty", dirty)
        if rank:
            time.sleep(0.3)
            with pytest.raises(SpecError, match="use_fp8"):
                buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
            with pytest.raises(SpecError, match="call") as caught:
                buffer.dispatch(mine.x, mine.topk_idx)
            return str(caught.value)
        low = buffer.low_latency_dispatch(mine.x, mine.topk_idx, return_recv_hook=True)
        assert low.hook is not None
        with pytest.raises(SpecError, match="use_fp8"):
            low.hook()
        with pytest.raises(SpecError, match="call") as caught:
            buffer.low_latency_combine(rows, mine.topk_idx, mine.topk_weights, low.handle)
        return str(caught.value)


def test_a_dispatch_that_failed_can_be_combined_to_no_harm() -> None:
    first, second = (outcome.value for outcome in run_ranks(2, combining_what_failed))
    assert first == second


def aligned(rank: int) -> str:
    """An alignment with which there would be more rows than can be numbered."""
    mine = CASE.inputs()[rank]
    with CASE.buffer() as buffer, pytest.raises(SpecError) as caught:
        buffer.dispatch(mine.x, mine.topk_idx, expand=True, expert_alignment=2**31 - 1)
    return str(caught.value)


def test_an_alignment_beyond_all_rows_is_refused_alike() -> None:
    said = {outcome.value for outcome in run_ranks(2, aligned)}
    assert len(said) == 1
    assert said.pop().startswith("expert_alignment: got what makes ")
