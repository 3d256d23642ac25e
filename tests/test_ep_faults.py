"""A rank that dies, stalls, lies or disagrees is named by all others within the timeout; nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from typing import Any

import ep_cases
import pytest
import torch
import torch.distributed as dist
from ep_cases import Case
from ep_ranks import Outcome, run_ranks
from seeds import SEED

import hal
from hal import EpFault, EpFaults, RankFailure, SpecError
from hal.reference import ep as oracle
from hal.reference.ep import RankInput

CASE = Case(tokens=(6, 6, 6), ranks=3, experts=9)
TIMEOUT = 3.0


def leftovers() -> set[str]:
    """Files of ours that have a name somewhere."""
    return {name for folder in ("/dev/shm", "/tmp") for name in os.listdir(folder) if "hal-ep" in name}


def steps(buffer: hal.EpBuffer, rank: int, count: int) -> None:
    """So many rounds of all four calls."""
    mine = CASE.inputs()[rank]
    for _ in range(count):
        got = buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
        buffer.combine(got.recv_x, got.handle)
        low = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        buffer.low_latency_combine(low.recv_x, mine.topk_idx, mine.topk_weights, low.handle)


def faulty(rank: int, culprit: int, fault: EpFault, count: int) -> float:
    """Run until something happens; returns the seconds from the start to the error."""
    with CASE.buffer(timeout=TIMEOUT, faults=EpFaults(fault) if rank == culprit else None) as buffer:
        start = time.monotonic()
        try:
            steps(buffer, rank, count)
        except RankFailure as failure:
            failure.seconds = time.monotonic() - start
            with pytest.raises(RankFailure):  # and ever after
                steps(buffer, rank, 1)
            raise
    return time.monotonic() - start


def named(outcomes: list[Outcome], culprit: int, reason: str) -> None:
    """Every other rank raised a RankFailure that names the culprit, in time."""
    for rank, outcome in enumerate(outcomes):
        if rank == culprit:
            continue
        assert isinstance(outcome.error, RankFailure), f"rank {rank}: {outcome}"
        assert outcome.error.rank == culprit, str(outcome.error)
        assert reason in str(outcome.error)
        assert outcome.error.seconds < TIMEOUT + 3


@pytest.mark.parametrize("phase", ["post", "grant", "push", "receive", "stage", "fetch"])
def test_a_killed_rank_is_named_at_once(phase: str) -> None:
    culprit = random.Random(SEED).randrange(3)
    outcomes = run_ranks(3, faulty, culprit, EpFault("kill", phase), 3, check=False)
    assert outcomes[culprit].exitcode == -signal.SIGKILL
    named(outcomes, culprit, "process ended")
    assert not leftovers()


@pytest.mark.sampled
@pytest.mark.long(5)
@pytest.mark.parametrize("operation", [1, 4])
def test_a_stopped_rank_is_named_within_the_timeout(operation: int) -> None:
    outcomes = run_ranks(
        3, stopped, EpFault("stop", "stage" if operation % 2 == 0 else "post", operation), limit=15, check=False
    )
    named(outcomes, 1, "no answer within")


def stopped(rank: int, fault: EpFault) -> float:
    """Rank 1 stops; a helper it left behind lets it go on once the others are through."""
    if rank == 1 and os.fork() == 0:
        time.sleep(TIMEOUT + 2.5)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    return faulty(rank, 1, fault, 3)


def test_lost_rows_are_told_with_counts() -> None:
    outcomes = run_ranks(3, faulty, 2, EpFault("drop", "push", 5), 3, check=False)
    named(outcomes, 2, "no answer within")
    failure = outcomes[0].error
    assert isinstance(failure, RankFailure)
    want = oracle.dispatch(CASE.inputs(), CASE.experts)
    rows = {sum(source == 2 for source, _ in want[rank].source) for rank in (0, 1)}
    assert failure.expected in rows
    assert failure.received is not None and failure.received <= failure.expected
    assert failure.expert is not None
    assert "dispatch (receive)" in failure.phase


@pytest.mark.parametrize("fault", [EpFault("drop", "post", 3), EpFault("drop", "grant", 5)])
def test_lost_messages_are_told(fault: EpFault) -> None:
    named(run_ranks(3, faulty, 1, fault, 3, check=False), 1, "no answer")


def test_a_damaged_message_is_told() -> None:
    named(run_ranks(3, faulty, 0, EpFault("corrupt", "post", 4), 3, check=False), 0, "damaged")


def test_a_slow_rank_is_waited_for() -> None:
    run_ranks(3, faulty, 0, EpFault("delay", "push", -1, seconds=0.2), 1)


def masked(rank: int, phase: str) -> list[bool]:
    """Rank 2 dies; the others carry on, with results as if it had never been there."""
    fault = EpFaults(EpFault("kill", phase, 5)) if rank == 2 else None
    inputs = CASE.inputs()
    mine = inputs[rank]
    with CASE.buffer(timeout=TIMEOUT, mask_ranks=True, faults=fault) as buffer:
        steps(buffer, rank, 2)
        for _ in range(2):
            want = oracle.dispatch(inputs, CASE.experts, absent={2})
            got = buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
            ep_cases.check_received(CASE, got, want[rank])
            outputs = ep_cases.outputs_of(CASE, want)
            sums = oracle.combine(outputs, want, inputs, CASE.experts, absent={2})
            ep_cases.same("combined_x", buffer.combine(outputs[rank], got.handle).combined_x, sums[rank][0])
            packed = oracle.low_latency_dispatch(inputs, CASE.experts, 6, absent={2})
            low = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
            ep_cases.same("recv_count", low.recv_count, packed[rank].count)
            back = buffer.low_latency_combine(low.recv_x, mine.topk_idx, mine.topk_weights, low.handle)
            sums_ll = oracle.low_latency_combine([p.x for p in packed], packed, inputs, absent={2})
            ep_cases.same("low-latency combined_x", back.combined_x, sums_ll[rank])
        return buffer.masked()


@pytest.mark.parametrize("phase", ["post", "grant", "push"])
def test_masking_carries_on(phase: str) -> None:
    outcomes = run_ranks(3, masked, phase, check=False)
    for rank in (0, 1):
        assert outcomes[rank].error is None, outcomes[rank].error
        assert outcomes[rank].value == [False, False, True]


def losing(rank: int, layout: dict[str, Any]) -> None:
    """Rank 2 announces rows and never sends them: they stay, zero and from nobody; the others' rows are right."""
    inputs = CASE.inputs()
    mine = inputs[rank]
    x, scales = oracle.fp8_cast(mine.x, "fp8")
    fault = EpFaults(EpFault("drop", "push", 3), EpFault("drop", "push", 4)) if rank == 2 else None
    with CASE.buffer(timeout=TIMEOUT, mask_ranks=True, faults=fault) as buffer:
        for _ in range(2):  # memory that is used again holds what came before
            buffer.dispatch((x, scales), mine.topk_idx, mine.topk_weights, **layout)
        if rank == 2:
            with contextlib.suppress(RankFailure):
                got = buffer.dispatch((x, scales), mine.topk_idx, mine.topk_weights, **layout)
            return
        want = oracle.dispatch(
            [RankInput(*oracle.fp8_cast(g.x, "fp8")[:1], g.topk_idx, g.topk_weights) for g in inputs],
            CASE.experts,
            **layout,
        )[rank]
        got = buffer.dispatch((x, scales), mine.topk_idx, mine.topk_weights, **layout)
        gone = torch.tensor([source in (2, -1) for source, _ in want.source])
        rows, row_scales = (part.view(torch.uint8) for part in got.recv_x)
        assert gone.sum() > 0
        assert not rows[gone].any() and not row_scales[gone].any()
        assert (got.recv_topk_idx[gone] == -1).all() and not got.recv_topk_weights[gone].any()
        assert (got.recv_src_rank[gone] == -1).all() and (got.recv_src_position[gone] == -1).all()
        assert torch.equal(rows[~gone], want.x.view(torch.uint8)[~gone])
        assert [*got.recv_src_rank[~gone]] == [source for source, _ in want.source if source in (0, 1)]
        assert buffer.masked() == [False, False, True]


