"""The compiled kernel: tensors to addresses, faults to errors."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Final

import torch

from hal.spec.errors import HalError, SpecError, UnsupportedError
from hal_cpu.threads import forced_threads

if TYPE_CHECKING:
    from hal.spec.mla import MlaDecodeArgs
    from hal.spec.plan import MlaPlanArgs

ISA_ENV: Final = "HAL_CPU_ISA"

MOST_PLANNED_ROWS: Final = 1 << 26
"""Query rows (queries × heads over the batch) one plan may hold."""

_DTYPES: Final = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_CAUSAL: Final = 1
_BASE2: Final = 2
_INVARIANT: Final = 4

# Fault::Kind of native/decode.h.
_LENGTHS: Final = 1
_TABLE: Final = 2
_QUERIES: Final = 3
_PLAN: Final = 4


def missing() -> str | None:
    """Why there is no compiled kernel, or None if there is one."""
    if importlib.util.find_spec("hal_cpu._native") is None:
        return "hal-cpu was installed without compiled kernels: no C++17 compiler, or the build failed"
    try:
        import hal_cpu._native  # noqa: F401  (whether it loads is the question)
    except ImportError as error:
        return f"the compiled kernel does not load here ({error})"
    return None


class NativeKernel:
    """The kernel of ``native/``, for the best instruction set of this processor or the one ``HAL_CPU_ISA`` names.

    Raises
    ------
    SpecError
        ``HAL_CPU_ISA`` or ``HAL_CPU_THREADS`` asks for what there is not.
    """

    batch_invariant = True

    def __init__(self) -> None:
        from hal_cpu import _native

        self._native = _native
        self._threads = forced_threads()
        wanted = os.environ.get(ISA_ENV)
        if wanted and not _native.set_isa(wanted):
            raise SpecError(ISA_ENV, repr(wanted), f"one of {', '.join(_native.isas())} on this processor, or unset")

    def details(self) -> dict[str, str]:
        """Instruction sets, threads and compiler."""
        native = self._native
        return {
            "kernel": "native",
            "isa": native.isa(),
            "isas available": ", ".join(native.isas()),
            "threads": str(self._thread_count()),
            "compiler": native.compiler,
        }

    def plan(self, args: MlaPlanArgs) -> object:
        """Make a native schedule for these lengths."""
        g = args.geometry
        for name, size in (("s_q", g.s_q), ("h_q", g.h_q)):
            if size > MOST_PLANNED_ROWS:
                raise UnsupportedError("cpu", name, size, f"at most {MOST_PLANNED_ROWS} query rows a plan")
        first_query = args.cu_seqlens_q
        made = self._native.plan(
            args.cache_seqlens.data_ptr(),
            0 if first_query is None else first_query.data_ptr(),
            g.batch,
            g.s_q,
            g.h_q,
            g.h_kv,
            g.head_dim,
            g.head_dim_v,
            _flags(g.causal, False, g.batch_invariant),
            self._thread_count(),
        )
        if isinstance(made, tuple):
            raise _error(made, None)
        return made

    def decode(self, args: MlaDecodeArgs) -> None:
        """One call into the kernel."""
        q, kv, out, table, lengths = args.q, args.kv_cache, args.out, args.block_table, args.cache_seqlens
        assert table is not None and lengths is not None
        first_query = args.cu_seqlens_q
        kv_strides = kv.stride()
        # A ragged q has no batch dimension; its queries are found by their offsets instead.
        q_strides, out_strides = q.stride(), out.stride()
        if first_query is not None:
            q_strides, out_strides = (0, *q_strides), (0, *out_strides)
        fault = self._native.decode(
            args.schedule,
            q.data_ptr(),
            kv.data_ptr(),
            table.data_ptr(),
            lengths.data_ptr(),
            0 if first_query is None else first_query.data_ptr(),
            out.data_ptr(),
            args.lse.data_ptr(),
            q_strides[0],
            q_strides[1],
            q_strides[2],
            kv_strides[0],
            kv_strides[1],
            kv_strides[2],
            table.stride(0),
            out_strides[0],
            out_strides[1],
            out_strides[2],
            args.batch,
            args.s_q,
            args.total_q,
            args.h_q,
            args.h_kv,
            args.head_dim,
            args.head_dim_v,
            args.page_size,
            args.num_blocks,
            args.max_blocks,
            _DTYPES[q.dtype],
            args.softmax_scale,
            _flags(args.causal, args.lse_base == "2", args.batch_invariant),
            self._threads or torch.get_num_threads(),
        )
        if fault is not None:
            raise _error(fault, args)

    def launches(self) -> dict[str, int]:
        """Calls by instruction set."""
        return self._native.launches()

    def _thread_count(self) -> int:
        return self._threads or torch.get_num_threads()


def _flags(causal: bool, base2: bool, invariant: bool) -> int:
    return _CAUSAL * causal + _BASE2 * base2 + _INVARIANT * invariant


def _error(fault: tuple[int, int, int, int], args: MlaDecodeArgs | None) -> HalError:
    """Phrase what the native checks found; ``args`` is None where a plan was being made."""
    kind, row, column, value = fault
    if kind == _LENGTHS:
        legal = "0 or more"
        if args is not None:
            most = args.max_blocks * args.page_size
            legal = f"0…{most} (max_blocks {args.max_blocks} × page_size {args.page_size})"
        return SpecError("cache_seqlens", f"{value} at [{row}]", legal)
    if kind == _TABLE:
        assert args is not None
        return SpecError(
            "block_table", f"{value} at [{row}, {column}]", f"0…{args.num_blocks - 1} within cache_seqlens"
        )
    if kind == _QUERIES:
        end = "" if args is None else f" and end at total_q = {args.total_q}"
        return SpecError("cu_seqlens_q", f"{value} at [{row}]", f"offsets that start at 0, never fall{end}")
    if kind == _PLAN:
        return SpecError("plan", "a plan made for other lengths or sizes", "one made for these: call mla_plan again")
    most = MOST_PLANNED_ROWS if args is None else 2**31 - 1
    return UnsupportedError("cpu", "q", f"{value} queries", f"at most {most} query rows in all")
