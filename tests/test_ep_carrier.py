"""Rows between nodes by a library of their own: gloo in NCCL's place, since it takes the same call."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import ep_cases
import pytest
import torch
import torch.distributed as dist
from ep_cases import Case
from ep_ranks import run_ranks

from hal import RankFailure, SpecError
from hal.ep import carrier as carriers
from hal.ep.carrier import ENV, Carrier
from hal.ep.posts import Posts

TOKENS = (5, 0, 9, 17)
FOUR = Case(ranks=4, tokens=TOKENS, per_node=2)


class Library:
    """What a carrier asks of one: gloo, whose exchanges hold up the caller, behind its back."""

    def __init__(self, store: Any, rank: int, ranks: int) -> None:
        self._gloo = dist.ProcessGroupGloo(store, rank, ranks, timedelta(seconds=60))
        self._worker = ThreadPoolExecutor(1)

    def alltoall_base(self, *given: Any) -> Any:
        future = self._worker.submit(lambda: self._gloo.alltoall_base(*given).wait())
        return SimpleNamespace(is_completed=future.done, wait=future.result)

    def abort(self) -> None:
        self._worker.shutdown(wait=False)


def over_gloo(rank: int) -> None:
    """A device for every rank, and a library for such devices."""

    carriers._maker = lambda args: None if carriers._asked(args) == "host" else Library  # type: ignore[assignment]
    carriers._device_of = lambda args: ("here", str(args.rank))  # type: ignore[assignment]


def test_nodes_give_the_bits_of_one() -> None:
    cases = [
        FOUR,
        Case(ranks=4, tokens=TOKENS, per_node=2, expand=True, alignment=4, bias=2, experts=10, topk=4),
        Case(ranks=4, tokens=(0, 0, 0, 0), per_node=2),
        Case(ranks=4, tokens=TOKENS, per_node=3, fp8="fp8", hidden=256, routing="zipf"),
        Case(ranks=4, tokens=TOKENS, per_node=1, pre_reduce=True, weights=False, routing="distinct"),
    ]
    run_ranks(4, ep_cases.normal, cases, limit=90, before=over_gloo)
    packed = [(Case(ranks=4, tokens=TOKENS, per_node=2, hidden=256), "fp8"), (FOUR, "none")]
    run_ranks(4, ep_cases.packed, packed, limit=90, before=over_gloo)


def counted(rank: int) -> tuple[int, int, int]:
    """Bytes of rows that were carried, those that the host's connections took, and the most that a header has."""
    carried = posted = 0
    carry, trade = Carrier.trade, Posts.trade

    def carrying(self: Carrier, sends: Sequence[tuple[int, Any]], *rest: Any) -> bool:
        nonlocal carried
        carried += sum(rows.numel() * rows.itemsize for _, rows in sends)
        return carry(self, sends, *rest)

    def posting(self: Posts, sends: Sequence[tuple[int, Any]], *rest: Any) -> Any:
        nonlocal posted
        posted = max([posted, *(rows.numel() * rows.itemsize for _, rows in sends)])
        return trade(self, sends, *rest)

    Carrier.trade, Posts.trade = carrying, posting  # type: ignore[method-assign]
    mine = FOUR.inputs()[rank]
    with FOUR.buffer() as buffer:
        got = buffer.dispatch(mine.x, mine.topk_idx, mine.topk_weights)
        buffer.combine(got.recv_x, got.handle)
    dist.barrier()
    return carried, posted, mine.x.numel() * mine.x.itemsize


def test_rows_are_carried_and_headers_are_not() -> None:
    outcomes = [outcome.value for outcome in run_ranks(4, counted, before=over_gloo)]
    # Of 17 tokens of rank 3 many have experts elsewhere; a header is of one size whatever there is to send.
    assert outcomes[3][0] > outcomes[3][2] // 2
    assert len({posted for _, posted, _ in outcomes}) == 1


@pytest.mark.long(7)
@pytest.mark.parametrize("how", ["dies", "fails"])
def test_who_leaves_an_exchange_is_named_within_the_timeout(how: str) -> None:
    outcomes = run_ranks(4, leaving, how, limit=60, check=False, before=over_gloo)
    for rank in (0, 1, 2):
        error = outcomes[rank].error
        assert isinstance(error, RankFailure), outcomes[rank]
        assert error.rank == 3, str(error)
        assert outcomes[rank].value is None and outcomes[rank].seconds < 25


def leaving(rank: int, how: str) -> None:
    """Rank 3 is there when a call begins, and not when its rows are to go."""
    mine = FOUR.inputs()[rank]

    def left(*given: Any) -> bool:
        if how == "dies":
            os._exit(3)
        raise MemoryError("no memory")

    with FOUR.buffer(timeout=6.0) as buffer:
        buffer.dispatch(mine.x, mine.topk_idx)
        if rank == 3:
            Carrier.trade = left  # type: ignore[method-assign]
        begin = time.monotonic()
        try:
            buffer.dispatch(mine.x, mine.topk_idx)
        finally:
            assert rank == 3 or time.monotonic() - begin < 6.5, time.monotonic() - begin


