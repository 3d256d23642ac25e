"""Refusing what is legal but not declared by a backend."""

from __future__ import annotations

from hal.spec.capability import EpCapabilities, Ints
from hal.spec.ep.arguments import (
    EpBufferArgs,
    EpCallArgs,
    EpDispatchArgs,
    EpLowLatencyCombineArgs,
    EpLowLatencyDispatchArgs,
)
from hal.spec.ep.terms import CASTS, FP8, MODES, OVERFLOW, PLAIN_DTYPES, ROW_ALIGNMENT
from hal.spec.errors import UnsupportedError
from hal.spec.tensors import dtype_name


def whole_ep(*transports: str) -> EpCapabilities:
    """All of expert-parallel communication, in groups of up to 512 ranks on 64 nodes."""
    return EpCapabilities(
        modes=MODES,
        layouts=("rank", "expand"),
        dtypes=tuple(map(dtype_name, (*PLAIN_DTYPES, FP8))),
        casts=CASTS,
        transports=transports,
        overflow=OVERFLOW,
        ranks=Ints(1, 512),
        nodes=Ints(1, 64),
        topk=Ints(1),
        num_experts=Ints(1),
        row_bytes=Ints(ROW_ALIGNMENT, multiple_of=ROW_ALIGNMENT),
        recv_hook=True,
        async_finish=True,
        cached_handle=True,
        mask_ranks=True,
        zero_copy_combine=True,
        pre_reduce=True,
        across_nodes=(*MODES, *OVERFLOW, "mask_ranks"),
    )


def require_ep_declared(args: EpBufferArgs, declared: EpCapabilities | None, backend: str) -> None:
    """Refuse a buffer that this backend does not declare.

    Raises
    ------
    UnsupportedError
        Names the argument that decides, its value, and what the backend declares for it.
    """
    if declared is None:
        raise UnsupportedError(backend, "group", "an expert-parallel buffer", "no expert-parallel communication")
    for mode in args.modes:
        if mode not in declared.modes:
            raise UnsupportedError(backend, "modes", repr(mode), ", ".join(declared.modes))
    dtype = dtype_name(args.dtype)
    if dtype not in declared.dtypes:
        raise UnsupportedError(backend, "dtype", dtype, ", ".join(declared.dtypes))
    sizes = (
        ("group", "ranks", args.num_ranks, declared.ranks),
        ("ranks_per_node", "nodes", args.num_nodes, declared.nodes),
        ("topk", "topk", args.topk, declared.topk),
        ("num_experts", "num_experts", args.num_experts, declared.num_experts),
        ("hidden", "row bytes", args.hidden * args.dtype.itemsize, declared.row_bytes),
    )
    for argument, size, value, legal in sizes:
        if value not in legal:
            raise UnsupportedError(backend, argument, f"{size} {value}", f"{size} {legal}")
    if args.overflow not in declared.overflow:
        raise UnsupportedError(backend, "overflow", repr(args.overflow), ", ".join(declared.overflow))
    if args.pre_reduce and not declared.pre_reduce:
        raise UnsupportedError(backend, "pre_reduce", True, False)
    if args.mask_ranks and not declared.mask_ranks:
        raise UnsupportedError(backend, "mask_ranks", True, False)
    if args.num_nodes > 1:
        asked = [("modes", mode) for mode in args.modes] + [("overflow", args.overflow)]
        asked += [("mask_ranks", "mask_ranks")] * args.mask_ranks
        for argument, name in asked:
            if name not in declared.across_nodes:
                got = f"{name!r} over {args.num_nodes} nodes"
                raise UnsupportedError(backend, argument, got, f"over nodes {', '.join(declared.across_nodes)}")


def require_ep_call_declared(args: EpCallArgs, declared: EpCapabilities, backend: str) -> None:
    """Refuse a call on a declared buffer that uses what this backend does not declare.

    Raises
    ------
    UnsupportedError
        As in `require_ep_declared`.
    """
    if args.async_finish and not declared.async_finish:
        raise UnsupportedError(backend, "async_finish", True, False)
    if args.return_recv_hook and not declared.recv_hook:
        raise UnsupportedError(backend, "return_recv_hook", True, False)
    if isinstance(args, EpDispatchArgs):
        layout = "expand" if args.expand else "rank"
        if layout not in declared.layouts:
            raise UnsupportedError(backend, "expand", args.expand, f"layouts {', '.join(declared.layouts)}")
        if args.handle is not None and not declared.cached_handle:
            raise UnsupportedError(backend, "handle", "a handle", None)
        if args.scales is not None:
            _require_fp8(args.x.shape[1], declared, backend, "x")
    elif isinstance(args, EpLowLatencyDispatchArgs):
        if args.cast not in declared.casts:
            raise UnsupportedError(backend, "use_fp8", f"cast {args.cast!r}", ", ".join(declared.casts))
    elif isinstance(args, EpLowLatencyCombineArgs) and args.zero_copy and not declared.zero_copy_combine:
        raise UnsupportedError(backend, "zero_copy", True, False)


def _require_fp8(row_bytes: int, declared: EpCapabilities, backend: str, argument: str) -> None:
    if dtype_name(FP8) not in declared.dtypes:
        raise UnsupportedError(backend, argument, f"dtype {dtype_name(FP8)}", ", ".join(declared.dtypes))
    if row_bytes not in declared.row_bytes:
        raise UnsupportedError(backend, argument, f"row bytes {row_bytes}", f"row bytes {declared.row_bytes}")
