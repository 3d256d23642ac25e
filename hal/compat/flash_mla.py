"""``flash_mla`` on any backend: the published functions, their arguments, their layouts and their edge values.

Three generations of callers are in the field and all are served. The oldest two pass lengths to `get_mla_metadata` and
get two tensors, ``tile_scheduler_metadata`` and ``num_splits``; the newest passes nothing and gets a
`FlashMLASchedMeta` whose schedule is made by the first call that uses it. Where the published code asserts, this raises
`hal.SpecError`; a schedule used with other lengths is refused instead of giving wrong results.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hal import mla
from hal.compat.flags import zero_or_one
from hal.plugins import select
from hal.spec.errors import SpecError, UnsupportedError
from hal.spec.plan import MlaPlan
from hal.spec.tensors import require_bool, require_int, require_tensor

__version__ = "1.0.0"
"""The version of the published interface that this one follows."""

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]

_PACKED_BY_HEAD_DIM = {576: "v32", 512: "model1"}
_METADATA_SIZE = 8
_INT32 = (torch.int32,)
_PUBLISHED_NAMES = {
    "kv_cache": "k_cache",
    "kv_format": "is_fp8_kvcache",
    "plan": "tile_scheduler_metadata",
    "extra_kv_cache": "extra_k_cache",
    "extra_indices": "extra_indices_in_kvcache",
}


@dataclass
class FlashMLASchedMeta:
    """The schedule of one step, empty until its first use; reusable over layers. Its copies start empty.

    Attributes
    ----------
    have_initialized : bool
        Whether a call has used it.
    config : Config or None
        The sizes of that call, which every later one must repeat.
    tile_scheduler_metadata, num_splits : Tensor or None
        For callers that look, filled by a dense call as in the older styles; the schedule itself is ``plan``.
    plan : MlaPlan or None
        The backend's schedule, for dense attention.
    """

    @dataclass
    class Config:
        """Sizes and options that a schedule is bound to."""

        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: int | None
        extra_page_block_size: int | None
        extra_topk: int | None

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: Tensor | None = None
    num_splits: Tensor | None = None
    plan: MlaPlan | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything out: a plan is bound to this process and to the lengths it was made from."""
        return vars(FlashMLASchedMeta())


@zero_or_one
def get_mla_metadata(
    cache_seqlens: Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *unused: Any,
    num_heads_per_head_k: int | None = None,
    **ignored: Any,
) -> tuple[FlashMLASchedMeta, None] | tuple[Tensor, Tensor]:
    """Make the metadata that `flash_mla_with_kvcache` takes.

    Parameters
    ----------
    cache_seqlens : Tensor, optional
        [b] int32. Without it, or without one of the next two, the newest style is meant, in which nothing matters.
    num_q_tokens_per_head_k, num_heads_k, num_heads_q, is_fp8_kvcache, topk
        As published in the older styles. ``num_heads_per_head_k`` is the oldest name of the first.
    *unused, **ignored
        The newest style takes anything.

    Returns
    -------
    (FlashMLASchedMeta, None)
        Newest style.
    (tile_scheduler_metadata, num_splits)
        Older styles: int32 [1, 8] and int32 [b + 1]. They describe one part that holds every sequence unsplit; a
        backend makes its own schedule when they are used, so copying them into graph buffers is harmless.

    Raises
    ------
    SpecError
        A wrong argument.
    """
    rows = num_q_tokens_per_head_k if num_heads_per_head_k is None else num_heads_per_head_k
    if cache_seqlens is None or rows is None or num_heads_k is None:
        return FlashMLASchedMeta(), None
    require_tensor("cache_seqlens", cache_seqlens, _INT32, 1, "[b]")
    require_int("num_q_tokens_per_head_k", rows, 1)
    require_int("num_heads_k", num_heads_k, 1)
    return _one_part(cache_seqlens)


