"""What a run tries: sizes from the whole declared range, every pair of values, views that begin anywhere."""

from __future__ import annotations

import dataclasses
import operator
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hal_conformance.case import MlaCase
from hal_conformance.checks import load
from hal_conformance.checks.capability import declared_calls
from hal_conformance.checks.ep_pairs import realise as realise_ep
from hal_conformance.checks.pairs import realise
from hal_conformance.context import BackendRaised, Context, Settings
from hal_conformance.cover import MOST_CASES, Pair, _plan
from hal_conformance.cover_mla import decode
from hal_conformance.covers import covers
from hal_conformance.docs import spec
from hal_conformance.draw import MOST_HEADS, MOST_PAGE, MOST_QUERIES, Draw, notable, within
from hal_conformance.ep_draw import MOST_EXPERTS, MOST_RANKS, MOST_ROW, MOST_TOKENS, MOST_TOPK, EpDraw
from hal_conformance.inputs import build
from hal_conformance.process import Worker
from hal_conformance.requirements import REQUIREMENTS
from hal_conformance.session import Session
from hal_conformance.table import BY_ID, of_level
from hal_conformance.virtual import NoRoom, reserve
from mutants.ep_sample import Modest, communicates
from mutants.registry import load as mutants
from mutants.runner import WITNESS, installed
from mutants.sample import dense
from seeds import SEED

import hal
from hal.spec.capability import Capabilities, EpCapabilities, Ints, MlaCapabilities, only

DECLARED = {
    "everything": dense(),
    "one of each": dense(
        dtypes=("bfloat16",),
        head_dim=only(576),
        head_dim_v=only(512),
        h_q=Ints(1, 128),
        h_kv=only(1),
        s_q=only(1),
        page_size=only(64),
        causal=False,
        ragged_q=False,
        batch_invariant=False,
        lse_bases=("e",),
    ),
    "steps": dense(h_q=Ints(16, 128, 16), h_kv=only(1, 2), page_size=Ints(32, 1024, 32), s_q=Ints(1, 4)),
    "lone pairs": dense(
        head_dim=only(64, 128), head_dim_v=only(100), h_q=only(6, 12), h_kv=only(5, 6), s_q=only(2), page_size=only(48)
    ),
    "wide": dense(head_dim=Ints(1, 576), head_dim_v=only(512), h_q=Ints(1, 12), h_kv=Ints(1, 64)),
    "unusual": dense(h_q=only(6, 10), h_kv=only(2, 5), head_dim=Ints(40, 90, 10), head_dim_v=only(40), s_q=only(3, 5)),
}


def context(obligation: str, index: int = 0, declared: MlaCapabilities | None = None, mode: Any = "default") -> Context:
    section = dense() if declared is None else declared
    return Context(Settings("cpu", SEED, mode), Capabilities(("cpu",), section, None, None), BY_ID[obligation], index)


def cases_of(obligation: str, mode: Any = "default", declared: MlaCapabilities | None = None) -> list[MlaCase]:
    """The cases that the check of an obligation makes, without making the calls."""
    found: list[MlaCase] = []
    for index in range(BY_ID[obligation].count(mode)):
        one = context(obligation, index, declared, mode)
        one.check = lambda case, what="": found.append(case)  # type: ignore[assignment,method-assign,return-value,misc]
        load()[obligation].run(one)
    return found


def test_a_range_is_drawn_from_up_to_its_ends() -> None:
    assert within(Ints(1), 5) == [1, 2, 3, 4, 5]
    assert within(Ints(3, 9, 2), 100) == [4, 6, 8]
    assert within(only(7, 3), 5) == [3, 7]
    assert within(Ints(1, 300), 200)[-1] == 300
    assert within(Ints(1, 3000), 200)[-1] == 200
    assert within(Ints(1000, None, 10), 5) == [1000]
    assert notable(Ints(2, 12), (1, 4, 64), 100) == [2, 4, 12]
    assert notable(Ints(1), (64,), 256) == [1, 64]


