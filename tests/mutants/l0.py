"""Mutants of L0: what a port says of itself."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from hal.backend import Probe
from hal.spec.capability import Capabilities, EpCapabilities, Ints, only
from hal.spec.errors import UnsupportedError
from mutants.ep_sample import EpSample, communicates
from mutants.registry import mutant
from mutants.sample import Sample, dense


@mutant("L0", "the constructor opens the device, which is not there yet")
class ConstructorRaises(Sample):
    def __init__(self) -> None:
        raise RuntimeError("libacme.so: cannot open shared object file")


@mutant("L0", "a vendor script left sys.exit() in the plugin")
class ExitsAtLoad(Sample):
    def __init__(self) -> None:
        raise SystemExit(3)


@mutant("L0", "the probe raises where it should say what is missing")
class ProbeRaises(Sample):
    def probe(self) -> Probe:
        raise OSError("no such device")


@mutant("L0", "the probe says available on every second asking: it leaks its handle")
class ProbeFlaps(Sample):
    asked = 0

    def probe(self) -> Probe:
        self.asked += 1
        return Probe(self.asked % 2 == 1, "device 0")


@mutant("L0", "the evidence is a word of the vendor's own")
class EvidenceUnknown(Sample):
    def probe(self) -> Probe:
        return Probe(True, "device 0", evidence="emulated")  # type: ignore[arg-type]


@mutant("L0", "says available while kernels are only compiled on this machine")
class OnlyCompiled(Sample):
    def probe(self) -> Probe:
        return Probe(True, "compiled for the chip", evidence="compiled")


@mutant("L0", "written for a later specification")
class SpecTooNew(Sample):
    spec_version = "2.0"


@mutant("L0", "the version is that of the product")
class SpecVersionOdd(Sample):
    spec_version = "acme-7"


@mutant("L0", "dtypes by the short name nobody else uses")
class DtypeSpelling(Sample):
    def declared(self) -> Any:
        return dense(dtypes=("bf16", "float16"))


@mutant("L0", "a set that says yes to everything stands for the declaration")
class YesToEverything(Sample):
    class Yes(Ints):
        def __contains__(self, value: object) -> bool:
            return True

    def declared(self) -> Any:
        return dense(head_dim=self.Yes(1, 576), h_q=self.Yes(1, 128))


@mutant("L0", "over-claims float16: the kernel was never instantiated for it")
class OverclaimFloat16(Sample):
    def mla_decode(self, args: Any) -> None:
        if "float16" in str(args.q.dtype) and "bfloat16" not in str(args.q.dtype):
            raise RuntimeError("no kernel image for half")
        super().mla_decode(args)


@mutant("L0", "over-claims page sizes: the tile is 64 tokens")
class OverclaimPages(Sample):
    def mla_decode(self, args: Any) -> None:
        assert args.page_size % 16 == 0, "page_size must be a multiple of 16"
        super().mla_decode(args)


@mutant("L0", "over-claims head counts: at most 128 fit the tile")
class OverclaimHeads(Sample):
    def mla_decode(self, args: Any) -> None:
        if args.h_q > 128:
            raise UnsupportedError("mutant", "q", f"h_q {args.h_q}", "h_q 1…128")
        super().mla_decode(args)


@mutant("L0", "over-claims causal: the flag is refused in the kernel")
class OverclaimCausal(Sample):
    def mla_decode(self, args: Any) -> None:
        if args.causal:
            raise NotImplementedError("causal")
        super().mla_decode(args)


@mutant("L0", "over-claims ragged queries")
class OverclaimRagged(Sample):
    def mla_decode(self, args: Any) -> None:
        if args.cu_seqlens_q is not None:
            raise UnsupportedError("mutant", "cu_seqlens_q", "a tensor", None)
        super().mla_decode(args)


@mutant("L0", "over-claims several KV heads")
class OverclaimKvHeads(Sample):
    def mla_decode(self, args: Any) -> None:
        if args.h_kv != 1:
            raise NotImplementedError("MQA only")
        super().mla_decode(args)


@mutant("L0", "under-claims: the natural logarithm it computes is left out of the declaration")
class UnderclaimNaturalLog(Sample):
    def declared(self) -> Any:
        return dense(lse_bases=("2",))


@mutant("L0", "under-claims everything: no operation is declared, so nothing could fail")
class UnderclaimAll(Sample):
    def capabilities(self) -> Capabilities:
        return Capabilities(("cpu",), None, None, None)


@mutant("L0", "under-claims: an empty set of page sizes leaves no call to test")
class UnderclaimPages(Sample):
    def declared(self) -> Any:
        return dense(page_size=only(-1))


@mutant("L0", "heads only in threes, KV heads only in pairs: each is a value, and no call has both")
class HeadsThatNeverDivide(Sample):
    def declared(self) -> Any:
        return dense(h_q=only(3, 9), h_kv=only(2))


@mutant("L0", "declares the expand layout alone: its kernel writes no other, whatever dispatch is by default")
class ExpandAlone(EpSample):
    def declared(self) -> EpCapabilities:
        return communicates(layouts=("expand",))


@mutant("L0", "declares groups of two nodes alone: on one node there is nothing to cross")
class TwoNodesAlone(EpSample):
    def declared(self) -> EpCapabilities:
        return communicates(nodes=only(2))


@mutant("L0", "a policy for full windows that the specification does not have, and that no test asks for")
class PolicyOfItsOwn(EpSample):
    def declared(self) -> EpCapabilities:
        return communicates(overflow=("error", "drop", "grow", "wait"))


@mutant("L0", "says with another word what works across nodes, so that nobody looks whether it does")
class AcrossNodesMisspelt(EpSample):
    def declared(self) -> EpCapabilities:
        return communicates(across_nodes=("normal", "low-latency", "error", "drop", "grow", "mask_ranks"))


@mutant("L0", "drops rows by default: the policy error is not declared, with which every buffer is opened")
class NeverAnError(EpSample):
    def declared(self) -> EpCapabilities:
        return communicates(overflow=("drop",))


@mutant("L0", "declares less after the first call: it found the fast path missing")
class DeclaresLessLater(Sample):
    def declared(self) -> Any:
        return dense() if self.decodes == 0 else dense(causal=False)


@mutant("L0", "a wider declaration for the HAL than for anyone who asks again")
class DeclaresTwice(Sample):
    asked = 0

    def capabilities(self) -> Capabilities:
        self.asked += 1
        section = dense() if self.asked == 1 else dataclasses.replace(dense(), dtypes=("bfloat16",))
        return Capabilities(("cpu",), section, None, None)


@mutant("L0", "falls back to the framework silently: no kernel of its own is ever launched")
class SilentFallback(Sample):
    def launches(self) -> dict[str, int]:
        return {"acme:mla_decode@acme0": 0}


@mutant("L0", "counts launches since the last question, not since the start")
class LaunchesReset(Sample):
    def launches(self) -> dict[str, int]:
        count, self.decodes = self.decodes, 0
        return {"acme:mla_decode@acme0": count}


@mutant("L0", "the probe waits for a device that never answers")
class ProbeHangs(Sample):
    def probe(self) -> Probe:
        time.sleep(3600)
        raise AssertionError
