"""Mutants of sizes: right for the values every test suite has in its lists, wrong for others, or for two together."""

from __future__ import annotations

import math
from typing import Any

import torch

from mutants.registry import mutant
from mutants.sample import Sample

USUAL = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 24, 32, 33, 48, 63, 64, 65, 96, 112, 126, 128)


def spoil(out: Any) -> Any:
    """The first row of each query, as a tile that was never computed leaves it."""
    return torch.cat([torch.zeros_like(out[:, :1]), out[:, 1:]], 1)


class Spoils(Sample):
    """Wrong for the calls that a subclass names."""

    def concerns(self, args: Any) -> bool:
        raise NotImplementedError

    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        super().store(args, j, start, stop, spoil(out) if self.concerns(args) else out, lse)


@mutant("L1", "one instantiation is missing: 40 heads fall into the kernel for 32", only="MLA-12")
class FortyHeads(Spoils):
    def concerns(self, args: Any) -> bool:
        return args.h_q == 40


@mutant("L1", "instantiated for the head counts of the published tests; others take an untested path")
class UnusualHeads(Spoils):
    def concerns(self, args: Any) -> bool:
        return args.h_q not in USUAL


@mutant("L1", "odd page sizes above 7 divide by a shift")
class OddPages(Spoils):
    def concerns(self, args: Any) -> bool:
        return args.page_size > 7 and args.page_size % 2 == 1


@mutant("L1", "one page size is mistyped in the dispatch: 144", only="MLA-06")
class OnePageSize(Spoils):
    def concerns(self, args: Any) -> bool:
        return args.page_size == 144


@mutant("L1", "five and more KV heads share a buffer for four")
class FiveKvHeads(Spoils):
    def concerns(self, args: Any) -> bool:
        return args.h_kv > 4 and args.h_kv % 8 != 0


@mutant("L1", "rows of more than 65 columns lose those past the last multiple of 8")
class ColumnTailLost(Sample):
    def scores(self, args: Any, q: Any, keys: Any) -> Any:
        whole = args.head_dim // 8 * 8 if args.head_dim > 65 else args.head_dim
        return super().scores(args, q[..., :whole], keys[:, :whole])


@mutant("L1", "the schedule has room for 64 sequences: those past them are never computed")
class SixtyFourSequences(Sample):
    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        super().store(args, j, start, stop, out if j < 64 else torch.zeros_like(out), lse)


@mutant("L1", "the causal mask has eight rows: later queries of a long draft take the last one")
class EightCausalQueries(Sample):
    def seen(self, args: Any, s_q: int, length: int) -> Any:
        seen = super().seen(args, s_q, length)
        return seen.clamp(max=int(seen[7])) if args.causal and s_q > 8 else seen


@mutant("L1", "a length that is a whole number of 512-token chunks loses its last one")
class WholeChunksLost(Sample):
    def splits(self, args: Any, j: int, length: int) -> Any:
        kept = length - 512 if length % 512 == 0 and length > 512 else length
        return [(a, min(z, kept)) for a, z in super().splits(args, j, length) if a < kept]


@mutant("L2", "wrong numbers for the largest head count it was ever declared with", "")
class TwoHundredFiftySixHeads(Spoils):
    def concerns(self, args: Any) -> bool:
        return args.h_q == 256


