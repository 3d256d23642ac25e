"""The kill table, as far as it fits a test run; ``make mutants`` runs all of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hal_conformance.process import Worker
from hal_conformance.session import RED
from hal_conformance.table import LEVEL_IDS
from mutants.registry import load
from mutants.runner import installed, kill, run

# One or two of each catalogue; those of test_conformance_session are not repeated.
CHOSEN = (
    "mutant-overclaim-pages",
    "mutant-declares-less-later",
    "mutant-silent-fallback",
    "mutant-lse-base-two",
    "mutant-stores-past-the-end",
    "mutant-page-order-ignored",
    "mutant-tail-times-zero",
    "mutant-maximum-not-subtracted",
    "mutant-race-one-in-fifty",
    "mutant-own-rank-first",
    "mutant-error-on-one-rank",
    "mutant-hook-blocks",
    "mutant-rank-of-the-program",
    "mutant-sums-in-turn",
    "mutant-lifted-stays-out",
)


@pytest.fixture(scope="module", autouse=True)
def _mutants_are_installed() -> Iterator[None]:
    with installed():
        yield


def test_there_are_many_and_each_claims_a_level() -> None:
    mutants = load()
    assert len(mutants) >= 60
    assert {m.level for m in mutants.values()} == {"L0", "L1", "L2", "E1", "E2", "E3"} <= set(LEVEL_IDS)
    assert sum(m.level.startswith("E") for m in mutants.values()) >= 30
    assert set(CHOSEN) <= set(mutants)
    assert all(m.story for m in mutants.values())


@pytest.mark.sampled
@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.long(4)
def test_a_mutant_dies_in_the_level_that_claims_it(name: str, kept_worker: Worker) -> None:
    done = kill(load()[name], kept_worker)
    assert done.right, f"claimed by {done.mutant.level}, died in {done.level or 'none'}: {done.message} ({done.cause})"


@pytest.mark.long(28)
@pytest.mark.parametrize(
    "backend", ["cpu", *(pytest.param(b, marks=pytest.mark.sampled) for b in ("sample", "ep-sample"))]
)
def test_a_correct_backend_survives_a_fresh_seed(backend: str, kept_worker: Worker) -> None:
    results = run(backend, worker=kept_worker)
    alarms = [(r.id, r.message, [f.get("reproduce") for f in r.failures]) for r in results if r.status in RED]
    assert not alarms, alarms
