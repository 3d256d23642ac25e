"""Discovery and selection, with distributions that pip really installed and an interpreter that sees only those."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from distributions import BACKENDS, Distribution, Interpreter, fake_backend, install

import hal

MAJOR, MINOR = map(int, hal.SPEC_VERSION.split("."))


def changed(old: str, new: str, **options: Any) -> str:
    """The source of a working backend with one piece replaced."""
    source = fake_backend(**options)
    assert source.count(old) == 1, old
    return source.replace(old, new)


@dataclass(frozen=True)
class Case:
    """A distribution whose backend is out, and what must be said of it."""

    source: str
    state: str
    reason: str
    fix: str = "report it to the authors of hal-.* 1.0, or uninstall it"


CASES = {
    "importer": Case(
        'raise ImportError("libboom.so.3: cannot open")', "broken", "ImportError: libboom.so.3: cannot open"
    ),
    "exiter": Case('import sys; sys.exit("no licence")', "broken", "SystemExit: no licence"),
    "garbled": Case("def (:", "broken", "SyntaxError: .*"),
    "wordy": Case('raise RuntimeError("first line\\nsecond line")', "broken", "RuntimeError: first line"),
    "silent": Case("raise RuntimeError", "broken", "RuntimeError"),
    "minor": Case(
        fake_backend(spec_version=f"{MAJOR}.{MINOR + 1}"),
        "refused",
        f"written for specification {MAJOR}.{MINOR + 1}, this HAL speaks {hal.SPEC_VERSION}",
        "upgrade kernel-hal",
    ),
    "major": Case(
        fake_backend(spec_version=f"{MAJOR + 1}.0"),
        "refused",
        f"written for specification {MAJOR + 1}.0, this HAL speaks {hal.SPEC_VERSION}",
        "upgrade kernel-hal",
    ),
    "older": Case(
        fake_backend(spec_version=f"{MAJOR - 1}.9"),
        "refused",
        f"written for specification {MAJOR - 1}.9, this HAL speaks {hal.SPEC_VERSION}",
        "upgrade the backend",
    ),
    "unversioned": Case(fake_backend(spec_version="one"), "broken", "ValueError: spec_version .* got 'one'"),
    "hookless": Case("backend = 1", "broken", "TypeError: hal_hookless must implement the hook hal_backend.*"),
    "misspelt": Case(
        changed("def hal_backend()", "def hal_bakcend()"), "broken", "PluginValidationError: .*'hal_bakcend'.*"
    ),
    "classless": Case(changed("return Fake()", "return object()"), "broken", "TypeError: hal_classless .*Backend"),
    "partial": Case(changed("def launches", "def lunches"), "broken", "TypeError: .*abstract method '?launches.*"),
    "prober": Case(changed("return Probe(", "raise OSError('bus')\n        return Probe("), "broken", "OSError: bus"),
    "mute": Case(changed("return Probe(", "Probe("), "broken", "(AttributeError|TypeError): .*NoneType.*"),
    "declarer": Case(
        changed("return Capabilities(", "raise KeyError('d')\n        return Capabilities("), "broken", "KeyError: 'd'"
    ),
    "absent": Case(
        changed("Probe(True, 'a fake chip',", "Probe(False, 'no /dev/chip0', 'modprobe chip',", priority=900),
        "unavailable",
        "no /dev/chip0",
        "modprobe chip",
    ),
}
TWIN = Case(
    "",
    "refused",
    r"registered by 2 distributions, hal-twin-a 1.0 and hal-twin-b 1.0",
    "uninstall all but one of them",
)
MISSING = Case("", "broken", "ModuleNotFoundError: No module named 'hal_nowhere'")
EXPECTED = CASES | {"twin": TWIN, "missing": MISSING}


@pytest.fixture(scope="module")
def crowd(bare: Interpreter, tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    """One backend that works among all those that do not."""
    folder = install(
        tmp_path_factory.mktemp("crowd"),
        *(Distribution(f"hal-{name}", case.source, name) for name, case in CASES.items()),
        Distribution("hal-twin-a", fake_backend(), "twin"),
        Distribution("hal-twin-b", fake_backend(), "twin"),
        Distribution("hal-missing", "", entry_points={BACKENDS: {"missing": "hal_nowhere"}}),
        Distribution("hal-good", fake_backend(), "good"),
    )
    return bare.seeing(folder)


@pytest.fixture(scope="module")
def crowd_facts(crowd: Interpreter) -> dict[str, Any]:
    """What a process sees that asks all of them, and then for some by name."""
    output = crowd.script(
        """
        import json, sys, hal
        facts = {"early": sorted(m for m in sys.modules if m.startswith("hal_"))}
        facts["statuses"] = {
            s.name: dict(state=s.state, reason=s.reason, fix=s.fix, distribution=s.distribution, line=s.line(),
                         error=type(s.error).__name__)
            for s in hal.backends()
        }
        facts["automatic"] = hal.plugins.select().name
        facts["errors"] = {}
        for name in ["nope", "Good", *facts["statuses"]]:
            try:
                hal.use(name)
            except hal.BackendUnavailable as error:
                cause = type(error.__cause__).__name__
                facts["errors"][name] = dict(message=str(error), reasons=error.reasons, cause=cause)
            else:
                hal.use(None)
        print(json.dumps(facts))
        """
    )
    facts: dict[str, Any] = json.loads(output)
    return facts


@pytest.mark.parametrize("name", EXPECTED)
def test_each_plugin_that_is_out_says_why(name: str, crowd_facts: dict[str, Any]) -> None:
    expected, found = EXPECTED[name], crowd_facts["statuses"][name]
    assert found["state"] == expected.state, found
    assert re.fullmatch(expected.reason, found["reason"]), found
    assert re.fullmatch(expected.fix, found["fix"]), found
    assert f"hal-{name}" in found["distribution"]


@pytest.mark.parametrize("name", EXPECTED)
def test_asking_for_a_plugin_that_is_out_is_refused_with_its_reason(name: str, crowd_facts: dict[str, Any]) -> None:
    found, error = crowd_facts["statuses"][name], crowd_facts["errors"][name]
    assert error["message"].startswith(f"hal.use: backend {name!r} is {found['state']}: {found['reason']}")
    assert found["fix"] in error["message"]
    if found["state"] == "broken":
        assert error["cause"] == found["error"], "the plugin's own error is the cause"


def test_broken_plugins_break_no_other(crowd_facts: dict[str, Any]) -> None:
    assert set(crowd_facts["statuses"]) == {*EXPECTED, "good"}
    assert crowd_facts["statuses"]["good"]["state"] == "available"
    assert crowd_facts["automatic"] == "good"


@pytest.mark.parametrize("name", ["nope", "importer"])
def test_the_refusal_lists_every_other_backend_with_its_reason(name: str, crowd_facts: dict[str, Any]) -> None:
    error = crowd_facts["errors"][name]
    for other, status in crowd_facts["statuses"].items():
        assert error["reasons"][other] == f"{status['state']}: {status['reason']}"
        if other != name:
            assert status["line"] in error["message"]
    assert "\n" not in error["message"]


def test_a_name_nobody_has_gets_the_nearest_one_suggested(crowd_facts: dict[str, Any]) -> None:
    assert "no installed backend is called 'Good'. Did you mean 'good'?" in crowd_facts["errors"]["Good"]["message"]


def test_importing_hal_imports_no_backend(crowd_facts: dict[str, Any]) -> None:
    assert crowd_facts["early"] == []


@pytest.fixture(scope="module")
def choice(bare: Interpreter, tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    """Four backends that work, two of one priority, and a better one without a device."""
    folder = install(
        tmp_path_factory.mktemp("choice"),
        Distribution("hal-low", fake_backend(priority=0), "low"),
        Distribution("hal-middle", fake_backend(priority=50), "middle"),
        # The distribution that sorts first has the name that sorts last: names decide, not the order of discovery.
        Distribution("hal-a", fake_backend(priority=100), "tie-z"),
        Distribution("hal-z", fake_backend(priority=100), "tie-a"),
        Distribution("hal-absent", CASES["absent"].source, "absent"),
    )
    return bare.seeing(folder)


def test_the_nearest_choice_wins(choice: Interpreter) -> None:
    output = choice.script(
        """
        import json, os, hal
        from hal.plugins import select
        seen = {}
        seen["order"] = [s.name for s in hal.backends()]
        seen["automatic"] = select().name
        os.environ["HAL_BACKEND"] = ""
        seen["empty variable"] = select().name
        os.environ["HAL_BACKEND"] = "low"
        seen["variable"] = select().name
        hal.use("middle")
        seen["use"] = select().name
        os.environ["HAL_BACKEND"] = "low"
        seen["use over variable"] = select().name
        seen["argument"] = select("tie-z").name
        seen["capabilities"] = hal.capabilities("tie-z") == hal.capabilities()
        try:
            hal.use("absent")
        except hal.BackendUnavailable:
            seen["use after a refusal"] = select().name
        try:
            select(3)
        except hal.SpecError as error:
            seen["not a name"] = str(error)
        print(json.dumps(seen))
        """
    )
    assert json.loads(output) == {
        "order": ["tie-a", "tie-z", "middle", "low", "absent"],
        "automatic": "tie-a",
        "empty variable": "tie-a",
        "variable": "low",
        "use": "middle",
        "use over variable": "middle",
        "argument": "tie-z",
        "capabilities": True,
        "use after a refusal": "middle",
        "not a name": "backend: got 3; legal: the name of a backend, or None",
    }


def test_a_choice_reaches_child_processes_and_can_be_taken_back(choice: Interpreter) -> None:
    output = choice.script(
        """
        import json, os, subprocess, sys, hal
        def child():
            code = "import hal, sys; print(hal.plugins.select().name, *(m for m in sys.modules if m[:4] == 'hal_'))"
            return subprocess.run([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True).stdout.strip()
        seen = []
        hal.use("middle")
        hal.use("low")
        seen.append([os.environ.get("HAL_BACKEND"), child()])
        hal.use(None)
        seen.append([os.environ.get("HAL_BACKEND"), hal.plugins.select().name])
        os.environ["HAL_BACKEND"] = "middle"
        hal.use("low")
        hal.use(None)
        seen.append([os.environ.get("HAL_BACKEND"), child()])
        print(json.dumps(seen))
        """
    )
    # A name chosen imports its own plugin alone.
    assert json.loads(output) == [["low", "low hal_low"], [None, "tie-a"], ["middle", "middle hal_middle"]]


def test_a_call_reaches_the_chosen_backend_only(choice: Interpreter) -> None:
    output = choice.script(
        """
        import sys, torch, hal
        q, kv = torch.ones(1, 1, 2, 16), torch.ones(1, 4, 1, 16)
        table, lengths = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
        out, lse = hal.mla_decode(q, kv, table, lengths, head_dim_v=8, backend="low")
        assert torch.allclose(out, torch.ones(1, 1, 2, 8)), out
        print(*sorted(m for m in sys.modules if m.startswith("hal_")))
        """,
        HAL_BACKEND="nope",
    )
    assert output.split() == ["hal_low"]


def test_without_any_backend_the_error_says_what_to_install(bare: Interpreter) -> None:
    output = bare.script(
        """
        import hal
        assert hal.backends() == []
        try:
            hal.capabilities()
        except hal.BackendUnavailable as error:
            print(error, error.reasons, error.requested)
        """
    )
    assert output.startswith("no backend is available.")
    assert "pip install hal-cpu" in output
    assert output.endswith("{} None\n")


def test_importing_hal_adds_little_to_importing_torch(crowd: Interpreter) -> None:
    # A ratio of processor times in one process, which neither load nor a slow machine moves much: torch takes about a
    # second where the HAL may take 50 ms. Bytecode is written, as in any installation.
    code = """
        import time
        a = time.process_time()
        import torch
        b = time.process_time()
        import hal
        hal.mla_decode
        print((time.process_time() - b) / (b - a))
        """
    shares = [float(crowd.script(code, PYTHONDONTWRITEBYTECODE="")) for _ in range(4)][1:]
    assert statistics.median(shares) <= 0.05, shares


CARELESS = {
    "unranked": changed("priority = 10", "other = 10"),
    "misranked": changed("priority = 10", "priority = 'high'"),
    "rankless": changed("priority = 10", "priority = property(lambda self: 1 / 0)"),
    "undeclared": changed("return Capabilities(", "Capabilities("),
    "misdeclared": changed("return Capabilities(", "return dict("),
    "unprobed": changed("return Probe(", "return 'yes'\n        Probe("),
    "untyped": changed("device_types=", "device_types=None and "),
    "undetailed": changed("return Probe(", "return Probe(details=None, *(True, 'x')) or Probe("),
}


def test_careless_plugins_break_only_themselves(bare: Interpreter, tmp_path: Path) -> None:
    careless = [Distribution(f"hal-{name}", source, name) for name, source in CARELESS.items()]
    folder = install(tmp_path, *careless, Distribution("hal-good", fake_backend(priority=0), "good"))
    output = bare.seeing(folder).script(
        """
        import json, hal
        print(json.dumps({s.name: f"{s.state}: {s.reason}" for s in hal.backends()} | {"": hal.plugins.select().name}))
        """
    )
    found = json.loads(output)
    assert found.pop("") == "good"
    assert found.pop("good") == "available: a fake chip"
    assert set(found) == set(CARELESS)
    assert all(line.startswith("broken: ") for line in found.values()), found
