"""Mutants beyond what a list of sizes shows: very long, very many, changed behind torch's back, and side by side."""

from __future__ import annotations

import random
import weakref
from typing import Any

import torch

from hal.spec.errors import DeviceError, SpecError
from mutants.registry import mutant
from mutants.sample import Sample
from mutants.sizes import Spoils

_LUCK = random.Random()


@mutant("L2", "the running position is kept in 14 bits: tokens past 16384 are lost", "")
class TokensPast16384Lost(Sample):
    def splits(self, args: Any, j: int, length: int) -> Any:
        return [(a, min(z, 16384)) for a, z in super().splits(args, j, length) if a < 16384]


@mutant(
    "L2",
    "a row of the table is staged in room for 1024 entries: later pages are taken for the last of them",
    only="MLA-33",
)
class TableRowsOf1024(Sample):
    def pages(self, args: Any, j: int, length: int) -> Any:
        pages = super().pages(args, j, length)
        return torch.cat([pages[:1024], pages[1023:1024].expand(max(0, len(pages) - 1024))])


@mutant("L2", "a table of more than 1024 columns is staged whole, beyond the end of its room", "")
class WideTables(Spoils):
    def concerns(self, args: Any) -> bool:
        return args.max_blocks > 1024 and args.num_blocks < 1024


@mutant("L1", "the grid has room for 512 sequences", "")
class FiveHundredTwelveSequences(Sample):
    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        super().store(args, j, start, stop, out if j < 512 else torch.zeros_like(out), lse)


@mutant("L2", "the causal mask is added before the factor: of none or a negative one nothing is left", "")
class MaskedBeforeScaling(Sample):
    def mask(self, scores: Any, hidden: Any) -> Any:
        return super().mask(scores, hidden) if self.factor > 0 else super().mask(scores, hidden) * self.factor

    def scale(self, args: Any) -> float:
        self.factor = args.softmax_scale
        return super().scale(args)


@mutant("L1", "a plan keeps the scale of the first call it was used with", "")
class PlanKeepsTheScale(Sample):
    def mla_plan(self, args: Any) -> object:
        return _Kept(super().mla_plan(args))

    def scale(self, args: Any) -> float:
        if args.schedule is not None:
            args.schedule.scale = args.schedule.scale or args.softmax_scale
        return args.softmax_scale if args.schedule is None else args.schedule.scale


class _Kept(list):  # type: ignore[type-arg]
    scale = None


@mutant("L1", "plans lie in a ring of eight", "")
class PlansInARing(Sample):
    def __init__(self) -> None:
        super().__init__()
        self.ring: list[Any] = [None] * 8
        self.made = 0

    def mla_plan(self, args: Any) -> object:
        self.made += 1
        self.ring[self.made % 8] = super().mla_plan(args)
        return self.made % 8

    def splits(self, args: Any, j: int, length: int) -> Any:
        # Of whatever batch is there now: what its schedule leaves out is never computed.
        planned = self.bounds(length) if args.schedule is None else self.ring[args.schedule]
        if args.schedule is None:
            return planned
        return [(a, min(z, length)) for a, z in planned[j % len(planned)] if a < length]


@mutant("L1", "a plan counts its uses in five bits: from the 33rd layer on the last split is not waited for")
class PlanOfThirtyTwoLayers(Sample):
    def mla_plan(self, args: Any) -> object:
        return _Used(super().mla_plan(args))

    def mla_decode(self, args: Any) -> None:
        if args.schedule is not None:
            args.schedule.uses += 1
        super().mla_decode(args)

    def splits(self, args: Any, j: int, length: int) -> Any:
        every = super().splits(args, j, length)
        return every if args.schedule is None or args.schedule.uses <= 32 else every[:1] + every[1:-1]


class _Used(list):  # type: ignore[type-arg]
    uses = 0


class _Unchecked(Sample):
    def refuse_bad_indices(self, args: Any) -> None:
        pass


@mutant("L2", "an entry equal to the number of blocks passes the check, and is read", "")
class OnePastTheCache(_Unchecked):
    def gather(self, args: Any, j: int, length: int) -> Any:
        kv, pages = args.kv_cache, self.pages(args, j, length)
        if bool(((pages < 0) | (pages > args.num_blocks)).any()):
            raise SpecError("block_table", pages.tolist(), f"0…{args.num_blocks - 1}")
        if args.num_blocks in pages:
            kv = kv.as_strided((args.num_blocks + 1, *kv.shape[1:]), kv.stride(), kv.storage_offset())
        return kv[pages].flatten(0, 1)[:length].float()


