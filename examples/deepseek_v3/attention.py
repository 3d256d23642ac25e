"""Absorbed MLA: transformers' attention module, computing in the latent space over the paged cache.

With kv_b_proj = [W_K; W_V] per head, the score of a key is ``q_nope · (W_K c) + q_rope · k_rope``, which is
``(W_Kᵀ q_nope) · c + q_rope · k_rope``, and the weighted sum of values is ``W_V`` times the weighted sum of latents c.
So the cache holds only ``[c, k_rope]`` a token, all heads share it, and `hal.mla_decode` does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

import hal
from examples.deepseek_v3.cache import LatentCache

Rotate = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of a step share.

    Attributes
    ----------
    live : int
        Token rows in use; those after them are empty.
    slots : Tensor
        [live] int64, where their latents go in the cache.
    block_table, cache_seqlens, cu_seqlens_q : Tensor
        Of the sequences of this step, as `hal.mla_decode` takes them; lengths include this step's tokens.
    plan : hal.MlaPlan or None
        None where no row is in use.
    """

    live: int
    slots: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    cu_seqlens_q: Tensor
    plan: hal.MlaPlan | None


class AbsorbedAttention(nn.Module):
    """Stands in for ``DeepseekV3Attention`` or ``DeepseekV2Attention`` and uses its weights.

    Parameters
    ----------
    original : Module
        The attention it replaces.
    cache : LatentCache
    backend : str
    batch_invariant : bool
        Ask the kernel for bits that do not depend on the batch.
    """

    step: Step | None = None

    def __init__(self, original: Any, cache: LatentCache, backend: str, batch_invariant: bool) -> None:
        super().__init__()
        self._layer, self._heads, self._scale = original.layer_idx, original.num_heads, original.scaling
        self._nope, self._rope = original.qk_nope_head_dim, original.qk_rope_head_dim
        self._latent = original.kv_lora_rank
        self._cache, self._backend, self._invariant = cache, backend, batch_invariant
        self._rotate = _rotation(original)
        if original.q_lora_rank is None:
            self.project_q = original.q_proj
        else:
            self.project_q = nn.Sequential(original.q_a_proj, original.q_a_layernorm, original.q_b_proj)
        self.kv_a_proj_with_mqa, self.kv_a_layernorm = original.kv_a_proj_with_mqa, original.kv_a_layernorm
        self.o_proj = original.o_proj
        weight = original.kv_b_proj.weight.view(self._heads, self._nope + original.v_head_dim, self._latent)
        # Products between two roundings stay in float32: absorbing puts one more product there than transformers has.
        self.key_part = nn.Buffer(weight[:, : self._nope].float())  # [h, nope, latent]
        self.value_part = nn.Buffer(weight[:, self._nope :].mT.float())  # [h, latent, v]

    def forward(self, hidden_states: Tensor, position_embeddings: Any, **_: Any) -> tuple[Tensor, None]:
        """Attend: [1, rows, hidden] → [1, rows, hidden]. Empty rows come out as anything finite."""
        step = self.step
        assert step is not None
        rows = hidden_states.shape[1]
        q = self.project_q(hidden_states).view(1, rows, self._heads, self._nope + self._rope).transpose(1, 2)
        q_nope, q_rope = q.split((self._nope, self._rope), -1)
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split((self._latent, self._rope), -1)
        q_rope, k_rope = self._rotate(q_rope, k_rope.unsqueeze(1), position_embeddings)

        key = torch.cat((self.kv_a_layernorm(latent)[0], k_rope[0, 0]), -1)
        self._cache.write(self._layer, step.slots, key[: step.live])
        absorbed = (q_nope[0].float() @ self.key_part).to(q.dtype)
        query = torch.cat((absorbed, q_rope[0]), -1).transpose(0, 1).contiguous()
        attended = query.new_zeros(rows, self._heads, self._latent)
        if step.live:
            hal.mla_decode(
                query[: step.live],
                self._cache.layers[self._layer],
                step.block_table,
                step.cache_seqlens,
                head_dim_v=self._latent,
                softmax_scale=self._scale,
                causal=True,
                plan=step.plan,
                out=attended[: step.live],
                cu_seqlens_q=step.cu_seqlens_q,
                batch_invariant=self._invariant,
                backend=self._backend,
            )
        values = attended.transpose(0, 1).float() @ self.value_part  # [h, rows, v]
        flat = values.transpose(0, 1).reshape(1, rows, -1)
        return nn.functional.linear(flat, self.o_proj.weight.float()).to(q.dtype), None


def _rotation(original: Any) -> Rotate:
    """The model's own rotary embedding of q [1, h, rows, rope] and k [1, 1, rows, rope]."""
    if isinstance(original, v2.DeepseekV2Attention):
        return v2.apply_rotary_emb
    turn = v3.apply_rotary_pos_emb_interleave if original.config.rope_interleave else v3.apply_rotary_pos_emb
    return lambda q, k, embeddings: turn(q, k, *embeddings)
