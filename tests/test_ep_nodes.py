"""Groups of several nodes: the same bits as one node, each token once over the network, and cut links named."""

from __future__ import annotations

import signal
from typing import Any

import ep_cases
import pytest
from ep_cases import Case
from ep_ranks import run_ranks

from hal import EpFault, EpFaults, RankFailure, SpecError
from hal.ep.wire import Wire

TOKENS = (5, 0, 9, 17)


def test_two_nodes_give_the_bits_of_one() -> None:
    plain = [
        Case(ranks=4, tokens=TOKENS, per_node=2),
        Case(ranks=4, tokens=TOKENS, per_node=2, expand=True, alignment=4, bias=2, experts=10, topk=4),
        Case(ranks=4, tokens=TOKENS, per_node=2, fp8="fp8", hidden=256, routing="zipf"),
        Case(ranks=4, tokens=TOKENS, per_node=2, dtype="float32", bias=1, routing="distinct"),
        Case(ranks=4, tokens=(0, 0, 0, 0), per_node=2),
        Case(ranks=4, tokens=TOKENS, per_node=2, worst=64, routing="one"),
        Case(ranks=4, tokens=TOKENS, per_node=1),
        Case(ranks=4, tokens=TOKENS, per_node=2, room=7, overflow="drop"),
        Case(ranks=4, tokens=TOKENS, per_node=2, room=7, overflow="drop", expand=True, alignment=4, bias=1),
        Case(ranks=4, tokens=TOKENS, per_node=2, room=4, overflow="grow", expand=True, worst=128),
    ]
    run_ranks(4, ep_cases.normal, plain, limit=90)


def test_nodes_of_unequal_size_give_the_bits_of_one() -> None:
    cases = [
        Case(ranks=4, tokens=TOKENS, per_node=3, routing="distinct"),
        Case(ranks=4, tokens=TOKENS, per_node=3, expand=True, alignment=4, bias=1, experts=10, topk=4),
        Case(ranks=4, tokens=TOKENS, per_node=3, room=9, overflow="drop", routing="zipf"),
    ]
    run_ranks(4, ep_cases.normal, cases, limit=90)
    five = [Case(ranks=5, tokens=(*TOKENS, 6), per_node=3, experts=10, bias=1)]
    run_ranks(5, ep_cases.normal, five, limit=90)


def test_low_latency_over_nodes_gives_the_bits_of_one() -> None:
    cases = [
        (Case(ranks=4, tokens=TOKENS, per_node=2, hidden=256), "none"),
        (Case(ranks=4, tokens=TOKENS, per_node=2, hidden=256, routing="distinct"), "fp8"),
        (Case(ranks=4, tokens=TOKENS, per_node=3, hidden=512, routing="zipf"), "fp8_ue8m0"),
        (Case(ranks=4, tokens=(0, 0, 0, 3), per_node=3, experts=10, topk=4), "fp8_pow2"),
    ]
    run_ranks(4, ep_cases.packed, cases, limit=90)


def test_low_latency_rules_hold_over_nodes() -> None:
    run_ranks(2, ep_cases.two_in_flight, 1)
    run_ranks(2, ep_cases.mixed_modes, 1)


def test_a_hooked_call_over_nodes_does_not_wait_for_late_ranks() -> None:
    (called, hooked), _ = (outcome.value for outcome in run_ranks(2, ep_cases.returns_at_once, 1))
    assert called < 0.5
    assert hooked > 0.3


def test_what_a_call_was_given_may_be_used_again_when_it_returned() -> None:
    run_ranks(2, ep_cases.arguments_used_again, 1)


def test_pre_reduced_sums_are_node_by_node() -> None:
    cases = [
        Case(
            ranks=4, tokens=TOKENS, per_node=2, pre_reduce=True, weights=False, routing="distinct", experts=16, topk=6
        ),
        Case(ranks=4, tokens=TOKENS, per_node=2, pre_reduce=True, expand=True, bias=1),
        # Some rows are dropped: the order of the nodes is that of the choices all the same.
        Case(ranks=4, tokens=(9, 9, 9, 9), per_node=2, pre_reduce=True, topk=6, room=11, overflow="drop"),
    ]
    run_ranks(4, ep_cases.normal, cases, limit=90)


