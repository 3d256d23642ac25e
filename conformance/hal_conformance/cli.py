"""The command ``hal conform``: runs the suite, verifies, compares and explains its reports.

Exit codes: 0 the answer is yes, 1 the answer is no, 2 the request is wrong.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from hal import plugins
from hal.spec.errors import HalError, SpecError
from hal_conformance.table import BY_ID, LEVEL_IDS, Mode, of_level

# `hal --help` describes this command too: what loads torch or writes reports is imported where it is used.
if TYPE_CHECKING:
    from rich.console import Console

    from hal_conformance.interrupts import Interrupts
    from hal_conformance.session import Session

app = typer.Typer(
    name="conform",
    help="Decide whether a backend keeps the specification, and say what to fix where it does not.",
    epilog="Exit codes: 0 the answer is yes, 1 the answer is no, 2 the request is wrong.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_CASE = re.compile(r"([A-Z0-9]+-\d+)@(\d+)\.(\d+)")
Backend = Annotated[
    str, typer.Option("--backend", "-b", help="Name of the backend; default HAL_BACKEND.", envvar="HAL_BACKEND")
]


def wrong_request(message: str) -> NoReturn:
    """Say one line and exit with 2."""
    typer.echo(f"hal conform: {message}", err=True)
    raise typer.Exit(2)


def parse_case(text: str) -> tuple[str, int, int]:
    """``MLA-07@SEED.INDEX`` as obligation, seed, index."""
    found = _CASE.fullmatch(text)
    if found is None or found[1] not in BY_ID:
        wrong_request(f"--case {text}: not a case; one reads like MLA-07@12345.3, as a failure prints it")
    return found[1], int(found[2]), int(found[3])


def chosen(only: list[str]) -> list[str]:
    """Obligation ids from ids and levels."""
    ids: list[str] = []
    for word in only:
        if word in BY_ID:
            ids.append(word)
        elif word in LEVEL_IDS and of_level(word):
            ids += [o.id for o in of_level(word)]
        else:
            wrong_request(f"--only {word}: no obligation or level of that name; see docs/spec.md or 'hal conform spec'")
    return ids


def require_writable(file: Path) -> None:
    """Refuse a place for results before there are any."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        wrong_request(f"--out: nothing can be written to {file}: {error.strerror}")
    if file.is_dir():
        wrong_request(f"--out: {file} is a folder, and a file is to be written there")


def require_backend(name: str) -> None:
    """Exit with 2 unless an installed distribution registers the backend."""
    known = plugins.registry().names()
    if not name:
        wrong_request(f"say which backend: --backend NAME, one of {', '.join(known) or 'none installed'}")
    if name not in known:
        wrong_request(f"no installed backend is called {name!r}; there is: {', '.join(known) or 'none'}")


@app.callback(invoke_without_command=True)
def conform(
    context: typer.Context,
    backend: Backend = "",
    quick: Annotated[bool, typer.Option("--quick", help="A minute; certifies nothing.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every published shape and many more cases; hours.")] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="An obligation or level; may be repeated. Certifies nothing.")
    ] = None,
    case: Annotated[str, typer.Option("--case", help="Run just this case, as a failure prints it.")] = "",
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Replay a run; default fresh.")] = None,
    waivers: Annotated[Path | None, typer.Option("--waivers", help="A TOML file of known failures.")] = None,
    against: Annotated[Path | None, typer.Option("--against", help="An older report.json to compare with.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for report.json and report.html.")] = Path(
        "conformance-report"
    ),
    tighten: Annotated[float, typer.Option("--tighten", help="A factor of at most 1 on all limits.")] = 1.0,
    patience: Annotated[
        float, typer.Option("--patience", min=0.01, help="A factor on all timeouts, for simulators.")
    ] = 1.0,
    device: Annotated[str, typer.Option("--device", help="A torch device; default the first type declared.")] = "",
    ranks: Annotated[
        int, typer.Option("--ranks", min=0, max=64, help="Ranks of every group that may have any. Certifies nothing.")
    ] = 0,
) -> None:
    """Run the suite against a backend."""
    from hal_conformance import alone
    from hal_conformance.interrupts import Interrupts

    if context.invoked_subcommand is not None:
        _refuse_options(context, context.invoked_subcommand)
        alone.load()
        return
    interrupts = context.with_resource(Interrupts())
    alone.load()
    from hal.spec.limits import DENSE_OUT
    from hal_conformance import waivers as waiver_file
    from hal_conformance.context import Settings
    from hal_conformance.session import Session, fresh_seed
    from hal_conformance.verify import read_to_compare

    require_backend(backend)
    if quick and full:
        wrong_request("--quick and --full exclude each other")
    try:
        DENSE_OUT.tightened(tighten)
        if not math.isfinite(patience):
            raise SpecError("--patience", patience, "a finite factor")
        known = waiver_file.read(waivers) if waivers is not None else {}
        older = read_to_compare(against) if against is not None else None
    except HalError as error:
        wrong_request(str(error))
    if case and (seed is not None or only):
        wrong_request(f"--case {case} names its obligation and its seed: leave out --only and --seed")
    require_writable(out / "report.json")
    mode: Mode = "quick" if quick else "full" if full else "default"
    ids, index = chosen(only or []), None
    if case:
        obligation, seed, index = parse_case(case)
        ids = [obligation]
    settings = Settings(backend, fresh_seed() if seed is None else seed, mode, tighten, device, patience, ranks)
    session = Session(settings, ids, index, known, fresh=seed is None)
    raise typer.Exit(_run(session, out, older, interrupts))