@pytest.mark.parametrize(
    ("obligation", "size", "every"),
    [
        ("MLA-04", lambda c: c.d, range(1, 577)),
        ("MLA-05", lambda c: c.h_kv, range(2, 17)),
        ("MLA-06", lambda c: c.page, range(1, MOST_PAGE + 1)),
        ("MLA-07", lambda c: c.s_q, range(1, MOST_QUERIES + 1)),
        ("MLA-08", lambda c: c.s_q, range(2, MOST_QUERIES + 1)),
        ("MLA-12", lambda c: c.h_q, range(1, MOST_HEADS + 1)),
    ],
)
def test_a_default_run_tries_every_value_of_a_range(obligation: str, size: Any, every: range) -> None:
    assert set(every) <= {size(case) for case in cases_of(obligation)}


CHECKED: tuple[str, ...] = tuple(
    o.id
    for o in of_level("L1") + of_level("L2")
    # The others make calls of their own beside those that `Context.check` makes.
    if o.id not in ("MLA-10", "MLA-36", "MLA-37", "MLA-38", "MLA-39", "MLA-40", "MLA-41", "MLA-42", "MLA-43", "MLA-44")
    and o.id not in ("MLA-46", "MLA-47", "MLA-48", "MLA-49", "MLA-50", "MLA-51")
)


@pytest.mark.parametrize("name", DECLARED)
def test_every_case_is_within_what_is_declared(name: str) -> None:
    declared = DECLARED[name]
    capabilities = Capabilities(("cpu",), declared, None, None)
    for obligation in CHECKED:
        if not REQUIREMENTS[BY_ID[obligation].requires].declared(capabilities):
            continue
        for case in cases_of(obligation, "default", declared):
            sizes = {"h_q": case.h_q, "h_kv": case.h_kv, "page_size": case.page, "s_q": case.s_q}
            sizes |= {"head_dim": case.d, "head_dim_v": case.d_v}
            wrong = {field: n for field, n in sizes.items() if n not in getattr(declared, field)}
            assert not wrong, (obligation, wrong)
            assert case.h_q % case.h_kv == 0, (obligation, case)
            assert case.d_v <= case.d, (obligation, case)


def test_batches_and_lengths_are_large_whole_and_small_in_a_quick_run_too() -> None:
    cases = cases_of("MLA-09", "quick")
    assert any(case.batch > 64 for case in cases)
    assert sum(any(n % 512 == 0 for n in case.lengths) for case in cases) >= 3
    assert any(case.h_q not in range(1, 17) for case in cases_of("MLA-12", "quick"))


def test_ordinary_lengths_keep_off_the_edges_of_their_page() -> None:
    draw = context("MLA-06").draw()
    for page in (16, 37, 64, 100):
        lengths = draw.ordinary(range(17, 600), page)
        assert not {n % page for n in lengths} & {1, page - 1}
    edges = context("MLA-23").draw()
    assert edges.ordinary([65], 64) == (65,)


@pytest.mark.parametrize("name", DECLARED)
def test_every_legal_pair_meets_in_a_plan_and_its_cases_are_what_it_says(name: str) -> None:
    declared = DECLARED[name]
    cover = decode(declared)
    rows = cover.plan(str(SEED))
    met: set[Pair] = set()
    for index, row in enumerate(rows):
        case = realise(context("MLA-46", index, declared).draw(), row)
        assert cover.labels(case) == row
        sizes = {"h_q": case.h_q, "h_kv": case.h_kv, "page_size": case.page, "head_dim": case.d, "head_dim_v": case.d_v}
        assert all(value in getattr(declared, field) for field, value in sizes.items()), sizes
        assert max(case.queries) in declared.s_q
        assert case.h_q % case.h_kv == 0
        assert case.d_v <= case.d
        met |= cover.pairs_of(row)
    assert met == set(cover.legal_pairs())
    assert len(rows) < MOST_CASES
    assert rows == _plan.__wrapped__(cover, str(SEED))
    if len(rows) > 1:
        assert rows != cover.plan(f"{SEED} other")


