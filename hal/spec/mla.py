"""What MLA decode means: its arguments, their shapes and dtypes, and every way they can be wrong.

Layouts and edge values follow the published FlashMLA interface (``flash_mla_with_kvcache``). One pass of
`check_decode` turns the caller's arguments into an `MlaDecodeArgs` that a backend may trust; nothing after it
checks again. How much it reads is set by `hal.spec.validation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hal.spec.capability import Capabilities, MlaCapabilities
from hal.spec.errors import SpecError, UnsupportedError, shown
from hal.spec.forms import form_of, with_room
from hal.spec.tensors import (
    dtype_name,
    require_bool,
    require_choice,
    require_device,
    require_int,
    require_shape,
    require_tensor,
    require_values,
    require_writable,
    require_write_access,
    span_bytes,
)
from hal.spec.validation import Level, validation_level

QUERY_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
"""Element types q may have; out and a plain cache have the same."""

KV_FORMATS: Final = ("plain", "v32", "model1")
"""Layouts of the KV cache: ``plain`` has q's dtype; ``v32`` and ``model1`` are FlashMLA's packed FP8 rows."""

PACKED_ROW: Final = {"v32": (576, 656), "model1": (512, 584)}
"""For each packed format the d it stands for once dequantised, and the bytes of one token."""

PACKED_DTYPES: Final = (torch.uint8, torch.int8, torch.float8_e4m3fn)
"""Element types under which packed bytes may be passed."""

LSE_BASES: Final = ("e", "2")

MAX_SCALE: Final = 1e30
"""Largest magnitude of softmax_scale: float32 scores of data of ordinary size stay finite."""

_INT32: Final = (torch.int32,)
_FLOAT32: Final = (torch.float32,)

Spans: TypeAlias = list[tuple[int, int]]
"""Which of a call's tensors there are, and the bytes that each spans."""

_admitted: Final[dict[object, Spans]] = {}
"""Forms of calls that passed every check that does not read values."""


class MlaGeometry(NamedTuple):
    """Everything but the lengths that a schedule depends on. ``s_q`` is 0 for ragged queries."""

    batch: int
    ragged_q: bool
    s_q: int
    h_q: int
    h_kv: int
    head_dim: int
    head_dim_v: int
    page_size: int
    dtype: torch.dtype
    kv_format: str
    causal: bool
    batch_invariant: bool
    device: torch.device


@dataclass(slots=True)
class MlaDecodeArgs:
    """One validated decode call, as a backend receives it.

    A backend writes ``out`` and ``lse`` whole; both are allocated already. Not frozen only because freezing costs
    microseconds a call; treat it as read-only.

    Attributes
    ----------
    q : Tensor
        [b, s_q, h_q, d], or [total_q, h_q, d] where ``cu_seqlens_q`` is given. Last dimension contiguous.
    kv_cache : Tensor
        [num_blocks, page_size, h_kv, d] of q's dtype, or [num_blocks, page_size, 1, bytes] for packed formats.
    block_table : Tensor or None
        [b, max_blocks] int32. None only where ``indices`` is given.
    cache_seqlens : Tensor or None
        [b] int32, tokens of each sequence. None only where ``indices`` is given.
    out : Tensor
        Shape of q with ``head_dim_v`` last; q's dtype. Any non-overlapping strides, the last one 1.
    lse : Tensor
        [b, h_q, s_q], or [h_q, total_q] for ragged queries; float32, contiguous.
    softmax_scale : float
        Resolved: the caller's, else d ** -0.5.
    schedule : object
        What the backend's own ``mla_plan`` returned for these lengths, or None.
    batch, s_q, total_q, h_q, h_kv, head_dim, page_size, num_blocks, max_blocks : int
        Sizes read off the tensors. ``s_q`` is 0 for ragged queries, whose counts only the device knows.
    """

    q: Tensor
    kv_cache: Tensor
    block_table: Tensor | None
    cache_seqlens: Tensor | None
    out: Tensor
    lse: Tensor
    head_dim_v: int
    softmax_scale: float
    causal: bool
    kv_format: str
    indices: Tensor | None
    topk_length: Tensor | None
    attn_sink: Tensor | None
    extra_kv_cache: Tensor | None
    extra_indices: Tensor | None
    extra_topk_length: Tensor | None
    cu_seqlens_q: Tensor | None
    lse_base: str
    batch_invariant: bool
    schedule: object
    batch: int
    s_q: int
    total_q: int
    h_q: int
    h_kv: int
    head_dim: int
    page_size: int
    num_blocks: int
    max_blocks: int

    def geometry(self) -> MlaGeometry:
        """The part of this call that a schedule and a capability check depend on."""
        return MlaGeometry(
            self.batch,
            self.cu_seqlens_q is not None,
            self.s_q,
            self.h_q,
            self.h_kv,
            self.head_dim,
            self.head_dim_v,
            self.page_size,
            self.q.dtype,
            self.kv_format,
            self.causal,
            self.batch_invariant,
            self.q.device,
        )


