"""The pins of `constraints.txt` can be installed wherever the project can."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from hal_conformance.waivers import tomllib
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
OLDEST = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
PINS = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


def on_the_oldest(pin: Requirement) -> bool:
    environment = {"python_version": OLDEST, "python_full_version": f"{OLDEST}.0"}
    return pin.marker is None or pin.marker.evaluate(environment)


@pytest.mark.parametrize("pin", [*filter(on_the_oldest, PINS)], ids=lambda pin: pin.name)
def test_what_is_pinned_for_every_python_is_made_for_the_oldest(pin: Requirement) -> None:
    try:
        found = importlib.metadata.metadata(pin.name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"not applicable: {pin.name} is not installed by the test command")
    if not pin.specifier.contains(found["Version"].partition("+")[0]):
        pytest.skip(f"not applicable: {pin.name} {found['Version']} is here, which nobody pinned")
    assert SpecifierSet(found.get("Requires-Python", "")).contains(f"{OLDEST}.0"), found["Requires-Python"]