def _refuse_options(context: typer.Context, command: str) -> None:
    """Nothing that was asked for is dropped: options of a run before the name of another command."""
    given = [
        option.opts[0]
        for option in context.command.params
        if option.name and getattr(context.get_parameter_source(option.name), "name", "") == "COMMANDLINE"
    ]
    if given:
        wrong_request(f"{', '.join(given)} before {command} would not be heard: write options after its name")


def require_device(session: Session) -> None:
    """Exit with 2 unless the backend declares the type of the device that was asked for."""
    import torch

    asked, declared = session.settings.device, session.capabilities
    if not asked or declared is None:
        return
    try:
        known = torch.device(asked).type in declared.device_types
    except RuntimeError:
        known = False
    if not known:
        wrong_request(f"--device {asked}: {session.settings.backend} has {', '.join(declared.device_types)}")


def _run(session: Session, out: Path, older: dict[str, Any] | None, interrupts: Interrupts) -> int:
    from rich.console import Console

    from hal_conformance import diff, html, next_step, progress
    from hal_conformance import report as reports
    from hal_conformance.interrupts import WRITING

    console = Console()
    console.print(f"[bold]{session.settings.backend}[/], {session.settings.mode} run, seed {session.settings.seed}")
    roofline = None
    try:
        with interrupts.running():
            _learn(session, console)
            progress.play(session, console)
            roofline = _roofline(session)
    except KeyboardInterrupt:
        session.leave_the_rest()
        console.print(
            f"  interrupted: what was not run is left out of the report, which shows the rest and is being written, "
            f"in {WRITING} s at most",
            highlight=False,
            soft_wrap=True,
        )
    except SpecError as error:
        wrong_request(str(error))
    finally:
        session.close()
    report = reports.make(session, roofline)
    rows, name = (None, "") if older is None else (diff.diff(older, report), diff.name_of(older))
    reports.write(report, out / "report.json")
    html.write(report, out / "report.html", rows, name)
    _summary(console, report, rows, name, out)
    _say_next(console, next_step.next_step(report))
    held = report["verdict"] in ("PASS", "WAIVED", "INCOMPLETE") and not session.interrupted
    return 0 if held else 1


def _learn(session: Session, console: Console) -> None:
    """Start the processes and ask what the backend is; exit with 2 where nothing can be tested."""
    from hal_conformance import next_step

    # Both take seconds to import what they need, at the same time.
    session.witness.start()
    session.learn()
    reason = session.facts.get("reason")
    if session.facts.get("state") == "unavailable" and reason:
        name = session.settings.backend
        _say_next(console, next_step.unavailable(name))
        wrong_request(f"{name} is not available on this machine, so nothing can be tested: {reason}")
    require_device(session)


def _roofline(session: Session) -> dict[str, Any] | None:
    """Measured only where decode works and nothing was filtered out."""
    from hal_conformance.session import RED

    works = all(r.status not in RED for r in session.results.values() if r.obligation.level in ("L0", "L1"))
    if session.only or not works:
        return None
    request = {"op": "roofline", "settings": dataclasses.asdict(session.settings)}
    try:
        answer = session.worker.ask(request, 300.0 * session.settings.patience)
    except Exception:
        # Shown, not judged: a report without it is complete.
        return None
    return None if "error" in answer else answer


