"""What a run of the suite says is next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hal_conformance import next_step as module
from hal_conformance.next_step import next_step, steps, unavailable
from hal_conformance.process import ending
from hal_conformance.table import OBLIGATIONS
from hal_conformance.verdict import levels


def report(
    mode: str = "default", certified: bool = False, only: tuple[str, ...] = (), patience: float = 1, **statuses: str
) -> dict[str, Any]:
    """Of a run in which all passes but these; L3 and EP are not declared."""
    every = {o.id: "PASS" if o.level in ("L0", "L1", "L2") else "REFUSED" for o in OBLIGATIONS}
    every |= {name.replace("_", "-"): status for name, status in statuses.items()}
    return {
        "backend": {"name": "acme"},
        "run": {"mode": mode, "only": list(only), "case": None, "patience": patience},
        "obligations": [{"id": name, "status": status, "message": ""} for name, status in every.items()],
        "levels": levels(every),
        "problems": [],
        "certificate": {} if certified else None,
    }


@pytest.fixture
def marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a backend with two steps in it."""
    folder = tmp_path / "hal_acme"
    folder.mkdir()
    (folder / "backend.py").write_text("x = 1\n    # step CAP-04: declare it\n# step L1, L2: look at the driver\n")
    monkeypatch.setattr(module, "_folders", lambda backend: [folder] if backend == "acme" else [])
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_first_obligation_that_fails_is_named_with_its_line(marked: Path) -> None:
    said = next_step(report(CAP_04="FAIL", CAP_07="FAIL"))
    assert said[0].startswith("CAP-04, capabilities are data: Capabilities are exactly")
    assert said[1:] == ["write, in the backend: capabilities()", "hal_acme/backend.py:2: declare it"]


@pytest.mark.parametrize("status", ["FAIL", "CRASH", "TIMEOUT"])
def test_a_step_may_be_for_a_level(marked: Path, status: str) -> None:
    said = next_step(report(MLA_22=status))
    assert said[0].startswith("MLA-22, the tail of the last page: ")
    assert said[1].startswith("write, in the backend: mla_decode()")
    assert said[2] == "hal_acme/backend.py:3: look at the driver"


def test_an_interrupted_run_is_to_be_made_again() -> None:
    said = next_step(report("full", MLA_22="SKIPPED"))
    assert said == ["what was run holds, and the run was interrupted; all of it: hal conform --backend acme --full"]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        ("ERROR", f"the judge {ending(-9)}"),
        ("CRASH", f"the worker {ending(-9)}"),
        ("FAIL", f"rank 1: it {ending(-15)}"),
    ],
)
def test_what_was_not_judged_is_to_be_run_again(marked: Path, status: str, message: str) -> None:
    made = report(MLA_22=status)
    next(row for row in made["obligations"] if row["id"] == "MLA-22")["message"] = message
    said = next_step(made)
    assert said[1:] == [
        f"it was not judged to its end: {message}",
        "run it again: hal conform --backend acme --only MLA-22",
    ]
    assert "again" not in " ".join(next_step(report(MLA_22="FAIL")))


def test_what_is_there_and_passes_elsewhere_is_to_be_mended(marked: Path) -> None:
    (marked / "backend.py").write_text("")
    assert next_step(report(MLA_22="FAIL"))[1].startswith("mend, in the backend: mla_decode()")
    assert next_step(report(EPN_01="FAIL"))[1].startswith("write, in the backend: ep_buffer()")


def test_a_waiver_that_is_wrong_is_what_is_next(marked: Path) -> None:
    problems = ["the waiver of MLA-02 is not used: it is PASS; remove it"]
    assert next_step(report(only=("MLA-02",)) | {"problems": problems}) == problems


def test_without_comments_the_place_is_the_package(marked: Path) -> None:
    (marked / "backend.py").write_text("# steps CAP-04 none of these\n# a step, CAP-04: nor this\n")
    assert next_step(report(CAP_04="FAIL"))[2:] == ["in hal_acme"]
    assert unavailable("acme")[1:] == ["in hal_acme"]


def test_every_obligation_has_something_to_write(marked: Path) -> None:
    for obligation in OBLIGATIONS:
        said = next_step(report(**{obligation.id.replace("-", "_"): "FAIL"}))
        assert said[0].startswith(f"{obligation.id}, ") and said[1].startswith(
            ("write, in the backend: ", "mend, in the backend: ")
        )


def test_what_holds_is_said_with_the_first_level_that_is_open(marked: Path) -> None:
    quick, plain, certified = (next_step(report("quick")), next_step(report()), next_step(report(certified=True)))
    assert quick[0].endswith("without --quick it certifies: hal conform --backend acme")
    assert "why it does not certify" in plain[0] and certified[0].endswith("the report certifies it")
    assert quick[1:] == plain[1:] == certified[1:]
    assert quick[1].startswith("not declared yet: L3, ")
    (marked / "backend.py").write_text("# step L3: packed caches\n")
    assert next_step(report())[-1] == "hal_acme/backend.py:1: packed caches"
    assert next_step(report(only=("L0",))) == ["what was run holds; the rest: hal conform --backend acme --quick"]
    assert next_step(report("full", only=("L0",)))[0].endswith("the rest: hal conform --backend acme --full")


def test_what_is_said_to_be_run_next_has_the_patience_of_this_run(marked: Path) -> None:
    (said,) = next_step(report(only=("L0",), patience=4))
    assert said.endswith("the rest: hal conform --backend acme --quick --patience 4")
    assert next_step(report("quick", patience=1.5))[0].endswith(
        "it certifies: hal conform --backend acme --patience 1.5"
    )


def test_files_are_found_without_importing_the_backend() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from hal_conformance.next_step import steps, _folders; steps('cpu', ['L1']); "
        "print([p.name for p in _folders('cpu')], 'hal_cpu' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['hal_cpu'] False\n"
    assert steps("nobody", ["L1"]) == []
