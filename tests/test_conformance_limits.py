"""The comparison with the reference: per row, and no mask, NaN or short row slips through."""

from __future__ import annotations

import pytest
import torch
from hal_conformance.limits import compare

from hal.spec.errors import SpecError
from hal.spec.limits import DENSE_OUT


def rows(count: int = 2048) -> torch.Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 0.05


def test_equal_passes_and_says_zero() -> None:
    want = rows()
    result = compare(want.float(), want, DENSE_OUT)
    assert result.ok
    assert result.worst < 1e-2
    assert sum(result.ratio) == want.numel() == sum(result.ulp)


def test_one_zeroed_row_in_2048_fails_and_is_named() -> None:
    want = rows()
    have = want.float()
    have[1234] = 0
    result = compare(have, want, DENSE_OUT)
    assert not result.ok
    assert result.worst_row == (1234,)
    assert int(result.bad.sum()) == 1


def test_a_row_within_absolute_limits_needs_its_direction_too() -> None:
    want = torch.full((4, 64), 1e-4, dtype=torch.float64)
    have = want.float()
    have[2] *= -1
    assert float((have - want).abs().max()) < DENSE_OUT.absolute
    assert compare(have, want, DENSE_OUT).bad.tolist() == [False, False, True, False]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_fails_where_the_reference_is(value: float) -> None:
    want = rows(4)
    have = want.float()
    have[1, 5] = value
    result = compare(have, want, DENSE_OUT)
    assert result.bad.tolist() == [False, True, False, False]
    assert result.mask_differs == 1


def test_infinities_must_have_the_sign_of_the_reference() -> None:
    want = torch.full((2, 1), torch.inf, dtype=torch.float64)
    have = torch.tensor([[torch.inf], [-torch.inf]])
    assert compare(have, want, DENSE_OUT).bad.tolist() == [False, True]


def test_limits_can_only_be_tightened() -> None:
    assert DENSE_OUT.tightened(0.5).absolute == DENSE_OUT.absolute / 2
    for factor in (1.5, 0, -1):
        with pytest.raises(SpecError, match="only be tightened"):
            DENSE_OUT.tightened(factor)


def test_nothing_to_compare_is_fine() -> None:
    assert compare(torch.zeros(0, 8), torch.zeros(0, 8, dtype=torch.float64), DENSE_OUT).ok


def test_a_row_that_cannot_be_compared_fails() -> None:
    want = rows(4)
    magnitude = torch.ones(4, dtype=torch.float64)
    magnitude[2] = torch.nan
    result = compare(want.float(), want, DENSE_OUT, magnitude)
    assert bool(result.bad[2])
    assert result.worst == float("inf")
