"""Exchanging attention and experts in a transformers model, and nothing else."""

from __future__ import annotations

from typing import Any

import hal
from examples.deepseek_v3.attention import AbsorbedAttention, Step
from examples.deepseek_v3.cache import LatentCache
from examples.deepseek_v3.experts import HalExperts


class HalModel:
    """A model whose attention and routed experts run through the HAL.

    Parameters
    ----------
    model : DeepseekV3ForCausalLM or DeepseekV2ForCausalLM
        Changed in place.
    cache : LatentCache
    buffer : hal.EpBuffer
    backend : str
    batch_invariant : bool
        Passed to `hal.mla_decode`.
    """

    def __init__(
        self, model: Any, cache: LatentCache, buffer: hal.EpBuffer, backend: str, batch_invariant: bool
    ) -> None:
        self._model = model
        self._attentions: list[AbsorbedAttention] = []
        self._experts: list[HalExperts] = []
        for layer in self._model.model.layers:
            layer.self_attn = AbsorbedAttention(layer.self_attn, cache, backend, batch_invariant)
            self._attentions.append(layer.self_attn)
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts = HalExperts(layer.mlp.experts, buffer)
                self._experts.append(layer.mlp.experts)
        self._model.to(device=buffer.args.device)

    def forward(self, tokens: Any, positions: Any, step: Step) -> Any:
        """Logits [rows, vocabulary] of a step of token rows; collective if the model has experts."""
        for attention in self._attentions:
            attention.step = step
        for experts in self._experts:
            experts.live = step.live
        # The mask is never looked at: a ready one spares transformers building its own.
        unused = tokens.new_empty(1, 1, 1, 1, dtype=self._model.dtype)
        output = self._model(
            input_ids=tokens[None], position_ids=positions[None], attention_mask=unused, use_cache=False
        )
        return output.logits[0]