@pytest.mark.parametrize("layout", [{}, {"expand": True, "expert_alignment": 4}], ids=["rank", "expand"])
def test_rows_of_a_rank_lost_half_way_are_blank(layout: dict[str, Any]) -> None:
    for outcome in run_ranks(3, losing, layout, check=False)[:2]:
        assert outcome.error is None, outcome.error


def losing_packed(rank: int) -> None:
    """The same in low-latency mode, with scales."""
    mine = CASE.inputs()[rank]
    fault = EpFaults(EpFault("drop", "push", 5)) if rank == 2 else None
    with CASE.buffer(timeout=TIMEOUT, mask_ranks=True, faults=fault) as buffer:
        for _ in range(2):
            low = buffer.low_latency_dispatch(mine.x + 1, mine.topk_idx)
            packed = torch.zeros(*low.handle.src_info.shape, CASE.hidden).bfloat16()
            buffer.low_latency_combine(packed, mine.topk_idx, mine.topk_weights, low.handle)
        with contextlib.suppress(RankFailure):
            low = buffer.low_latency_dispatch(mine.x, mine.topk_idx)
        if rank == 2:
            return
        rows, scales = low.recv_x
        lost = 0
        for expert, (_, _, told) in enumerate(low.handle.layout_range.tolist()):
            span = slice(told >> 32, (told >> 32) + (told & 0xFFFFFFFF))
            lost += told & 0xFFFFFFFF
            assert not rows[expert, span].view(torch.uint8).any()
            assert not scales[expert, span].any()
            assert (low.handle.src_info[expert, span] == -1).all()
        assert lost > 0