def test_the_first_cases_of_a_plan_bring_most_pairs_together() -> None:
    for cover in (decode(dense()), *EP_COVERS["everything"]):
        rows = cover.plan(str(SEED))[:20]
        met = set().union(*(cover.pairs_of(row) for row in rows))
        assert len(met) > 0.55 * len(cover.legal_pairs())


EP_DECLARED = {
    "everything": communicates(),
    "modest": Modest().declared(),
    "unusual": communicates(
        dtypes=("float32", "float8_e4m3fn"),
        casts=("fp8",),
        layouts=("rank",),
        ranks=only(2, 6),
        nodes=only(1, 2),
        topk=Ints(2, 6, 2),
        num_experts=Ints(12, 48, 12),
        row_bytes=Ints(16, 4096, 16),
        overflow=("error", "drop"),
        recv_hook=False,
        across_nodes=("normal", "error"),
    ),
}
EP_DECLARED["DeepSeek's"] = communicates(
    dtypes=("bfloat16", "float8_e4m3fn"),
    ranks=only(8, 16),
    nodes=only(1, 2),
    topk=only(8),
    num_experts=only(256),
    row_bytes=only(14336, 7168),
)
EP_DECLARED["tiny"] = communicates(
    ranks=only(1), nodes=only(1), topk=only(13), num_experts=only(257), row_bytes=only(16)
)
EP_DECLARED["large"] = communicates(num_experts=Ints(512, 1024, 128), row_bytes=only(14336, 7168), ranks=only(2))
EP_COVERS = {name: list(covers(Capabilities(("cpu",), None, None, e)).values()) for name, e in EP_DECLARED.items()}


@pytest.mark.parametrize("name", EP_DECLARED)
def test_every_legal_pair_of_an_ep_call_meets_in_a_plan_and_its_cases_are_what_it_says(name: str) -> None:
    declared = EP_DECLARED[name]
    count = {"everything": 4, "modest": 1, "unusual": 3, "DeepSeek's": 4, "tiny": 2, "large": 4}
    assert len(EP_COVERS[name]) == count[name]
    for cover in EP_COVERS[name]:
        met: set[Pair] = set()
        for index, row in enumerate(cover.plan(str(SEED))):
            case = realise_ep(random.Random(f"{SEED}/{index}"), declared, cover.chosen(row))
            assert cover.labels(case) == row
            assert case.ranks == len(case.tokens) and case.ranks in declared.ranks
            assert case.experts in declared.num_experts
            assert {case.topk, case.width or case.topk} <= {n for n in range(32) if n in declared.topk}
            assert case.hidden * case.torch_dtype.itemsize in declared.row_bytes
            assert case.hidden in declared.row_bytes or not case.scales
            assert case.hidden % 16 == 0 or case.cast == "none"
            if case.per_node is not None:
                assert case.ranks // case.per_node in declared.nodes
            met |= cover.pairs_of(row)
        assert met == set(cover.legal_pairs())
        assert len(cover.plan(str(SEED))) < 80


def test_groups_of_the_size_that_was_asked_for_are_planned() -> None:
    everything = Capabilities(("cpu",), None, None, communicates())
    assert {name: cover.values()["ranks"] for name, cover in covers(everything, 16).items()} == {
        "EP normal": ("16",),
        "EP normal across nodes": ("16",),
        "EP low_latency": ("16",),
        "EP low_latency across nodes": ("16",),
    }


def test_a_causal_ragged_case_has_a_sequence_with_fewer_keys_than_queries() -> None:
    causal = [case for mode in ("quick", "default") for case in cases_of("MLA-34", mode) if case.causal]
    assert causal
    for case in causal:
        assert any(length < n for length, n in zip(case.lengths, case.queries, strict=True)), case


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_views_begin_off_their_alignment_and_stay_guarded(dtype: str) -> None:
    draw = context("MLA-26").draw()
    case = MlaCase(dtype=dtype, lengths=(5, 33, 0), h_q=4, d=24, d_v=16, page=16)
    inputs = build(case.but(**draw.starts("q", "kv")), 1)
    plain = build(case, 1)
    for moved, kept in ((inputs.q, plain.q), (inputs.kv_cache, plain.kv_cache)):
        assert moved.view.data_ptr() % 16
        assert not kept.view.data_ptr() % 16
        assert torch.equal(moved.view.nan_to_num(), kept.view.nan_to_num())
    inputs.q.storage[inputs.q.view.storage_offset() - 1] = 1
    assert "before its first" in inputs.q.overrun()


