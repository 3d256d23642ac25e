"""Buffers over several nodes that carry on without ranks that die or stall, wherever in a call that happens.

``HAL_EP_FAULTS=200`` runs so many; the seed is printed, and ``HAL_EP_FAULT_SEED=N`` runs one fault again.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from typing import Any, Final

import ep_cases
import pytest
import torch
from ep_cases import Case
from ep_ranks import Outcome, run_ranks
from seeds import SEED

import hal
from hal import EpFault, EpFaults, RankFailure
from hal.ep.posts import Posts
from hal.reference import ep as oracle
from hal.reference.ep import RankInput

RANKS: Final = 4
ROUNDS: Final = 4
TIMEOUT: Final = 3.0
_COUNT: Final = int(os.environ.get("HAL_EP_FAULTS", "5"))


@dataclass(frozen=True)
class Plan:
    """Who dies, where: at so many messages over the network, or in a phase of an operation within its node."""

    seed: int
    culprit: int
    messages: int | None
    fault: EpFault | None
    case: Case

    @classmethod
    def draw(cls, seed: int) -> Plan:
        """A plan that its seed determines."""
        pick = random.Random(seed)
        messages = pick.randint(1, 24 * (ROUNDS - 2)) if pick.random() < 0.6 else None
        phase = pick.choice(("post", "grant", "push", "receive", "stage", "fetch", "acknowledge"))
        expand = pick.random() < 0.3
        case = Case(
            ranks=RANKS,
            tokens=tuple(pick.randint(0, 7) for _ in range(RANKS)),
            experts=2 * RANKS,
            topk=pick.randint(1, 4),
            per_node=pick.choice((1, 2, 2, 3)),
            expand=expand,
            alignment=pick.choice((1, 4)) if expand else 1,
            pre_reduce=pick.random() < 0.3,
            routing="distinct",
            seed=seed,
        )
        fault = None if messages else EpFault("kill", phase, pick.randint(1, 4 * (ROUNDS - 2)))
        return cls(seed, pick.randrange(RANKS), messages, fault, case)


def mortal(messages: int) -> None:
    """Kill this process with its so many-th message."""
    post, count = Posts._post, 0

    def counted(posts: Posts, *given: Any) -> None:
        nonlocal count
        count += 1
        if count == messages:
            os.kill(os.getpid(), signal.SIGKILL)
        post(posts, *given)

    Posts._post = counted  # type: ignore[method-assign]


def working(rank: int, plan: Plan) -> list[bool]:
    """Rounds of all four calls; in the last one the culprit is gone for certain."""
    dies = rank == plan.culprit
    if dies and plan.messages is not None:
        mortal(plan.messages)
    faults = EpFaults(plan.fault) if dies and plan.fault is not None else None
    with plan.case.buffer(timeout=TIMEOUT, mask_ranks=True, faults=faults) as buffer:
        for number in range(ROUNDS):
            gone = number == ROUNDS - 1
            if dies and gone:
                os.kill(os.getpid(), signal.SIGKILL)
            normal(rank, plan, buffer, gone)
            packed(rank, plan, buffer, gone)
        return buffer.masked()


def normal(rank: int, plan: Plan, buffer: hal.EpBuffer, gone: bool) -> None:
    """Rows of the living are all there; every sum is with the culprit's rows or without them."""
    case, inputs = plan.case, plan.case.inputs()
    mine = inputs[rank]
    layout = {"expand": case.expand, "expert_alignment": case.alignment}
    got = buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights, **layout)
    if rank == plan.culprit:
        buffer.combine(got.recv_x * (rank + 2), got.handle)
        return
    absent = {plan.culprit}
    without = oracle.dispatch(inputs, case.experts, absent=absent, **layout)
    assert isinstance(got.recv_x, torch.Tensor)
    if gone:
        ep_cases.check_received(case, got, without[rank])
    living = [i for i, source in enumerate(got.recv_src_rank.tolist()) if source not in (plan.culprit, -1)]
    want = [i for i, (source, _) in enumerate(without[rank].source) if source >= 0]
    positions = got.recv_src_position.tolist()
    told = [(got.recv_src_rank.tolist()[i], positions[i]) for i in living]
    assert told == [without[rank].source[i] for i in want]
    ep_cases.same("rows of the living", got.recv_x[living], without[rank].x[want])

    back = buffer.combine(got.recv_x * (rank + 2), got.handle).combined_x
    may = [without] if gone else [without, oracle.dispatch(inputs, case.experts, **layout)]
    sums = [
        oracle.combine(
            [part.x * (r + 2) for r, part in enumerate(one)],
            one,
            inputs,
            case.experts,
            expand=case.expand,
            ranks_per_node=case.per_node if case.pre_reduce else None,
        )[rank][0]
        for one in may
    ]
    one_of("combined_x", back, sums)


