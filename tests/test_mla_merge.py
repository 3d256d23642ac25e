"""`hal.mla_merge` against the float64 merge, and what it does with empty and bad parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hal
from hal.reference import mla as reference


@settings(max_examples=100, deadline=None)
@given(
    parts=st.integers(1, 4),
    shape=st.sampled_from([(2, 3, 4, 8), (5, 4, 8), (0, 2, 4, 8), (1, 0, 4, 8), (0, 4, 8)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    base=st.sampled_from(["e", "2"]),
    holes=st.floats(0, 1),
    magnitude=st.sampled_from([1.0, 80.0, 3e4]),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_the_reference(
    parts: int, shape: tuple[int, ...], dtype: torch.dtype, base: str, holes: float, magnitude: float, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    outs = [torch.randn(shape, generator=rng).to(dtype) for _ in range(parts)]
    lse_shape = (*shape[:-3], shape[-2], shape[-3])
    lses = [torch.randn(lse_shape, generator=rng) * magnitude for _ in range(parts)]
    for out, lse in zip(outs, lses, strict=True):
        absent = torch.rand(lse_shape, generator=rng) < holes
        lse[absent] = torch.inf
        # What an empty part holds must not matter.
        out[absent.transpose(-1, -2)] = torch.nan
    out, lse = hal.mla_merge(outs, lses, lse_base=base)
    want_out, want_lse = reference.mla_merge(outs, lses, lse_base=base)
    assert out.dtype == dtype
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2e-6}[dtype]
    torch.testing.assert_close(out.double(), want_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-6, atol=2e-6)


def test_stacked_parts_are_the_same_as_a_list() -> None:
    outs, lses = torch.randn(3, 2, 5, 4, 8), torch.randn(3, 2, 4, 5)
    stacked, listed = hal.mla_merge(outs, lses), hal.mla_merge(list(outs), list(lses))
    assert stacked[0].equal(listed[0])
    assert stacked[1].equal(listed[1])


def parts(n: int = 2) -> tuple[list[Any], list[Any]]:
    return [torch.zeros(2, 3, 4, 8) for _ in range(n)], [torch.zeros(2, 4, 3) for _ in range(n)]


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        (lambda o, s: (o.clear(), s.clear()), "outs"),
        (lambda o, s: s.pop(), "lses"),
        (lambda o, s: o.__setitem__(0, "x"), "outs[0]"),
        (lambda o, s: o.__setitem__(1, torch.zeros(2, 3, 4, 9)), "outs[1]"),
        (lambda o, s: o.__setitem__(1, torch.zeros(2, 3, 4, 8, dtype=torch.bfloat16)), "outs[1]"),
        (lambda o, s: o.__setitem__(0, torch.zeros(4)), "outs[0]"),
        (lambda o, s: s.__setitem__(1, torch.zeros(2, 3, 4)), "lses[1]"),
        (lambda o, s: s.__setitem__(0, torch.zeros(2, 4, 3, dtype=torch.int32)), "lses[0]"),
        (lambda o, s: s.__setitem__(1, None), "lses[1]"),
        (lambda o, s: o.__setitem__(1, torch.zeros(2, 3, 4, 8, device="meta")), "outs[1]"),
    ],
)
def test_bad_parts_are_named(change: Any, argument: str) -> None:
    outs, lses = parts()
    change(outs, lses)
    with pytest.raises(hal.SpecError) as caught:
        hal.mla_merge(outs, lses)
    assert caught.value.argument == argument


def test_bad_containers_are_named() -> None:
    outs, lses = parts()
    bad = [(None, lses, "outs"), (outs, 3, "lses"), (torch.tensor(2), lses, "outs")]
    bad.append((torch.nested.nested_tensor(outs), lses, "outs"))
    for bad_outs, bad_lses, argument in bad:
        with pytest.raises(hal.SpecError) as caught:
            hal.mla_merge(bad_outs, bad_lses)  # type: ignore[arg-type]
        assert caught.value.argument == argument
    with pytest.raises(hal.SpecError, match="lse_base"):
        hal.mla_merge(outs, lses, lse_base="10")