def check_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    softmax_scale: float | None,
    causal: bool,
    kv_format: str | None,
    indices: Tensor | None,
    topk_length: Tensor | None,
    attn_sink: Tensor | None,
    extra_kv_cache: Tensor | None,
    extra_indices: Tensor | None,
    extra_topk_length: Tensor | None,
    out: Tensor | None,
    cu_seqlens_q: Tensor | None,
    lse_base: str,
    batch_invariant: bool,
) -> MlaDecodeArgs:
    """Check one call of `hal.mla_decode` and make what a backend receives, allocating ``out`` and ``lse``.

    Raises
    ------
    SpecError
        An argument of the wrong type, shape, dtype, device or layout; at level ``full`` also a value out of range, or
        an ``out`` that may not be written.
    """
    level = validation_level()
    kv_format = "plain" if kv_format is None else kv_format
    if level:
        tensors = (
            *(out, q, kv_cache, block_table, cache_seqlens, cu_seqlens_q, indices, topk_length),
            *(attn_sink, extra_kv_cache, extra_indices, extra_topk_length),
        )
        scalars = (head_dim_v, softmax_scale, causal, kv_format, lse_base, batch_invariant)
        form = form_of(tensors, scalars)
        spans = None if form is None else _admitted.get(form)
        if spans is None or (out is not None and not _apart(tensors, spans)):
            _check_call(*tensors, *scalars)
            if form is not None:
                with_room(_admitted)[form] = [(i, span_bytes(one)) for i, one in enumerate(tensors) if one is not None]
    if cu_seqlens_q is None:
        batch, s_q, h_q, head_dim = q.shape
        total_q = batch * s_q
        out_shape: tuple[int, ...] = (batch, s_q, h_q, head_dim_v)
        lse_shape: tuple[int, ...] = (batch, h_q, s_q)
    else:
        total_q, h_q, head_dim = q.shape
        batch, s_q = cu_seqlens_q.shape[0] - 1, 0
        out_shape, lse_shape = (total_q, h_q, head_dim_v), (h_q, total_q)
    num_blocks, page_size, h_kv, _ = kv_cache.shape
    args = MlaDecodeArgs(
        q,
        kv_cache,
        block_table,
        cache_seqlens,
        q.new_empty(out_shape) if out is None else out,
        torch.empty(lse_shape, dtype=torch.float32, device=q.device),
        head_dim_v,
        head_dim**-0.5 if softmax_scale is None else float(softmax_scale),
        causal,
        kv_format,
        indices,
        topk_length,
        attn_sink,
        extra_kv_cache,
        extra_indices,
        extra_topk_length,
        cu_seqlens_q,
        lse_base,
        batch_invariant,
        None,
        batch,
        s_q,
        total_q,
        h_q,
        h_kv,
        head_dim,
        page_size,
        num_blocks,
        0 if block_table is None else block_table.shape[1],
    )
    if level is Level.FULL:
        if out is not None:
            require_write_access("out", out)
        _check_values(args)
    return args


