"""Expert-parallel dispatch and combine beside gloo's ``all_to_all_single`` and MPI's ``Alltoallv``.

All sides run in the same processes, in blocks that take turns, so that whatever else the machine does hits them alike.
The peers get every advantage: their payload is gathered beforehand, sizes are known to them, no routes travel, and
nothing is reduced. Times are per call; of each call the slowest rank counts. ``gbps`` is the bytes of token rows a rank
receives (its own included, since they are moved too; ``remote_share`` says how many came from others) over the median.
``copy_gbps`` is a plain copy of as many bytes by all ranks at once.

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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hal.ep.buffer import EpBuffer

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Shape:
    """One row of the table."""

    operation: str  # dispatch, combine, low_latency_dispatch, low_latency_combine
    tokens: int
    experts: int = 64
    topk: int = 8
    hidden: int = 7168
    fp8: bool = False
    routing: str = "uniform"

    @property
    def name(self) -> str:
        """How the table calls it."""
        kind = "fp8" if self.fp8 else "bf16"
        return f"{self.operation} {kind} T={self.tokens} top-{self.topk}/{self.experts} {self.routing}"


QUICK = (
    Shape("dispatch", 1),
    Shape("dispatch", 128),
    Shape("combine", 128),
    Shape("low_latency_dispatch", 1, fp8=True),
    Shape("low_latency_dispatch", 128, fp8=True),
    Shape("dispatch", 1024),
    Shape("combine", 1024),
)
FULL = (
    *(Shape(op, t) for op in ("dispatch", "combine") for t in (1, 8, 16, 32, 128, 1024, 2048, 4096)),
    *(Shape("dispatch", t, fp8=True) for t in (1, 128, 4096)),
    *(Shape(op, t, experts=256) for op in ("dispatch", "combine") for t in (1, 128, 4096)),
    *(Shape(op, t, routing="zipf") for op in ("dispatch", "combine") for t in (128, 4096)),
    *(Shape("low_latency_dispatch", t, fp8=True) for t in (1, 16, 128)),
    *(Shape("low_latency_combine", t) for t in (1, 16, 128)),
)


def routes(shape: Shape, rank: int) -> Tensor:
    """Distinct experts of every token, uniform or with a Zipf law over experts."""
    seed = torch.Generator().manual_seed(17 + rank)
    law = torch.ones(shape.experts)
    if shape.routing == "zipf":
        law = 1.0 / torch.arange(1, shape.experts + 1)
    return torch.multinomial(law.expand(shape.tokens, -1), shape.topk, generator=seed)


class Rank:
    """One rank of a run: its group, its buffer for a shape, and the calls to time."""

    def __init__(self, world: Any) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.world = world  # MPI's, or None

    def calls(self, shape: Shape, buffer: EpBuffer) -> tuple[dict[str, Call], dict[str, float]]:
        """What to time by name (``ours`` first), and bytes received in all and from others."""
        idx = routes(shape, self.rank)
        n, hidden = shape.tokens, shape.hidden
        x = torch.randn(n, hidden).bfloat16()
        weights = torch.rand(n, shape.topk)
        low_latency = shape.operation.startswith("low_latency")
        row = hidden * (1 if shape.fp8 else 2)
        where = idx // buffer.args.local_experts
        if low_latency:
            sent = torch.bincount(where.flatten(), minlength=self.ranks)
        else:
            sent = buffer.layout(idx).num_tokens_per_rank.long()
        received = _exchange_counts(sent)
        combine = shape.operation.endswith("combine")
        out_rows, in_rows = (received, sent) if combine else (sent, received)

        calls: dict[str, Call] = {}
        if shape.operation == "dispatch":
            rows = (x.to(torch.float8_e4m3fn), torch.rand(n, -(-hidden // 128))) if shape.fp8 else x
            calls["ours"] = lambda: buffer.dispatch(rows, idx, weights)
        elif shape.operation == "combine":
            got = buffer.dispatch(x, idx, weights)
            outputs = torch.randn(got.handle.num_recv_tokens, hidden).bfloat16()
            calls["ours"] = lambda: buffer.combine(outputs, got.handle)
        elif shape.operation == "low_latency_dispatch":
            calls["ours"] = lambda: buffer.low_latency_dispatch(x, idx, use_fp8=shape.fp8)
        else:
            low = buffer.low_latency_dispatch(x, idx, use_fp8=False)
            assert isinstance(low.recv_x, Tensor)
            packed = torch.randn(low.recv_x.shape).bfloat16()
            calls["ours"] = lambda: buffer.low_latency_combine(packed, idx, weights, low.handle)

        payload = torch.randint(0, 100, (int(out_rows.sum()), row), dtype=torch.uint8)
        landing = torch.empty(int(in_rows.sum()), row, dtype=torch.uint8)
        copied = torch.empty_like(payload)
        out_split, in_split = out_rows.tolist(), in_rows.tolist()
        calls["copy"] = lambda: copied.copy_(payload)
        calls["gloo"] = lambda: dist.all_to_all_single(landing, payload, in_split, out_split)
        if self.world is not None:
            from mpi4py import MPI

            send = [payload.numpy(), ([s * row for s in out_split], None), MPI.BYTE]
            receive = [landing.numpy(), ([s * row for s in in_split], None), MPI.BYTE]
            calls["mpi"] = lambda: self.world.Alltoallv(send, receive)
        total = float(in_rows.sum()) * row
        return calls, {"bytes": total, "remote": total - float(in_rows[self.rank]) * row}

    def time(self, shape: Shape, seconds: float) -> dict[str, Any]:
        """Time every side of a shape in turns for about so long."""
        low_latency = shape.operation.startswith("low_latency")
        with EpBuffer(
            num_experts=shape.experts,
            hidden=shape.hidden,
            topk=shape.topk,
            max_tokens_per_rank=shape.tokens,
            modes=("low_latency",) if low_latency else ("normal",),
        ) as buffer:
            calls, volume = self.calls(shape, buffer)
            once = {}
            for name, call in calls.items():
                call()
                once[name] = _slowest(_timed(call, 3))
            share = seconds / len(calls)
            rounds = 10
            counts = {name: max(1, min(200, int(share / rounds / max(t, 1e-6)))) for name, t in once.items()}
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(rounds):
                for name, call in calls.items():
                    # A spell of calls begins together; the first ones warm the caches again.
                    dist.barrier()
                    times[name] += _timed(call, counts[name] + 2)[2:]
        merged = {name: _worst_of_ranks(values) for name, values in times.items()}
        return {"merged": merged, **{name: _worst_of_ranks([v])[0] for name, v in volume.items()}}


def _timed(call: Call, count: int) -> list[float]:
    found = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def _slowest(values: Sequence[float]) -> float:
    return min(_worst_of_ranks(list(values)))


def _worst_of_ranks(values: list[float]) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def _exchange_counts(sent: Tensor) -> Tensor:
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return received


def _quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)]


def report(shape: Shape, ranks: int, found: dict[str, Any]) -> dict[str, Any]:
    """One case of the published JSON."""
    times = {name: _quantile(values, 0.5) for name, values in found["merged"].items()}
    ours = found["merged"]["ours"]
    gbps = found["bytes"] / times["ours"] / 1e9
    copy = found["bytes"] / times["copy"] / 1e9
    peers = {
        name: {"us_p50": times[name] * 1e6, "speedup": times[name] / times["ours"]}
        for name in ("gloo", "mpi")
        if name in times
    }
    return {
        "name": shape.name,
        **asdict(shape),
        "ranks": ranks,
        "us_p50": times["ours"] * 1e6,
        "us_p99": _quantile(ours, 0.99) * 1e6,
        "gbps": gbps,
        "copy_gbps": copy,
        "fraction_of_copy": gbps / copy,
        "remote_share": found["remote"] / found["bytes"] if found["bytes"] else 0.0,
        "calls": len(ours),
        "peers": peers,
    }


def run(ranks: int, shapes: Sequence[Shape], seconds: float = 2.0, limit: float = 600.0) -> list[dict[str, Any]]:
    """Start the ranks, under ``mpiexec`` where there is one, and return one report a shape.

    Raises
    ------
    RuntimeError
        The ranks failed; carries what they wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = os.path.join(folder, "task.json")
        with open(task, "w") as file:
            json.dump({"ranks": ranks, "seconds": seconds, "shapes": [asdict(shape) for shape in shapes]}, file)
        worker = [sys.executable, "-m", "hal.bench.ep", "--worker", task]
        mpiexec = shutil.which("mpiexec", path=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
        if mpiexec is not None and _has_mpi():
            commands = [[mpiexec, "-n", str(ranks), *worker]]
        else:
            commands = [[*worker, str(rank)] for rank in range(ranks)]
        started = [
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
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
            return json.load(file)  # type: ignore[no-any-return]


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
    folder = os.path.dirname(task)
    meeting = f"file://{os.path.join(folder, 'store')}"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=given["ranks"], timeout=timedelta(seconds=120)
    )
    here = Rank(world)
    reports = []
    for fields in given["shapes"]:
        shape = Shape(**fields)
        reports.append(report(shape, given["ranks"], here.time(shape, given["seconds"])))
    dist.barrier()
    if rank == 0:
        with open(os.path.join(folder, "result.json"), "w") as file:
            json.dump(reports, file)
    dist.destroy_process_group()


def table(reports: Sequence[dict[str, Any]]) -> str:
    """The reports as text."""
    lines = [f"{'case':52} {'p50 µs':>9} {'p99 µs':>9} {'GB/s':>6} {'of copy':>8} {'gloo':>7} {'MPI':>7}"]
    for one in reports:
        peers = [f"{one['peers'][p]['speedup']:6.2f}×" if p in one["peers"] else "–" for p in ("gloo", "mpi")]
        lines.append(
            f"{one['ranks']} ranks {one['name']:44} {one['us_p50']:9.1f} {one['us_p99']:9.1f} {one['gbps']:6.2f}"
            f" {one['fraction_of_copy']:7.0%} {peers[0]:>7} {peers[1]:>7}"
        )
    return "\n".join(lines)


def document(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The published JSON."""
    return {"limits": {"copy_gbps": max(one["copy_gbps"] for one in reports)}, "cases": list(reports)}


def main() -> None:
    """The ranks' own entry, and a way to run the table without the command line tool."""
    parser = argparse.ArgumentParser(prog="python -m hal.bench.ep")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json")
    given = parser.parse_args()
    if given.worker:
        _work(given.worker[0], int(given.worker[1]) if len(given.worker) > 1 else None)
        return
    reports = []
    for ranks in given.ranks:
        reports += run(ranks, QUICK if given.quick else FULL, given.seconds)
    print(table(reports))
    if given.json:
        with open(given.json, "w") as file:
            json.dump(document(reports), file, indent=1)


if __name__ == "__main__":
    main()
