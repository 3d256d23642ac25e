"""Low-latency calls in a captured graph: replayed over other rows and routes they give what calls give, and how long.

    ep_graph.py --ranks N [--rounds 200] [--tokens 128] [--hidden 7168] [--experts 256] [--topk 8]

Every rank captures one graph with a dispatch, a hook between, and a combine, and replays it over inputs that change.
After each replay the packed rows, their scales and counts, and the sums are compared with those of calls that are not
captured, bit for bit. Then graphs of dispatches alone and of combines alone are timed: microseconds for one, from when
all ranks begin, of the slowest rank, median of the replays; then what a call adds to compute between it and its hook.

The backend is HAL_BACKEND's, on devices whose launches can be captured. Exit codes: 0 as it must be, 1 not, 2 a wrong
request.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

import hal

EACH: Final = 8
"""Calls in a graph that is timed."""
REPLAYS: Final = 50
COMPUTE: Final = 4096
"""Rows and columns of a bf16 product that is computed between a call and its hook, and takes every processor."""
PASSED: Final = 1 << 28
"""bf16 elements that are read and written instead, which waits for memory."""


def routes(tokens: int, experts: int, topk: int, seed: int) -> Tensor:
    """[n, K] distinct experts, a tenth of them left out."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, experts, generator=draw).topk(topk).indices
    return chosen.masked_fill(torch.rand(tokens, topk, generator=draw) < 0.1, -1)


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def packed(result: Any) -> list[Tensor]:
    """What came, without the slots that nothing came for."""
    rows, scales = result.recv_x
    count = result.recv_count
    there = torch.arange(rows.shape[1], device=rows.device) < count[:, None]
    return [count.clone(), rows.view(torch.uint8)[there], scales[there], result.handle.layout_range.clone()]


def agrees(buffer: hal.EpBuffer, given: argparse.Namespace, rank: int) -> int:
    """Rounds in which a replay gave something else than a call."""
    n, hidden = given.tokens, given.hidden
    x = torch.empty(n, hidden, dtype=torch.bfloat16, device=buffer.args.device)
    idx = torch.empty(n, given.topk, dtype=torch.int64, device=x.device)
    weights = torch.empty(n, given.topk, device=x.device)
    outputs = torch.empty(buffer.args.local_experts, given.ranks * n, hidden, dtype=torch.bfloat16, device=x.device)

    def fill(turn: int) -> None:
        draw = torch.Generator().manual_seed(turn * 1009 + rank)
        x.copy_(torch.randn(n, hidden, generator=draw).bfloat16())
        idx.copy_(routes(n, given.experts, given.topk, turn * 1013 + rank))
        weights.copy_(torch.rand(n, given.topk, generator=draw))

    def calls() -> tuple[Any, Any]:
        got = buffer.low_latency_dispatch(x, idx, return_recv_hook=True)
        assert got.hook is not None
        got.hook()
        # An expert that doubles what came.
        outputs.copy_(got.recv_x[0].float() * 2)
        return got, buffer.low_latency_combine(outputs, idx, weights, got.handle)

    fill(0)
    for _ in range(2):
        calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        caught = calls()
    wrong = 0
    for turn in range(1, given.rounds + 1):
        fill(turn)
        graph.replay()
        replayed = [*packed(caught[0]), caught[1].combined_x.clone()]
        got, back = calls()
        called = [*packed(got), back.combined_x]
        wrong += not all(same(one, other) for one, other in zip(replayed, called, strict=True))
    return wrong


def low_latency(buffer: hal.EpBuffer, given: argparse.Namespace, rank: int) -> dict[str, Callable[..., Any]]:
    """A dispatch and a combine of the sizes that are timed."""
    x = torch.randn(given.tokens, given.hidden, device=buffer.args.device).bfloat16()
    idx = routes(given.tokens, given.experts, given.topk, rank).to(x.device)
    weights = torch.rand(given.tokens, given.topk, device=x.device)
    got = buffer.low_latency_dispatch(x, idx, use_fp8=False)
    outputs = torch.randn(got.recv_x.shape, device=x.device).bfloat16()
    return {
        "dispatch": partial(buffer.low_latency_dispatch, x, idx),
        "combine": partial(buffer.low_latency_combine, outputs, idx, weights, got.handle),
    }


def overlaps(calls: dict[str, Callable[..., Any]], device: torch.device) -> dict[str, float]:
    """Microseconds of compute alone, and with each of the calls whose hook comes behind it."""
    factor = torch.randn(2, COMPUTE, COMPUTE, device=device).bfloat16()
    product, rows = torch.empty_like(factor[0]), torch.randn(PASSED, device=device).bfloat16()
    computes = {"a product": lambda: torch.mm(factor[0], factor[1], out=product), "a pass": lambda: rows.mul_(1.0)}

    def hooked(compute: Callable[[], Any], call: Callable[..., Any]) -> None:
        hook = call(return_recv_hook=True).hook
        compute()
        hook()

    found = {}
    for name, compute in computes.items():
        found[name] = replayed(compute)
        for kind, call in calls.items():
            found[f"{name} in a {kind}"] = replayed(partial(hooked, compute, call))
    return found


def replayed(call: Callable[[], Any]) -> float:
    """Microseconds of one of several calls in a graph, of the slowest rank."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(EACH):
            call()
    taken = []
    for _ in range(REPLAYS):
        torch.cuda.synchronize()
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) * 1e3 / EACH)
    slowest = torch.tensor(taken)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest.median())


def rank_main(given: argparse.Namespace) -> int:
    """One rank."""
    rank = given.rank
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(given.store, given.ranks),
        rank=rank,
        world_size=given.ranks,
        timeout=timedelta(seconds=120),
    )
    sizes = {"num_experts": given.experts, "hidden": given.hidden, "topk": given.topk}
    with hal.EpBuffer(**sizes, max_tokens_per_rank=given.tokens, modes=("low_latency",), device=device) as buffer:
        wrong = torch.tensor(agrees(buffer, given, rank))
        dist.all_reduce(wrong, dist.ReduceOp.MAX)
        calls = low_latency(buffer, given, rank)
        found = {name: replayed(call) for name, call in calls.items()}
        beside = overlaps(calls, device)
    if rank == 0:
        print(f"{given.ranks} ranks: {given.rounds} replays, {int(wrong)} of them not as called")
        said = ", ".join(f"{name} {value:.1f} µs" for name, value in found.items())
        print(", ".join(f"{name} {value:.1f} µs" for name, value in beside.items()))
        print(f"replayed, {given.tokens} tokens, top-{given.topk}, FP8 there and bf16 back: {said}")
    dist.barrier()
    return int(bool(wrong))


def main() -> int:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        return rank_main(given)
    if not torch.cuda.is_available():
        print("ep_graph.py: there is no device whose launches could be captured", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        own = [sys.executable, os.fspath(Path(__file__).resolve()), *sys.argv[1:], "--store", f"{folder}/store"]
        started = [subprocess.Popen([*own, "--rank", str(rank)]) for rank in range(given.ranks)]
        codes = [process.wait() for process in started]
    return max(abs(code) for code in codes)


if __name__ == "__main__":
    sys.exit(main())
