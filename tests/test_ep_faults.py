"""A rank that dies, stalls, lies or disagrees is named by all others within the timeout; nothing is left behind."""

from __future__ import annotations

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

CASE = Case(tokens=(6, 6, 6), ranks=3, experts=9)
TIMEOUT = 1.5


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


@pytest.mark.parametrize("fault", [EpFault("drop", "post", 3), EpFault("drop", "grant", 3)])
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


def test_many_random_faults() -> None:
    """``HAL_EP_FAULTS=200`` runs the long version."""
    generator = random.Random(SEED)
    for _ in range(int(os.environ.get("HAL_EP_FAULTS", "4"))):
        culprit = generator.randrange(3)
        phases = ["post", "grant", "push"] if generator.random() < 0.5 else ["receive", "stage", "fetch"]
        fault = EpFault("kill", generator.choice(phases), generator.choice([-1, 3, 6, 8]))
        outcomes = run_ranks(3, faulty, culprit, fault, 3, check=False, limit=20)
        if outcomes[culprit].exitcode is not None:
            named(outcomes, culprit, "process ended")
        assert not leftovers()
