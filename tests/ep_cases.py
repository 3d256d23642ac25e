"""What a rank does in the expert-parallel tests, compared with the oracle on the spot."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hal
from hal.reference import ep as oracle
from hal.reference.ep import RankInput
from hal.spec.ep import EpHandle


@dataclass(frozen=True)
class Case:
    """Everything needed to make every rank's inputs alike on every rank."""

    ranks: int = 2
    experts: int = 8
    topk: int = 3
    hidden: int = 64
    tokens: tuple[int, ...] = (5, 7)
    routing: str = "random"
    dtype: str = "bfloat16"
    fp8: str = ""
    weights: bool = True
    expand: bool = False
    alignment: int = 1
    bias: int = 0
    worst: int = 0
    room: int | None = None
    overflow: str = "error"
    per_node: int | None = None
    pre_reduce: bool = False
    seed: int = 0
    backend: str = "cpu"

    def inputs(self) -> list[RankInput]:
        """Every rank's inputs."""
        seed = torch.Generator().manual_seed(self.seed)
        made = []
        for n in self.tokens:
            x = torch.randn(n, self.hidden, generator=seed).to(getattr(torch, self.dtype))
            scales = None
            if self.fp8:
                x, scales = oracle.fp8_cast(x, self.fp8)
            made.append(
                RankInput(
                    x,
                    route(self.routing, n, self.topk, self.experts, seed),
                    torch.rand(n, self.topk, generator=seed) if self.weights else None,
                    scales,
                )
            )
        return made

    def buffer(self, **more: Any) -> hal.EpBuffer:
        """This rank's buffer."""
        given: dict[str, Any] = {
            "num_experts": self.experts,
            "hidden": self.hidden,
            "topk": self.topk,
            "max_tokens_per_rank": max(*self.tokens, 1) if len(self.tokens) > 1 else max(self.tokens[0], 1),
            "dtype": getattr(torch, self.dtype),
            "max_recv_tokens": self.room,
            "overflow": self.overflow,
            "ranks_per_node": self.per_node,
            "pre_reduce": self.pre_reduce,
            "timeout": 10.0,
            "backend": self.backend,
        }
        return hal.EpBuffer(**{**given, **more})


def route(kind: str, n: int, topk: int, experts: int, seed: torch.Generator) -> torch.Tensor:
    """topk_idx of one rank: without holes, with holes and duplicates, skewed, all to one, none at all."""
    if kind == "distinct":
        scores = torch.rand(n, experts, generator=seed)
        return scores.topk(topk, dim=1).indices
    if kind == "random":
        return torch.randint(-1, experts, (n, topk), generator=seed)
    if kind == "zipf":
        weights = 1.0 / torch.arange(1, experts + 1)
        if n == 0:
            return torch.zeros(0, topk, dtype=torch.int64)
        return torch.multinomial(weights.expand(n, -1), topk, generator=seed)
    if kind == "one":
        return torch.full((n, topk), experts - 1)
    assert kind == "none"
    return torch.full((n, topk), -1)


def same(name: str, got: torch.Tensor | None, want: torch.Tensor | None) -> None:
    """Equal bit for bit, or say where the first difference is."""
    if want is None or got is None:
        assert got is None and want is None, f"{name}: {got} instead of {want}"
        return
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)} instead of {list(want.shape)}"
    assert got.dtype == want.dtype, f"{name}: {got.dtype} instead of {want.dtype}"
    a, b = (one.clone(memory_format=torch.contiguous_format).view(torch.uint8) for one in (got, want))
    if not torch.equal(a, b):
        at = (a != b).nonzero()[0].tolist()
        x, y = got[tuple(at[:-1])].flatten(), want[tuple(at[:-1])].flatten()
        i = at[-1] // got.element_size()
        raise AssertionError(f"{name} differs first at {at[:-1]} column {i}: {x[i].item()} instead of {y[i].item()}")


def outputs_of(case: Case, received: list[oracle.RankReceived]) -> list[torch.Tensor]:
    """What the experts of every rank make of the rows: something that tells rows and ranks apart."""
    made = []
    for rank, got in enumerate(received):
        seed = torch.Generator().manual_seed(1000 + rank)
        scale = torch.randn(len(got.x), case.hidden, generator=seed)
        made.append((got.x.float() * scale).to(getattr(torch, case.dtype)))
    return made