class Connecting(Library):
    """Its first exchange holds up the caller until all ranks have begun theirs, as NCCL's does."""

    def __init__(self, store: Any, rank: int, ranks: int) -> None:
        super().__init__(store, rank, ranks)
        self._store, self._names, self._rank = store, [f"in{one}" for one in range(ranks)], rank

    def alltoall_base(self, *given: Any) -> Any:
        self._store.set(self._names[self._rank], "1")
        while not all(self._store.check([name]) for name in self._names):
            time.sleep(0.01)
        return super().alltoall_base(*given)


def connecting(rank: int) -> None:
    over_gloo(rank)
    carriers._maker = lambda args: Connecting  # type: ignore[assignment,return-value]


@pytest.mark.long(7)
def test_who_leaves_the_first_exchange_is_named_within_the_timeout() -> None:
    run_ranks(2, ep_cases.normal, [Case(ranks=2, tokens=TOKENS[:2], per_node=1)], limit=60, before=connecting)
    outcomes = run_ranks(2, leaving_at_once, limit=60, check=False, before=connecting)
    error = outcomes[0].error
    assert isinstance(error, RankFailure) and error.rank == 1, outcomes[0]
    assert outcomes[0].seconds < 25


def leaving_at_once(rank: int) -> None:
    def left(*given: Any) -> bool:
        raise MemoryError("no memory")

    case = Case(ranks=2, tokens=TOKENS[:2], per_node=1)
    mine = case.inputs()[rank]
    if rank:
        Carrier.trade = left  # type: ignore[method-assign]
    with case.buffer(timeout=6.0) as buffer:
        begin = time.monotonic()
        try:
            buffer.dispatch(mine.x, mine.topk_idx)
        finally:
            assert rank or time.monotonic() - begin < 6.5, time.monotonic() - begin


def switched(rank: int, values: tuple[str, str]) -> str:
    """What opening a buffer says, where ranks have these in their environments."""
    os.environ[ENV] = values[rank % 2]
    try:
        with Case(per_node=1).buffer() as buffer:
            kept: Any = buffer._engine
            return "carried" if kept._wire._carrier else "by the host"
    except SpecError as error:
        return str(error)
    finally:
        dist.barrier()


def test_the_host_may_be_asked_for_by_all_alike() -> None:
    said = [
        [outcome.value for outcome in run_ranks(2, switched, values, before=over_gloo)]
        for values in (("", "device"), ("host", "host"), ("host", "device"), ("gloo", "host"))
    ]
    assert said[0] == ["carried"] * 2 and said[1] == ["by the host"] * 2
    assert said[2] == [f"{ENV}: got 'device' on rank 1; legal: 'host', as on rank 0"] * 2
    assert said[3] == [f"{ENV}: got 'gloo'; legal: host or device, or unset"] * 2


def sharing(rank: int) -> None:
    """The same device for all ranks."""
    over_gloo(rank)
    carriers._device_of = lambda args: ("here", "0")  # type: ignore[assignment]


def test_a_library_wants_a_device_for_every_rank() -> None:
    assert {outcome.value for outcome in run_ranks(2, switched, ("", ""), before=sharing)} == {"by the host"}


def test_rows_of_the_host_need_no_library() -> None:
    assert {outcome.value for outcome in run_ranks(2, switched, ("", ""))} == {"by the host"}


@pytest.mark.parametrize("before", [None, "0"])
def test_a_lost_rank_ends_no_process(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL has no watchdog here, and everybody else's what they had."""
    names, seen = carriers._UNWATCHED, {}
    for name in names:
        if before is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, before)

    class Nccl:
        Options = SimpleNamespace

        def __init__(self, *given: Any) -> None:
            seen.update({name: os.environ.get(name) for name in names})

    monkeypatch.setattr(dist, "ProcessGroupNCCL", Nccl, raising=False)
    carriers._nccl(None, 0, 1)
    assert seen == names
    assert all(os.environ.get(name) == before for name in names)


def test_a_library_that_does_not_give_up_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    monkeypatch.setattr(carriers, "_PATIENCE", 0.1)
    carrier = Carrier(SimpleNamespace(abort=held.wait), 0, 1, torch.device("cpu"))
    begin = time.monotonic()
    carrier.close()
    carrier.close()
    assert time.monotonic() - begin < 20
    held.set()


def test_a_library_that_is_slowly_taken_apart_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NCCL's is, whose threads are waited for when its last reference goes."""
    held, begin = threading.Event(), time.monotonic()
    monkeypatch.setattr(carriers, "_PATIENCE", 0.1)

    class Library:
        def abort(self) -> None:
            """At once."""

        def __del__(self) -> None:
            held.wait(40)

    Carrier(Library(), 0, 1, torch.device("cpu")).close()
    assert time.monotonic() - begin < 20
    held.set()


def test_a_library_that_fails_to_connect_is_gone_with_its_carrier() -> None:
    """It is not kept by what it raised, to be taken apart wherever such circles are looked for next."""

    class Library:
        def alltoall_base(self, *given: Any) -> None:
            raise RuntimeError("no route to host")

        def abort(self) -> None:
            """At once."""

    gc.disable()
    try:
        library = Library()
        gone = weakref.ref(library)
        carrier = Carrier(library, 0, 1, torch.device("cpu"))
        del library
        assert not carrier.trade([], [], 5.0)
        carrier.close()
        assert gone() is None
    finally:
        gc.enable()
