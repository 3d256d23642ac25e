"""``hal demo``: a DeepSeek-V3-shaped decode through the HAL, checked against the reference and timed."""

from __future__ import annotations

import enum
import os
import secrets
import statistics
from typing import TYPE_CHECKING, Annotated, Final

import typer

from hal.cli.status import InForce, choose
from hal.cli.text import console, plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.text import Text

    from hal.cli.rehearsal import Rehearsal
    from hal.cli.verify import Agreement
    from hal.cli.workload import Shape

HELP: Final = (
    "Decode a batch of sequences of different lengths with the attention of DeepSeek-V3 (h_q 128, h_kv 1, d 576, "
    "d_v 512, pages of 64 tokens in shuffled order, causal), compare with the float64 reference, and say how fast it "
    "was.\n\n"
    "FLOP = 2 · h_q · (d + d_v) · keys attended, summed over queries. Bytes = q + each cached row once + out. "
    "Tokens/s = new tokens of all steps over the time in hal.mla_decode of all layers. Plans are timed apart.\n\n"
    "Exits with 0 on PASS, 1 on FAIL, 2 if the backend cannot be used or the command line is wrong."
)

EVIDENCE: Final = {
    "hardware": "the kernels run on the chip itself",
    "simulation": "the kernels run in a simulator: right answers count, speed does not",
    "compiled": "the kernels are only compiled here",
}


class Dtype(str, enum.Enum):
    """Element types of q and the cache, as options spell them."""

    BF16 = "bf16"
    FP16 = "fp16"
    FLOAT32 = "float32"


_TORCH_NAMES: Final = {Dtype.BF16: "bfloat16", Dtype.FP16: "float16", Dtype.FLOAT32: "float32"}


def demo(
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="Overrides HAL_BACKEND.")] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences.")] = 8,
    max_len: Annotated[int, typer.Option(metavar="N", min=1, help="The longest a sequence may become.")] = 4096,
    layers: Annotated[
        int, typer.Option(metavar="N", min=1, help="Layers, each with a cache; all use one plan a step.")
    ] = 8,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Decode steps; each appends to every cache.")] = 2,
    s_q: Annotated[int, typer.Option("--s-q", metavar="N", min=1, help="New tokens a sequence and step.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Element type of q and the cache.")] = Dtype.BF16,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Repeat a run; a fresh one if absent.")
    ] = None,
    check: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Results to compare, one a sequence, layer and step, drawn at random; 0: all."
        ),
    ] = 64,
) -> None:
    """Run a DeepSeek-V3-shaped decode, compare it with the reference, and time it."""
    import torch

    from hal.cli.workload import Shape

    shape = Shape(batch, max_len, layers, steps, s_q, getattr(torch, _TORCH_NAMES[dtype]))
    _require_room(shape)
    chosen = choose(backend)
    assert chosen.selected is not None
    out = console()
    number = secrets.randbits(32) if seed is None else seed
    rehearsal, agreement, compared = _run(out, chosen, shape, number, check)
    _print_speed(out, rehearsal)
    _print_verdict(out, agreement, compared, batch * layers * steps)
    raise typer.Exit(0 if agreement.passed else 1)


def _require_room(shape: Shape) -> None:
    appended = shape.steps * shape.s_q
    if shape.max_len < appended:
        raise typer.BadParameter(
            f"{shape.max_len} is less than the {appended} tokens that {shape.steps} steps of {shape.s_q} append",
            param_hint="'--max-len'",
        )
    needed = shape.bytes_at_most()
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise typer.BadParameter(
            f"these sizes may need {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB is free",
            param_hint="'--batch', '--max-len' and '--layers'",
        )


