"""Expert-parallel dispatch and combine beside gloo's ``all_to_all_single`` and MPI's ``Alltoallv``.

All sides run in the same processes, in blocks that take turns, so that whatever else the machine does hits them alike.
``gloo`` and ``mpi`` get every advantage: their payload is gathered beforehand, sizes are known to them, no routes
travel, and nothing is reduced. ``gloo_whole`` and ``mpi_whole`` (`hal.bench.ep_peers`) are given what the HAL is given
and return what it returns, which is checked before anything is timed. Times are per call; of each call the slowest rank
counts. ``gbps`` is the bytes of token rows a rank receives (its own included, since they are moved too; ``remote_gbps``
counts those from others alone) over the median. ``copy_gbps`` is a plain copy of as many bytes by all ranks at once.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from hal.bench.ep_cases import FULL, OVERLAPS, QUICK, Shape, routes
from hal.bench.ep_peers import ByAllToAll, Exchange, over_gloo, over_mpi, require_same
from hal.bench.ep_report import document, quantile, report, table
from hal.ep.buffer import EpBuffer

Call = Callable[[], object]

QUICK_SECONDS: Final = 30.0
"""When --quick begins no further case: the last one and the imports fit in the rest of its minute."""


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
            scales = torch.rand(n, -(-hidden // 128)) if shape.fp8 else None
            values = x.to(torch.float8_e4m3fn) if shape.fp8 else x
            rows = values if scales is None else (values, scales)
            calls["ours"] = lambda: buffer.dispatch(rows, idx, weights)
            for name, peer in self._whole(buffer.args.local_experts):
                calls[name] = partial(peer.dispatch, values, idx, weights, scales)
            require_same(calls)
        elif shape.operation == "combine":
            got = buffer.dispatch(x, idx, weights)
            outputs = torch.randn(got.handle.num_recv_tokens, hidden).bfloat16()
            calls["ours"] = lambda: buffer.combine(outputs, got.handle)
            for name, peer in self._whole(buffer.args.local_experts):
                given = peer.dispatch(x, idx, weights)[-1]
                calls[name] = partial(peer.combine, outputs, given)
            require_same(calls)
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

    def _whole(self, local_experts: int) -> Iterator[tuple[str, ByAllToAll]]:
        """The peers that do all that the HAL does."""
        exchanges: dict[str, Exchange] = {"gloo_whole": over_gloo}
        if self.world is not None:
            exchanges["mpi_whole"] = over_mpi(self.world)
        for name, exchange in exchanges.items():
            yield name, ByAllToAll(exchange, self.rank, self.ranks, local_experts)

    def overlap(self, shape: Shape, seconds: float) -> dict[str, Any]:
        """Medians of a call with a hook, of the hook at once, and of the hook after compute as long as that."""
        low_latency = shape.operation.startswith("low_latency")
        with EpBuffer(
            num_experts=shape.experts,
            hidden=shape.hidden,
            topk=shape.topk,
            max_tokens_per_rank=shape.tokens,
            modes=("low_latency",) if low_latency else ("normal",),
        ) as buffer:
            idx = routes(shape, self.rank)
            x, weights = torch.randn(shape.tokens, shape.hidden).bfloat16(), torch.rand(shape.tokens, shape.topk)

            def once(compute: float) -> tuple[float, float]:
                dist.barrier()
                start = time.perf_counter()
                if low_latency:
                    hook = buffer.low_latency_dispatch(x, idx, use_fp8=shape.fp8, return_recv_hook=True).hook
                else:
                    hook = buffer.dispatch(x, idx, weights, return_recv_hook=True).hook
                called = time.perf_counter()
                while time.perf_counter() < called + compute:
                    pass
                begun = time.perf_counter()
                assert hook is not None
                hook()
                return called - start, time.perf_counter() - begun

            plain = [once(0.0) for _ in range(5)]
            count = max(10, min(300, int(seconds / max(_slowest([sum(one) for one in plain]), 1e-5) / 4)))
            plain = [once(0.0) for _ in range(count)]
            calls = _worst_of_ranks([one[0] for one in plain])
            receives = _worst_of_ranks([one[1] for one in plain])
            receive = quantile(receives, 0.5)
            left = quantile(_worst_of_ranks([once(receive)[1] for _ in range(count)]), 0.5)
        return {
            "name": shape.name,
            "ranks": self.ranks,
            "call_us": quantile(calls, 0.5) * 1e6,
            "receive_us": receive * 1e6,
            "visible_us": left * 1e6,
            "visible": left / receive,
        }

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


def run(
    ranks: int,
    shapes: Sequence[Shape],
    overlaps: Sequence[Shape] = OVERLAPS,
    seconds: float = 2.0,
    budget: float = math.inf,
    limit: float = 3600.0,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Start the ranks, under ``mpiexec`` where there is one; a report for each shape, and one for each overlap.

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
                    "shapes": [asdict(shape) for shape in shapes],
                    "overlaps": [asdict(shape) for shape in overlaps],
                },
                file,
            )
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
            found = json.load(file)
        return found["cases"], found["overlaps"]


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
    begin, cases, overlaps = time.monotonic(), [], []
    for fields in given["shapes"]:
        shape = Shape(**fields)
        if _slowest([time.monotonic() - begin]) < given["budget"]:
            cases.append(report(shape, given["ranks"], here.time(shape, given["seconds"])))
    for fields in given["overlaps"]:
        if _slowest([time.monotonic() - begin]) < given["budget"]:
            overlaps.append(here.overlap(Shape(**fields), given["seconds"]))
    dist.barrier()
    if rank == 0:
        with open(os.path.join(folder, "result.json"), "w") as file:
            json.dump({"cases": cases, "overlaps": overlaps}, file)
    dist.destroy_process_group()


def measure(ranks: Sequence[int], quick: bool, seconds: float | None) -> tuple[str, dict[str, Any]]:
    """The table and the published JSON for groups of these sizes."""
    cases: list[dict[str, Any]] = []
    overlaps: list[dict[str, Any]] = []
    begin = time.monotonic()
    for count in ranks:
        left = QUICK_SECONDS - (time.monotonic() - begin) if quick else math.inf
        each = seconds if seconds is not None else 1.5 if quick else 2.0
        found = run(count, QUICK if quick else FULL, OVERLAPS[:1] if quick else OVERLAPS, each, left)
        cases += found[0]
        overlaps += found[1]
    return table(cases, overlaps), document(cases, overlaps)


def main() -> None:
    """The ranks' own entry."""
    parser = argparse.ArgumentParser(prog="python -m hal.bench.ep")
    parser.add_argument("--worker", nargs="+", required=True, help=argparse.SUPPRESS)
    given = parser.parse_args()
    _work(given.worker[0], int(given.worker[1]) if len(given.worker) > 1 else None)


if __name__ == "__main__":
    main()
