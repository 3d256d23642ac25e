"""Calls made where the program has set torch's defaults, as engines do while they load a model, or a gradient mode."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist

import hal

TOKENS, EXPERTS, HIDDEN, TOPK = 64, 8, 256, 4


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    """Another default element type."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def elsewhere(hook: Callable[[], None]) -> None:
    """Run it on a thread that has no modes of torch."""
    with ThreadPoolExecutor(1) as other:
        other.submit(hook).result()


def results(rank: int, around: AbstractContextManager[object], nodes: int, pre_reduce: bool) -> list[torch.Tensor]:
    """Everything that dispatch and combine return, in both modes, at once and with hooks that run on other threads."""
    os.environ["HAL_EP_RANKS_PER_NODE"] = str(dist.get_world_size() // nodes)
    seed = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN, generator=seed, dtype=torch.float32).bfloat16()
    idx = torch.rand(TOKENS, EXPERTS, generator=seed, dtype=torch.float32).topk(TOPK, 1).indices
    weights = torch.rand(TOKENS, TOPK, generator=seed, dtype=torch.float32)
    waits = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    with (
        around,
        hal.EpBuffer(
            num_experts=EXPERTS, hidden=HIDDEN, topk=TOPK, max_tokens_per_rank=TOKENS, pre_reduce=pre_reduce
        ) as buffer,
    ):
        found: list[torch.Tensor] = []
        for expand in (False, True):
            sent = buffer.dispatch(x, idx, weights, expand=expand)
            assert isinstance(sent.recv_x, torch.Tensor)
            assert sent.recv_topk_weights is not None
            back = buffer.combine(
                sent.recv_x,
                sent.handle,
                topk_weights=sent.recv_topk_weights,
                bias=x,
                return_recv_hook=expand,
            )
            if back.hook is not None:
                elsewhere(back.hook)
            assert back.combined_topk_weights is not None
            found += [sent.recv_x, sent.recv_topk_idx, sent.recv_topk_weights, sent.recv_src_rank]
            found += [back.combined_x, back.combined_topk_weights]
        for hooked in (False, True):
            packed = buffer.low_latency_dispatch(
                x, idx, use_fp8=False, return_recv_hook=hooked, dispatch_wait_recv_cost_stats=waits
            )
            if packed.hook is not None:
                elsewhere(packed.hook)
            assert isinstance(packed.recv_x, torch.Tensor)
            summed = buffer.low_latency_combine(packed.recv_x, idx, weights, packed.handle, return_recv_hook=hooked)
            if summed.hook is not None:
                elsewhere(summed.hook)
            found.append(summed.combined_x)
        return [one.clone() for one in found]


def same(rank: int, nodes: int, pre_reduce: bool) -> int:
    """Neither element types nor bits depend on what is set."""
    want = results(rank, nullcontext(), nodes, pre_reduce)
    settings = (default(torch.bfloat16), default(torch.float64), torch.device("meta"), torch.inference_mode())
    for around in settings:
        got = results(rank, around, nodes, pre_reduce)
        assert [(one.dtype, one.device) for one in got] == [(one.dtype, one.device) for one in want]
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    return len(want)
