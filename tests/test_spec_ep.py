"""Every wrong expert-parallel call is a SpecError that names the argument; every right one is taken, quickly."""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hal.spec import ep
from hal.spec.capability import Capabilities, EpCapabilities, Ints, only
from hal.spec.ep import FP8, EpHandle, EpLowLatencyHandle
from hal.spec.errors import SpecError, UnsupportedError
from hal.spec.validation import Level, set_validation, validation_level

R, E, H, K, M = 2, 8, 256, 3, 16
OWNER = object()
BUFFER: dict[str, Any] = {
    "group": None,
    "num_ranks": R,
    "rank": 0,
    "num_experts": E,
    "hidden": H,
    "topk": K,
    "max_tokens_per_rank": M,
}
buffer = ep.check_buffer(**BUFFER)


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    before = validation_level()
    set_validation("full")
    yield
    set_validation(before)


def x(n: int = 4, hidden: int = H, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(n, hidden).to(dtype)


def idx(n: int = 4, topk: int = K) -> torch.Tensor:
    return torch.zeros(n, topk, dtype=torch.int64)


def handle(**changes: Any) -> EpHandle:
    made = EpHandle(OWNER, 4, 5, K, False, 1, 0, (5, 0, 0, 0), 0, idx(), None)
    return dataclasses.replace(made, **changes)


def low_latency_handle(**changes: Any) -> EpLowLatencyHandle:
    info, ranges = torch.zeros(4, R * M, dtype=torch.int32), torch.zeros(4, R, dtype=torch.int64)
    return dataclasses.replace(EpLowLatencyHandle(OWNER, info, ranges, M, H, E, 4, K, None), **changes)


DISPATCH: dict[str, Any] = {
    "x": x(),
    "topk_idx": idx(),
    "topk_weights": torch.zeros(4, K),
    "handle": None,
    "expand": False,
    "expert_alignment": 1,
    "num_worst_tokens": 0,
    "previous_event": None,
    "async_finish": False,
    "return_recv_hook": False,
}
COMBINE: dict[str, Any] = {
    "x": x(5),
    "handle": handle(),
    "topk_weights": None,
    "bias": None,
    "previous_event": None,
    "async_finish": False,
    "return_recv_hook": False,
}
LL_DISPATCH: dict[str, Any] = {
    "x": x(),
    "topk_idx": idx(),
    "use_fp8": True,
    "round_scale": False,
    "use_ue8m0": False,
    "cumulative_local_expert_recv_stats": None,
    "dispatch_wait_recv_cost_stats": None,
    "async_finish": False,
    "return_recv_hook": False,
}
LL_COMBINE: dict[str, Any] = {
    "x": torch.zeros(4, R * M, H).bfloat16(),
    "topk_idx": idx(),
    "topk_weights": torch.zeros(4, K),
    "handle": low_latency_handle(),
    "zero_copy": False,
    "out": None,
    "combine_wait_recv_cost_stats": None,
    "async_finish": False,
    "return_recv_hook": False,
}


def dispatch(**changes: Any) -> ep.EpDispatchArgs:
    return ep.check_dispatch(buffer, OWNER, **{**DISPATCH, **changes})


def combine(**changes: Any) -> ep.EpCombineArgs:
    return ep.check_combine(buffer, OWNER, **{**COMBINE, **changes})


def low_latency_dispatch(**changes: Any) -> ep.EpLowLatencyDispatchArgs:
    return ep.check_low_latency_dispatch(buffer, **{**LL_DISPATCH, **changes})


def low_latency_combine(**changes: Any) -> ep.EpLowLatencyCombineArgs:
    return ep.check_low_latency_combine(buffer, OWNER, **{**LL_COMBINE, **changes})


def fp8(n: int = 4, groups: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return x(n, dtype=FP8), torch.zeros(n, groups, dtype=dtype)


BAD_BUFFERS = [
    ("num_ranks", 0),
    ("num_ranks", True),
    ("rank", 2),
    ("rank", -1),
    ("num_experts", 0),
    ("num_experts", 8.0),
    ("hidden", 0),
    ("hidden", 12),
    ("hidden", None),
    ("topk", 0),
    ("max_tokens_per_rank", 0),
    ("max_tokens_per_rank", 2**31),
    ("dtype", torch.int8),
    ("dtype", "bfloat16"),
    ("modes", ()),
    ("modes", "normal"),
    ("modes", ("fast",)),
    ("max_recv_tokens", 0),
    ("ranks_per_node", 0),
    ("pre_reduce", 1),
    ("overflow", "ignore"),
    ("timeout", 0),
    ("timeout", float("nan")),
    ("timeout", float("inf")),
    ("timeout", "1"),
    ("mask_ranks", None),
]


@pytest.mark.parametrize(("argument", "value"), BAD_BUFFERS)
def test_bad_buffer(argument: str, value: object) -> None:
    with pytest.raises(SpecError) as caught:
        ep.check_buffer(**{**BUFFER, argument: value})
    assert caught.value.argument == argument


def test_buffer_resolves_its_defaults() -> None:
    assert buffer.max_recv_tokens == R * M
    assert buffer.ranks_per_node == R
    assert (buffer.local_experts, buffer.num_nodes) == (4, 1)
    odd = ep.check_buffer(**{**BUFFER, "num_ranks": 3, "ranks_per_node": 2})
    assert (odd.local_experts, odd.num_nodes) == (3, 2)


FORMS: list[Callable[[], object]] = [
    lambda: dispatch(),
    lambda: dispatch(x=x(0), topk_idx=idx(0), topk_weights=None),
    lambda: dispatch(x=fp8()),
    lambda: dispatch(x=fp8(groups=1, dtype=torch.int32)),
    lambda: dispatch(topk_idx=idx() - 1),
    lambda: dispatch(x=x(8)[::2]),
    lambda: dispatch(handle=handle(), topk_idx=None),
    lambda: dispatch(expand=True, expert_alignment=128),
    lambda: dispatch(num_worst_tokens=64, async_finish=True),
    lambda: dispatch(num_worst_tokens=8, expand=True),
    lambda: combine(),
    lambda: combine(bias=x()),
    lambda: combine(bias=(x(), x()), topk_weights=torch.zeros(5, K)),
    lambda: combine(handle=handle(expand=True), topk_weights=torch.zeros(5)),
    lambda: low_latency_dispatch(),
    lambda: low_latency_dispatch(round_scale=True, use_ue8m0=True, return_recv_hook=True),
    lambda: low_latency_dispatch(use_fp8=False, x=x(0), topk_idx=idx(0)),
    lambda: low_latency_dispatch(cumulative_local_expert_recv_stats=torch.zeros(4, dtype=torch.int32)),
    lambda: low_latency_combine(),
    lambda: low_latency_combine(out=x(), zero_copy=True),
]


@pytest.mark.parametrize("call", FORMS)
@pytest.mark.parametrize("level", list(Level))
def test_legal_calls_are_taken_at_every_level(call: Callable[[], object], level: Level) -> None:
    set_validation(level)
    call()


BAD_DISPATCHES: list[tuple[str, dict[str, Any]]] = [
    ("x", {"x": None}),
    ("x", {"x": [x()] * 3}),
    ("x", {"x": x(dtype=torch.float16)}),
    ("x", {"x": x(dtype=FP8)}),
    ("x", {"x": x(hidden=128)}),
    ("x", {"x": x().unsqueeze(0)}),
    ("x", {"x": x(H, 4).T}),
    ("x", {"x": x(M + 1), "topk_idx": idx(M + 1)}),
    ("x", {"x": x().to("meta")}),
    ("x", {"x": (x(), torch.zeros(4, 2))}),
    ("x", {"x": x().to_sparse()}),
    ("scales", {"x": (x(dtype=FP8), torch.zeros(4, 2).double())}),
    ("scales", {"x": fp8(groups=1)}),
    ("scales", {"x": fp8(groups=2, dtype=torch.int32)}),
    ("scales", {"x": (x(dtype=FP8), torch.zeros(3, 2))}),
    ("topk_idx", {"topk_idx": None}),
    ("topk_idx", {"topk_idx": idx().int()}),
    ("topk_idx", {"topk_idx": idx(3)}),
    ("topk_idx", {"topk_idx": idx(topk=K + 1)}),
    ("topk_idx", {"topk_idx": idx(topk=0)}),
    ("topk_idx", {"topk_idx": idx().to("meta")}),
    ("topk_idx", {"topk_idx": idx() + E}),
    ("topk_idx", {"topk_idx": idx() - 2}),
    ("topk_idx", {"handle": handle()}),
    ("topk_weights", {"topk_weights": torch.zeros(4, K).double()}),
    ("topk_weights", {"topk_weights": torch.zeros(4, K - 1)}),
    ("handle", {"handle": (), "topk_idx": None}),
    ("handle", {"handle": handle(owner=object()), "topk_idx": None}),
    ("handle", {"handle": handle(num_tokens=5), "topk_idx": None}),
    ("expand", {"expand": 1}),
    ("expert_alignment", {"expert_alignment": 0}),
    ("expert_alignment", {"expert_alignment": None}),
    ("num_worst_tokens", {"num_worst_tokens": -1}),
    ("previous_event", {"previous_event": 3}),
    ("async_finish", {"async_finish": None}),
    ("return_recv_hook", {"async_finish": True, "return_recv_hook": True}),
]
BAD_COMBINES: list[tuple[str, dict[str, Any]]] = [
    ("x", {"x": x(4)}),
    ("x", {"x": x(5, dtype=torch.float32)}),
    ("x", {"x": x(5, 128)}),
    ("x", {"x": x(5, dtype=FP8)}),
    ("handle", {"handle": None}),
    ("handle", {"handle": low_latency_handle()}),
    ("handle", {"handle": handle(owner=object())}),
    ("topk_weights", {"topk_weights": torch.zeros(5)}),
    ("topk_weights", {"topk_weights": torch.zeros(4, K)}),
    ("bias", {"bias": x(5)}),
    ("bias", {"bias": x().float()}),
    ("bias", {"bias": (x(), x(), x())}),
    ("bias", {"bias": "none"}),
]
BAD_LL_DISPATCHES: list[tuple[str, dict[str, Any]]] = [
    ("x", {"x": x(M + 1), "topk_idx": idx(M + 1)}),
    ("x", {"x": x(dtype=torch.float32)}),
    ("x", {"x": fp8()}),
    ("topk_idx", {"topk_idx": idx(5)}),
    ("topk_idx", {"topk_idx": idx() + E}),
    ("use_fp8", {"use_fp8": "yes"}),
    ("round_scale", {"round_scale": True, "use_fp8": False}),
    ("use_ue8m0", {"use_ue8m0": True}),
    ("cumulative_local_expert_recv_stats", {"cumulative_local_expert_recv_stats": torch.zeros(4)}),
    ("dispatch_wait_recv_cost_stats", {"dispatch_wait_recv_cost_stats": torch.zeros(3, dtype=torch.int64)}),
    ("return_recv_hook", {"return_recv_hook": 1}),
]
BAD_LL_COMBINES: list[tuple[str, dict[str, Any]]] = [
    ("x", {"x": torch.zeros(4, M, H).bfloat16()}),
    ("x", {"x": torch.zeros(R * M, 4, H).bfloat16().transpose(0, 1)}),
    ("x", {"x": torch.zeros(4, R * M, H)}),
    ("topk_idx", {"topk_idx": idx(3)}),
    ("topk_idx", {"topk_idx": idx(topk=2)}),
    ("topk_weights", {"topk_weights": None}),
    ("topk_weights", {"topk_weights": torch.zeros(4, 2)}),
    ("handle", {"handle": handle()}),
    ("handle", {"handle": low_latency_handle(owner=object())}),
    ("zero_copy", {"zero_copy": 0}),
    ("out", {"out": x(5)}),
    ("out", {"out": x(1).expand(4, H)}),
    ("out", {"out": LL_COMBINE["x"][0, :4]}),
    ("combine_wait_recv_cost_stats", {"combine_wait_recv_cost_stats": [0, 0]}),
]


@pytest.mark.parametrize(
    ("call", "argument", "changes"),
    [(dispatch, *row) for row in BAD_DISPATCHES]
    + [(combine, *row) for row in BAD_COMBINES]
    + [(low_latency_dispatch, *row) for row in BAD_LL_DISPATCHES]
    + [(low_latency_combine, *row) for row in BAD_LL_COMBINES],
)
def test_bad_call(call: Callable[..., object], argument: str, changes: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as caught:
        call(**changes)
    assert caught.value.argument == argument
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.argument, copy.got, copy.legal) == (argument, caught.value.got, caught.value.legal)


JUNK = st.sampled_from([None, 0, -1, 2.5, "x", (), [1], object(), torch.zeros(0), torch.zeros(4, K), idx(9), x(3, 16)])


@settings(deadline=None)
@given(st.data())
def test_junk_is_refused_or_taken_but_never_crashes(data: st.DataObject) -> None:
    call, base = data.draw(
        st.sampled_from(
            [
                (dispatch, DISPATCH),
                (combine, COMBINE),
                (low_latency_dispatch, LL_DISPATCH),
                (low_latency_combine, LL_COMBINE),
            ]
        )
    )
    names = data.draw(st.lists(st.sampled_from(sorted(base)), min_size=1, max_size=3, unique=True))
    changes = {name: data.draw(JUNK) for name in names}
    refused = None
    try:
        call(**changes)
    except SpecError as error:
        refused = error.argument
    assert refused in {None, *base, "scales"}


def test_rows_cut_short_after_a_good_call_are_refused() -> None:
    rows = x()
    dispatch(x=rows)
    storage = rows.untyped_storage()
    storage.resize_(storage.nbytes() - 1)
    with pytest.raises(SpecError, match="x: got a storage of"):
        dispatch(x=rows)


def test_layout_is_checked_too() -> None:
    assert ep.check_layout(buffer, idx(100)).shape == (100, K)
    with pytest.raises(SpecError, match="topk_idx"):
        ep.check_layout(buffer, idx() + E)


def test_values_are_read_at_full_only() -> None:
    set_validation("shapes")
    dispatch(topk_idx=idx() + E)


@pytest.mark.parametrize("call", [dispatch, combine, low_latency_dispatch, low_latency_combine])
def test_a_check_takes_at_most_twenty_microseconds(call: Callable[..., object]) -> None:
    set_validation("shapes")
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(50):
            call()
        best = min(best, (time.perf_counter() - start) / 50)
    assert best <= 20e-6


DECLARED = EpCapabilities(
    modes=("normal", "low_latency"),
    layouts=("rank",),
    dtypes=("bfloat16",),
    casts=("none",),
    transports=("shm",),
    overflow=("error",),
    ranks=Ints(1, 8),
    nodes=only(1),
    topk=Ints(1, 8),
    num_experts=Ints(1, 256),
    row_bytes=Ints(16, multiple_of=16),
    recv_hook=False,
    async_finish=False,
    cached_handle=False,
    mask_ranks=False,
    zero_copy_combine=False,
    pre_reduce=False,
    across_nodes=(),
)


def test_declared_buffer_and_calls_pass() -> None:
    ep.require_ep_declared(buffer, DECLARED, "b")
    ep.require_ep_call_declared(dispatch(), DECLARED, "b")
    ep.require_ep_call_declared(low_latency_dispatch(use_fp8=False), DECLARED, "b")
    everything = Capabilities(("cpu",), None, None, DECLARED)
    assert Capabilities.from_dict(everything.to_dict()) == everything


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("dtype", {"dtype": torch.float32}),
        ("group", {"num_ranks": 9}),
        ("ranks_per_node", {"ranks_per_node": 1}),
        ("topk", {"topk": 9}),
        ("num_experts", {"num_experts": 257}),
        ("overflow", {"overflow": "drop"}),
        ("pre_reduce", {"pre_reduce": True}),
        ("mask_ranks", {"mask_ranks": True}),
    ],
)
def test_undeclared_buffer(argument: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError) as caught:
        ep.require_ep_declared(ep.check_buffer(**{**BUFFER, **changes}), DECLARED, "b")
    assert caught.value.argument == argument
    with pytest.raises(UnsupportedError, match="group"):
        ep.require_ep_declared(buffer, None, "b")


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("modes", {"modes": ("low_latency",)}),
        ("overflow", {"modes": ("normal",), "overflow": "drop"}),
        ("mask_ranks", {"modes": ("normal",), "mask_ranks": True}),
    ],
)
def test_undeclared_across_nodes(argument: str, changes: dict[str, Any]) -> None:
    wide = dataclasses.replace(
        DECLARED, nodes=Ints(1), mask_ranks=True, overflow=ep.OVERFLOW, across_nodes=("normal", "error")
    )
    args = ep.check_buffer(**{**BUFFER, **changes})
    ep.require_ep_declared(args, wide, "b")
    with pytest.raises(UnsupportedError) as caught:
        ep.require_ep_declared(dataclasses.replace(args, ranks_per_node=1), wide, "b")
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("argument", "args"),
    [
        ("expand", dispatch(expand=True)),
        ("handle", dispatch(handle=handle(), topk_idx=None)),
        ("x", dispatch(x=fp8())),
        ("async_finish", combine(async_finish=True)),
        ("return_recv_hook", low_latency_combine(return_recv_hook=True)),
        ("use_fp8", low_latency_dispatch()),
        ("zero_copy", low_latency_combine(zero_copy=True)),
    ],
)
def test_undeclared_call(argument: str, args: ep.EpCallArgs) -> None:
    with pytest.raises(UnsupportedError) as caught:
        ep.require_ep_call_declared(args, DECLARED, "b")
    assert caught.value.argument == argument
