"""The published FlashMLA calls, in all three styles in the field."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mla_cases import Case, assert_close, make
from seeds import SEED

import hal
from hal.compat import flash_mla
from hal.reference import mla as reference

CASE = Case(b=3, s_q=2, s_k=130, h_q=8, h_kv=1, causal=True, varlen=True, seed=SEED)

_VARLEN = ["dropout_p=0.0", "softmax_scale=None", "causal=False", "deterministic=False", "is_varlen=True"]

PUBLISHED = {
    "flash_mla_with_kvcache": [
        "q",
        "k_cache",
        "block_table",
        "cache_seqlens",
        "head_dim_v",
        "tile_scheduler_metadata",
        "num_splits=None",
        "softmax_scale=None",
        "causal=False",
        "is_fp8_kvcache=False",
        "indices=None",
        "attn_sink=None",
        "extra_k_cache=None",
        "extra_indices_in_kvcache=None",
        "topk_length=None",
        "extra_topk_length=None",
    ],
    "flash_mla_sparse_fwd": [
        "q",
        "kv",
        "indices",
        "sm_scale",
        "d_v=512",
        "attn_sink=None",
        "topk_length=None",
        "indexer_topk=0",
    ],
    "flash_attn_varlen_func": [
        *("q", "k", "v", "cu_seqlens_qo", "cu_seqlens_kv", "max_seqlen_qo", "max_seqlen_kv"),
        *_VARLEN,
    ],
    "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", "head_dim_qk", *_VARLEN],
    "flash_attn_varlen_kvpacked_func": [
        *("q", "kv", "cu_seqlens_qo", "cu_seqlens_kv", "max_seqlen_qo", "max_seqlen_kv", "head_dim_qk"),
        *_VARLEN,
    ],
}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "flash_mla_with_kvcache"])
def test_places_that_are_kept_refuse_by_name(name: str) -> None:
    needed = sum("=" not in one for one in PUBLISHED[name])
    with pytest.raises(hal.UnsupportedError, match="decode only"):
        getattr(flash_mla, name)(*[None] * needed)


def test_flags_may_be_zero_or_one() -> None:
    inputs = make(CASE)
    made, splits = flash_mla.get_mla_metadata()
    want = reference.mla_decode(*inputs.tensors(), causal=True)
    got = flash_mla.flash_mla_with_kvcache(*inputs.tensors(), 512, made, splits, causal=1, is_fp8_kvcache=0)
    assert_close(*got, *want, "flags")
    with pytest.raises(hal.SpecError, match="causal"):
        flash_mla.flash_mla_with_kvcache(*inputs.tensors(), 512, made, splits, causal=2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_signature_is_the_published_one(name: str) -> None:
    parameters = inspect.signature(getattr(flash_mla, name)).parameters.values()
    found = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert found == PUBLISHED[name]


def metadata(style: str, lengths: torch.Tensor, case: Case = CASE) -> tuple[Any, Any]:
    rows = case.s_q * case.h_q // case.h_kv
    if style == "newest":
        return flash_mla.get_mla_metadata()
    if style == "oldest":
        return flash_mla.get_mla_metadata(lengths, num_heads_per_head_k=rows, num_heads_k=case.h_kv)
    return flash_mla.get_mla_metadata(lengths, rows, case.h_kv, num_heads_q=case.h_q, is_fp8_kvcache=False, topk=None)


@pytest.mark.parametrize("style", ["oldest", "older", "newest"])
def test_every_style_decodes_on_every_layer(style: str) -> None:
    inputs = make(CASE)
    made, splits = metadata(style, inputs.cache_seqlens)
    want = reference.mla_decode(*inputs.tensors(), causal=True)
    for _ in range(3):
        out, lse = flash_mla.flash_mla_with_kvcache(*inputs.tensors(), 512, made, splits, causal=True)
        assert_close(out, lse, *want, style)


def test_older_metadata_has_the_published_shapes() -> None:
    lengths = torch.tensor([5, 0, 70], dtype=torch.int32)
    made, splits = flash_mla.get_mla_metadata(lengths, 16, 1)
    assert made.shape[1] == 8
    assert made.dtype == splits.dtype == torch.int32
    assert splits.tolist() == [0, 1, 2, 3]


def test_the_first_call_fills_the_published_tensors() -> None:
    inputs = make(CASE)
    made, _ = flash_mla.get_mla_metadata()
    flash_mla.flash_mla_with_kvcache(*inputs.tensors(), 512, made, causal=True)
    older = metadata("older", inputs.cache_seqlens)
    assert torch.equal(made.tile_scheduler_metadata, older[0])
    assert torch.equal(made.num_splits, older[1])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_of_a_used_schedule_is_planned_again(copied: Callable[[Any], Any]) -> None:
    inputs = make(CASE)
    q, cache, table, lengths = inputs.tensors()
    made, _ = flash_mla.get_mla_metadata()
    flash_mla.flash_mla_with_kvcache(q, cache, table, lengths, 512, made, causal=True)
    again = copied(made)
    assert again == flash_mla.FlashMLASchedMeta()
    assert made.have_initialized
    out, lse = flash_mla.flash_mla_with_kvcache(q, cache, table, lengths - 1, 512, again)
    assert_close(out, lse, *reference.mla_decode(q, cache, table, lengths - 1), "copy")
    flash_mla.flash_mla_with_kvcache(q, cache, table, lengths, 512, made, causal=True)


def test_the_newest_style_takes_anything() -> None:
    lengths = torch.tensor([5, 0, 70], dtype=torch.int32)
    for args, kwargs in [
        ((), {}),
        ((1, 2), {"foo": 3}),
        ((lengths,), {}),
        ((lengths, 16), {}),
        ((lengths,), {"num_heads_k": 1}),
        ((None,) * 9, {}),
    ]:
        made = flash_mla.get_mla_metadata(*args, **kwargs)
        assert made == (flash_mla.FlashMLASchedMeta(), None)
    with pytest.raises(hal.SpecError, match="cache_seqlens"):
        flash_mla.get_mla_metadata(1, 2, 3)


def test_star_and_version_are_the_published_ones() -> None:
    assert flash_mla.__version__ == "1.0.0"
    assert set(flash_mla.__all__) == {*PUBLISHED, "FlashMLASchedMeta", "get_mla_metadata"}


def test_older_metadata_is_looked_at() -> None:
    inputs = make(CASE)
    made, splits = metadata("older", inputs.cache_seqlens)
    for wrong, argument in [
        ((made.float(), splits), "tile_scheduler_metadata"),
        ((made, None), "num_splits"),
        ((made, splits.long()), "num_splits"),
        ((made, splits[:-1]), "num_splits"),
    ]:
        with pytest.raises(hal.SpecError) as caught:
            flash_mla.flash_mla_with_kvcache(*inputs.tensors(), 512, *wrong, causal=True)
        assert caught.value.argument == argument


def test_reuse_with_other_lengths_or_sizes_is_refused() -> None:
    inputs = make(CASE)
    made, _ = flash_mla.get_mla_metadata()
    q, cache, table, lengths = inputs.tensors()
    flash_mla.flash_mla_with_kvcache(q, cache, table, lengths, 512, made, causal=True)
    with pytest.raises(hal.SpecError, match="first used with causal True"):
        flash_mla.flash_mla_with_kvcache(q, cache, table, lengths, 512, made)
    with pytest.raises(hal.SpecError, match="first used with h_q 8"):
        flash_mla.flash_mla_with_kvcache(q[:, :, :4], cache, table, lengths, 512, made, causal=True)
    with pytest.raises(hal.SpecError, match="other values of cache_seqlens"):
        flash_mla.flash_mla_with_kvcache(q, cache, table, lengths - 1, 512, made, causal=True)


def test_packed_and_sparse_calls_keep_their_place() -> None:
    q = torch.zeros(1, 1, 64, 576, dtype=torch.bfloat16)
    packed = torch.zeros(2, 64, 1, 656, dtype=torch.uint8)
    indices = torch.zeros(1, 1, 64, dtype=torch.int32)
    made, _ = flash_mla.get_mla_metadata()
    with pytest.raises(hal.UnsupportedError) as caught:
        flash_mla.flash_mla_with_kvcache(q, packed, None, None, 512, made, is_fp8_kvcache=True, indices=indices)
    assert caught.value.argument == "indices"
    with pytest.raises(hal.UnsupportedError, match="sparse prefill"):
        flash_mla.flash_mla_sparse_fwd(q[0], q[0], indices, 1.0)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"tile_scheduler_metadata": None}, "tile_scheduler_metadata"),
        ({"tile_scheduler_metadata": (1, 2)}, "tile_scheduler_metadata"),
        ({"num_splits": torch.zeros(4, dtype=torch.int32)}, "num_splits"),
        ({"q": torch.zeros(3, 2)}, "q"),
        ({"q": None}, "q"),
        ({"block_table": None}, "block_table"),
        ({"cache_seqlens": None}, "cache_seqlens"),
        ({"head_dim_v": 600}, "head_dim_v"),
        ({"is_fp8_kvcache": True}, "is_fp8_kvcache"),
        ({"is_fp8_kvcache": 1}, "is_fp8_kvcache"),
        ({"k_cache": None}, "k_cache"),
        ({"attn_sink": torch.zeros(8)}, "attn_sink"),
    ],
)
def test_bad_calls_name_the_argument(change: dict[str, Any], argument: str) -> None:
    names = ("q", "k_cache", "block_table", "cache_seqlens")
    call = dict(zip(names, make(CASE).tensors(), strict=True))
    made, _ = flash_mla.get_mla_metadata()
    call |= {"head_dim_v": 512, "tile_scheduler_metadata": made, **change}
    with pytest.raises((hal.SpecError, hal.UnsupportedError)) as caught:
        flash_mla.flash_mla_with_kvcache(**call)
    assert caught.value.argument == argument