def _run(out: Console, chosen: InForce, shape: Shape, seed: int, check: int) -> tuple[Rehearsal, Agreement, int]:
    from hal.cli.rehearsal import Rehearsal
    from hal.cli.verify import Agreement

    assert chosen.selected is not None
    rehearsal = Rehearsal(chosen.selected, shape, seed)
    _print_setting(out, chosen, rehearsal, seed)
    picks = rehearsal.picks(check)
    agreement = Agreement()
    with _progress() as progress:
        for _ in progress.track(rehearsal.workload.build(), shape.layers, description="filling the caches"):
            pass
        for _ in progress.track(rehearsal.decode(), shape.steps * shape.layers, description="decoding"):
            pass
        for found in progress.track(rehearsal.compare(picks), len(picks), description="checking"):
            agreement += found
    return rehearsal, agreement, len(picks)


def _progress() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    to = console(stderr=True)
    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=to, disable=not to.is_terminal)


def _print_setting(out: Console, chosen: InForce, rehearsal: Rehearsal, seed: int) -> None:
    from hal import plugins

    selected, shape = rehearsal.selected, rehearsal.workload.shape
    status = plugins.registry().status(selected.name)
    lengths = rehearsal.workload.lengths(shape.steps)
    dtype = str(shape.dtype).removeprefix("torch.")
    evidence = status.probe.evidence if status.probe is not None else "compiled"
    rows = {
        "backend": f"{selected.name} ({status.distribution}), {chosen.why}",
        "device": f"{rehearsal.device}: {status.reason}",
        "evidence": f"{evidence}: {EVIDENCE[evidence]}",
        "attention": f"h_q {shape.h_q}, h_kv {shape.h_kv}, d {shape.head_dim}, d_v {shape.head_dim_v}, {dtype}, "
        f"pages of {shape.page_size} shuffled, causal, s_q {shape.s_q}",
        "batch": f"{shape.batch} sequences of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all; "
        f"{shape.steps} steps of {shape.layers} layers, one plan a step",
        "seed": f"{seed} (--seed {seed} repeats this run)",
    }
    _print_rows(out, rows)


def _print_speed(out: Console, rehearsal: Rehearsal) -> None:
    work, seconds = rehearsal.workload, sum(map(sum, rehearsal.seconds))
    shape = work.shape
    flop = sum(work.flop(step) for step in range(shape.steps)) * shape.layers
    moved = sum(work.bytes(step) for step in range(shape.steps)) * shape.layers
    layer_ms = 1e3 * statistics.median(one for step in rehearsal.seconds for one in step)
    plan_ms = 1e3 * statistics.median(rehearsal.plan_seconds)
    tokens = shape.batch * shape.s_q * shape.steps / seconds
    rows = {
        "time": f"{layer_ms:.3g} ms a layer and {plan_ms:.3g} ms a plan (medians), {seconds:.3g} s of decode in all",
        "speed": f"{tokens:.4g} tokens/s through {shape.layers} layers, {flop / seconds / 1e9:.4g} GFLOP/s, "
        f"{moved / seconds / 1e9:.3g} GB/s",
    }
    launches = rehearsal.launches()
    if launches:
        rows["kernels"] = ", ".join(f"{name} ×{count}" for name, count in launches.items())
    _print_rows(out, rows)


def _print_verdict(out: Console, agreement: Agreement, compared: int, results: int) -> None:
    from rich.text import Text

    from hal.cli.verify import LIMITS

    which = f"all {results}" if compared == results else f"{compared} of {results}"
    _print_rows(
        out,
        {
            "checked": f"{which} results (one a sequence, layer and step), {agreement.rows} rows: {LIMITS}",
            "worst row": f"out off by {agreement.out_error:.2g}, cosine difference {agreement.cosine:.2g}, "
            f"lse off by {agreement.lse_error:.2g}",
        },
    )
    verdict: Text
    if agreement.passed:
        verdict = Text.assemble(("PASS", "bold green"), f"  all {agreement.rows} rows agree with the reference")
    else:
        verdict = Text.assemble(
            ("FAIL", "bold red"), f"  {agreement.wrong} of {agreement.rows} rows are wrong; {agreement.first_wrong}"
        )
    out.print(verdict)


def _print_rows(out: Console, rows: dict[str, str]) -> None:
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=9, style="dim")
    grid.add_column(overflow="fold")
    for key, value in rows.items():
        grid.add_row(key, plain(value))
    out.print(grid)
