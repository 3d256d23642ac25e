"""What a rank does in the tests of the drop-in ``deep_ep``."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import hal
from hal.compat import deep_ep

X = torch.ones(3, 128, dtype=torch.bfloat16)
IDX = torch.tensor([[0, 1], [2, -1], [3, 0]])
WEIGHTS = torch.ones(3, 2)

V1: list[tuple[str, dict[str, Any], str]] = [
    ("dispatch", {"x": None}, "x"),
    ("dispatch", {"x": X.float().to(torch.float8_e4m3fn)}, "x"),
    ("dispatch", {"x": (X, X.float())}, "x"),
    ("dispatch", {"x": (X.to(torch.float8_e4m3fn), None)}, "x"),
    ("dispatch", {"x": X[:, :7].contiguous()}, "x"),
    ("dispatch", {"num_tokens_per_rank": None}, "num_tokens_per_rank"),
    ("dispatch", {"num_tokens_per_rank": torch.zeros(5, dtype=torch.int32)}, "num_tokens_per_rank"),
    ("dispatch", {"is_token_in_rank": None}, "is_token_in_rank"),
    ("dispatch", {"is_token_in_rank": torch.zeros(3, 1, dtype=torch.bool)}, "is_token_in_rank"),
    ("dispatch", {"num_tokens_per_expert": None}, "num_tokens_per_expert"),
    ("dispatch", {"topk_idx": IDX.int()}, "topk_idx"),
    ("dispatch", {"topk_idx": IDX[:2]}, "topk_idx"),
    ("dispatch", {"topk_idx": None}, "topk_weights"),
    ("dispatch", {"topk_weights": WEIGHTS.double()}, "topk_weights"),
    ("dispatch", {"expert_alignment": 0}, "expert_alignment"),
    ("dispatch", {"num_worst_tokens": 1.5}, "num_worst_tokens"),
    ("dispatch", {"num_worst_tokens": 1}, "num_worst_tokens"),
    ("dispatch", {"config": 24}, "config"),
    ("dispatch", {"previous_event": 3}, "previous_event"),
    ("dispatch", {"async_finish": 2}, "async_finish"),
    ("dispatch", {"allocate_on_comm_stream": True}, "allocate_on_comm_stream"),
    ("dispatch", {"handle": (1, 2)}, "topk_idx"),
    ("dispatch", {"handle": (1, 2), "topk_idx": None, "topk_weights": None}, "handle"),
    ("combine", {"handle": None}, "handle"),
    ("combine", {"handle": "packed"}, "handle"),
    ("combine", {"x": X[:1]}, "x"),
    ("combine", {"bias": (X, X, X)}, "bias"),
    ("combine", {"topk_weights": WEIGHTS[:, :1]}, "topk_weights"),
    ("low_latency_dispatch", {"x": X[0]}, "x"),
    ("low_latency_dispatch", {"num_max_dispatch_tokens_per_rank": 0}, "num_max_dispatch_tokens_per_rank"),
    ("low_latency_dispatch", {"num_max_dispatch_tokens_per_rank": 2}, "x"),
    ("low_latency_dispatch", {"num_experts": None}, "num_experts"),
    ("low_latency_dispatch", {"use_ue8m0": True}, "use_ue8m0"),
    ("low_latency_dispatch", {"use_nvfp4": True}, "use_nvfp4"),
    ("low_latency_dispatch", {"x_global_scale": torch.ones(())}, "x_global_scale"),
    ("low_latency_dispatch", {"topk_weights": WEIGHTS}, "topk_weights"),
    ("low_latency_dispatch", {"async_finish": True, "return_recv_hook": True}, "return_recv_hook"),
    ("low_latency_combine", {"handle": "normal"}, "handle"),
    ("low_latency_combine", {"handle": (1, 2, 3, 4, 5)}, "handle"),
    ("low_latency_combine", {"use_logfmt": True}, "use_logfmt"),
    ("low_latency_combine", {"overlap": True, "packed_recv_count": WEIGHTS, "comp_signal": WEIGHTS}, "overlap"),
    ("low_latency_combine", {"src_signals": WEIGHTS, "src_signal_expect_value": 3}, "src_signals"),
    ("low_latency_combine", {"zero_copy": True}, "zero_copy"),
    ("low_latency_combine", {"topk_weights": None}, "topk_weights"),
    ("low_latency_combine", {"out": X[:1]}, "out"),
    ("low_latency_update_mask_buffer", {"rank_to_mask": 0, "mask": True}, "rank_to_mask"),
    ("low_latency_update_mask_buffer", {"rank_to_mask": 9, "mask": True}, "rank_to_mask"),
    ("low_latency_query_mask_buffer", {"mask_status": X}, "mask_status"),
    ("get_next_low_latency_combine_buffer", {"handle": ()}, "handle"),
    ("clean_low_latency_buffer", {"num_max_dispatch_tokens_per_rank": 3, "hidden": 0, "num_experts": 4}, "hidden"),
    ("get_dispatch_layout", {"topk_idx": IDX, "num_experts": 0}, "num_experts"),
    ("get_dispatch_layout", {"topk_idx": IDX, "num_experts": 2}, "topk_idx"),
    ("get_local_buffer_tensor", {"dtype": torch.uint8}, "get_local_buffer_tensor"),
    ("set_num_sms", {"new_num_sms": 3}, "new_num_sms"),
]

V2: list[tuple[str, dict[str, Any], str]] = [
    ("dispatch", {"x": 3}, "x"),
    ("dispatch", {"num_max_tokens_per_rank": 2}, "x"),
    ("dispatch", {"topk_idx": None}, "topk_idx"),
    ("dispatch", {"num_experts": None}, "num_experts"),
    ("dispatch", {"num_experts": 2}, "topk_idx"),
    ("dispatch", {"expert_alignment": 0}, "expert_alignment"),
    ("dispatch", {"cumulative_local_expert_recv_stats": torch.zeros(3)}, "cumulative_local_expert_recv_stats"),
    ("dispatch", {"num_sms": -1}, "num_sms"),
    ("dispatch", {"do_cpu_sync": 2}, "do_cpu_sync"),
    ("dispatch", {"do_zero_padding": True}, "do_zero_padding"),
    ("dispatch", {"previous_event": "now", "allocate_on_comm_stream": True}, "previous_event"),
    ("dispatch", {"previous_event": deep_ep.EventHandle()}, "allocate_on_comm_stream"),
    ("dispatch", {"handle": (1,)}, "handle"),
    ("dispatch", {"handle": "own"}, "topk_idx"),
    ("dispatch", {"handle": "own", "do_cpu_sync": True}, "do_cpu_sync"),
    ("dispatch", {"handle": "own", "do_expand": True}, "do_expand"),
    ("combine", {"handle": 3}, "handle"),
    ("combine", {"x": X[:, :64].contiguous()}, "x"),
    ("combine", {"topk_weights": WEIGHTS[0]}, "topk_weights"),
    ("engram_write", {"storage": X}, "engram_write"),
    ("pp_send", {"t": X, "dst_rank_idx": 0}, "pp_send"),
    ("all_gather", {"t": X}, "all_gather"),
    ("get_pp_buffer_size_hint", {"num_max_tensor_bytes": 1, "num_max_inflight_tensors": 1}, "get_pp_buffer_size_hint"),
]


def refused(rank: int) -> int:
    """Every wrong call names the caller's argument, and a correct call still works after all of them."""
    group = dist.group.WORLD
    buffer = deep_ep.Buffer(group, low_latency_mode=True, explicitly_destroy=True, enable_shrink=True)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(IDX, 4)
    right: dict[str, dict[str, Any]] = {
        "dispatch": {
            "x": X,
            "num_tokens_per_rank": per_rank,
            "is_token_in_rank": in_rank,
            "num_tokens_per_expert": per_expert,
            "topk_idx": IDX,
            "topk_weights": WEIGHTS,
        },
        "low_latency_dispatch": {
            "x": X,
            "topk_idx": IDX,
            "num_max_dispatch_tokens_per_rank": 4,
            "num_experts": 4,
        },
    }
    normal = buffer.dispatch(**right["dispatch"])[4]
    packed_x, _, packed, _, _ = buffer.low_latency_dispatch(**right["low_latency_dispatch"], use_fp8=False)
    right["combine"] = {"x": X, "handle": normal}
    right["low_latency_combine"] = {"x": packed_x, "topk_idx": IDX, "topk_weights": WEIGHTS, "handle": packed}
    handles = {"normal": normal, "packed": packed}
    for name, change, argument in V1:
        call = {**right.get(name, {}), **change}
        if isinstance(call.get("handle"), str):
            call["handle"] = handles[call["handle"]]
        with pytest.raises((hal.SpecError, hal.UnsupportedError)) as caught:
            getattr(buffer, name)(**call)
        assert caught.value.argument == argument, f"{name}({change}): {caught.value}"
    assert torch.equal(buffer.combine(**right["combine"])[0], X)
    assert torch.equal(buffer.low_latency_combine(**right["low_latency_combine"])[0], X * torch.tensor([[2], [1], [2]]))
    with pytest.raises(hal.SpecError, match="asynchronous"):
        buffer.combine(**right["combine"])[2].current_stream_wait()
    for name in ("runtime", "nvshmem_qp_depth"):
        with pytest.raises(hal.UnsupportedError, match=name):
            getattr(buffer, name)
    buffer.destroy()
    for name, call in right.items():
        with pytest.raises(hal.SpecError, match="destroyed"):
            getattr(buffer, name)(**call)
    plain = deep_ep.Buffer(group)
    for name, call, argument in (
        ("destroy", {}, "explicitly_destroy"),
        ("low_latency_clean_mask_buffer", {}, "enable_shrink"),
        ("low_latency_dispatch", right["low_latency_dispatch"], "low_latency_mode"),
    ):
        with pytest.raises(hal.SpecError) as caught:
            getattr(plain, name)(**call)
        assert caught.value.argument == argument
    return len(V1)


