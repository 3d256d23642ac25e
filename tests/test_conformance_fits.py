"""Results that are off by a number: the diagnosis names it."""

from __future__ import annotations

import math

import pytest
import torch
from hal_conformance.case import MlaCase
from hal_conformance.decode import Outcome, call, expect, judge
from hal_conformance.diagnosis import diagnose
from hal_conformance.inputs import Inputs, build

from hal.spec.limits import DENSE_LSE, DENSE_OUT

DENSE = MlaCase(lengths=(5, 33, 0, 70), h_q=4, d=64, d_v=48, page=16, data="hot")
RAGGED = DENSE.but(q_lens=(2, 1, 3, 0), causal=True)


def cause(inputs: Inputs, outcome: Outcome) -> str:
    expected = expect(inputs)
    verdict = judge(outcome.out, outcome.lse, expected, DENSE_OUT, DENSE_LSE)
    assert not verdict.ok
    found = diagnose(inputs, outcome, expected, verdict, DENSE_OUT, DENSE_LSE)["cause"]
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("case", [DENSE, RAGGED], ids=["dense", "ragged"])
@pytest.mark.parametrize(
    ("factor", "offset", "said"),
    [
        (0.5, 0, "out is 0.5 times the reference"),
        (1.5, 0, "out is 1.5 times the reference"),
        (-1, 0, "out is -1 times the reference"),
        (math.log(2), 0, "out is 0.693147 times the reference (ln 2)"),
        (1 / math.log(2), 0, "out is 1.4427 times the reference (log2 e)"),
        (8, 0, "out is 8 times the reference (sqrt(head_dim))"),
        (1 / 448, 0, "out is 0.00223214 times the reference (1/448, of the largest float8_e4m3fn)"),
        (1, math.log(2), "lse is the reference plus 0.693147 (ln 2)"),
        (1, -math.log(448), "lse is the reference plus -6.10479 (-ln 448)"),
        (1, 2.5, "lse is the reference plus 2.5"),
        (0.5, math.log(2), "out is 0.5 times the reference and lse is the reference plus 0.693147 (ln 2)"),
    ],
)
def test_a_factor_or_an_offset_is_named_with_its_number(case: MlaCase, factor: float, offset: float, said: str) -> None:
    inputs = build(case, 1)
    outcome = call(inputs, "cpu")
    outcome.out = (outcome.out.double() * factor).to(outcome.out.dtype)
    outcome.lse = outcome.lse + offset
    assert cause(inputs, outcome) == said


def test_a_factor_on_some_rows_is_said_to_be_on_those() -> None:
    inputs = build(DENSE, 1)
    outcome = call(inputs, "cpu")
    outcome.out[1] *= 0.5
    assert cause(inputs, outcome) == "out is 0.5 times the reference in the wrong rows"


def test_noise_is_no_factor() -> None:
    inputs = build(DENSE, 1)
    outcome = call(inputs, "cpu")
    rng = torch.Generator().manual_seed(3)
    outcome.out *= 1 + torch.rand(outcome.out.shape, generator=rng)
    outcome.lse += torch.rand(outcome.lse.shape, generator=rng)
    assert "the reference" not in cause(inputs, outcome)
