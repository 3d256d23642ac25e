"""A small correct expert-parallel engine in torch: every rank sends its whole call to all, and takes what is its own.

Every stage is a method, so that a planted bug is one override.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hal.backend import Backend, Probe
from hal.ep.engine import EpCombined, EpDispatched, EpEngine, EpLowLatencyCombined, EpLowLatencyDispatched
from hal.spec.capability import Capabilities, EpCapabilities, Ints, only
from hal.spec.ep import (
    CASTS,
    FP8,
    OVERFLOW,
    EpBufferArgs,
    EpHandle,
    EpLayout,
    EpLowLatencyHandle,
)
from hal.spec.errors import RankFailure, SpecError, UnsupportedError
from mutants.ep_mail import Mail
from mutants.sample import Plugin

Source = tuple[int, int]


def communicates(**changes: Any) -> EpCapabilities:
    """Everything an engine can declare."""
    everything: dict[str, Any] = {
        "modes": ("normal", "low_latency"),
        "layouts": ("rank", "expand"),
        "dtypes": ("bfloat16", "float16", "float32", "float8_e4m3fn"),
        "casts": CASTS,
        "transports": ("files",),
        "overflow": OVERFLOW,
        "ranks": Ints(1, 64),
        "nodes": Ints(1, 64),
        "topk": Ints(1),
        "num_experts": Ints(1),
        "row_bytes": Ints(16, multiple_of=16),
        "recv_hook": True,
        "async_finish": True,
        "cached_handle": True,
        "mask_ranks": True,
        "zero_copy_combine": True,
        "pre_reduce": True,
        "across_nodes": ("normal", "low_latency", "error", "drop", "grow", "mask_ranks"),
    }
    return EpCapabilities(**(everything | changes))


@dataclass
class Routes:
    """What a handle carries: every rank's topk_idx, and for every rank its rows and where each came from."""

    operation: int
    idx: list[Tensor | None]
    source: list[list[Source]]
    local: list[list[int]]
    expand: bool = False
    places: dict[int, dict[tuple[Source, int], int]] = field(default_factory=dict)

    def rows(self, home: int) -> dict[tuple[Source, int], int]:
        """The first row of every token and local expert at a rank."""
        if home not in self.places:
            every = zip(self.source[home], self.local[home], strict=True)
            self.places[home] = {}
            for row, at in enumerate(every):
                self.places[home].setdefault(at, row)
        return self.places[home]


class Sources:
    """What a handle tells of its rows."""

    def __init__(self, engine: Engine, routes: Routes, rows: int) -> None:
        self.engine, self.routes = engine, routes
        self.source = routes.source[engine.rank] + [(-1, -1)] * (rows - len(routes.source[engine.rank]))

    def rank(self) -> Tensor:
        return torch.tensor([source for source, _ in self.source], dtype=torch.int32, device="cpu")

    def position(self) -> Tensor:
        return torch.tensor([token for _, token in self.source], dtype=torch.int32, device="cpu")

    def choice(self) -> Tensor:
        engine, expand = self.engine, self.routes.expand
        found = []
        for (source, token), local in zip(self.source, self.routes.local[engine.rank], strict=False):
            row = [] if source < 0 else engine.row_of(self.routes.idx, source, token).tolist()
            mine = engine.rank * engine.local + local
            found.append(
                next((k for k, e in enumerate(row) if (e == mine if expand else engine.localised(e) >= 0)), -1)
            )
        found += [-1] * (len(self.source) - len(found))
        return torch.tensor(found, dtype=torch.int32, device="cpu")

    def counts(self) -> Tensor:
        engine = self.engine
        found = torch.zeros(engine.ranks, engine.local, dtype=torch.int32, device="cpu")
        for source, token in self.came():
            for expert in engine.experts(engine.row_of(self.routes.idx, source, token)):
                if expert // engine.local == engine.rank:
                    found[source, expert % engine.local] += 1
        return found

    def came(self) -> set[Source]:
        """The tokens of which there are rows."""
        return {at for at in self.source if at[0] >= 0}

    def sent(self) -> Tensor:
        found = torch.zeros(self.engine.ranks, self.engine.ranks, dtype=torch.int32, device="cpu")
        for source, idx in enumerate(self.routes.idx):
            for row in [] if idx is None else idx:
                found[source, self.engine.homes(row)] += 1
        return found