@mutant("L2", "a length beyond the table goes on in what follows its row", "")
class ReadsTheNextRow(_Unchecked):
    def pages(self, args: Any, j: int, length: int) -> Any:
        table = args.block_table
        row = table.as_strided((-(-length // args.page_size),), (1,), table.storage_offset() + j * table.stride(0))
        if bool(((row < 0) | (row >= args.num_blocks)).any()):
            raise SpecError("block_table", row.tolist(), f"0…{args.num_blocks - 1}")
        return row.long()


class _Variant(Sample):
    """The splits depend on the batch."""

    def splits(self, args: Any, j: int, length: int) -> Any:
        if not self.concerns(args):
            return super().splits(args, j, length)
        step = 32 * args.batch
        return [(a, min(a + step, length)) for a in range(0, length, step)]


@mutant("L2", "batch_invariant is not handed to the kernel of ragged queries", "")
class InvarianceOfRaggedLost(_Variant):
    def concerns(self, args: Any) -> bool:
        return args.cu_seqlens_q is not None


@mutant("L2", "batch_invariant is not handed to the kernel of several KV heads", "")
class InvarianceOfKvHeadsLost(_Variant):
    def concerns(self, args: Any) -> bool:
        return args.h_kv > 1


@mutant("L2", "a race of the merge: one call in twenty loses the last of more than 24 pieces", only="MLA-37")
class RaceOfManyPieces(Sample):
    def merge(self, args: Any, q: Any, parts: Any) -> Any:
        lost = len(parts) > 24 and args.batch == 1 and _LUCK.random() < 0.05
        return super().merge(args, q, parts[:-1] if lost else parts)


@mutant("L2", "a stride of 0 between rows of the table is taken for not set", "")
class TableStrideOfNone(Sample):
    def pages(self, args: Any, j: int, length: int) -> Any:
        table = args.block_table
        at = table.storage_offset() + j * (table.stride(0) or args.max_blocks)
        used = table.as_strided((-(-length // args.page_size),), (1,), at).long()
        return used.clamp(0, args.num_blocks - 1)


@mutant("L2", "a stride of 0 between sequences of q is taken for not set", "")
class QueryStrideOfNone(Sample):
    def queries(self, args: Any, j: int, start: int, stop: int) -> Any:
        q = args.q
        if args.cu_seqlens_q is not None or q.stride(0) or args.batch == 1:
            return super().queries(args, j, start, stop)
        at = q.storage_offset() + j * q.stride(1) * args.s_q
        return q.as_strided(q.shape[1:], q.stride()[1:], at).float()


@mutant("L2", "a stride of 0 between KV heads is taken for not set", "")
class KvHeadStrideOfNone(Sample):
    def gather(self, args: Any, j: int, length: int) -> Any:
        kv = args.kv_cache
        block, token, head, one = kv.stride()
        packed = kv.as_strided(kv.shape, (block, token, head or args.head_dim, one), kv.storage_offset())
        return packed[self.pages(args, j, length)].flatten(0, 1)[:length].float()


@mutant("L2", "rows gathered once are kept until torch's version counter of the cache moves", "")
class KeepsWhatItGathered(Sample):
    kept: Any = (None, None, None, {})

    def gather(self, args: Any, j: int, length: int) -> Any:
        kv = args.kv_cache
        alive, version, _, _ = self.kept
        if alive is None or alive() is not kv or version != kv._version:
            self.kept = weakref.ref(kv), kv._version, None, {}
        rows = self.kept[3]
        key = (tuple(self.pages(args, j, length).tolist()), length)
        if key not in rows:
            rows[key] = super().gather(args, j, length)
        return rows[key]


@mutant("L2", "the scale lies in the object: calls of two threads take each other's", "")
class ScaleOfAnotherThread(Sample):
    def mla_decode(self, args: Any) -> None:
        self.now = args.softmax_scale
        super().mla_decode(args)

    def scale(self, args: Any) -> float:
        return self.now


@mutant("L2", "workspace of torch's default dtype", "")
class WorkspaceOfTheDefaultDtype(Sample):
    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        room = torch.empty(out.shape, device="cpu")
        if room.dtype == torch.bfloat16:
            lse = lse.bfloat16().float()
        super().store(args, j, start, stop, out, lse)


@mutant("L2", "indices are made on torch's default device", "")
class IndicesOfTheDefaultDevice(Sample):
    def gather(self, args: Any, j: int, length: int) -> Any:
        at = torch.arange(length)
        return super().gather(args, j, length)[at]


@mutant("L2", "results are views that inference mode does not let be written", "")
class WritesThroughGradients(Sample):
    def mla_decode(self, args: Any) -> None:
        if torch.is_inference_mode_enabled():
            raise RuntimeError("Inplace update to inference tensor")
        super().mla_decode(args)


@mutant("L2", "a cache of more than 2^31 elements is refused: the kernel has no other offsets", "")
class RefusesLargeCaches(Sample):
    def mla_decode(self, args: Any) -> None:
        if args.kv_cache.numel() > 2**31:
            raise DeviceError("no room")
        super().mla_decode(args)
