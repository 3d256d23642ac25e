"""Whether a result agrees with the reference: the published limits, held row by row.

A row is one head of one query. A limit over a whole tensor alone lets a zeroed row among thousands pass; these do not.
What the tensor as a whole exceeds counts as a wrong row, that which is furthest off. What `hal.spec.limits` leaves
for rounding the weights is for few large keys that cancel; the data compared here are as published and need none of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from hal.spec.limits import DENSE_LSE, DENSE_OUT, WHOLE, directions

LIMITS: Final = (
    f"out within {DENSE_OUT.absolute:g} or {DENSE_OUT.relative * 128:g}/128 of its value and cosine difference "
    f"{DENSE_OUT.row_cosine:g} in every row, {DENSE_OUT.cosine:g} in all of {WHOLE} rows or more together; "
    f"lse within {DENSE_LSE.absolute:g} or {DENSE_LSE.relative * 65536:g}/65536 of its value"
)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a result is from the reference.

    Attributes
    ----------
    rows, wrong : int
        Rows compared, and those outside a limit; where only all of them together are, that is one.
    out_error, cosine, lse_error : float
        The worst of all rows: absolute error of out, cosine difference of a row, absolute error of lse. NaN where the
        result holds one.
    first_wrong : str
        The first wrong row: where, what it is, what it should be. Empty where all are right.
    """

    rows: int = 0
    wrong: int = 0
    out_error: float = 0.0
    cosine: float = 0.0
    lse_error: float = 0.0
    first_wrong: str = ""

    @property
    def passed(self) -> bool:
        """Something was compared and all of it is right."""
        return self.rows > 0 and self.wrong == 0

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.rows + other.rows,
            self.wrong + other.wrong,
            _worse(self.out_error, other.out_error),
            _worse(self.cosine, other.cosine),
            _worse(self.lse_error, other.lse_error),
            self.first_wrong or other.first_wrong,
        )


def published(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal data of standard deviation 0.1 within ±1, as the limits were published for, on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device).div_(10).clamp_(-1, 1)


def compare(
    out: Tensor, lse: Tensor, right_out: Tensor, right_lse: Tensor, where: str = "", first_sequence: int = 0
) -> Agreement:
    """Compare [b, s_q, h_q, d_v] and [b, h_q, s_q] with what is right.

    ``where`` and ``first_sequence``, the number of the first of the b sequences, say in the report whose they are.
    """
    got, want = out.double().cpu(), right_out.double().cpu()
    got_lse, want_lse = (x.double().cpu().transpose(-1, -2) for x in (lse, right_lse))
    error = (got - want).abs()
    near = (error <= DENSE_OUT.absolute) | (error <= DENSE_OUT.relative * want.abs())
    cosine, direction = directions(got, want, DENSE_OUT)
    # Equal infinities are equal; their difference would be NaN.
    lse_error = torch.where(got_lse == want_lse, 0.0, (got_lse - want_lse).abs())
    relative = (lse_error <= DENSE_LSE.relative * want_lse.abs()) & want_lse.isfinite()
    lse_near = (lse_error <= DENSE_LSE.absolute) | relative
    right = near.all(-1) & (direction <= 1) & lse_near
    wrong = (~right).nonzero()
    first = ""
    if len(wrong):
        at = tuple(wrong[0].tolist())
        column = int((~near[at]).nonzero()[0]) if not bool(near[at].all()) else int(error[at].argmax())
        first = (
            f"{where}sequence {first_sequence + at[0]}, query {at[1]}, head {at[2]}: "
            f"out[{column}] is {float(got[at][column]):.6g} and should be {float(want[at][column]):.6g}, "
            f"cosine difference {float(cosine[at]):.2g}, "
            f"lse is {float(got_lse[at]):.8g} and should be {float(want_lse[at]):.8g}"
        )
    return Agreement(right.numel(), len(wrong), _most(error), _most(cosine), _most(lse_error), first)


def _most(values: Tensor) -> float:
    # amax keeps a NaN: a result that holds one has no finite worst error.
    return float(values.amax()) if values.numel() else 0.0


def _worse(a: float, b: float) -> float:
    return b if b != b or b > a else a
