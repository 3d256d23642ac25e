"""Decode as vLLM drives it, over its paged cache, compared with the float64 reference."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import hal_vllm
import pytest
import torch
from seeds import SEED
from torch import Tensor

import hal
from hal.reference import mla as reference
from integrations.recorded import drift, installed, load

INTERFACE = Path(__file__).with_name("interface.json")
LATENT, ROPE, HEADS, NOPE, V = 512, 64, 8, 128, 128
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


def test_the_record_is_the_installed_release() -> None:
    record = load(INTERFACE)
    if not installed(record):
        pytest.skip("not applicable: vLLM is not installed, the record stands in for it")
    assert drift(record) == []


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("HalMLABackend", "MLACommonBackend"),
        ("HalMLAMetadataBuilder", "MLACommonMetadataBuilder"),
        ("HalMLAImpl", "MLACommonImpl"),
    ],
)
def test_nothing_is_left_abstract_and_overrides_keep_their_parameters(
    backend: ModuleType, ours: str, theirs: str
) -> None:
    made = getattr(backend, ours)
    parent = getattr(backend, theirs)
    assert issubclass(made, parent)
    assert not getattr(made, "__abstractmethods__", None)
    shared = [name for name in vars(made) if callable(getattr(made, name)) and hasattr(parent, name)]
    assert "__init__" in shared or ours != "HalMLAImpl"
    for name in shared:
        if name.startswith("__"):
            continue
        mine, wanted = inspect.signature(getattr(made, name)), inspect.signature(getattr(parent, name))
        assert list(mine.parameters) == list(wanted.parameters), name


def test_vllm_finds_and_registers_it(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends import registry

    found = [one for one in entry_points(group="vllm.general_plugins") if one.name == "hal"]
    assert [one.load() for one in found] == [hal_vllm.register]
    path = f"{backend.HalMLABackend.__module__}.{backend.HalMLABackend.__qualname__}"
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(registry, "register_backend", lambda *args: calls.append(args))
    names = registry.AttentionBackendEnum
    hal_vllm.register()
    assert calls == [(names.CUSTOM, path)]
    monkeypatch.setenv("HAL_VLLM_REPLACE", "CPU_MLA, AMX_MLA")
    hal_vllm.register()
    assert calls[1:] == [(names.CUSTOM, path), (names.CPU_MLA, path), (names.AMX_MLA, path)]
    monkeypatch.setenv("HAL_VLLM_REPLACE", "NO_SUCH")
    with pytest.raises((KeyError, ValueError), match="NO_SUCH"):
        hal_vllm.register()
    assert backend.HalMLABackend.get_name() in names.__members__


def test_what_the_hal_declares_is_what_vllm_may_ask(backend: ModuleType) -> None:
    made = backend.HalMLABackend
    assert made.is_mla()
    assert 16 in made.get_supported_kernel_block_sizes()
    assert made.get_supported_head_sizes()[0] == 576
    assert made.supports_dtype(torch.bfloat16)
    assert not made.supports_dtype(torch.float64)
    assert made.supports_kv_cache_dtype("auto")
    assert made.supports_kv_cache_dtype(None)
    assert not made.supports_kv_cache_dtype("fp8_ds_mla")
    declared = hal.capabilities().mla_dense
    assert declared is not None
    assert made.supports_batch_invariance() == declared.batch_invariant
    assert made.get_impl_cls() is backend.HalMLAImpl
    assert made.get_builder_cls() is backend.HalMLAMetadataBuilder


def layer(backend: ModuleType, **change: Any) -> Any:
    """An attention layer's implementation, made as vLLM makes it."""
    positional = {
        "num_heads": HEADS,
        "head_size": LATENT + ROPE,
        "scale": (NOPE + ROPE) ** -0.5,
        "num_kv_heads": 1,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
        "logits_soft_cap": None,
        "attn_type": backend.AttentionType.DECODER,
        "kv_sharing_target_layer_name": None,
    }
    named = {
        "q_lora_rank": None,
        "kv_lora_rank": LATENT,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "qk_head_dim": NOPE + ROPE,
        "v_head_dim": V,
        "kv_b_proj": None,
    }
    positional |= {key: value for key, value in change.items() if key in positional}
    named |= {key: value for key, value in change.items() if key not in positional}
    return backend.HalMLAImpl(*positional.values(), **named)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("alibi_slopes", [1.0]),
        ("sliding_window", 128),
        ("logits_soft_cap", 30.0),
        ("kv_cache_dtype", "fp8"),
        ("indexer", object()),
        ("attn_type", "encoder"),
    ],
)
def test_what_is_not_served_is_refused_by_name(backend: ModuleType, argument: str, value: object) -> None:
    with pytest.raises(hal.UnsupportedError) as caught:
        layer(backend, **{argument: value})
    assert caught.value.argument == argument


