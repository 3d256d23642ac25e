"""Holds a result against the float64 reference, row by row, within the limits of the specification."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from hal.spec.limits import Limits, directions

ULP_EDGES: Final = (0.5, 1, 2, 4, 8, 16, 32, 64, 128)
"""Upper edges of the ulp histogram; the last bin is everything above."""

RATIO_EDGES: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Upper edges of the histogram of error over limit; the last bin is everything above 1, that is failing."""


@dataclass(slots=True)
class Comparison:
    """What comparing one tensor with the reference gave.

    Attributes
    ----------
    ok : bool
    bad : Tensor
        For every row whether it breaks a limit.
    worst : float
        The largest error over its limit, over elements and row cosines; up to 1 passes. Infinite where the inf or NaN
        masks differ.
    worst_row : tuple of int
        Where.
    max_abs, max_rel, max_cosine : float
        Over all rows, finite elements.
    mask_differs : int
        Rows whose inf/NaN mask differs from the reference's.
    ulp : list of int
        Histogram over `ULP_EDGES`, in units of the last place of the result's dtype.
    ratio : list of int
        Histogram over `RATIO_EDGES`.
    """

    ok: bool
    bad: Tensor
    worst: float
    worst_row: tuple[int, ...]
    max_abs: float
    max_rel: float
    max_cosine: float
    mask_differs: int
    ulp: list[int] = field(default_factory=list)
    ratio: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for the report; infinities as strings, which JSON has no numbers for."""
        return {
            "ok": self.ok,
            "bad_rows": int(self.bad.sum()),
            "rows": self.bad.numel(),
            "worst": number(self.worst),
            "worst_row": list(self.worst_row),
            "max_abs": number(self.max_abs),
            "max_rel": number(self.max_rel),
            "max_cosine": number(self.max_cosine),
            "mask_differs": self.mask_differs,
            "ulp": self.ulp,
            "ratio": self.ratio,
        }


def number(value: float) -> float | str:
    """A finite float rounded to 6 digits, or the name of what it is."""
    if value != value:
        return "nan"
    if value in (float("inf"), float("-inf")):
        return "inf" if value > 0 else "-inf"
    return float(f"{value:.6g}")


def compare(
    actual: Tensor,
    expected: Tensor,
    limits: Limits,
    magnitude: Tensor | float = 1.0,
    rounding: Tensor | None = None,
) -> Comparison:
    """Compare rows (the last dimension) of a result with the float64 reference.

    Parameters
    ----------
    actual : Tensor
        What the backend gave, on any device.
    expected : Tensor
        The reference, float64 on the host, same shape.
    limits : Limits
    magnitude : Tensor or float
        For every row, how many times larger than ±1 its data are; scales the absolute limit. At least 1.
    rounding : Tensor, optional
        For every element, `hal.spec.limits.rounding_of` it.
    """
    got = actual.detach().cpu().double()
    want = expected
    if not isinstance(magnitude, Tensor):
        magnitude = torch.full(want.shape[:-1], float(magnitude), dtype=torch.float64)
    if want.numel() == 0:
        return Comparison(True, torch.zeros(want.shape[:-1], dtype=torch.bool), 0.0, (), 0.0, 0.0, 0.0, 0)
    same_mask = torch.where(want.isfinite(), got.isfinite(), (got == want) | (got.isnan() & want.isnan()))
    mask_bad = ~same_mask.all(-1)
    finite = want.isfinite() & got.isfinite()
    have, ref = got.masked_fill(~finite, 0), want.masked_fill(~finite, 0)
    error = (have - ref).abs()
    allowed = torch.maximum(limits.absolute * magnitude.unsqueeze(-1), limits.relative * ref.abs())
    if rounding is not None:
        allowed = torch.maximum(allowed, limits.rounding * rounding)
    ratio = error / allowed
    cosine, direction = directions(have, ref, limits, magnitude)
    row_ratio = torch.maximum(ratio.amax(-1), direction)
    # Of what cannot be compared nothing is right.
    row_ratio = row_ratio.masked_fill(mask_bad | row_ratio.isnan(), torch.inf)
    bad = row_ratio > 1
    at = int(row_ratio.flatten().argmax())
    return Comparison(
        ok=not bool(bad.any()),
        bad=bad,
        worst=float(row_ratio.flatten()[at]),
        worst_row=unravel(at, row_ratio.shape),
        max_abs=float(error.max()),
        max_rel=float((error / ref.abs().clamp(min=1e-12)).masked_fill(ref == 0, 0).max()),
        max_cosine=float(cosine.max()),
        mask_differs=int(mask_bad.sum()),
        ulp=_ulp_histogram(actual.dtype, error, ref, finite),
        ratio=_histogram(ratio[finite], RATIO_EDGES),
    )


def unjudged(tensor: Tensor) -> Comparison:
    """What stands for a comparison that another process makes."""
    return Comparison(True, torch.zeros(tensor.shape[:-1], dtype=torch.bool), 0.0, (), 0.0, 0.0, 0.0, 0)


def unravel(index: int, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """A flat index as coordinates."""
    at = []
    for size in reversed(shape):
        index, here = divmod(index, size)
        at.append(here)
    return tuple(reversed(at))


def _histogram(values: Tensor, edges: tuple[float, ...]) -> list[int]:
    bins = torch.bucketize(values, torch.tensor(edges, dtype=torch.float64))
    return [int(n) for n in torch.bincount(bins.flatten(), minlength=len(edges) + 1)]


def _ulp_histogram(dtype: torch.dtype, error: Tensor, ref: Tensor, finite: Tensor) -> list[int]:
    info = torch.finfo(dtype)
    spacing = torch.exp2(torch.floor(torch.log2(ref.abs().clamp(min=info.tiny)))) * info.eps
    return _histogram((error / spacing)[finite], ULP_EDGES)
