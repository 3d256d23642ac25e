"""A small correct backend in torch, shaped like a kernel: gather pages, attend split by split, merge, store.

Every stage is a method, so that a planted bug is one override. It is also the sample of a vendor outside this project.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hal.backend import Backend, Probe
from hal.plugins import hookimpl
from hal.spec.capability import Capabilities, Ints, MlaCapabilities
from hal.spec.errors import SpecError, UnsupportedError
from hal.spec.mla import MlaDecodeArgs
from hal.spec.plan import MlaPlanArgs

Part = tuple[Tensor, Tensor, Tensor]
"""Unnormalised out [s, h_q, d_v], running maximum [s, h_q], running sum [s, h_q]."""


ROOM: Any = {"dtype": torch.float32, "device": "cpu"}
"""Of what is computed: torch's defaults are the caller's."""


_ALONE = threading.Lock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's cut of a product over threads would show in its bits; the setting is the process's: calls take turns."""
    with _ALONE:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def dense(**changes: Any) -> MlaCapabilities:
    """Everything a dense backend can declare."""
    everything: dict[str, Any] = {
        "dtypes": ("bfloat16", "float16", "float32"),
        "kv_formats": ("plain",),
        "head_dim": Ints(1, 576),
        "head_dim_v": Ints(1, 576),
        "h_q": Ints(1),
        "h_kv": Ints(1),
        "s_q": Ints(1),
        "page_size": Ints(1, 256),
        "causal": True,
        "ragged_q": True,
        "batch_invariant": True,
        "lse_bases": ("e", "2"),
        "attn_sink": False,
        "extra_kv_cache": False,
        "topk": None,
    }
    return MlaCapabilities(**(everything | changes))


