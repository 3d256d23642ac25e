"""``hal bench``: how fast a backend is, against the machine's limits and against other implementations."""

from __future__ import annotations

import difflib
import enum
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from hal.cli.bench_support import (
    AgainstOption,
    BackendOption,
    JsonOption,
    RecordOption,
    about,
    earlier_run,
    progress_bar,
    require_writable,
    show,
    watcher,
    write,
)
from hal.cli.status import choose, plugins_to_stderr
from hal.cli.text import console

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.text import Text

    from hal.bench.cases import MlaCase
    from hal.bench.machine import Machine
    from hal.bench.mla import MlaReport
    from hal.bench.peers import Peer
    from hal.bench.text import Attendance

app = typer.Typer(
    name="bench",
    help="Measure a backend against the limits of the machine and against other implementations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

MLA_HELP: Final = (
    "Time MLA decode: the backend and every peer that is installed, in interleaved rounds with the limits of the "
    "machine, each checked against the float64 reference first. A wrong result gets no speed.\n\n"
    "Exits with 0 when measured, 1 if a result of the backend is wrong or it raised, 2 if the request is wrong."
)

OVERHEAD_HELP: Final = (
    "Measure what hal.mla_decode adds to the backend's own call, the validation alone at each level, and what import "
    "hal adds to import torch.\n\nExits with 0 when measured, 2 if the request is wrong."
)

EP_HELP: Final = (
    "Time expert-parallel dispatch and combine between processes of this machine, in turns with torch.distributed's "
    "all_to_all_single (gloo's, or the device's own library) and, where installed, MPI's Alltoallv or DeepEP.\n\n"
    "Exits with 0 when measured, 2 if the request is wrong."
)

ROUNDS: Final = 15


class Clock(str, enum.Enum):
    """What is read before and after a call."""

    WALL = "wall"
    CPU = "cpu"


QUICK_SECONDS: Final = 38.0
"""When --quick stops beginning rounds: checking, the last round and the imports fit in the rest of its minute."""


@app.command("mla", help=MLA_HELP)
def mla(
    backend: BackendOption = None,
    peer: Annotated[
        list[str] | None,
        typer.Option("--peer", metavar="NAME", help="Only this peer; may be repeated; 'none' for none."),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option("--case", metavar="CASE", help="Only this case, e.g. b4_h128_s1024; may be repeated."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few cases, within a minute.")] = False,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=3, max=10_000, help=f"Rounds; {ROUNDS} if absent.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads for every contender; all if absent.")
    ] = None,
    clock: Annotated[
        Clock, typer.Option("--clock", help="cpu: processor time, for --threads 1 on a machine shared with others.")
    ] = Clock.WALL,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Of the inputs.")] = 0,
    json_file: JsonOption = None,
    record_file: RecordOption = None,
    against: AgainstOption = None,
    plots: Annotated[
        Path | None, typer.Option("--plots", metavar="DIR", help="Roofline and scaling; needs kernel-hal\\[bench].")
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="List cases and peers and stop.")] = False,
) -> None:
    """Time MLA decode."""
    import torch

    from hal.bench import mla_report, mla_show, report, text
    from hal.bench.machine import Machine
    from hal.bench.mla import Settings, run

    started = time.monotonic()
    count = threads or torch.get_num_threads()
    cases = _cases(case or [], quick, count)
    if clock is Clock.CPU and any(number != 1 for number in (count, *(c.threads or count for c in cases))):
        raise typer.BadParameter(
            "processor time says nothing of several threads: add --threads 1", param_hint="'--clock'"
        )
    wanted = _peers(peer or [])
    earlier = earlier_run(against)
    require_writable(json=json_file, record=record_file)
    _require_plots(plots)
    chosen = choose(backend)
    assert chosen.selected is not None
    device = torch.device(chosen.selected.capabilities.device_types[0])
    with plugins_to_stderr():
        present = [_attendance(one, device) for one in wanted]
    out = console()
    if list_only:
        show(out, _listing(cases, present))
        return
    _require_room(cases, device)
    machine = Machine.here(count, about(chosen))
    show(out, text.heading(machine, chosen.selected.name, present))
    deadline = started + QUICK_SECONDS if quick and rounds is None else None
    settings = Settings(count, rounds or ROUNDS, deadline, seed, cpu_time=clock is Clock.CPU)
    with progress_bar() as progress:
        here = [one for one, found in zip(wanted, present, strict=True) if not found.out]
        found = run(chosen.selected, cases, here, settings, watcher(progress))
    show(out, mla_show.results(found))
    show(out, mla_show.summary(found))
    _keep(out, found, machine, json_file, record_file, plots)
    if earlier is not None:
        show(out, text.comparison(*report.changes(earlier, mla_report.document(found, machine))))
    raise typer.Exit(0 if found.right else 1)


@app.command("overhead", help=OVERHEAD_HELP)
def overhead(
    backend: BackendOption = None,
    rounds: Annotated[int, typer.Option(min=3, max=100_000, help="Rounds.")] = 200,
    imports: Annotated[int, typer.Option(min=0, max=1000, help="Fresh interpreters to time the imports in.")] = 5,
    json_file: JsonOption = None,
) -> None:
    """Measure what the HAL adds."""
    from hal.bench import overhead as costs
    from hal.bench import text
    from hal.bench.machine import Machine

    require_writable(json=json_file)
    chosen = choose(backend)
    assert chosen.selected is not None
    out = console()
    show(out, text.heading(Machine.here(1, about(chosen)), chosen.selected.name, ()))
    with progress_bar() as progress:
        found = costs.run(chosen.selected, rounds, imports, watcher(progress))
    show(out, costs.lines(found))
    write(json_file, costs.document(found))


@app.command("ep", help=EP_HELP)
def ep(
    backend: BackendOption = None,
    ranks: Annotated[
        list[int] | None, typer.Option(min=1, max=64, help="Group size; may be repeated; 2 and 4, 2 with --quick.")
    ] = None,
    published: Annotated[
        bool,
        typer.Option("--published", help="The cases of which DeepEP's figures were published, by its formulas too."),
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A few cases, within a minute.")] = False,
    seconds: Annotated[
        float | None, typer.Option(min=0.2, max=600.0, help="For each case, all sides together; 2, 1.5 with --quick.")
    ] = None,
    budget: Annotated[
        float, typer.Option(min=1.0, max=86_400.0, help="Seconds after which no further case is begun.")
    ] = 86_400.0,
    json_file: JsonOption = None,
) -> None:
    """Time expert-parallel calls."""
    from hal.bench import ep as instrument

    if published and quick:
        raise typer.BadParameter("give --quick or --published, not both", param_hint="'--published'")
    require_writable(json=json_file)
    chosen = choose(backend).selected
    assert chosen is not None
    if chosen.capabilities.ep is None:
        raise typer.BadParameter(f"{chosen.name} declares no expert parallelism", param_hint="'--backend'")
    where = instrument.Where(chosen.name, chosen.capabilities.device_types[0])
    shown, found = instrument.measure(ranks or ([2] if quick else [2, 4]), quick, seconds, published, where, budget)
    typer.echo(shown)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n")


def _cases(names: Sequence[str], quick: bool, threads: int) -> Sequence[MlaCase]:
    from hal.bench.cases import QUICK, MlaCase, standard

    if names and quick:
        raise typer.BadParameter("give --quick or --case, not both", param_hint="'--quick'")
    try:
        chosen = [MlaCase.parse(name) for name in names]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--case'") from None
    return tuple(dict.fromkeys(chosen)) or (QUICK if quick else standard(threads))


def _peers(names: Sequence[str]) -> list[Peer]:
    from hal.bench.peers import MLA_PEERS

    known = {peer.name: peer for peer in MLA_PEERS}
    if list(names) == ["none"]:
        return []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            legal = ", ".join([*known, "none"])
            raise typer.BadParameter(f"no peer is called {name!r}.{hint} There are: {legal}", param_hint="'--peer'")
    return [peer for peer in MLA_PEERS if not names or peer.name in names]


def _attendance(peer: Peer, device: torch.device) -> Attendance:
    from hal.bench.text import Attendance

    out = peer.elsewhere(device)
    what = ""
    if not out:
        found = peer.presence()
        what, out = (found.what, "") if found.here else ("", found.what)
    return Attendance(peer.name, peer.summary, peer.install, peer.lacks, what, out)


def _require_plots(folder: Path | None) -> None:
    if folder is None:
        return
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise typer.BadParameter("plots need matplotlib: pip install 'kernel-hal[bench]'", param_hint="'--plots'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"{folder} cannot be made: {error.strerror}", param_hint="'--plots'") from None


def _require_room(cases: Sequence[MlaCase], device: torch.device) -> None:
    import torch

    from hal.bench.machine import free_memory
    from hal.bench.mla import footprint

    free = free_memory() if device.type == "cpu" else torch.get_device_module(device.type).mem_get_info()[0]
    for case in cases:
        needed = footprint(case, device)
        if needed > free:
            raise typer.BadParameter(
                f"{case.name} may need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB is free",
                param_hint="'--case'",
            )


def _listing(cases: Sequence[MlaCase], present: Sequence[Attendance]) -> Iterator[Text]:
    from rich.text import Text

    yield Text("cases", style="bold")
    for case in cases:
        yield Text(f"  {case.name}")
    yield Text("peers", style="bold")
    for peer in present:
        yield from peer.lines()


def _keep(
    out: Console,
    found: MlaReport,
    machine: Machine,
    json_file: Path | None,
    record_file: Path | None,
    plots: Path | None,
) -> None:
    from hal.bench import mla_report

    write(json_file, mla_report.document(found, machine))
    write(record_file, mla_report.record(found, machine))
    if plots is not None:
        from hal.bench.plots import draw

        for file, remark in draw(found, machine, plots):
            out.print(f"{file}: {remark}", soft_wrap=True)
