"""One rank of ``hal bench ep``: what it calls for a case, and how long that takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hal.bench import ep_deep_ep
from hal.bench.ep_cases import Shape, routes
from hal.bench.ep_peers import ByAllToAll, Exchange, over_group, over_mpi, require_same
from hal.bench.ep_report import quantile
from hal.bench.ep_site import Call, Site
from hal.ep.buffer import EpBuffer
from hal.spec.errors import first_line


@dataclass(slots=True)
class Rank:
    """One rank of a run: where it is, and the calls to time.

    Attributes
    ----------
    site : Site
    world : object
        MPI's, or None.
    backend : str or None
        What `hal.EpBuffer` is given.
    absent : dict of str to str
        Peers that could not be asked, with the reason.
    """

    site: Site
    world: Any = None
    backend: str | None = None
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Of the default group."""
        return dist.get_rank()

    @property
    def ranks(self) -> int:
        """Of the default group."""
        return dist.get_world_size()

    def _buffer(self, shape: Shape) -> EpBuffer:
        return EpBuffer(
            num_experts=shape.experts,
            hidden=shape.hidden,
            topk=shape.topk,
            max_tokens_per_rank=shape.tokens,
            modes=("low_latency",) if shape.low_latency else ("normal",),
            device=self.site.device,
            backend=self.backend,
        )

    def _inputs(self, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, experts and weights of this rank's tokens."""
        x, weights = torch.randn(shape.tokens, shape.hidden).bfloat16(), torch.rand(shape.tokens, shape.topk)
        return x.to(self.site.device), routes(shape, self.rank).to(self.site.device), weights.to(self.site.device)

    def calls(
        self, shape: Shape, buffer: EpBuffer, close: Callable[[Call], object]
    ) -> tuple[dict[str, Call], dict[str, float]]:
        """What to time by name (``ours`` first), and bytes received in all and from others.

        ``close`` is told what to do once all was timed.
        """
        x, idx, weights = self._inputs(shape)
        n, hidden, device = shape.tokens, shape.hidden, self.site.device
        row = hidden * (1 if shape.fp8 else 2)
        if shape.low_latency:
            sent = torch.bincount((idx // buffer.args.local_experts).flatten(), minlength=self.ranks)
        else:
            sent = buffer.layout(idx).num_tokens_per_rank.long()
        sent = sent.cpu()
        received = _exchange_counts(sent)
        combine = shape.operation.endswith("combine")
        out_rows, in_rows = (received, sent) if combine else (sent, received)
        theirs = self._deep_ep(shape, close)

        calls: dict[str, Call] = {}
        if shape.operation == "dispatch":
            scales = torch.rand(n, -(-hidden // 128)).to(device) if shape.fp8 else None
            values = x.to(torch.float8_e4m3fn) if shape.fp8 else x
            rows = values if scales is None else (values, scales)
            calls["ours"] = lambda: buffer.dispatch(rows, idx, weights)
            for name, peer in self._whole(buffer.args.local_experts):
                calls[name] = partial(peer.dispatch, values, idx, weights, scales)
            require_same(calls)
            if theirs is not None:
                self.admit(calls, lambda: partial(theirs.dispatch, rows, idx, weights), alike=True)
        elif shape.operation == "combine":
            got = buffer.dispatch(x, idx, weights)
            outputs = torch.randn(got.handle.num_recv_tokens, hidden).bfloat16().to(device)
            calls["ours"] = lambda: buffer.combine(outputs, got.handle)
            for name, peer in self._whole(buffer.args.local_experts):
                given = peer.dispatch(x, idx, weights)[-1]
                calls[name] = partial(peer.combine, outputs, given)
            require_same(calls)
            if theirs is not None:
                self.admit(calls, lambda: theirs.combine(outputs, x, idx, weights), alike=True)
        elif shape.operation == "low_latency_dispatch":
            calls["ours"] = lambda: buffer.low_latency_dispatch(x, idx, use_fp8=shape.fp8)
            if theirs is not None:
                self.admit(calls, lambda: partial(theirs.low_latency_dispatch, x, idx), alike=False)
        else:
            low = buffer.low_latency_dispatch(x, idx, use_fp8=False)
            assert isinstance(low.recv_x, Tensor)
            packed = torch.randn(low.recv_x.shape).bfloat16().to(device)
            calls["ours"] = lambda: buffer.low_latency_combine(packed, idx, weights, low.handle)
            if theirs is not None:
                self.admit(calls, lambda: theirs.low_latency_combine(packed, x, idx, weights), alike=False)

        payload = torch.randint(0, 100, (int(out_rows.sum()), row), dtype=torch.uint8).to(device)
        landing = torch.empty(int(in_rows.sum()), row, dtype=torch.uint8, device=device)
        out_split, in_split = out_rows.tolist(), in_rows.tolist()
        calls["copy"] = self.site.copy(payload)
        if self.site.exchange:
            calls[self.site.exchange] = lambda: dist.all_to_all_single(landing, payload, in_split, out_split)
        if self.world is not None:
            from mpi4py import MPI

            send = [payload.numpy(), ([s * row for s in out_split], None), MPI.BYTE]
            receive = [landing.numpy(), ([s * row for s in in_split], None), MPI.BYTE]
            calls["mpi"] = lambda: self.world.Alltoallv(send, receive)
        total = float(in_rows.sum()) * row
        rows_counted = n * shape.topk if shape.low_latency else int(received.sum())
        return calls, {"bytes": total, "remote": total - float(in_rows[self.rank]) * row, "rows": float(rows_counted)}

    def _whole(self, local_experts: int) -> Iterator[tuple[str, ByAllToAll]]:
        """The peers that do all that the HAL does."""
        exchanges: dict[str, Exchange] = {}
        if self.site.exchange:
            exchanges[f"{self.site.exchange}_whole"] = over_group
        if self.world is not None:
            exchanges["mpi_whole"] = over_mpi(self.world)
        for name, exchange in exchanges.items():
            yield name, ByAllToAll(exchange, self.rank, self.ranks, local_experts)

    def _deep_ep(self, shape: Shape, close: Callable[[Call], object]) -> ep_deep_ep.DeepEp | None:
        """DeepEP's own buffer, where it can be asked; every rank comes to the same."""
        if self.site.device.type == "cpu":
            return None
        reason = self.site.absent or ep_deep_ep.missing()
        found = None
        if not reason:
            try:
                found = ep_deep_ep.DeepEp(shape, self.ranks)
            except Exception as error:  # whatever it raises, it is a peer that is not here
                reason = _one_line(error)
        if self._left_out(reason):
            return None
        assert found is not None
        close(found.close)
        return found

    def admit(self, calls: dict[str, Call], make: Callable[[], Call], alike: bool) -> None:
        """DeepEP's call beside the others, if it works on every rank and, where ``alike``, gives what ours gives.

        What it does wrong must not cost the others their figures.
        """
        reason, call = "", None
        try:
            call = make()
            call()
            self.site.settle()
        except Exception as error:
            reason = _one_line(error)
        if self._left_out(reason):
            return
        assert call is not None
        if alike:
            try:
                require_same({"ours": calls["ours"], "deep_ep": call})
            except AssertionError as error:
                reason = f"it gives something else ({_one_line(error)})"
            if self._left_out(reason):
                return
        calls["deep_ep"] = call

    def _left_out(self, reason: str) -> bool:
        """Whether any rank has a reason to leave DeepEP out."""
        if not worst_of_ranks([float(bool(reason))])[0]:
            return False
        self.absent["deep_ep"] = reason or "another rank cannot ask it"
        return True

    def overlap(self, shape: Shape, seconds: float) -> dict[str, Any]:
        """Medians of a call with a hook, of the hook at once, and of the hook after compute as long as that.

        On the host rows are received as their sources write them: who calls last has nothing left to wait for, and the
        first one only as long as the others are late. So rank 0 calls first, the others a call's time later.
        """
        with self._buffer(shape) as buffer:
            x, idx, weights = self._inputs(shape)
            slowed: list[float] = []

            def once(compute: float, late: float = 0.0) -> tuple[float, float]:
                self.site.meet()
                if self.rank and late:
                    self.site.compute(late)
                start = time.perf_counter()
                if shape.low_latency:
                    hook = buffer.low_latency_dispatch(x, idx, use_fp8=shape.fp8, return_recv_hook=True).hook
                else:
                    hook = buffer.dispatch(x, idx, weights, return_recv_hook=True).hook
                called = time.perf_counter()
                if compute:
                    slowed.append(self.site.compute(compute))
                begun = time.perf_counter()
                assert hook is not None
                hook()
                self.site.settle()
                return called - start, time.perf_counter() - begun

            plain = [once(0.0) for _ in range(5)]
            count = max(10, min(300, int(seconds / max(slowest([sum(one) for one in plain]), 1e-5) / 4)))
            late = quantile(worst_of_ranks([one[0] for one in plain]), 0.5) if self.site.device.type == "cpu" else 0.0
            plain = [once(0.0, late) for _ in range(count)]
            calls = worst_of_ranks([one[0] for one in plain])
            receives = worst_of_ranks([one[1] for one in plain])
            receive = quantile(receives, 0.5)
            left = quantile(worst_of_ranks([once(receive, late)[1] for _ in range(count)]), 0.5)
            compute = quantile(worst_of_ranks(slowed), 0.5)
        found = {
            "name": shape.name,
            "ranks": self.ranks,
            "late_us": late * 1e6,
            "call_us": quantile(calls, 0.5) * 1e6,
            "receive_us": receive * 1e6,
            "visible_us": left * 1e6,
            "visible": left / receive,
        }
        return found if self.site.device.type == "cpu" else found | {"compute": compute}

    def time(self, shape: Shape, seconds: float) -> dict[str, Any]:
        """Time every side of a shape in turns for about so long."""
        closing: list[Call] = []
        try:
            with self._buffer(shape) as buffer:
                calls, volume = self.calls(shape, buffer, closing.append)
                once = {}
                for name, call in calls.items():
                    call()
                    once[name] = slowest(self.site.timed(call, 3))
                share = seconds / len(calls)
                rounds = 10
                counts = {name: max(1, min(200, int(share / rounds / max(t, 1e-6)))) for name, t in once.items()}
                times: dict[str, list[float]] = {name: [] for name in calls}
                for _ in range(rounds):
                    for name, call in calls.items():
                        # A spell of calls begins together; the first ones warm the caches again.
                        self.site.meet()
                        times[name] += self.site.timed(call, counts[name] + 2)[2:]
        finally:
            for close in closing:
                close()
        merged = {name: worst_of_ranks(values) for name, values in times.items()}
        fewest = -worst_of_ranks([-volume["rows"]])[0]
        return {
            "merged": merged,
            **{name: worst_of_ranks([volume[name]])[0] for name in ("bytes", "remote")},
            "rows": fewest,
        }


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def slowest(values: Sequence[float]) -> float:
    """The least of what the slowest rank took each time."""
    return min(worst_of_ranks(list(values)))


def worst_of_ranks(values: list[float]) -> list[float]:
    """Of each the largest that a rank has."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def _exchange_counts(sent: Tensor) -> Tensor:
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return received
