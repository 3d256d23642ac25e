"""Mutants of L2: ragged queries, base 2, batch invariance, repetition, small and empty calls."""

from __future__ import annotations

import math
import random
from typing import Any

import torch

from hal.spec.errors import SpecError
from mutants.registry import mutant
from mutants.sample import Sample, dense

_LUCK = random.Random()
"""Its own: the process's generator is not a backend's to draw from."""


@mutant("L2", "ragged rows are shared out evenly", "")
class RaggedTakenForEven(Sample):
    def rows(self, args: Any, j: int) -> tuple[int, int]:
        if args.cu_seqlens_q is None:
            return super().rows(args, j)
        each = args.total_q // args.batch
        return j * each, args.total_q if j == args.batch - 1 else (j + 1) * each


@mutant("L2", "a sequence without queries steals the row of the next", "")
class RaggedEmptyTakesOne(Sample):
    def mla_decode(self, args: Any) -> None:
        super().mla_decode(args)
        if args.cu_seqlens_q is None:
            return
        for j in range(args.batch):
            start, stop = self.rows(args, j)
            if start == stop < args.total_q:
                args.out[start] = 0


@mutant("L2", "ragged causal masks with the longest s_q of the batch", "")
class RaggedCausalWithLongest(Sample):
    longest = 0

    def mla_decode(self, args: Any) -> None:
        self.longest = 0 if args.cu_seqlens_q is None else int(args.cu_seqlens_q.diff().max()) if args.batch else 0
        super().mla_decode(args)

    def seen(self, args: Any, s_q: int, length: int) -> Any:
        if not args.causal or not self.longest:
            return super().seen(args, s_q, length)
        return (length - self.longest + 1 + torch.arange(s_q)).clamp(0, length)


@mutant("L2", "the lse of ragged queries is stored row by row", "transposed")
class RaggedLseTransposed(Sample):
    def mla_decode(self, args: Any) -> None:
        super().mla_decode(args)
        if args.cu_seqlens_q is not None:
            args.lse.copy_(args.lse.T.clone().reshape(args.lse.shape))


@mutant("L2", "lse_base 2 is accepted and ignored", "base e")
class BaseTwoIgnored(Sample):
    def logarithm(self, args: Any, top: Any, total: Any) -> Any:
        return top + torch.log(total)


@mutant("L2", "lse_base 2 multiplies by ln 2 instead of dividing", "")
class BaseTwoInverted(Sample):
    def logarithm(self, args: Any, top: Any, total: Any) -> Any:
        lse = top + torch.log(total)
        return lse * math.log(2) if args.lse_base == "2" else lse


@mutant("L2", "base 2 is applied to the sum and not to the maximum", "")
class BaseTwoHalfway(Sample):
    def logarithm(self, args: Any, top: Any, total: Any) -> Any:
        return top + (torch.log2(total) if args.lse_base == "2" else torch.log(total))


@mutant("L2", "batch_invariant is accepted and ignored: splits grow with the batch", "")
class InvarianceIgnored(Sample):
    def splits(self, args: Any, j: int, length: int) -> Any:
        step = 48 * min(args.batch, 4) + 16
        return [(a, min(a + step, length)) for a in range(0, length, step)]


@mutant("L2", "batch_invariant is kept up to 4096 tokens, and long sequences are split by the batch", only="MLA-36")
class InvarianceOfLongLost(Sample):
    def splits(self, args: Any, j: int, length: int) -> Any:
        if length <= 4096:
            return super().splits(args, j, length)
        step = 128 * min(args.batch, 4)
        return [(a, min(a + step, length)) for a in range(0, length, step)]


@mutant("L2", "with a plan the splits are others than without", "")
class InvarianceLostInPlan(Sample):
    def mla_plan(self, args: Any) -> object:
        return [[(a, min(a + 72, n)) for a in range(0, n, 72)] for n in args.cache_seqlens.tolist()]


@mutant("L2", "the last sequence of a batch is merged in reverse", "")
class InvarianceLostAtTheEnd(Sample):
    def mla_decode(self, args: Any) -> None:
        self.last = args.batch - 1
        super().mla_decode(args)

    def splits(self, args: Any, j: int, length: int) -> Any:
        mine = super().splits(args, j, length)
        return mine[::-1] if j == self.last and args.batch > 1 else mine


@mutant("L2", "partial results are merged in the order they arrive", "")
class MergeInArrivalOrder(Sample):
    def splits(self, args: Any, j: int, length: int) -> Any:
        step = 16
        mine = [(a, min(a + step, length)) for a in range(0, length, step)]
        _LUCK.shuffle(mine)
        return mine


@mutant("L2", "a race: one run in fifty misses the last split", "")
class RaceOneInFifty(Sample):
    def merge(self, args: Any, q: Any, parts: Any) -> Any:
        return super().merge(args, q, parts[:-1] if _repeated(args) and _LUCK.random() < 0.02 else parts)

    split = 48


@mutant("L2", "a race in the store: one run in fifty leaves a row unwritten", "")
class RaceInStore(Sample):
    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        super().store(args, j, start, stop, out, lse)
        if j == 1 and _repeated(args) and _LUCK.random() < 0.02:
            args.out[j, 0, 0] = 0


def _repeated(args: Any) -> bool:
    """Small enough for two blocks to meet: a race shows on few shapes, and on those now and then."""
    lengths = args.cache_seqlens.tolist()
    return args.batch == 2 and lengths[0] <= 20 and 65 <= lengths[1] <= 140


@mutant("L2", "a batch of none divides by the batch", "")
class EmptyBatchDivides(Sample):
    def mla_decode(self, args: Any) -> None:
        _ = args.total_q // args.batch
        super().mla_decode(args)


@mutant("L2", "no queries at all is refused", "")
class NoQueriesRefused(Sample):
    def mla_decode(self, args: Any) -> None:
        if args.total_q == 0:
            raise SpecError("q", "no queries", "at least one")
        super().mla_decode(args)


@mutant("L2", "the plan of a ragged batch keeps the first split of each sequence", "")
class PlanForgetsRaggedSplits(Sample):
    def mla_plan(self, args: Any) -> object:
        every = super().mla_plan(args)
        if args.cu_seqlens_q is None:
            return every
        return [splits[:1] for splits in every]


@mutant("L2", "strided q together with out=: the contiguous copy is made of out", "")
class CombinationOfLayouts(Sample):
    def queries(self, args: Any, j: int, start: int, stop: int) -> Any:
        q = super().queries(args, j, start, stop)
        return q.flip(-2) if not args.q.is_contiguous() and args.lse_base == "2" else q

    def declared(self) -> Any:
        return dense()
