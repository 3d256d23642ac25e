"""The tier of the Hopper kernel: what it takes, and where its code comes from."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from hal.spec.errors import first_line
from hal.spec.mla import MlaDecodeArgs
from hal_cuda import calls, compiler, launching
from hal_cuda.hopper.launch import (
    HEAD_DIM,
    HEAD_DIM_V,
    MOST_TOKENS,
    SHARED_BYTES,
    TOKENS,
    Kernels,
    Problem,
    Schedule,
    make_schedule,
)
from hal_cuda.hopper.launch import decode as launch_decode
from hal_cuda.hopper.lib import Kernel

if TYPE_CHECKING:
    from hal.spec.mla import MlaGeometry
    from hal.spec.plan import MlaPlanArgs

ARCH: Final = "sm_90a"
CAPABILITY: Final = (9, 0)
SOURCES: Final = Path(__file__).parent / "kernels"
KERNELS: Final = (("schedule", 1024, 0), ("decode", 384, SHARED_BYTES), ("merge", 128, 0))
"""Name, which is also the file's; threads of a block; bytes of dynamic shared memory."""

_FLAGS: Final[dict[torch.dtype, tuple[str, ...]]] = {torch.bfloat16: (), torch.float16: ("-DHAL_FP16",)}
_GRID: Final = 65535
_ALIGNED: Final = 16


def compiled(name: str, dtype: torch.dtype) -> bytes:
    """The machine code of one kernel for one element type; needs no device.

    Raises
    ------
    CompileError
    """
    headers = {path.name: path.read_text() for path in SOURCES.glob("*.h")}
    sizes = (f"-DHAL_SHARED_BYTES={SHARED_BYTES}", f"-DHAL_PROBLEM_BYTES={ctypes.sizeof(Problem)}")
    return compiler.compile_source(SOURCES / f"{name}.cu", ARCH, (*sizes, *_FLAGS[dtype]), headers)


class HopperTier:
    """Dense decode of d 576 with head_dim_v 512, bf16 and fp16, pages of 8 to 64 tokens or multiples of 64."""

    name = "hopper"

    def __init__(self) -> None:
        self._kernels: dict[tuple[int, torch.dtype], Kernels] = {}
        self._modules: list[launching.Module] = []  # unloaded with the last reference
        self._counts: Counter[str] = Counter()

    @cached_property
    def _devices(self) -> frozenset[int]:
        count = torch.cuda.device_count()
        return frozenset(i for i in range(count) if torch.cuda.get_device_capability(i) == CAPABILITY)

    def missing(self) -> str:
        """Whether cupy compiles here, and whether a device has the instructions."""
        reason = calls.missing()
        if reason:
            return reason
        try:
            found = torch.cuda.is_available() and bool(self._devices)
        except RuntimeError as error:
            return f"the driver refuses: {first_line(error)}"
        return "" if found else "no device of compute capability 9.0"

    def supports(self, args: MlaPlanArgs | MlaDecodeArgs) -> str:
        """Geometry for a plan; for a call also where its tensors lie."""
        if isinstance(args, MlaDecodeArgs):
            return self._geometry(args.geometry()) or _layout(args)
        return self._geometry(args.geometry)

    def _geometry(self, geometry: MlaGeometry) -> str:
        page = geometry.page_size
        if geometry.device.index not in self._devices:
            return "the device is not of compute capability 9.0"
        if (geometry.head_dim, geometry.head_dim_v) != (HEAD_DIM, HEAD_DIM_V):
            return f"d {geometry.head_dim} and head_dim_v {geometry.head_dim_v}, not {HEAD_DIM} and {HEAD_DIM_V}"
        if geometry.dtype not in _FLAGS or geometry.kv_format != "plain":
            return "neither bf16 nor fp16"
        if page % TOKENS and (page < 8 or TOKENS % page):
            return f"pages of {page} tokens, neither a multiple of {TOKENS} nor 8, 16 or 32"
        if geometry.ragged_q or geometry.batch_invariant:
            return "ragged queries" if geometry.ragged_q else "batch_invariant"
        if geometry.batch > _GRID or geometry.h_kv > _GRID:
            return f"more than {_GRID} sequences or KV heads"
        return ""

    def plan(self, args: MlaPlanArgs) -> Schedule | None:
        """Cut the batch on the device; nothing to cut, no schedule."""
        geometry = args.geometry
        if not geometry.batch * geometry.s_q:
            return None
        return self._schedule(geometry, args.cache_seqlens)

    def decode(self, args: MlaDecodeArgs, schedule: object) -> None:
        """Three launches, or two with a schedule."""
        if not args.out.numel():
            return
        kernels = self._on(args.q.device, args.q.dtype)
        if not isinstance(schedule, Schedule):
            assert args.cache_seqlens is not None
            schedule = self._schedule(args.geometry(), args.cache_seqlens)
        with calls.current(args.q.device.index):
            launch_decode(kernels, args, schedule)
        self._counts.update(("decode", "merge"))

    def launches(self) -> Mapping[str, int]:
        """Over all devices."""
        return {f"cuda:{name}@{ARCH}": count for name, count in self._counts.items()}

    def _schedule(self, geometry: MlaGeometry, cache_seqlens: torch.Tensor) -> Schedule:
        device = geometry.device
        kernels = self._on(device, geometry.dtype)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        with calls.current(device.index):
            schedule = make_schedule(kernels, geometry, cache_seqlens, processors)
        self._counts["schedule"] += 1
        return schedule

    def _on(self, device: torch.device, dtype: torch.dtype) -> Kernels:
        index = device.index
        assert index is not None  # a tensor's device has one
        if (index, dtype) not in self._kernels:
            with calls.current(index):
                self._kernels[index, dtype] = Kernels(*(self._load(*kernel, dtype, index) for kernel in KERNELS))
        return self._kernels[index, dtype]

    def _load(self, name: str, threads: int, shared: int, dtype: torch.dtype, index: int) -> Kernel:
        module = launching.Module(compiled(name, dtype), index)
        self._modules.append(module)
        return Kernel(module.function(name).ptr, name, threads, shared)


def _layout(args: MlaDecodeArgs) -> str:
    if args.indices is not None or args.attn_sink is not None or args.extra_kv_cache is not None:
        return "indices, attn_sink or extra caches"
    if not args.num_blocks:
        return "a cache without pages"
    if args.max_blocks * args.page_size > MOST_TOKENS:
        return f"a table of more than {MOST_TOKENS} tokens"
    for name, tensor in (("q", args.q), ("kv_cache", args.kv_cache)):
        if tensor.data_ptr() % _ALIGNED or any(stride % 8 for stride in tensor.stride()[:-1]):
            return f"{name} whose rows do not begin on {_ALIGNED}-byte boundaries"
    spans = [stride for size, stride in zip(args.kv_cache.shape, args.kv_cache.stride(), strict=True) if size > 1]
    if min(spans) <= 0 or max(args.kv_cache.stride()) * 2 >= 1 << 40:
        return "kv_cache with strides that the copy engine does not take"
    return ""
