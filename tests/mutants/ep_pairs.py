"""Mutants of expert parallelism that are right for each value of a call, and for small ones; wrong for two together."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import torch

from mutants.ep_sample import Engine, plain
from mutants.registry import engine


@engine("E1", "eight threads copy the scales of a row: a ninth group of columns has none", only="EPN-34")
class ScalesOfEightGroups(Engine):
    def scale_row(self, scales: Any, token: int) -> Any:
        row = scales[token].clone()
        row[8:] = 0
        return row


@engine("E1", "a cached dispatch finds the scales where the first one put them", only="EPN-34")
class CachedScalesOfTheFirst(Engine):
    first: Any = None

    def dispatch(self, args: Any) -> Any:
        if args.handle is None:
            self.first = args.scales
        elif args.scales is not None:
            args = dataclasses.replace(args, scales=self.first)
        return super().dispatch(args)


@engine("E1", "with num_worst_tokens the scales end where the rows do", "", only="EPN-34")
class ScalesShorterThanWorst(Engine):
    def dispatch(self, args: Any) -> Any:
        done = super().dispatch(args)
        if done.recv_scales is None or not args.num_worst_tokens:
            return done
        rows = int((done.recv_topk_idx.reshape(len(done.recv_topk_idx), -1) >= 0).any(1).sum())
        return dataclasses.replace(done, recv_scales=done.recv_scales[:rows])


@engine("E1", "weights are probabilities: a negative one is clamped", only="EPN-34")
class NegativeWeightsClamped(Engine):
    def rank_row(self, message: Any, token: int, at: int, idx: Any, weights: Any) -> None:
        super().rank_row(message, token, at, idx, weights)
        if weights is not None:
            weights[at].clamp_(min=0)


@engine("E1", "layout is counted by one block of 64 threads, a token each", only="EPN-34")
class LayoutOfOneBlock(Engine):
    def layout(self, topk_idx: Any) -> Any:
        found = super().layout(topk_idx)
        few = super().layout(topk_idx[:64])
        return dataclasses.replace(found, num_tokens_per_expert=few.num_tokens_per_expert)


@engine("E1", "float16 sums of the expand layout pass through bfloat16, as its template was copied", only="EPN-34")
class ExpandedFloat16Rounded(Engine):
    expanded = False

    def combine(self, args: Any) -> Any:
        done = super().combine(args)

        def finish() -> None:
            self.expanded = args.handle.expand
            done.finish()

        return dataclasses.replace(done, finish=finish)

    def stored(self, total: Any, dtype: Any) -> Any:
        return super().stored(total.bfloat16() if self.expanded and dtype == torch.float16 else total, dtype)


@engine("E1", "a group of the expand layout is padded to 64 rows at most", only="EPN-34")
class GroupsOf64(Engine):
    def aligned(self, count: int, alignment: int) -> int:
        return super().aligned(count, min(alignment, 64))


@engine("E1", "the handle keeps the caller's topk_idx, and a cached dispatch reads it again", only="EPN-34")
class RoutesOfTheCaller(Engine):
    def kept_idx(self, idx: Any) -> Any:
        return idx


@engine("E1", "the second bias is not added to what a cached handle combines", only="EPN-34")
class SecondBiasOfCached(Engine):
    def dispatch(self, args: Any) -> Any:
        done = super().dispatch(args)
        self.cached = {*self.__dict__.get("cached", ()), *([done.handle.state.operation] if args.handle else [])}
        return done

    def combine(self, args: Any) -> Any:
        once = args.handle.state.operation in self.cached
        return super().combine(dataclasses.replace(args, bias=args.bias[:1]) if once else args)


@engine("E2", "one block quantises eight groups of a row: those after them have the scale of the first", only="EPL-19")
class CastOfEightGroups(Engine):
    def amax(self, tiles: Any) -> Any:
        found = super().amax(tiles)
        found[:, 8:] = found[:, :1]
        return found


@engine("E2", "rows are cast from bfloat16, whatever they were", only="EPL-19")
class CastFromBfloat16(Engine):
    def cast(self, x: Any, cast: str) -> Any:
        return super().cast(x if cast == "none" else x.bfloat16(), cast)


@engine(
    "E2", "a padded out of a zero-copy combine is filled from a contiguous copy, which nobody copies", only="EPL-19"
)
class PaddedOutOfZeroCopy(Engine):
    def low_latency_combine(self, args: Any) -> Any:
        if args.zero_copy and not args.out.is_contiguous():
            args = dataclasses.replace(args, out=args.out.contiguous())
        return super().low_latency_combine(args)


@engine("E2", "weights are taken to be positive: their sign is lost", only="EPL-19")
class WeightsWithoutSign(Engine):
    def times(self, row: Any, weight: Any) -> Any:
        return row * weight.abs()


@engine("E2", "a rank's own rows are not copied: the hook reads them from x", only="EPL-19")
class OwnRowsReadByTheHook(Engine):
    def low_latency_dispatch(self, args: Any) -> Any:
        self.given = args
        return super().low_latency_dispatch(args)

    def hear(self, operation: int, phase: str, waits: Any = None) -> Any:
        found = super().hear(operation, phase, waits)
        if phase == "low_latency_dispatch" and found[self.rank] is not None and self.given.cast == "none":
            found[self.rank] = {**found[self.rank], "x": plain(self.given.x)}
        return found


@engine("E3", "with overflow drop there is room for as many rows from every node", only="EPX-04")
class RoomOfEveryNode(Engine):
    def room(self, arrived: Any, rank: int) -> Any:
        if self.args.num_nodes == 1 or self.args.overflow != "drop":
            return super().room(arrived, rank)
        nodes = [source // self.args.ranks_per_node for source, _ in arrived]
        most = self.args.max_recv_tokens
        return [at for n, at in enumerate(arrived) if nodes[:n].count(nodes[n]) < most]


@engine("E3", "windows grow within a node: across nodes the rows that have no room are dropped", only="EPX-04")
class GrowsWithinTheNode(Engine):
    def room(self, arrived: Any, rank: int) -> Any:
        dropping = self.args.num_nodes > 1 and self.args.overflow == "grow"
        return arrived[: self.args.max_recv_tokens] if dropping else super().room(arrived, rank)


@engine("E3", "across nodes sums are added to out, which is cleared when the call is made", only="EPX-05")
class OutClearedByTheCall(Engine):
    def low_latency_combine(self, args: Any) -> Any:
        if self.args.num_nodes > 1:
            args.out.zero_()
        return super().low_latency_combine(args)


@engine("E1", "weights that came and do not go back: the sum takes the path of none at all")
class NothingWithoutWeights(Engine):
    def dispatch(self, args: Any) -> Any:
        done = super().dispatch(args)
        self.weighed = {**self.__dict__.get("weighed", {}), done.handle.state.operation: args.topk_weights is not None}
        return done

    def combine(self, args: Any) -> Any:
        done = super().combine(args)
        if not (args.topk_weights is None and self.weighed[args.handle.state.operation]):
            return done
        return dataclasses.replace(done, finish=lambda: (done.finish(), done.combined_x.zero_(), None)[-1])


@engine("E1", "routes lie in a ring of four: an older handle has a later one's", only="EPN-25")
class RoutesInARing(Engine):
    def kept_routes(self, args: Any, routes: Any) -> Any:
        self.ring = [*self.__dict__.get("ring", []), routes][-4:]
        return routes

    def combine(self, args: Any) -> Any:
        if args.handle.state not in self.ring and len(self.ring[-1].idx[self.rank]) == args.handle.num_tokens:
            state = dataclasses.replace(self.ring[-1], operation=args.handle.state.operation)
            args = dataclasses.replace(args, handle=dataclasses.replace(args.handle, state=state))
        return super().combine(args)


@engine("E1", "combine finds a row's choices in the recv_topk_idx that it gave, which is the caller's to change")
class ChoicesOfTheResult(Engine):
    def dispatch(self, args: Any) -> Any:
        done = super().dispatch(args)
        both = (done.recv_topk_idx, done.recv_topk_idx.clone())
        self.given = {**self.__dict__.get("given", {}), done.handle.state.operation: both}
        return done

    def combine(self, args: Any) -> Any:
        done = super().combine(args)
        now, then = self.given[args.handle.state.operation]
        if torch.equal(now, then):
            return done
        return dataclasses.replace(done, finish=lambda: (done.finish(), done.combined_x.zero_(), None)[-1])


@engine("E1", "of one rank the rows that come are those that were given, without a copy", only="EPN-34")
class RowsOfTheCaller(Engine):
    def dispatch(self, args: Any) -> Any:
        done = super().dispatch(args)
        same = self.ranks == 1 and done.recv_x.shape == args.x.shape and torch.equal(plain(done.recv_x), plain(args.x))
        return dataclasses.replace(done, recv_x=args.x) if same else done


@engine("E1", "sums are rounded to bfloat16 as integers: NaN becomes a number")
class NanSumsRounded(Engine):
    def stored(self, total: Any, dtype: Any) -> Any:
        return super().stored(total.nan_to_num(0.0, torch.inf, -torch.inf), dtype)


@engine("E1", "the buffer lives on the thread that opened it: a backward pass on another finds none")
class BufferOfItsThread(Engine):
    def __init__(self, args: Any, launched: Any) -> None:
        super().__init__(args, launched)
        self.home = threading.get_ident()

    def combine(self, args: Any) -> Any:
        if threading.get_ident() != self.home:
            raise RuntimeError("no buffer on this thread")
        return super().combine(args)


@engine("E2", "there is one place for what a hook is to sum: a call made before it runs takes it", only="EPL-16")
class OneSumUnderWay(Engine):
    latest = 0

    def begin(self, kind: str, fields: Any, content: Any) -> int:
        self.latest = super().begin(kind, fields, content)
        return self.latest

    def low_latency_combine(self, args: Any) -> Any:
        done = super().low_latency_combine(args)
        mine = self.latest

        def finish() -> None:
            late = self.latest != mine
            done.finish()
            if late:
                args.out.zero_()

        return dataclasses.replace(done, finish=finish)
