"""What an obligation requires a backend to declare, and the call that must be refused where it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

import hal
from hal.spec.capability import Capabilities, MlaCapabilities
from hal_conformance.case import MlaCase
from hal_conformance.context import Context, refused
from hal_conformance.cover_mla import plain_dense
from hal_conformance.ep_requirements import EP_REQUIREMENTS, ep, refusal
from hal_conformance.inputs import build


@dataclass(frozen=True, slots=True)
class Requirement:
    """A documented property of a backend.

    Attributes
    ----------
    title : str
        In words, for the specification.
    declared : callable
        Whether these capabilities declare it.
    refusal : callable or None
        Makes the legal call that must raise `UnsupportedError` where it is not declared, and says what it did instead;
        None where nothing can be undeclared.
    """

    title: str
    declared: Callable[[Capabilities], bool]
    refusal: Callable[[Context], str] | None = None


def plainest(context: Context) -> MlaCase:
    """The simplest declared dense call; where nothing is declared, the call every engine makes."""
    if context.capabilities.mla_dense is None:
        return MlaCase(device=context.device)
    return context.draw().base().but(lengths=(5, 70))


def decode(case: MlaCase, backend: str, **extra: Any) -> object:
    """The call itself, with arguments a case has no field for."""
    inputs = build(case, 1)
    positional, keywords = inputs.arguments()
    return hal.mla_decode(
        *positional, **{**keywords, "batch_invariant": case.batch_invariant, "backend": backend, **extra}
    )


def dense_call(**changes: Any) -> Callable[[Context], str]:
    """A refusal of the plainest call with some of its fields changed."""

    def refusal(context: Context) -> str:
        return refused(lambda: decode(plainest(context).but(**changes), context.backend))

    return refusal


def _several_kv_heads(context: Context) -> str:
    case = plainest(context)
    return refused(lambda: decode(case.but(h_q=2 * case.h_q, h_kv=2), context.backend))


def _sparse(context: Context) -> str:
    case = plainest(context).but(h_kv=1)
    indices = torch.full((case.batch, case.s_q, 64), -1, dtype=torch.int32, device=case.device)
    indices[..., 0] = 0
    return refused(lambda: decode(case, context.backend, indices=indices))


def _packed(kv_format: str, d: int, row: int) -> Callable[[Context], str]:
    def refusal(context: Context) -> str:
        case = plainest(context)
        dtype = case.torch_dtype if case.dtype in ("bfloat16", "float16") else torch.bfloat16
        device = case.device
        q = torch.zeros(1, 1, case.h_q, d, dtype=dtype, device=device)
        cache = torch.zeros(2, 64, 1, row, dtype=torch.uint8, device=device)
        table = torch.zeros(1, 2, dtype=torch.int32, device=device)
        lengths = torch.full((1,), 5, dtype=torch.int32, device=device)
        return refused(lambda: hal.mla_decode(q, cache, table, lengths, kv_format=kv_format, backend=context.backend))

    return refusal


def _sink(context: Context) -> str:
    case = plainest(context)
    sink = torch.zeros(case.h_q, dtype=torch.float32, device=case.device)
    return refused(lambda: decode(case, context.backend, attn_sink=sink))


def _extra(context: Context) -> str:
    case = plainest(context)
    cache = torch.zeros(1, case.page, 1, case.d, dtype=case.torch_dtype, device=case.device)
    indices = torch.zeros(case.batch, case.s_q, 4, dtype=torch.int32, device=case.device)
    return refused(lambda: decode(case, context.backend, extra_kv_cache=cache, extra_indices=indices))


def _dense(test: Callable[[MlaCapabilities], bool]) -> Callable[[Capabilities], bool]:
    def declared(capabilities: Capabilities) -> bool:
        dense = plain_dense(capabilities)
        return dense is not None and test(dense)

    return declared


def _any_mla(test: Callable[[MlaCapabilities], bool]) -> Callable[[Capabilities], bool]:
    return lambda c: any(test(kind) for kind in (c.mla_dense, c.mla_sparse) if kind is not None)


REQUIREMENTS: Final[dict[str, Requirement]] = {
    "nothing": Requirement("every backend", lambda c: True),
    "dense": Requirement("dense decode", _dense(lambda m: True), dense_call()),
    "causal": Requirement("causal dense decode", _dense(lambda m: m.causal), dense_call(causal=True)),
    "several_queries": Requirement(
        "s_q above 1", _dense(lambda m: any(n in m.s_q for n in range(2, 64))), dense_call(s_q=2)
    ),
    "several_kv_heads": Requirement(
        "h_kv above 1", _dense(lambda m: any(n in m.h_kv for n in range(2, 64))), _several_kv_heads
    ),
    "ragged_q": Requirement("ragged queries", _dense(lambda m: m.ragged_q), dense_call(q_lens=(1, 2), lengths=(5, 70))),
    "batch_invariant": Requirement(
        "batch invariance", _dense(lambda m: m.batch_invariant), dense_call(batch_invariant=True)
    ),
    "lse_base_2": Requirement("lse in base 2", _dense(lambda m: "2" in m.lse_bases), dense_call(lse_base="2")),
    "sparse": Requirement("sparse decode", lambda c: c.mla_sparse is not None, _sparse),
    "kv_v32": Requirement("v32 caches", _any_mla(lambda m: "v32" in m.kv_formats), _packed("v32", 576, 656)),
    "kv_model1": Requirement(
        "model1 caches", _any_mla(lambda m: "model1" in m.kv_formats), _packed("model1", 512, 584)
    ),
    "attn_sink": Requirement("attention sinks", _any_mla(lambda m: m.attn_sink), _sink),
    "extra_kv_cache": Requirement("extra caches", _any_mla(lambda m: m.extra_kv_cache), _extra),
    **{
        name: Requirement(title, ep(declared), refusal(calls))
        for name, (title, declared, calls) in EP_REQUIREMENTS.items()
    },
}