def normal(rank: int, cases: list[Case]) -> None:
    """Dispatch, combine and cached dispatch of every case agree with the oracle bit for bit."""
    for case in cases:
        with case.buffer() as buffer:
            for repeat in range(2):
                normal_once(rank, case, buffer, repeat)
    dist.barrier()  # whoever leaves first resets connections that others still read


def normal_once(rank: int, case: Case, buffer: hal.EpBuffer, repeat: int) -> None:
    """One round of `normal` on an open buffer."""
    inputs = case.inputs()
    mine = inputs[rank]
    want = oracle.dispatch(
        inputs,
        case.experts,
        expand=case.expand,
        expert_alignment=case.alignment,
        max_recv_tokens=case.room if case.overflow == "drop" else None,
    )
    mode = ("", "async_finish", "return_recv_hook")[(rank + repeat) % 3]
    flags = {mode: True} if mode else {}
    x = mine.x if mine.scales is None else (mine.x, mine.scales)
    got = buffer.dispatch(
        x,
        mine.topk_idx,
        mine.topk_weights,
        expand=case.expand,
        expert_alignment=case.alignment,
        num_worst_tokens=case.worst,
        **flags,
    )
    _complete(got, mode)
    check_received(case, got, want[rank])

    # The same routes again, with other rows.
    again = [RankInput((g.x.float() * 2).to(g.x.dtype), g.topk_idx, None, g.scales) for g in inputs]
    cached = buffer.dispatch(
        again[rank].x if mine.scales is None else (again[rank].x, again[rank].scales), handle=got.handle
    )
    want_again = oracle.dispatch(
        again,
        case.experts,
        expand=case.expand,
        expert_alignment=case.alignment,
        max_recv_tokens=case.room if case.overflow == "drop" else None,
    )
    check_received(case, cached, want_again[rank])
    check_received(case, got, want[rank])  # what came before is still there

    outputs = outputs_of(case, want)
    sent = torch.zeros(got.handle.num_recv_tokens, case.hidden, dtype=outputs[rank].dtype)
    sent[: len(outputs[rank])] = outputs[rank]
    seeds = torch.Generator().manual_seed(5)
    biases = [
        [torch.randn(len(g.topk_idx), case.hidden, generator=seeds).to(sent.dtype) for _ in range(case.bias)]
        for g in inputs
    ]
    weights = [w.topk_weights for w in want] if case.weights else None
    want_sums = oracle.combine(
        outputs,
        want,
        inputs,
        case.experts,
        expand=case.expand,
        topk_weights=weights,
        bias=biases,
        ranks_per_node=case.per_node if case.pre_reduce else None,
    )
    for handle in (got.handle, cached.handle):
        back = buffer.combine(
            sent,
            handle,
            topk_weights=got.recv_topk_weights,
            bias=tuple(biases[rank]) or None,
            **flags,
        )
        _complete(back, mode)
        same("combined_x", back.combined_x, want_sums[rank][0])
        same("combined_topk_weights", back.combined_topk_weights, want_sums[rank][1])


def _complete(result: Any, mode: str) -> None:
    if mode == "async_finish":
        assert result.hook is None
        result.event.wait()
    elif mode == "return_recv_hook":
        result.hook()
        result.hook()


def check_received(case: Case, got: Any, want: oracle.RankReceived) -> None:
    """A dispatch result against what the oracle expects."""
    rows = len(want.x)
    x, scales = got.recv_x if isinstance(got.recv_x, tuple) else (got.recv_x, None)
    if case.worst:
        assert len(x) == case.worst
        assert (got.recv_topk_idx[rows:] == -1).all()
        x, scales = x[:rows], None if scales is None else scales[:rows]
    else:
        assert list(got.num_recv_tokens_per_expert) == want.num_tokens_per_expert or case.room is not None
    same("recv_x", x, want.x)
    same("recv_scales", scales, want.scales)
    same("recv_topk_idx", got.recv_topk_idx[:rows], want.topk_idx)
    if got.recv_topk_weights is not None:
        same("recv_topk_weights", got.recv_topk_weights[:rows], want.topk_weights)
    assert got.handle.num_dropped == want.num_dropped
    check_sources(got.handle, want, dist.get_rank())


