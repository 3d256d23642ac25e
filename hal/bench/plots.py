"""Pictures of a run: the roofline, and scaling over s_k, b, h_q and threads."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from hal.bench.cases import MlaCase
from hal.bench.machine import Machine
from hal.bench.mla import CaseResult, Entry, MlaReport

AXES: Final[dict[str, tuple[str, str]]] = {
    "s_k": ("s_k", "cached tokens a sequence"),
    "b": ("b", "sequences"),
    "h_q": ("h_q", "query heads"),
    "threads": ("threads", "threads"),
}
"""Picture, the field of `MlaCase` along it, and its label."""


def series(report: MlaReport, axis: str) -> list[tuple[str, list[CaseResult]]]:
    """Lines of two or more timed cases that differ in one field only, each with a name for what they share."""
    field = AXES[axis][0]
    one: Any = {field: 1}
    lines: dict[MlaCase, list[CaseResult]] = {}
    for result in report.results:
        value = getattr(result.case, field)
        if result.backend.samples and value is not None:
            lines.setdefault(dataclasses.replace(result.case, **one), []).append(result)
    return [
        (_shared(key, field), sorted(found, key=lambda result: _value(result, field)))
        for key, found in lines.items()
        if len(found) > 1
    ]


def draw(report: MlaReport, machine: Machine, folder: Path) -> Iterator[tuple[Path, str]]:
    """Write the pictures as SVG; yields each file, or the file that was not written, with a remark.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    # Imported by name, so that the types can be checked where it is not installed.
    Figure: Any = importlib.import_module("matplotlib.figure").Figure  # noqa: N806  (a class)

    if report.limits is None:
        return
    figure = Figure(figsize=(7, 5), layout="constrained")
    _roofline(figure.subplots(), report)
    yield _save(figure, folder / "roofline.svg", machine), "every case under the two limits"
    for axis in AXES:
        file = folder / f"scaling_{axis}.svg"
        lines = series(report, axis)
        if not lines:
            yield file, f"not drawn: no two cases of this run differ in {axis} alone"
            continue
        figure = Figure(figsize=(6 * len(lines), 4.5), layout="constrained")
        panels = figure.subplots(1, len(lines), squeeze=False)[0]
        for panel, (shared, results) in zip(panels, lines, strict=True):
            _scaling(panel, report, axis, shared, results)
        yield _save(figure, file, machine), f"{len(lines)} {'line' if len(lines) == 1 else 'lines'}"


def _roofline(axes: Any, report: MlaReport) -> None:
    limits = report.limits
    assert limits is not None
    intensities = [result.flop / result.moved for result in report.results]
    edge = limits.sgemm_gflops.p50 / limits.copy_gbps.p50
    reach = sorted([min(intensities) / 2, edge, max(intensities) * 2])
    axes.plot(reach, [min(limits.sgemm_gflops.p50, x * limits.copy_gbps.p50) for x in reach], color="black")
    axes.annotate(
        f"sgemm {limits.sgemm_gflops.p50:.0f} GFLOP/s, copy {limits.copy_gbps.p50:.0f} GB/s",
        (edge, limits.sgemm_gflops.p50),
        ha="center",
        xytext=(0, 5),
        textcoords="offset points",
    )
    for name, pick in _contenders(report):
        points = [(r.flop / r.moved, r.flop / entry.seconds.p50 / 1e9) for r in report.results if (entry := pick(r))]
        if points:
            mine = name == report.backend
            axes.scatter(*zip(*points, strict=True), label=name, marker="o" if mine else "x", zorder=3 if mine else 2)
    axes.set(xscale="log", yscale="log", xlabel="FLOP / byte", ylabel="GFLOP/s", title=f"{report.backend}: MLA decode")
    axes.legend()


def _scaling(axes: Any, report: MlaReport, axis: str, shared: str, results: list[CaseResult]) -> None:
    field, label = AXES[axis]
    limits = report.limits
    assert limits is not None
    xs = [_value(result, field) for result in results]
    axes.plot(xs, [limits.roofline(r.flop, r.moved) for r in results], color="black", label="limit")
    for name, pick in _contenders(report):
        drawn = [(_value(r, field), r, entry) for r in results if (entry := pick(r))]
        if drawn:
            rates = [r.flop / entry.seconds.p50 / 1e9 for _, r, entry in drawn]
            low = [r.flop / entry.seconds.p90 / 1e9 for _, r, entry in drawn]
            high = [r.flop / entry.seconds.p10 / 1e9 for _, r, entry in drawn]
            mine = name == report.backend
            (line,) = axes.plot([x for x, _, _ in drawn], rates, marker="o" if mine else "x", label=name,
                                linewidth=2 if mine else 1)  # fmt: skip
            axes.fill_between([x for x, _, _ in drawn], low, high, alpha=0.15, color=line.get_color())
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="GFLOP/s (band: p10–p90)", title=shared)
    axes.set_xticks(xs, [str(x) for x in xs], minor=False)
    axes.minorticks_off()
    axes.legend(fontsize="small")


def _contenders(report: MlaReport) -> Iterator[tuple[str, Callable[[CaseResult], Entry | None]]]:
    """Every name with a way to find its timed entry in a case."""
    names = dict.fromkeys(peer.name for result in report.results for peer in result.peers)
    yield report.backend, lambda result: result.backend if result.backend.samples else None
    for name in names:
        yield (
            name,
            lambda result, name=name: next(  # type: ignore[misc]
                (peer for peer in result.peers if peer.name == name and peer.samples), None
            ),
        )


def _value(result: CaseResult, field: str) -> int:
    return int(getattr(result.case, field))


def _shared(key: MlaCase, field: str) -> str:
    """The case's name without the part that varies."""
    letter = {"s_k": "s", "b": "b", "h_q": "h", "threads": "t"}[field]
    return "_".join(part for part in key.name.split("_") if part != f"{letter}1")


def _save(figure: Any, file: Path, machine: Machine) -> Path:
    text = f"{machine.processor}; threads: {machine.threads}; {machine.date}"
    figure.supxlabel(text, fontsize=7, color="gray")
    figure.savefig(file, metadata={"Date": None})
    return file