def test_packed_rows_of_a_rank_lost_half_way_are_blank() -> None:
    for outcome in run_ranks(3, losing_packed, check=False)[:2]:
        assert outcome.error is None, outcome.error


def never_opening(rank: int) -> tuple[int, float]:
    """Rank 1 never opens its buffer."""
    if rank == 1:
        time.sleep(TIMEOUT + 2)
        return rank, 0.0
    start = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        CASE.buffer(timeout=TIMEOUT)
    return caught.value.rank, time.monotonic() - start


def test_opening_names_who_does_not_come_within_the_timeout() -> None:
    outcomes = run_ranks(3, never_opening)
    for rank in (0, 2):
        culprit, seconds = outcomes[rank].value
        assert culprit == 1
        assert seconds < TIMEOUT + 1


def dying_before(rank: int) -> None:
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    CASE.buffer(timeout=TIMEOUT * 4)


def test_a_rank_that_died_before_opening_is_named() -> None:
    outcomes = run_ranks(3, dying_before, check=False)
    for rank in (0, 1):
        failure = outcomes[rank].error
        assert isinstance(failure, RankFailure), failure
        assert failure.rank == 2


def refusing(rank: int) -> str:
    """A wrapper on one rank refuses for all; the next call works."""
    mine = CASE.inputs()[rank]
    with CASE.buffer() as buffer:
        wrong = SpecError("wrapped", "a bad thing", "a good one")
        with pytest.raises(SpecError) as caught:
            buffer.refuse(wrong) if rank == 1 else buffer.dispatch(mine.x, mine.topk_idx)
        steps(buffer, rank, 1)
    return str(caught.value)


def test_a_caller_refuses_for_the_whole_group() -> None:
    said = [outcome.value for outcome in run_ranks(3, refusing)]
    assert said[0] == said[1] == said[2]
    assert "wrapped: got a bad thing" in said[0]


def elsewhere(rank: int) -> list[str]:
    """Buffers on devices that the backend does not take, or that there are not."""
    said = []
    for device in ("cuda", "meta", "nonsense", 3):
        with pytest.raises(hal.HalError) as caught:
            CASE.buffer(device=device)
        said.append(f"{type(caught.value).__name__} {caught.value.argument}")
    with CASE.buffer(device="cpu:0") as buffer:
        assert buffer.args.device == torch.device("cpu")
        steps(buffer, rank, 1)
    return said


def test_only_declared_devices_are_taken() -> None:
    want = ["UnsupportedError device", "UnsupportedError device", "SpecError device", "SpecError device"]
    assert run_ranks(3, elsewhere)[0].value == want


def full(rank: int) -> tuple[int, int]:
    """By default there is room for all that can come, in either layout; the size hint covers it."""
    with Case(tokens=(6, 6), experts=4, topk=2).buffer() as buffer:
        idx = torch.tensor([[0, 1]] * 6)
        held = buffer.memory()["in_use"]
        got = buffer.dispatch(torch.ones(6, 64).bfloat16(), idx, torch.ones(6, 2), expand=True, expert_alignment=8)
        assert len(got.recv_x) == (32 if rank == 0 else 0)
        return buffer.memory()["in_use"] - held, hal.EpBuffer.size_hint(
            2, 4, 64, 2, 6, modes=("normal",), expand=True, expert_alignment=8
        )["normal_recv"]


def test_the_default_room_covers_every_layout() -> None:
    used, hinted = run_ranks(2, full)[0].value
    granules = 1 << 16
    assert used <= -(-hinted // granules) * granules
    assert hinted >= 26 * 64 * 2


def disagreeing(rank: int) -> list[str]:
    """Each wrong or differing call raises the same SpecError on all ranks, and the next call works."""
    inputs = CASE.inputs()
    mine = inputs[rank]
    said = []

    def refused(call: Any) -> None:
        with pytest.raises(SpecError) as caught:
            call()
        said.append(str(caught.value))
        got = buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
        ep_cases.check_received(CASE, got, want[rank])

    with CASE.buffer(timeout=TIMEOUT * 3) as buffer:
        want = oracle.dispatch(inputs, CASE.experts)
        got = buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
        other = buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
        low = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        odd = rank == 1
        refused(lambda: buffer.dispatch(mine.x.float() if odd else mine.x, mine.topk_idx))
        refused(lambda: buffer.dispatch(mine.x[:, :8] if odd else mine.x, mine.topk_idx))
        refused(lambda: buffer.dispatch(mine.x, mine.topk_idx + (9 if odd else 0)))
        refused(lambda: buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights if odd else None))
        refused(lambda: buffer.dispatch(mine.x, mine.topk_idx, expert_alignment=4 if odd else 1))
        refused(lambda: buffer.dispatch(mine.x, mine.topk_idx[:, :2] if odd else mine.topk_idx))
        refused(lambda: buffer.dispatch(mine.x, mine.topk_idx, expand=odd))
        refused(lambda: buffer.dispatch(mine.x, handle=got.handle) if odd else buffer.dispatch(mine.x, mine.topk_idx))
        refused(lambda: buffer.combine(got.recv_x, (other if odd else got).handle))
        refused(lambda: buffer.combine(got.recv_x[1:] if odd else got.recv_x, got.handle))
        refused(lambda: buffer.combine(got.recv_x, got.handle) if odd else buffer.dispatch(mine.x, mine.topk_idx))
        refused(lambda: buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=odd))
        refused(
            lambda: buffer.low_latency_combine(
                low.recv_x, mine.topk_idx * (0 if odd else 1), mine.topk_weights, low.handle
            )
        )
        refused(
            lambda: buffer.low_latency_combine(low.recv_x, mine.topk_idx, mine.topk_weights, low.handle, zero_copy=odd)
        )
    return said