def packed(rank: int, plan: Plan, buffer: hal.EpBuffer, gone: bool) -> None:
    """The same in low-latency mode."""
    case, inputs = plan.case, plan.case.inputs()
    mine = inputs[rank]
    most = buffer.args.max_tokens_per_rank
    without = oracle.low_latency_dispatch(inputs, case.experts, most, absent={plan.culprit})
    low = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False, return_recv_hook=bool(plan.seed % 2))
    if low.hook is not None:
        low.hook()
    rows = low.recv_x
    assert isinstance(rows, torch.Tensor)
    sent = rows.nan_to_num(0.0, 0.0, 0.0) * (rank + 2)
    if rank == plan.culprit:
        buffer.low_latency_combine(sent, mine.topk_idx, mine.topk_weights, low.handle)
        return
    if gone:
        ep_cases.same("recv_count", low.recv_count, without[rank].count)
    for expert in range(buffer.args.local_experts):
        for source in set(range(RANKS)) - {plan.culprit}:
            here, there = (span(one[expert, source]) for one in (low.handle.layout_range, without[rank].layout_range))
            ep_cases.same("src_info", low.handle.src_info[expert, here], without[rank].src_info[expert, there])
            ep_cases.same("packed rows", rows[expert, here], without[rank].x[expert, there])
    back = buffer.low_latency_combine(sent, mine.topk_idx, mine.topk_weights, low.handle).combined_x
    full = oracle.low_latency_dispatch(inputs, case.experts, most)
    sums = [
        oracle.low_latency_combine([p.x * (r + 2) for r, p in enumerate(full)], full, inputs, absent=absent)[rank]
        for absent in ([{plan.culprit}] if gone else [{plan.culprit}, set()])
    ]
    one_of("low-latency combined_x", back, sums)


def span(told: torch.Tensor) -> slice:
    """The rows of ``begin << 32 | count``."""
    begin, count = int(told) >> 32, int(told) & 0xFFFFFFFF
    return slice(begin, begin + count)


def one_of(name: str, got: torch.Tensor, may: list[torch.Tensor]) -> None:
    """Every token's row is that of one of the results that there may be."""
    fits = torch.stack([(got == one).all(1) for one in may]).any(0)
    assert fits.all(), f"{name}: tokens {(~fits).nonzero()[:, 0].tolist()} have {got[~fits]}, may have {may}"


def carried_on(plan: Plan, outcomes: list[Outcome]) -> None:
    """Whether the culprit died and all others ended well, knowing it."""
    assert outcomes[plan.culprit].exitcode == -signal.SIGKILL
    for rank, outcome in enumerate(outcomes):
        if rank != plan.culprit:
            assert outcome.error is None, f"rank {rank}: {outcome.error}"
            assert outcome.value == [one == plan.culprit for one in range(RANKS)]