def test_a_cache_larger_than_memory_takes_no_memory() -> None:
    cache = reserve(2**33, torch.bfloat16, "cpu")
    assert cache.numel() == 2**33
    cache[-1] = 3
    assert float(cache[-1]) == 3
    with pytest.raises(NoRoom, match="address space"):
        reserve(2**60, torch.bfloat16, "cpu")


def test_a_large_cache_that_was_not_tried_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    one = context("MLA-48", 1, hal.capabilities("cpu").mla_dense)
    load()["MLA-48"].run(one)
    assert (one.record.problems, one.record.notes, one.record.calls) == ([], [], 2)

    def refuse(*_: object) -> torch.Tensor:
        raise NoRoom("no address space")

    monkeypatch.setattr("hal_conformance.checks.huge.reserve", refuse)
    one = context("MLA-48", 1, hal.capabilities("cpu").mla_dense)
    load()["MLA-48"].run(one)
    assert one.record.problems == []
    assert one.record.notes == [f"no cache of more than {2**32} elements was tried: no address space"]


def test_a_large_cache_that_a_device_refuses_is_said_and_every_other_error_is_the_backends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error: list[Exception] = [hal.DeviceError("clCreateBuffer of 8 GiB: INVALID_BUFFER_SIZE")]
    monkeypatch.setattr(Context, "run", _only_small(Context.run, error))
    one = context("MLA-48", 1, hal.capabilities("cpu").mla_dense)
    load()["MLA-48"].run(one)
    assert (one.record.problems, one.record.notes) == (
        [],
        [f"no cache of more than {2**32} elements was tried: clCreateBuffer of 8 GiB: INVALID_BUFFER_SIZE"],
    )
    error[0] = RuntimeError("offset overflows")
    with pytest.raises(BackendRaised, match="offset overflows"):
        load()["MLA-48"].run(context("MLA-48", 1, hal.capabilities("cpu").mla_dense))


def _only_small(run: Callable[..., Any], error: list[Exception]) -> Callable[..., Any]:
    def refusing(self: Context, inputs: Any, **options: Any) -> Any:
        if inputs.kv_cache.view.numel() > 2**31:
            raise BackendRaised(inputs.case, error[0])
        return run(self, inputs, **options)

    return refusing


@pytest.fixture
def _mutants_are_installed() -> Iterator[None]:
    with installed():
        yield


@pytest.mark.usefixtures("_mutants_are_installed")
@pytest.mark.sampled
@pytest.mark.long(4)
@pytest.mark.parametrize(
    ("name", "obligation", "mode"),
    [
        ("mutant-signed-offsets", "MLA-48", "quick"),
        ("mutant-unaligned-queries", "MLA-26", "quick"),
        ("mutant-unaligned-cache", "MLA-27", "quick"),
        ("mutant-unaligned-out", "MLA-28", "quick"),
        ("mutant-ragged-fewer-keys", "MLA-34", "quick"),
        ("mutant-sixty-four-sequences", "MLA-09", "quick"),
        ("mutant-whole-chunks-lost", "MLA-09", "quick"),
        ("mutant-eight-causal-queries", "MLA-07", "quick"),
        ("mutant-two-hundred-fifty-six-heads", "MLA-47", "quick"),
        ("mutant-forty-heads", "MLA-12", "default"),
        ("mutant-plan-keeps-the-scale", "MLA-10", "quick"),
        ("mutant-one-past-the-cache", "MLA-40", "quick"),
        ("mutant-keeps-what-it-gathered", "MLA-49", "quick"),
        ("mutant-scale-of-another-thread", "MLA-51", "quick"),
        ("mutant-refuses-large-caches", "MLA-48", "quick"),
    ],
)
def test_what_was_once_certified_is_not_any_more(name: str, obligation: str, mode: Any, kept_worker: Worker) -> None:
    assert mutants()[name].level == BY_ID[obligation].level
    session = Session(Settings(name, SEED, mode), [obligation], witness=WITNESS)
    session.worker = kept_worker
    session.stop_after = 1
    result = session.run_one(BY_ID[obligation])
    assert result.status == "FAIL", result.message
    covered = session.coverage()
    if obligation in ("MLA-40", "MLA-48"):
        return  # Their first call is wrong already.
    assert 0 < covered["covered"] < covered["pairs"]


