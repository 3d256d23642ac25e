"""Mutants that are right in a first call of one kind, on one buffer, of the whole group, on one thread."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from typing import Any

import torch

from mutants.ep_sample import Engine
from mutants.registry import engine, mutant
from mutants.sample import Sample


def beside(args: Any, width: int) -> Any:
    """What a call is given, its choices read as if a row had so many."""
    idx = args.topk_idx
    if not idx.numel() or idx.shape[1] >= width:
        return args
    at = torch.arange(len(idx))[:, None] * width + torch.arange(idx.shape[1])
    return dataclasses.replace(args, topk_idx=idx.flatten()[at.clamp(max=idx.numel() - 1)])


class LeavesTheLast(Engine):
    """What is sent by a rank without tokens is what its last call of this kind sent."""

    wrong_kind: str
    last: Any = None

    def begin(self, kind: str, fields: Any, content: Any) -> int:
        if kind == self.wrong_kind:
            if len(content["x"]) == 0 and self.last is not None and self.last["x"].dtype == content["x"].dtype:
                content = self.last
            self.last = content
        return super().begin(kind, fields, content)


@engine("E1", "rows of topk_idx are as wide as the buffer's top-k: a call with fewer choices reads beside them")
class ChoicesOfTheBuffer(Engine):
    def dispatch(self, args: Any) -> Any:
        return super().dispatch(args if args.handle is not None else beside(args, self.args.topk))


@engine("E1", "a grid of no blocks is not launched: of a rank without tokens the last call's are found")
class NoTokensLeaveTheLast(LeavesTheLast):
    wrong_kind = "dispatch"


@engine("E1", "rows are copied by arithmetic that flushes denormal numbers", "denormal numbers arrive as 0")
class DenormalsFlushed(Engine):
    def copied(self, message: Any, token: int) -> Any:
        row = message["x"][token]
        if not row.is_floating_point():
            return row
        return torch.where(row.abs() < torch.finfo(torch.float32).tiny, torch.copysign(torch.zeros_like(row), row), row)


@engine("E1", "rows are added to memory that was cleared: -0 arrives as 0", "-0 arrives as 0")
class RowsAddedToZeros(Engine):
    def copied(self, message: Any, token: int) -> Any:
        row = message["x"][token]
        return row + 0 if row.is_floating_point() else row


@engine("E1", "sums are stored by arithmetic that flushes denormal numbers", "denormal sums come as 0")
class SumsFlushed(Engine):
    def stored(self, total: Any, dtype: Any) -> Any:
        return torch.where(total.abs() < torch.finfo(torch.float32).tiny, torch.zeros_like(total), total).to(dtype)


@engine("E1", "the geometry lies in constant memory, of which a process has one: a second buffer takes it")
class GeometryOfTheLastBuffer(Engine):
    newest: Any = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        GeometryOfTheLastBuffer.newest = self.args

    @property
    def local(self) -> int:  # type: ignore[override]
        return int(GeometryOfTheLastBuffer.newest.local_experts)

    @local.setter
    def local(self, value: int) -> None:
        pass


@engine("E1", "a rank's number is the one it has in the whole program, not in the group")
class RankOfTheProgram(Engine):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.rank = torch.distributed.get_rank()


@engine("E1", "the bias is read by rows of hidden elements, whatever its stride")
class BiasPacked(Engine):
    def start(self, bias: Any, token: int, out: Any) -> Any:
        rows, hidden = out.shape
        packed = [b.as_strided((rows, hidden), (hidden, 1), b.storage_offset()) for b in bias]
        return super().start(packed, token, out)


@engine("E1", "the sums of a call are fetched with what its thread holds: waited for on another, they are not")
class SumsOfItsThread(Engine):
    def combine(self, args: Any) -> Any:
        done, here = super().combine(args), threading.get_ident()
        finish = done.finish
        done.finish = lambda: finish() if threading.get_ident() == here else None
        return done


@engine("E1", "a cached dispatch knows nothing of the rows that were dropped: they come")
class CachedRowsUndropped(Engine):
    cached = False

    def dispatch(self, args: Any) -> Any:
        self.cached = args.handle is not None
        return super().dispatch(args)

    def room(self, arrived: Any, rank: int) -> Any:
        return arrived if self.cached and self.args.overflow == "drop" else super().room(arrived, rank)


@engine("E1", "a handle tells the position of a row among those that came, not at its source")
class PositionsOfRows(Engine):
    def dispatch(self, args: Any) -> Any:
        done = super().dispatch(args)
        sources = done.handle.sources
        sources.source = [(s, at) if s >= 0 else (s, t) for at, (s, t) in enumerate(sources.source)]
        return done


@engine("E1", "a weight tensor is kept for the handle: a later call without weights has the earlier ones")
class WeightsOfTheLastCall(Engine):
    last: Any = None

    def dispatch(self, args: Any) -> Any:
        if args.topk_weights is None and self.last is not None and self.last.shape == args.topk_idx.shape:
            args = dataclasses.replace(args, topk_weights=self.last)
        self.last = args.topk_weights
        return super().dispatch(args)


@engine("E2", "with a hook the counts are added by the kernel that sends and by the one that receives")
class StatisticsTwiceWithAHook(Engine):
    def posted(self, args: Any, result: Any) -> Any:
        stats = getattr(args, "cumulative_local_expert_recv_stats", None)
        if args.return_recv_hook and stats is not None:
            finish = result.finish

            def twice() -> None:
                finish()
                stats.add_(result.recv_count)

            result.finish = twice
        return result


@engine("E2", "waiting is measured in dispatch only")
class CombineWaitsNotMeasured(Engine):
    def hear(self, operation: int, phase: str, waits: Any = None) -> Any:
        return super().hear(operation, phase, None if phase == "low_latency_combine" else waits)


@engine("E2", "one clock is read at the end: every rank is said to be as late as the last one")
class WaitsOfAllRanks(Engine):
    def hear(self, operation: int, phase: str, waits: Any = None) -> Any:
        own = None if waits is None else torch.zeros_like(waits)
        found = super().hear(operation, phase, own)
        if waits is not None:
            waits += own.max()
        return found


@engine("E2", "there is one memory to lend, which two live results share")
class LentTwice(Engine):
    room_lent: Any = None

    def low_latency_combine_buffer(self, handle: Any) -> Any:
        state = handle.state
        if state.lent is None:
            state.lent = self.room_lent
        self.room_lent = super().low_latency_combine_buffer(handle)
        return self.room_lent


@engine("E2", "combine stages its rows where the other live result lies")
class CombineOverTheOther(Engine):
    def low_latency_dispatch(self, args: Any) -> Any:
        done = super().low_latency_dispatch(args)
        self.__dict__.setdefault("received", []).append((weakref.ref(done.handle.state), weakref.ref(done.recv_x)))
        return done

    def low_latency_combine(self, args: Any) -> Any:
        for state, rows in self.received:
            one, lying = state(), rows()
            if lying is not None and one is not None and one is not args.handle.state and not one.done:
                lying.view(torch.uint8).zero_()
        return super().low_latency_combine(args)


@engine("E2", "the sums of two calls lie in turn in two buffers of the engine")
class SumsInTurn(Engine):
    turn = 0

    def target(self, args: Any) -> Any:
        ring = self.__dict__.setdefault("ring", {})
        self.turn += 1
        if args.out._base is not None:
            return args.out
        args.out = ring.setdefault((self.turn % 2, args.out.shape, args.out.dtype), args.out)
        return args.out


@engine("E2", "x is read by rows of hidden elements, whatever its stride")
class PackedRowsAssumed(Engine):
    def cast(self, x: Any, cast: str) -> Any:
        return super().cast(x.as_strided(x.shape, (x.shape[1], 1), x.storage_offset()), cast)


@engine("E2", "a receive hook works on the thread that made the call")
class HookOfItsThread(Engine):
    def posted(self, args: Any, result: Any) -> Any:
        finish, here = result.finish, threading.get_ident()
        result.finish = lambda: finish() if threading.get_ident() == here else None
        return result


@engine("E2", "the kind of scales of the first cast call is compiled in")
class CastOfTheFirstCall(Engine):
    first: Any = None

    def cast(self, x: Any, cast: str) -> Any:
        if cast in ("fp8", "fp8_pow2"):
            cast = self.first = self.first or cast
        return super().cast(x, cast)


@engine("E2", "a rank without tokens has nothing to cast, and fails at it")
class NothingToCast(Engine):
    def cast(self, x: Any, cast: str) -> Any:
        if cast != "none" and len(x) == 0:
            raise RuntimeError("cannot reshape tensor of 0 elements")
        return super().cast(x, cast)


@engine("E2", "a call with fewer choices than the buffer has reads them by the buffer's width")
class PackedChoicesOfTheBuffer(Engine):
    def low_latency_dispatch(self, args: Any) -> Any:
        return super().low_latency_dispatch(beside(args, self.args.topk))


@engine("E2", "of a rank without tokens the flags of the last call are found")
class NoTokensLeaveTheLastPacked(LeavesTheLast):
    wrong_kind = "low_latency_dispatch"


@engine("E2", "a result that was dropped before its hook ran is counted in the next one")
class DroppedHookCounted(Engine):
    posts: Any = ()

    def finished_counts(self, count: Any) -> None:
        self.posts = [post for post in self.posts if not post.done]
        owed = [post for post in self.posts if post.gone() is None]
        self.posts = [post for post in self.posts if post.gone() is not None]
        count += len(owed)

    def posted(self, args: Any, result: Any) -> Any:
        if hasattr(args, "cast") and args.return_recv_hook:
            finish, post = result.finish, _Post(weakref.ref(result.handle.state))
            self.posts = [*self.posts, post]

            def ended() -> None:
                post.done = True
                finish()

            result.finish = ended
        return result


@dataclasses.dataclass
class _Post:
    gone: Any
    done: bool = False


@engine("E3", "a token is counted once for every rank of a node that it goes to")
class NodesCountRanks(Engine):
    def layout(self, topk_idx: Any) -> Any:
        found = super().layout(topk_idx)
        if found.num_tokens_per_node is None:
            return found
        parts = torch.split(found.num_tokens_per_rank, self.args.ranks_per_node)
        per_node = torch.stack([part.sum(dtype=torch.int32) for part in parts])
        return dataclasses.replace(found, num_tokens_per_node=per_node)


@mutant("L2", "sequences share a tile: weights of 0 are multiplied by the keys of the one before")
class NeighbourTimesZero(Sample):
    before: Any = 0.0

    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        super().store(args, j, start, stop, out + self.before, lse)
        row = self.gather(args, j, 1) if int(args.cache_seqlens[j]) else torch.zeros(1)
        self.before = row.sum() * 0 if j + 1 < args.batch else 0.0


@mutant("L2", "a plan lies in what its thread holds: on another thread it has one split")
class PlanOfItsThread(Sample):
    def mla_plan(self, args: Any) -> object:
        return threading.get_ident(), super().mla_plan(args)

    def splits(self, args: Any, j: int, length: int) -> Any:
        if args.schedule is None:
            return self.bounds(length)
        made_on, planned = args.schedule
        return planned[j] if made_on == threading.get_ident() else planned[j][:1]


@mutant("L2", "lse of the heads of a second tile is not rescaled where there are several queries and a mask")
class LseOfTheSecondTile(Sample):
    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        if args.causal and stop - start > 1 and args.h_q > 64:
            lse = torch.cat([lse[:, :64], lse[:, 64:] + 0.01], 1)
        super().store(args, j, start, stop, out, lse)
