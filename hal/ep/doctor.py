"""Who waits for whom: reading flight recorders, of live groups on this machine and of dumps written at a failure.

A backend that can look into its groups from outside returns `RankState` from ``Backend.ep_live``. A buffer whose
environment names a folder in ``HAL_EP_DUMP`` writes there what it knows when it raises a RankFailure.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from hal.spec.errors import RankFailure, SpecError

DUMP_ENV: Final = "HAL_EP_DUMP"
_FORMAT: Final = "hal-ep-dump 1"
_PATIENCE: Final = 1.0

Entry = Mapping[str, Any]
"""One operation, as `hal.EpBuffer.records` gives it."""


@dataclass(frozen=True, slots=True)
class RankState:
    """One rank of a group as seen from outside.

    Attributes
    ----------
    group : str
        The same for all ranks that share windows.
    rank, num_ranks : int
        In the numbering of the whole group, and its size.
    pid : int
        Its process; 0 where that is not known.
    process : {"running", "stopped", "ended", "unknown"}
    records : sequence of mapping
        Its last operations, oldest first.
    """

    group: str
    rank: int
    num_ranks: int
    pid: int
    process: str
    records: Sequence[Entry]


@dataclass(frozen=True, slots=True)
class Finding:
    """A group, who waits for whom in it, and who is to blame.

    Attributes
    ----------
    group, source : str
        Its name, and where the knowledge comes from: ``"live"``, or a file.
    now_ns : int
        When it was looked at.
    states : list of RankState
        By rank.
    waits : list of dict
        Of each rank that waits: ``rank``, ``waits_for``, ``operation``, ``kind``, ``phase``, ``seconds``, ``expert``,
        ``expected`` and ``received`` (rows, None where no rows are awaited).
    culprits : dict of int to str
        Ranks that somebody waits for and that wait for nobody, with what they do instead.
    failure : dict or None
        The RankFailure that a dump was written for.
    """

    group: str
    source: str
    now_ns: int
    states: list[RankState]
    waits: list[dict[str, Any]] = field(default_factory=list)
    culprits: dict[int, str] = field(default_factory=dict)
    failure: dict[str, Any] | None = None

    @property
    def stuck(self) -> bool:
        """Whether a rank failed, or has waited for longer than a second."""
        return self.failure is not None or any(wait["seconds"] > _PATIENCE for wait in self.waits)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "stuck": self.stuck}


def examine(states: Iterable[RankState], source: str, now_ns: int, failure: dict[str, Any] | None = None) -> Finding:
    """Find the waits of one group, and who causes them."""
    known = sorted(states, key=lambda state: state.rank)
    found = Finding(known[0].group if known else "?", source, now_ns, known, failure=failure)
    by_rank = {state.rank: state for state in known}
    for state in known:
        # Asynchronous operations overlap: the one that is waited in need not be the last.
        last = next((record for record in reversed(state.records) if record["waits_for"] is not None), None)
        if last is not None and state.process != "ended":
            wanted = ("waits_for", "operation", "kind", "phase", "expert", "expected", "received")
            seconds = max(now_ns - last["begin_ns"], 0) / 1e9
            found.waits.append({"rank": state.rank, "seconds": seconds, **{name: last[name] for name in wanted}})
    waiting = {wait["rank"] for wait in found.waits}
    for rank in sorted({wait["waits_for"] for wait in found.waits} - waiting):
        found.culprits[rank] = _instead(by_rank.get(rank), now_ns)
    if failure is not None:
        found.culprits[failure["rank"]] = failure["reason"]
    return found


def live(states: Iterable[RankState]) -> list[Finding]:
    """Examine every group among the states of all backends."""
    groups: dict[str, list[RankState]] = {}
    for state in states:
        groups.setdefault(state.group, []).append(state)
    now = time.time_ns()
    return [examine(members, "live", now) for _, members in sorted(groups.items())]


def write_dump(failure: RankFailure, rank: int, num_ranks: int, records: Sequence[Entry]) -> Path | None:
    """Write what a rank knows to the folder that ``HAL_EP_DUMP`` names; None without it, or where that fails."""
    folder = os.environ.get(DUMP_ENV, "")
    if not folder:
        return None
    told = ("rank", "phase", "reason", "expert", "expected", "received")
    document = {
        "format": _FORMAT,
        "rank": rank,
        "num_ranks": num_ranks,
        "pid": os.getpid(),
        "now_ns": time.time_ns(),
        "failure": {name: getattr(failure, name) for name in told},
        "records": [dict(record) for record in records],
    }
    path = Path(folder) / f"hal-ep-rank{rank}-{os.getpid()}-{document['now_ns']}.json"
    with contextlib.suppress(OSError):  # the failure itself matters more than its record
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
        return path
    return None


def read_dump(path: Path) -> Finding:
    """Examine a dump.

    Raises
    ------
    SpecError
        The file is none.
    """
    try:
        document = json.loads(path.read_text())
        if document["format"] != _FORMAT:
            raise KeyError("format")
        by_rank: dict[int, list[Entry]] = {}
        for record in document["records"]:
            by_rank.setdefault(record["rank"], []).append(record)
        states = [
            RankState(
                "dump", rank, document["num_ranks"], document["pid"] if rank == document["rank"] else 0, "unknown", one
            )
            for rank, one in by_rank.items()
        ]
        return examine(states, f"{path}, by rank {document['rank']}", document["now_ns"], document["failure"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        got = f"{path} ({type(error).__name__}: {error})"
        raise SpecError("dump", got, f"a file that a buffer wrote to the folder {DUMP_ENV} names") from None


def _instead(state: RankState | None, now_ns: int) -> str:
    """What a rank does that others wait for."""
    if state is None:
        return "not to be seen: its process ended, or it runs elsewhere"
    if state.process in ("ended", "stopped"):
        return f"its process ({state.pid}) {'ended' if state.process == 'ended' else 'is stopped'}"
    if not state.records:
        return "it has made no call yet"
    last = state.records[-1]
    seconds = max(now_ns - last["begin_ns"], 0) / 1e9
    if last["microseconds"] is None:
        return f"busy in {last['kind']} #{last['operation']} ({last['phase']}) for {seconds:.1f} s"
    return f"in no call since {last['kind']} #{last['operation']}, which began {seconds:.1f} s ago"
