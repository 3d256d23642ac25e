"""The values of a call that all ranks of an engine must share, and the error they raise where they do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from hal.spec.ep import CASTS
from hal.spec.errors import SpecError

OPERATIONS: Final = ("", "dispatch", "combine", "low_latency_dispatch", "low_latency_combine")
Fields = Sequence[tuple[str, Callable[[int], str]]]

# In the order in which they are posted: the argument, and how a value of it reads.
DISPATCH_FIELDS: Final = (
    ("topk_weights", ("None", "a tensor").__getitem__),
    ("topk_idx", "K = {}".format),
    ("x", ("bfloat16", "float16", "float32", "float8_e4m3fn").__getitem__),
    ("x", "scales of {} bytes a row".format),
    ("x", ("float32 scales", "int32 scales").__getitem__),
    ("expand", ("False", "True").__getitem__),
    ("expert_alignment", str),
    ("num_worst_tokens", str),
    ("handle", lambda seq: f"the one of operation {seq}" if seq else "None"),
)
COMBINE_FIELDS: Final = (
    ("topk_weights", ("None", "a tensor", "a sum", "rows").__getitem__),
    ("handle", "the one of operation {}".format),
)
PACKED_FIELDS: Final = (("topk_idx", "K = {}".format), ("use_fp8", lambda i: f"cast {CASTS[i]!r}"))
PACKED_COMBINE_FIELDS: Final = (("handle", "the one of operation {}".format),)


def differing(fields: Fields, field: int, value: int, rank: int, other: int, against: int) -> SpecError:
    """The error for a rank whose value is not that of the rank it is held against."""
    name, show = fields[field] if field < len(fields) else ("call", str)
    return SpecError(name, f"{show(value)} on rank {rank}", f"{show(other)}, as on rank {against}")
