"""The published DeepEP interface: its signatures, its figures, and what wrong calls get."""

from __future__ import annotations

import inspect
from typing import Any

import compat_deep_ep_cases as cases
import pytest
import torch
from ep_ranks import run_ranks

import hal
from hal.compat import deep_ep

_NORMAL_END = ["config=None", "previous_event=None", "async_finish=False", "allocate_on_comm_stream=False"]
_LAYOUT = [
    "num_tokens_per_rank=None",
    "num_tokens_per_rdma_rank=None",
    "is_token_in_rank=None",
    "num_tokens_per_expert=None",
    "topk_idx=None",
    "topk_weights=None",
    "expert_alignment=1",
]
_COMBINE = ["x", "handle", "topk_weights=None", "bias=None"]
_ELASTIC_END = [
    "num_sms=0",
    "num_qps=0",
    "previous_event=None",
    "previous_event_before_epilogue=None",
    "async_with_compute_stream=False",
    "allocate_on_comm_stream=False",
]
_LOW_LATENCY = "num_max_dispatch_tokens_per_rank"

PUBLISHED: dict[str, list[str]] = {
    "Buffer": [
        "group",
        "num_nvl_bytes=0",
        "num_rdma_bytes=0",
        "low_latency_mode=False",
        "num_qps_per_rank=24",
        "allow_nvlink_for_low_latency_mode=True",
        "allow_mnnvl=False",
        "explicitly_destroy=False",
        "enable_shrink=False",
        "comm=None",
    ],
    "Buffer.destroy": [],
    "Buffer.is_sm90_compiled": [],
    "Buffer.set_num_sms": ["new_num_sms"],
    "Buffer.capture": [],
    "Buffer.get_low_latency_rdma_size_hint": [_LOW_LATENCY, "hidden", "num_ranks", "num_experts"],
    "Buffer.get_comm_stream": [],
    "Buffer.get_local_buffer_tensor": ["dtype", "size=None", "offset=0", "use_rdma_buffer=False"],
    "Buffer.get_dispatch_config": ["num_ranks"],
    "Buffer.get_combine_config": ["num_ranks"],
    "Buffer.get_dispatch_layout": ["topk_idx", "num_experts", *_NORMAL_END[1:]],
    "Buffer.dispatch": ["x", "handle=None", *_LAYOUT, "num_worst_tokens=0", *_NORMAL_END],
    "Buffer.combine": [*_COMBINE, *_NORMAL_END],
    "Buffer.internode_dispatch": ["x", "handle=None", *_LAYOUT, *_NORMAL_END],
    "Buffer.internode_combine": [*_COMBINE, *_NORMAL_END],
    "Buffer.clean_low_latency_buffer": [_LOW_LATENCY, "hidden", "num_experts"],
    "Buffer.low_latency_dispatch": [
        "x",
        "topk_idx",
        _LOW_LATENCY,
        "num_experts",
        "cumulative_local_expert_recv_stats=None",
        "dispatch_wait_recv_cost_stats=None",
        "use_fp8=True",
        "round_scale=False",
        "use_ue8m0=False",
        "async_finish=False",
        "return_recv_hook=False",
    ],
    "Buffer.low_latency_combine": [
        "x",
        "topk_idx",
        "topk_weights",
        "handle",
        "use_logfmt=False",
        "zero_copy=False",
        "async_finish=False",
        "return_recv_hook=False",
        "out=None",
        "combine_wait_recv_cost_stats=None",
    ],
    "Buffer.low_latency_update_mask_buffer": ["rank_to_mask", "mask=False"],
    "Buffer.low_latency_query_mask_buffer": ["mask_status"],
    "Buffer.low_latency_clean_mask_buffer": [],
    "Buffer.get_next_low_latency_combine_buffer": ["handle"],
    "Config": [
        "num_sms=20",
        "num_max_nvl_chunked_send_tokens=6",
        "num_max_nvl_chunked_recv_tokens=256",
        "num_max_rdma_chunked_send_tokens=6",
        "num_max_rdma_chunked_recv_tokens=256",
    ],
    "Config.get_nvl_buffer_size_hint": ["hidden_bytes", "num_ranks"],
    "Config.get_rdma_buffer_size_hint": ["hidden_bytes", "num_ranks"],
    "EventHandle": [],
    "EventHandle.current_stream_wait": [],
    "EventOverlap": ["event=None", "extra_tensors=None"],
    "EventOverlap.current_stream_wait": ["release_handle=False"],
    "EventOverlap.register_hook_after_wait": ["hook_after_wait"],
    "EventOverlap.__call__": ["release_handle=False"],
    "ElasticBuffer": [
        "group",
        "num_bytes=None",
        "num_cpu_bytes=0",
        "num_max_tokens_per_rank=0",
        "hidden=0",
        "num_topk=0",
        "use_fp8_dispatch=False",
        "deterministic=False",
        "allow_hybrid_mode=True",
        "allow_multiple_reduction=True",
        "prefer_overlap_with_compute=True",
        "sl_idx=3",
        "num_allocated_qps=0",
        "num_cpu_timeout_secs=300",
        "num_gpu_timeout_secs=100",
        "explicitly_destroy=False",
    ],
    "ElasticBuffer.destroy": [],
    "ElasticBuffer.get_buffer_size_hint": [
        "group",
        "num_max_tokens_per_rank",
        "hidden",
        "num_topk=0",
        "use_fp8_dispatch=False",
        "allow_hybrid_mode=True",
        "allow_multiple_reduction=True",
    ],
    "ElasticBuffer.get_engram_storage_size_hint": [
        "num_entries",
        "hidden",
        "num_max_tokens_per_rank",
        "dtype=torch.bfloat16",
    ],
    "ElasticBuffer.get_pp_buffer_size_hint": ["num_max_tensor_bytes", "num_max_inflight_tensors"],
    "ElasticBuffer.get_agrs_num_max_session_bytes": ["group", "shapes", "dtype"],
    "ElasticBuffer.get_agrs_buffer_size_hint": ["group", "num_max_session_bytes"],
    "ElasticBuffer.barrier": ["use_comm_stream=True", "with_cpu_sync=False", "sequential=True"],
    "ElasticBuffer.capture": [],
    "ElasticBuffer.get_comm_stream": [],
    "ElasticBuffer.get_physical_domain_size": [],
    "ElasticBuffer.get_logical_domain_size": [],
    "ElasticBuffer.engram_write": ["storage", "sf=None"],
    "ElasticBuffer.engram_fetch": ["indices", "num_qps=0", "use_tma_aligned_col_major_sf=False"],
    "ElasticBuffer.pp_set_config": ["num_max_tensor_bytes", "num_max_inflight_tensors"],
    "ElasticBuffer.pp_send": ["t", "dst_rank_idx", "num_sms=0"],
    "ElasticBuffer.pp_recv": ["t", "src_rank_idx", "num_sms=0"],
    "ElasticBuffer.create_agrs_session": [],
    "ElasticBuffer.destroy_agrs_session": [],
    "ElasticBuffer.agrs_new_session": ["enabled=True"],
    "ElasticBuffer.agrs_set_config": ["num_max_session_bytes", "num_max_all_gathers_per_session"],
    "ElasticBuffer.agrs_get_inplace_tensor": ["shapes", "dtype"],
    "ElasticBuffer.all_gather": ["t"],
    "ElasticBuffer.get_theoretical_num_sms": [
        "num_experts",
        "num_topk",
        "num_scaleout_topk=0",
        "rdma_gbs=0",
        "nvlink_gbs=0",
        "sm_read_gbs=200",
        "sm_write_gbs=50",
    ],
    "ElasticBuffer.get_theoretical_num_qps": ["num_sms"],
    "ElasticBuffer.dispatch": [
        "x",
        "topk_idx=None",
        "topk_weights=None",
        "cumulative_local_expert_recv_stats=None",
        "num_experts=None",
        "num_max_tokens_per_rank=None",
        "expert_alignment=None",
        *_ELASTIC_END,
        "handle=None",
        "do_handle_copy=True",
        "do_cpu_sync=None",
        "do_expand=False",
        "do_zero_padding=False",
        "use_tma_aligned_col_major_sf=False",
    ],
    "ElasticBuffer.combine": [*_COMBINE, *_ELASTIC_END],
    "EPHandle": [
        "do_expand",
        "num_experts",
        "expert_alignment",
        "num_max_tokens_per_rank",
        "num_sms",
        "topk_idx",
        "num_recv_tokens",
        "num_expanded_tokens",
        "num_recv_tokens_per_expert_list",
        "psum_num_recv_tokens_per_scaleup_rank",
        "psum_num_recv_tokens_per_expert",
        "num_unaligned_recv_tokens_per_expert",
        "recv_src_metadata",
        "dst_buffer_slot_idx",
        "token_metadata_at_forward",
        "channel_linked_list",
    ],
    "EPHandle.deterministic_sort": [
        "do_cpu_sync",
        "is_cached_dispatch",
        "recv_x",
        "recv_sf",
        "recv_topk_idx",
        "recv_topk_weights",
        "channel_linked_list",
    ],
    "get_physical_domain_size": ["group"],
    "get_logical_domain_size": ["group", "allow_hybrid_mode=True"],
}

