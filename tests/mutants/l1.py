"""Mutants of L1: dense decode that is wrong for ordinary calls."""

from __future__ import annotations

import math
from typing import Any

import torch

from mutants.registry import mutant
from mutants.sample import Sample


@mutant("L1", "lse is left in base 2, as the exponent unit computes it", "base 2")
class LseBaseTwo(Sample):
    def logarithm(self, args: Any, top: Any, total: Any) -> Any:
        return (top + torch.log(total)) / math.log(2)


@mutant("L1", "the scale is forgotten", "scale is missing")
class ScaleMissing(Sample):
    def scale(self, args: Any) -> float:
        return 1.0


@mutant("L1", "the scale is head_dim_v ** -0.5", "head_dim_v")
class ScaleOfValues(Sample):
    def scale(self, args: Any) -> float:
        return args.head_dim_v**-0.5 if args.softmax_scale == args.head_dim**-0.5 else args.softmax_scale


@mutant("L1", "softmax_scale is ignored: the default is compiled in", "default scale")
class ScaleCompiledIn(Sample):
    def scale(self, args: Any) -> float:
        return args.head_dim**-0.5


@mutant("L1", "the scale is applied to q and again to the scores", "twice")
class ScaleTwice(Sample):
    def scale(self, args: Any) -> float:
        return args.softmax_scale**2


@mutant("L1", "lse misses the scale: the maximum was kept before scaling")
class LseUnscaledMaximum(Sample):
    def logarithm(self, args: Any, top: Any, total: Any) -> Any:
        return super().logarithm(args, top / args.softmax_scale, total)


@mutant("L1", "lse is the logarithm of the sum without the maximum", "maximum")
class LseWithoutMaximum(Sample):
    def logarithm(self, args: Any, top: Any, total: Any) -> Any:
        return super().logarithm(args, torch.zeros_like(top), total)


@mutant("L1", "lse is written [b, s_q, h_q]", "transposed")
class LseTransposed(Sample):
    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        super().store(args, j, start, stop, out, lse)
        if args.cu_seqlens_q is None:
            args.lse[j] = lse.reshape(args.lse[j].shape)


@mutant("L1", "V starts after the RoPE columns", "V columns")
class ValuesShifted(Sample):
    def values(self, args: Any, keys: Any) -> Any:
        return keys[:, -args.head_dim_v :]


@mutant("L1", "RoPE columns are left out of the scores", "RoPE")
class RopeLeftOut(Sample):
    def scores(self, args: Any, q: Any, keys: Any) -> Any:
        return super().scores(args, q[..., : args.head_dim_v], keys[:, : args.head_dim_v])


@mutant("L1", "query head h attends KV head h % h_kv", "h % h_kv")
class HeadsInterleaved(Sample):
    def heads(self, args: Any, kv_head: int) -> Any:
        return torch.arange(kv_head, args.h_q, args.h_kv)


@mutant("L1", "every query head attends KV head 0", "KV head 0")
class FirstKvHead(Sample):
    def scores(self, args: Any, q: Any, keys: Any) -> Any:
        return super().scores(args, q, keys)

    def gather(self, args: Any, j: int, length: int) -> Any:
        rows = super().gather(args, j, length)
        return rows[:, :1].expand(rows.shape)


@mutant("L1", "pages are taken in the order they lie in memory", "page order")
class PageOrderIgnored(Sample):
    def pages(self, args: Any, j: int, length: int) -> Any:
        used = super().pages(args, j, length)
        return used[0] + torch.arange(len(used)) if len(used) else used

    def gather(self, args: Any, j: int, length: int) -> Any:
        pages = self.pages(args, j, length) % args.num_blocks
        return args.kv_cache[pages].flatten(0, 1)[:length].float()