def refused_elastic(rank: int) -> int:
    """As `refused`, of V2."""
    buffer = deep_ep.ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=8, hidden=128, explicitly_destroy=True)
    dispatch = {"x": X, "topk_idx": IDX, "topk_weights": WEIGHTS, "num_experts": 4}
    own = buffer.dispatch(**dispatch)[3]
    right = {"dispatch": dispatch, "combine": {"x": X, "handle": own}}
    for name, change, argument in V2:
        call = {**right.get(name, {}), **change}
        if call.get("handle") == "own":
            call["handle"] = own
        with pytest.raises((hal.SpecError, hal.UnsupportedError)) as caught:
            getattr(buffer, name)(**call)
        assert caught.value.argument == argument, f"{name}({change}): {caught.value}"
    assert torch.equal(buffer.combine(**right["combine"])[0], X)
    with buffer.agrs_new_session(enabled=False):
        pass
    assert own.cached_recv_src_metadata_before_sort is None
    for name in ("runtime", "nccl_comm_handle"):
        with pytest.raises(hal.UnsupportedError, match=name):
            getattr(buffer, name)
    for change, argument in (
        ({"num_bytes": 3}, "num_bytes"),
        ({"hidden": 0}, "hidden"),
        ({"num_cpu_bytes": 1 << 21, "num_bytes": 1 << 22}, "num_cpu_bytes"),
        ({"deterministic": 2}, "deterministic"),
    ):
        given = {"num_max_tokens_per_rank": 8, "hidden": 128, **change}
        with pytest.raises((hal.SpecError, hal.UnsupportedError)) as caught:
            deep_ep.ElasticBuffer(dist.group.WORLD, **given)
        assert caught.value.argument == argument
    buffer.destroy()
    buffer.destroy()
    return len(V2)


