"""Mutants of E1: rows, routes, counts and handles of the normal mode."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch

from mutants.ep_sample import Engine, Sources
from mutants.registry import engine


@engine("E1", "a token with the same expert twice fails the uniqueness test and is dropped", "duplicate")
class DuplicatesDropped(Engine):
    def arrivals(self, idx: Any, rank: int) -> Any:
        def twice(row: Any) -> bool:
            real = [e for e in row.tolist() if e >= 0]
            return len(set(real)) < len(real)

        return [(s, t) for s, t in super().arrivals(idx, rank) if not twice(idx[s][t])]


@engine("E1", "rows are interleaved: position first, then source", "by position")
class OrderByPosition(Engine):
    def arrivals(self, idx: Any, rank: int) -> Any:
        return sorted(super().arrivals(idx, rank), key=lambda at: (at[1], at[0]))


@engine("E1", "a rank's own rows come first: they need no transport", "own first")
class OwnRankFirst(Engine):
    def arrivals(self, idx: Any, rank: int) -> Any:
        return sorted(super().arrivals(idx, rank), key=lambda at: (at[0] != rank, at))


@engine("E1", "a hole is clamped to expert 0", "hole")
class HoleToExpertZero(Engine):
    def experts(self, row: Any) -> list[int]:
        return list(dict.fromkeys(max(e, 0) for e in row.tolist()))


@engine("E1", "recv_topk_idx keeps global ids", "not localised")
class NotLocalised(Engine):
    def localised(self, expert: int) -> int:
        return expert if super().localised(expert) >= 0 else -1


@engine("E1", "experts elsewhere are not masked in recv_topk_idx", "elsewhere")
class ElsewhereNotMasked(Engine):
    def localised(self, expert: int) -> int:
        return expert % self.local if expert >= 0 else -1


@engine("E1", "experts a rank are rounded down, the last rank has the rest")
class ExpertsRoundedDown(Engine):
    def homes(self, row: Any) -> list[int]:
        share = max(self.args.num_experts // self.ranks, 1)
        return list(dict.fromkeys(min(e // share, self.ranks - 1) for e in self.experts(row)))


@engine("E1", "a row for every expert instead of every rank", "more than once")
class RowPerExpert(Engine):
    def arrivals(self, idx: Any, rank: int) -> Any:
        found = super().arrivals(idx, rank)
        return [at for at in found for e in self.experts(idx[at[0]][at[1]]) if e // self.local == rank]


@engine("E1", "the tail of tokens past a multiple of 4 is lost", "last token|lost")
class TokensInFours(Engine):
    def arrivals(self, idx: Any, rank: int) -> Any:
        return [(s, t) for s, t in super().arrivals(idx, rank) if t < 4 or t < len(idx[s]) // 4 * 4]


@engine("E1", "the choices are read in pairs: the last one of an odd top-k is not seen", "last column|lost")
class ChoicesInPairs(Engine):
    def experts(self, row: Any) -> list[int]:
        return super().experts(row[: len(row) // 2 * 2] if len(row) > 1 else row)


@engine("E1", "rows are copied in 32-byte steps, the last 16 bytes of an odd row are lost", "last 16 bytes")
class TailOfRowLost(Engine):
    def copied(self, message: Any, token: int) -> Any:
        row = message["x"][token].clone()
        size = row.element_size()
        if len(row) * size % 32:
            row[-(16 // size) :] = 0
        return row


@engine("E1", "a rank without tokens never posts its counts")
class NoTokensHang(Engine):
    def begin(self, kind: str, fields: Any, content: Any) -> int:
        if kind == "dispatch" and len(content["x"]) == 0:
            time.sleep(600)
        return super().begin(kind, fields, content)


@engine("E1", "counts are read from the neighbour's slot", "swapped")
class CountsSwapped(Engine):
    def reported(self, counts: Any, rank: int) -> Any:
        return counts[(rank + 1) % self.ranks]


@engine("E1", "expert_alignment is ignored", "not rounded")
class AlignmentIgnored(Engine):
    def aligned(self, count: int, alignment: int) -> int:
        return count


@engine("E1", "the padding of a group is counted once more", "counted twice")
class AlignmentTwice(Engine):
    def reported(self, counts: Any, rank: int) -> Any:
        return counts[rank]

    def aligned(self, count: int, alignment: int) -> int:
        return super().aligned(count, alignment) + (alignment if alignment > 1 else 0)


@engine("E1", "an expert without tokens gets a whole group of padding", "without tokens")
class EmptyGroupPadded(Engine):
    def aligned(self, count: int, alignment: int) -> int:
        return super().aligned(max(count, 1 if alignment > 1 else 0), alignment)


@engine("E1", "rows past the received ones say expert 0")
class WorstRowsUnmarked(Engine):
    def dispatch(self, args: Any) -> Any:
        done = super().dispatch(args)
        if args.num_worst_tokens:
            done.recv_topk_idx[len(done.handle.state.source[self.rank]) :] = 0
        return done


@engine("E1", "weights are taken along only in the expand layout", "do not travel")
class WeightsLeftBehind(Engine):
    def rank_row(self, message: Any, token: int, at: int, idx: Any, weights: Any) -> None:
        super().rank_row(message, token, at, idx, None)


@engine("E1", "in the expand layout the last of an expert's weights counts, not their sum")
class ExpandWeightOverwritten(Engine):
    def expanded_row(self, message: Any, token: int, local: int, at: int, idx: Any, weights: Any) -> None:
        super().expanded_row(message, token, local, at, idx, None)
        for slot, expert in enumerate(message["idx"][token].tolist()):
            if weights is not None and expert == self.rank * self.local + local:
                weights[at] = message["weights"][token, slot]


@engine("E1", "padding rows of the expand layout keep what was in memory")
class PaddingUncleared(Engine):
    def dispatch(self, args: Any) -> Any:
        done = super().dispatch(args)
        if args.expand:
            done.recv_x[done.recv_topk_idx < 0] = 3.0
        return done


@engine("E1", "FP8 scales are read one group off", "neighbour")
class ScaleOfTheNeighbour(Engine):
    def scale_row(self, scales: Any, token: int) -> Any:
        return scales[token].roll(1)


@engine("E1", "FP8 scales are read one row off", "neighbour|another row")
class ScaleOfTheNextRow(Engine):
    def scale_row(self, scales: Any, token: int) -> Any:
        return scales[(token + 1) % len(scales)]


@engine("E1", "packed scales are converted as if they were floats")
class PackedScalesConverted(Engine):
    def scale_row(self, scales: Any, token: int) -> Any:
        return scales[token].float().to(scales.dtype)


@engine("E1", "the handle is ignored: the routes of the last dispatch are used")
class CachedHandleIgnored(Engine):
    last: Any = None

    def dispatch(self, args: Any) -> Any:
        if args.handle is not None and len(self.last) == len(args.topk_idx):
            args = dataclasses.replace(args, topk_idx=self.last)
        self.last = args.topk_idx
        return super().dispatch(args)


@engine("E1", "a cached dispatch returns the rows of the first one", "stale")
class CachedRowsStale(Engine):
    def dispatch(self, args: Any) -> Any:
        done = super().dispatch(args)
        if args.handle is not None and self.kept.shape == done.recv_x.shape:
            done.recv_x = self.kept
        self.kept = done.recv_x if args.handle is None and not hasattr(self, "kept") else getattr(self, "kept", None)
        return done


@engine("E1", "results lie in two buffers used in turn")
class ResultsOverwritten(Engine):
    def dispatch(self, args: Any) -> Any:
        done = super().dispatch(args)
        ring = self.__dict__.setdefault("ring", {})
        at = self.operation // 2 % 2, done.recv_x.shape, done.recv_x.dtype
        done.recv_x = ring.setdefault(at, done.recv_x).copy_(done.recv_x)
        return done


@engine("E1", "the event is set when rows are posted, not when they are there")
class EventTooEarly(Engine):
    late: Any = None

    def combine(self, args: Any) -> Any:
        done = super().combine(args)
        if args.async_finish:
            # Later is the next call, not a time: rows arrive after whoever waited for the event has looked.
            self.late, done.finish = done.finish, lambda: None
        return done

    def begin(self, kind: str, fields: Any, content: Any) -> int:
        self.arrive()
        return super().begin(kind, fields, content)

    def close(self) -> None:
        self.arrive()
        super().close()

    def arrive(self) -> None:
        late, self.late = self.late, None
        if late is not None:
            late()


@engine("E1", "layout counts an expert chosen twice twice")
class LayoutCountsChoices(Engine):
    def layout(self, topk_idx: Any) -> Any:
        found = super().layout(topk_idx)
        chosen = topk_idx[topk_idx >= 0]
        counts = torch.bincount(chosen, minlength=self.args.num_experts).to(torch.int32)
        return dataclasses.replace(found, num_tokens_per_expert=counts)


@engine("E1", "an overflow is cut off silently", "not noticed")
class OverflowSilent(Engine):
    def room(self, arrived: Any, rank: int) -> Any:
        return arrived[: self.args.max_recv_tokens] if self.args.overflow == "error" else super().room(arrived, rank)


@engine("E1", "with overflow drop the first rows go, not the last", "drops other rows")
class OverflowDropsFirst(Engine):
    def room(self, arrived: Any, rank: int) -> Any:
        most = self.args.max_recv_tokens
        return arrived[-most:] if self.args.overflow == "drop" else super().room(arrived, rank)


@engine("E1", "dropped rows are not counted")
class DroppedNotCounted(Engine):
    def routes(self, idx: Any, args: Any, operation: int) -> Any:
        routes, counts, _ = super().routes(idx, args, operation)
        return routes, counts, [0] * self.ranks


@engine("E1", "with overflow grow the window does not grow")
class NeverGrows(Engine):
    def room(self, arrived: Any, rank: int) -> Any:
        return super().room(arrived, rank)[: self.args.max_recv_tokens if self.args.overflow == "grow" else None]


@engine("E1", "a wrong call raises on its own rank; the others wait for it", "on rank")
class ErrorOnOneRank(Engine):
    def refuse(self, phase: str, error: Any) -> Any:
        self.operation += 1
        return error


@engine("E1", "an expert out of range is not noticed", "not noticed")
class OutOfRangeAccepted(Engine):
    def in_range(self, idx: Any) -> None:
        pass


@engine("E1", "arguments that differ between ranks are not compared")
class NothingCompared(Engine):
    def compare(self, messages: Any) -> None:
        for message in messages:
            if message is not None and message["call"] == "refused":
                super().compare(messages)


@engine("E1", "a handle of another dispatch is taken for this one's", "not noticed")
class StaleHandleAccepted(Engine):
    def begin(self, kind: str, fields: Any, content: Any) -> int:
        return super().begin(kind, {k: v for k, v in fields.items() if k != "handle"}, content)


@engine("E1", "a handle of another buffer is accepted", "not noticed")
class ForeignHandleAccepted(Engine):
    everyone = object()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.identity = self.everyone


@engine("E1", "each rank words the error with its own number")
class ErrorsDiffer(Engine):
    def refuse(self, phase: str, error: Any) -> Any:
        found = super().refuse(phase, error)
        return type(found)(found.argument, f"{found.got} (seen by rank {self.rank})", found.legal)


@engine("E1", "rows are moved by something else: no kernel of this backend is ever launched")
class RowsMovedElsewhere(Engine):
    def begin(self, kind: str, fields: Any, content: Any) -> int:
        operation = super().begin(kind, fields, content)
        self.launched.clear()
        return operation


@engine("E1", "over-claims the expand layout")
class OverclaimsExpand(Engine):
    def dispatch(self, args: Any) -> Any:
        if args.expand:
            raise NotImplementedError("expand")
        return super().dispatch(args)


@engine("E1", "inputs are zeroed once they are sent")
class InputsZeroed(Engine):
    def dispatch(self, args: Any) -> Any:
        done = super().dispatch(args)
        args.x.zero_()
        return done


@engine("E1", "the table of peers has room for four ranks, which all tests of its author have")
class FourPeers(Engine):
    def copied(self, message: Any, token: int) -> Any:
        row = super().copied(message, token)
        return row if self.ranks <= 4 else torch.zeros_like(row)


@engine("E1", "the tokens of a rank are found by one ballot: those past the 64th are lost")
class OneBallotOfTokens(Engine):
    def arrivals(self, idx: Any, rank: int) -> Any:
        return [(source, token) for source, token in super().arrivals(idx, rank) if token < 64]


@engine("E1", "counts lie in the lanes of one group: an expert past the 32nd of a rank has none")
class ThirtyTwoExpertsOfARank(Engine):
    def reported(self, counts: Any, rank: int) -> list[int]:
        return [count if expert < 32 else 0 for expert, count in enumerate(super().reported(counts, rank))]


@engine("E1", "a token's choices are kept in eight registers: a ninth is not seen")
class EightChoices(Engine):
    def experts(self, row: Any) -> list[int]:
        return super().experts(row[:8])


@engine("E1", "a row is copied in one pass of a block: bytes past 8192 are lost")
class RowsOfOnePass(Engine):
    def copied(self, message: Any, token: int) -> Any:
        row = super().copied(message, token).clone()
        row.view(torch.uint8)[8192:] = 0
        return row


@engine(
    "E1",
    "flags count calls in eight bits: from the 257th on those of earlier ones are found",
    only="EPN-22",
)
class CallsInEightBits(Engine):
    def copied(self, message: Any, token: int) -> Any:
        row = super().copied(message, token)
        return torch.zeros_like(row) if self.operation > 256 else row


class TellsOfDropped(Sources):
    def came(self) -> Any:
        idx = enumerate(self.routes.idx)
        return {(source, token) for source, one in idx if one is not None for token in range(len(one))}


@engine("E1", "recv_counts are those that were announced, dropped tokens among them", only="EPN-17")
class CountsOfDropped(Engine):
    sources = TellsOfDropped


class TellsOfAllRows(Sources):
    def rank(self) -> Any:
        found = super().rank()
        return (
            found.clamp(min=0)
            if self.routes.expand and len(found) > len(self.routes.local[self.engine.rank])
            else found
        )


@engine("E1", "rows of the expand layout that never came are from rank 0 where their number is fixed", only="EPN-17")
class WorstOfExpandFromRank0(Engine):
    sources = TellsOfAllRows