def counted(rank: int) -> tuple[int, int]:
    """Tokens this rank sent over the network, and tokens that have an expert on the other node."""
    case = Case(ranks=4, tokens=TOKENS, per_node=2, routing="distinct", experts=8, topk=4)
    mine = case.inputs()[rank]
    sent = 0
    trade = Wire.trade

    def spy(wire: Wire, sends: Any, receives: Any, phase: str) -> set[int]:
        nonlocal sent
        sent += sum(len(rows) for _, rows in sends if rows.shape[1] == case.hidden)
        return trade(wire, sends, receives, phase)

    Wire.trade = spy
    with case.buffer() as buffer:
        buffer.dispatch(mine.x, mine.topk_idx)
        away = buffer.layout(mine.topk_idx).num_tokens_per_node
    assert away is not None
    return sent, int(away[1 - rank // 2])


def test_a_token_crosses_once() -> None:
    for outcome in run_ranks(4, counted):
        assert outcome.value[0] == outcome.value[1]


def returned(rank: int) -> tuple[int, int]:
    """Rows this rank sent back over the network, and rows that its own tokens have on the other node."""
    case = Case(ranks=4, tokens=TOKENS, per_node=2, routing="distinct", experts=8, topk=4)
    mine = case.inputs()[rank]
    back = 0
    trade = Wire.trade

    def spy(wire: Wire, sends: Any, receives: Any, phase: str) -> set[int]:
        nonlocal back
        back += sum(len(rows) for _, rows in sends) if phase == "combine" else 0
        return trade(wire, sends, receives, phase)

    Wire.trade = spy
    with case.buffer() as buffer:
        got = buffer.dispatch(mine.x, mine.topk_idx)
        buffer.combine(got.recv_x, got.handle)
        there = buffer.layout(mine.topk_idx).is_token_in_rank
    first = 2 - rank // 2 * 2
    return back, int(there[:, first : first + 2].sum())


def test_only_rows_that_there_are_cross_back() -> None:
    counts = [outcome.value for outcome in run_ranks(4, returned)]
    assert sum(back for back, _ in counts) == sum(there for _, there in counts) > 0


def disagreeing(rank: int) -> list[str]:
    """Wrong calls on one rank of one node reach all nodes; the next call works."""
    case = Case(ranks=4, tokens=TOKENS, per_node=2)
    mine = case.inputs()[rank]
    said = []
    with case.buffer() as buffer:
        for call in (
            lambda: buffer.dispatch(mine.x.float() if rank == 3 else mine.x, mine.topk_idx),
            lambda: buffer.dispatch(mine.x, mine.topk_idx + (9 if rank == 2 else 0)),
            lambda: buffer.dispatch(mine.x, mine.topk_idx, expand=rank == 1),
            lambda: buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=rank == 1),
        ):
            with pytest.raises(SpecError) as caught:
                call()
            said.append(str(caught.value))
            buffer.dispatch(mine.x, mine.topk_idx)
    return said


def test_disagreement_is_the_same_error_on_all_nodes() -> None:
    said = [outcome.value for outcome in run_ranks(4, disagreeing)]
    assert said[0] == said[1] == said[2] == said[3]
    assert [text.split(":")[0] for text in said[0]] == ["x", "topk_idx", "expand", "use_fp8"]
    assert said[0][3] == "use_fp8: got cast 'fp8' on rank 1; legal: cast 'none', as on rank 0"


def dying(rank: int) -> None:
    case = Case(ranks=4, tokens=TOKENS, per_node=2)
    mine = case.inputs()[rank]
    fault = EpFaults(EpFault("kill", "push", 3)) if rank == 3 else None
    with case.buffer(timeout=3.0, faults=fault) as buffer:
        for _ in range(4):
            got = buffer.dispatch(mine.x, mine.topk_idx)
            buffer.combine(got.recv_x, got.handle)


def test_a_rank_killed_on_one_node_is_named_on_both() -> None:
    outcomes = run_ranks(4, dying, check=False)
    assert outcomes[3].exitcode == -signal.SIGKILL
    for rank in range(3):
        assert isinstance(outcomes[rank].error, RankFailure), outcomes[rank]
        assert outcomes[rank].error.rank == 3, str(outcomes[rank].error)
