"""Mutants of E1: sums of the normal mode."""

from __future__ import annotations

import random
from typing import Any

import torch

from mutants.ep_sample import Engine
from mutants.registry import engine


@engine("E1", "rows are added as they arrive: from this rank on, around", "arrive")
class SumInArrivalOrder(Engine):
    def ordered(self, terms: Any) -> Any:
        return sorted(terms, key=lambda term: (term[0] - self.rank) % self.ranks)


@engine("E1", "rows are added by rank", "by rank")
class SumByRank(Engine):
    def ordered(self, terms: Any) -> Any:
        return sorted(terms, key=lambda term: term[:2])


@engine("E1", "one time in eight a rank is early and its row is added first")
class SumSometimesOtherwise(Engine):
    luck = random.Random(5)

    def ordered(self, terms: Any) -> Any:
        return terms[::-1] if self.luck.random() < 0.12 else terms


@engine("E1", "the accumulator has the element type", "element type")
class ShortAccumulator(Engine):
    def plus(self, total: Any, row: Any, dtype: Any) -> Any:
        return (total + row).to(dtype).float()


@engine("E1", "combine applies the weights, which the experts did already", "weights are applied")
class WeightsInCombine(Engine):
    def terms(self, routes: Any, messages: Any, token: int, handle: Any) -> Any:
        found = super().terms(routes, messages, token, handle)
        if found and messages[found[0][0]]["weights"] is None:
            return found
        return [(home, at, row.float() * messages[home]["weights"][at].sum()) for home, at, row in found]


@engine("E1", "every rank adds the bias", "bias")
class BiasPerRank(Engine):
    def start(self, bias: Any, token: int, out: Any) -> Any:
        return super().start(bias, token, out) * self.ranks


@engine("E1", "the second bias is forgotten", "first bias")
class SecondBiasForgotten(Engine):
    def start(self, bias: Any, token: int, out: Any) -> Any:
        return super().start(bias[:1], token, out)


@engine("E1", "the bias is added at the end", "after the rows")
class BiasAtTheEnd(Engine):
    def summed(self, out: Any, token: int, total: Any, terms: Any) -> None:
        super().summed(out, token, torch.zeros_like(total), [*terms, (0, 0, total)])


@engine("E1", "a token that went nowhere is not written")
class NowhereUnwritten(Engine):
    def summed(self, out: Any, token: int, total: Any, terms: Any) -> None:
        if terms:
            super().summed(out, token, total, terms)
        else:
            out[token] = 5.0


@engine("E1", "float16 goes through bfloat16 on its way out")
class HalfThroughBfloat(Engine):
    def stored(self, total: Any, dtype: Any) -> Any:
        return total.bfloat16().to(dtype) if dtype == torch.float16 else total.to(dtype)


@engine("E1", "sums are cut, not rounded")
class SumsTruncated(Engine):
    def stored(self, total: Any, dtype: Any) -> Any:
        if dtype != torch.bfloat16:
            return total.to(dtype)
        return (total.view(torch.int32) & -65536).view(torch.float32).to(dtype)


@engine("E1", "what a rank sends to itself is not added", "own rows")
class OwnRowsNotAdded(Engine):
    def ordered(self, terms: Any) -> Any:
        return [term for term in terms if term[0] != self.rank]


@engine("E1", "weights sent back are stored, not summed")
class WeightsBackStored(Engine):
    def summed_weights(self, into: Any, terms: Any, messages: Any, routes: Any, token: int, handle: Any) -> None:
        for home, row, _ in terms:
            if not handle.expand:
                into.copy_(messages[home]["weights"][row])
            else:
                super().summed_weights(into, [(home, row, None)], messages, routes, token, handle)