class Wraps(Sample):
    """Offsets of elements are kept in a type that is too short."""

    def offset(self, start: int) -> int:
        raise NotImplementedError

    def gather(self, args: Any, j: int, length: int) -> Any:
        kv, pages = args.kv_cache, self.pages(args, j, length)
        starts = [self.offset(page * kv.stride(0)) // max(kv.stride(0), 1) for page in pages.tolist()]
        # What lies before the cache: here, its unused first page.
        wrapped = torch.tensor([start if 0 <= start < args.num_blocks else 0 for start in starts], dtype=torch.long)
        return kv[wrapped].flatten(0, 1)[:length].float()


@mutant("L2", "offsets of elements are 32-bit integers")
class SignedOffsets(Wraps):
    def offset(self, start: int) -> int:
        return (start + 2**31) % 2**32 - 2**31


@mutant("L2", "offsets of elements are unsigned 32-bit integers")
class UnsignedOffsets(Wraps):
    def offset(self, start: int) -> int:
        return start % 2**32


def rounded_down(view: Any) -> Any:
    """The same view from the last address before it that is a multiple of 16 bytes."""
    off = view.data_ptr() % 16 // view.element_size()
    return view.as_strided(view.shape, view.stride(), view.storage_offset() - off)


@mutant("L2", "q is loaded in 16-byte vectors from wherever it begins")
class UnalignedQueries(Sample):
    def queries(self, args: Any, j: int, start: int, stop: int) -> Any:
        q = rounded_down(args.q)
        return (q[j] if args.cu_seqlens_q is None else q[start:stop]).float()


@mutant("L2", "the cache is loaded in 16-byte vectors from wherever it begins")
class UnalignedCache(Sample):
    def gather(self, args: Any, j: int, length: int) -> Any:
        return rounded_down(args.kv_cache)[self.pages(args, j, length)].flatten(0, 1)[:length].float()


@mutant("L2", "out is stored in 16-byte vectors to wherever it begins")
class UnalignedOut(Sample):
    def mla_decode(self, args: Any) -> None:
        given, args.out = args.out, rounded_down(args.out)
        super().mla_decode(args)
        args.out = given


@mutant("L2", "lengths are loaded four at a time from wherever they begin")
class UnalignedLengths(Sample):
    def length(self, args: Any, j: int) -> int:
        return min(int(rounded_down(args.cache_seqlens)[j]), super().length(args, j))

    def splits(self, args: Any, j: int, length: int) -> Any:
        return self.bounds(length)


@mutant("L2", "pages of one token together with three KV heads: the stride of a head is that of a page", only="MLA-46")
class ThreeKvHeadsOnTinyPages(Spoils):
    def concerns(self, args: Any) -> bool:
        return args.h_kv == 3 and args.page_size == 1


@mutant("L2", "the plan of a batch above 64 is cut into two, of which one is used", only="MLA-46")
class LargePlans(Spoils):
    def concerns(self, args: Any) -> bool:
        return args.schedule is not None and args.batch > 64


@mutant("L2", "float32 caches with heads before tokens take the strides of the other layout", only="MLA-46")
class HeadsFirstInFloat32(Spoils):
    def concerns(self, args: Any) -> bool:
        token, head = args.kv_cache.stride()[1:3]
        return args.q.dtype == torch.float32 and head > token


@mutant("L2", "ragged rows and causal: a sequence of fewer keys than queries begins at the wrong row")
class RaggedFewerKeys(Sample):
    def seen(self, args: Any, s_q: int, length: int) -> Any:
        seen = super().seen(args, s_q, length)
        return seen.roll(1) if args.causal and args.cu_seqlens_q is not None and length < s_q else seen


@mutant("L1", "the accumulator is halved so that it fits, and never doubled again", "out is 0.5 times the reference")
class OutHalved(Sample):
    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        super().store(args, j, start, stop, out / 2, lse)


@mutant("L1", "V keeps the scale of FP8 caches", "times the reference (1/448")
class OutScaledForFloat8(Sample):
    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        super().store(args, j, start, stop, out / 448, lse)


@mutant("L1", "the sum is taken of weights that were multiplied by 448", "lse is the reference plus 6.10479 (ln 448)")
class LseShifted(Sample):
    def logarithm(self, args: Any, top: Any, total: Any) -> Any:
        return super().logarithm(args, top, total) + math.log(448)


@mutant("L2", "ragged rows miss a factor of the scale: out is multiplied by it", "(sqrt(head_dim))|(1/sqrt(head_dim))")
class RaggedOutScaled(Sample):
    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        wrong = out * args.head_dim**0.5 if args.cu_seqlens_q is not None else out
        super().store(args, j, start, stop, wrong, lse)


@mutant("L2", "ragged rows count every weight twice in lse", "lse is the reference plus 0.693147 (ln 2)")
class RaggedLseShifted(Sample):
    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        super().store(args, j, start, stop, out, lse + math.log(2) if args.cu_seqlens_q is not None else lse)
