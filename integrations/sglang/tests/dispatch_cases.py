"""What ranks do in `test_hal_sglang`: dispatch, their experts, combine, compared with a dense mixture of experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from seeds import SEED
from torch import Tensor

import hal
from integrations.recorded import engine

INTERFACE = Path(__file__).with_name("interface.json")
EXPERTS, HIDDEN, TOPK, FEATURES = 6, 128, 3, 32
# One rounding of every expert's output to bf16 and one of the sum; with FP8 rows three bits of mantissa.
TOLERANCE = {"bf16": 0.02, "fp8": 0.1}


def over_engine(rank: int, case: Callable[..., Any], *args: Any) -> Any:
    """Run a case over SGLang's release, or over its recorded interface."""
    with engine(INTERFACE):
        from hal_sglang import buffers

        try:
            return case(rank, *args)
        finally:
            buffers.close()


def network(x: Tensor, weights: Tensor, expert: int) -> Tensor:
    """One expert: a feed-forward network."""
    return torch.tanh(x.float() @ weights[expert].T) @ weights[expert]


def made(mode: str, **change: Any) -> Any:
    """A dispatcher as SGLang makes one for each layer."""
    from hal_sglang.dispatcher import HalDispatcher
    from sglang.srt.layers.moe.utils import DeepEPMode

    given = {
        "group": dist.group.WORLD,
        "router_topk": TOPK,
        "permute_fusion": True,
        "num_experts": EXPERTS,
        "num_local_experts": EXPERTS // dist.get_world_size(),
        "hidden_size": HIDDEN,
        "params_dtype": torch.bfloat16,
        "deepep_mode": DeepEPMode[mode],
        "async_finish": True,
        "return_recv_hook": True,
    }
    return HalDispatcher(**{**given, **change})


def routed(rank: int, step: int, tokens: int) -> tuple[Tensor, Any]:
    """Rows of a rank and where its router sends them: int32 ids, some of them no expert, as SGLang has them."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    seed = torch.Generator().manual_seed(SEED + 100 * step + rank)
    x = torch.randn(tokens, HIDDEN, generator=seed).bfloat16()
    ids = torch.rand(tokens, EXPERTS, generator=seed).topk(TOPK, 1).indices.int()
    weights = torch.rand(tokens, TOPK, generator=seed)
    ids[tokens // 2 :, -1] = -1
    return x, StandardTopKOutput(weights, ids, torch.zeros(tokens, EXPERTS))


def dense(x: Tensor, topk: Any, weights: Tensor) -> Tensor:
    """The same without communication: every expert for every token, then the routed ones."""
    everything = torch.stack([network(x, weights, expert) for expert in range(EXPERTS)], 1)
    chosen = everything.gather(1, topk.topk_ids.clamp(min=0).long()[:, :, None].expand(-1, -1, HIDDEN))
    return (chosen * (topk.topk_weights * (topk.topk_ids >= 0))[:, :, None]).sum(1)


def experts(received: Any, weights: Tensor) -> Any:
    """What SGLang's runners do with either output: the combine input of the same format."""
    from sglang.srt.layers.moe.token_dispatcher import deepep

    first = dist.get_rank() * (EXPERTS // dist.get_world_size())
    x = received.hidden_states
    if received.hidden_states_scale is not None:
        x = x.float() * received.hidden_states_scale.repeat_interleave(128, -1)
    y = torch.zeros(x.shape)
    if received.format.name == "DEEPEP_NORMAL":
        counts = [0] * (EXPERTS // dist.get_world_size())
        for row, (ids, given) in enumerate(zip(received.topk_ids.tolist(), received.topk_weights, strict=True)):
            for expert, weight in zip(ids, given, strict=True):
                if expert >= 0:
                    counts[expert] += 1
                    y[row] += weight * network(x[row], weights, first + expert)
        assert received.num_recv_tokens_per_expert == counts
        return deepep.DeepEPNormalCombineInput(y.bfloat16(), received.topk_ids, received.topk_weights)
    for local, count in enumerate(received.masked_m.tolist()):
        y[local, :count] = network(x[local, :count], weights, first + local)
    assert received.expected_m >= 1
    return deepep.DeepEPLLCombineInput(y.bfloat16(), received.topk_ids, received.topk_weights)


def weights_of_all() -> Tensor:
    """Every expert's weights, the same on every rank."""
    return torch.randn(EXPERTS, FEATURES, HIDDEN, generator=torch.Generator().manual_seed(SEED)) / HIDDEN**0.5


def layers(rank: int, mode: str, dtype: str, staged: bool) -> None:
    """Two layers, several steps of different sizes, one of them empty on a rank."""
    from hal_sglang import buffers, dispatcher
    from sglang.srt.layers.moe.utils import DispatcherOutputDtype

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatcher, "get_deepep_output_dtype", lambda made: DispatcherOutputDtype[dtype.upper()])
        weights = weights_of_all()
        stack = [made(mode) for _ in range(2)]
        for step, tokens in enumerate((7, 0 if rank else 3, 1, 12)):
            for layer in stack:
                x, topk = routed(rank, step, tokens)
                if staged:
                    layer.dispatch_a(x, topk)
                    received = layer.dispatch_b()
                    layer.combine_a(experts(received, weights))
                    sums = layer.combine_b()
                else:
                    received = layer.dispatch(hidden_states=x, topk_output=topk)
                    sums = layer.combine(combine_input=experts(received, weights))
                assert sums.shape == x.shape
                assert sums.dtype == x.dtype
                torch.testing.assert_close(sums.float(), dense(x, topk, weights), rtol=0.05, atol=TOLERANCE[dtype])
        assert len(buffers._open) == 1, "layers share their buffer"


def automatic(rank: int) -> None:
    """A batch with a prefill in it goes the normal way, the others the fast one."""
    from hal_sglang import dispatcher

    formats = []
    layer = made("AUTO")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatcher, "get_deepep_output_dtype", lambda made: dispatcher.DispatcherOutputDtype.BF16)
        for prefill in (True, False, True):
            patch.setattr(dispatcher, "get_is_extend_in_batch", lambda prefill=prefill: prefill)
            x, topk = routed(rank, 0, 5)
            received = layer.dispatch(x, topk)
            formats.append(received.format.name)
            sums = layer.combine(experts(received, weights_of_all()))
            torch.testing.assert_close(sums.float(), dense(x, topk, weights_of_all()), rtol=0.05, atol=0.02)
    assert formats == ["DEEPEP_NORMAL", "DEEPEP_LL", "DEEPEP_NORMAL"]


