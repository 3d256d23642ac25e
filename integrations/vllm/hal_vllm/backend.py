"""The three classes that vLLM asks of an attention backend, and the metadata between them.

Prefill, the projections around attention and the split of a batch into prefills and decodes stay vLLM's own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonDecodeMetadata,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.v1.attention.backend import AttentionType

import hal
from hal.plugins import select
from hal.spec.capability import MlaCapabilities

_PLAIN = ("auto", "bfloat16", "float16")
# vLLM asks for a list, the HAL declares ranges: the sizes that engines use.
_BLOCKS = (16, 32, 64, 128, 256)
_HEAD_SIZES = (576, 512, 320)


def _declared() -> MlaCapabilities:
    """What the backend in force declares of dense decode."""
    selected = select()
    if selected.capabilities.mla_dense is None:
        raise hal.UnsupportedError(selected.name, "mla_decode", "dense decode", "none")
    return selected.capabilities.mla_dense


class HalMLABackend(MLACommonBackend):
    """What vLLM may ask of the HAL: exactly what the HAL backend in force declares."""

    @staticmethod
    def get_name() -> str:
        """The name by which vLLM knows a backend that is not its own."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[HalMLAImpl]:
        """The computation."""
        return HalMLAImpl

    @staticmethod
    def get_builder_cls() -> type[HalMLAMetadataBuilder]:
        """The builder of its metadata."""
        return HalMLAMetadataBuilder

    @classmethod
    def is_mla(cls) -> bool:
        """Whether it serves MLA; it serves nothing else."""
        return True

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        """Page sizes that may be used."""
        return [size for size in _BLOCKS if size in _declared().page_size]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Widths of a cached row that may be used."""
        return [size for size in _HEAD_SIZES if size in _declared().head_dim]

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        """Whether queries and cache may have this element type."""
        return str(dtype).removeprefix("torch.") in _declared().dtypes

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        """Whether the cache is plain: vLLM's packed formats are not served."""
        return kv_cache_dtype is None or kv_cache_dtype in _PLAIN

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Whether a row's bits can be made independent of the batch."""
        return _declared().batch_invariant

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Lengths are decided from those on the host, so the device's must be the same."""
        return False


@dataclass
class HalMLADecodeMetadata(MLACommonDecodeMetadata):
    """The decodes of one step.

    Attributes
    ----------
    queries : int
        Queries of every sequence; 0 where they differ.
    cu_seqlens_q : Tensor or None
        [b + 1] int32 where they differ.
    plans : dict
        The schedule of each kind of layer in the step, made by the first that has it.
    """

    queries: int = 1
    cu_seqlens_q: Tensor | None = None
    plans: dict[Any, hal.MlaPlan] = field(default_factory=dict)


class HalMLAMetadataBuilder(MLACommonMetadataBuilder[MLACommonMetadata[HalMLADecodeMetadata]]):
    """vLLM's builder, with decodes as `hal.mla_decode` takes them."""

    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN

    def _build_decode(
        self,
        block_table_tensor: Tensor,
        seq_lens_device: Tensor,
        max_seq_len: int,
        query_start_loc_cpu: Tensor,
        query_start_loc_device: Tensor,
        num_decode_tokens: int,
        max_query_len: int,
        dcp_tot_seq_lens_device: Tensor | None,
    ) -> HalMLADecodeMetadata:
        lengths = query_start_loc_cpu.diff().tolist()
        same = lengths[0] if lengths and len(set(lengths)) == 1 else 0
        return HalMLADecodeMetadata(
            block_table=block_table_tensor,
            seq_lens=seq_lens_device,
            dcp_tot_seq_lens=dcp_tot_seq_lens_device,
            queries=same,
            cu_seqlens_q=None if same else query_start_loc_device,
        )


