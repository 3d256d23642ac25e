"""The words of expert-parallel communication: element types, modes, policies, sizes."""

from __future__ import annotations

from typing import Final, Protocol, runtime_checkable

import torch

PLAIN_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
"""Element types of token rows that are not quantised; combine takes only these."""

FP8: Final = torch.float8_e4m3fn
MODES: Final = ("normal", "low_latency")
OVERFLOW: Final = ("error", "drop", "grow")
"""What happens when a rank would receive more rows than its window holds: all ranks raise, the rows last in order are
dropped and counted, or the window grows."""

CASTS: Final = ("none", "fp8", "fp8_pow2", "fp8_ue8m0")
"""What low-latency dispatch turns rows into: nothing, or FP8 with float32, power-of-two or packed UE8M0 scales."""

SCALE_GROUP: Final = 128
"""Columns that share one scale."""

ROW_ALIGNMENT: Final = 16
"""A token row is a multiple of this many bytes."""

INT64: Final = (torch.int64,)
INT32: Final = (torch.int32,)
FLOAT32: Final = (torch.float32,)
MAX_INT32: Final = 2**31 - 1
MAX_TIMEOUT: Final = 1e9
"""Seconds; the clocks of sockets and threads end at some nine times as many."""


@runtime_checkable
class EpEvent(Protocol):
    """Completion of an asynchronous call."""

    def wait(self) -> None:
        """Return when the work is done and its results may be used."""