@pytest.mark.sampled
@pytest.mark.long(3)
@pytest.mark.parametrize("number", range(_COUNT))
@pytest.mark.timeout(120)
def test_a_rank_of_another_node_that_dies_is_left_out(number: int) -> None:
    named = os.environ.get("HAL_EP_FAULT_SEED")
    plan = Plan.draw(int(named) if named is not None else SEED * 1000 + number)
    print(f"HAL_EP_FAULT_SEED={plan.seed}: {plan}")
    carried_on(plan, run_ranks(RANKS, working, plan, check=False, limit=60))


def again(buffer: hal.EpBuffer, mine: RankInput) -> None:
    """A few dispatches."""
    for _ in range(3):
        buffer.dispatch(mine.x, mine.topk_idx)


def stalling(rank: int) -> str:
    """Rank 3 is stopped for longer than the others wait; awake again it hears that they carry on without it."""
    case = Case(ranks=RANKS, tokens=(3, 2, 4, 5), per_node=2, experts=8)
    mine = case.inputs()[rank]
    if rank == 3 and os.fork() == 0:
        time.sleep(3 * TIMEOUT)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    with case.buffer(timeout=TIMEOUT, mask_ranks=True) as buffer:
        buffer.dispatch(mine.x, mine.topk_idx)
        if rank == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
            with pytest.raises(RankFailure, match="carries on without") as caught:
                again(buffer, mine)
            assert caught.value.rank == 3
            return "told"
        for _ in range(2):
            got = buffer.dispatch(mine.x, mine.topk_idx)
            ep_cases.check_received(case, got, oracle.dispatch(case.inputs(), case.experts, absent={3})[rank])
        assert buffer.masked() == [False, False, False, True]
        time.sleep(3 * TIMEOUT)  # connections end with the process
        return "carried on"


def test_a_rank_that_stalls_is_left_out_and_told_so() -> None:
    outcomes = run_ranks(RANKS, stalling, limit=60)
    assert [outcome.value for outcome in outcomes] == ["carried on"] * 3 + ["told"]


def masking_by_hand(rank: int) -> None:
    """Masks are local, go both ways before a call is made, and are refused where none are wanted."""
    case = Case(ranks=RANKS, tokens=(3, 2, 4, 5), per_node=2, experts=8)
    mine = case.inputs()[rank]
    with case.buffer(timeout=TIMEOUT, mask_ranks=True) as buffer:
        for other in set(range(RANKS)) - {rank}:
            buffer.set_mask(other)
            assert buffer.masked() == [one == other for one in range(RANKS)]
            buffer.set_mask(other, False)
        got = buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
        ep_cases.check_received(case, got, oracle.dispatch(case.inputs(), case.experts)[rank])
        torch.distributed.barrier()
    with case.buffer() as buffer, pytest.raises(hal.SpecError, match="mask_ranks"):
        buffer.set_mask((rank + 1) % RANKS)


def test_masks_are_set_over_nodes() -> None:
    run_ranks(RANKS, masking_by_hand)


def unmasked_bits(rank: int, cases: list[Case]) -> None:
    for case in cases:
        with case.buffer(mask_ranks=True) as buffer:
            for repeat in range(2):
                ep_cases.normal_once(rank, case, buffer, repeat)
            if not case.expand:
                for repeat in range(3):
                    ep_cases.packed_once(rank, case, "fp8", buffer, repeat)
    torch.distributed.barrier()


def test_while_nobody_dies_masking_changes_no_bits() -> None:
    tokens = (5, 0, 9, 17)
    cases = [
        Case(ranks=4, tokens=tokens, per_node=2, hidden=128, routing="distinct"),
        Case(ranks=4, tokens=tokens, per_node=3, expand=True, alignment=4, bias=2, experts=10, topk=4),
        Case(ranks=4, tokens=tokens, per_node=2, hidden=128, pre_reduce=True, experts=16, topk=6, routing="distinct"),
        Case(ranks=4, tokens=tokens, per_node=2, hidden=128, room=9, overflow="drop", routing="zipf"),
    ]
    run_ranks(4, unmasked_bits, cases, limit=90)
