"""A row may be rounded worse than a tensor: two keys of equal weight in bf16 reach what no average does."""

from __future__ import annotations

import dataclasses
import math

import torch
from hal_conformance.case import MlaCase
from hal_conformance.decode import build, expect, judge
from hal_conformance.limits import compare

from hal.cli import verify
from hal.spec.limits import DENSE_LSE, DENSE_OUT, WHOLE


def off_by(cosine: float, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose direction is off by so much, and what they should be."""
    want = torch.randn(rows, 512, dtype=torch.float64)
    # |x − y|² / (|x|² + |y|²) of two vectors of one length at an angle a is 1 − cos a.
    angle = math.acos(1 - cosine)
    other = torch.randn_like(want)
    other -= want * (other * want).sum(-1, keepdim=True) / (want * want).sum(-1, keepdim=True)
    other *= want.norm(dim=-1, keepdim=True) / other.norm(dim=-1, keepdim=True)
    return want * math.cos(angle) + other * math.sin(angle), want


def ok(cosine: float, rows: int) -> bool:
    """As the suite and as the commands judge it, which must agree."""
    got, want = (0.02 * x for x in off_by(cosine, rows))  # so small that only directions count
    lse = torch.zeros(1, rows, 1)
    judged = compare(got, want, DENSE_OUT)
    found = verify.compare(got[None, None], lse, want[None, None], lse)
    assert found.passed == judged.ok
    assert found.wrong == int(judged.bad.sum())
    return judged.ok


def test_one_row_may_reach_three_times_what_a_tensor_may() -> None:
    assert ok(2.8 * DENSE_OUT.cosine, 1)
    assert not ok(3.2 * DENSE_OUT.cosine, 1)


def test_a_tensor_of_such_rows_fails() -> None:
    assert not ok(1.2 * DENSE_OUT.cosine, WHOLE)
    assert ok(0.9 * DENSE_OUT.cosine, WHOLE)


def test_a_few_such_rows_among_good_ones_pass() -> None:
    bad, want_bad = off_by(1.8 * DENSE_OUT.cosine, 2)
    good, want_good = off_by(0.4 * DENSE_OUT.cosine, WHOLE)
    assert compare(torch.cat([bad, good]), torch.cat([want_bad, want_good]), DENSE_OUT, magnitude=1e4).ok


def two_keys(weight_dtype: torch.dtype) -> float:
    """Worst cosine difference of rows made of two keys of about equal weight, weights rounded, out rounded to bf16.

    Weights are relative to some reference, not to the row's own maximum: kernels move it only when they must.
    """
    generator = torch.Generator().manual_seed(1)
    shares = 0.3 + 0.4 * torch.rand(20000, 1, generator=generator, dtype=torch.float64)
    values = torch.randn(20000, 2, 256, generator=generator, dtype=torch.float64)
    reference = 1 + torch.rand(20000, 1, generator=generator, dtype=torch.float64)
    weights = torch.cat([shares, 1 - shares], 1) * reference
    rounded = weights.to(weight_dtype).double()
    want = (weights[..., None] * values).sum(1) / weights.sum(1, keepdim=True)
    got = ((rounded[..., None] * values).sum(1) / rounded.sum(1, keepdim=True)).to(torch.bfloat16).double()
    return float(((got - want) ** 2).sum(-1).div((got**2 + want**2).sum(-1)).max())


def test_correctly_rounded_bf16_weights_exceed_the_tensor_limit_in_a_row_and_keep_the_row_limit() -> None:
    assert DENSE_OUT.cosine < two_keys(torch.bfloat16) < DENSE_OUT.row_cosine
    assert two_keys(torch.float64) < DENSE_OUT.cosine


def worst_of_a_kernel(seed: int, times: float) -> tuple[bool, bool]:
    """Few keys of large values, through weights rounded as a tensor core takes them; its error multiplied.

    Returns whether the published limits alone would pass it, and whether the suite does.
    """
    inputs = build(MlaCase(data="hot", lengths=(2, 3, 5, 9), h_q=128), seed)
    want = expect(inputs)
    out = want.out.clone()
    for j in range(4):
        keys = inputs.keys(j)[:, 0]
        weights = torch.softmax(inputs.queries(j)[0] @ keys.T * 576**-0.5, -1).to(torch.bfloat16).double()
        got = weights @ keys[:, :512] / weights.sum(-1, keepdim=True)
        out[j, 0] += times * (got - out[j, 0])
    out = out.to(torch.bfloat16)
    lse = want.lse.float()
    published = dataclasses.replace(DENSE_OUT, rounding=0.0)
    return judge(out, lse, want, published, DENSE_LSE).ok, judge(out, lse, want, DENSE_OUT, DENSE_LSE).ok


def test_correctly_rounded_weights_pass_where_the_published_limits_ask_for_more() -> None:
    found = [worst_of_a_kernel(seed, 1.0) for seed in range(40)]
    assert not all(by_published for by_published, _ in found)
    assert all(passed for _, passed in found)


def test_weights_four_times_as_coarse_fail() -> None:
    assert not any(worst_of_a_kernel(seed, 4.0)[1] for seed in range(3))


def test_a_vendor_who_tightens_tightens_that_too() -> None:
    assert DENSE_OUT.tightened(0.5).rounding == DENSE_OUT.rounding / 2
