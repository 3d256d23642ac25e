"""Expert-parallel dispatch and combine beside ``all_to_all_single``, MPI's ``Alltoallv`` and DeepEP.

All sides run in the same processes, in blocks that take turns, so that whatever else the machine does hits them alike.
``gloo`` and ``mpi`` get every advantage: their payload is gathered beforehand, sizes are known to them, no routes
travel, and nothing is reduced. ``gloo_whole`` and ``mpi_whole`` (`hal.bench.ep_peers`) are given what the HAL is given
and return what it returns, which is checked before anything is timed. Times are per call; of each call the slowest rank
counts. ``gbps`` is the bytes of token rows a rank receives (its own included, since they are moved too; ``remote_gbps``
counts those from others alone) over the median. ``copy_gbps`` is a plain copy of as many bytes by all ranks at once.

A backend on an accelerator (`hal.bench.ep_site`) has its tensors there, a device for every rank. Beside it is what
torch.distributed moves such tensors by, in gloo's place, and DeepEP where that is installed; the copy goes to the next
device.

Overlap: what is left of the receive when compute as long as it stands between the call and its hook.

Run by ``hal bench ep``; started under ``mpiexec`` the ranks find MPI and measure it too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

from hal.bench.ep_cases import FULL, OVERLAPS, PUBLISHED, QUICK, Shape
from hal.bench.ep_rank import Rank, slowest
from hal.bench.ep_report import document, report, table
from hal.bench.ep_site import site

QUICK_SECONDS: Final = 30.0
"""When --quick begins no further case: the last one and the imports fit in the rest of its minute."""


@dataclass(slots=True)
class Found:
    """What a group of ranks found.

    Attributes
    ----------
    cases, overlaps : list of dict
        A report each.
    absent : dict of str to str
        Peers that were not there, with the reason.
    copy : str
        What ``copy_gbps`` is, where that needs to be said.
    """

    cases: list[dict[str, Any]] = field(default_factory=list)
    overlaps: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    copy: str = ""


@dataclass(frozen=True, slots=True)
class Where:
    """What is measured.

    Attributes
    ----------
    backend : str or None
        As `hal.EpBuffer` takes it.
    kind : str
        The type of device its tensors are on.
    """

    backend: str | None = None
    kind: str = "cpu"


_HERE: Final = Where()


def run(
    ranks: int,
    shapes: Sequence[Shape],
    overlaps: Sequence[Shape] = OVERLAPS,
    seconds: float = 2.0,
    budget: float = math.inf,
    limit: float = 3600.0,
    where: Where = _HERE,
) -> Found:
    """Start the ranks, for tensors of the host under ``mpiexec`` if there is one; a report for each shape and overlap.

    After ``budget`` seconds no further case is begun.

    Raises
    ------
    RuntimeError
        The ranks failed; carries what they wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = os.path.join(folder, "task.json")
        with open(task, "w") as file:
            json.dump(
                {
                    "ranks": ranks,
                    "seconds": seconds,
                    "budget": min(budget, limit),
                    "where": asdict(where),
                    "shapes": [asdict(shape) for shape in shapes],
                    "overlaps": [asdict(shape) for shape in overlaps],
                },
                file,
            )
        worker = [sys.executable, "-m", "hal.bench.ep", "--worker", task]
        mpiexec = shutil.which("mpiexec", path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
        if where.kind == "cpu" and mpiexec is not None and _has_mpi():
            commands = [[mpiexec, "-n", str(ranks), *worker]]
        else:
            commands = [[*worker, str(rank)] for rank in range(ranks)]
        # Whoever ends this run is to end ranks that hold devices, too.
        apart = where.kind == "cpu"
        started = [
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=apart
            )
            for command in commands
        ]
        try:
            said = [process.communicate(timeout=limit)[0] for process in started]
        finally:
            for process in started:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        result = os.path.join(folder, "result.json")
        if not os.path.exists(result):
            raise RuntimeError("\n".join(said))
        with open(result) as file:
            return Found(**json.load(file))


def _has_mpi() -> bool:
    import importlib.util

    return importlib.util.find_spec("mpi4py") is not None


def _work(task: str, rank: int | None) -> None:
    with open(task) as file:
        given = json.load(file)
    world = None
    if rank is None:
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        rank = world.Get_rank()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    folder, ranks, where = os.path.dirname(task), given["ranks"], Where(**given["where"])
    meeting = f"file://{os.path.join(folder, 'store')}"
    here = Rank(site(where.kind, rank, ranks), world, where.backend)
    dist.init_process_group(
        here.site.group, init_method=meeting, rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
    )
    begin, found = time.monotonic(), Found(absent=here.absent, copy=here.site.copied)
    for fields in given["shapes"]:
        shape = Shape(**fields)
        if slowest([time.monotonic() - begin]) < given["budget"]:
            found.cases.append(report(shape, ranks, here.time(shape, given["seconds"])))
    for fields in given["overlaps"]:
        if slowest([time.monotonic() - begin]) < given["budget"]:
            found.overlaps.append(here.overlap(Shape(**fields), given["seconds"]))
    here.site.meet()
    if rank == 0:
        with open(os.path.join(folder, "result.json"), "w") as file:
            json.dump(asdict(found), file)
    dist.destroy_process_group()


def measure(
    ranks: Sequence[int],
    quick: bool,
    seconds: float | None,
    published: bool = False,
    where: Where = _HERE,
    budget: float = math.inf,
) -> tuple[str, dict[str, Any]]:
    """The table and the published JSON for groups of these sizes; no case is begun after ``budget`` seconds."""
    whole, budget = Found(), min(budget, QUICK_SECONDS if quick else math.inf)
    begin = time.monotonic()
    shapes: Sequence[Shape] = tuple(PUBLISHED) if published else QUICK if quick else FULL
    for count in ranks:
        left = budget - (time.monotonic() - begin)
        each = seconds if seconds is not None else 1.5 if quick else 2.0
        found = run(count, shapes, OVERLAPS[:1] if quick else OVERLAPS, each, left, where=where)
        whole.cases += found.cases
        whole.overlaps += found.overlaps
        whole.absent |= found.absent
        whole.copy = found.copy
    shown = table(whole.cases, whole.overlaps, whole.absent)
    missing = len(ranks) * len(shapes) - len(whole.cases)
    if missing:
        shown += f"\n{missing} {'case was' if missing == 1 else 'cases were'} not begun: {budget:g} s were over"
    return shown, document(whole.cases, whole.overlaps, whole.absent, whole.copy)


def main() -> None:
    """The ranks' own entry."""
    parser = argparse.ArgumentParser(prog="python -m hal.bench.ep")
    parser.add_argument("--worker", nargs="+", required=True, help=argparse.SUPPRESS)
    given = parser.parse_args()
    _work(given.worker[0], int(given.worker[1]) if len(given.worker) > 1 else None)


if __name__ == "__main__":
    main()
