"""Plan and decode captured in one CUDA graph, replayed over other lengths and other data."""

from __future__ import annotations

import os
import sys

import torch
from hal_conformance.limits import compare

import hal
from hal.reference.mla import mla_decode as reference
from hal.spec.limits import DENSE_OUT

PAGE, BATCH, MOST = 64, 4, 1000


def main() -> int:
    """Exit code 1 if a replay gives anything but what a call gives."""
    name = os.environ["HAL_BACKEND"]
    device = torch.device(hal.capabilities(name).device_types[0], 0)
    generator = torch.Generator(device).manual_seed(7)
    pages = -(-MOST // PAGE)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device=device) / 10).to(torch.bfloat16)

    q, cache = normal(BATCH, 1, 128, 576), normal(BATCH * pages, PAGE, 1, 576)
    table = torch.randperm(BATCH * pages, generator=generator, device=device, dtype=torch.int32).view(BATCH, pages)
    lengths = torch.tensor([1000, 1, 64, 500], dtype=torch.int32, device=device)
    out = torch.empty((BATCH, 1, 128, 512), dtype=torch.bfloat16, device=device)

    def step() -> torch.Tensor:
        plan = hal.mla_plan(lengths, h_q=128, head_dim=576, backend=name)
        return hal.mla_decode(q, cache, table, lengths, plan=plan, out=out, backend=name)[1]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lse = step()
    wrong = 0
    for new in ([1000, 1, 64, 500], [0, 999, 640, 3], [1, 1, 1, 1], [1000, 1000, 1000, 1000]):
        lengths.copy_(torch.tensor(new, dtype=torch.int32))
        q.copy_(normal(*q.shape))
        out.fill_(float("nan"))
        graph.replay()
        right = compare(out.cpu(), reference(q.cpu(), cache.cpu(), table.cpu(), lengths.cpu())[0], DENSE_OUT).ok
        # The same kernels with the same lengths: the same bits.
        replayed, replayed_lse = out.clone(), lse.clone()
        right &= torch.equal(replayed_lse, step()) and torch.equal(replayed, out)
        print("ok   " if right else "WRONG", new, flush=True)
        wrong += not right
    print(f"{wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