def _summary(
    console: Console, report: dict[str, Any], rows: list[dict[str, str]] | None, older: str, out: Path
) -> None:
    console.print()
    for level in report["levels"]:
        colour = {"PASS": "green", "FAIL": "bold red", "WAIVED": "yellow"}.get(level["verdict"], "dim")
        console.print(f"  {level['id']}  [{colour}]{level['verdict']:<10}[/] {level['title']}", highlight=False)
    for text in report["problems"]:
        console.print(f"  [bold red]FAIL[/] {text}", highlight=False)
    for text in report["notes"]:
        console.print(f"  [yellow]note[/] {text}", highlight=False, soft_wrap=True)
    if rows is not None:
        console.print(f"\nAgainst {older}:" if rows else f"\nNo difference from {older}.", markup=False, soft_wrap=True)
        for row in rows:
            console.print(
                f"  {row['kind']:<8} {row['what']}: {row['then']} → {row['now']}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
    console.print(f"\n[bold]{report['headline']}[/]", highlight=False, soft_wrap=True)
    console.print(f"{out / 'report.html'}  {out / 'report.json'}", highlight=False, soft_wrap=True)


def _say_next(console: Console, lines: list[str]) -> None:
    console.print("\n[bold]next step[/]")
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def verify(report: Annotated[Path, typer.Argument(help="A report.json.")]) -> None:
    """Check a report and its certificate again, offline."""
    from hal_conformance import report as reports
    from hal_conformance import verify as verifying
    from hal_conformance.sizes import sentence

    try:
        read = reports.read(report)
    except HalError as error:
        wrong_request(str(error))
    errors, notes = verifying.verify(read)
    for text in notes:
        typer.echo(f"note: {text}")
    for text in errors:
        typer.echo(f"FAIL: {text}")
    if not errors:
        held = read["certificate"]
        waived = ", ".join(w["obligation"] for w in held["waivers"]) or "none"
        typer.echo(
            f"the certificate holds: {held['distribution']}, levels {', '.join(held['levels'])}, waived: {waived}"
        )
        if held["sizes"]:
            typer.echo(f"compared with the reference: {sentence(held['sizes'])}")
    raise typer.Exit(1 if errors else 0)


@app.command()
def bisect(
    case: Annotated[str, typer.Argument(help="A case, as a failure prints it: MLA-07@12345.3.")], backend: Backend = ""
) -> None:
    """Compare one case stage by stage with the reference: scores, row maximum, row sum, partial and merged results."""
    from hal_conformance.context import Settings
    from hal_conformance.session import Session

    require_backend(backend)
    obligation, seed, index = parse_case(case)
    if not BY_ID[obligation].covered:
        wrong_request(f"{case}: {obligation} is not tested by this suite yet, so it has no cases")
    if not obligation.startswith("MLA"):
        wrong_request(f"{case} cannot be bisected: only a decode has stages, and {obligation} is about something else")
    session = Session(Settings(backend, seed), [obligation], index)
    request = {
        "op": "bisect",
        "settings": dataclasses.asdict(session.settings),
        "obligation": obligation,
        "index": index,
    }
    try:
        answer = session.worker.ask(request, 300.0)
    except Exception as error:
        typer.echo(f"the process was lost: {error}\n{getattr(error, 'output', '')}", err=True)
        raise typer.Exit(1) from None
    finally:
        session.close()
    if answer.get("legal"):
        wrong_request(f"{case}: {obligation} has the cases {answer['legal']} of this seed")
    if answer.get("refused"):
        wrong_request(f"{case} cannot be bisected: {answer['refused']}")
    if "error" in answer:
        typer.echo(answer["error"], err=True)
        raise typer.Exit(1)
    typer.echo(f"the call: {answer['case']}")
    for row in answer["rows"]:
        typer.echo(f"  {'ok   ' if row['ok'] else 'WRONG'} {row['stage']:<14} {row['where']:<34} {row['worst']}")
    typer.echo(answer["verdict"])
    raise typer.Exit(0 if all(row["ok"] for row in answer["rows"]) else 1)


@app.command()
def matrix(
    files: Annotated[list[Path], typer.Argument(help="report.json files.")],
    out: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("matrix.html"),
) -> None:
    """Write a compatibility matrix from many reports: what was seen, not what is claimed."""
    from hal_conformance import diff, html
    from hal_conformance.verify import read_to_compare

    try:
        table = diff.matrix([read_to_compare(path) for path in files])
    except HalError as error:
        wrong_request(str(error))
    require_writable(out)
    html.write_matrix(table, out)
    typer.echo(str(out))


@app.command()
def spec() -> None:
    """Print the obligations as the text of docs/spec.md."""
    from hal_conformance import docs

    typer.echo(docs.spec(), nl=False)
