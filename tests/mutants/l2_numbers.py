"""Mutants of L2: numbers softmax breaks on, and lengths schedules break on."""

from __future__ import annotations

from typing import Any

import torch

from mutants.registry import mutant
from mutants.sample import Sample


@mutant("L2", "the maximum is not subtracted", "computed, not read")
class MaximumNotSubtracted(Sample):
    def weights(self, scores: Any) -> Any:
        return torch.zeros(scores.shape[:-1]), torch.exp(scores)


@mutant("L2", "the running maximum starts at 0", "")
class MaximumStartsAtZero(Sample):
    def weights(self, scores: Any) -> Any:
        m = scores.amax(-1).clamp(min=0)
        return m, torch.exp(scores - m[..., None])


@mutant("L2", "the mask is -10,000, which real scores fall below", "")
class MaskTooSmall(Sample):
    def mask(self, scores: Any, hidden: Any) -> Any:
        return torch.where(hidden & ~hidden.all(-1, keepdim=True), -1e4, super().mask(scores, hidden))


@mutant("L2", "products of q and k saturate at 65504, the largest float16", "")
class ProductsInHalf(Sample):
    def scores(self, args: Any, q: Any, keys: Any) -> Any:
        return (q @ keys.T).clamp(-65504, 65504) * self.scale(args)


@mutant("L2", "scores are clamped to ±88, where exp still works", "")
class ScoresClamped(Sample):
    def scores(self, args: Any, q: Any, keys: Any) -> Any:
        return super().scores(args, q, keys).clamp(-88, 88)


@mutant("L2", "V is clamped to ±60", "")
class ValuesClamped(Sample):
    def values(self, args: Any, keys: Any) -> Any:
        return super().values(args, keys).clamp(-60, 60)


@mutant("L2", "equal logits: only the first of equal maxima counts", "")
class TiesDropped(Sample):
    def weights(self, scores: Any) -> Any:
        m, weights = super().weights(scores)
        if bool((scores == scores[..., :1]).all()) and scores.shape[-1] > 1:
            weights = weights.clone()
            weights[..., 1:] = 0
        return m, weights


@mutant("L2", "the maximum is taken before scaling: a negative scale turns it into the minimum", "")
class MaximumBeforeScale(Sample):
    def weights(self, scores: Any) -> Any:
        if self.sign >= 0:
            return super().weights(scores)
        m = scores.masked_fill(scores == -torch.inf, torch.inf).amin(-1)
        return m, torch.exp((scores - m[..., None]).clamp(max=1))

    def scale(self, args: Any) -> float:
        self.sign = args.softmax_scale
        return args.softmax_scale


@mutant("L2", "a scale of 0 is taken for no scale given", "default scale")
class ZeroScaleIsDefault(Sample):
    def scale(self, args: Any) -> float:
        return args.softmax_scale or args.head_dim**-0.5


@mutant("L2", "at most 32 splits fit the table: tokens past 4096 are dropped", "only the first|dropped")
class SplitTableFull(Sample):
    def splits(self, args: Any, j: int, length: int) -> Any:
        return super().splits(args, j, length)[:32]


@mutant("L2", "splits are shared out evenly: the long sequence among short ones gets too few", "")
class SplitsSharedOut(Sample):
    def splits(self, args: Any, j: int, length: int) -> Any:
        mine = super().splits(args, j, length)
        return mine[: max(8, 48 // args.batch)] if args.batch > 8 else mine


@mutant("L2", "one running maximum for all heads of a tile, and all queries", "")
class MaximumOfAllHeads(Sample):
    def weights(self, scores: Any) -> Any:
        m = scores.amax()
        return m.expand(scores.shape[:-1]), torch.exp(scores - (0 if m == -torch.inf else m))


@mutant("L2", "heads of a tile are told apart by a product with ones and zeros: 0 * NaN", "what belongs to others")
class HeadsToldApartByZeros(Sample):
    def scores(self, args: Any, q: Any, keys: Any) -> Any:
        return super().scores(args, q + 0 * q.sum(1, keepdim=True), keys)
