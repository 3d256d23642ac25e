"""The host side of the Hopper kernel: its workspace, its schedule, its launches."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from hal.spec.mla import MlaDecodeArgs, MlaGeometry
from hal_cuda.hopper.lib import Kernel, TensorMap, tensor_map

ROWS: Final = 64
TOKENS: Final = 64
HEAD_DIM: Final = 576
HEAD_DIM_V: Final = 512
TILE_COLUMNS: Final = 64
HALF_TILES: Final = HEAD_DIM_V // 2 // TILE_COLUMNS
MERGE_WARPS: Final = 4
MERGE_BLOCKS: Final = 1024
MOST_TOKENS: Final = 2**30
SHARED_BYTES: Final = 3 * 9 * 8192 + 8 * ROWS * 4 + 12 * 8
"""What ``Shared`` in decode.cu measures."""


class Kernels(NamedTuple):
    """The loaded kernels of one element type."""

    schedule: Kernel
    decode: Kernel
    merge: Kernel


class Problem(ctypes.Structure):
    """``struct Problem`` of problem.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "block_table", "cache_seqlens", "out", "lse")),
        *((name, ctypes.c_void_p) for name in ("bounds", "partial_out", "partial_lse")),
        *((name, ctypes.c_longlong) for name in ("q_batch", "q_position", "q_head")),
        *((name, ctypes.c_longlong) for name in ("out_batch", "out_position", "out_head", "table_batch")),
        *((name, ctypes.c_int) for name in ("batch", "s_q", "h_q", "h_kv", "max_blocks", "page_size", "most_tokens")),
        *((name, ctypes.c_int) for name in ("parts", "row_blocks")),
        ("scale_log2", ctypes.c_float),
        ("causal", ctypes.c_int),
        ("lse_factor", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """The cut of one batch over the multiprocessors, and the memory for what is cut.

    Attributes
    ----------
    bounds : Tensor
        [parts + 1, 2] int32, on the device: sequence and step at which a part begins.
    partial_out, partial_lse : Tensor
        [parts, 2, h_kv, row_blocks, 64, 512] and the same without the last, float32.
    parts, row_blocks : int
    """

    bounds: Tensor
    partial_out: Tensor
    partial_lse: Tensor
    parts: int
    row_blocks: int


def make_schedule(kernels: Kernels, geometry: MlaGeometry, cache_seqlens: Tensor, multiprocessors: int) -> Schedule:
    """Allocate a schedule and fill it on the current stream; the lengths stay on the device."""
    group = geometry.h_q // geometry.h_kv
    row_blocks = math.ceil(geometry.s_q * group / ROWS)
    parts = max(multiprocessors // (row_blocks * geometry.h_kv), 1)
    device = cache_seqlens.device
    bounds = torch.empty((parts + 1, 2), dtype=torch.int32, device=device)
    costs = torch.empty(geometry.batch + 1, dtype=torch.int64, device=device)
    shape = (parts, 2, geometry.h_kv, row_blocks, ROWS)
    partial_lse = torch.empty(shape, dtype=torch.float32, device=device)
    partial_out = torch.empty((*shape, HEAD_DIM_V), dtype=torch.float32, device=device)
    kernels.schedule(
        (1, 1, 1),
        torch.cuda.current_stream(device).cuda_stream,
        ctypes.c_void_p(cache_seqlens.data_ptr()),
        ctypes.c_int(geometry.batch),
        ctypes.c_int(MOST_TOKENS),
        ctypes.c_int(parts),
        ctypes.c_void_p(costs.data_ptr()),
        ctypes.c_void_p(bounds.data_ptr()),
    )
    return Schedule(bounds, partial_out, partial_lse, parts, row_blocks)


@lru_cache(maxsize=1024)
def cache_maps(address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[TensorMap, TensorMap]:
    """Describe a cache [num_blocks, page_size, h_kv, 576] to the copy engine, in tiles of 64 columns.

    Kept per cache: every layer has one, and it comes back at every step.

    Returns
    -------
    half, tile : TensorMap
        A box of one takes four tiles, half of V; of the other one tile. Either takes 64 rows, or a page that has fewer.
    """
    num_blocks, page_size, h_kv, _ = shape
    block, row, head, _ = (stride * 2 for stride in strides)
    tile = TILE_COLUMNS * 2
    sizes = (TILE_COLUMNS, page_size, HEAD_DIM // TILE_COLUMNS, h_kv, num_blocks)
    # The stride of a dimension of one is never used, but zero is refused.
    spans = tuple(stride or HEAD_DIM * 2 for stride in (row, tile, head, block))
    rows = min(page_size, TOKENS)
    half, one = (tensor_map(address, sizes, spans, (TILE_COLUMNS, rows, tiles, 1, 1)) for tiles in (HALF_TILES, 1))
    return half, one


def decode(kernels: Kernels, args: MlaDecodeArgs, schedule: Schedule) -> None:
    """Write ``args.out`` and ``args.lse`` on the current stream."""
    assert args.block_table is not None and args.cache_seqlens is not None
    group = args.h_q // args.h_kv
    stream = torch.cuda.current_stream(args.q.device).cuda_stream
    problem = Problem(
        args.q.data_ptr(),
        args.block_table.data_ptr(),
        args.cache_seqlens.data_ptr(),
        args.out.data_ptr(),
        args.lse.data_ptr(),
        schedule.bounds.data_ptr(),
        schedule.partial_out.data_ptr(),
        schedule.partial_lse.data_ptr(),
        *args.q.stride()[:3],
        *args.out.stride()[:3],
        args.block_table.stride(0),
        args.batch,
        args.s_q,
        args.h_q,
        args.h_kv,
        args.max_blocks,
        args.page_size,
        min(args.max_blocks * args.page_size, MOST_TOKENS),
        schedule.parts,
        schedule.row_blocks,
        args.softmax_scale * math.log2(math.e),
        args.causal,
        1.0 if args.lse_base == "2" else math.log(2.0),
    )
    cache = args.kv_cache
    maps = cache_maps(cache.data_ptr(), tuple(cache.shape), cache.stride())
    kernels.decode((schedule.row_blocks, args.h_kv, schedule.parts), stream, problem, *maps)
    # Enough blocks to fill the device; sequences that were not cut only have to find that out.
    rows = math.ceil(args.s_q * group / MERGE_WARPS)
    wanted = math.ceil(MERGE_BLOCKS / (args.h_kv * args.batch))
    kernels.merge((min(rows, wanted), args.h_kv, args.batch), stream, problem)
