"""What `hal.mla_decode` adds to the backend's own call at 4096 tokens, where 61 layers are one step of an engine."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

import hal
from hal.bench.overhead import checked
from hal.plugins import select
from hal.spec.mla import MlaDecodeArgs

PAGE, BATCH, TOKENS, LAYERS, ROUNDS = 64, 128, 4096, 61, 9
MOST = 1.02


def main() -> int:
    """Exit code 1 if 61 layers through the HAL take more than 1.02 times as long as straight from the backend."""
    name = os.environ["HAL_BACKEND"]
    selected = select(name)
    device = torch.device(selected.capabilities.device_types[0], 0)
    generator = torch.Generator(device).manual_seed(7)
    pages = TOKENS // PAGE
    cache = torch.randn((BATCH * pages, PAGE, 1, 576), generator=generator, device=device, dtype=torch.bfloat16) / 10
    table = torch.randperm(BATCH * pages, generator=generator, device=device).int().view(BATCH, pages)
    lengths = torch.full((BATCH,), TOKENS, dtype=torch.int32, device=device)
    worst = 0.0
    for h_q in (16, 128):
        q = torch.randn((BATCH, 1, h_q, 576), generator=generator, device=device, dtype=torch.bfloat16) / 10
        out = q.new_empty(BATCH, 1, h_q, 512)
        plan = hal.mla_plan(lengths, h_q=h_q, head_dim=576, backend=name)
        args = checked(q, cache, table, lengths, out)
        args.schedule = plan.schedule

        def through(q: torch.Tensor = q, plan: hal.MlaPlan = plan, out: torch.Tensor = out) -> None:
            hal.mla_decode(q, cache, table, lengths, plan=plan, out=out, backend=name)

        def straight(args: MlaDecodeArgs = args) -> None:
            selected.backend.mla_decode(args)

        ratios = [_layers(through) / _layers(straight) for _ in range(ROUNDS)]
        print(f"h_q {h_q}: {statistics.median(ratios):.4f} times as long ({min(ratios):.4f} to {max(ratios):.4f})")
        worst = max(worst, statistics.median(ratios))
    return 1 if worst > MOST else 0


def _layers(call: Callable[[], None]) -> float:
    """Seconds of a step of 61 layers, from the first call to the end of the device's work."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(LAYERS):
        call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