@dataclass(eq=False)
class Packed:
    """What a low-latency handle carries."""

    operation: int
    idx: list[Tensor | None] = field(default_factory=list)
    lent: Tensor | None = None
    done: bool = False


class Engine(EpEngine):
    """Correct."""

    sources = Sources

    def __init__(self, args: EpBufferArgs, launched: Counter[str]) -> None:
        self.args, self.launched = args, launched
        self.rank, self.ranks, self.local = args.rank, args.num_ranks, args.local_experts
        self.mail = Mail(args)
        self.identity = object()
        self.operation = 0
        self.mask = [False] * self.ranks
        self.broken: RankFailure | None = None
        self.live: list[weakref.ref[Packed]] = []
        self.log: list[Mapping[str, object]] = []
        self.summing: Any = None

    @property
    def owner(self) -> object:
        return self.identity

    # Messages.

    def begin(self, kind: str, fields: dict[str, Any], content: dict[str, Any]) -> int:
        if self.broken is not None:
            raise self.broken
        self.launched[kind] += 1
        self.operation += 1
        self.log.append({"rank": self.rank, "operation": self.operation, "kind": kind})
        self.mail.send(self.operation, {"call": kind, "fields": fields, **content})
        return self.operation

    def hear(self, operation: int, phase: str, waits: Tensor | None = None) -> list[Any]:
        """Every rank's message; None for a masked one. Raises what all ranks raise."""
        deadline = self.deadline()
        found: list[Any] = []
        for source in range(self.ranks):
            start = time.monotonic()
            message = None
            if not self.mask[source]:
                try:
                    message = self.mail.read(operation, source, phase, deadline)
                except RankFailure as failure:
                    if not self.args.mask_ranks:
                        self.broken = self.blamed(failure)
                        raise self.broken from None
                    self.mask[source] = True
            if waits is not None:
                waits[source] += int((time.monotonic() - start) * 1e6)
            found.append(message)
        self.compare(found)
        return found

    def deadline(self) -> float:
        return time.monotonic() + self.args.timeout

    def blamed(self, failure: RankFailure) -> RankFailure:
        return failure

    def compare(self, messages: list[Any]) -> None:
        there = [(rank, m) for rank, m in enumerate(messages) if m is not None]
        for _, message in there:
            if message["call"] == "refused":
                raise SpecError(*message["error"])
        head, first = there[0]
        for rank, message in there:
            if message["call"] != first["call"]:
                raise SpecError("call", f"{message['call']} on rank {rank}", f"{first['call']}, as on rank {head}")
            for name, value in first["fields"].items():
                if message["fields"][name] != value:
                    other = f"{message['fields'][name]} on rank {rank}"
                    raise SpecError(name.split(".")[0], other, f"{value}, as on rank {head}")

    def refuse(self, phase: str, error: SpecError) -> SpecError:
        if self.broken is not None:
            raise self.broken
        self.operation += 1
        self.mail.send(self.operation, {"call": "refused", "error": (error.argument, error.got, error.legal)})
        try:
            self.hear(self.operation, phase)
        except SpecError as first:
            return first
        return error

    def in_range(self, idx: Tensor) -> None:
        if bool(((idx < -1) | (idx >= self.args.num_experts)).any()):
            raise self.refuse("topk_idx", SpecError("topk_idx", "an expert out of range", f"{self.args.num_experts}"))

    # Routes.

    def experts(self, row: Tensor) -> list[int]:
        """The distinct experts of a token in top-k order."""
        return list(dict.fromkeys(e for e in row.tolist() if e >= 0))

    def homes(self, row: Tensor) -> list[int]:
        return list(dict.fromkeys(e // self.local for e in self.experts(row)))

    def arrivals(self, idx: list[Tensor | None], rank: int) -> list[Source]:
        """Source rank and position of the rows a rank receives."""
        found = [(s, t) for s, one in enumerate(idx) if one is not None for t in range(len(one))]
        return [(s, t) for s, t in found if rank in self.homes(self.row_of(idx, s, t))]

    def row_of(self, idx: list[Tensor | None], source: int, token: int) -> Tensor:
        found = idx[source]
        assert found is not None
        return found[token]

    def room(self, arrived: list[Source], rank: int) -> list[Source]:
        most = self.args.max_recv_tokens
        if len(arrived) > most and self.args.overflow == "error":
            raise SpecError("max_recv_tokens", most, f"{len(arrived)}, which rank {rank} would receive")
        return arrived[:most] if self.args.overflow == "drop" else arrived

    def members(self, idx: list[Tensor | None], kept: list[Source], rank: int) -> list[list[Source]]:
        """For each local expert the rows it has a part in."""
        first = rank * self.local
        return [
            [(s, t) for s, t in kept if first + e in self.experts(self.row_of(idx, s, t))] for e in range(self.local)
        ]

    def aligned(self, count: int, alignment: int) -> int:
        return -(-count // alignment) * alignment

    def routes(self, idx: list[Tensor | None], args: Any, operation: int) -> tuple[Routes, list[list[int]], list[int]]:
        """Routes, and for each rank the counts of its experts and how many rows were dropped."""
        sources, locals_, counts, dropped = [], [], [], []
        for rank in range(self.ranks):
            arrived = [] if idx[rank] is None else self.arrivals(idx, rank)
            kept = self.room(arrived, rank)
            members = self.members(idx, kept, rank)
            count = [self.aligned(len(group), args.expert_alignment) for group in members]
            if args.expand:
                gone = [(-1, -1)]
                padded = [g + gone * (n - len(g)) for g, n in zip(members, count, strict=True)]
                sources.append([s for g in padded for s in g])
                locals_.append([e if s[0] >= 0 else -1 for e, g in enumerate(padded) for s in g])
            else:
                sources.append(kept)
                locals_.append([0] * len(kept))
            counts.append(count)
            dropped.append(len(arrived) - len(kept))
        return Routes(operation, idx, sources, locals_, args.expand), counts, dropped

    # The normal mode.

    def dispatch(self, args: Any) -> EpDispatched:
        x, scales, weights, idx = args.x, args.scales, args.topk_weights, args.topk_idx
        if args.handle is None:
            self.in_range(idx)
        fields = {
            "topk_weights": weights is not None,
            "topk_idx": idx.shape[1],
            "x": str(x.dtype),
            "x.scales": None if scales is None else str(scales.dtype),
            "expand": args.expand,
            "expert_alignment": args.expert_alignment,
            "num_worst_tokens": args.num_worst_tokens,
            "handle": 0 if args.handle is None else args.handle.state.operation,
        }
        content = {"x": plain(x), "scales": plain(scales), "idx": idx, "weights": weights, "dtype": x.dtype}
        operation = self.begin("dispatch", fields, content)
        messages = self.hear(operation, "dispatch")
        idx_of = [None if m is None else m["idx"] for m in messages]
        routes, counts, dropped = self.routes(idx_of, args, operation)
        mine = self.arranged(routes.source[self.rank])
        rows = args.num_worst_tokens or len(mine)
        recv_x = plain(x).new_zeros(rows, plain(x).shape[1])
        recv_scales = None if scales is None else plain(scales).new_zeros(rows, plain(scales).shape[1])
        shape = (rows,) if args.expand else (rows, idx.shape[1])
        recv_idx = torch.full(shape, -1, device="cpu")
        recv_weights = None if weights is None else torch.zeros(shape, dtype=torch.float32, device="cpu")
        for at, (source, token) in enumerate(mine):
            if source < 0:
                continue
            message = messages[source]
            recv_x[at] = self.copied(message, token)
            if recv_scales is not None:
                recv_scales[at] = self.scale_row(message["scales"], token)
            if args.expand:
                self.expanded_row(message, token, routes.local[self.rank][at], at, recv_idx, recv_weights)
            else:
                self.rank_row(message, token, at, recv_idx, recv_weights)
        count = [] if args.num_worst_tokens else self.reported(counts, self.rank)
        handle = EpHandle(
            self.identity,
            len(x),
            rows,
            idx.shape[1],
            args.expand,
            args.expert_alignment,
            args.num_worst_tokens,
            tuple(count),
            dropped[self.rank],
            self.kept_idx(idx),
            self.kept_routes(args, routes),
            self.sources(self, routes, rows),
        )
        recv_x = recv_x.view(x.dtype)
        return EpDispatched(recv_x, recv_scales, recv_idx, recv_weights, handle, lambda: None)

    def arranged(self, source: list[Source]) -> list[Source]:
        return source

    def kept_idx(self, idx: Tensor) -> Tensor:
        return idx.clone()

    def reported(self, counts: list[list[int]], rank: int) -> list[int]:
        return counts[rank]

    def kept_routes(self, args: Any, routes: Routes) -> Routes:
        return routes

    def copied(self, message: Any, token: int) -> Tensor:
        return message["x"][token]

    def scale_row(self, scales: Tensor, token: int) -> Tensor:
        return scales[token]

    def localised(self, expert: int) -> int:
        """The local id of an expert, -1 if it lives elsewhere."""
        return expert % self.local if expert >= 0 and expert // self.local == self.rank else -1

    def rank_row(self, message: Any, token: int, at: int, idx: Tensor, weights: Tensor | None) -> None:
        for slot, expert in enumerate(message["idx"][token].tolist()):
            local = self.localised(expert)
            idx[at, slot] = local
            if weights is not None and local >= 0:
                weights[at, slot] = message["weights"][token, slot]

    def expanded_row(self, message: Any, token: int, local: int, at: int, idx: Tensor, weights: Tensor | None) -> None:
        idx[at] = local
        for slot, expert in enumerate(message["idx"][token].tolist()):
            if weights is not None and expert == self.rank * self.local + local:
                weights[at] += message["weights"][token, slot]

    def combine(self, args: Any) -> EpCombined:
        handle, routes = args.handle, args.handle.state
        fields = {"topk_weights": args.topk_weights is not None, "handle": routes.operation}
        operation = self.begin("combine", fields, {"x": args.x.contiguous(), "weights": args.topk_weights})
        out = args.x.new_empty(handle.num_tokens, self.args.hidden)
        weights = None
        if args.topk_weights is not None:
            weights = torch.zeros(handle.num_tokens, handle.topk, dtype=torch.float32, device="cpu")

        def finish() -> None:
            messages = self.hear(operation, "combine")
            self.summing = routes.idx[self.rank]
            for token in range(handle.num_tokens):
                terms = self.terms(routes, messages, token, handle)
                self.summed(out, token, self.start(args.bias, token, out), self.ordered(terms))
                if weights is not None:
                    self.summed_weights(weights[token], terms, messages, routes, token, handle)

        return EpCombined(out, weights, finish)

    def terms(self, routes: Routes, messages: list[Any], token: int, handle: Any) -> list[tuple[int, int, Tensor]]:
        """Rank, row there, and the row, of everything a token's sum takes, in top-k order."""
        idx = routes.idx[self.rank]
        assert idx is not None
        if handle.expand:
            wanted = [divmod(e, self.local) for e in self.experts(idx[token])]
        else:
            wanted = [(home, 0) for home in self.homes(idx[token])]
        found = []
        for home, local in wanted:
            row = routes.rows(home).get(((self.rank, token), local if handle.expand else 0))
            if row is not None and messages[home] is not None:
                found.append((home, row, messages[home]["x"][row]))
        return found

    def ordered(self, terms: list[tuple[int, int, Tensor]]) -> list[tuple[int, int, Tensor]]:
        return terms

    def start(self, bias: Sequence[Tensor], token: int, out: Tensor) -> Tensor:
        total = self.nothing()
        for one in bias:
            total = total + one[token].float()
        return total

    def nothing(self) -> Tensor:
        """What a sum begins with."""
        return torch.zeros(self.args.hidden, dtype=torch.float32, device="cpu")

    def summed(self, out: Tensor, token: int, total: Tensor, terms: list[tuple[int, int, Tensor]]) -> None:
        if self.args.pre_reduce and self.args.num_nodes > 1:
            for node in self.nodes([home // self.args.ranks_per_node for home in self.homes(self.summing[token])]):
                part = torch.zeros_like(total)
                for home, _, row in terms:
                    if home // self.args.ranks_per_node == node:
                        part = part + row.float()
                total = total + part
        else:
            for _, _, row in terms:
                total = self.plus(total, row.float(), out.dtype)
        out[token] = self.stored(total, out.dtype)

    def nodes(self, nodes: list[int]) -> list[int]:
        return list(dict.fromkeys(nodes))

    def plus(self, total: Tensor, row: Tensor, dtype: torch.dtype) -> Tensor:
        return total + row

    def stored(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        return total.to(dtype)

    def summed_weights(
        self, into: Tensor, terms: Any, messages: list[Any], routes: Routes, token: int, handle: Any
    ) -> None:
        idx = routes.idx[self.rank]
        assert idx is not None
        for home, row, _ in terms:
            back = messages[home]["weights"][row]
            if not handle.expand:
                into += back
                continue
            for slot, expert in enumerate(idx[token].tolist()):
                if expert == home * self.local + routes.local[home][row]:
                    into[slot] = back

    # The low-latency mode.

    def low_latency_dispatch(self, args: Any) -> EpLowLatencyDispatched:
        self.in_range(args.topk_idx)
        self.live = [one for one in self.live if one() is not None and not one().done]  # type: ignore[union-attr]
        if len(self.live) >= self.most_live():
            error = SpecError("low_latency_dispatch", "a third live result", "two: combine or let go of one first")
            raise self.refuse("low_latency_dispatch", error)
        rows, scales = self.cast(args.x, args.cast)
        fields = {"topk_idx": args.topk_idx.shape[1], "use_fp8": args.cast}
        content = {"x": plain(rows), "scales": scales, "idx": args.topk_idx}
        operation = self.begin("low_latency_dispatch", fields, content)
        slots = self.ranks * self.args.max_tokens_per_rank
        recv_x = plain(rows).new_zeros(self.local, slots, self.args.hidden)
        recv_scales = None
        if scales is not None:
            recv_scales = scales.new_zeros(self.local, scales.shape[1], slots).transpose(1, 2)
        count = torch.zeros(self.local, dtype=torch.int32, device="cpu")
        info = torch.full((self.local, slots), -1, dtype=torch.int32, device="cpu")
        ranges = torch.zeros(self.local, self.ranks, dtype=torch.int64, device="cpu")
        state = Packed(operation)
        self.live.append(weakref.ref(state))
        a = self.args
        geometry = (a.max_tokens_per_rank, a.hidden, a.num_experts, len(args.x), args.topk_idx.shape[1])
        handle = EpLowLatencyHandle(self.identity, info, ranges, *geometry, state)
        stats, waits = args.cumulative_local_expert_recv_stats, args.dispatch_wait_recv_cost_stats

        def finish() -> None:
            messages = self.hear(operation, "low_latency_dispatch", waits)
            state.idx = [None if m is None else m["idx"] for m in messages]
            for local in range(self.local):
                at = 0
                for source in self.packing_order():
                    begin, message = at, messages[source]
                    for token in self.packed_tokens(message, self.rank * self.local + local):
                        if at < self.capacity(slots):
                            recv_x[local, at] = self.copied(message, token)
                            if recv_scales is not None:
                                recv_scales[local, at] = self.scale_row(message["scales"], token)
                            info[local, at] = token
                            at += 1
                    ranges[local, source] = begin << 32 | (at - begin)
                count[local] = at
            self.finished_counts(count)
            if stats is not None:
                self.counted(stats, count)

        return self.posted(args, EpLowLatencyDispatched(recv_x.view(rows.dtype), recv_scales, count, handle, finish))

    def packing_order(self) -> list[int]:
        return list(range(self.ranks))

    def most_live(self) -> int:
        return 2

    def capacity(self, slots: int) -> int:
        return slots

    def finished_counts(self, count: Tensor) -> None:
        pass

    def counted(self, stats: Tensor, count: Tensor) -> None:
        stats += count

    def posted(self, args: Any, result: Any) -> Any:
        """What a low-latency call returns before its finish."""
        return result

    def packed_tokens(self, message: Any, expert: int) -> list[int]:
        if message is None:
            return []
        return [t for t, row in enumerate(message["idx"]) if expert in self.experts(row)]

    def cast(self, x: Tensor, cast: str) -> tuple[Tensor, Tensor | None]:
        if cast == "none":
            return x.contiguous(), None
        n, hidden = x.shape
        groups = -(-hidden // 128)
        wide = torch.zeros(n, groups * 128, dtype=torch.float32, device="cpu")
        wide[:, :hidden] = x.float()
        tiles = wide.view(n, groups, 128)
        amax = self.amax(tiles)
        scale, inverse = amax * (torch.ones_like(amax) / 448.0), torch.full_like(amax, 448.0) / amax
        if cast != "fp8":
            exponent = self.exponent(scale)
            scale, inverse = torch.exp2(exponent), torch.exp2(-exponent)
        values = (tiles * inverse[..., None]).view(n, groups * 128)[:, :hidden].to(FP8)
        if cast != "fp8_ue8m0":
            return values, self.given_scale(scale)
        codes = torch.zeros(n, -(-groups // 4) * 4, dtype=torch.uint8, device="cpu")
        codes[:, :groups] = (torch.log2(scale) + 127).to(torch.uint8)
        return values, self.bytes_in_order(codes).view(torch.int32)

    def amax(self, tiles: Tensor) -> Tensor:
        return tiles.abs().amax(2).clamp(min=1e-4)

    def exponent(self, scale: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(scale)
        return (exponent - (mantissa == 0.5).int()).float()

    def given_scale(self, scale: Tensor) -> Tensor:
        return scale

    def bytes_in_order(self, codes: Tensor) -> Tensor:
        return codes

    def low_latency_combine(self, args: Any) -> EpLowLatencyCombined:
        handle, state = args.handle, args.handle.state
        if args.zero_copy and (state.lent is None or state.lent.data_ptr() != args.x.data_ptr()):
            error = SpecError("x", "other memory", "the tensor low_latency_combine_buffer returned")
            raise self.refuse("low_latency_combine", error)
        if args.zero_copy:
            state.lent = None
        self.in_range(args.topk_idx)
        content = {"x": self.staged(args), "ranges": handle.layout_range, "info": handle.src_info}
        operation = self.begin("low_latency_combine", {"handle": state.operation}, content)
        state.done = True

        def finish() -> None:
            messages = self.hear(operation, "low_latency_combine", args.combine_wait_recv_cost_stats)
            for token, row in enumerate(args.topk_idx):
                total = self.nothing()
                for slot, weighted in self.weighted_terms(args, messages, token, row):
                    total = self.plus(
                        total, self.times(weighted.float(), args.topk_weights[token, slot]), args.out.dtype
                    )
                args.out[token] = self.stored(total, args.out.dtype)

        return self.posted(args, EpLowLatencyCombined(self.target(args), finish))

    def target(self, args: Any) -> Tensor:
        return args.out

    def staged(self, args: Any) -> Tensor:
        return args.x

    def times(self, row: Tensor, weight: Tensor) -> Tensor:
        return row * weight

    def weighted_terms(self, args: Any, messages: list[Any], token: int, row: Tensor) -> list[tuple[int, Tensor]]:
        """Slot and row of everything a token's weighted sum takes."""
        found = []
        for slot, expert in enumerate(row.tolist()):
            home, local = divmod(expert, self.local)
            if expert < 0 or messages[home] is None:
                continue
            begin, count = divmod(int(messages[home]["ranges"][local, self.rank]), 1 << 32)
            tokens = messages[home]["info"][local, begin : begin + count].tolist()
            if token in tokens:
                found.append((slot, messages[home]["x"][local, begin + tokens.index(token)]))
        return self.ordered_slots(found)

    def ordered_slots(self, terms: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
        return terms

    def low_latency_combine_buffer(self, handle: EpLowLatencyHandle) -> Tensor:
        state: Packed = handle.state  # type: ignore[assignment]
        if state.lent is None:
            slots = self.ranks * self.args.max_tokens_per_rank
            state.lent = torch.zeros(self.local, slots, self.args.hidden, dtype=self.args.dtype, device="cpu")
        return state.lent

    # The rest.

    def layout(self, topk_idx: Tensor) -> EpLayout:
        in_rank = torch.zeros(len(topk_idx), self.ranks, dtype=torch.bool, device="cpu")
        per_expert = torch.zeros(self.args.num_experts, dtype=torch.int32, device="cpu")
        for token, row in enumerate(topk_idx):
            in_rank[token, self.homes(row)] = True
            for expert in self.experts(row):
                per_expert[expert] += 1
        per_node = None
        if self.args.num_nodes > 1:
            parts = torch.split(in_rank, self.args.ranks_per_node, 1)
            per_node = torch.stack([part.any(1).sum(dtype=torch.int32) for part in parts])
        return EpLayout(in_rank.sum(0, dtype=torch.int32), per_node, per_expert, in_rank)

    def set_mask(self, rank: int, masked: bool) -> None:
        self.mask[rank] = masked

    def masked(self) -> Sequence[bool]:
        return list(self.mask)

    def records(self) -> Sequence[Mapping[str, object]]:
        return self.log

    def memory(self) -> Mapping[str, int]:
        return {"in_use": 0}

    def close(self) -> None:
        if self.broken is None:
            self.broken = RankFailure(self.rank, "close", "this rank closed its buffer")
        self.mail.close()


def plain(tensor: Tensor | None) -> Any:
    """FP8 as bytes, which pickle and copy like any other."""
    if tensor is None:
        return None
    return tensor.contiguous().view(torch.uint8) if tensor.dtype == FP8 else tensor.contiguous()


class EpSample(Backend):
    """Communicates and does nothing else."""

    spec_version = "1.0"
    priority = -11
    engine: Callable[[EpBufferArgs, Counter[str]], EpEngine] = Engine

    def __init__(self) -> None:
        self.launched: Counter[str] = Counter()

    def probe(self) -> Probe:
        return Probe(True, "moves rows through files", details={"driver": "files"})

    def capabilities(self) -> Capabilities:
        return Capabilities(("cpu",), None, None, self.declared())

    def declared(self) -> EpCapabilities:
        return communicates()

    def mla_plan(self, args: Any) -> object:
        raise UnsupportedError("ep-sample", "q", "a decode", "no MLA decode")

    def mla_decode(self, args: Any) -> None:
        raise UnsupportedError("ep-sample", "q", "a decode", "no MLA decode")

    def ep_buffer(self, args: EpBufferArgs) -> EpEngine:
        return type(self).engine(args, self.launched)

    def launches(self) -> Mapping[str, int]:
        return {f"files:{name}@cpu": count for name, count in self.launched.items()}


class Modest(EpSample):
    """Correct, and declares as little as an engine may."""

    def declared(self) -> EpCapabilities:
        return communicates(
            modes=("normal",),
            layouts=("rank",),
            dtypes=("bfloat16",),
            casts=("none",),
            overflow=("error",),
            ranks=only(2),
            nodes=only(1),
            topk=only(2),
            num_experts=only(6),
            row_bytes=only(512),
            recv_hook=False,
            async_finish=False,
            cached_handle=False,
            mask_ranks=False,
            zero_copy_combine=False,
            pre_reduce=False,
            across_nodes=(),
        )


class LowLatencyOnly(EpSample):
    """Correct, and declares the low-latency mode alone."""

    def declared(self) -> EpCapabilities:
        return communicates(
            modes=("low_latency",),
            layouts=("rank",),
            dtypes=("bfloat16",),
            overflow=("error",),
            async_finish=False,
            cached_handle=False,
            pre_reduce=False,
            across_nodes=("low_latency", "error", "mask_ranks"),
        )


plugin = Plugin(EpSample)
low_latency_only = Plugin(LowLatencyOnly)
modest = Plugin(Modest)