def flags(rank: int) -> None:
    """Scripts pass flags as their command line gives them; the published code takes 0 and 1 for False and True."""
    elastic = deep_ep.ElasticBuffer(
        dist.group.WORLD,
        num_max_tokens_per_rank=8,
        hidden=128,
        deterministic=0,
        allow_hybrid_mode=1,
        allow_multiple_reduction=1,
        explicitly_destroy=1,
    )
    assert elastic.allow_hybrid_mode is True
    sent = elastic.dispatch(X, IDX, WEIGHTS, num_experts=4, do_cpu_sync=1, do_expand=0)
    sent[3].deterministic_sort(True, False, sent[0], None, sent[1], sent[2], None)
    assert torch.equal(elastic.combine(sent[0], sent[3])[0], X)
    elastic.destroy()
    buffer = deep_ep.Buffer(dist.group.WORLD, 0, 0, 1, explicitly_destroy=1)
    packed, _, handle, _, hook = buffer.low_latency_dispatch(X, IDX, 8, 4, use_fp8=0, return_recv_hook=1)
    assert hook is not None
    hook()
    buffer.low_latency_combine(packed, IDX, WEIGHTS, handle, 0, 0, 0)
    buffer.destroy()


def geometries(rank: int) -> None:
    """One buffer serves several sizes, modes and element types, each opened once."""
    buffer = deep_ep.Buffer(dist.group.WORLD, low_latency_mode=True)
    before = deep_ep.Buffer.capture()
    opened = []
    for _ in range(2):
        for hidden, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float32)):
            x = torch.full((5 + rank, hidden), 1.0 + rank, dtype=dtype)
            idx = torch.arange(5 + rank)[:, None] % 6
            layout = buffer.get_dispatch_layout(idx, 6, previous_event=before)
            passed = {"num_tokens_per_rank": layout[0], "is_token_in_rank": layout[3]}
            sent = buffer.dispatch(x, num_tokens_per_expert=layout[2], topk_idx=idx, **passed)
            assert torch.equal(buffer.combine(sent[0], sent[4])[0], x)
            packed = buffer.low_latency_dispatch(x, idx, 8, 6, use_fp8=False)
            weights = torch.ones(len(x), 1)
            assert torch.equal(buffer.low_latency_combine(packed[0], idx, weights, packed[2])[0], x)
        opened.append(len(buffer._pool._open))
    assert opened[0] == opened[1]


