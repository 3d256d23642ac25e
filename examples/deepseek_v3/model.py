"""Tiny DeepSeek models with seeded weights: every choice of the architecture, the real sizes only where the HAL looks.

The latent cache has the real 512 + 64 columns and its real page size; heads, layers and experts are few.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import torch
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
)

DTYPES: Final = {"float32": torch.float32, "bf16": torch.bfloat16}

_SIZES: Final[dict[str, Any]] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "kv_lora_rank": 512,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "initializer_range": 0.06,  # activations of order 1, so that attention and routing are far from uniform
    "bos_token_id": None,
    "eos_token_id": None,  # every prompt gets all its tokens
    "max_position_embeddings": 163840,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
_YARN: Final = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 4096,
}


def make_config(name: str) -> Any:
    """The tiny configuration ``"v3"``, or ``"v2"`` with that model's routing and uncompressed queries as in V2-Lite."""
    if name == "v3":
        rope = {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
        return DeepseekV3Config(
            **_SIZES, q_lora_rank=96, n_shared_experts=1, routed_scaling_factor=2.5, rope_parameters=rope
        )
    rope = {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
    return DeepseekV2Config(
        **_SIZES, q_lora_rank=None, n_shared_experts=2, topk_method="group_limited_greedy", rope_parameters=rope
    )


def build_model(name: str, seed: int) -> PreTrainedModel:
    """An untouched float32 model whose weights depend only on the seed.

    Every weight is a bfloat16 number, as in a published checkpoint: the dtypes compute with the same weights, and what
    differs between their results is arithmetic alone.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        config = make_config(name)
        model: Any = (DeepseekV3ForCausalLM if name == "v3" else DeepseekV2ForCausalLM)(config)
        model.eval()
        with torch.no_grad():
            for part in model.modules():
                if type(part).__name__.endswith("RMSNorm"):
                    part.weight.normal_(1.0, 0.1)
                bias = getattr(part, "e_score_correction_bias", None)
                if bias is not None:
                    bias.normal_(0.0, 0.05)
            for tensor in model.state_dict().values():
                tensor.copy_(tensor.bfloat16())
    model.requires_grad_(False)
    untouched: PreTrainedModel = model
    return untouched


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of a float32 model in another dtype, as ``from_pretrained(dtype=…)`` would have loaded it."""
    original: Any = model
    made: Any = copy.deepcopy(original).to(dtype)
    # What transformers keeps in float32 whatever the model's dtype: the rotary frequencies and the router's bias.
    made.model.rotary_emb = copy.deepcopy(original.model.rotary_emb)
    for part, exact in zip(made.modules(), original.modules(), strict=True):
        if hasattr(part, "e_score_correction_bias"):
            part.e_score_correction_bias = nn.Buffer(exact.e_score_correction_bias.clone())
    converted: PreTrainedModel = made
    return converted


def make_prompts(count: int, vocabulary: int, seed: int, longest: int = 90) -> list[list[int]]:
    """Seeded token ids, the shortest prompt 3 tokens and the longest ``longest``, in mixed order."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(3, longest, count).round().long()[torch.randperm(count, generator=generator)]
    return [torch.randint(vocabulary, (int(n),), generator=generator).tolist() for n in lengths]
