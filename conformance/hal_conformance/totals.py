"""Sums up what the comparisons of many calls gave."""

from __future__ import annotations

from typing import Any


class Totals:
    """Worst values and summed histograms of many comparisons."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Any]] = {}

    def add(self, errors: list[dict[str, Any]]) -> None:
        """Take in the comparisons of one case."""
        for error in errors:
            for name, one in error.items():
                if not one["ratio"]:
                    continue
                have = self._sums.setdefault(
                    name, {"rows": 0, "worst": 0.0, "max_abs": 0.0, "max_cosine": 0.0, "ulp": [], "ratio": []}
                )
                have["rows"] += one["rows"]
                for key in ("worst", "max_abs", "max_cosine"):
                    have[key] = _larger(have[key], one[key])
                for key in ("ulp", "ratio"):
                    old = have[key] or [0] * len(one[key])
                    have[key] = [a + b for a, b in zip(old, one[key], strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        return self._sums


def _larger(a: float | str, b: float | str) -> float | str:
    """The larger of two numbers, of which either may be the name of an infinity or NaN."""
    if isinstance(a, str) or isinstance(b, str):
        return a if isinstance(a, str) else b
    return max(a, b)
