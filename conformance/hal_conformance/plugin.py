"""The suite as a pytest plugin: ``pytest --pyargs hal_conformance --hal-backend NAME``, one test an obligation.

Without ``--hal-backend`` the plugin does nothing to any other test run.
"""

from __future__ import annotations

from pathlib import Path

import pytest

_SESSION: pytest.StashKey[object] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the suite."""
    group = parser.getgroup("hal conformance")
    group.addoption("--hal-backend", metavar="NAME", help="The backend to test.")
    group.addoption("--hal-mode", choices=("quick", "default", "full"), default="default", help="How many cases.")
    group.addoption("--hal-seed", type=int, default=None, metavar="N", help="Replay a run; default fresh.")
    group.addoption("--hal-only", action="append", default=[], metavar="ID", help="An obligation or level.")
    group.addoption("--hal-waivers", type=Path, default=None, metavar="FILE", help="A TOML file of known failures.")
    group.addoption(
        "--hal-report", type=Path, default=None, metavar="FOLDER", help="Write report.json and report.html."
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start a session if a backend is named; a wrong request ends pytest with 2."""
    name = config.getoption("--hal-backend")
    if not name:
        return
    from hal import plugins
    from hal.spec.errors import HalError
    from hal_conformance import waivers
    from hal_conformance.context import Settings
    from hal_conformance.session import Session, fresh_seed
    from hal_conformance.table import BY_ID, LEVEL_IDS, of_level

    if hasattr(config, "workerinput") or config.getoption("numprocesses", None):
        pytest.exit("hal conformance: one report needs one process; run without -n", returncode=2)
    known = plugins.registry().names()
    if name not in known:
        pytest.exit(f"hal conformance: no installed backend is called {name!r}; there is: {known}", returncode=2)
    only: list[str] = []
    for word in config.getoption("--hal-only"):
        if word not in BY_ID and word not in LEVEL_IDS:
            pytest.exit(f"hal conformance: no obligation or level is called {word!r}", returncode=2)
        only += [word] if word in BY_ID else [o.id for o in of_level(word)]
    path, seed = config.getoption("--hal-waivers"), config.getoption("--hal-seed")
    try:
        found = waivers.read(path) if path is not None else {}
    except HalError as error:
        pytest.exit(f"hal conformance: {error}", returncode=2)
    settings = Settings(name, fresh_seed() if seed is None else seed, config.getoption("--hal-mode"))
    session = Session(settings, only, None, found, fresh=seed is None, host="pytest")
    session.learn()
    if session.facts.get("state") == "unavailable" and session.facts.get("reason"):
        session.close()
        pytest.exit(f"hal conformance: {name} is not available: {session.facts['reason']}", returncode=2)
    config.stash[_SESSION] = session


def pytest_report_header(config: pytest.Config) -> str | None:
    """Name the backend and the seed."""
    session = current(config)
    return None if session is None else f"hal conformance: {session.command()}"


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the worker process."""
    session = current(config)
    if session is not None:
        session.close()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the report, and see to it that a run that shows nothing, or breaks a waiver's rules, is no success."""
    conformance = current(session.config)
    if conformance is None:
        return
    ran = any(r.status in ("PASS", "WAIVED", "FAIL", "CRASH", "TIMEOUT") for r in conformance.results.values())
    if (not ran or conformance.waiver_problems()) and exitstatus in (
        pytest.ExitCode.OK,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    folder = session.config.getoption("--hal-report")
    if folder is not None and conformance.results:
        from hal_conformance import html, report

        made = report.make(conformance)
        report.write(made, folder / "report.json")
        html.write(made, folder / "report.html")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The verdict of every level."""
    session = current(config)
    if session is None:
        return
    from hal_conformance.verdict import levels

    terminalreporter.section("hal conformance")
    for row in levels({r.id: r.status for r in session.results.values()}):
        terminalreporter.line(f"{row['id']}  {row['verdict']:<10} {row['title']}")
    for text in session.waiver_problems():
        terminalreporter.line(f"FAIL: {text}", red=True)
    for text in session.notes():
        terminalreporter.line(f"note: {text}", yellow=True)


def current(config: pytest.Config):  # type: ignore[no-untyped-def]
    """The running `hal_conformance.session.Session`, or None."""
    return config.stash.get(_SESSION, None)
