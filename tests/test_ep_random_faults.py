"""Random faults at random places: nothing hangs, the right rank is named, and nothing is left behind.

``HAL_EP_FAULTS=200`` runs so many; the seed is printed, and ``HAL_EP_FAULT_SEED=N`` runs one fault again.
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from ep_cases import Case
from ep_ranks import Outcome, run_ranks
from seeds import SEED

import hal
from hal import EpFault, EpFaults, RankFailure
from hal.ep.faults import PHASES

TIMEOUT: Final = 2.5
ROUNDS: Final = 3
CALLS: Final = ("normal", "expand", "cached", "hook", "low_latency", "low_latency_hook")
_COUNT: Final = int(os.environ.get("HAL_EP_FAULTS", "6"))


@dataclass(frozen=True)
class Plan:
    """One fault, and the calls in the middle of which it happens."""

    ranks: int
    culprit: int
    fault: EpFault
    calls: tuple[str, ...]
    seed: int

    @classmethod
    def draw(cls, seed: int) -> Plan:
        """A plan that its seed determines."""
        pick = random.Random(seed)
        ranks = pick.randint(2, 4)
        kind = pick.choice(("kill", "stop", "delay", "drop", "corrupt"))
        phases = {"drop": ("post", "grant", "push"), "corrupt": ("post",)}.get(
            kind, ("post", "grant", "push", "receive", "stage", "fetch")
        )
        fault = EpFault(
            kind,
            pick.choice(phases),
            pick.randint(1, 2 * ROUNDS),
            seconds=pick.choice((0.1, 2.5 * TIMEOUT)) if kind == "delay" else 0.0,
        )
        return cls(ranks, pick.randrange(ranks), fault, tuple(pick.choices(CALLS, k=ROUNDS)), seed)

    @property
    def case(self) -> Case:
        """Inputs of every rank."""
        pick = random.Random(self.seed + 1)
        tokens = tuple(pick.randint(1, 9) for _ in range(self.ranks))
        return Case(ranks=self.ranks, tokens=tokens, experts=3 * self.ranks, routing="distinct", seed=self.seed)


def working(rank: int, plan: Plan) -> float:
    """Make the plan's calls; a failure carries the seconds to it."""
    if rank == plan.culprit and plan.fault.kind == "stop" and os.fork() == 0:
        # Whoever is stopped goes on when the others are through.
        time.sleep(4 * TIMEOUT)
        os.kill(os.getppid(), signal.SIGCONT)
        os._exit(0)
    faults = EpFaults(plan.fault) if rank == plan.culprit else None
    mine = plan.case.inputs()[rank]
    start = time.monotonic()
    with plan.case.buffer(timeout=TIMEOUT, faults=faults) as buffer:
        try:
            for call in plan.calls:
                start = time.monotonic()
                _round(buffer, mine, call)
        except RankFailure as failure:
            failure.seconds = time.monotonic() - start
            raise
    return time.monotonic() - start


def _round(buffer: hal.EpBuffer, mine: Any, call: str) -> None:
    hook = call.endswith("hook")
    if call.startswith("low_latency"):
        low = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False, return_recv_hook=hook)
        if low.hook is not None:
            low.hook()
        rows = low.recv_x if isinstance(low.recv_x, torch.Tensor) else low.recv_x[0]
        buffer.low_latency_combine(rows, mine.topk_idx, mine.topk_weights, low.handle)
        return
    got = buffer.dispatch(mine.x, mine.topk_idx, expand=call == "expand", return_recv_hook=hook)
    if got.hook is not None:
        got.hook()
    if call == "cached":
        got = buffer.dispatch(mine.x, handle=got.handle)
    assert isinstance(got.recv_x, torch.Tensor)
    buffer.combine(got.recv_x, got.handle)


def judge(plan: Plan, outcomes: list[Outcome]) -> None:
    """Whether a fault came to light or not, nobody else was named and nobody took too long."""
    others = [outcome for rank, outcome in enumerate(outcomes) if rank != plan.culprit]
    failures = [outcome.error for outcome in others if outcome.error is not None]
    for failure in failures:
        assert isinstance(failure, RankFailure), failure
        assert failure.rank == plan.culprit, f"rank {failure.rank} was named: {failure}"
        assert failure.seconds < TIMEOUT + 2, failure
    lasting = plan.fault.kind in ("kill", "stop", "corrupt", "drop") or plan.fault.seconds > TIMEOUT
    happened = outcomes[plan.culprit].exitcode is not None or plan.fault.kind == "corrupt" or failures
    if not lasting:
        assert not failures, failures[0]
    elif happened:
        # All that still had a call to make after it know; one fault in the last call of some may be nobody's loss.
        assert failures or plan.fault.operation >= 2 * len(plan.calls) - 1, f"nobody noticed: {outcomes}"


def windows() -> set[str]:
    """Windows that some process of this machine holds, and files of ours that have a name."""
    found = {name for folder in ("/dev/shm", "/tmp") for name in os.listdir(folder) if "hal-ep" in name}
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and _is_child(process):
            found |= {path for path in _links(process / "fd") if path.startswith("/memfd:hal-ep")}
    return found


def _is_child(process: Path) -> bool:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid()
    except OSError:
        return False


def _links(folder: Path) -> set[str]:
    found = set()
    try:
        for path in folder.iterdir():
            try:
                found.add(os.readlink(path))
            except OSError:
                continue
    except OSError:
        return set()
    return found


@pytest.mark.sampled
@pytest.mark.long(3)
@pytest.mark.parametrize("number", range(_COUNT))
@pytest.mark.timeout(60)
def test_a_random_fault(number: int) -> None:
    named = os.environ.get("HAL_EP_FAULT_SEED")
    seed = int(named) if named is not None else SEED * 1000 + number
    plan = Plan.draw(seed)
    print(f"HAL_EP_FAULT_SEED={seed}: {plan}")
    judge(plan, run_ranks(plan.ranks, working, plan, check=False, limit=25))
    assert not windows()


def test_phases_are_the_engine_s() -> None:
    assert {"post", "grant", "push", "receive", "stage", "fetch"} < set(PHASES)
