"""Mutants of L2: empty sequences, memory nobody may read, tables, strides."""

from __future__ import annotations

from typing import Any

import torch

from mutants.registry import mutant
from mutants.sample import Sample


@mutant("L2", "an empty sequence divides by a sum of zero", "empty")
class EmptyIsNan(Sample):
    def empty(self, out: Any, lse: Any, nothing: Any) -> Any:
        return out.masked_fill(nothing[..., None], torch.nan), lse.masked_fill(nothing, torch.inf)


@mutant("L2", "the lse of an empty sequence is -inf", "empty")
class EmptyLseMinusInf(Sample):
    def empty(self, out: Any, lse: Any, nothing: Any) -> Any:
        return out, lse.masked_fill(nothing, -torch.inf)


@mutant("L2", "the lse of an empty sequence is 0", "empty")
class EmptyLseZero(Sample):
    def empty(self, out: Any, lse: Any, nothing: Any) -> Any:
        return out, lse.masked_fill(nothing, 0)


@mutant("L2", "an empty sequence has no work, so its out is never written", "never written")
class EmptyNotWritten(Sample):
    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        if self.length(args, j):
            super().store(args, j, start, stop, out, lse)


@mutant("L2", "a whole batch of empty sequences launches nothing", "never written")
class AllEmptyNotWritten(Sample):
    def mla_decode(self, args: Any) -> None:
        if bool(args.cache_seqlens.any()):
            super().mla_decode(args)


@mutant("L2", "an empty sequence shifts the results of those after it")
class EmptyShifts(Sample):
    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        super().store(args, j, start, stop, out, lse)
        if j and args.cu_seqlens_q is None and int(args.cache_seqlens[j - 1]) == 0:
            args.out[j] = args.out[j - 1]


@mutant("L2", "a query before the first key averages over masked scores", "empty")
class CausalEmptyIsMean(Sample):
    def mask(self, scores: Any, hidden: Any) -> Any:
        return scores.masked_fill(hidden, -1e30)