def check_sources(handle: EpHandle, want: oracle.RankReceived, rank: int) -> None:
    """Where every row came from, and how many tokens of each rank for each expert."""
    ranks, positions = handle.recv_src_rank.tolist(), handle.recv_src_position.tolist()
    assert len(ranks) == len(positions) == handle.num_recv_tokens
    none = (-1, -1)
    there = list(want.source)
    told = list(zip(ranks, positions, strict=True))
    assert told[: len(there)] == there
    assert told[len(there) :] == [none] * (len(told) - len(there))
    assert int(handle.sent_counts[:, rank].sum()) == len(set(there) - {none}) + handle.num_dropped
    counts = torch.zeros_like(handle.recv_counts)
    columns = want.topk_idx[:, None] if want.topk_idx.dim() == 1 else want.topk_idx
    for (source, _), experts in zip(there, columns.tolist(), strict=True):
        for expert in {one for one in experts if one >= 0}:
            counts[source, expert] += 1
    assert torch.equal(handle.recv_counts, counts), f"{handle.recv_counts} instead of {counts}"


def packed(rank: int, cases: list[tuple[Case, str]]) -> None:
    """Low-latency dispatch and combine of every (case, cast) agree with the oracle bit for bit."""
    for case, cast in cases:
        with case.buffer(modes=("low_latency",)) as buffer:
            for repeat in range(3):
                packed_once(rank, case, cast, buffer, repeat)
    dist.barrier()


CAST_FLAGS = {
    "none": {"use_fp8": False},
    "fp8": {},
    "fp8_pow2": {"round_scale": True},
    "fp8_ue8m0": {"round_scale": True, "use_ue8m0": True},
}


def packed_once(rank: int, case: Case, cast: str, buffer: hal.EpBuffer, repeat: int) -> None:
    """One round of `packed` on an open buffer."""
    inputs = case.inputs()
    mine = inputs[rank]
    most = buffer.args.max_tokens_per_rank
    want = oracle.low_latency_dispatch(inputs, case.experts, most, cast=cast)
    mode = ("", "async_finish", "return_recv_hook")[(rank + repeat) % 3]
    flags = {mode: True} if mode else {}
    stats = torch.full((buffer.args.local_experts,), 3, dtype=torch.int32)
    waits = torch.zeros(case.ranks, dtype=torch.int64)
    x = mine.x.clone()
    got = buffer.low_latency_dispatch(
        x,
        mine.topk_idx,
        cumulative_local_expert_recv_stats=stats,
        dispatch_wait_recv_cost_stats=waits,
        **CAST_FLAGS[cast],
        **flags,
    )
    if mode:
        x.zero_()  # a call that returned has no more use for its arguments
    _complete(got, mode)
    recv_x, scales = got.recv_x if isinstance(got.recv_x, tuple) else (got.recv_x, None)
    same("recv_count", got.recv_count, want[rank].count)
    same("stats", stats, want[rank].count + 3)
    same("layout_range", got.handle.layout_range, want[rank].layout_range)
    assert (waits >= 0).all()
    for local, count in enumerate(got.recv_count.tolist()):
        same("recv_x", recv_x[local, :count], want[rank].x[local, :count])
        if scales is not None:
            same("scales", scales[local, :count], want[rank].scales[local, :count])
        same("src_info", got.handle.src_info[local, :count], want[rank].src_info[local, :count])
    if scales is not None:
        assert scales.stride(1) == 1 or scales.shape[1] == 1

    outputs = []
    for r in range(case.ranks):
        seed = torch.Generator().manual_seed(2000 + r)
        shape = (buffer.args.local_experts, case.ranks * most, case.hidden)
        outputs.append(torch.randn(shape, generator=seed).to(getattr(torch, case.dtype)))
    want_sums = oracle.low_latency_combine(outputs, want, inputs)
    sent = outputs[rank].clone()
    for local, count in enumerate(got.recv_count.tolist()):
        sent[local, count:] = float("nan")  # never read
    for zero_copy in (False, True):
        if zero_copy:
            lent = buffer.low_latency_combine_buffer(got.handle)
            lent.copy_(sent)
            sent = lent
        out = torch.full((len(mine.topk_idx), case.hidden), 7.0).to(sent.dtype) if repeat else None
        back = buffer.low_latency_combine(
            sent, mine.topk_idx, mine.topk_weights, got.handle, zero_copy=zero_copy, out=out, **flags
        )
        _complete(back, mode)
        assert out is None or back.combined_x is out
        same("combined_x", back.combined_x, want_sums[rank])