def processors(rank: int) -> None:
    """What every way of saying how many processors kernels may take comes to, of each call."""
    seen: list[int | None] = []
    for name in ("dispatch", "combine"):
        call = getattr(hal.EpBuffer, name)
        spied = lambda self, *given, _call=call, **named: (seen.append(self.num_sms), _call(self, *given, **named))[1]  # noqa: E731
        setattr(hal.EpBuffer, name, spied)
    x, idx = torch.ones(3, 64).bfloat16(), torch.tensor([[0], [3], [1]])
    buffer = deep_ep.Buffer(dist.group.WORLD)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 4)
    routes = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    for default, config in ((20, None), (6, None), (6, deep_ep.Config(4)), (6, deep_ep.Config(0)), (0, None)):
        deep_ep.Buffer.set_num_sms(default)
        sent = buffer.dispatch(x, topk_idx=idx, **routes, config=config)
        buffer.dispatch(x, handle=sent[4], config=config)
        buffer.combine(sent[0], sent[4], config=config)
    assert seen == [one for one in (20, 6, 4, None, None) for _ in range(3)]
    seen.clear()
    elastic = deep_ep.ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=8, hidden=64, num_topk=1)
    for sms in (8, 0):
        recv, _, _, handle, _ = elastic.dispatch(x, idx, num_experts=4, num_sms=sms)
        elastic.dispatch(x, handle=handle, num_sms=sms)
        elastic.combine(recv, handle, num_sms=sms)
    assert seen == [8, 8, 8, None, None, None]


def told(rank: int) -> str:
    """What `hal.EpBuffer` finds wrong with one rank's call, the others are told; experts need not divide by ranks."""
    buffer = deep_ep.Buffer(dist.group.WORLD)
    x, idx = torch.ones(3, 64).bfloat16(), torch.tensor([[0, 4], [2, -1], [3, 0]])
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 5)
    passed = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    sent = buffer.dispatch(x, expert_alignment=4, **passed)
    assert sent[3] == ([4, 0, 4], [4, 4, 0])[rank]
    with pytest.raises(hal.UnsupportedError) as refused:
        buffer.combine(sent[0], sent[4], topk_weights=torch.ones(len(sent[0]), 2))
    assert refused.value.argument == "topk_weights"
    assert torch.equal(buffer.combine(sent[0], sent[4])[0], x * in_rank.sum(1, keepdim=True))
    with pytest.raises(hal.SpecError) as caught:
        buffer.combine(sent[0], sent[4], bias=x[:1] if rank else None)
    return caught.value.argument


