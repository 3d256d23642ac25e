"""What ``hal bench mla`` writes: its JSON document, every sample, and means over the cases."""

from __future__ import annotations

import dataclasses
from typing import Any

from hal.bench.machine import Machine
from hal.bench.mla import CaseResult, MlaReport
from hal.bench.stats import geometric_mean


def document(report: MlaReport, machine: Machine) -> dict[str, Any]:
    """What ``--json`` writes.

    ``{"limits": {"sgemm_gflops", "copy_gbps"}, "cases": [{"name", "ms_p50", "gflops", "gbps", "fraction_of_limit",
    "peers": {NAME: {"ms_p50", "speedup"}}}], "machine": {"device", "software", "date", …}}``. A case the backend got
    wrong or cannot do has null for every number and no peers; a peer without a right result is not among ``peers``.
    """
    assert report.limits is not None
    return {
        "limits": {"sgemm_gflops": report.limits.sgemm_gflops.p50, "copy_gbps": report.limits.copy_gbps.p50},
        "cases": [_case(report, result) for result in report.results],
        "machine": dataclasses.asdict(machine),
    }


def _case(report: MlaReport, result: CaseResult) -> dict[str, Any]:
    name = result.case.name
    if not result.backend.samples:
        empty = dict.fromkeys(("ms_p50", "gflops", "gbps", "fraction_of_limit"))
        return {"name": name, **empty, "peers": {}}
    assert report.limits is not None
    seconds = result.backend.seconds.p50
    gflops = result.flop / seconds / 1e9
    return {
        "name": name,
        "ms_p50": seconds * 1e3,
        "gflops": gflops,
        "gbps": result.moved / seconds / 1e9,
        "fraction_of_limit": gflops / report.limits.roofline(result.flop, result.moved),
        "peers": {
            peer.name: {"ms_p50": peer.seconds.p50 * 1e3, "speedup": peer.seconds.p50 / seconds}
            for peer in result.peers
            if peer.samples
        },
    }


def record(report: MlaReport, machine: Machine) -> dict[str, Any]:
    """Everything, for whoever wants to check the statistics: the machine and every sample in seconds."""
    return {
        "machine": dataclasses.asdict(machine),
        "backend": report.backend,
        "clock": "cpu" if report.cpu_time else "wall",
        "rounds": report.rounds,
        "others": report.others,
        "limits": {name: samples for (_, name), samples in report.limit_samples.items()},
        "cases": [
            {
                "name": result.case.name,
                "flop": result.flop,
                "bytes": result.moved,
                "layers": result.layers,
                "contenders": {
                    entry.name: {"seconds": list(entry.samples), "reason": entry.reason}
                    for entry in (result.backend, *result.peers)
                },
            }
            for result in report.results
        ],
    }


def speedups(report: MlaReport) -> dict[str, list[float]]:
    """Per peer the ratio of medians in every case where both have a right result; ``fastest`` is the best peer."""
    found: dict[str, list[float]] = {}
    for result in report.results:
        if not result.backend.samples:
            continue
        mine = result.backend.seconds.p50
        ratios = {peer.name: peer.seconds.p50 / mine for peer in result.peers if peer.samples}
        for name, ratio in ratios.items():
            found.setdefault(name, []).append(ratio)
        if ratios:
            found.setdefault("fastest peer", []).append(min(ratios.values()))
    return found


def geometric_means(report: MlaReport) -> dict[str, tuple[float, int]]:
    """Per peer the geometric mean of `speedups` and the number of cases in it."""
    return {name: (geometric_mean(ratios), len(ratios)) for name, ratios in speedups(report).items()}