def _apart(tensors: tuple[Any, ...], spans: Spans) -> bool:
    """Whether the first of a call's tensors lies beside all others: where memory is, its form does not say."""
    begin = tensors[0].data_ptr()
    end = begin + spans[0][1]
    for i, span in spans[1:]:
        first = tensors[i].data_ptr()
        if begin < first + span and first < end:
            return False
    return True


def _check_call(
    out: Any,
    q: Any,
    kv_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    cu_seqlens_q: Any,
    indices: Any,
    topk_length: Any,
    attn_sink: Any,
    extra_kv_cache: Any,
    extra_indices: Any,
    extra_topk_length: Any,
    head_dim_v: Any,
    softmax_scale: Any,
    causal: Any,
    kv_format: Any,
    lse_base: Any,
    batch_invariant: Any,
) -> None:
    """Everything that is known without reading values."""
    _check_scalars(head_dim_v, softmax_scale, causal, kv_format, lse_base, batch_invariant)
    _check_q(q, cu_seqlens_q)
    _check_kv(kv_cache, q, kv_format, "kv_cache")
    h_q, head_dim = q.shape[-2:]
    batch, s_q = q.shape[:2] if cu_seqlens_q is None else (cu_seqlens_q.shape[0] - 1, 0)
    _check_sizes(kv_format, kv_cache, h_q, kv_cache.shape[2], head_dim, head_dim_v)
    if indices is None:
        _check_paging(q, batch, block_table, cache_seqlens)
        if topk_length is not None:
            raise SpecError("topk_length", "a tensor without indices", "None for dense decode")
    else:
        _check_sparse(q, batch, s_q, indices, topk_length, causal, cu_seqlens_q, kv_cache.shape[2])
    extras = (attn_sink, extra_kv_cache, extra_indices, extra_topk_length)
    if any(one is not None for one in extras):
        _check_extras(q, batch, s_q, h_q, kv_format, *extras)
    if out is None:
        return
    shape = (*q.shape[:-1], head_dim_v)
    require_tensor("out", out, (q.dtype,), len(shape), "like q with last dimension head_dim_v")
    require_shape("out", out, shape, "like q with last dimension head_dim_v")
    require_device("out", out, q.device)
    inputs = {
        "q": q,
        "kv_cache": kv_cache,
        "block_table": block_table,
        "cache_seqlens": cache_seqlens,
        "cu_seqlens_q": cu_seqlens_q,
        "indices": indices,
        "topk_length": topk_length,
        "attn_sink": attn_sink,
        "extra_kv_cache": extra_kv_cache,
        "extra_indices": extra_indices,
        "extra_topk_length": extra_topk_length,
    }
    require_writable("out", out, inputs)


def _check_scalars(
    head_dim_v: Any, softmax_scale: Any, causal: Any, kv_format: Any, lse_base: Any, batch_invariant: Any
) -> None:
    require_int("head_dim_v", head_dim_v, 1)
    if softmax_scale is not None:
        number = isinstance(softmax_scale, (int, float)) and not isinstance(softmax_scale, bool)
        if not number or not -MAX_SCALE <= softmax_scale <= MAX_SCALE:
            legal = f"a float within ±{MAX_SCALE:g}, or None for d ** -0.5"
            raise SpecError("softmax_scale", shown(softmax_scale), legal)
    require_bool("causal", causal)
    require_bool("batch_invariant", batch_invariant)
    require_choice("kv_format", kv_format, KV_FORMATS)
    require_choice("lse_base", lse_base, LSE_BASES)


