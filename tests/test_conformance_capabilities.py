"""What a backend may declare: CAP-04 names the field and what is legal; what is legal is tested as far as it goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hal_conformance.checks.capability import declared_calls, illegal
from hal_conformance.context import Context, Settings
from hal_conformance.covers import covers
from hal_conformance.process import Worker
from hal_conformance.requirements import REQUIREMENTS
from hal_conformance.session import Session
from hal_conformance.table import BY_ID, OBLIGATIONS
from mutants.ep_sample import Modest, communicates
from mutants.registry import load
from mutants.runner import installed, kill
from mutants.sample import dense

import hal
from hal.spec.capability import Capabilities, Ints, only


def _ep(**changes: Any) -> Capabilities:
    return Capabilities(("cpu",), None, None, communicates(**changes))


def _dense(**changes: Any) -> Capabilities:
    return Capabilities(("cpu",), dense(**changes), None, None)


@pytest.mark.parametrize(
    ("declared", "complaint"),
    [
        (_ep(layouts=("expand",)), "ep.layouts is ('expand',), without 'rank': a row per token and rank is what"),
        (_ep(nodes=only(2)), "ep.nodes (2) lacks 1: by default a group is one node"),
        (_ep(nodes=Ints(2, 64)), "ep.nodes (2…64) lacks 1"),
        (_ep(overflow=("drop",)), "ep.overflow is ('drop',), without 'error', the policy that a buffer has by default"),
        (_ep(overflow=("error", "wait")), "ep.overflow: 'wait' is none of error, drop, grow"),
        (_ep(casts=("none", "fp16")), "ep.casts: 'fp16' is none of none, fp8, fp8_pow2, fp8_ue8m0"),
        (_ep(casts=()), "ep.casts is (), not a tuple of at least one word"),
        (_ep(across_nodes=("normal", "low-latency")), "ep.across_nodes: 'low-latency' is none of normal, low_latency"),
        (_ep(transports=()), "ep.transports is (), not a tuple of at least one word"),
        (_ep(dtypes=("bf16",)), "ep.dtypes: 'bf16' is none of bfloat16, float16, float32, float8_e4m3fn"),
        (_ep(dtypes=("float8_e4m3fn",)), "ep.dtypes is ('float8_e4m3fn',), and a buffer has one of bfloat16"),
        (_ep(row_bytes=only(24)), "ep.row_bytes (24) holds no multiple of 16, which every row is"),
        (_dense(lse_bases=("2",)), "mla_dense.lse_bases lacks 'e', the specified default"),
        (_dense(h_q=only(3, 9), h_kv=only(2)), "mla_dense.h_q (3 or 9) holds no multiple of h_kv (2)"),
        (_dense(head_dim=only(64), head_dim_v=only(512)), "mla_dense.head_dim_v (512) is above head_dim (64)"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_may_not_be_declared_is_named_with_what_may(declared: Capabilities, complaint: str) -> None:
    assert any(text.startswith(complaint) for text in illegal(declared)), list(illegal(declared))


@pytest.mark.parametrize(
    "declared",
    [
        _ep(),
        Capabilities(("cpu",), None, None, Modest().declared()),
        _ep(nodes=only(1, 3), ranks=only(3), row_bytes=only(16), num_experts=only(256), topk=only(8)),
        _ep(modes=("low_latency",), layouts=(), across_nodes=(), overflow=("error",)),
        _ep(modes=("normal",), casts=(), across_nodes=("normal", "error")),
        _ep(ranks=Ints(0, 8), nodes=Ints(0, 2), topk=Ints(0), num_experts=Ints(0)),
        _dense(head_dim=Ints(1, 576), head_dim_v=only(512)),
        _dense(head_dim=only(64, 128), head_dim_v=only(100), h_q=only(6), h_kv=only(5, 6)),
        _dense(kv_formats=("v32",)),
        hal.capabilities("cpu"),
    ],
)
def test_what_declares_little_is_legal(declared: Capabilities) -> None:
    assert list(illegal(declared)) == []
    assert all(cover.legal_pairs() for cover in covers(declared).values())


@pytest.mark.parametrize("wrong", [_ep(dtypes=("bf16",)), _ep(row_bytes=only(24)), _dense(h_q=only(3), h_kv=only(2))])
def test_of_what_is_not_legal_a_report_can_be_made_all_the_same(wrong: Capabilities) -> None:
    session = Session(Settings("sample", 1))
    session.capabilities = wrong
    assert session.coverage() == {"covered": 0, "pairs": 0}
    assert {requirement.declared(wrong) for requirement in REQUIREMENTS.values()} == {True, False}


@pytest.mark.parametrize("s_q", [only(3), only(100), only(1000), Ints(4, 8)], ids=str)
def test_a_call_for_every_declared_value_is_found_whatever_the_numbers_of_queries(s_q: Ints) -> None:
    context = Context(Settings("sample", 1), _dense(s_q=s_q, ragged_q=True), BY_ID["CAP-05"], 0)
    assert any(case.q_lens for case in declared_calls(context))


def test_of_packed_caches_alone_nothing_is_asked_but_to_refuse_the_rest() -> None:
    packed = _dense(kv_formats=("v32",))
    declared = {name for name, requirement in REQUIREMENTS.items() if requirement.declared(packed)}
    assert declared == {"nothing", "kv_v32"}
    assert covers(packed) == {}
    asked = {o.requires for o in OBLIGATIONS if o.requires in declared}
    assert asked == declared


@pytest.fixture(scope="module")
def _mutants_are_installed() -> Iterator[None]:
    with installed():
        yield


@pytest.mark.usefixtures("_mutants_are_installed")
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("expand-alone", "ep.layouts is ('expand',), without 'rank'"),
        ("two-nodes-alone", "ep.nodes (2) lacks 1"),
        ("policy-of-its-own", "ep.overflow: 'wait'"),
        ("across-nodes-misspelt", "ep.across_nodes: 'low-latency'"),
        ("never-an-error", "ep.overflow is ('drop',), without 'error'"),
        ("heads-that-never-divide", "mla_dense.h_q (3 or 9) holds no multiple"),
    ],
)
def test_a_declaration_that_is_not_legal_ends_at_the_gate(name: str, complaint: str, kept_worker: Worker) -> None:
    done = kill(load()[f"mutant-{name}"], kept_worker)
    assert done.right
    assert done.by[0] == "CAP-04"
    assert done.message.startswith(complaint)
