"""How far a result may be from the float64 reference.

The limits are the published ones of FlashMLA, made to hold for every (query, head) row as well as for a whole tensor,
and made fair to any data: the absolute limits, published for data within ±1, grow with the data, and what correct
rounding of the weights leaves is never asked to be less. A vendor may tighten them (`Limits.tightened`), nothing else.

The published cosine difference is that of a whole tensor. One row may reach three times as much: tensor cores take the
weights in bf16, and where two keys of equal weight make up a row, correct rounding of the weights (each within 2⁻⁸ of
itself, apart by up to 2⁻⁷, half of which reaches out) gives about (2⁻⁸)² / 2 = 7.6e-6, more where the keys' values
nearly cancel, and rounding out 2e-6 more: up to 1.1e-5 was seen at 64 columns. Of fewer columns the direction is not
judged, only each element.

Nor are single elements asked for more than rounding the weights leaves. A kernel that multiplies by weights of the
caller's type has them each off by up to half a unit in the last place, u of itself, and so an element of out by up to
u · Σ p|v|, as much again as u·|out| where it divides by the sum of the rounded weights, and u·|out| for rounding out:
where few keys of large values make up a row and nearly cancel, that is more than the published limits (1.06 times them
was seen on tensor cores). `Limits.rounding` says how much of it passes.

Expert-parallel calls have no limits: moved rows keep their bits, and sums are float32 additions in a stated order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hal.spec.errors import SpecError


@dataclass(frozen=True, slots=True)
class Limits:
    """An element passes within ``absolute`` *or* ``relative``; rows and whole tensors also by their cosine difference.

    Attributes
    ----------
    absolute, relative : float
    cosine : float
        Of a whole tensor of at least `WHOLE` rows.
    row_cosine : float
        Of a single row of at least `DIRECTION` columns.
    rounding : float
        An element also passes within so many times `rounding_of` the row's weights.
    """

    absolute: float
    relative: float
    cosine: float
    row_cosine: float
    rounding: float = 0.0

    def tightened(self, factor: float) -> Limits:
        """The same limits times a factor of at most 1.

        Raises
        ------
        SpecError
            The factor would loosen them, or is not positive.
        """
        if not 0 < factor <= 1:
            raise SpecError("tighten", factor, "a factor above 0 and at most 1: limits may only be tightened")
        return Limits(
            self.absolute * factor,
            self.relative * factor,
            self.cosine * factor,
            self.row_cosine * factor,
            self.rounding * factor,
        )


def directions(got: Tensor, want: Tensor, limits: Limits, magnitude: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """The cosine difference of every row, and how many times its limit it is, up to 1 being right.

    What the tensor as a whole exceeds is laid at the door of the row that is furthest off.

    Parameters
    ----------
    got, want : Tensor
        float64, of one shape; the last dimension is that of a row.
    limits : Limits
    magnitude : Tensor or float
        For every row, how many times larger than ±1 its data are.
    """
    errors = (got - want).square().sum(-1)
    squares = got.square().sum(-1) + want.square().sum(-1)
    # A row far below the absolute limit is rounding of zero; its direction means nothing.
    counted = ~(squares.sqrt() <= limits.absolute * magnitude * 1e-3) & ~(squares < _NOTHING)
    if want.shape[-1] < DIRECTION:
        counted = torch.zeros_like(counted)
    # Σ(x−y)²/Σ(x²+y²) equals |1 − 2Σxy/Σ(x²+y²)| and loses no digits to the subtraction from 1.
    cosine = (errors / squares.clamp(min=_NOTHING)).masked_fill(~counted, 0)
    ratio = cosine / limits.row_cosine
    if cosine.numel() >= WHOLE:
        whole = errors[counted].sum() / squares[counted].sum().clamp(min=_NOTHING)
        furthest = cosine.flatten().argmax()
        ratio.view(-1)[furthest] = torch.maximum(ratio.view(-1)[furthest], whole / limits.cosine)
    return cosine, ratio


def rounding_of(out: Tensor, spread: Tensor, dtype: torch.dtype) -> Tensor:
    """How far correct arithmetic with weights of a type may be off: u · (Σ p|v| + 2·|out|), u half a unit of the type.

    Parameters
    ----------
    out : Tensor
        float64 result.
    spread : Tensor
        Σ p|v| of every element, float64: the same weights on the absolute values.
    dtype : torch.dtype
        Of the call.
    """
    return torch.finfo(dtype).eps / 2 * (spread + 2 * out.abs())


_NOTHING: Final = 1e-30
"""Rows whose squared norms sum to less have no direction to compare."""

WHOLE: Final = 16
"""From so many rows on a tensor has a cosine difference of its own; fewer may all be of the rare kind."""

DIRECTION: Final = 64
"""From so many columns on the direction of a row is judged; that of fewer turns far with correct rounding."""

DENSE_OUT: Final = Limits(8e-4, 2.01 / 128, 5e-6, 1.5e-5, 1.0)
DENSE_LSE: Final = Limits(1e-6, 8.01 / 65536, 1e-7, 1e-7)
