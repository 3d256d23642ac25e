"""FlashMLA itself, for backends whose tensors are on a device it runs on."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any, Final

import torch
from torch import Tensor

from hal.bench.cases import MlaCase
from hal.bench.data import MlaData
from hal.bench.peers.base import Peer, Prepared, Presence
from hal.spec.errors import first_line

_PAGE: Final = 64
_MODULES: Final = ("flash_mla", "vllm.third_party.flashmla.flash_mla_interface")
"""Its own distribution, and the one inside vLLM."""
_NAMES: Final = ("flash_mla_with_kvcache", "get_mla_metadata")


class FlashMla(Peer):
    """``flash_mla.flash_mla_with_kvcache``, with the schedule made once as an engine does."""

    name = "flash_mla"
    summary = "FlashMLA's flash_mla_with_kvcache on the same pages, its schedule made once"
    install = "pip install --no-build-isolation git+https://github.com/deepseek-ai/FlashMLA, or vllm, which brings it"
    lacks = ("pages other than 64 tokens",)

    def presence(self) -> Presence:
        """Import it."""
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is None:
            return Presence(False, "this machine has no accelerator")
        module, reason = _found()
        return Presence(module is not None, reason)

    def elsewhere(self, device: torch.device) -> str:
        """Host memory is of no use to it."""
        return "runs on an accelerator, the backend is on the CPU" if device.type == "cpu" else ""

    def cannot(self, case: MlaCase) -> str:
        """Other pages than 64, and float32."""
        if case.page_size != _PAGE:
            return f"pages of {case.page_size}"
        return "fp32" if case.dtype is torch.float32 else ""

    def prepare(self, data: MlaData, threads: int) -> Prepared:
        """Make the schedule."""
        return _FlashMlaCall(data)


def _found() -> tuple[Any, str]:
    """The first module that has what is called, and which it is; or None, and why each is out."""
    reasons = []
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            reasons.append(f"{name} does not import: {first_line(error)}")
            continue
        missing = [n for n in _NAMES if not hasattr(module, n)]
        if not missing:
            return module, f"{name} {getattr(module, '__version__', 'of unknown version')}"
        reasons.append(f"{name} has no {' and no '.join(missing)}")
    return None, "; ".join(reasons)


class _FlashMlaCall(Prepared):
    def __init__(self, data: MlaData) -> None:
        module, reason = _found()
        if module is None:
            raise ImportError(reason)
        self._data = data
        self._kernel = module.flash_mla_with_kvcache
        self._schedule = module.get_mla_metadata(data.cache_seqlens, data.case.s_q * data.case.h_q, 1)
        self._result: tuple[Tensor, Tensor] | None = None

    def call(self, layer: int) -> None:
        data, case = self._data, self._data.case
        self._result = self._kernel(
            data.q,
            data.kv_cache,
            data.tables[layer],
            data.cache_seqlens,
            case.d_v,
            *self._schedule,
            causal=case.causal,
        )

    def result(self) -> tuple[Tensor, Tensor | None]:
        assert self._result is not None
        return self._result

    def poison(self) -> None:
        self._result = None