def _check_q(q: Any, cu_seqlens_q: Any) -> None:
    if cu_seqlens_q is None:
        require_tensor("q", q, QUERY_DTYPES, 4, "[b, s_q, h_q, d], or [total_q, h_q, d] with cu_seqlens_q")
        return
    require_tensor("q", q, QUERY_DTYPES, 3, "[total_q, h_q, d], since cu_seqlens_q is given")
    require_tensor("cu_seqlens_q", cu_seqlens_q, _INT32, 1, "[b + 1]")
    require_device("cu_seqlens_q", cu_seqlens_q, q.device)
    if cu_seqlens_q.shape[0] < 1:
        raise SpecError("cu_seqlens_q", "shape [0]", "[b + 1], so at least one entry")


def _check_kv(kv_cache: Any, q: Tensor, kv_format: str, name: str) -> None:
    if kv_format == "plain":
        require_tensor(name, kv_cache, (q.dtype,), 4, "[num_blocks, page_size, h_kv, d]")
    else:
        require_tensor(name, kv_cache, PACKED_DTYPES, 4, "[num_blocks, page_size, 1, bytes a token]")
    require_device(name, kv_cache, q.device)


def _check_sizes(kv_format: str, kv_cache: Tensor, h_q: int, h_kv: int, head_dim: int, head_dim_v: int) -> None:
    if h_q < 1 or head_dim < 1:
        raise SpecError("q", f"h_q {h_q} and d {head_dim}", "at least 1 each")
    _, page_size, _, row = kv_cache.shape
    if page_size < 1 or h_kv < 1:
        raise SpecError("kv_cache", f"shape {list(kv_cache.shape)}", "page_size and h_kv of at least 1")
    if kv_format == "plain":
        if row != head_dim:
            raise SpecError("kv_cache", f"last dimension {row}", f"d of q, {head_dim}")
    else:
        packed_dim, packed_bytes = PACKED_ROW[kv_format]
        if row != packed_bytes or h_kv != 1:
            raise SpecError("kv_cache", f"shape {list(kv_cache.shape)}", f"[num_blocks, page_size, 1, {packed_bytes}]")
        if head_dim != packed_dim:
            raise SpecError("q", f"d {head_dim}", f"{packed_dim} for kv_format {kv_format!r}")
    if h_q % h_kv:
        raise SpecError("q", f"{h_q} heads over {h_kv} KV heads", "h_q a multiple of h_kv")
    if head_dim_v > head_dim:
        raise SpecError("head_dim_v", head_dim_v, f"at most d = {head_dim}")


def _check_paging(q: Tensor, batch: int, block_table: Any, cache_seqlens: Any) -> None:
    require_tensor("block_table", block_table, _INT32, 2, "[b, max_blocks]")
    require_tensor("cache_seqlens", cache_seqlens, _INT32, 1, "[b]")
    device = q.device
    require_device("block_table", block_table, device)
    require_device("cache_seqlens", cache_seqlens, device)
    if block_table.shape[0] != batch:
        raise SpecError("block_table", f"shape {list(block_table.shape)}", f"[b, max_blocks] with b = {batch}")
    if cache_seqlens.shape[0] != batch:
        raise SpecError("cache_seqlens", f"shape {list(cache_seqlens.shape)}", f"[b] with b = {batch}")


def _check_sparse(
    q: Tensor, batch: int, s_q: int, indices: Any, topk_length: Any, causal: bool, cu_seqlens_q: Any, h_kv: int
) -> None:
    if cu_seqlens_q is not None:
        raise SpecError("cu_seqlens_q", "a tensor together with indices", "None for sparse decode")
    if causal:
        raise SpecError("causal", True, "False for sparse decode: indices already say what is attended")
    if h_kv != 1:
        raise SpecError("kv_cache", f"{h_kv} KV heads", "h_kv 1 for sparse decode")
    _check_indices("indices", indices, q, batch, s_q)
    if topk_length is not None:
        _check_vector("topk_length", topk_length, _INT32, batch, "[b]", q)


def _check_indices(name: str, indices: Any, q: Tensor, batch: int, s_q: int) -> None:
    require_tensor(name, indices, _INT32, 3, "[b, s_q, topk]")
    if indices.shape[:2] != (batch, s_q):
        raise SpecError(name, f"shape {list(indices.shape)}", f"[b, s_q, topk] with b = {batch}, s_q = {s_q}")
    require_device(name, indices, q.device)