def test_disagreement_is_the_same_error_everywhere() -> None:
    said = [outcome.value for outcome in run_ranks(3, disagreeing)]
    assert said[0] == said[1] == said[2]
    arguments = [text.split(":")[0] for text in said[0]]
    assert arguments == [
        *("x", "x", "topk_idx", "topk_weights", "expert_alignment", "topk_idx", "expand", "handle"),
        *("handle", "x", "call", "use_fp8", "topk_idx", "x"),
    ]


def misfits(rank: int) -> list[str]:
    """Buffers whose arguments are wrong or differ are refused alike, and a later one works."""
    said = []
    for changes in (
        {"hidden": 63} if rank == 1 else {},
        {"topk": 4} if rank == 2 else {},
        {"num_experts": 0},
        {"dtype": torch.float32} if rank == 0 else {},
    ):
        with pytest.raises(SpecError) as caught:
            CASE.buffer(**changes)
        said.append(str(caught.value))
    with CASE.buffer() as first, CASE.buffer() as second:
        mine = CASE.inputs()[rank]
        handle = first.dispatch(mine.x, mine.topk_idx).handle
        with pytest.raises(SpecError, match="another or a closed buffer"):
            second.dispatch(mine.x, handle=handle)
        steps(second, rank, 1)
        steps(first, rank, 1)
    with pytest.raises(RankFailure, match="closed"):
        first.dispatch(mine.x, mine.topk_idx)
    return said


def test_misfitting_buffers_are_refused_alike() -> None:
    said = [outcome.value for outcome in run_ranks(3, misfits)]
    assert said[0] == said[1] == said[2]
    assert [text.split(":")[0] for text in said[0]] == ["hidden", "topk", "num_experts", "dtype"]


def overflowing(rank: int) -> str:
    """More rows than there is room for, with policy error."""
    with Case(tokens=(6, 6, 6), ranks=3, experts=9, routing="one", room=10).buffer() as buffer:
        idx = torch.full((6, 2), 8)
        with pytest.raises(SpecError) as caught:
            buffer.dispatch(torch.zeros(6, 64).bfloat16(), idx)
        buffer.dispatch(torch.zeros(1, 64).bfloat16(), idx[:1])
        return str(caught.value)


def test_overflow_is_the_same_error_everywhere() -> None:
    said = {outcome.value for outcome in run_ranks(3, overflowing)}
    assert len(said) == 1
    assert "rank 2 would receive 18 rows" in said.pop()


def leaving(rank: int) -> str:
    """A rank that closes its buffer while others still call is named as such."""
    buffer = CASE.buffer(timeout=TIMEOUT * 10)
    if rank == 2:
        buffer.close()
        dist.barrier()
        return ""
    with pytest.raises(RankFailure) as caught:
        steps(buffer, rank, 1)
    assert caught.value.rank == 2
    dist.barrier()
    return caught.value.reason


def test_a_closed_buffer_is_told_at_once() -> None:
    outcomes = run_ranks(3, leaving)
    assert "closed its buffer" in outcomes[0].value
    assert all(outcome.seconds < 8 for outcome in outcomes)


def recording(rank: int) -> list[Any]:
    """The flight recorder tells every rank's operations."""
    with CASE.buffer() as buffer:
        steps(buffer, rank, 2)
        dist.barrier()
        return list(buffer.records())


def test_the_flight_recorder() -> None:
    for outcome in run_ranks(3, recording):
        for rank in range(3):
            kinds = [record["kind"] for record in outcome.value if record["rank"] == rank]
            assert kinds == ["dispatch", "combine", "low_latency_dispatch", "low_latency_combine"] * 2
        assert all(record["microseconds"] is not None for record in outcome.value)
