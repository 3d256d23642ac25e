"""The summing kernel is float32 addition from zero in row order, rounded once to nearest even: the same bits.

Of a NaN only that it is one.
"""

from __future__ import annotations

import pytest
import torch

_ep = pytest.importorskip("hal_cpu._ep", reason="no compiled engine")

SPECIAL = torch.tensor(
    [0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x7F80, 0xFF80, 0x7F81, 0xFFC1, 0x7FFF, 0x7F7F, 0xFF7F, 0x3F80],
    dtype=torch.int32,
)


def rows_of(count: int, columns: int, seed: int) -> list[torch.Tensor]:
    """Rows of any bit patterns, special ones among them."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        bits = torch.randint(0, 1 << 16, (columns,), generator=generator, dtype=torch.int32)
        chosen = SPECIAL[torch.randint(0, len(SPECIAL), (columns,), generator=generator)]
        rare = torch.rand(columns, generator=generator) < 0.05
        made.append(torch.where(rare, chosen, bits).to(torch.uint16).view(torch.bfloat16))
    return made


@pytest.mark.parametrize("columns", [8, 24, 32, 40, 272, 7168])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", ["any bits", "no NaN"])
def test_sums_are_the_reference_bit_for_bit(columns: int, count: int, kind: str) -> None:
    rows = rows_of(count, columns, 7 * columns + count)
    if kind == "no NaN":
        rows = [torch.where(row.isnan() | row.isinf(), torch.tensor(-0.0).bfloat16(), row) for row in rows]
    want = torch.zeros(columns)
    for row in rows:
        want += row.float()
    out = torch.empty(columns, dtype=torch.bfloat16)
    _ep.sum_rows(out.data_ptr(), 0, [row.data_ptr() for row in rows], 0, columns)
    got, expected = out.view(torch.int16), want.bfloat16().view(torch.int16)
    at = torch.where(want.isnan(), ~out.isnan(), got != expected).nonzero().flatten().tolist()
    assert not at, f"column {at[0]}: {out[at[0]]} instead of {want[at[0]]}"