class Sample(Backend):
    """Correct. Tokens are attended in splits of ``split``, merged in order: bits do not depend on the batch."""

    spec_version = "1.0"
    priority = -10
    split = 128

    def __init__(self) -> None:
        self.decodes = 0

    def probe(self) -> Probe:
        return Probe(True, "computes with torch on the host", details={"driver": "torch"})

    def capabilities(self) -> Capabilities:
        return Capabilities(("cpu",), self.declared(), None, None)

    def declared(self) -> MlaCapabilities:
        return dense()

    def mla_plan(self, args: MlaPlanArgs) -> object:
        return [self.bounds(length) for length in args.cache_seqlens.tolist()]

    def ep_buffer(self, args: Any) -> Any:
        raise UnsupportedError("sample", "group", "a group", "no expert-parallel communication")

    def launches(self) -> Mapping[str, int]:
        return {"torch:attend@cpu": self.decodes}

    def mla_decode(self, args: MlaDecodeArgs) -> None:
        self.decodes += 1
        self.refuse_bad_indices(args)
        with one_thread():
            self.attend_all(args)

    def attend_all(self, args: MlaDecodeArgs) -> None:
        for j in range(args.batch):
            start, stop = self.rows(args, j)
            if start < stop:
                length = self.length(args, j)
                q = self.queries(args, j, start, stop)
                keys = self.gather(args, j, length)
                parts = [self.attend(args, q, keys, a, z, length) for a, z in self.splits(args, j, length)]
                out, lse = self.merge(args, q, parts)
                self.store(args, j, start, stop, out, lse)

    # The stages.

    def refuse_bad_indices(self, args: MlaDecodeArgs) -> None:
        for j, length in enumerate(args.cache_seqlens.tolist()):
            used = args.block_table[j, : -(-length // args.page_size)]
            if length < 0 or len(used) * args.page_size < length:
                raise SpecError("cache_seqlens", length, f"0…{args.max_blocks * args.page_size}")
            if bool(((used < 0) | (used >= args.num_blocks)).any()):
                raise SpecError("block_table", used.tolist(), f"0…{args.num_blocks - 1}")

    def rows(self, args: MlaDecodeArgs, j: int) -> tuple[int, int]:
        if args.cu_seqlens_q is None:
            return j * args.s_q, (j + 1) * args.s_q
        start, stop = args.cu_seqlens_q[j : j + 2].tolist()
        return start, stop

    def length(self, args: MlaDecodeArgs, j: int) -> int:
        return int(args.cache_seqlens[j])

    def queries(self, args: MlaDecodeArgs, j: int, start: int, stop: int) -> Tensor:
        return (args.q[j] if args.cu_seqlens_q is None else args.q[start:stop]).float()

    def pages(self, args: MlaDecodeArgs, j: int, length: int) -> Tensor:
        return args.block_table[j, : -(-length // args.page_size)].long()

    def gather(self, args: MlaDecodeArgs, j: int, length: int) -> Tensor:
        rows = args.kv_cache[self.pages(args, j, length)].flatten(0, 1)
        return rows[:length].float()

    def bounds(self, length: int) -> list[tuple[int, int]]:
        return [(a, min(a + self.split, length)) for a in range(0, length, self.split)]

    def splits(self, args: MlaDecodeArgs, j: int, length: int) -> list[tuple[int, int]]:
        return self.bounds(length) if args.schedule is None else args.schedule[j]

    def heads(self, args: MlaDecodeArgs, kv_head: int) -> Tensor:
        group = args.h_q // args.h_kv
        return torch.arange(kv_head * group, (kv_head + 1) * group, device="cpu")

    def scale(self, args: MlaDecodeArgs) -> float:
        return args.softmax_scale

    def scores(self, args: MlaDecodeArgs, q: Tensor, keys: Tensor) -> Tensor:
        return (q @ keys.T) * self.scale(args)

    def seen(self, args: MlaDecodeArgs, s_q: int, length: int) -> Tensor:
        """How many keys each query sees."""
        if not args.causal:
            return torch.full((s_q,), length, device="cpu")
        return (length - s_q + 1 + torch.arange(s_q, device="cpu")).clamp(0)

    def values(self, args: MlaDecodeArgs, keys: Tensor) -> Tensor:
        return keys[:, : args.head_dim_v]

    def attend(self, args: MlaDecodeArgs, q: Tensor, keys: Tensor, a: int, z: int, length: int) -> Part:
        s_q = q.shape[0]
        out = torch.zeros(s_q, args.h_q, args.head_dim_v, **ROOM)
        top = torch.full((s_q, args.h_q), -torch.inf, **ROOM)
        total = torch.zeros(s_q, args.h_q, **ROOM)
        hidden = torch.arange(a, z, device="cpu") >= self.seen(args, s_q, length)[:, None]
        for h in range(args.h_kv):
            heads = self.heads(args, h)
            scores = self.scores(args, q[:, heads], keys[a:z, h])
            scores = self.mask(scores, hidden[:, None])
            m, weights = self.weights(scores)
            top[:, heads] = m
            total[:, heads] = self.row_sum(weights)
            out[:, heads] = weights @ self.values(args, keys[a:z, h])
        return out, top, total

    def mask(self, scores: Tensor, hidden: Tensor) -> Tensor:
        return scores.masked_fill(hidden, -torch.inf)

    def weights(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The running maximum and the exponentials relative to it."""
        m = scores.amax(-1)
        return m, torch.exp(scores - m.masked_fill(m == -torch.inf, 0)[..., None])

    def row_sum(self, weights: Tensor) -> Tensor:
        return weights.sum(-1)

    def merge(self, args: MlaDecodeArgs, q: Tensor, parts: list[Part]) -> tuple[Tensor, Tensor]:
        out = torch.zeros(*q.shape[:2], args.head_dim_v, **ROOM)
        total = torch.zeros(q.shape[:2], **ROOM)
        top = torch.full(q.shape[:2], -torch.inf, **ROOM)
        for part_out, m, part_total in parts:
            highest = torch.maximum(top, m)
            base = highest.masked_fill(highest == -torch.inf, 0)
            old, new = torch.exp(top - base), torch.exp(m - base)
            out = out * old[..., None] + part_out * new[..., None]
            total, top = total * old + part_total * new, highest
        return self.finish(args, out, top, total)

    def finish(self, args: MlaDecodeArgs, out: Tensor, top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        nothing = total == 0
        out = torch.where(nothing[..., None], torch.zeros_like(out), out / total[..., None])
        lse = self.logarithm(args, top, total)
        return self.empty(out, lse, nothing)

    def logarithm(self, args: MlaDecodeArgs, top: Tensor, total: Tensor) -> Tensor:
        lse = top + torch.log(total)
        return lse / math.log(2) if args.lse_base == "2" else lse

    def empty(self, out: Tensor, lse: Tensor, nothing: Tensor) -> tuple[Tensor, Tensor]:
        return out, lse.masked_fill(nothing, torch.inf)

    def store(self, args: MlaDecodeArgs, j: int, start: int, stop: int, out: Tensor, lse: Tensor) -> None:
        if args.cu_seqlens_q is None:
            args.out[j] = out.to(args.out.dtype)
            args.lse[j] = lse.T
        else:
            args.out[start:stop] = out.to(args.out.dtype)
            args.lse[:, start:stop] = lse.T

    def mla_trace(self, args: MlaDecodeArgs) -> dict[str, Any]:
        """Partial results, for ``hal conform bisect``: the stages of every sequence, split by split."""
        stages = []
        for j in range(args.batch):
            start, stop = self.rows(args, j)
            length = self.length(args, j)
            q = self.queries(args, j, start, stop)
            keys = self.gather(args, j, length)
            for a, z in self.splits(args, j, length):
                hidden = torch.arange(a, z) >= self.seen(args, stop - start, length)[:, None]
                scores = torch.empty(stop - start, args.h_q, z - a)
                for h in range(args.h_kv):
                    heads = self.heads(args, h)
                    scores[:, heads] = self.mask(self.scores(args, q[:, heads], keys[a:z, h]), hidden[:, None])
                out, top, total = self.attend(args, q, keys, a, z, length)
                stages.append(
                    {
                        "sequence": j,
                        "start": a,
                        "stop": z,
                        "scores": scores,
                        "row_max": top,
                        "row_sum": total,
                        "partial_out": out / total[..., None],
                        "partial_lse": top + torch.log(total),
                    }
                )
        return {"stages": stages}


class Plugin:
    """What an entry point of a sample backend points to."""

    def __init__(self, make: type[Backend]) -> None:
        self.make = make

    @hookimpl
    def hal_backend(self) -> Backend:
        return self.make()


plugin = Plugin(Sample)
