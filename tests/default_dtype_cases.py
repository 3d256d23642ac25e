"""Calls made where the program has set torch's default element type, as engines do while they load a model."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

import hal

TOKENS, EXPERTS, HIDDEN, TOPK = 64, 8, 256, 4


def results(rank: int, dtype: torch.dtype, nodes: int, pre_reduce: bool) -> list[torch.Tensor]:
    """Everything that dispatch and combine return, in both modes where both are declared."""
    os.environ["HAL_EP_RANKS_PER_NODE"] = str(dist.get_world_size() // nodes)
    seed = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN, generator=seed, dtype=torch.float32).bfloat16()
    idx = torch.rand(TOKENS, EXPERTS, generator=seed, dtype=torch.float32).topk(TOPK, 1).indices
    weights = torch.rand(TOKENS, TOPK, generator=seed, dtype=torch.float32)
    modes = ("normal", "low_latency") if nodes == 1 else ("normal",)
    found: list[torch.Tensor] = []
    torch.set_default_dtype(dtype)
    try:
        with hal.EpBuffer(
            num_experts=EXPERTS,
            hidden=HIDDEN,
            topk=TOPK,
            max_tokens_per_rank=TOKENS,
            modes=modes,
            pre_reduce=pre_reduce,
        ) as buffer:
            for expand in (False, True):
                sent = buffer.dispatch(x, idx, weights, expand=expand)
                assert isinstance(sent.recv_x, torch.Tensor)
                assert sent.recv_topk_weights is not None
                back = buffer.combine(sent.recv_x, sent.handle, topk_weights=sent.recv_topk_weights, bias=x)
                assert back.combined_topk_weights is not None
                found += [sent.recv_x, sent.recv_topk_idx, sent.recv_topk_weights]
                found += [back.combined_x, back.combined_topk_weights]
            if nodes == 1:
                packed = buffer.low_latency_dispatch(x, idx, use_fp8=False)
                assert isinstance(packed.recv_x, torch.Tensor)
                found.append(buffer.low_latency_combine(packed.recv_x, idx, weights, packed.handle).combined_x)
    finally:
        torch.set_default_dtype(torch.float32)
    return found


def same(rank: int, nodes: int, pre_reduce: bool) -> int:
    """Neither element types nor bits depend on the default."""
    want = results(rank, torch.float32, nodes, pre_reduce)
    for dtype in (torch.bfloat16, torch.float64):
        got = results(rank, dtype, nodes, pre_reduce)
        assert [one.dtype for one in got] == [one.dtype for one in want]
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    return len(want)