def nodes(rank: int) -> None:
    """Over several nodes both modes are the same."""
    os.environ["HAL_EP_RANKS_PER_NODE"] = "1"
    buffer = deep_ep.Buffer(dist.group.WORLD, low_latency_mode=True)
    x, idx = torch.randn(3, 64).bfloat16(), torch.tensor([[0, 3], [2, -1], [1, 0]])
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 4)
    assert torch.equal(per_rank, per_node)
    passed = {"num_tokens_per_rank": per_rank, "num_tokens_per_rdma_rank": per_node, "is_token_in_rank": in_rank}
    sent = buffer.internode_dispatch(x, num_tokens_per_expert=per_expert, topk_idx=idx, **passed)
    assert [part.dtype for part in sent[4]] == [torch.bool, *[torch.int32] * 6, torch.uint8, torch.int32, torch.int32]
    assert torch.equal(sent[4][0], in_rank)
    assert sent[4][1].tolist() == sent[4][2].tolist() == sent[4][3].tolist() == [[2], [2]]
    assert sent[4][4].tolist() == sent[4][6].tolist() == [2, 4]
    assert sent[4][5].tolist() == [[0], [2]]
    assert sent[4][7].view(torch.int32).tolist() == [[0, 1], [0, 1], [1, 1], [1, 1]]
    assert sent[4][8].tolist() == [[0, 0], [-1, 1], [1, -1]]
    assert sent[4][9].tolist() == [[0], [1], [2], [3]]
    again = buffer.internode_dispatch(x, handle=sent[4])
    assert torch.equal(again[0], sent[0])
    assert again[1:5] == (None,) * 4
    sums = buffer.internode_combine(sent[0], sent[4])[0]
    torch.testing.assert_close(sums, x * in_rank.sum(1, keepdim=True))
    packed = buffer.low_latency_dispatch(x, idx, 4, 4, use_fp8=False)
    weights = torch.ones(3, 2)
    sums = buffer.low_latency_combine(packed[0], idx, weights, packed[2])[0]
    torch.testing.assert_close(sums, x * (idx >= 0).sum(1, keepdim=True))
    dist.barrier()
    assert deep_ep.ElasticBuffer(dist.group.WORLD, 1 << 21).get_physical_domain_size() == (2, 1)
    assert deep_ep.get_physical_domain_size(dist.group.WORLD) == (2, 1)
    assert deep_ep.get_logical_domain_size(dist.group.WORLD, allow_hybrid_mode=1) == (1, 2)