class HalMLAImpl(MLACommonImpl[MLACommonMetadata[HalMLADecodeMetadata]]):
    """Decode by `hal.mla_decode` over vLLM's paged cache."""

    can_return_lse_for_decode: bool = True
    lse_base_on_e: bool = True
    supports_dcp: bool = True
    need_to_return_lse_for_decode: bool = False  # vLLM sets it where the context is split over ranks

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla_args: Any,
    ) -> None:
        asked = {
            "alibi_slopes": (alibi_slopes, None),
            "sliding_window": (sliding_window, None),
            "logits_soft_cap": (logits_soft_cap or None, None),
            "indexer": (mla_args.get("indexer"), None),
            "attn_type": (attn_type, AttentionType.DECODER),
        }
        for argument, (got, served) in asked.items():
            if got != served:
                raise hal.UnsupportedError(select().name, argument, got, served)
        if kv_cache_dtype not in _PLAIN:
            raise hal.UnsupportedError(select().name, "kv_cache_dtype", kv_cache_dtype, " or ".join(_PLAIN))
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **mla_args,
        )
        self.supports_quant_query_input = False
        self._batch_invariant = os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0")

    def forward_mqa(
        self,
        q: Tensor | tuple[Tensor, Tensor],
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: MLACommonMetadata[HalMLADecodeMetadata],
        layer: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend the decodes of a step.

        Parameters
        ----------
        q : Tensor or (Tensor, Tensor)
            [tokens, heads, latent + rope], or its two parts.
        kv_c_and_k_pe_cache : Tensor
            [blocks, block, latent + rope].
        attn_metadata : MLACommonMetadata
            Of the step, with `HalMLADecodeMetadata`.
        layer : AttentionLayer
            Not needed.

        Returns
        -------
        out : Tensor
            [tokens, heads, latent].
        lse : Tensor or None
            [tokens, heads] float32, natural logarithm, where the context is split over ranks.
        """
        step = attn_metadata.decode
        assert step is not None
        rows = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        tokens, heads, width = rows.shape
        query = rows if step.cu_seqlens_q is not None else rows.view(-1, step.queries, heads, width)
        out, lse = hal.mla_decode(
            query,
            kv_c_and_k_pe_cache.unsqueeze(2),
            step.block_table,
            step.seq_lens,
            head_dim_v=self.kv_lora_rank,
            softmax_scale=self.scale,
            causal=attn_metadata.causal,
            plan=self._plan(query, kv_c_and_k_pe_cache.shape[1], attn_metadata),
            cu_seqlens_q=step.cu_seqlens_q,
            batch_invariant=self._batch_invariant,
        )
        out = out.reshape(tokens, heads, self.kv_lora_rank)
        if not self.need_to_return_lse_for_decode:
            return out, None
        return out, lse.transpose(-1, -2).reshape(tokens, heads)

    def _plan(self, query: Tensor, page: int, attn_metadata: MLACommonMetadata[HalMLADecodeMetadata]) -> hal.MlaPlan:
        """The schedule of this kind of layer: made by the first of a step, the same for the others."""
        step: HalMLADecodeMetadata = attn_metadata.decode
        kind = query.shape[1:], query.dtype, page, self.kv_lora_rank
        if kind not in step.plans:
            step.plans[kind] = hal.mla_plan(
                step.seq_lens,
                h_q=query.shape[-2],
                s_q=step.queries or 1,
                cu_seqlens_q=step.cu_seqlens_q,
                head_dim=query.shape[-1],
                head_dim_v=self.kv_lora_rank,
                page_size=page,
                dtype=query.dtype,
                causal=attn_metadata.causal,
                batch_invariant=self._batch_invariant,
            )
        return step.plans[kind]

    def do_kv_cache_update(
        self,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        k_scale: Tensor,
    ) -> None:
        """Write new tokens into the cache: on the host here, elsewhere by vLLM's own kernel.

        Parameters
        ----------
        kv_c_normed, k_pe : Tensor
            [tokens, latent] and [tokens, 1, rope].
        kv_cache : Tensor
            [blocks, block, latent + rope].
        slot_mapping : Tensor
            [tokens] ``block * size + offset``; negative for padding, which is not written.
        kv_cache_dtype, k_scale
            As vLLM passes them.
        """
        if kv_cache.device.type != "cpu":
            super().do_kv_cache_update(kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale)
        elif kv_cache.numel():
            slots = slot_mapping.flatten().long()
            used = slots >= 0
            rows = torch.cat((kv_c_normed, k_pe.reshape(len(k_pe), -1)), -1)[: len(slots)]
            kv_cache.view(-1, kv_cache.shape[-1])[slots[used]] = rows[used].to(kv_cache.dtype)
