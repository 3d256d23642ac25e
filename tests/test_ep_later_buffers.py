"""A later buffer on the same group works, whatever became of the earlier one or of the group's own calls."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any, Final

import ep_cases
import pytest
import torch
import torch.distributed as dist
from ep_cases import Case
from ep_ranks import run_ranks

import hal
from hal import EpFault, EpFaults, RankFailure

TIMEOUT: Final = 3.0
NODES: Final = (4, 2)
pytestmark = [pytest.mark.sampled, pytest.mark.long(8)]


def case_of(per_node: int) -> Case:
    """Four ranks, on one node or on two."""
    return Case(ranks=4, tokens=(5, 0, 3, 7), per_node=per_node, hidden=128)


def works(rank: int, per_node: int) -> None:
    """A buffer opens, and both modes give the right bits."""
    case = case_of(per_node)
    with case.buffer(timeout=20.0) as buffer:
        for repeat in range(2):
            ep_cases.normal_once(rank, case, buffer, repeat)
            ep_cases.packed_once(rank, case, "fp8", buffer, repeat)
        dist.barrier()


def call(buffer: hal.EpBuffer, rank: int, per_node: int) -> Any:
    """One dispatch and combine."""
    mine = case_of(per_node).inputs()[rank]
    got = buffer.dispatch(mine.x, mine.topk_idx)
    return buffer.combine(got.recv_x, got.handle)


def after_a_failure(rank: int, per_node: int, phase: str, operation: int) -> None:
    """Rank 3 is late in the middle of a call."""
    fault = EpFaults(EpFault("delay", phase, operation, seconds=TIMEOUT + 2)) if rank == 3 else None
    with case_of(per_node).buffer(timeout=TIMEOUT, faults=fault) as buffer, pytest.raises(RankFailure) as caught:
        call(buffer, rank, per_node)
    assert caught.value.rank == 3 or rank == 3
    works(rank, per_node)


@pytest.mark.parametrize("per_node", NODES)
@pytest.mark.parametrize(("phase", "operation"), [("push", 1), ("stage", 2)])
def test_after_a_failed_one(per_node: int, phase: str, operation: int) -> None:
    run_ranks(4, after_a_failure, per_node, phase, operation, limit=60)


def after_lateness(rank: int, per_node: int) -> None:
    """Rank 3 makes its call too late."""
    with case_of(per_node).buffer(timeout=TIMEOUT) as buffer:
        if rank == 3:
            time.sleep(TIMEOUT + 2)
        with pytest.raises(RankFailure) as caught:
            call(buffer, rank, per_node)
        assert caught.value.rank == 3 or rank == 3
    works(rank, per_node)


@pytest.mark.parametrize("per_node", NODES)
def test_after_a_call_that_came_late(per_node: int) -> None:
    run_ranks(4, after_lateness, per_node, limit=60)


def after_a_mask(rank: int, per_node: int) -> None:
    """The others carry on without rank 3, which is late; with the next buffer it is back."""
    with case_of(per_node).buffer(timeout=TIMEOUT, mask_ranks=True) as buffer:
        call(buffer, rank, per_node)
        if rank == 3:
            time.sleep(2 * TIMEOUT + 2)
        else:
            call(buffer, rank, per_node)
            assert buffer.masked() == [False, False, False, True]
    works(rank, per_node)


@pytest.mark.parametrize("per_node", NODES)
def test_after_one_that_masked_a_rank(per_node: int) -> None:
    run_ranks(4, after_a_mask, per_node, limit=60)


def after_opening_late(rank: int, per_node: int) -> None:
    """Rank 3 comes when the others have given up; they try again."""
    if rank == 3:
        time.sleep(TIMEOUT + 1)
    else:
        with pytest.raises(RankFailure) as caught:
            case_of(per_node).buffer(timeout=TIMEOUT)
        assert caught.value.rank == 3
    for _ in range(2):
        works(rank, per_node)


@pytest.mark.parametrize("per_node", NODES)
def test_after_a_rank_opened_late(per_node: int) -> None:
    run_ranks(4, after_opening_late, per_node, limit=60)


def opening_alone(rank: int, per_node: int) -> None:
    """Rank 3 comes when the others have given up, and gives up in turn."""
    if rank == 3:
        time.sleep(TIMEOUT + 1)
    with pytest.raises(RankFailure) as caught:
        case_of(per_node).buffer(timeout=TIMEOUT)
    assert (caught.value.rank == 3) == (rank != 3)
    if rank != 3:
        time.sleep(2 * TIMEOUT + 2)
    works(rank, per_node)


@pytest.mark.parametrize("per_node", NODES)
def test_after_nobody_met(per_node: int) -> None:
    run_ranks(4, opening_alone, per_node, limit=60)


def after_gloo(rank: int, per_node: int) -> None:
    """A receive of the group's own times out, which closes all of gloo's connections."""
    with pytest.raises(RuntimeError):
        dist.irecv(torch.zeros(1), group_src=(rank + 1) % 4, tag=77).wait(timedelta(seconds=0.3))
    with pytest.raises(RuntimeError):
        dist.barrier()
    case = case_of(per_node)
    with case.buffer(timeout=20.0) as buffer:
        ep_cases.normal_once(rank, case, buffer, 0)
        ep_cases.packed_once(rank, case, "fp8", buffer, 0)
        time.sleep(2)  # there is no barrier any more


@pytest.mark.parametrize("per_node", NODES)
def test_after_gloo_itself_timed_out(per_node: int) -> None:
    run_ranks(4, after_gloo, per_node, limit=60)