def two_in_flight(rank: int) -> None:
    """Two micro-batches overlap: the second is sent while the first computes."""
    from hal_sglang import dispatcher

    weights = weights_of_all()
    pair = [made("LOW_LATENCY") for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatcher, "get_deepep_output_dtype", lambda made: dispatcher.DispatcherOutputDtype.BF16)
        for step in range(3):
            sent = [routed(rank, 2 * step + half, 4 + half) for half in range(2)]
            pair[0].dispatch_a(*sent[0])
            first = pair[0].dispatch_b()
            pair[1].dispatch_a(*sent[1])
            pair[0].combine_a(experts(first, weights))
            second = pair[1].dispatch_b()
            sums = [pair[0].combine_b()]
            pair[1].combine_a(experts(second, weights))
            sums.append(pair[1].combine_b())
            for (x, topk), got in zip(sent, sums, strict=True):
                torch.testing.assert_close(got.float(), dense(x, topk, weights), rtol=0.05, atol=0.02)


def hooks_and_order(rank: int) -> None:
    """Hooks run between the stages; a stage out of turn is refused and changes nothing."""
    from hal_sglang import dispatcher

    weights, ran = weights_of_all(), []
    layer = made("NORMAL")
    handle = layer.register_deepep_dispatch_hook(lambda one: ran.append(one._stage))
    x, topk = routed(rank, 0, 4)
    for stage, call in (("dispatch_b", layer.dispatch_b), ("combine_b", layer.combine_b)):
        with pytest.raises(hal.SpecError) as caught:
            call()
        assert caught.value.argument == stage
    received = layer.dispatch(x, topk)
    assert ran == [1], "once, when rows are on their way"
    with pytest.raises(hal.SpecError, match="combine_a, which comes next"):
        layer.dispatch(x, topk)
    sums = layer.combine(experts(received, weights))
    torch.testing.assert_close(sums.float(), dense(x, topk, weights), rtol=0.05, atol=0.02)
    handle.remove()
    layer.combine(experts(layer.dispatch(x, topk), weights))
    assert ran == [1]
    with pytest.raises(hal.UnsupportedError) as refused:
        layer.set_overlap_args(object(), {})
    assert refused.value.argument == "combine_overlap_args"
    fast = made("LOW_LATENCY")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatcher, "get_deepep_output_dtype", lambda made: dispatcher.DispatcherOutputDtype.NVFP4)
        with pytest.raises(hal.UnsupportedError) as refused:
            fast.dispatch(x, topk)
    assert refused.value.argument == "deepep_dispatcher_output_dtype"
    for change, argument in (
        ({"num_experts": None}, "num_experts"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_local_experts": 1}, "num_local_experts"),
    ):
        with pytest.raises(hal.SpecError) as caught:
            made("NORMAL", **change)
        assert caught.value.argument == argument