def two_in_flight(rank: int, per_node: int | None = None) -> None:
    """Two dispatches before either is received, combined in either order; a third live one is refused."""
    case = Case(tokens=(6, 6), hidden=128, per_node=per_node)
    with case.buffer() as buffer:
        inputs = case.inputs()
        mine = inputs[rank]
        for order in ((0, 1), (1, 0)):
            pair = [
                buffer.low_latency_dispatch(mine.x * (i + 1), mine.topk_idx, use_fp8=False, return_recv_hook=True)
                for i in range(2)
            ]
            with pytest.raises(hal.SpecError, match="low_latency_dispatch"):
                buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
            for i in order:
                pair[i].hook()
            scaled = [[RankInput(g.x * (i + 1), g.topk_idx, g.topk_weights) for g in inputs] for i in range(2)]
            for i in order:
                want = oracle.low_latency_dispatch(scaled[i], case.experts, 6)
                for local, count in enumerate(pair[i].recv_count.tolist()):
                    same("recv_x", pair[i].recv_x[local, :count], want[rank].x[local, :count])
                back = buffer.low_latency_combine(pair[i].recv_x, mine.topk_idx, mine.topk_weights, pair[i].handle)
                sums = oracle.low_latency_combine([w.x for w in want], want, scaled[i])
                same("combined_x", back.combined_x, sums[rank])
        # Letting go is as good as combining.
        for _ in range(5):
            result = buffer.low_latency_dispatch(mine.x, mine.topk_idx)
        del result


def mixed_modes(rank: int, per_node: int | None = None) -> None:
    """Both modes on one buffer, asynchronous calls finished late and out of order, many results kept."""
    case = Case(tokens=(6, 6), hidden=128, per_node=per_node)
    inputs = case.inputs()
    mine = inputs[rank]
    want = oracle.dispatch(inputs, case.experts)
    with case.buffer() as buffer:
        kept = [buffer.dispatch(mine.x * (i + 1), mine.topk_idx, async_finish=True) for i in range(40)]
        low = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        buffer.low_latency_combine(low.recv_x, mine.topk_idx, mine.topk_weights, low.handle)
        for i in (39, 3, 17, *range(40)):
            kept[i].event.wait()
            same("recv_x", kept[i].recv_x, want[rank].x * (i + 1))
        late = [buffer.combine(k.recv_x, k.handle, async_finish=True) for k in kept]
        for i in reversed(range(40)):
            late[i].event.wait()
        sums = oracle.combine([w.x for w in want], want, inputs, case.experts)
        same("combined_x", late[0].combined_x, sums[rank][0])
        first = kept[0].recv_x
        held = buffer.memory()["in_use"]
        del kept, late
        assert buffer.memory()["in_use"] < held
    same("recv_x after close", first, want[rank].x)


def gradients(rank: int) -> None:
    """The backward of dispatch is a combine, that of combine a cached dispatch."""
    case = Case(tokens=(6, 4), hidden=16, dtype="float32")
    inputs = case.inputs()
    mine = inputs[rank]
    want = oracle.dispatch(inputs, case.experts)
    factor = [
        torch.randn(len(w.x), case.hidden, generator=torch.Generator().manual_seed(r)) for r, w in enumerate(want)
    ]
    leaves = [g.x.clone().requires_grad_() for g in inputs]
    total = torch.zeros(())
    for r, w in enumerate(want):
        for row, (source, token) in enumerate(w.source):
            total = total + (leaves[source][token] * factor[r][row]).sum() * 2
    total.backward()
    with case.buffer() as buffer:
        sent = buffer.dispatch(mine.x, mine.topk_idx)
        # forward: y = combine(dispatch(x) * factor); the loss sums y * 2
        grad_rows = buffer.dispatch(torch.full_like(mine.x, 2.0), handle=sent.handle).recv_x
        grad_x = buffer.combine(grad_rows * factor[rank], sent.handle).combined_x
        torch.testing.assert_close(grad_x, leaves[rank].grad)


