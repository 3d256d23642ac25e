"""Inputs made to attack, a call through the spec's own checks, and the limits a result must keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hal_cpu.backend import Kernel
from hal_cpu.torch_path import TorchKernel
from torch import Tensor

from hal.reference import mla as reference
from hal.spec.limits import DENSE_LSE, DENSE_OUT
from hal.spec.mla import MlaDecodeArgs, check_decode
from hal.spec.plan import check_plan

__all__ = ["GARBAGE", "Case", "Kernel", "TorchKernel", "assert_close", "check", "decode", "make", "make_args", "plan"]

GARBAGE = 2147480000


@dataclass
class Case:
    """Tensors and options of one call."""

    q: Tensor
    kv_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    cu_seqlens_q: Tensor | None
    head_dim_v: int
    causal: bool = False
    softmax_scale: float | None = None
    lse_base: str = "e"
    batch_invariant: bool = False
    out: Tensor | None = None

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)


def make(
    lengths: Sequence[int],
    *,
    s_q: int = 1,
    queries: Sequence[int] | None = None,
    h_q: int = 16,
    h_kv: int = 1,
    d: int = 576,
    d_v: int = 512,
    page: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    strided: bool = False,
    magnitude: float = 1.0,
    **options: Any,
) -> Case:
    """Shuffled pages, NaN in every cache row no sequence uses, garbage in every table entry none uses.

    ``strided``: every tensor is a view with gaps, and the cache keeps heads outermost.
    """
    rng = torch.Generator().manual_seed(seed)
    used = [-(-n // page) for n in lengths]
    num_blocks, max_blocks = sum(used) + 2, max(used, default=0) + 2
    gap = 5 if strided else 0
    # A generator of its own: the cached values must not depend on the page size.
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    table = torch.full((len(lengths), max_blocks + gap), GARBAGE, dtype=torch.int32)[:, :max_blocks]
    cache = torch.full((h_kv, num_blocks, page + gap, d + gap), torch.nan, dtype=dtype)
    cache = cache[:, :, :page, :d].permute(1, 2, 0, 3) if strided else cache.view(num_blocks, page, h_kv, d)
    start = 0
    for i, (length, blocks) in enumerate(zip(lengths, used, strict=True)):
        pages = order[start : start + blocks]
        table[i, :blocks] = pages
        rows = (torch.randn(length, h_kv, d, generator=rng) * magnitude).to(dtype)
        positions = torch.arange(length)
        cache[pages[positions // page].long(), positions % page] = rows
        start += blocks
    leading = (len(lengths), s_q) if queries is None else (sum(queries),)
    q = torch.full((*leading, h_q + gap, d + gap), torch.nan).to(dtype)[..., :h_q, :d]
    q.copy_(torch.randn(*leading, h_q, d, generator=rng) * magnitude)
    cu = None if queries is None else torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    out = torch.full((*leading, h_q + gap, d_v + gap), torch.nan, dtype=dtype)[..., :h_q, :d_v] if strided else None
    return Case(q, cache, table, torch.tensor(lengths, dtype=torch.int32).reshape(-1), cu, d_v, out=out, **options)


def make_args(case: Case) -> MlaDecodeArgs:
    return check_decode(
        q=case.q,
        kv_cache=case.kv_cache,
        block_table=case.block_table,
        cache_seqlens=case.cache_seqlens,
        head_dim_v=case.head_dim_v,
        softmax_scale=case.softmax_scale,
        causal=case.causal,
        kv_format=None,
        indices=None,
        topk_length=None,
        attn_sink=None,
        extra_kv_cache=None,
        extra_indices=None,
        extra_topk_length=None,
        out=case.out,
        cu_seqlens_q=case.cu_seqlens_q,
        lse_base=case.lse_base,
        batch_invariant=case.batch_invariant,
    )


def plan(kernel: Kernel, case: Case) -> object:
    args = make_args(case)
    return kernel.plan(
        check_plan(
            case.cache_seqlens,
            args.h_q,
            args.h_kv,
            args.s_q,
            case.cu_seqlens_q,
            args.head_dim,
            args.head_dim_v,
            args.page_size,
            case.q.dtype,
            "plain",
            case.causal,
            case.batch_invariant,
        )
    )


def decode(kernel: Kernel, case: Case, schedule: object = None) -> tuple[Tensor, Tensor]:
    args = make_args(case)
    # Whatever is not written shows.
    args.out.fill_(torch.nan)
    args.lse.fill_(-12345.0)
    args.schedule = schedule
    kernel.decode(args)
    return args.out, args.lse


def check(kernel: Kernel, case: Case, schedule: object = None) -> tuple[Tensor, Tensor]:
    """Decode and hold the result against the float64 reference."""
    out, lse = decode(kernel, case, schedule)
    want = reference.mla_decode(
        case.q,
        case.kv_cache,
        case.block_table,
        case.cache_seqlens,
        head_dim_v=case.head_dim_v,
        softmax_scale=case.softmax_scale,
        causal=case.causal,
        cu_seqlens_q=case.cu_seqlens_q,
        lse_base=case.lse_base,
    )
    assert_close(out, lse, *want)
    return out, lse


def assert_close(out: Tensor, lse: Tensor, want_out: Tensor, want_lse: Tensor) -> None:
    """The published limits for every (query, head) row; float32 far closer."""
    exact = out.dtype == torch.float32
    got, wanted = out.double(), want_out.double()
    assert got.shape == wanted.shape and lse.shape == want_lse.shape
    if got.numel() == 0:
        return
    off = (got - wanted).abs()
    size = wanted.abs().amax(-1, keepdim=True)
    near = (
        off <= 1e-5 * (1 + size) if exact else (off <= DENSE_OUT.absolute) | (off <= DENSE_OUT.relative * wanted.abs())
    )
    assert near.all(), f"out at {(~near).nonzero()[0].tolist()}: {float(got[~near][0])}, not {float(wanted[~near][0])}"
    # A short row may exceed the cosine limit by rounding to bfloat16 alone: up to 2⁻¹⁷ for a single element.
    norm = (got * got + wanted * wanted).sum(-1) * (got.shape[-1] >= 16)
    cosine = torch.where(norm == 0, 0, 1 - 2 * (got * wanted).sum(-1) / norm)
    assert cosine.abs().max() <= DENSE_OUT.cosine, f"cosine difference {float(cosine.abs().max())}"
    nothing = want_lse == math.inf
    assert torch.equal(lse == math.inf, nothing), "lse is +inf in other rows"
    lse_off = (lse.double() - want_lse)[~nothing].abs()
    limit = torch.clamp(
        want_lse[~nothing].abs() * (1e-6 if exact else DENSE_LSE.relative), min=3e-6 if exact else DENSE_LSE.absolute
    )
    assert (lse_off <= limit).all(), f"lse is off by {float((lse_off - limit).max())} more than allowed"
