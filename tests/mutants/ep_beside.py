"""Mutants of E2 that are right on one buffer of all ranks, of handles used once, as long as it is open."""

from __future__ import annotations

import dataclasses
import time
import weakref
from typing import Any

import torch

from mutants.ep_sample import Engine
from mutants.registry import engine


@engine("E2", "live results are counted for the process, not for the buffer", only="EPL-20")
class LiveInTheProcess(Engine):
    everywhere: list[Any] = []  # noqa: RUF012

    @property
    def live(self) -> Any:  # type: ignore[override]
        return self.everywhere

    @live.setter
    def live(self, value: Any) -> None:
        self.everywhere[:] = value


@engine("E2", "two rooms are lent, which all buffers of the same sizes share", only="EPL-20")
class LentByTheProcess(Engine):
    rooms: dict[Any, Any] = {}  # noqa: RUF012
    turn = 0

    def low_latency_combine_buffer(self, handle: Any) -> Any:
        if handle.state.lent is None:
            fresh = super().low_latency_combine_buffer(handle)
            self.turn += 1
            handle.state.lent = self.rooms.setdefault((self.turn % 2, fresh.shape, fresh.dtype), fresh)
        return handle.state.lent


@engine("E2", "packing takes a rank's number in the whole program", only="EPL-20")
class PackedForTheProgram(Engine):
    def posted(self, args: Any, result: Any) -> Any:
        finish, here = result.finish, self.rank

        def elsewhere() -> None:
            self.rank = torch.distributed.get_rank()
            try:
                finish()
            finally:
                self.rank = here

        result.finish = elsewhere
        return result


@engine("E2", "a buffer takes any handle: it has the routes of its own dispatch", "not noticed", only="EPL-20")
class HandlesOfAnyBuffer(Engine):
    someone = object()

    @property
    def owner(self) -> object:
        return self.identity if "normal" in self.args.modes else self.someone

    def low_latency_dispatch(self, args: Any) -> Any:
        done = super().low_latency_dispatch(args)
        done.handle.owner = self.owner
        return done


@engine("E2", "what a handle was combined with first is combined again", only="EPL-21")
class StagedOnce(Engine):
    def staged(self, args: Any) -> Any:
        return args.handle.state.__dict__.setdefault("staged", args.x.clone())


@engine("E2", "a handle is the number of a slot: an old one has the routes of the result that took it", only="EPL-21")
class HandlesAreSlots(Engine):
    def low_latency_dispatch(self, args: Any) -> Any:
        slots = self.__dict__.setdefault("slots", [None, None])
        free = [n for n, one in enumerate(slots) if one is None or one[0]() is None or one[0]().done]
        done = super().low_latency_dispatch(args)
        state, handle = done.handle.state, done.handle
        state.slot = free[0]
        slots[state.slot] = (weakref.ref(state), handle.src_info, handle.layout_range)
        return done

    def low_latency_combine(self, args: Any) -> Any:
        _, info, ranges = self.slots[args.handle.state.slot]
        handle = dataclasses.replace(args.handle, src_info=info, layout_range=ranges)
        return super().low_latency_combine(dataclasses.replace(args, handle=handle))


@engine("E2", "a combine by an old handle frees the slot that is another result's by now", "not noticed", only="EPL-21")
class OldHandleFrees(Engine):
    def low_latency_combine(self, args: Any) -> Any:
        live = [state for one in self.live if (state := one()) is not None and not state.done]
        if args.handle.state.done and live:
            live[0].done = True
        return super().low_latency_combine(args)


class _Given(Engine):
    """Knows the rows of its low-latency results."""

    def low_latency_dispatch(self, args: Any) -> Any:
        done = super().low_latency_dispatch(args)
        self.__dict__.setdefault("given", []).append(weakref.ref(done.recv_x))
        return done


@engine("E2", "close clears the windows, results in them and all", only="EPL-22")
class ClearedByClose(_Given):
    def close(self) -> None:
        for rows in [one() for one in self.__dict__.pop("given", [])]:
            if rows is not None:
                rows.view(torch.uint8).zero_()
        super().close()


@engine("E2", "the memory of a closed buffer's results is a later buffer's", only="EPL-22")
class RoomsOfClosedBuffers(_Given):
    free: list[Any] = []  # noqa: RUF012

    def low_latency_dispatch(self, args: Any) -> Any:
        done = super().low_latency_dispatch(args)
        rows = self.free.pop() if self.free else done.recv_x
        if rows.shape != done.recv_x.shape or rows.dtype != done.recv_x.dtype:
            return done
        return dataclasses.replace(done, recv_x=rows, finish=lambda: (done.finish(), rows.copy_(done.recv_x))[0])

    def close(self) -> None:
        rows = [one() for one in self.__dict__.pop("given", [])]
        self.free[:] = [one for one in rows if one is not None][-4:]
        super().close()


