"""Low-latency mode over processes is the oracle, bit for bit; its rules are enforced."""

from __future__ import annotations

import ep_cases
import pytest
from ep_cases import Case
from ep_ranks import run_ranks

CASES = [
    *[(Case(hidden=272, tokens=(5, 7), seed=i), cast) for i, cast in enumerate(ep_cases.CAST_FLAGS)],
    (Case(hidden=1024, routing="distinct"), "fp8_ue8m0"),
    (Case(tokens=(0, 0)), "none"),
    (Case(tokens=(0, 9)), "fp8"),
    (Case(routing="one", topk=2), "none"),
    (Case(routing="none"), "fp8"),
    (Case(experts=7, topk=7, routing="distinct"), "none"),
    (Case(hidden=16, dtype="float32"), "fp8"),
    (Case(hidden=64, dtype="float16"), "fp8_pow2"),
    (Case(hidden=7168, experts=64, topk=8, routing="zipf", tokens=(16, 9)), "fp8"),
]


def test_two_ranks() -> None:
    run_ranks(2, ep_cases.packed, CASES, limit=60)


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_other_group_sizes(ranks: int) -> None:
    tokens = (5, 0, 9, 17)[:ranks]
    cases = [
        (Case(ranks=ranks, tokens=tokens, experts=10, topk=4), "none"),
        (Case(ranks=ranks, tokens=tokens, hidden=256), "fp8"),
    ]
    run_ranks(ranks, ep_cases.packed, cases, limit=60)


def test_two_results_in_flight_and_no_third() -> None:
    run_ranks(2, ep_cases.two_in_flight)


def test_modes_mix_and_results_last() -> None:
    run_ranks(2, ep_cases.mixed_modes)


def test_backward_is_the_mirrored_call() -> None:
    run_ranks(2, ep_cases.gradients)


def test_what_a_call_was_given_may_be_used_again_when_it_returned() -> None:
    run_ranks(2, ep_cases.arguments_used_again)


def test_a_hooked_call_does_not_wait_for_late_ranks() -> None:
    (called, hooked), _ = (outcome.value for outcome in run_ranks(2, ep_cases.returns_at_once))
    assert called < 0.5
    assert hooked > 0.3


def test_bits_do_not_depend_on_who_comes_first() -> None:
    run_ranks(3, ep_cases.repeated, 100, limit=60)