# Keywords of branches and of engines' own builds, after the published arguments: taken by name only.
ADDED = {
    "Buffer": {"use_fabric"},
    "Buffer.low_latency_dispatch": {"topk_weights", "x_global_scale", "use_nvfp4", "use_ue8m0_for_sf", "use_eager"},
    "Buffer.low_latency_combine": {
        *("overlap", "packed_recv_count", "comp_signal", "block_m", "threshold", "num_sms"),
        *("src_signals", "src_signal_expect_value", "use_eager"),
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_signature_is_the_published_one(name: str) -> None:
    found: Any = deep_ep
    for part in name.split("."):
        found = getattr(found, part)
    parameters = [p for p in inspect.signature(found).parameters.values() if p.name != "self"]
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in positional] == PUBLISHED[name]
    assert {p.name for p in parameters if p not in positional} == ADDED.get(name, set())


def test_every_public_name_is_listed() -> None:
    """A method that is not in the table is not held to the published interface."""
    assert {name for name in deep_ep.__all__ if callable(getattr(deep_ep, name))} <= set(PUBLISHED)
    for kind in (deep_ep.Buffer, deep_ep.ElasticBuffer, deep_ep.Config, deep_ep.EPHandle):
        public = {name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name))}
        assert {f"{kind.__name__}.{name}" for name in public} <= set(PUBLISHED)
    assert deep_ep.topk_idx_t is torch.int64