def repeated(rank: int, runs: int) -> None:
    """The same bits on every run, in whatever order the ranks arrive."""
    case = Case(ranks=3, tokens=(9, 6, 12), hidden=320, routing="distinct", experts=9, topk=4)
    inputs = case.inputs()
    mine = inputs[rank]
    pause = random.Random(rank)
    seen: list[torch.Tensor] = []
    with case.buffer() as buffer:
        for _ in range(runs):
            time.sleep(pause.random() * 0.003)
            got = buffer.dispatch(mine.x, mine.topk_idx)
            scale = torch.randn(got.recv_x.shape, generator=torch.Generator().manual_seed(rank))
            time.sleep(pause.random() * 0.003)
            back = buffer.combine((got.recv_x * scale).bfloat16(), got.handle).combined_x
            low = buffer.low_latency_dispatch(mine.x, mine.topk_idx)
            packed = torch.randn((*low.handle.src_info.shape, case.hidden), generator=torch.Generator().manual_seed(1))
            weighted = buffer.low_latency_combine(packed.bfloat16(), mine.topk_idx, mine.topk_weights, low.handle)
            now = [got.recv_x.clone(), back, weighted.combined_x]
            for name, one, first in zip(("dispatch", "combine", "low latency"), now, seen or now, strict=True):
                same(name, one, first)
            seen = now


def returns_at_once(rank: int, per_node: int | None = None) -> tuple[float, float]:
    """Seconds of a call with a receive hook while the other rank is late, and of the hook."""
    case = Case(tokens=(6, 6), hidden=128, per_node=per_node)
    inputs = case.inputs()
    mine = inputs[rank]
    want = oracle.low_latency_dispatch(inputs, case.experts, 6)
    with case.buffer() as buffer:
        buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False)
        if rank == 1:
            time.sleep(1.0)
        start = time.monotonic()
        got = buffer.low_latency_dispatch(mine.x, mine.topk_idx, use_fp8=False, return_recv_hook=True)
        called = time.monotonic() - start
        start = time.monotonic()
        got.hook()
        for local, count in enumerate(got.recv_count.tolist()):
            same("recv_x", got.recv_x[local, :count], want[rank].x[local, :count])
        return called, time.monotonic() - start


def arguments_used_again(rank: int, per_node: int | None = None, backend: str = "cpu") -> None:
    """What a call was given is written over once it returned, and before its hook where it has one."""
    case = Case(tokens=(6, 6), hidden=128, per_node=per_node, routing="distinct", backend=backend)
    inputs = case.inputs()
    mine, local, slots = inputs[rank], oracle.local_experts(case.experts, 2), 12
    outputs = [one.view(local, slots, case.hidden) for one in _random_rows(2, local * slots, case.hidden)]
    packed = oracle.low_latency_dispatch(inputs, case.experts, 6)
    sums = oracle.low_latency_combine(outputs, packed, inputs)
    received = oracle.dispatch(inputs, case.experts)
    rows = [torch.ones_like(one.x) for one in received]
    with case.buffer() as buffer:
        x, idx, stats = mine.x.clone(), mine.topk_idx.clone(), torch.zeros(local, dtype=torch.int32)
        got = buffer.low_latency_dispatch(
            x, idx, use_fp8=False, cumulative_local_expert_recv_stats=stats, return_recv_hook=True
        )
        x.fill_(7.0)
        idx.fill_(0)
        dist.barrier()
        time.sleep(0.3)  # What is written behind the caller's back is written by now.
        assert not stats.any()
        got.hook()
        same("stats", stats, packed[rank].count)
        for at, count in enumerate(packed[rank].count.tolist()):
            same("recv_x", got.recv_x[at, :count], packed[rank].x[at, :count])
        y, out = outputs[rank].clone(), torch.full((6, case.hidden), 7.0, dtype=torch.bfloat16)
        done = buffer.low_latency_combine(
            y, mine.topk_idx, mine.topk_weights, got.handle, out=out, return_recv_hook=True
        )
        y.fill_(7.0)
        dist.barrier()
        time.sleep(0.3)
        assert bool((out == 7.0).all())
        done.hook()
        same("out", out, sums[rank])

        x, idx = mine.x.clone(), mine.topk_idx.clone()
        plain = buffer.dispatch(x, idx)
        x.fill_(7.0)
        idx.fill_(0)
        same("recv_x", plain.recv_x, received[rank].x)
        again = buffer.dispatch(mine.x, handle=plain.handle)
        same("cached", again.recv_x, received[rank].x)
        same("cached routes", again.recv_topk_idx, received[rank].topk_idx)
        summed = buffer.combine(rows[rank], plain.handle)
        same("combined_x", summed.combined_x, oracle.combine(rows, received, inputs, case.experts)[rank][0])


def _random_rows(count: int, rows: int, hidden: int) -> list[torch.Tensor]:
    seed = torch.Generator().manual_seed(3)
    return [torch.randn(rows, hidden, generator=seed).bfloat16() for _ in range(count)]
