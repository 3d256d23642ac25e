"""What ``hal bench ep`` says: one report a case, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from hal.bench.ep_cases import Shape

PEERS: Final = ("gloo", "gloo_whole", "mpi", "mpi_whole")
"""Bare exchanges of rows gathered beforehand, and all of the operation over such."""


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that a share q of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)]


def report(shape: Shape, ranks: int, found: dict[str, Any]) -> dict[str, Any]:
    """One case of the published JSON."""
    times = {name: quantile(values, 0.5) for name, values in found["merged"].items()}
    ours = found["merged"]["ours"]
    gbps = found["bytes"] / times["ours"] / 1e9
    copy = found["bytes"] / times["copy"] / 1e9
    peers = {
        name: {
            "us_p50": times[name] * 1e6,
            "us_p10": quantile(found["merged"][name], 0.1) * 1e6,
            "speedup": times[name] / times["ours"],
        }
        for name in PEERS
        if name in times
    }
    return {
        "name": shape.name,
        **asdict(shape),
        "ranks": ranks,
        "us_p50": times["ours"] * 1e6,
        "us_p10": quantile(ours, 0.1) * 1e6,
        "copy_us_p10": quantile(found["merged"]["copy"], 0.1) * 1e6,
        "us_p99": quantile(ours, 0.99) * 1e6,
        "gbps": gbps,
        "copy_gbps": copy,
        "fraction_of_copy": gbps / copy,
        "remote_gbps": found["remote"] / times["ours"] / 1e9,
        "remote_share": found["remote"] / found["bytes"] if found["bytes"] else 0.0,
        "calls": len(ours),
        "peers": peers,
    }


def table(reports: Sequence[dict[str, Any]], overlaps: Sequence[dict[str, Any]] = ()) -> str:
    """The reports as text."""
    heads = f"{'p50 µs':>9} {'p99 µs':>9} {'GB/s':>6} {'remote':>6} {'of copy':>8} " + " ".join(
        f"{p:>10}" for p in PEERS
    )
    lines = [f"{'case':60} {heads}"]
    for one in reports:
        peers = (f"{one['peers'][p]['speedup']:9.2f}×" if p in one["peers"] else f"{'–':>10}" for p in PEERS)
        lines.append(
            f"{one['ranks']} ranks {one['name']:52} {one['us_p50']:9.1f} {one['us_p99']:9.1f} {one['gbps']:6.2f}"
            f" {one['remote_gbps']:6.2f} {one['fraction_of_copy']:8.0%} {' '.join(peers)}"
        )
    for one in overlaps:
        lines.append(
            f"{one['ranks']} ranks overlap of {one['name']}: call {one['call_us']:.1f} µs, receive"
            f" {one['receive_us']:.1f} µs, of which {one['visible_us']:.1f} µs ({one['visible']:.0%}) are left after as"
            " much compute"
        )
    return "\n".join(lines)


def document(reports: Sequence[dict[str, Any]], overlaps: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The published JSON."""
    limits = {"copy_gbps": max((one["copy_gbps"] for one in reports), default=None)}
    return {"limits": limits, "cases": list(reports), "overlap": list(overlaps)}
