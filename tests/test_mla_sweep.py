"""Dense MLA decode of the backend in force against the float64 reference, over the published sweep.

A random subset by default, of which ``make test`` runs a fifth; ``make sweep`` (``HAL_SWEEP=all``) runs all of it.
"""

from __future__ import annotations

import os

import pytest
from mla_cases import Case, assert_close, make, published, subset
from seeds import SEED

import hal
from hal.reference import mla as reference

BUDGET = 60_000_000_000
CASES = list(published(SEED)) if os.environ.get("HAL_SWEEP") == "all" else subset(SEED, BUDGET, most=150)


@pytest.mark.sampled
@pytest.mark.long(1)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(case: Case) -> None:
    inputs = make(case)
    want_out, want_lse = reference.mla_decode(*inputs.tensors(), causal=case.causal)
    out, lse = hal.mla_decode(*inputs.tensors(), causal=case.causal)
    assert_close(out, lse, want_out, want_lse, case)


@pytest.mark.parametrize("case", subset(SEED + 1, BUDGET // 8, most=12), ids=str)
def test_plan_gives_the_same_bits_on_every_layer(case: Case) -> None:
    inputs = make(case)
    plan = hal.mla_plan(inputs.cache_seqlens, h_q=case.h_q, h_kv=case.h_kv, s_q=case.s_q, causal=case.causal)
    first = hal.mla_decode(*inputs.tensors(), causal=case.causal, plan=plan)
    again = hal.mla_decode(*inputs.tensors(), causal=case.causal, plan=plan)
    assert first[0].equal(again[0])
    assert first[1].equal(again[1])
    want = reference.mla_decode(*inputs.tensors(), causal=case.causal)
    assert_close(*first, *want, case)
