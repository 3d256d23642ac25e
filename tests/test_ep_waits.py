"""The time a call waits for a late rank is told, whatever of it the call waits for."""

from __future__ import annotations

import time

import pytest
import torch
from ep_cases import Case
from ep_ranks import run_ranks

LATE = 0.4


def waiting(rank: int) -> list[int]:
    case = Case(tokens=(6, 6), hidden=128)
    mine = case.inputs()[rank]
    waits = torch.zeros(2, dtype=torch.int64)
    with case.buffer() as buffer:
        buffer.low_latency_dispatch(mine.x, mine.topk_idx)
        if rank == 1:
            time.sleep(LATE)
        buffer.low_latency_dispatch(mine.x, mine.topk_idx, dispatch_wait_recv_cost_stats=waits)
    return waits.tolist()


def computing(rank: int, nodes: bool) -> list[int]:
    """A rank comes late while the other computes, for longer."""
    case = Case(tokens=(6, 6), hidden=128, per_node=1 if nodes else None)
    mine = case.inputs()[rank]
    waits = torch.full((2,), 3, dtype=torch.int64)
    with case.buffer() as buffer:
        buffer.low_latency_dispatch(mine.x, mine.topk_idx)
        if rank == 1:
            time.sleep(LATE)
        done = buffer.low_latency_dispatch(
            mine.x, mine.topk_idx, dispatch_wait_recv_cost_stats=waits, return_recv_hook=True
        )
        assert waits.tolist() == [3, 3]
        time.sleep(2 * LATE)
        assert done.hook is not None
        done.hook()
    return waits.tolist()


@pytest.mark.parametrize("nodes", [False, True])
def test_what_a_caller_computed_before_its_hook_is_no_waiting(nodes: bool) -> None:
    early, late = (outcome.value for outcome in run_ranks(2, computing, nodes))
    assert min(early) >= 3
    assert max(early) < 0.5e6 * LATE
    assert min(late) >= 3


def test_waiting_for_a_late_rank_is_counted_for_it() -> None:
    early, late = (outcome.value for outcome in run_ranks(2, waiting))
    assert early[1] > 0.5e6 * LATE > early[0]
    assert max(late) < 0.5e6 * LATE
