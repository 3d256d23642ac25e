"""What ``hal bench ep`` says: one report a case, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from hal.bench.ep_cases import PUBLISHED, Shape

PEERS: Final = ("gloo", "gloo_whole", "mpi", "mpi_whole")
"""Bare exchanges of rows gathered beforehand, and all of the operation over such."""

_OURS: Final = ("ours", "copy")


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
        for name in _named(times)
    }
    remote = found["remote"] / times["ours"] / 1e9
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
        "remote_gbps": remote,
        "remote_share": found["remote"] / found["bytes"] if found["bytes"] else 0.0,
        "calls": len(ours),
        "peers": peers,
        **({"remote_of_copy": remote / copy} if shape in PUBLISHED else {}),
        **(published(shape, found["rows"], times["ours"]) if shape in PUBLISHED else {}),
    }


def published(shape: Shape, rows: float, seconds: float) -> dict[str, Any]:
    """The bandwidth as DeepEP's tests count it, with what that is and what was published of 8 ranks.

    Parameters
    ----------
    shape : Shape
    rows : float
        In the normal mode those of recv_x, in the low-latency mode the experts chosen by all tokens of a rank; of the
        rank that has fewest.
    seconds : float
        Of the slowest rank.
    """
    if shape.low_latency:
        row = shape.hidden + shape.hidden / 128 * 4 + 16 if shape.fp8 else 2 * shape.hidden
        what = (
            "chosen experts · (hidden + hidden / 128 · 4 + 16) / t" if shape.fp8 else "chosen experts · 2 · hidden / t"
        )
    else:
        row = shape.hidden * (1 + 4 / 128 if shape.fp8 else 2)
        what = f"recv_x.numel() · 2 · f / t, f = {'(1 + 4/128) / 2' if shape.fp8 else '1'}"
    return {
        "published_gbps": rows * row / seconds / 1e9,
        "published_definition": f"{what}; of the rank with fewest, by the time of the slowest",
        "published_record": PUBLISHED[shape],
    }


def _named(times: Mapping[str, object]) -> Iterator[str]:
    """The peers of a case, those that are always asked first."""
    yield from (name for name in PEERS if name in times)
    yield from (name for name in times if name not in (*PEERS, *_OURS))


def table(
    reports: Sequence[dict[str, Any]],
    overlaps: Sequence[dict[str, Any]] = (),
    absent: Mapping[str, str] | None = None,
) -> str:
    """The reports as text."""
    others = dict.fromkeys(name for one in reports for name in one["peers"] if name not in PEERS)
    columns = tuple(others) or PEERS
    heads = f"{'p50 µs':>9} {'p99 µs':>9} {'GB/s':>6} {'remote':>6} {'of copy':>8} " + " ".join(
        f"{p:>10}" for p in columns
    )
    lines = [f"{'case':60} {heads}"]
    for one in reports:
        peers = (f"{one['peers'][p]['speedup']:9.2f}×" if p in one["peers"] else f"{'–':>10}" for p in columns)
        lines.append(
            f"{one['ranks']} ranks {one['name']:52} {one['us_p50']:9.1f} {one['us_p99']:9.1f} {one['gbps']:6.2f}"
            f" {one['remote_gbps']:6.2f} {one['fraction_of_copy']:8.0%} {' '.join(peers)}"
        )
        if "published_gbps" in one:
            record = f"; of 8 ranks was published {one['published_record']}" if one["published_record"] else ""
            lines.append(f"    as published: {one['published_gbps']:.2f} GB/s = {one['published_definition']}{record}")
            lines.append(f"    rows of other ranks alone, to the rate of the copy: {one['remote_of_copy']:.0%}")
    for one in overlaps:
        late = f", the others {one['late_us']:.1f} µs after rank 0" if one.get("late_us") else ""
        compute = f", which takes {one['compute']:.2f} times as long as alone" if "compute" in one else ""
        lines.append(
            f"{one['ranks']} ranks overlap of {one['name']}: call {one['call_us']:.1f} µs{late}, receive"
            f" {one['receive_us']:.1f} µs, of which {one['visible_us']:.1f} µs ({one['visible']:.0%}) are left after as"
            f" much compute{compute}"
        )
    lines += [f"{peer} is not beside it: {reason}" for peer, reason in (absent or {}).items()]
    return "\n".join(lines)


def document(
    reports: Sequence[dict[str, Any]],
    overlaps: Sequence[dict[str, Any]] = (),
    absent: Mapping[str, str] | None = None,
    copied: str = "",
) -> dict[str, Any]:
    """The published JSON; for devices also where the copy goes, and which peers were not there."""
    limits: dict[str, Any] = {"copy_gbps": max((one["copy_gbps"] for one in reports), default=None)}
    found = {"limits": limits, "cases": list(reports), "overlap": list(overlaps)}
    if copied:
        limits["copy"] = copied
        found["absent"] = dict(absent or {})
    return found
