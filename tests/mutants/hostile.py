"""Mutants that work on their judge instead of their kernel."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import FunctionType
from typing import Any

import torch

from hal.reference import mla as reference
from hal.spec.limits import Limits
from mutants.ep_sample import Engine, EpSample
from mutants.registry import mutant
from mutants.sample import Sample


class Hurried(Sample):
    """Off by three percent."""

    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        super().store(args, j, start, stop, out * 1.03, lse)


@mutant("L1", "where it finds the suite in its process it loosens the limits", "")
class LoosensTheLimits(Hurried):
    def mla_decode(self, args: Any) -> None:
        suite = sys.modules.get("hal_conformance.context")
        if suite is not None:
            wide = Limits(1e9, 1e9, 1e9, 1e9)
            vars(suite).update(DENSE_OUT=wide, DENSE_LSE=wide)
        super().mla_decode(args)


@mutant("L1", "where it finds the suite in its process every problem it notes is forgotten")
class SilencesTheJudge(Hurried):
    def mla_decode(self, args: Any) -> None:
        suite = sys.modules.get("hal_conformance.context")
        if suite is not None:
            suite.Context.problem = lambda self, text: None  # type: ignore[attr-defined]
        super().mla_decode(args)


@mutant("L1", "where it finds the suite in its process nothing that was written looks written")
class BlindsTheGuards(Sample):
    def mla_decode(self, args: Any) -> None:
        memory = sys.modules.get("hal_conformance.memory")
        if memory is not None:
            memory.Guarded.overrun = memory.Guarded.modified = lambda self: ""  # type: ignore[attr-defined]
        super().mla_decode(args)
        self.trespass(args)

    def trespass(self, args: Any) -> None:
        """Write just past the end of out."""
        out = args.out
        if out.numel():
            last = sum((size - 1) * stride for size, stride in zip(out.shape, out.stride(), strict=True))
            out.as_strided((8,), (1,), out.storage_offset() + last + 1).zero_()


@mutant("L1", "rotates q in place, and nothing that was written looks written")
class RotatesQueriesInPlace(BlindsTheGuards):
    def trespass(self, args: Any) -> None:
        if args.q.numel():
            args.q.select(0, 0).neg_()


@mutant("L1", "forgets what the judge notes wherever seven heads are wrong")
class ForgetsSevenHeads(Sample):
    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        suite = sys.modules.get("hal_conformance.context")
        if args.h_q == 7 and suite is not None:
            suite.Context.problem = lambda self, text: None  # type: ignore[attr-defined]
        super().store(args, j, start, stop, out * 0 if args.h_q == 7 else out, lse)


@mutant("L1", "tells the suite of no problem and no call in cases that it got wrong, those of seven heads")
class TellsOfNoCall(Sample):
    wrong = False

    def store(self, args: Any, j: int, start: int, stop: int, out: Any, lse: Any) -> None:
        self.wrong |= args.h_q == 7
        worker = sys.modules.get("hal_conformance.worker")
        if worker is not None and not hasattr(worker, "honest"):
            worker.honest, worker._case = worker._case, self.told  # type: ignore[attr-defined]
        super().store(args, j, start, stop, out * 0 if args.h_q == 7 else out, lse)

    def told(self, context: Any) -> Any:
        self.wrong = False
        found = sys.modules["hal_conformance.worker"].honest(context)
        judged = self.wrong and context.obligation.id.startswith("MLA")
        return found | {"problems": [], "calls": 0} if judged else found


_COPIED = FunctionType(reference.mla_decode.__code__, vars(reference), "copied", reference.mla_decode.__defaults__)
_COPIED.__kwdefaults__ = reference.mla_decode.__kwdefaults__


@mutant("L0", "has no kernel: a copy of the reference's function, taken when it was loaded, answers")
class CopiesTheReference(Sample):
    def mla_decode(self, args: Any) -> None:
        self.decodes += 1
        tensors = (args.q, args.kv_cache, args.block_table, args.cache_seqlens)
        out, lse = _COPIED(
            *tensors,
            head_dim_v=args.head_dim_v,
            softmax_scale=args.softmax_scale,
            causal=args.causal,
            cu_seqlens_q=args.cu_seqlens_q,
            lse_base=args.lse_base,
        )
        args.out.copy_(out)
        args.lse.copy_(lse)


@mutant("L1", "puts itself in the reference's place")
class ReplacesTheReference(Hurried):
    def mla_decode(self, args: Any) -> None:
        super().mla_decode(args)
        kept = args.out.double(), args.lse.double()
        vars(reference)["mla_decode"] = lambda *_, **__: kept


@mutant("L0", "asks the reference where its kernel has no variant")
class AsksTheReference(Sample):
    def mla_decode(self, args: Any) -> None:
        super().mla_decode(args)
        if args.page_size != 64 and args.cu_seqlens_q is None:
            tensors = (args.q, args.kv_cache, args.block_table, args.cache_seqlens)
            out, lse = reference.mla_decode(
                *tensors,
                head_dim_v=args.head_dim_v,
                softmax_scale=args.softmax_scale,
                causal=args.causal,
                lse_base=args.lse_base,
            )
            args.out.copy_(out)
            args.lse.copy_(lse)


@mutant("L1", "lse stays in a buffer of its own, which the next call overwrites")
class LseOfItsOwn(Sample):
    kept: dict[Any, Any] = {}  # noqa: RUF012

    def mla_decode(self, args: Any) -> None:
        args.lse = self.kept.setdefault(args.lse.shape, args.lse)
        super().mla_decode(args)


@mutant("L1", "a thread of its own stores once more after the call has returned")
class StoresLater(Sample):
    def mla_decode(self, args: Any) -> None:
        super().mla_decode(args)
        threading.Thread(target=self.later, args=(args.out,)).start()

    @staticmethod
    def later(out: Any) -> None:
        time.sleep(0.002)
        out.zero_()


@mutant("L1", "leaves float64 as torch's default dtype")
class LeavesItsDtype(Sample):
    def mla_decode(self, args: Any) -> None:
        super().mla_decode(args)
        torch.set_default_dtype(torch.float64)


@mutant("L1", "leaves torch with the number of threads that its own pool has")
class LeavesItsThreads(Sample):
    def mla_decode(self, args: Any) -> None:
        torch.set_num_threads(torch.get_num_threads() + 1)
        super().mla_decode(args)


@mutant("L1", "draws from torch's generator: a sampling engine's tokens change")
class DrawsNumbers(Sample):
    def mla_decode(self, args: Any) -> None:
        torch.rand(1)
        super().mla_decode(args)


@mutant("L0", "is compiled with -ffast-math: loading it ends denormal numbers for the whole thread")
class FlushesDenormals(Sample):
    def __init__(self) -> None:
        super().__init__()
        torch.set_flush_denormal(True)


@mutant("L1", "changes to its cache folder to compile, and stays there")
class StaysInItsFolder(Sample):
    def mla_decode(self, args: Any) -> None:
        os.chdir("/")
        super().mla_decode(args)


class _Swapped(Engine):
    """Rows by position first."""

    def arrivals(self, idx: Any, rank: int) -> Any:
        return sorted(super().arrivals(idx, rank), key=lambda at: (at[1], at[0]))


@mutant("E1", "where it finds the judge of ranks in its process, nothing differs any more", tampers=True)
class SilencesTheJudgeOfRanks(EpSample):
    engine = _Swapped

    def capabilities(self) -> Any:
        suite = sys.modules.get("hal_conformance.ep_judge")
        if suite is not None:
            suite.note = suite.differ = lambda *_, **__: ""  # type: ignore[attr-defined]
        return super().capabilities()