def _check_vector(name: str, value: Any, dtypes: tuple[torch.dtype, ...], size: int, layout: str, q: Tensor) -> None:
    require_tensor(name, value, dtypes, 1, layout)
    require_shape(name, value, (size,), layout)
    require_device(name, value, q.device)


def _check_extras(
    q: Tensor,
    batch: int,
    s_q: int,
    h_q: int,
    kv_format: str,
    attn_sink: Any,
    extra_kv_cache: Any,
    extra_indices: Any,
    extra_topk_length: Any,
) -> None:
    if attn_sink is not None:
        _check_vector("attn_sink", attn_sink, _FLOAT32, h_q, "[h_q]", q)
    if (extra_kv_cache is None) != (extra_indices is None):
        missing = "extra_kv_cache" if extra_kv_cache is None else "extra_indices"
        raise SpecError(missing, None, "a tensor: extra_kv_cache and extra_indices go together")
    if extra_kv_cache is None:
        if extra_topk_length is not None:
            raise SpecError("extra_topk_length", "a tensor without extra_indices", "None")
        return
    _check_kv(extra_kv_cache, q, kv_format, "extra_kv_cache")
    row = PACKED_ROW[kv_format][1] if kv_format in PACKED_ROW else q.shape[-1]
    if extra_kv_cache.shape[1] < 1 or extra_kv_cache.shape[2:] != (1, row):
        raise SpecError("extra_kv_cache", f"shape {list(extra_kv_cache.shape)}", f"[num_blocks, page_size, 1, {row}]")
    if q.dim() != 4:
        raise SpecError("extra_kv_cache", "a tensor together with cu_seqlens_q", "None for ragged queries")
    _check_indices("extra_indices", extra_indices, q, batch, s_q)
    if extra_topk_length is not None:
        _check_vector("extra_topk_length", extra_topk_length, _INT32, batch, "[b]", q)


def _check_values(args: MlaDecodeArgs) -> None:
    """Read every index tensor; only entries that are used must be in range."""
    if args.cu_seqlens_q is not None:
        check_cu_seqlens(args.cu_seqlens_q, args.total_q)
    if args.indices is None:
        assert args.cache_seqlens is not None and args.block_table is not None
        lengths, table = args.cache_seqlens, args.block_table
        most = args.max_blocks * args.page_size
        legal = f"0…{most} (max_blocks {args.max_blocks} × page_size {args.page_size})"
        require_values("cache_seqlens", (lengths < 0) | (lengths > most), lengths, legal)
        pages = (lengths.long() + args.page_size - 1) // args.page_size
        used = torch.arange(args.max_blocks, device=table.device) < pages[:, None]
        bad = used & ((table < 0) | (table >= args.num_blocks))
        require_values("block_table", bad, table, f"0…{args.num_blocks - 1} within cache_seqlens")
    else:
        tokens = args.num_blocks * args.page_size
        _check_index_values("indices", args.indices, args.topk_length, tokens)
    if args.extra_indices is not None:
        assert args.extra_kv_cache is not None
        tokens = args.extra_kv_cache.shape[0] * args.extra_kv_cache.shape[1]
        _check_index_values("extra_indices", args.extra_indices, args.extra_topk_length, tokens)


def _check_index_values(name: str, indices: Tensor, length: Tensor | None, tokens: int) -> None:
    bad = (indices < -1) | (indices >= tokens)
    if length is not None:
        topk = indices.shape[-1]
        length_name = "topk_length" if name == "indices" else "extra_topk_length"
        require_values(length_name, (length < 0) | (length > topk), length, f"0…{topk}")
        bad &= torch.arange(topk, device=indices.device) < length[:, None, None]
    require_values(name, bad, indices, f"-1 (a hole) or 0…{tokens - 1}")


