"""The flash attention of ggml and of ik_llama.cpp, through their Python wheels."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
from pathlib import Path

import torch

from hal.bench.cases import MlaCase
from hal.bench.data import MlaData
from hal.bench.peers.base import Peer, Prepared, Presence
from hal.bench.peers.ggml_abi import Ggml, GgmlCall
from hal.spec.errors import first_line


def _folder(package: str) -> Path | None:
    """Where a package keeps its libraries; the package itself is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "lib"


@functools.cache
def _ik() -> Ggml:
    folder = _folder("ik_llama_cpp")
    assert folder is not None
    library = ctypes.CDLL(str(folder / "libggml.so"))
    return Ggml(library, library)


@functools.cache
def _ggml() -> Ggml:
    folder = _folder("ggml")
    assert folder is not None
    base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
    return Ggml(base, ctypes.CDLL(str(folder / "libggml-cpu.so")))


class IkLlama(Peer):
    """The flash attention of ik_llama.cpp for Dk 576 and Dv 512."""

    name = "ik_llama"
    summary = "ik_llama.cpp's flash attention, a node per sequence over contiguous fp16 K (converted untimed)"
    install = "pip install --no-deps ik-llama-cpp-python==0.1.5"
    lacks = ("paging: its cache is gathered beforehand, untimed", "lse")

    def presence(self) -> Presence:
        """Load its library."""
        if _folder("ik_llama_cpp") is None:
            return Presence(False, "ik-llama-cpp-python is not installed")
        return _loaded(_ik, "ik-llama-cpp-python")

    def cannot(self, case: MlaCase) -> str:
        """Float32 caches."""
        return "fp32 cache" if case.dtype is torch.float32 else ""

    def prepare(self, data: MlaData, threads: int) -> Prepared:
        """Contiguous fp16 copies; its fused path is taken only where there is a mask."""
        return GgmlCall(_ik(), data, threads, torch.float16, always_mask=True)


class GgmlPeer(Peer):
    """The flash attention of ggml."""

    name = "ggml"
    summary = "ggml's flash_attn_ext, a node per sequence over a contiguous cache"
    install = "pip install --no-deps ggml-python==0.0.45"
    lacks = ("paging: its cache is gathered beforehand, untimed", "lse")

    def presence(self) -> Presence:
        """Load its libraries."""
        if _folder("ggml") is None:
            return Presence(False, "ggml-python is not installed")
        return _loaded(_ggml, "ggml-python")

    def cannot(self, case: MlaCase) -> str:
        """Nothing."""
        return ""

    def prepare(self, data: MlaData, threads: int) -> Prepared:
        """Contiguous copies in the case's own dtype."""
        return GgmlCall(_ggml(), data, threads, data.case.dtype, always_mask=False)


def _loaded(load: functools._lru_cache_wrapper[Ggml], distribution: str) -> Presence:
    try:
        load()
    except (OSError, AttributeError) as error:
        return Presence(False, f"{distribution} does not load: {first_line(error)}")
    return Presence(True, f"{distribution} {importlib.metadata.version(distribution)}")