class _Waits(Engine):
    """Counts the waits of some calls by itself."""

    def low_latency_dispatch(self, args: Any) -> Any:
        return self.apart(args, "dispatch_wait_recv_cost_stats", super().low_latency_dispatch)

    def low_latency_combine(self, args: Any) -> Any:
        return self.apart(args, "combine_wait_recv_cost_stats", super().low_latency_combine)

    def apart(self, args: Any, name: str, call: Any) -> Any:
        given, begun = getattr(args, name), time.monotonic()
        if given is None or not (args.return_recv_hook or args.async_finish):
            return call(args)
        own = torch.zeros_like(given)
        done = call(dataclasses.replace(args, **{name: own}))

        def finish() -> None:
            done.finish()
            self.told(args, given, own, time.monotonic() - begun)

        return dataclasses.replace(done, finish=finish)

    def told(self, args: Any, given: Any, own: Any, seconds: float) -> None:
        given += own


@engine("E2", "the waits of a hook are stored, not added", only="EPL-12")
class HookStoresWaits(_Waits):
    def told(self, args: Any, given: Any, own: Any, seconds: float) -> None:
        given += own if args.async_finish else own - given


@engine("E2", "the waits of an event are not counted", only="EPL-12")
class EventCountsNothing(_Waits):
    def told(self, args: Any, given: Any, own: Any, seconds: float) -> None:
        given += 0 if args.async_finish else own


@engine("E2", "a hook's clock runs from when its call was made, through what was computed meanwhile", only="EPL-12")
class WaitsSinceTheCall(_Waits):
    def told(self, args: Any, given: Any, own: Any, seconds: float) -> None:
        own[own.argmax()] = int(seconds * 1e6)
        given += own


@engine("E1", "routes of the last 48 calls are kept: older handles find other ones' in their place", only="EPN-25")
class RoutesOfManyCalls(Engine):
    old = False

    def combine(self, args: Any) -> Any:
        self.old = self.operation - args.handle.state.operation >= 48
        return super().combine(args)

    def stored(self, total: Any, dtype: Any) -> Any:
        return super().stored(total * (not self.old), dtype)


class _Lends(Engine):
    """Lends other memory than it reads, of some handles."""

    def wrongly(self, state: Any) -> bool:
        raise NotImplementedError

    def low_latency_combine_buffer(self, handle: Any) -> Any:
        lent = super().low_latency_combine_buffer(handle)
        return lent.clone() if self.wrongly(handle.state) else lent


@engine("E2", "memory is lent in the hook: before it there is only some of no use", only="EPL-08")
class LentByTheHook(_Lends):
    def wrongly(self, state: Any) -> bool:
        return not state.idx


@engine("E2", "each time other memory is lent, the first of it is read", only="EPL-08")
class LentAnew(_Lends):
    asked: Any = None

    def wrongly(self, state: Any) -> bool:
        again, self.asked = self.asked is state, state
        return again and not state.done


@engine("E2", "memory is lent for one combine of a handle", only="EPL-08")
class LentOnce(_Lends):
    def wrongly(self, state: Any) -> bool:
        return bool(state.done)


@engine("E1", "weights of other ranks' experts are masked by a product: NaN of a hole stays", only="EPN-11")
class HolesTimesNothing(Engine):
    def rank_row(self, message: Any, token: int, at: int, recv_idx: Any, recv_weights: Any) -> None:
        super().rank_row(message, token, at, recv_idx, recv_weights)
        if recv_weights is not None:
            recv_weights[at] += message["weights"][token] * 0


@engine("E2", "a hole's row is a row of zeros, with its weight", only="EPL-06")
class HolesWeighted(Engine):
    def weighted_terms(self, args: Any, messages: Any, token: int, row: Any) -> Any:
        holes = [(slot, self.nothing()) for slot, expert in enumerate(row.tolist()) if expert < 0]
        return super().weighted_terms(args, messages, token, row) + holes


@engine("E2", "zero_copy takes whatever it is given for lent memory", "not noticed", only="EPL-15")
class AnythingIsLent(Engine):
    def low_latency_combine(self, args: Any) -> Any:
        return super().low_latency_combine(dataclasses.replace(args, zero_copy=False))
