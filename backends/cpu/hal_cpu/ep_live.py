"""Looking at expert-parallel groups from outside: the windows of this user's processes, read but never written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hal.ep.doctor import RankState

_WINDOW = "/memfd:hal-ep"


def states() -> list[RankState]:
    """Every rank of every group whose windows some process of this user holds."""
    from hal_cpu import _ep
    from hal_cpu.ep_parts import record_of

    found: dict[tuple[str, int], RankState] = {}
    for path in _windows():
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # it ended meanwhile
        try:
            seen = _ep.inspect(fd)
        except ValueError:
            continue
        finally:
            os.close(fd)
        group, pid, rank, _, first, all_ranks, _, _, records = seen
        name = f"{group:016x}"
        if (name, rank) not in found:
            entries: list[dict[str, Any]] = [record_of(first, rank, one) for one in records]
            found[name, rank] = RankState(name, first + rank, all_ranks, pid, _process(pid), entries)
    return list(found.values())


def _windows() -> Iterator[str]:
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            descriptors = [entry.path for entry in os.scandir(process / "fd")]
        except OSError:
            continue  # another user's, or gone
        for path in descriptors:
            try:
                if os.readlink(path).startswith(_WINDOW):
                    yield path
            except OSError:
                continue


def _process(pid: int) -> str:
    """What the kernel says of a process."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "ended"
    return {"T": "stopped", "t": "stopped", "Z": "ended", "X": "ended"}.get(state, "running")