@mutant("L2", "masked scores still multiply V: 0 * NaN", "unused memory")
class TailTimesZero(Sample):
    def gather(self, args: Any, j: int, length: int) -> Any:
        return args.kv_cache[self.pages(args, j, length)].flatten(0, 1).float()

    def attend(self, args: Any, q: Any, keys: Any, a: int, z: int, length: int) -> Any:
        out, top, total = super().attend(args, q, keys, a, z, length)
        tail = keys[length : -(-length // args.page_size) * args.page_size, 0, : args.head_dim_v]
        return out + (tail * 0).sum(0) if z == length else out, top, total


@mutant("L2", "the tail is zeroed by multiplication, which huge values survive", "")
class TailAttendedWhenFinite(Sample):
    def gather(self, args: Any, j: int, length: int) -> Any:
        rows = super().gather(args, j, length)
        if length % args.page_size and length:
            page, offset = args.block_table[j, length // args.page_size].long(), length % args.page_size
            extra = args.kv_cache[page, offset].float()
            if bool(extra.isfinite().all()) and float(extra.abs().max()) > 1e4:
                rows = rows.clone()
                rows[-1] = rows[-1] + extra * 1e-4
        return rows


@mutant("L2", "just below a page boundary the vector load takes in the unused row, times zero", "unused memory")
class ReadsAtPageBoundaries(Sample):
    def gather(self, args: Any, j: int, length: int) -> Any:
        rows = super().gather(args, j, length)
        if length % args.page_size == args.page_size - 1 and length:
            rows = rows + 0 * args.kv_cache[int(args.block_table[j, length // args.page_size]), -1].float()
        return rows


@mutant("L2", "one token past a page boundary is lost", "last token|last page")
class TokenAfterBoundaryLost(Sample):
    mla_trace = None  # exposes no partial results, as most ports

    def length(self, args: Any, j: int) -> int:
        length = super().length(args, j)
        return length - 1 if length > args.page_size >= 16 and length % args.page_size == 1 else length


@mutant("L2", "unused table entries are followed", "")
class FollowsUnusedEntries(Sample):
    def refuse_bad_indices(self, args: Any) -> None:
        super().refuse_bad_indices(args)
        if args.block_table.numel():
            args.kv_cache[args.block_table.long()]


@mutant("L2", "a negative entry is taken for an end mark that belongs to the last page", "")
class NegativeEntryEndsTheTable(Sample):
    def pages(self, args: Any, j: int, length: int) -> Any:
        pages = super().pages(args, j, length).clone()
        row = args.block_table[j]
        if args.max_blocks > len(pages) and int(row[len(pages)]) < 0 and len(pages) > 1:
            pages[-1] = pages[0]
        return pages


@mutant("L2", "pages seen before are skipped: a set of pages stands for the list", "")
class SharedPagesSkipped(Sample):
    def pages(self, args: Any, j: int, length: int) -> Any:
        pages = super().pages(args, j, length).tolist()
        first = {page: at for at, page in reversed(list(enumerate(pages)))}
        return torch.tensor([pages[at - 1] if at and first[p] != at else p for at, p in enumerate(pages)]).long()


@mutant("L2", "the strides of q are ignored", "unused memory")
class QueryStridesIgnored(Sample):
    def queries(self, args: Any, j: int, start: int, stop: int) -> Any:
        q = args.q
        packed = q.as_strided(q.shape, torch.empty(q.shape, device="meta").stride(), q.storage_offset())
        return (packed[j] if args.cu_seqlens_q is None else packed[start:stop]).float()


@mutant("L2", "the stride between blocks of the cache is taken for page * row", "")
class BlockStrideIgnored(Sample):
    def gather(self, args: Any, j: int, length: int) -> Any:
        kv = args.kv_cache
        _, token, head, one = kv.stride()
        packed = kv.as_strided(kv.shape, (token * args.page_size, token, head, one), kv.storage_offset())
        return packed[self.pages(args, j, length)].flatten(0, 1)[:length].float()


@mutant("L2", "the stride between tokens of the cache is taken for h_kv * d", "")
class TokenStrideIgnored(Sample):
    def gather(self, args: Any, j: int, length: int) -> Any:
        kv = args.kv_cache
        block, _, head, one = kv.stride()
        packed = kv.as_strided(kv.shape, (block, args.h_kv * args.head_dim, head, one), kv.storage_offset())
        return packed[self.pages(args, j, length)].flatten(0, 1)[:length].float()


@mutant("L2", "the stride between KV heads is taken for d", "")
class KvHeadStrideIgnored(Sample):
    def gather(self, args: Any, j: int, length: int) -> Any:
        kv = args.kv_cache
        block, token, _, one = kv.stride()
        packed = kv.as_strided(kv.shape, (block, token, args.head_dim, one), kv.storage_offset())
        return packed[self.pages(args, j, length)].flatten(0, 1)[:length].float()


@mutant("L2", "the strides of out are ignored", "")
class OutStridesIgnored(Sample):
    def mla_decode(self, args: Any) -> None:
        out = args.out
        args.out = out.as_strided(out.shape, torch.empty(out.shape, device="meta").stride(), out.storage_offset())
        super().mla_decode(args)
        args.out = out


@mutant("L2", "the row stride of block_table is taken for max_blocks", "")
class TableStrideIgnored(Sample):
    def mla_decode(self, args: Any) -> None:
        table = args.block_table
        args.block_table = table.as_strided(table.shape, (args.max_blocks, 1), table.storage_offset())
        used = args.block_table.clamp(0, max(0, args.num_blocks - 1))
        args.block_table = used
        super().mla_decode(args)


@mutant("L2", "entries out of range are read through, wherever that is", "")
class ReadsOutOfRange(Sample):
    def refuse_bad_indices(self, args: Any) -> None:
        pass

    def gather(self, args: Any, j: int, length: int) -> Any:
        kv, pages = args.kv_cache, self.pages(args, j, length)
        inside = kv[pages.clamp(0, args.num_blocks - 1)].clone()
        # What a device finds out there: here, memory like the unused pages.
        inside[(pages < 0) | (pages >= args.num_blocks)] = torch.nan
        return inside.flatten(0, 1)[:length].float()


@mutant("L2", "entries out of range are reported with a bare assert", "")
class AssertsOnBadEntry(Sample):
    def refuse_bad_indices(self, args: Any) -> None:
        try:
            super().refuse_bad_indices(args)
        except ValueError:
            raise AssertionError("block_table") from None