def two_a_node(rank: int, per_node: int) -> None:
    """The ten tensors of a handle between nodes of several ranks, as DeepEP's own check of a dispatch reads them."""
    os.environ["HAL_EP_RANKS_PER_NODE"] = str(per_node)
    size, experts = dist.get_world_size(), 2 * dist.get_world_size()
    nodes = -(-size // per_node)
    buffer = deep_ep.Buffer(dist.group.WORLD)
    number = 4 + rank
    x = torch.full((number, 64), float(rank)).bfloat16()
    idx = torch.rand(number, experts, generator=torch.Generator().manual_seed(rank)).topk(3).indices
    per_rank, to_nodes, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, experts)
    passed = {"num_tokens_per_rank": per_rank, "num_tokens_per_rdma_rank": to_nodes, "is_token_in_rank": in_rank}
    sent = buffer.dispatch(
        x,
        num_tokens_per_expert=per_expert,
        topk_idx=idx,
        topk_weights=torch.ones(idx.shape),
        config=deep_ep.Buffer.get_dispatch_config(size),
        previous_event=buffer.capture(),
        async_finish=True,
        allocate_on_comm_stream=True,
        **passed,
    )
    sent[5].current_stream_wait()
    received, handle = sent[0], sent[4]
    rows = len(received)
    ends = handle[-4]
    start = 0
    for source, end in enumerate(ends.tolist()):
        assert (received[start:end] == source).all()
        assert (handle[7][start:end].view(torch.int32)[:, 0] == source // per_node).all()
        start = end
    assert start == rows == handle[7].shape[0] == handle[9].shape[0]
    assert torch.equal(handle[1][:, 0], to_nodes)
    assert torch.equal(handle[2][:, 0], per_rank)
    assert handle[4].tolist() == [ends[min((n + 1) * per_node, size) - 1].item() for n in range(nodes)]
    assert handle[8].shape == (number, nodes)
    assert torch.equal((handle[8] >= 0).sum(0), to_nodes)
    assert torch.equal(handle[5][:, 0], ends - ends.diff(prepend=ends.new_zeros(1)))
    again = buffer.dispatch(x * 2, handle=handle, config=deep_ep.Buffer.get_dispatch_config(size))
    assert torch.equal(again[0], received * 2)
    out = buffer.combine(received, handle, topk_weights=sent[2], config=deep_ep.Buffer.get_combine_config(size))
    assert torch.equal(out[0], x * in_rank.sum(1, keepdim=True))
    assert torch.equal(out[1], torch.ones(idx.shape))


def disagreement(rank: int) -> str:
    """A geometry that differs between ranks is refused by all of them when it is opened."""
    buffer = deep_ep.Buffer(dist.group.WORLD, low_latency_mode=True)
    x = torch.ones(2, 64 * (1 + rank), dtype=torch.bfloat16)
    with pytest.raises(hal.SpecError) as caught:
        buffer.low_latency_dispatch(x, torch.zeros(2, 1, dtype=torch.int64), 4, 4)
    return caught.value.argument


def death(rank: int, shrink: bool) -> Any:
    """The others carry on without a rank that dies, or name it."""
    buffer = deep_ep.Buffer(dist.group.WORLD, low_latency_mode=True, enable_shrink=shrink)
    idx = torch.tensor([[0, 1], [1, 0]])
    x = torch.full((2, 64), 3.0, dtype=torch.bfloat16)
    sent = buffer.low_latency_dispatch(x, idx, 4, 2, use_fp8=False)
    dist.barrier()
    if rank == 1:
        os._exit(7)
    if not shrink:
        with pytest.raises(hal.RankFailure) as caught:
            buffer.low_latency_combine(sent[0], idx, torch.ones(2, 2), sent[2])
        return caught.value.rank
    out = buffer.low_latency_combine(sent[0], idx, torch.ones(2, 2), sent[2])[0]
    assert torch.equal(out, x)
    status = torch.zeros(2, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    return status.tolist()


def wrong_alone(rank: int, culprit: int) -> list[str]:
    """Every check of the drop-in's own, failed by one rank only: the same error on all, and nobody waits."""
    said = []
    group = dist.group.WORLD
    first = deep_ep.Buffer(group)
    x, idx, weights = X[:2], IDX[:2], WEIGHTS[:2]
    per_rank, _, per_expert, in_rank, _ = first.get_dispatch_layout(idx, 4)
    passed = {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    right: dict[str, dict[str, Any]] = {
        "dispatch": {"x": x, "topk_idx": idx, "topk_weights": weights, **passed},
        "low_latency_dispatch": {"x": x, "topk_idx": idx, "num_max_dispatch_tokens_per_rank": 4, "num_experts": 4},
    }

    def refused(buffer: Any, name: str, change: dict[str, Any], argument: str) -> None:
        call = {**right[name], **(change if rank == culprit else {})}
        with pytest.raises((hal.SpecError, hal.UnsupportedError)) as caught:
            getattr(buffer, name)(**call)
        assert caught.value.argument == argument
        said.append(str(caught.value).split(": ", 1)[1] if isinstance(caught.value, hal.SpecError) else argument)

    # Nothing is open yet: the others are about to open.
    refused(first, "dispatch", {"config": 24}, "config")
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    sent = buffer.dispatch(**right["dispatch"])
    buffer.dispatch(x, **passed)  # what goes beside does not count as the last call
    sent = buffer.dispatch(**right["dispatch"])
    packed = buffer.low_latency_dispatch(**right["low_latency_dispatch"], use_fp8=False)
    right["combine"] = {"x": sent[0], "handle": sent[4]}
    right["low_latency_combine"] = {"x": packed[0], "topk_idx": idx, "topk_weights": weights, "handle": packed[2]}
    for name, change, argument in (
        ("dispatch", {"x": None}, "x"),
        ("dispatch", {"num_tokens_per_rank": None}, "num_tokens_per_rank"),
        ("dispatch", {"topk_idx": idx.int()}, "topk_idx"),
        ("dispatch", {"is_token_in_rank": ~in_rank}, "is_token_in_rank"),
        ("dispatch", {"expert_alignment": 0}, "expert_alignment"),
        ("dispatch", {"previous_event": 3}, "previous_event"),
        ("dispatch", {"handle": (1, 2), "topk_idx": None, "topk_weights": None}, "handle"),
        ("combine", {"handle": None}, "handle"),
        ("combine", {"handle": packed[2]}, "handle"),
        ("combine", {"async_finish": 3}, "async_finish"),
        ("low_latency_dispatch", {"x": x[0]}, "x"),
        ("low_latency_dispatch", {"num_experts": None}, "num_experts"),
        ("low_latency_combine", {"zero_copy": True}, "zero_copy"),
        ("low_latency_combine", {"handle": sent[4]}, "handle"),
    ):
        refused(buffer, name, change, argument)
    for change in ({"use_nvfp4": True}, {"x_global_scale": torch.ones(())}):
        refused(buffer, "low_latency_dispatch", change, next(iter(change)))
        said.pop()  # of one's own it is another error
    assert torch.equal(buffer.combine(**right["combine"])[0], x * in_rank.sum(1, keepdim=True))

    elastic = deep_ep.ElasticBuffer(group, num_max_tokens_per_rank=8, hidden=128)
    right["dispatch"] = {"x": x, "topk_idx": idx, "topk_weights": weights, "num_experts": 4}
    refused(elastic, "dispatch", {"num_sms": -1}, "num_sms")
    own = elastic.dispatch(**right["dispatch"])
    right["combine"] = {"x": own[0], "handle": own[3]}
    for name, change, argument in (
        ("dispatch", {"num_max_tokens_per_rank": 1}, "x"),
        ("dispatch", {"num_experts": None}, "num_experts"),
        ("dispatch", {"topk_idx": None}, "topk_idx"),
        ("dispatch", {"do_cpu_sync": 2}, "do_cpu_sync"),
        ("combine", {"handle": None}, "handle"),
        ("combine", {"num_qps": -1}, "num_qps"),
    ):
        refused(elastic, name, change, argument)
    assert torch.equal(elastic.combine(**right["combine"])[0], x * in_rank.sum(1, keepdim=True))
    return said


def late(rank: int, late_by: float) -> tuple[int, int]:
    """Microseconds that the statistics of a hooked dispatch and combine show for rank 1, which is late for both."""
    buffer = deep_ep.Buffer(dist.group.WORLD, low_latency_mode=True)
    found = []
    for _ in range(2):  # the first call opens
        dist.barrier()
        waits = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
        time.sleep(late_by * rank)
        sent = buffer.low_latency_dispatch(
            X, IDX, 4, 4, use_fp8=False, return_recv_hook=True, dispatch_wait_recv_cost_stats=waits[0]
        )
        assert not waits[0].any()  # the call itself waits for nobody
        time.sleep(late_by / 4)
        assert not waits[0].any()  # nor does this count
        sent[4]()
        time.sleep(late_by * rank)
        back = buffer.low_latency_combine(
            sent[0], IDX, WEIGHTS, sent[2], return_recv_hook=True, combine_wait_recv_cost_stats=waits[1]
        )
        back[2]()
        found = [int(one[1]) for one in waits]
        assert not rank or max(int(one[0]) for one in waits) < late_by * 1e6 / 2
    return found[0], found[1]