@pytest.mark.usefixtures("_mutants_are_installed")
def test_a_pair_that_is_wrong_fails_in_the_case_of_the_plan_that_has_it(kept_worker: Worker) -> None:
    cover = decode(dense())
    rows = [cover.chosen(row) for row in cover.plan(f"{SEED}/0")]
    index = next(at for at, row in enumerate(rows) if (row["h_kv"], row["page_size"]) == ("3", "1"))
    session = Session(Settings("mutant-three-kv-heads-on-tiny-pages", SEED), ["MLA-46"], index, witness=WITNESS)
    session.worker = kept_worker
    result = session.run_one(BY_ID["MLA-46"])
    assert result.status == "FAIL", result.message
    assert (result.failures[0]["case"]["h_kv"], result.failures[0]["case"]["page"]) == (3, 1)


def test_the_upper_end_of_what_is_declared_is_called_however_far_it_is() -> None:
    declared = dense(h_q=Ints(1, 1000), page_size=Ints(16, 1024, 16), s_q=Ints(1, 100), h_kv=only(1))
    calls = declared_calls(context("MLA-47", declared=declared))
    assert {1000, 128, 1} <= {case.h_q for case in calls}
    assert {1024, 16} <= {case.page for case in calls}
    assert {100, 16, 1} <= {case.s_q for case in calls}
    assert max(case.h_q for case in declared_calls(context("MLA-47"))) == 256


def test_a_draw_is_the_same_in_every_mode_but_for_how_much_of_it_there_is() -> None:
    def draws(mode: Any) -> Draw:
        return context("MLA-12", 2, mode=mode).draw()

    whole = draws("default").hand("h_q", range(1, 161))
    assert draws("quick").hand("h_q", range(1, 161)) == whole[:3]
    assert dataclasses.replace(draws("default"), index=1).hand("h_q", range(1, 161)) != whole


_LARGE = [operator.attrgetter(name) for name in ("many", "wide", "crowd", "long")]


@pytest.mark.parametrize("declared", [communicates(), Modest().declared()])
def test_large_groups_and_long_rows_are_drawn_as_far_as_they_are_declared(declared: EpCapabilities) -> None:
    made = [EpDraw(random.Random(seed), declared, seed) for seed in range(20)]
    many, wide, crowd, long = ([make(d)(d.base()) for d in made] for make in _LARGE)
    for case in many + wide + crowd + long:
        assert case.ranks == len(case.tokens) and case.ranks in declared.ranks
        assert case.experts in declared.num_experts and case.topk in declared.topk
        assert case.hidden * case.torch_dtype.itemsize in declared.row_bytes
    if declared == communicates():
        assert {case.ranks for case in many} == {5, 6, 7, 8}
        assert min(case.experts for case in many) > 128 and min(case.topk for case in many) > 6
        assert min(case.experts for case in wide) > 512 and min(max(case.tokens) for case in crowd) >= 650
        assert min(max(case.tokens) for case in many) > 64
        assert min(case.hidden * case.torch_dtype.itemsize for case in long) > 8192


def test_the_specification_says_how_large_groups_are() -> None:
    text = " ".join(spec().split())
    assert f"up to {MOST_RANKS} ranks, {MOST_EXPERTS} experts, a top-k of {MOST_TOPK}" in text
    assert f"{MOST_TOKENS} tokens of a rank, and rows of {MOST_ROW} bytes" in text
