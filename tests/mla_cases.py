"""Cases of the published FlashMLA test sweep: their inputs, made to attack, and the limits a result must keep."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hal.spec.limits import DENSE_LSE, DENSE_OUT

GARBAGE_ENTRY = 2147480000


@dataclass(frozen=True)
class Case:
    """One row of the sweep; its ``str`` is enough to make it again."""

    b: int
    s_q: int
    s_k: int
    h_q: int
    h_kv: int
    causal: bool
    varlen: bool
    zero_lengths: bool = False
    d: int = 576
    d_v: int = 512
    page_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0


@dataclass
class Inputs:
    q: Tensor
    kv_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.kv_cache, self.block_table, self.cache_seqlens


def published(seed: int) -> Iterator[Case]:
    """All 2304 published dense cases and the 32 with sequences of length zero."""
    numbers = itertools.count(seed)
    heads = [(h_q, h_kv) for h_q in (1, 3, 9, 63, 64, 126, 128) for h_kv in (1, 2, 3, 8) if h_q % h_kv == 0]
    shapes = itertools.product((1, 2, 6, 64), (1, 2, 4), (20, 140, 4096), heads, (False, True), (False, True))
    for b, s_q, s_k, (h_q, h_kv), causal, varlen in shapes:
        yield Case(b, s_q, s_k, h_q, h_kv, causal, varlen, seed=next(numbers))
    for b, s_q, s_k, h_q, causal in itertools.product((2, 6), (1, 2), (20, 4096), (64, 128), (False, True)):
        yield Case(b, s_q, s_k, h_q, 1, causal, True, zero_lengths=True, seed=next(numbers))


def work(case: Case) -> int:
    """Multiply-adds of the case, to choose a subset that fits a time budget."""
    return case.b * case.s_q * case.h_q * case.s_k * (case.d + case.d_v)


def subset(seed: int, budget: int, most: int) -> list[Case]:
    """A random subset of the sweep within a budget of multiply-adds, every case below its share of it."""
    rng = random.Random(seed)
    cases = [case for case in published(seed) if work(case) <= budget // 8]
    rng.shuffle(cases)
    chosen: list[Case] = []
    for case in cases:
        if len(chosen) < most and work(case) <= budget:
            budget -= work(case)
            chosen.append(case)
    return chosen


def make(case: Case) -> Inputs:
    """Shuffled pages; NaN in all cache memory no sequence uses; garbage in all table entries no sequence uses."""
    rng = torch.Generator().manual_seed(case.seed)
    lengths = torch.full((case.b,), case.s_k)
    if case.varlen:
        drawn = torch.normal(float(case.s_k), case.s_k / 2, (case.b,), generator=rng)
        lengths = drawn.clamp(min=case.s_q).to(torch.int64)
    if case.zero_lengths:
        lengths[torch.randperm(case.b, generator=rng)[: (case.b + 1) // 2]] = 0
    page = case.page_size
    used = (lengths + page - 1) // page
    max_blocks = max(used.tolist(), default=0) + 1
    num_blocks = int(used.sum()) + 2
    order = torch.randperm(num_blocks, generator=rng).to(torch.int32)
    table = torch.full((case.b, max_blocks), GARBAGE_ENTRY, dtype=torch.int32)
    shape = (num_blocks, page, case.h_kv, case.d)
    cache = torch.randn(shape, generator=rng, dtype=torch.float32).div_(10).clamp_(-1, 1).to(case.dtype)
    live = torch.zeros(num_blocks, page, dtype=torch.bool)
    start = 0
    for j, (count, length) in enumerate(zip(used.tolist(), lengths.tolist(), strict=True)):
        pages = order[start : start + count]
        table[j, :count] = pages
        live[pages.long()] = (torch.arange(count * page) < length).view(count, page)
        start += count
    cache[~live] = torch.nan
    q = torch.randn(case.b, case.s_q, case.h_q, case.d, generator=rng).div_(10).clamp_(-1, 1).to(case.dtype)
    return Inputs(q, cache, table, lengths.to(torch.int32))


def assert_close(out: Tensor, lse: Tensor, want_out: Tensor, want_lse: Tensor, what: object) -> None:
    """Hold the published limits, for every (query, head) row and not only for the whole tensor."""
    assert out.shape == want_out.shape, f"{what}: out has shape {list(out.shape)}, not {list(want_out.shape)}"
    assert lse.shape == want_lse.shape, f"{what}: lse has shape {list(lse.shape)}, not {list(want_lse.shape)}"
    got, lse = out.double(), lse.double()
    if got.numel() == 0:
        return
    off = (got - want_out).abs()
    bad = ~((off <= DENSE_OUT.absolute) | (off <= DENSE_OUT.relative * want_out.abs()))
    assert not bad.any(), f"{what}: out at {bad.nonzero()[0].tolist()} is off by {float(off[bad][0])}"
    norm = (got * got + want_out * want_out).sum(-1)
    cosine = 1 - 2 * (got * want_out).sum(-1) / norm.clamp(min=1e-300)
    cosine[norm == 0] = 0
    assert cosine.abs().max() <= DENSE_OUT.cosine, f"{what}: cosine difference {float(cosine.abs().max())} in one row"
    infinite = want_lse.isinf()
    assert torch.equal(lse.isinf() & (lse > 0), infinite), f"{what}: lse is +inf in other rows than the reference"
    lse_off = (lse - want_lse)[~infinite].abs()
    within = (lse_off <= DENSE_LSE.absolute) | (lse_off <= DENSE_LSE.relative * want_lse[~infinite].abs())
    assert within.all(), f"{what}: lse is off by {float(lse_off[~within].max())}"
