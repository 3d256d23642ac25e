"""Mutants that take the process with them, or never come back."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from typing import Any

from mutants.registry import mutant
from mutants.sample import Sample


@mutant("L0", "the driver library crashes in the probe")
class CrashInProbe(Sample):
    def probe(self) -> Any:
        ctypes.string_at(0)


@mutant("L1", "an assertion of the vendor library calls exit(1)")
class ExitsInDecode(Sample):
    def mla_decode(self, args: Any) -> None:
        if args.page_size != 64:
            super().mla_decode(args)
        elif args.batch == 6:
            os._exit(1)
        else:
            super().mla_decode(args)


@mutant("L1", "a log that was closed is still written to, by the number of its file descriptor")
class WritesToOthersFiles(Sample):
    def mla_decode(self, args: Any) -> None:
        if args.page_size == 64 and args.batch == 6:
            for descriptor in range(3, 30):
                with contextlib.suppress(OSError):
                    os.write(descriptor, b"\xff decoded\n")
        super().mla_decode(args)


@mutant("L2", "a null pointer is followed where a sequence is empty")
class CrashOnEmpty(Sample):
    def mla_decode(self, args: Any) -> None:
        if args.batch > 2 and 0 in args.cache_seqlens.tolist():
            ctypes.string_at(0)
        super().mla_decode(args)


@mutant("L2", "a spin lock is never released for a sequence of several thousand tokens")
class HangsOnLong(Sample):
    def mla_decode(self, args: Any) -> None:
        if args.batch == 12 and max(args.cache_seqlens.tolist(), default=0) > 4000:
            time.sleep(3600)
        super().mla_decode(args)
