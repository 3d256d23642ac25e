"""The table of obligations, its checks, and the documents made from it."""

from __future__ import annotations

import re
from pathlib import Path

import hal_conformance
import pytest
from hal_conformance import docs
from hal_conformance.checks import load
from hal_conformance.requirements import REQUIREMENTS
from hal_conformance.table import LEVELS, OBLIGATIONS, TABLE

import hal

ROOT = Path(__file__).resolve().parent.parent
VENDORS = re.compile(
    r"(?<![a-z])(cuda|rocm|hip|musa|dcu|amd|nvidia|hygon|metax|iluvatar|ascend|cambricon|moore)(?![a-z])", re.I
)


def test_every_covered_obligation_has_a_check_and_no_check_is_left_over() -> None:
    assert set(load()) == {o.id for o in TABLE if o.covered}


def test_ids_are_unique_and_levels_and_requirements_exist() -> None:
    ids = [o.id for o in TABLE]
    assert len(set(ids)) == len(ids)
    assert {o.level for o in TABLE} <= {level.id for level in LEVELS}
    assert all(o.requires in REQUIREMENTS for o in TABLE)
    assert all(REQUIREMENTS[o.requires].refusal for o in TABLE if o.requires != "nothing")


def test_obligations_of_what_this_hal_lacks_are_not_listed() -> None:
    listed = any(o.needs == "EpBuffer" for o in OBLIGATIONS)
    assert listed == ("EpBuffer" in hal.__all__)


def test_the_written_specification_is_the_tested_one() -> None:
    assert (ROOT / "docs" / "spec.md").read_text() == docs.spec(), "run: hal conform spec > docs/spec.md"


@pytest.mark.parametrize("package", [hal_conformance, hal], ids=["hal_conformance", "hal"])
def test_no_vendor_is_named(package: object) -> None:
    root = Path(str(package.__file__)).parent  # type: ignore[attr-defined]
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in sorted(root.rglob("*"))
        # Dialects are vendors' languages, and Triton has names of its own for its targets.
        if path.suffix in (".py", ".h", ".j2", ".json") and not {"dialects", "triton"} & set(path.parts)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if VENDORS.search(line)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", sorted(Path(hal_conformance.__file__).parent.rglob("*.py")), ids=lambda p: p.name)
def test_modules_stay_small(path: Path) -> None:
    # The table is data; everything else is one job of at most a few hundred lines.
    assert path.name == "table.py" or len(path.read_text().splitlines()) <= 400
