"""A run of ``hal bench mla`` in words: a block a case, a line a contender."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.text import Text

from hal.bench.cases import FORMULAS
from hal.bench.mla import CaseResult, Entry, MlaReport
from hal.bench.mla_report import geometric_means
from hal.bench.rounds import FEWEST_ROUNDS
from hal.bench.text import UNCOUNTED, WAITING, disturbance, limit_line, short, span, times, wrapped

_HEAD: Final = f"  {'':<13}{'ms p50':>9}  {'p10–p90':<15}{'GFLOP/s':>8}{'GB/s':>7}{'limit':>7}{'×':>6} p10–p90"


def results(report: MlaReport) -> Iterator[Text]:
    """The table."""
    if not report.results or report.limits is None:
        return
    yield Text()
    if report.cpu_time:
        yield Text("processor time of one thread, not time on the wall")
    yield Text(_HEAD, style="bold")
    for result in report.results:
        bound = "memory" if report.limits.memory_bound(result.flop, result.moved) else "compute"
        about = f"{short(result.flop / 1e9)} GFLOP, {short(result.moved / 1e6)} MB, {bound}-bound"
        if result.checked < result.case.b:
            about += f"; {result.checked} of {result.case.b} sequences checked"
        yield Text.assemble((result.case.name, "bold"), f"  {about}")
        for entry in (result.backend, *result.peers):
            yield from _entry(report, result, entry)


def summary(report: MlaReport) -> Iterator[Text]:
    """Limits, formulas, means, and every case without a speed."""
    limits = report.limits
    if limits is None:
        return
    yield Text()
    rounds = " and ".join(map(str, sorted(set(report.rounds))))
    yield Text(f"limits, medians (p10–p90) of the same {rounds} rounds", style="bold")
    if min(report.rounds) < FEWEST_ROUNDS:
        yield from wrapped(
            "  too few rounds for a median: time ran out, on a machine too slow or too busy", style="red"
        )
    # On an accelerator the peak is that of bf16, and nothing else is measured for information.
    product = "torch.mm 8192³, bf16" if limits.bf16_gemm_gflops is None else "torch.mm 2048³, float32"
    yield limit_line("gemm peak", limits.sgemm_gflops, "GFLOP/s", product)
    yield limit_line("copy", limits.copy_gbps, "GB/s", "read + written, beyond the caches")
    if limits.read_gbps is not None:
        yield limit_line("read", limits.read_gbps, "GB/s", "not a limit here, for information")
    if limits.bf16_gemm_gflops is not None:
        yield limit_line("bf16 gemm", limits.bf16_gemm_gflops, "GFLOP/s", "not a limit here, for information")
    meaning = UNCOUNTED if report.cpu_time else WAITING
    yield from disturbance([limits.sgemm_gflops, limits.copy_gbps], report.others, meaning)
    for line in FORMULAS:
        yield Text(f"  {line}", style="dim")
    means = geometric_means(report)
    if means:
        yield Text()
        yield Text(f"{report.backend} against each peer, geometric mean of × (cases)", style="bold")
        for name, (mean, count) in means.items():
            yield Text(f"  {name:<14}{mean:>8.2f} ({count})")
    for result in report.results:
        if not result.backend.samples:
            yield from wrapped(f"NO SPEED for {result.case.name}: {result.backend.reason}", style="bold red")


def _entry(report: MlaReport, result: CaseResult, entry: Entry) -> Iterator[Text]:
    mine = entry is result.backend
    if not entry.samples:
        style = "bold red" if entry.wrong or entry.reason.startswith("failed") else "dim"
        yield from wrapped(f"  {entry.name:<13} {entry.reason}", style=style, indent=16)
        return
    assert report.limits is not None
    seconds = entry.seconds
    gflops = result.flop / seconds.p50 / 1e9
    fraction = gflops / report.limits.roofline(result.flop, result.moved)
    line = (
        f"  {entry.name:<13}{short(seconds.p50 * 1e3):>9}  {span(seconds, 1e3):<15}"
        f"{short(gflops):>8}{short(result.moved / seconds.p50 / 1e9):>7}{fraction:>7.0%}"
    )
    if mine or not result.backend.samples:
        yield Text(line, style="bold" if mine else "")
        return
    ratio = result.ratio(entry)
    style = "green" if ratio.p10 > 1 else "red" if ratio.p90 < 1 else "yellow"
    speedup = seconds.p50 / result.backend.seconds.p50
    yield Text.assemble(line, (f"{times(speedup):>6}", style), f" {times(ratio.p10)}–{times(ratio.p90)}")
