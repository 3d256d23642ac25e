"""One graph of flash-attention nodes over ggml's C interface, for every library that has it.

Only functions are used, never the layout of a tensor: names and signatures are the same in ggml and in its forks.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_bool, c_char, c_float, c_int, c_int64, c_size_t, c_void_p
from typing import Any, Final

import torch
from torch import Tensor

from hal.bench.data import MlaData
from hal.bench.peers.base import Prepared

_TYPES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_PAD: Final = 64
_SUCCESS: Final = 0
_NODE_BYTES: Final = 8192
_GRAPH_NODES: Final = 16


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Plan(ctypes.Structure):
    """The head of ggml_cplan, the same everywhere; the rest differs and is left to the library."""

    _fields_ = [("work_size", c_size_t), ("work_data", c_void_p), ("n_threads", c_int), ("rest", c_char * 100)]


class Ggml:
    """The functions used, with their signatures.

    Parameters
    ----------
    base, cpu : ctypes.CDLL
        Where tensors and graphs are, and where they are computed; may be one library.

    Raises
    ------
    AttributeError
        A function is missing.
    """

    def __init__(self, base: ctypes.CDLL, cpu: ctypes.CDLL) -> None:
        p, i64, size = c_void_p, c_int64, c_size_t
        self.init = _function(base, "ggml_init", p, _InitParams)
        self.free = _function(base, "ggml_free", None, p)
        self.tensor = _function(base, "ggml_new_tensor_4d", p, p, c_int, i64, i64, i64, i64)
        self.view = _function(base, "ggml_view_4d", p, p, p, i64, i64, i64, i64, size, size, size, size)
        self.attention = _function(base, "ggml_flash_attn_ext", p, p, p, p, p, p, c_float, c_float, c_float)
        self.data = _function(base, "ggml_get_data", p, p)
        self.graph = _function(base, "ggml_new_graph_custom", p, p, size, c_bool)
        self.graph_bytes = _function(base, "ggml_graph_overhead_custom", size, size, c_bool)
        self.expand = _function(base, "ggml_build_forward_expand", None, p, p)
        # Some versions take a thread pool as third argument; the others ignore it.
        self.plan = _function(cpu, "ggml_graph_plan", _Plan, p, c_int, p)
        self.compute = _function(cpu, "ggml_graph_compute", c_int, p, POINTER(_Plan))
        if hasattr(cpu, "ggml_cpu_init"):
            cpu.ggml_cpu_init()


def _function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(library, name)
    function.restype, function.argtypes = result, list(arguments)
    return function


class GgmlCall(Prepared):
    """A graph per layer with a node per sequence, over contiguous copies of the caches.

    Parameters
    ----------
    ggml : Ggml
    data : MlaData
    threads : int
    dtype : torch.dtype
        What the copies of the cache are converted to, untimed.
    always_mask : bool
        Whether the library wants a mask even where everything is seen.
    """

    def __init__(self, ggml: Ggml, data: MlaData, threads: int, dtype: torch.dtype, always_mask: bool) -> None:
        self._ggml, self._data = ggml, data
        case = data.case
        self._nodes: list[list[int]] = []
        padded = [-(-length // _PAD) * _PAD for length in data.lengths]
        kv_bytes = data.layers * sum(padded) * case.d * dtype.itemsize
        q_bytes = 4 * data.q.numel()
        out_bytes = data.layers * 4 * case.b * case.s_q * case.h_q * case.d_v
        mask_bytes = 2 * sum(padded) * max(_PAD, case.s_q)
        slots = max(_GRAPH_NODES, 8 * case.b)
        overhead = data.layers * (ggml.graph_bytes(slots, False) + case.b * 4 * _NODE_BYTES)
        total = kv_bytes + q_bytes + out_bytes + mask_bytes + overhead + (1 << 20)
        self._context = ggml.init(_InitParams(total, None, False))
        if not self._context:
            raise MemoryError(f"ggml_init of {total / 2**30:.1f} GiB failed")
        self._queries = [self._query(j) for j in range(case.b)]
        self._masks = [
            self._mask(length, width, always_mask) for length, width in zip(data.lengths, padded, strict=True)
        ]
        self._graphs = [self._graph(layer, padded, dtype, slots) for layer in range(data.layers)]
        self._plans = [ggml.plan(graph, threads, None) for graph in self._graphs]
        self._work = (c_char * max(1, *(plan.work_size for plan in self._plans)))()
        for plan in self._plans:
            plan.work_data = ctypes.addressof(self._work)
        self._last = 0

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._ggml.free(self._context)

    def call(self, layer: int) -> None:
        """Compute one graph."""
        status = self._ggml.compute(self._graphs[layer], byref(self._plans[layer]))
        if status != _SUCCESS:
            raise RuntimeError(f"ggml_graph_compute returned {status}")
        self._last = layer

    def result(self) -> tuple[Tensor, Tensor | None]:
        """Out of the last graph computed."""
        case = self._data.case
        outs = [self._values(node).view(case.s_q, case.h_q, case.d_v) for node in self._nodes[self._last]]
        return torch.stack(outs), None

    def poison(self) -> None:
        """Fill every result with NaN."""
        for nodes in self._nodes:
            for node in nodes:
                self._values(node).fill_(torch.nan)

    def _values(self, node: int) -> Tensor:
        case = self._data.case
        count = case.s_q * case.h_q * case.d_v
        memory = (c_float * count).from_address(self._ggml.data(node))
        return torch.frombuffer(memory, dtype=torch.float32)

    def _query(self, sequence: int) -> int:
        case = self._data.case
        values = self._data.q[sequence].transpose(0, 1).float().contiguous()
        return self._filled(torch.float32, (case.d, case.s_q, case.h_q), values)

    def _mask(self, length: int, width: int, always: bool) -> int | None:
        """0 where a query sees a key, −inf elsewhere; rows padded as the kernels want them."""
        case = self._data.case
        if not always and not case.causal and length == width:
            return None
        rows = -(-case.s_q // _PAD) * _PAD
        mask = torch.zeros(rows, width, dtype=torch.float16)
        mask[:, length:] = -torch.inf
        if case.causal:
            seen = length - case.s_q + torch.arange(case.s_q)
            mask[: case.s_q][torch.arange(width) > seen[:, None]] = -torch.inf
        return self._filled(torch.float16, (width, rows, 1), mask)

    def _graph(self, layer: int, padded: list[int], dtype: torch.dtype, slots: int) -> int:
        case, ggml = self._data.case, self._ggml
        graph: int = ggml.graph(self._context, slots, False)
        self._nodes.append([])
        rows = self._data.gathered(layer)
        for kv, width, q, mask in zip(rows, padded, self._queries, self._masks, strict=True):
            values = torch.zeros(width, case.d, dtype=dtype)
            values[: len(kv)] = kv
            k = self._filled(dtype, (case.d, width, 1), values)
            row = case.d * dtype.itemsize
            v = ggml.view(self._context, k, case.d_v, width, 1, 1, row, row * width, row * width, 0)
            node = ggml.attention(self._context, q, k, v, mask, case.d**-0.5, 0.0, 0.0)
            ggml.expand(graph, node)
            self._nodes[-1].append(node)
        return graph

    def _filled(self, dtype: torch.dtype, sizes: tuple[int, int, int], values: Tensor) -> int:
        made: int | None = self._ggml.tensor(self._context, _TYPES[dtype], *sizes, 1)
        if not made:
            raise MemoryError("the ggml context is too small")
        ctypes.memmove(self._ggml.data(made), values.data_ptr(), values.numel() * values.element_size())
        return made
