"""Normal mode over processes is the oracle, bit for bit."""

from __future__ import annotations

import ep_cases
import pytest
from ep_cases import Case
from ep_ranks import run_ranks

PLAIN = [
    Case(),
    Case(routing="distinct", tokens=(33, 20), hidden=256),
    Case(tokens=(0, 0)),
    Case(tokens=(0, 9), bias=1),
    Case(routing="none"),
    Case(routing="one", topk=2, bias=2),
    Case(experts=7, topk=7, routing="distinct"),  # ranks do not divide experts
    Case(experts=1, topk=1),
    Case(hidden=8, dtype="bfloat16"),
    Case(hidden=4, dtype="float32", bias=2),
    Case(hidden=72, dtype="float16"),
    Case(weights=False),
    Case(fp8="fp8", hidden=272),
    Case(fp8="fp8_ue8m0", hidden=1024, routing="distinct"),
    Case(worst=64),
    Case(tokens=(40, 64), hidden=7168, experts=64, topk=8, routing="zipf"),
]
EXPANDED = [
    Case(expand=True),
    Case(expand=True, alignment=16, routing="distinct", tokens=(33, 20)),
    Case(expand=True, alignment=8, tokens=(0, 9), bias=1),
    Case(expand=True, alignment=4, fp8="fp8", hidden=256),
    Case(expand=True, weights=False),
    Case(expand=True, worst=64, alignment=4),
    Case(expand=True, alignment=4, routing="none"),
]
BOUNDED = [
    Case(room=6, overflow="drop"),
    Case(room=6, overflow="drop", expand=True, alignment=4),
    Case(room=1, overflow="drop", tokens=(0, 9)),
    Case(room=4, overflow="grow"),
    Case(room=64, overflow="error"),
]


def test_two_ranks() -> None:
    run_ranks(2, ep_cases.normal, PLAIN + EXPANDED + BOUNDED, limit=60)


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_other_group_sizes(ranks: int) -> None:
    tokens = (5, 0, 9, 17)[:ranks]
    cases = [
        Case(ranks=ranks, tokens=tokens),
        Case(ranks=ranks, tokens=tokens, expand=True, alignment=4, bias=1, fp8="", experts=10, topk=4),
        Case(ranks=ranks, tokens=tokens, fp8="fp8", hidden=256, routing="zipf"),
        Case(ranks=ranks, tokens=tokens, room=7, overflow="drop"),
        Case(ranks=ranks, tokens=tokens, room=7, overflow="drop", expand=True),
    ]
    run_ranks(ranks, ep_cases.normal, cases, limit=60)