@dataclass
class Engine:
    """What vLLM does around attention: pages, lengths, slots, one metadata a step for all layers."""

    backend: ModuleType
    dtype: torch.dtype
    block: int
    blocks: int = 40
    layers: int = 2
    seed: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(SEED))

    def __post_init__(self) -> None:
        self.impls = [layer(self.backend) for _ in range(self.layers)]
        shape = self.blocks, self.block, LATENT + ROPE
        self.caches = [torch.full(shape, torch.nan, dtype=self.dtype) for _ in range(self.layers)]
        self.free = list(range(self.blocks))
        self.live: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}
        self.builder = self.backend.HalMLAMetadataBuilder.__new__(self.backend.HalMLAMetadataBuilder)

    def join(self, name: str, prompt: int) -> None:
        """Prefill writes a prompt; its attention is vLLM's own."""
        self.live[name], self.lengths[name] = [], 0
        self._write([name], [prompt])

    def leave(self, name: str) -> None:
        """Its pages are recycled, and hold garbage until they are written."""
        pages = self.live.pop(name)
        del self.lengths[name]
        for cache in self.caches:
            cache[pages] = torch.nan
        self.free = pages + self.free

    def _write(self, names: list[str], counts: list[int]) -> None:
        slots = []
        for name, count in zip(names, counts, strict=True):
            for position in range(self.lengths[name], self.lengths[name] + count):
                if position // self.block == len(self.live[name]):
                    self.live[name].append(self.free.pop())
                slots.append(self.live[name][position // self.block] * self.block + position % self.block)
            self.lengths[name] += count
        slots.append(-1)  # a padded row, as graphs have
        for impl, cache in zip(self.impls, self.caches, strict=True):
            rows = torch.randn(len(slots), LATENT + ROPE, generator=self.seed).to(self.dtype)
            latent, rope = rows.split((LATENT, ROPE), -1)
            mapping = torch.tensor(slots)
            impl.do_kv_cache_update(latent, rope.unsqueeze(1), cache, mapping, "auto", torch.ones(1))

    def tables(self) -> tuple[Tensor, Tensor]:
        """Block table, with garbage past the end, and lengths of all that live."""
        names = list(self.live)
        table = torch.full((len(names), 1 + max(map(len, self.live.values()))), 2**30, dtype=torch.int32)
        for row, name in enumerate(names):
            table[row, : len(self.live[name])] = torch.tensor(self.live[name], dtype=torch.int32)
        return table, torch.tensor([self.lengths[name] for name in names], dtype=torch.int32)

    def step(self, counts: list[int], in_parts: bool = False) -> None:
        """Decode so many new tokens of each sequence in every layer, and compare."""
        self._write(list(self.live), counts)
        table, lengths = self.tables()
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        decode = self.builder._build_decode(
            block_table_tensor=table,
            seq_lens_device=lengths,
            max_seq_len=int(lengths.max()),
            query_start_loc_cpu=starts,
            query_start_loc_device=starts,
            num_decode_tokens=sum(counts),
            max_query_len=max(counts),
            dcp_tot_seq_lens_device=None,
        )
        metadata = self.backend.MLACommonMetadata(
            num_reqs=len(counts),
            max_query_len=max(counts),
            max_seq_len=int(lengths.max()),
            num_actual_tokens=sum(counts),
            query_start_loc=starts,
            slot_mapping=torch.zeros(sum(counts), dtype=torch.int64),
            num_decodes=len(counts),
            num_decode_tokens=sum(counts),
            num_prefills=0,
            causal=True,
            decode=decode,
        )
        for impl, cache in zip(self.impls, self.caches, strict=True):
            q = torch.randn(sum(counts), HEADS, LATENT + ROPE, generator=self.seed).to(self.dtype)
            given = q.split((LATENT, ROPE), -1) if in_parts else q
            out, lse = impl.forward_mqa(given, cache, metadata, None)
            want, _ = reference.mla_decode(
                q,
                cache.unsqueeze(2),
                table,
                lengths,
                softmax_scale=impl.scale,
                causal=True,
                cu_seqlens_q=starts,
            )
            assert lse is None
            assert out.shape == (sum(counts), HEADS, LATENT)
            torch.testing.assert_close(out.double(), want, rtol=TOLERANCE[self.dtype], atol=TOLERANCE[self.dtype])
        assert len(decode.plans) == 1, "all layers of a step share one schedule"


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequences_join_and_leave(backend: ModuleType, dtype: torch.dtype, block: int) -> None:
    engine = Engine(backend, dtype, block)
    for name, prompt in (("a", 5), ("b", 64), ("c", 1)):
        engine.join(name, prompt)
    engine.step([1, 1, 1])
    engine.step([1, 1, 1], in_parts=True)
    engine.leave("b")
    engine.step([1, 1])
    engine.join("d", 90)  # on the pages that b left
    engine.step([1, 1, 1])


def test_speculative_queries_of_equal_and_of_different_lengths(backend: ModuleType) -> None:
    engine = Engine(backend, torch.float32, 16)
    for name, prompt in (("a", 31), ("b", 7), ("c", 16)):
        engine.join(name, prompt)
    engine.step([2, 2, 2])
    engine.step([3, 1, 2], in_parts=True)
    engine.step([1, 0, 2])


def test_a_context_split_over_ranks_merges_by_its_lse(backend: ModuleType) -> None:
    engine = Engine(backend, torch.float32, 16)
    for name, prompt in (("a", 70), ("b", 33)):
        engine.join(name, prompt)
    table, lengths = engine.tables()
    impl, cache = engine.impls[0], engine.caches[0]
    impl.need_to_return_lse_for_decode = True
    q = torch.randn(2, HEADS, LATENT + ROPE)
    starts = torch.arange(3, dtype=torch.int32)

    def part(table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        decode = engine.builder._build_decode(table, lengths, 70, starts, starts, 2, 1, None)
        fields = {"num_reqs": 2, "max_query_len": 1, "max_seq_len": 70, "num_actual_tokens": 2, "num_decodes": 2}
        fields |= {
            "query_start_loc": starts,
            "slot_mapping": starts,
            "num_decode_tokens": 2,
            "num_prefills": 0,
            "causal": True,
        }
        out, lse = impl.forward_mqa(q, cache, backend.MLACommonMetadata(**fields, decode=decode), None)
        assert lse.shape == (2, HEADS)
        return out.unsqueeze(1), lse.unsqueeze(-1)

    whole = part(table, lengths)
    # The first two pages here, the rest there: of the second sequence one token.
    near = part(table[:, :2].contiguous(), lengths.clamp(max=32))
    far = part(table[:, 2:].contiguous(), lengths - 32)
    merged = hal.mla_merge([near[0], far[0]], [near[1], far[1]])
    for got, want in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, want)