def _one_part(cache_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Metadata of the older styles."""
    batch = cache_seqlens.shape[0]
    metadata = torch.zeros(1, _METADATA_SIZE, dtype=torch.int32, device=cache_seqlens.device)
    if batch:
        # begin_idx, begin_seqlen, end_idx, end_seqlen, begin_n_split_idx, three unused
        metadata[0, 2] = batch - 1
        metadata[0, 3] = cache_seqlens[-1]
    return metadata, torch.arange(batch + 1, dtype=torch.int32, device=cache_seqlens.device)


@zero_or_one
def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | Tensor,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend new queries over a paged cache, dense or at ``indices``.

    Parameters
    ----------
    q : Tensor
        [b, s_q, h_q, d].
    k_cache : Tensor
        [num_blocks, page_block_size, h_k, d], or packed FP8 rows with ``is_fp8_kvcache``: 656 bytes a token for d 576,
        584 for d 512.
    block_table, cache_seqlens : Tensor or None
        [b, max_blocks] and [b] int32; may be None with ``indices``.
    head_dim_v : int
    tile_scheduler_metadata, num_splits
        What `get_mla_metadata` returned, in any of its styles.
    softmax_scale, causal, indices, attn_sink, topk_length, extra_topk_length
        As in `hal.mla_decode`.
    extra_k_cache, extra_indices_in_kvcache
        ``extra_kv_cache`` and ``extra_indices`` of `hal.mla_decode`.

    Returns
    -------
    out : Tensor
        [b, s_q, h_q, head_dim_v].
    softmax_lse : Tensor
        [b, h_q, s_q] float32, natural logarithm.

    Raises
    ------
    SpecError, UnsupportedError, BackendUnavailable
        As `hal.mla_decode`.
    """
    if not isinstance(tile_scheduler_metadata, (FlashMLASchedMeta, Tensor)):
        raise SpecError(
            "tile_scheduler_metadata", type(tile_scheduler_metadata).__name__, "what get_mla_metadata returned first"
        )
    require_bool("is_fp8_kvcache", is_fp8_kvcache)
    try:
        plan = None
        kv_format = _kv_format(q, is_fp8_kvcache)
        if isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
            if num_splits is not None:
                raise SpecError("num_splits", type(num_splits).__name__, "None together with a FlashMLASchedMeta")
            extra = extra_k_cache, extra_indices_in_kvcache
            config = _config(q, k_cache, causal, is_fp8_kvcache, indices, *extra)
            plan = _scheduled(tile_scheduler_metadata, config, q, cache_seqlens, head_dim_v, kv_format)
        else:
            _check_older(tile_scheduler_metadata, num_splits, q)
        return mla.mla_decode(
            q,
            k_cache,
            block_table,
            cache_seqlens,
            head_dim_v=head_dim_v,
            softmax_scale=softmax_scale,
            causal=causal,
            plan=plan,
            kv_format=kv_format,
            indices=indices,
            topk_length=topk_length,
            attn_sink=attn_sink,
            extra_kv_cache=extra_k_cache,
            extra_indices=extra_indices_in_kvcache,
            extra_topk_length=extra_topk_length,
        )
    except SpecError as error:
        raise SpecError(_published(error.argument), error.got, error.legal) from None
    except UnsupportedError as error:
        raise UnsupportedError(error.backend, _published(error.argument), error.got, error.supported) from None


def _check_older(metadata: Any, num_splits: Any, q: Any) -> None:
    """Refuse metadata tensors that the older styles cannot have made for this call."""
    require_tensor("tile_scheduler_metadata", metadata, _INT32, 2, "[parts, 8]")
    require_tensor("num_splits", num_splits, _INT32, 1, "[b + 1]")
    if isinstance(q, Tensor) and q.dim() == 4 and len(num_splits) != len(q) + 1:
        raise SpecError("num_splits", f"shape {list(num_splits.shape)}", f"[b + 1] = [{len(q) + 1}]")


def _published(argument: str) -> str:
    """The caller's name for an argument of `hal.mla_decode`."""
    return _PUBLISHED_NAMES.get(argument, argument)


def _kv_format(q: Any, is_fp8_kvcache: bool) -> str:
    if not is_fp8_kvcache:
        return "plain"
    require_tensor("q", q, (torch.bfloat16, torch.float16), 4, "[b, s_q, h_q, d]")
    if q.shape[-1] not in _PACKED_BY_HEAD_DIM:
        raise SpecError("q", f"d {q.shape[-1]} with is_fp8_kvcache", "d 576 or 512")
    return _PACKED_BY_HEAD_DIM[q.shape[-1]]


def _config(
    q: Any,
    k_cache: Any,
    causal: bool,
    is_fp8_kvcache: bool,
    indices: Tensor | None,
    extra_k_cache: Tensor | None,
    extra_indices: Tensor | None,
) -> FlashMLASchedMeta.Config | None:
    """The sizes of a call, or None where q or k_cache are so wrong that `hal.mla_decode` will say so."""
    if not all(isinstance(t, Tensor) and t.dim() == 4 for t in (q, k_cache)):
        return None
    return FlashMLASchedMeta.Config(
        b=q.shape[0],
        s_q=q.shape[1],
        h_q=q.shape[2],
        page_block_size=k_cache.shape[1],
        h_k=k_cache.shape[2],
        causal=causal,
        is_fp8_kvcache=is_fp8_kvcache,
        topk=None if indices is None else indices.shape[-1],
        extra_page_block_size=None if extra_k_cache is None else extra_k_cache.shape[1],
        extra_topk=None if extra_indices is None else extra_indices.shape[-1],
    )


def _scheduled(
    meta: FlashMLASchedMeta,
    config: FlashMLASchedMeta.Config | None,
    q: Tensor,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    kv_format: str,
) -> MlaPlan | None:
    """The plan of this step: made by its first dense call, the same for the others."""
    if config is None:
        return None
    if meta.have_initialized and meta.config is not None and meta.config != config:
        fields = dataclasses.fields(config)
        name = next(f.name for f in fields if getattr(config, f.name) != getattr(meta.config, f.name))
        was, now = getattr(meta.config, name), getattr(config, name)
        raise SpecError("tile_scheduler_metadata", f"metadata first used with {name} {was}", f"one used with {now}")
    if not meta.have_initialized:
        if config.topk is None and cache_seqlens is not None:
            meta.plan = mla.mla_plan(
                cache_seqlens,
                h_q=config.h_q,
                h_kv=config.h_k,
                s_q=config.s_q,
                head_dim=q.shape[-1],
                head_dim_v=head_dim_v,
                page_size=config.page_block_size,
                dtype=q.dtype,
                kv_format=kv_format,
                causal=config.causal,
            )
            meta.tile_scheduler_metadata, meta.num_splits = _one_part(cache_seqlens)
        meta.config = config
        meta.have_initialized = True
    return meta.plan


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    indexer_topk: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse prefill; its place is kept, no backend declares it yet.

    Raises
    ------
    UnsupportedError
        Always, naming the backend in force.
    """
    raise UnsupportedError(select().name, "indices", "sparse prefill", "decode only (flash_mla_with_kvcache)")


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """Dense attention over whole sequences, for prefill and training; its place is kept, the HAL decodes.

    Raises
    ------
    UnsupportedError
        Always, naming the backend in force.
    """
    raise _no_prefill("q")


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `flash_attn_varlen_func`.

    Raises
    ------
    UnsupportedError
        Always, naming the backend in force.
    """
    raise _no_prefill("qkv")


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `flash_attn_varlen_func`.

    Raises
    ------
    UnsupportedError
        Always, naming the backend in force.
    """
    raise _no_prefill("q")


def _no_prefill(argument: str) -> UnsupportedError:
    return UnsupportedError(select().name, argument, "dense prefill", "decode only (flash_mla_with_kvcache)")
