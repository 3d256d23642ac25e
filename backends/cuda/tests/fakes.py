"""Stand-ins for what a machine without a device lacks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import calls
import torch

from hal.spec.mla import MlaDecodeArgs
from hal.spec.plan import MlaPlanArgs, check_plan


class FakeTier:
    """Remembers what it was asked; refuses some dtypes."""

    def __init__(self, name: str, refuses: tuple[torch.dtype, ...] = (), refuses_decode: bool = False) -> None:
        self.name = name
        self.refuses = refuses
        self.refuses_decode = refuses_decode
        self.calls: Counter[str] = Counter()
        self.schedules: list[object] = []

    def missing(self) -> str:
        return ""

    def supports(self, args: MlaPlanArgs | MlaDecodeArgs) -> str:
        if isinstance(args, MlaDecodeArgs) and self.refuses_decode:
            return "these strides"
        dtype = args.q.dtype if isinstance(args, MlaDecodeArgs) else args.geometry.dtype
        return f"{dtype}" if dtype in self.refuses else ""

    def plan(self, args: MlaPlanArgs) -> object:
        self.calls["plan"] += 1
        return (self.name, self.calls["plan"])

    def decode(self, args: MlaDecodeArgs, schedule: object) -> None:
        self.calls["decode"] += 1
        self.schedules.append(schedule)

    def launches(self) -> Mapping[str, int]:
        return {f"fake:{self.name}@sm_0": self.calls["decode"]}


def plan_args(dtype: torch.dtype = torch.bfloat16) -> MlaPlanArgs:
    lengths = torch.tensor([5, 70], dtype=torch.int32)
    return check_plan(lengths, 4, 1, 1, None, 576, 512, 64, dtype, "plain", False, False)


def decode_args(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> MlaDecodeArgs:
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 1, 4, 576, dtype=dtype),
        "kv_cache": torch.zeros(4, 64, 1, 576, dtype=dtype),
        "block_table": torch.zeros(2, 2, dtype=torch.int32),
        "cache_seqlens": torch.tensor([5, 70], dtype=torch.int32),
        "head_dim_v": 512,
    }
    return calls.decode_args(**(arguments | changes))
