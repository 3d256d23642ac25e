"""Mutants of E2: the low-latency mode."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from mutants.ep_sample import Engine
from mutants.registry import engine


@engine("E2", "weights are applied to the rows and again in the sum", "twice")
class WeightsTwice(Engine):
    def times(self, row: Any, weight: Any) -> Any:
        return row * weight * weight


@engine("E2", "weights are forgotten: the sum is that of the normal mode", "weights are missing")
class WeightsForgotten(Engine):
    def times(self, row: Any, weight: Any) -> Any:
        return row


@engine("E2", "product and sum are fused")
class FusedMultiplyAdd(Engine):
    def times(self, row: Any, weight: Any) -> Any:
        return row.double() * weight.double()

    def plus(self, total: Any, row: Any, dtype: Any) -> Any:
        return (total.double() + row).float()


@engine("E2", "the sum runs from the last choice to the first", "reverse")
class LastChoiceFirst(Engine):
    def ordered_slots(self, terms: Any) -> Any:
        return terms[::-1]


@engine("E2", "an expert chosen twice is summed once", "counts once")
class ChosenTwiceSummedOnce(Engine):
    def weighted_terms(self, args: Any, messages: Any, token: int, row: Any) -> Any:
        seen = row.tolist()
        return [(k, r) for k, r in super().weighted_terms(args, messages, token, row) if seen.index(seen[k]) == k]


@engine("E2", "an expert chosen twice gets two rows")
class ChosenTwiceSentTwice(Engine):
    def packed_tokens(self, message: Any, expert: int) -> Any:
        if message is None:
            return []
        return [t for t, row in enumerate(message["idx"]) for e in row.tolist() if e == expert]


@engine("E2", "one slot of an expert is kept for a marker", "off by one|the last token of a rank is lost")
class CapacityOffByOne(Engine):
    def capacity(self, slots: int) -> int:
        return slots - 1


@engine("E2", "rows of this rank's own tokens are packed first", "source order|counts")
class OwnPackedFirst(Engine):
    def packing_order(self) -> list[int]:
        return [self.rank, *(r for r in range(self.ranks) if r != self.rank)]


@engine("E2", "a hole is packed for expert 0", "hole")
class HolePacked(Engine):
    def packed_tokens(self, message: Any, expert: int) -> Any:
        if message is None:
            return []
        return [t for t, row in enumerate(message["idx"]) if expert in row.clamp(min=0).tolist()]


@engine("E2", "recv_count counts the slots in use rounded up to a group of 4", "recv_count")
class CountsRoundedUp(Engine):
    def finished_counts(self, count: Any) -> None:
        count.copy_((count + 3) // 4 * 4)


@engine("E2", "scales are those of the previous group of columns", "neighbour")
class CastScaleOfTheNeighbour(Engine):
    def given_scale(self, scale: Any) -> Any:
        return scale.roll(1, 1)


@engine("E2", "scales are given for multiplication the wrong way round", "reciprocal")
class ScaleReciprocal(Engine):
    def given_scale(self, scale: Any) -> Any:
        return 1 / scale


@engine("E2", "round_scale is ignored", "no powers of two|powers of two")
class ScaleNotRounded(Engine):
    def exponent(self, scale: Any) -> Any:
        return torch.log2(scale)


@engine("E2", "scales are rounded down to a power of two", "rounded down")
class ScaleRoundedDown(Engine):
    def exponent(self, scale: Any) -> Any:
        return super().exponent(scale) - 1


@engine("E2", "exact powers of two are rounded up too")
class ExactPowerDoubled(Engine):
    def exponent(self, scale: Any) -> Any:
        return torch.frexp(scale).exponent.float()


@engine("E2", "a group of zeros divides by zero")
class NoFloorForAmax(Engine):
    def amax(self, tiles: Any) -> Any:
        return tiles.abs().amax(2)


@engine("E2", "amax looks at half of the group")
class AmaxOfHalf(Engine):
    def amax(self, tiles: Any) -> Any:
        return tiles[..., :64].abs().amax(2).clamp(min=1e-4)


@engine("E2", "amax is the largest value, not the largest magnitude")
class AmaxWithoutSign(Engine):
    def amax(self, tiles: Any) -> Any:
        return tiles.amax(2).clamp(min=1e-4)


@engine("E2", "packed exponents are in big-endian order")
class ExponentsBigEndian(Engine):
    def bytes_in_order(self, codes: Any) -> Any:
        return codes.view(len(codes), -1, 4).flip(2).reshape(codes.shape).contiguous()


@engine("E2", "the hook is an empty function: the call waits for everyone", "hook has nothing left")
class HookBlocks(Engine):
    def posted(self, args: Any, result: Any) -> Any:
        if args.return_recv_hook:
            result.finish()
            result.finish = lambda: None
        return result


@engine("E2", "out is cleared when the call is made, before the hook")
class HookDeliversEarly(Engine):
    def target(self, args: Any) -> Any:
        return args.out.zero_()


@engine("E2", "rows are sent when the sender runs its own hook", "sender's hook")
class HookSends(Engine):
    unsent: Any = None
    waits = False

    def low_latency_dispatch(self, args: Any) -> Any:
        self.waits = args.return_recv_hook
        try:
            return super().low_latency_dispatch(args)
        finally:
            self.waits = False

    def begin(self, kind: str, fields: Any, content: Any) -> int:
        send = self.mail.send
        if self.waits:
            self.mail.send = lambda *message: self.__dict__.__setitem__("unsent", message)
        try:
            return super().begin(kind, fields, content)
        finally:
            self.mail.send = send

    def hear(self, operation: int, phase: str, waits: Any = None) -> Any:
        if self.unsent is not None:
            self.mail.send(*self.unsent)
            self.unsent = None
        return super().hear(operation, phase, waits)


@engine("E2", "a third live result overwrites the first", "not noticed")
class ThirdAccepted(Engine):
    def most_live(self) -> int:
        return 3


@engine("E2", "a result that was let go stays live for ever")
class LetGoStaysLive(Engine):
    def low_latency_dispatch(self, args: Any) -> Any:
        done = super().low_latency_dispatch(args)
        self.__dict__.setdefault("held", []).append(done.handle.state)
        return done


@engine("E2", "whole tiles are reduced: rows past the count reach the sum")
class RowsPastTheCount(Engine):
    def staged(self, args: Any) -> Any:
        return args.x + 0 * args.x[:, -1:]


@engine("E2", "a given out is not written: the result is another tensor", "given out")
class GivenOutIgnored(Engine):
    def low_latency_combine(self, args: Any) -> Any:
        return super().low_latency_combine(dataclasses.replace(args, out=torch.empty_like(args.out)))


@engine("E2", "memory after a row of out is written with it")
class WritesPastTheRow(Engine):
    def target(self, args: Any) -> Any:
        rows, hidden = args.out.shape
        if rows > 1 and args.out.stride(0) > hidden:
            args.out.as_strided((rows - 1, 4), (args.out.stride(0), 1), args.out.storage_offset() + hidden).zero_()
        return args.out


@engine("E2", "statistics are stored, not added", "stored")
class StatisticsStored(Engine):
    def counted(self, stats: Any, count: Any) -> None:
        stats.copy_(count)


@engine("E2", "waiting is not measured")
class WaitsNotMeasured(Engine):
    def hear(self, operation: int, phase: str, waits: Any = None) -> Any:
        return super().hear(operation, phase, None)


@engine("E2", "zero copy sends what the lent memory held the first time")
class ZeroCopyStale(Engine):
    def staged(self, args: Any) -> Any:
        return self.__dict__.setdefault("first", args.x.clone()) if args.zero_copy else args.x


@engine("E2", "the sum of two choices of one rank is pre-added in the element type")
class ShortWeightedSum(Engine):
    def times(self, row: Any, weight: Any) -> Any:
        return (row * weight).bfloat16().float()


@engine("E2", "a wrong low-latency call raises on its own rank only", "on rank")
class PackedErrorOnOneRank(Engine):
    def refuse(self, phase: str, error: Any) -> Any:
        if not phase.startswith("low_latency"):
            return super().refuse(phase, error)
        self.operation += 1
        return error


@engine("E2", "the counts of a call lie in one of 256 slots, which are cleared once", only="EPL-13")
class SlotsClearedOnce(Engine):
    dispatches = 0

    def finished_counts(self, count: Any) -> None:
        self.dispatches += 1
        if self.dispatches > 256:
            count += 1