@mutant("L1", "the page size 64 is compiled in")
class PageSizeCompiledIn(Sample):
    def gather(self, args: Any, j: int, length: int) -> Any:
        positions = torch.arange(length)
        table = args.block_table[j].long().clamp(0, args.num_blocks - 1)
        pages = table[(positions // 64).clamp(max=args.max_blocks - 1)]
        return args.kv_cache[pages, (positions % 64).clamp(max=args.page_size - 1)].float()


@mutant("L1", "causal sees one key too many", "off by one")
class CausalOneMore(Sample):
    def seen(self, args: Any, s_q: int, length: int) -> Any:
        seen = super().seen(args, s_q, length)
        return (seen + 1).clamp(max=length) if args.causal else seen


@mutant("L1", "causal sees one key too few", "off by one")
class CausalOneLess(Sample):
    def seen(self, args: Any, s_q: int, length: int) -> Any:
        seen = super().seen(args, s_q, length)
        return (seen - 1).clamp(min=0) if args.causal else seen


@mutant("L1", "the causal mask is aligned at the top left", "top left")
class CausalTopLeft(Sample):
    def seen(self, args: Any, s_q: int, length: int) -> Any:
        return torch.arange(1, s_q + 1).clamp(max=length) if args.causal else super().seen(args, s_q, length)


@mutant("L1", "causal is ignored", "causal is ignored")
class CausalIgnored(Sample):
    def seen(self, args: Any, s_q: int, length: int) -> Any:
        return torch.full((s_q,), length)


@mutant("L1", "always causal: the flag is compiled in", "causal is applied")
class CausalAlways(Sample):
    def seen(self, args: Any, s_q: int, length: int) -> Any:
        return (length - s_q + 1 + torch.arange(s_q)).clamp(0)


@mutant("L1", "the last, partly filled page is dropped", "last page")
class LastPageLost(Sample):
    def splits(self, args: Any, j: int, length: int) -> Any:
        whole = length // args.page_size * args.page_size or length
        return [(a, min(z, whole)) for a, z in super().splits(args, j, length) if a < whole]


# A case whose lengths end one past a multiple of 8 is explained by smaller vectors as well.
@mutant("L1", "the vector loop loses its tail: keys past the last multiple of 8", "keys past the last multiple of")
class VectorTailLost(Sample):
    def splits(self, args: Any, j: int, length: int) -> Any:
        whole = length // 8 * 8 or length
        return [(a, min(z, whole)) for a, z in super().splits(args, j, length) if a < whole]


@mutant("L1", "the last split is never merged", "the last ")
class LastSplitLost(Sample):
    def merge(self, args: Any, q: Any, parts: Any) -> Any:
        return super().merge(args, q, parts[:-1] or parts)


@mutant("L1", "splits are averaged without their weights")
class SplitsAveraged(Sample):
    def merge(self, args: Any, q: Any, parts: Any) -> Any:
        if len(parts) < 2:
            return super().merge(args, q, parts)
        done = [super(SplitsAveraged, self).merge(args, q, [part]) for part in parts]
        return sum(out for out, _ in done) / len(done), super().merge(args, q, parts)[1]


@mutant("L1", "the accumulator is not rescaled when the maximum rises")
class NoRescale(Sample):
    def merge(self, args: Any, q: Any, parts: Any) -> Any:
        top = torch.stack([m for _, m, _ in parts]).amax(0) if parts else None
        if top is None:
            return super().merge(args, q, parts)
        out, total = sum(o for o, _, _ in parts), sum(t for _, _, t in parts)
        return self.finish(args, out, top, total)


@mutant("L1", "the row sum is reduced over 32 lanes of a group of 64")
class HalfReduction(Sample):
    def row_sum(self, weights: Any) -> Any:
        lanes = torch.arange(weights.shape[-1]) % 64 < 32
        return weights[..., lanes].sum(-1)


@mutant("L1", "the row maximum is reduced over 32 lanes of 64, and large scores overflow half precision weights")
class HalfMaximum(Sample):
    def weights(self, scores: Any) -> Any:
        lanes = torch.arange(scores.shape[-1]) % 64 < 32
        m = scores[..., lanes].amax(-1)
        return m, torch.exp(scores - m.masked_fill(m == -torch.inf, 0)[..., None]).half().float()


@mutant("L1", "a sequence uses the length of its neighbour", "another sequence")
class LengthOfNeighbour(Sample):
    def length(self, args: Any, j: int) -> int:
        return min(super().length(args, j), super().length(args, (j + 1) % args.batch))

    def splits(self, args: Any, j: int, length: int) -> Any:
        return self.bounds(length)


@mutant("L1", "all sequences use the shortest length", "another sequence")
class ShortestLength(Sample):
    def length(self, args: Any, j: int) -> int:
        lengths = [n for n in args.cache_seqlens.tolist() if n]
        return min(lengths) if lengths and super().length(args, j) else 0

    def splits(self, args: Any, j: int, length: int) -> Any:
        return self.bounds(length)


@mutant("L1", "the schedule of the first plan is used for ever")
class FirstPlanForEver(Sample):
    kept: Any = None

    def splits(self, args: Any, j: int, length: int) -> Any:
        if args.schedule is not None and self.kept is None:
            type(self).kept = args.schedule
        if args.schedule is None or j >= len(self.kept):
            return super().splits(args, j, length)
        return [(a, min(z, length)) for a, z in self.kept[j] if a < length]


@mutant("L1", "out= is ignored: the result goes to a buffer of its own")
class OutIgnored(Sample):
    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        if args.out.is_contiguous() and args.h_q > 1:
            args.out = args.out.clone()
        super().store(args, j, start, stop, out, lse)


@mutant("L1", "rows are stored as whole 16-byte vectors one past the end", "")
class StoresPastTheEnd(Sample):
    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        super().store(args, j, start, stop, out, lse)
        if stop == args.total_q:
            wide = args.out.as_strided((8,), (1,), args.out.storage_offset() + self.last(args.out) + 1)
            wide.zero_()

    @staticmethod
    def last(view: Any) -> int:
        return sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))


