"""Medians, spreads and means of ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of the sorted values lies, interpolated linearly.

    Raises
    ------
    ValueError
        No values, or a share outside 0…1.
    """
    if not values or not 0 <= share <= 1:
        raise ValueError(f"quantile {share} of {len(values)} values")
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and how far the values lie around it.

    Attributes
    ----------
    p10, p50, p90, p99 : float
        Quantiles.
    count : int
        How many values.
    """

    p10: float
    p50: float
    p90: float
    p99: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of one or more values."""
        p10, p50, p90, p99 = (quantile(values, share) for share in (0.1, 0.5, 0.9, 0.99))
        return Spread(p10, p50, p90, p99, len(values))


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The spread of ``above[i] / below[i]``: what one contender costs in units of another of the same round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def geometric_mean(values: Sequence[float]) -> float:
    """The mean of ratios.

    Raises
    ------
    ValueError
        No values, or one that is not positive.
    """
    if not values or min(values) <= 0:
        raise ValueError("a geometric mean needs positive values")
    return math.exp(math.fsum(map(math.log, values)) / len(values))
