"""What expert-parallel communication means: its arguments, their shapes and dtypes, and every way they can be wrong.

Names and layouts follow the published DeepEP interfaces (V1 ``Buffer``, V2 ``ElasticBuffer``). A buffer fixes the
geometry of a group once (`check_buffer`); each call is then checked in one pass against it, and an engine trusts what
it receives.

Symbols: R ranks, E experts, L = ceil(E / R) local experts, n tokens of this rank, H hidden, K experts a token,
M = max_tokens_per_rank. Expert e lives on rank e // L, where its local id is e % L.
"""

from __future__ import annotations

from hal.spec.ep.arguments import (
    EpBufferArgs,
    EpCallArgs,
    EpCombineArgs,
    EpDispatchArgs,
    EpLowLatencyCombineArgs,
    EpLowLatencyDispatchArgs,
)
from hal.spec.ep.declared import require_ep_call_declared, require_ep_declared, whole_ep
from hal.spec.ep.geometry import check_buffer, is_timeout
from hal.spec.ep.handles import EpHandle, EpLayout, EpLowLatencyHandle, EpSources
from hal.spec.ep.low_latency import check_low_latency_combine, check_low_latency_dispatch
from hal.spec.ep.normal import check_combine, check_dispatch, check_layout
from hal.spec.ep.terms import CASTS, FP8, MODES, OVERFLOW, PLAIN_DTYPES, ROW_ALIGNMENT, SCALE_GROUP, EpEvent

__all__ = [
    "CASTS",
    "FP8",
    "MODES",
    "OVERFLOW",
    "PLAIN_DTYPES",
    "ROW_ALIGNMENT",
    "SCALE_GROUP",
    "EpBufferArgs",
    "EpCallArgs",
    "EpCombineArgs",
    "EpDispatchArgs",
    "EpEvent",
    "EpHandle",
    "EpLayout",
    "EpLowLatencyCombineArgs",
    "EpLowLatencyDispatchArgs",
    "EpLowLatencyHandle",
    "EpSources",
    "check_buffer",
    "check_combine",
    "check_dispatch",
    "check_layout",
    "check_low_latency_combine",
    "check_low_latency_dispatch",
    "is_timeout",
    "require_ep_call_declared",
    "require_ep_declared",
    "whole_ep",
]