def test_size_hints_are_the_published_figures() -> None:
    assert deep_ep.Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 288) == 2146961792
    config = deep_ep.Config()
    assert config.get_nvl_buffer_size_hint(7168 * 2, 8) == 335709824
    assert config.get_rdma_buffer_size_hint(7168 * 2, 8) == 0
    assert config.get_rdma_buffer_size_hint(7168 * 2, 16) == 169333504
    with pytest.raises(hal.SpecError, match="num_ranks: got 12"):
        config.get_nvl_buffer_size_hint(7168 * 2, 12)


def test_configurations() -> None:
    assert deep_ep.Config(20, 6, 256, 5, 128).num_max_rdma_chunked_recv_tokens == 130
    assert deep_ep.Buffer.get_dispatch_config(8).num_max_nvl_chunked_send_tokens == 6
    assert deep_ep.Buffer.get_combine_config(16).num_max_rdma_chunked_send_tokens == 12
    assert deep_ep.Buffer.get_dispatch_config(3) == deep_ep.Buffer.get_dispatch_config(4)
    assert deep_ep.Buffer.get_combine_config(1000) == deep_ep.Buffer.get_combine_config(160)
    for arguments, name in (((-1,), "num_sms"), ((20, 6, 6), "num_max_nvl_chunked_recv_tokens")):
        with pytest.raises(hal.SpecError) as caught:
            deep_ep.Config(*arguments)
        assert caught.value.argument == name


def test_events() -> None:
    ran = []
    event = deep_ep.Buffer.capture()
    event.register_hook_after_wait(lambda: ran.append(1))
    with pytest.raises(hal.SpecError, match="hook_after_wait"):
        event.register_hook_after_wait(print)
    with event(release_handle=True) as same:
        assert same is event
        assert not ran
    assert ran == [1]
    with pytest.raises(hal.SpecError, match="released"):
        event.current_stream_wait()
    with pytest.raises(hal.SpecError, match="event: got int"):
        deep_ep.EventOverlap(3)  # type: ignore[arg-type]


def test_an_event_marks_the_stream_of_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written for accelerators, and shown here with a stand-in for one."""
    calls = []

    class Event:
        def __init__(self, device: torch.device) -> None:
            calls.append(("made", str(device)))

        def record(self) -> None:
            calls.append("recorded")

        def wait(self) -> None:
            calls.append("waited")

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(torch, "Event", Event)
    deep_ep.Buffer.capture().current_stream_wait()
    assert calls == [("made", "meta"), "recorded", "waited"]


def test_a_buffer_needs_a_group() -> None:
    with pytest.raises(ValueError, match="group"):
        deep_ep.Buffer(None)
    with pytest.raises(hal.UnsupportedError, match="comm"):
        deep_ep.Buffer(None, comm=object())


def test_wrong_calls_name_the_argument() -> None:
    assert run_ranks(1, cases.refused)[0].value == len(cases.V1)
    assert run_ranks(1, cases.refused_elastic)[0].value == len(cases.V2)


def test_one_buffer_serves_every_geometry() -> None:
    run_ranks(2, cases.geometries)


def test_processors_are_limited_however_it_is_said() -> None:
    run_ranks(2, cases.processors)


def test_flags_may_be_zero_or_one() -> None:
    run_ranks(1, cases.flags)


def test_several_nodes() -> None:
    run_ranks(2, cases.nodes)


@pytest.mark.parametrize(("ranks", "per_node"), [(4, 2), (3, 1)])
def test_the_handle_between_nodes_is_the_published_one(ranks: int, per_node: int) -> None:
    run_ranks(ranks, cases.two_a_node, per_node, limit=60)


def test_ranks_that_disagree_are_told() -> None:
    assert [outcome.value for outcome in run_ranks(2, cases.disagreement)] == ["x", "x"]
    assert [outcome.value for outcome in run_ranks(2, cases.told)] == ["bias", "bias"]


def test_a_rank_that_dies_is_named_or_masked() -> None:
    assert run_ranks(2, cases.death, False, check=False)[0].value == 1
    assert run_ranks(2, cases.death, True, check=False)[0].value == [0, 1]


@pytest.mark.parametrize("culprit", [0, 1])
def test_what_one_rank_gets_wrong_is_the_same_error_on_all(culprit: int) -> None:
    said = [outcome.value for outcome in run_ranks(2, cases.wrong_alone, culprit)]
    assert said[0] == said[1]


def test_a_hook_s_waiting_is_counted() -> None:
    late = 0.6
    for waited in run_ranks(2, cases.late, late)[0].value:
        assert late * 0.6e6 < waited < late * 1.5e6
