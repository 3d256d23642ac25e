"""Token rows as they come from callers and go back to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from hal.compat.deep_ep.config import round_up
from hal.spec.ep import FP8, PLAIN_DTYPES
from hal.spec.errors import SpecError
from hal.spec.tensors import require_tensor

_COLUMN_STEP: Final = 4

Rows = Tensor | tuple[Tensor, Tensor]
Steps = list[Callable[[], None]]


def given_rows(x: Any) -> tuple[Rows, int, torch.dtype]:
    """The rows as `hal.EpBuffer` takes them, their width, and the element type of what will be combined.

    Raises
    ------
    SpecError
        Neither rows nor FP8 rows with scales.
    """
    rows, scales = x if isinstance(x, (tuple, list)) and len(x) == 2 else (x, None)
    require_tensor("x", rows, (*PLAIN_DTYPES, FP8), 2, "[n, hidden], or (fp8 rows, scales)")
    if scales is None:
        if rows.dtype == FP8:
            raise SpecError("x", "fp8 rows alone", "(fp8 rows, scales)")
        return rows, rows.shape[1], rows.dtype
    if not isinstance(scales, Tensor) or scales.dim() != 2:
        raise SpecError("x", f"scales that are a {type(scales).__name__}", "scales [n, hidden / 128]")
    # Published scales may be column-major.
    return (rows, scales.contiguous()), rows.shape[1], torch.bfloat16


def padded(rows: Tensor, number: int, value: int, steps: Steps) -> Tensor:
    """The rows with ``value`` behind them up to a number; copied in a further step where they are not as many."""
    if len(rows) == number:
        return rows
    wide = rows.new_empty(number, *rows.shape[1:])
    bits = wide.view(torch.uint8) if rows.dtype == FP8 else wide
    bits[len(rows) :] = value

    def copy() -> None:
        wide[: len(rows)] = rows

    steps.append(copy)
    return wide


def tma_aligned(scales: Tensor, number: int, steps: Steps) -> Tensor:
    """The scales in column-major order, columns a multiple of four rows apart; copied in a further step."""
    step = round_up(max(number, 1), _COLUMN_STEP)
    made = scales.new_zeros(step * scales.shape[1]).as_strided((number, scales.shape[1]), (1, step))

    def copy() -> None:
        made[: len(scales)] = scales

    steps.append(copy)
    return made