def check_cu_seqlens(cu_seqlens_q: Tensor, total_q: int | None) -> None:
    """Start at 0, never fall, end at total_q (where that is known). Reads device memory."""
    steps = cu_seqlens_q.diff()
    require_values("cu_seqlens_q", steps < 0, steps, "offsets that never fall (shown: the difference to the next)")
    ends = [int(cu_seqlens_q[0]), int(cu_seqlens_q[-1])]
    if ends[0] != 0 or (total_q is not None and ends[1] != total_q):
        raise SpecError("cu_seqlens_q", f"{ends[0]} … {ends[1]}", f"0 first and total_q = {total_q} last")


def require_geometry_declared(
    geometry: MlaGeometry, capabilities: Capabilities, declared: MlaCapabilities | None, backend: str
) -> None:
    """Refuse sizes, dtypes and options that this backend does not declare for this kind of decode.

    Raises
    ------
    UnsupportedError
        Names the argument that decides, its value, and what the backend declares for it.
    """

    def require(allowed: bool, argument: str, got: object, supported: object) -> None:
        if not allowed:
            raise UnsupportedError(backend, argument, got, supported)

    g = geometry
    if declared is None:
        raise UnsupportedError(backend, "indices", "a kind of decode (dense: None, sparse: a tensor)", "not this kind")
    device = g.device.type
    require(device in capabilities.device_types, "q", f"device {g.device}", ", ".join(capabilities.device_types))
    dtype = dtype_name(g.dtype)
    require(dtype in declared.dtypes, "q", f"dtype {dtype}", ", ".join(declared.dtypes))
    require(g.kv_format in declared.kv_formats, "kv_format", repr(g.kv_format), ", ".join(declared.kv_formats))
    require(g.head_dim in declared.head_dim, "q", f"d {g.head_dim}", f"d {declared.head_dim}")
    require(g.head_dim_v in declared.head_dim_v, "head_dim_v", g.head_dim_v, declared.head_dim_v)
    require(g.h_q in declared.h_q, "q", f"h_q {g.h_q}", f"h_q {declared.h_q}")
    require(g.h_kv in declared.h_kv, "kv_cache", f"h_kv {g.h_kv}", f"h_kv {declared.h_kv}")
    require(g.page_size in declared.page_size, "kv_cache", f"page_size {g.page_size}", declared.page_size)
    # A call without queries has nothing to compute, so s_q 0 is within every declaration.
    require(g.s_q == 0 or g.s_q in declared.s_q, "q", f"s_q {g.s_q}", f"s_q {declared.s_q}")
    require(declared.causal or not g.causal, "causal", True, False)
    require(declared.ragged_q or not g.ragged_q, "cu_seqlens_q", "a tensor", None)
    require(declared.batch_invariant or not g.batch_invariant, "batch_invariant", True, False)


def require_decode_declared(args: MlaDecodeArgs, capabilities: Capabilities, backend: str) -> None:
    """Refuse a decode call that this backend does not declare.

    Raises
    ------
    UnsupportedError
        As `require_geometry_declared`.
    """
    declared = capabilities.mla_dense if args.indices is None else capabilities.mla_sparse
    require_geometry_declared(args.geometry(), capabilities, declared, backend)
    assert declared is not None
    if args.lse_base not in declared.lse_bases:
        raise UnsupportedError(backend, "lse_base", repr(args.lse_base), ", ".join(declared.lse_bases))
    if args.attn_sink is not None and not declared.attn_sink:
        raise UnsupportedError(backend, "attn_sink", "a tensor", None)
    if args.extra_kv_cache is not None and not declared.extra_kv_cache:
        raise UnsupportedError(backend, "extra_kv_cache", "a tensor", None)
    if args.indices is not None and (declared.topk is None or args.indices.shape[-1] not in declared.topk):
        raise UnsupportedError(backend, "indices", f"topk {args.indices.shape[-1]}", f"topk {declared.topk}")
