"""Inline SVG for the HTML report: bars of error distributions and a roofline. Colours come from the page's CSS."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from hal_conformance.limits import RATIO_EDGES, ULP_EDGES

_BARS = 400
_ROOF = 520
"""Widths in the units of the drawings: small ones, so that text stays readable on a phone."""


def _labels(edges: tuple[float, ...]) -> list[str]:
    return [f"≤ {edge:g}" for edge in edges] + [f"> {edges[-1]:g}"]


def ratio_bars(counts: list[int]) -> str:
    """How many elements lie at which fraction of their limit; the last bar is over it."""
    return _bars(counts, _labels(RATIO_EDGES), len(RATIO_EDGES))


def ulp_bars(counts: list[int]) -> str:
    """How many elements are how many units of the last place off."""
    return _bars(counts, _labels(ULP_EDGES), len(counts))


def _bars(counts: list[int], labels: list[str], red_from: int) -> str:
    """Horizontal bars on a logarithmic scale, so that one wrong element among millions is seen."""
    top = max(math.log10(1 + max(counts, default=0)), 1.0)
    row, left, right = 24, 62, 92
    lines = [f'<svg viewBox="0 0 {_BARS} {row * len(counts) + 4}" role="img" class="bars">']
    for number, (count, label) in enumerate(zip(counts, labels, strict=True)):
        y = number * row + 4
        length = (_BARS - left - right) * math.log10(1 + count) / top
        kind = "bad" if number >= red_from else "good"
        lines.append(f'<text x="{left - 8}" y="{y + 14}" class="end">{escape(label)}</text>')
        if count:
            lines.append(
                f'<rect x="{left}" y="{y + 2}" width="{max(length, 2):.1f}" height="{row - 8}" rx="3" class="{kind}"/>'
            )
        lines.append(f'<text x="{left + max(length, 0) + 8:.1f}" y="{y + 14}">{count:,}</text>')
    return "".join([*lines, "</svg>"])


def roofline(data: dict[str, Any]) -> str:
    """Achieved FLOP/s against arithmetic intensity, under the ceilings measured on the same device."""
    points = data["points"]
    if not points or not data["flops"] or not data["bytes"]:
        return ""
    intensity = [p["flops"] / p["bytes"] for p in points]
    speed = [p["flops"] / p["seconds"] for p in points]
    ridge = data["flops"] / data["bytes"]
    x_low, x_high = min([*intensity, ridge]) / 2.5, max([*intensity, ridge]) * 2.5
    y_high = max([*speed, data["flops"]]) * 1.8
    y_low = min([*speed, data["bytes"] * x_low]) / 1.8
    height, left, bottom = 320, 56, 44

    def x(value: float) -> float:
        return left + (_ROOF - left - 16) * math.log(value / x_low) / math.log(x_high / x_low)

    def y(value: float) -> float:
        return 12 + (height - bottom - 12) * (1 - math.log(value / y_low) / math.log(y_high / y_low))

    lines = [f'<svg viewBox="0 0 {_ROOF} {height}" role="img" class="roof">']
    for value, text in _ticks(y_low, y_high):
        lines.append(f'<line x1="{left}" x2="{_ROOF - 16}" y1="{y(value):.1f}" y2="{y(value):.1f}" class="grid"/>')
        lines.append(f'<text x="{left - 8}" y="{y(value) + 4:.1f}" class="end">{text}</text>')
    for value, text in _ticks(x_low, x_high, plain=True):
        lines.append(f'<text x="{x(value):.1f}" y="{height - bottom + 18}" class="mid">{text}</text>')
    roof = [(x_low, data["bytes"] * x_low), (ridge, data["flops"]), (x_high, data["flops"])]
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in roof)
    lines.append(f'<polyline points="{path}" class="ceiling"/>')
    for number, (at, fast) in enumerate(zip(intensity, speed, strict=True), 1):
        px, py = x(at), y(fast)
        lines.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="9" class="point"/>')
        lines.append(f'<text x="{px:.1f}" y="{py + 4.5:.1f}" class="number">{number}</text>')
    middle = (left + _ROOF - 16) / 2
    lines.append(f'<text x="{middle}" y="{height - 6}" class="mid">FLOP a byte (log)</text>')
    return "".join([*lines, "</svg>"])


def _ticks(low: float, high: float, plain: bool = False) -> list[tuple[float, str]]:
    found = []
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for digit in (1, 3):
            value = digit * 10.0**power
            if low <= value <= high:
                found.append((value, f"{value:g}" if plain else f"{value / 1e9:g} G"))
    return found
