"""How fast the backend is beside what its device can do; shown, never judged."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import torch

from hal_conformance.context import Context
from hal_conformance.decode import call
from hal_conformance.draw import head_dims

_SHAPES: Final = ((1, 16, 4096), (1, 128, 4096), (4, 128, 1024), (8, 16, 2048), (1, 16, 512))
_BUDGET: Final = 4.0
"""Seconds for one shape; a slow backend is measured once."""


def measure(context: Context) -> dict[str, Any]:
    """Time a few decode shapes, a matrix product and a copy on the same device."""
    points: list[dict[str, Any]] = []
    if context.capabilities.mla_dense is None:
        return {"points": points, "flops": 0.0, "bytes": 0.0}
    dense = context.dense
    d, d_v = head_dims(dense)[0]
    base = context.draw().base().but(d=d, d_v=d_v, pages="shuffled", h_kv=1)
    shapes = [s for s in _SHAPES if s[1] in dense.h_q and 1 in dense.h_kv]
    for batch, h_q, length in shapes[-1:] if context.settings.mode == "quick" else shapes:
        inputs = context.make(base.but(lengths=(length,) * batch, h_q=h_q))
        spent = seconds = call(inputs, context.backend).seconds
        while spent < _BUDGET and seconds < _BUDGET / 2 and spent < 40 * seconds:
            again = call(inputs, context.backend).seconds
            spent, seconds = spent + again, min(seconds, again)
        points.append(
            {
                "name": f"b{batch} h{h_q} s{length}",
                "seconds": seconds,
                "flops": inputs.case.flops(),
                "bytes": inputs.case.bytes(),
            }
        )
    flops, moved = _ceilings(context.device, base.torch_dtype)
    return {"points": points, "flops": flops, "bytes": moved, "dtype": base.dtype}


def _ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of torch's own matrix product (the better of float32 and the dtype), and bytes a second of its copy."""
    best = 0.0
    for kind in {torch.float32, dtype}:
        a = torch.ones(768, 768, dtype=kind, device=device)
        best = max(best, 2 * 768**3 / _time(lambda a=a: a @ a, device))  # type: ignore[misc]
    source = torch.ones(16 << 20, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return best, 2 * source.numel() * 4 / _time(lambda: target.copy_(source), device)


def _time(work: Callable[[], torch.Tensor], device: str) -> float:
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        # Reading one value waits for the device, whichever it is.
        work().flatten()[0].item()
        best = min(best, time.perf_counter() - start)
    return best
