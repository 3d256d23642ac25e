"""Bad calls: each is refused by an error that names the argument, what it got and what is legal; none crashes."""

from __future__ import annotations

import math
import mmap
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hal
from hal.spec import forms
from hal.spec import mla as spec_mla
from hal.spec.validation import Level, set_validation, validation_level

B, S_Q, H_Q, H_KV, D, D_V, PAGE, BLOCKS, MAX_BLOCKS = 3, 2, 4, 2, 48, 32, 8, 10, 3


SIZES = {"h_q": H_Q, "h_kv": H_KV, "s_q": S_Q, "head_dim": D, "head_dim_v": D_V, "page_size": PAGE}


def good_call() -> dict[str, Any]:
    """A legal dense call; every mutation below starts from it."""
    return {
        "q": torch.randn(B, S_Q, H_Q, D, dtype=torch.bfloat16),
        "kv_cache": torch.randn(BLOCKS, PAGE, H_KV, D, dtype=torch.bfloat16),
        "block_table": torch.arange(B * MAX_BLOCKS, dtype=torch.int32).view(B, MAX_BLOCKS),
        "cache_seqlens": torch.tensor([0, 9, MAX_BLOCKS * PAGE], dtype=torch.int32),
        "head_dim_v": D_V,
        "out": torch.empty(B, S_Q, H_Q, D_V, dtype=torch.bfloat16),
    }


def decode(call: dict[str, Any]) -> Any:
    call = dict(call)
    positional = [call.pop(name) for name in ("q", "kv_cache", "block_table", "cache_seqlens")]
    return hal.mla_decode(*positional, **call)


TENSORS = ("q", "kv_cache", "block_table", "cache_seqlens", "out")
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]
NOT_TENSORS = st.one_of(st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2))
HYPOTHESIS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
Mutation = Callable[[st.DataObject, dict[str, Any]], set[str]]