@mutant("L1", "q is scaled in place")
class ScalesQueriesInPlace(Sample):
    def mla_decode(self, args: Any) -> None:
        super().mla_decode(args)
        args.q.mul_(args.softmax_scale)


@mutant("L2", "the cache is flushed to zero where it held NaN, in place")
class CleansCacheInPlace(Sample):
    def mla_decode(self, args: Any) -> None:
        args.kv_cache.nan_to_num_(nan=0.0)
        super().mla_decode(args)


@mutant("L1", "heads past the last multiple of 16 are never computed", "")
class HeadTailLost(Sample):
    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        whole = args.h_q // 16 * 16 or args.h_q
        out[:, whole:] = 0
        lse[:, whole:] = 0
        super().store(args, j, start, stop, out, lse)


@mutant("L1", "queries and heads are stored in each other's order")
class QueriesAndHeadsSwapped(Sample):
    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        super().store(args, j, start, stop, out.transpose(0, 1).reshape(out.shape), lse)


@mutant("L1", "weights and accumulator are kept in half the precision", "")
class LowPrecisionAccumulator(Sample):
    def merge(self, args: Any, q: Any, parts: Any) -> Any:
        coarse = [((o * 8).bfloat16().float() / 8 * (1 + 2**-7 * torch.sign(o)), m, t) for o, m, t in parts]
        return super().merge(args, q, coarse)


@mutant("L1", "float16 caches are read as bfloat16")
class DtypeConfused(Sample):
    def gather(self, args: Any, j: int, length: int) -> Any:
        rows = super().gather(args, j, length)
        return rows if args.q.dtype != torch.float16 else rows.half().view(torch.bfloat16).float()


@mutant("L1", "the workspace keeps the partial results of a larger call before")
class StaleWorkspace(Sample):
    kept = 0

    def merge(self, args: Any, q: Any, parts: Any) -> Any:
        before, type(self).kept = self.kept, len(parts)
        return super().merge(args, q, parts + parts[:1] * (before > len(parts) > 0))


@mutant("L1", "compiled kernels are cached without softmax_scale in the key")
class KernelCacheKey(Sample):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[Any, float] = {}

    def scale(self, args: Any) -> float:
        return self.cache.setdefault((args.h_q, args.head_dim, args.page_size), args.softmax_scale)


@mutant("L1", "long sequences fall back to the framework: no kernel is launched for them")
class FallsBackForLong(Sample):
    def mla_decode(self, args: Any) -> None:
        before = self.decodes
        super().mla_decode(args)
        if max(args.cache_seqlens.tolist(), default=0) > 400:
            self.decodes = before