def not_a_tensor(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    name = data.draw(st.sampled_from(TENSORS))
    call[name] = data.draw(NOT_TENSORS)
    return {name}


def missing(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    name = data.draw(st.sampled_from(TENSORS[:4]))
    call[name] = None
    return {name}


def other_dtype(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    name = data.draw(st.sampled_from(TENSORS))
    dtype = data.draw(st.sampled_from([d for d in DTYPES if d != call[name].dtype]))
    call[name] = torch.zeros_like(call[name].nan_to_num(), dtype=dtype)
    # Of two tensors that must agree the error may name either.
    return {name} if name not in ("q", "kv_cache", "out") else {"q", "kv_cache", "out"}


def other_size(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    """One dimension that another argument fixes gets another size."""
    fixed = [
        ("q", 0),
        ("q", 3),
        ("kv_cache", 3),
        ("block_table", 0),
        ("cache_seqlens", 0),
        *(("out", i) for i in range(4)),
    ]
    name, dim = data.draw(st.sampled_from(fixed))
    shape = list(call[name].shape)
    shape[dim] = data.draw(st.integers(0, 70).filter(lambda n: n != shape[dim]))
    call[name] = torch.zeros(shape, dtype=call[name].dtype)
    if name == "q":
        return {"q", "kv_cache", "block_table", "cache_seqlens", "out", "head_dim_v"}
    return {name, "q"} if name == "kv_cache" else {name}


def empty_heads_or_pages(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    name, dim = data.draw(st.sampled_from([("q", 2), ("kv_cache", 1), ("kv_cache", 2)]))
    shape = list(call[name].shape)
    shape[dim] = 0
    call[name] = torch.zeros(shape, dtype=call[name].dtype)
    return {name}


def other_rank(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    name = data.draw(st.sampled_from(TENSORS))
    tensor = call[name]
    call[name] = data.draw(st.sampled_from([tensor.unsqueeze(0), tensor.flatten(), tensor[..., None], tensor.sum()]))
    if call[name].dim() == tensor.dim():
        call[name] = tensor.unsqueeze(0)
    return {name}


def heads_not_divisible(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    call["q"] = torch.zeros(B, S_Q, data.draw(st.sampled_from([1, 3, 5, 7])), D, dtype=torch.bfloat16)
    call["out"] = None
    return {"q"}


def last_dim_strided(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    name = data.draw(st.sampled_from(("q", "kv_cache", "block_table", "cache_seqlens", "out")))
    call[name] = torch.stack([call[name]] * 2, dim=-1)[..., 0]
    return {name}


def odd_layout(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    name = data.draw(st.sampled_from(TENSORS))
    tensor = call[name]
    if data.draw(st.booleans()) or tensor.dtype == torch.int32:
        call[name] = tensor.to_sparse()
    else:
        call[name] = torch.nested.nested_tensor([tensor[0], tensor[0]])
    return {name}


def other_device(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    name = data.draw(st.sampled_from(TENSORS))
    call[name] = call[name].to("meta")
    return {name} if name != "q" else set(TENSORS)


def without_memory(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    name = data.draw(st.sampled_from(TENSORS))
    call[name] = call[name].clone()
    storage = call[name].untyped_storage()
    storage.resize_(data.draw(st.just(0) | st.integers(0, storage.nbytes() - 1)))
    return {name}


def overlapping_out(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    which = data.draw(st.sampled_from(["itself", "q", "kv_cache", "block_table"]))
    if which == "itself":
        call["out"] = torch.empty(1, 1, 1, D_V, dtype=torch.bfloat16).expand(B, S_Q, H_Q, D_V)
    elif which == "q":
        call["out"] = call["q"][..., :D_V]
    elif which == "block_table":
        memory = torch.zeros(B * S_Q * H_Q * D_V // 2, dtype=torch.int32)
        call["block_table"] = memory[: B * MAX_BLOCKS].view(B, MAX_BLOCKS)
        call["out"] = memory.view(torch.bfloat16).view(B, S_Q, H_Q, D_V)
    else:
        call["out"] = call["kv_cache"].flatten()[: B * S_Q * H_Q * D_V].view(B, S_Q, H_Q, D_V)
    return {"out"}


def bad_scalar(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    junk = [None, "x", 1.5, [], torch.ones(2)]
    bad: dict[str, list[Any]] = {
        "head_dim_v": [*junk, 0, -1, D + 1, True, 2**70],
        "softmax_scale": ["1", 10**400, 1e31, -1e300, math.nan, math.inf, -math.inf, True, [], torch.ones(2)],
        "causal": [*junk, 0, 1, "true"],
        "batch_invariant": [*junk, 0, 2],
        "lse_base": [torch.ones(2), numpy.array(["e", "2"]), 2, "10", None, "E", 2.718],
        "kv_format": [torch.ones(2), 0, "", [], numpy.array(["plain"]), "fp8", 656, "PLAIN", ["plain"]],
        "plan": [object(), "plan", 7, {}],
        "backend": [3, ["cpu"], b"cpu", 0.5],
    }
    name = data.draw(st.sampled_from(sorted(bad)))
    call[name] = data.draw(st.sampled_from(bad[name]))
    return {name}


def bad_ragged(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    total = B * S_Q
    call["q"] = call["q"].reshape(total, H_Q, D)
    call["out"] = None
    choices = [
        torch.tensor([0, 2, 4, total], dtype=torch.int64),
        torch.zeros(0, dtype=torch.int32),
        torch.zeros(2, 2, dtype=torch.int32),
        torch.zeros(B + 2, dtype=torch.int32),
        torch.tensor([0, 5, 4, total], dtype=torch.int32),
        torch.tensor([0, 2, 4, total + 1], dtype=torch.int32),
        torch.tensor([1, 2, 4, total], dtype=torch.int32),
        torch.tensor([0, -3, 4, total], dtype=torch.int32),
        "0246",
    ]
    call["cu_seqlens_q"] = data.draw(st.sampled_from(choices))
    # One entry too many means one sequence too many, which the tables deny.
    return {"cu_seqlens_q", "block_table", "cache_seqlens"}


def ragged_shapes_crossed(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    if data.draw(st.booleans()):
        call["cu_seqlens_q"] = torch.tensor([0, 2, 4, 6], dtype=torch.int32)
    else:
        call["q"] = call["q"].flatten(0, 1)
    return {"q"}


def bad_length(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    wrong = st.one_of(st.integers(-(2**31), -1), st.integers(MAX_BLOCKS * PAGE + 1, 2**31 - 1))
    call["cache_seqlens"][data.draw(st.integers(0, B - 1))] = data.draw(wrong)
    return {"cache_seqlens"}


def bad_table_entry(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    row, column = data.draw(st.sampled_from([(1, 0), (1, 1), (2, 0), (2, 2)]))
    wrong = st.one_of(st.integers(-(2**31), -1), st.integers(BLOCKS, 2**31 - 1))
    call["block_table"][row, column] = data.draw(wrong)
    return {"block_table"}


def sparse_misuse(data: st.DataObject, call: dict[str, Any]) -> set[str]:
    call["kv_cache"] = call["kv_cache"][:, :, :1]
    indices = torch.zeros(B, S_Q, 8, dtype=torch.int32)
    mistakes: list[tuple[dict[str, Any], set[str]]] = [
        ({"indices": indices}, {"indices"}),  # legal, but not declared by the backend
        ({"indices": indices.long()}, {"indices"}),
        ({"indices": indices[0]}, {"indices"}),
        ({"indices": indices[:, :1]}, {"indices"}),
        ({"indices": indices, "causal": True}, {"causal"}),
        ({"indices": indices, "topk_length": torch.zeros(B + 1, dtype=torch.int32)}, {"topk_length"}),
        ({"indices": indices, "topk_length": torch.zeros(B)}, {"topk_length"}),
        ({"topk_length": torch.zeros(B, dtype=torch.int32)}, {"topk_length"}),
        ({"attn_sink": torch.zeros(H_Q)}, {"attn_sink"}),  # legal, but not declared
        ({"attn_sink": torch.zeros(H_Q + 1)}, {"attn_sink"}),
        ({"attn_sink": torch.zeros(H_Q, dtype=torch.bfloat16)}, {"attn_sink"}),
        ({"extra_indices": indices}, {"extra_kv_cache"}),
        ({"extra_kv_cache": call["kv_cache"]}, {"extra_indices"}),
        ({"extra_kv_cache": call["kv_cache"], "extra_indices": indices}, {"extra_kv_cache"}),  # not declared
        ({"extra_kv_cache": call["kv_cache"][..., :3], "extra_indices": indices}, {"extra_kv_cache"}),
        ({"extra_topk_length": torch.zeros(B, dtype=torch.int32)}, {"extra_topk_length"}),
        ({"kv_format": "v32"}, {"kv_cache", "q"}),
        ({"kv_format": "model1", "kv_cache": torch.zeros(4, 8, 1, 584, dtype=torch.uint8)}, {"q"}),
    ]
    change, names = data.draw(st.sampled_from(mistakes))
    call.update(change)
    return names


MUTATIONS: list[Mutation] = [
    not_a_tensor,
    missing,
    other_dtype,
    other_size,
    empty_heads_or_pages,
    other_rank,
    heads_not_divisible,
    last_dim_strided,
    odd_layout,
    other_device,
    without_memory,
    overlapping_out,
    bad_scalar,
    bad_ragged,
    ragged_shapes_crossed,
    bad_length,
    bad_table_entry,
    sparse_misuse,
]


@pytest.fixture
def restore_validation() -> Any:
    before = validation_level()
    yield
    set_validation(before)


def test_the_good_call_is_good(restore_validation: None) -> None:
    for level in Level:
        set_validation(level)
        out, lse = decode(good_call())
        assert not out.isnan().any()
        assert lse[0].isposinf().all()


@settings(
    max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_bad_calls_name_the_argument(restore_validation: None, data: st.DataObject) -> None:
    set_validation(data.draw(st.sampled_from([Level.SHAPES, Level.FULL])))
    call = good_call()
    names = data.draw(st.sampled_from(MUTATIONS))(data, call)
    with pytest.raises((hal.SpecError, hal.UnsupportedError)) as caught:
        decode(call)
    assert caught.value.argument.split("[")[0] in names
    assert str(caught.value).startswith(caught.value.argument)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize("value", [10**5000, -(10**5000), Unprintable(), "x" * 100_000], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("name", ["head_dim_v", "softmax_scale", "causal", "kv_format", "lse_base"])
def test_a_value_that_no_message_can_hold_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(hal.SpecError) as caught:
        decode(good_call() | {name: value})
    assert caught.value.argument == name
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.grad, torch.func.functionalize])
def test_a_tensor_of_a_transform_is_refused_by_name(transform: Callable[..., Any]) -> None:
    call = good_call()
    q = torch.stack([call["q"]] * 2) if transform is torch.func.vmap else call["q"]
    with pytest.raises(hal.SpecError, match="q: got a tensor without memory"):
        transform(lambda q: decode(call | {"q": q, "out": None})[0])(q)


@pytest.mark.parametrize("name", ["indices", "topk_length", "attn_sink", "extra_kv_cache", "extra_indices"])
def test_an_out_over_any_input_is_refused(name: str) -> None:
    call = good_call()
    call["kv_cache"] = call["kv_cache"][:, :, :1]
    indices = torch.zeros(B, S_Q, 8, dtype=torch.int32)
    call |= {
        "indices": indices,
        "topk_length": torch.zeros(B, dtype=torch.int32),
        "attn_sink": torch.zeros(H_Q),
        "extra_kv_cache": torch.zeros(BLOCKS, PAGE, 1, D, dtype=torch.bfloat16),
        "extra_indices": indices.clone(),
    }
    shape = call[name].shape
    memory = torch.zeros(BLOCKS * PAGE * D, dtype=torch.float32)
    call[name] = memory.view(call[name].dtype).flatten()[: shape.numel()].view(shape)
    call["out"] = memory.view(torch.bfloat16)[: call["out"].numel()].view(call["out"].shape)
    with pytest.raises(hal.SpecError, match=f"out: got memory that {name} also covers"):
        decode(call)


@pytest.mark.parametrize("name", TENSORS)
def test_a_storage_cut_short_under_a_tensor_is_refused(name: str) -> None:
    call = good_call()
    storage = call[name].untyped_storage()
    whole = storage.nbytes()
    storage.resize_(whole - 1)
    with pytest.raises(hal.SpecError, match=rf"{name}: got a storage of {whole - 1} bytes; legal: .* {whole} bytes"):
        decode(call)


@pytest.mark.parametrize("name", TENSORS)
def test_a_storage_cut_short_after_a_good_call_is_refused(name: str) -> None:
    call = good_call()
    decode(call)
    storage = call[name].untyped_storage()
    storage.resize_(storage.nbytes() - 1)
    with pytest.raises(hal.SpecError, match=f"{name}: got a storage of"):
        decode(call)


def test_what_was_good_once_is_looked_at_again_where_it_differs() -> None:
    """The same sizes and layouts, but another number's type, or memory that lies elsewhere."""
    call = good_call()
    size, shape = call["out"].numel(), call["out"].shape
    memory = torch.zeros(size + call["q"].numel(), dtype=torch.bfloat16)
    call["q"] = memory[: call["q"].numel()].view(call["q"].shape)
    call["out"] = memory[-size:].view(shape)
    for again in range(2):
        decode(call)
        for name, value in (("causal", 1), ("head_dim_v", float(D_V)), ("batch_invariant", 0)):
            with pytest.raises(hal.SpecError, match=f"{name}: got"):
                decode(call | {name: value})
        over = call["kv_cache"].view(-1)[again : again + size].view(shape)
        with pytest.raises(hal.SpecError, match="out: got memory that kv_cache also covers"):
            decode(call | {"out": over})
    # Of the same form as the one before, and yet over q.
    over = call["q"].view(-1)[-size:].view(shape)
    with pytest.raises(hal.SpecError, match="out: got memory that q also covers"):
        decode(call | {"out": over})


def test_only_so_many_forms_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_LIMIT", 2)
    call, most = good_call(), 0
    for scale in (0.1, 0.2, 0.3, 0.4):
        decode(call | {"softmax_scale": scale})
        most = max(most, len(spec_mla._admitted))
    assert most == 2


def test_a_storage_need_only_hold_what_strides_and_offset_span() -> None:
    call = good_call()
    right = decode(call)[0].clone()
    padded = torch.zeros(BLOCKS + 1, PAGE, H_KV, 2 * D, dtype=torch.bfloat16)
    call["kv_cache"] = padded[1:, :, :, :D].copy_(call["kv_cache"])
    storage = padded.untyped_storage()
    storage.resize_(storage.nbytes() - 2 * D)
    assert decode(call)[0].equal(right)
    storage.resize_(storage.nbytes() - 1)
    with pytest.raises(hal.SpecError, match="kv_cache: got a storage"):
        decode(call)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_an_out_in_memory_that_may_only_be_read_is_refused_where_all_is_checked(
    restore_validation: None, tmp_path: Path
) -> None:
    set_validation("full")
    call = good_call()
    file = tmp_path / "out"
    file.write_bytes(bytes(call["out"].nbytes))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        call["out"] = torch.frombuffer(mapped, dtype=torch.bfloat16).view(call["out"].shape)
        with pytest.raises(hal.SpecError, match="out: got memory that may only be read"):
            decode(call)
        del call["out"]


@settings(HYPOTHESIS, max_examples=300)
@given(data=st.data())
def test_bad_indices_are_caught_even_unvalidated(restore_validation: None, data: st.DataObject) -> None:
    """``off`` skips the checks of metadata; an index must still never be read through."""
    set_validation(Level.OFF)
    call = good_call()
    names = data.draw(st.sampled_from([bad_length, bad_table_entry]))(data, call)
    with pytest.raises(hal.SpecError) as caught:
        decode(call)
    assert caught.value.argument in names


def test_full_validation_names_the_element(restore_validation: None) -> None:
    set_validation("full")
    call = good_call()
    call["block_table"][2, 1] = BLOCKS
    with pytest.raises(hal.SpecError, match=r"block_table: got 10 at \[2, 1\]; legal: 0…9 within cache_seqlens"):
        decode(call)


def test_an_unused_table_entry_may_be_anything(restore_validation: None) -> None:
    set_validation("full")
    call = good_call()
    call["block_table"][0] = -7
    call["block_table"][1, 2] = 2147480000
    decode(call)


@pytest.mark.parametrize("level", ["loud", "", 3, None])
def test_unknown_validation_level(level: Any) -> None:
    with pytest.raises(hal.SpecError, match=r"HAL_VALIDATE: .*off, shapes or full"):
        set_validation(level)


def test_errors_survive_pickling() -> None:
    errors = [
        hal.SpecError("q", 1, 2),
        hal.UnsupportedError("cpu", "q", 1, 2),
        hal.BackendUnavailable("gone", requested="x", reasons={"x": "y"}),
        hal.CompileError("no", log="line 1", source_path="a.h"),
        hal.RankFailure(3, "dispatch", "killed", expert=1, expected=2, received=0),
        hal.DeviceError("hipMalloc: out of memory"),
    ]
    for error in errors:
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert str(again) == str(error)
        assert again.__dict__ == error.__dict__


def plan_for(call: dict[str, Any], **changes: Any) -> hal.MlaPlan:
    return hal.mla_plan(call["cache_seqlens"], **{**SIZES, **changes})


def test_plan_serves_the_lengths_it_was_made_for() -> None:
    call = good_call()
    plan = plan_for(call)
    want = decode(call)[1]
    assert decode({**call, "plan": plan})[1].equal(want)
    # Equal lengths in another tensor are the same lengths.
    assert decode({**call, "plan": plan, "cache_seqlens": call["cache_seqlens"].clone()})[1].equal(want)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"h_q": 2}, "h_q 2"),
        ({"h_kv": 1}, "h_kv 1"),
        ({"s_q": 1}, "s_q 1"),
        ({"head_dim": 64}, "head_dim 64"),
        ({"head_dim_v": 8}, "head_dim_v 8"),
        ({"page_size": 4}, "page_size 4"),
        ({"dtype": torch.float32}, "dtype torch.float32"),
        ({"causal": True}, "causal True"),
        ({"batch_invariant": True}, "batch_invariant True"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 4, 6], dtype=torch.int32)}, "ragged_q True"),
    ],
)
def test_plan_for_other_sizes_is_refused(changes: dict[str, Any], named: str) -> None:
    call = good_call()
    with pytest.raises(hal.SpecError, match=f"plan: got a plan made for {named}"):
        decode({**call, "plan": plan_for(call, **changes)})


def test_plan_for_other_lengths_is_refused() -> None:
    call = good_call()
    plan = plan_for(call)
    call["cache_seqlens"][1] += 1
    with pytest.raises(hal.SpecError, match="other values of cache_seqlens"):
        decode({**call, "plan": plan})


def test_plan_sees_a_change_made_behind_torch() -> None:
    call = good_call()
    plan = plan_for(call)
    call["cache_seqlens"].numpy()[1] += 1
    with pytest.raises(hal.SpecError, match="other values of cache_seqlens"):
        decode({**call, "plan": plan})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache_seqlens", None),
        ("cache_seqlens", torch.zeros(3)),
        ("cache_seqlens", torch.zeros(3, 1, dtype=torch.int32)),
        ("h_q", 0),
        ("h_q", 3),
        ("h_q", True),
        ("h_q", "4"),
        ("h_kv", 0),
        ("h_q", 10**30),
        ("s_q", 2**31),
        ("s_q", -1),
        ("head_dim", 0),
        ("head_dim", 577),
        ("head_dim_v", D + 1),
        ("page_size", 0),
        ("page_size", 257),
        ("dtype", torch.int8),
        ("dtype", "bfloat16"),
        ("dtype", numpy.array([1, 2])),
        ("kv_format", numpy.array(["plain"])),
        ("kv_format", "fp8"),
        ("causal", 1),
        ("batch_invariant", None),
        ("cu_seqlens_q", torch.zeros(3, dtype=torch.int32)),
        ("cu_seqlens_q", torch.zeros(4)),
    ],
)
def test_bad_plan_calls_name_the_argument(name: str, value: Any) -> None:
    arguments: dict[str, Any] = {
        "cache_seqlens": good_call()["cache_seqlens"],
        **SIZES,
        name: value,
    }
    with pytest.raises((hal.SpecError, hal.UnsupportedError)) as caught:
        hal.mla_plan(arguments.pop("cache_seqlens"), **arguments)
    # The front names page_size and head_dim by the tensor that carries them in a decode call.
    assert caught.value.argument in {name, {"page_size": "kv_cache", "head_dim": "q"}.get(name, name)}
