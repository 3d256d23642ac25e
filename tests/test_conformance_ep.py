"""The expert-parallel half of the suite: what it says of a wrong engine, and what a modest one is asked."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hal_conformance import ep_causes
from hal_conformance.checks import ep_misuse
from hal_conformance.context import Record, Settings
from hal_conformance.ep import Step, own_device
from hal_conformance.ep_case import ROUTINGS, EpCase
from hal_conformance.ep_draw import EpDraw
from hal_conformance.ep_judge import differ, padded, received
from hal_conformance.parcel import pack, unpack
from hal_conformance.process import Worker
from hal_conformance.session import Result, Session
from hal_conformance.table import OBLIGATIONS
from mutants.ep_sample import communicates
from mutants.runner import WITNESS, installed
from seeds import SEED

from hal.reference import ep as oracle


@pytest.fixture(autouse=True)
def _mutants_are_installed() -> Iterator[None]:
    with installed():
        yield


Run = Callable[..., dict[str, Result]]


@pytest.fixture
def run(kept_worker: Worker) -> Run:
    """Run some obligations against a backend; what became of each."""

    def results(backend: str, *only: str, case: int | None = None) -> dict[str, Result]:
        session = Session(Settings(backend, SEED, "quick"), only, case, witness=WITNESS)
        session.stop_after = 1
        session.worker = kept_worker
        return {o: session.run_one(next(row for row in OBLIGATIONS if row.id == o)) for o in only}

    return results


@pytest.mark.long(19)
def test_what_an_engine_does_not_declare_is_called_and_seen_refused(run: Run) -> None:
    only = [o.id for o in OBLIGATIONS if o.id.startswith("EP")]
    results = run("ep-modest", "CAP-01", *only)
    assert {r.status for r in results.values()} == {"PASS", "REFUSED"}, {
        r.id: r.message for r in results.values() if r.status not in ("PASS", "REFUSED")
    }
    refused = {r.id for r in results.values() if r.status == "REFUSED"}
    assert {"EPN-07", "EPN-08", "EPN-20", "EPN-24", "EPN-26", "EPN-28", "EPN-29", "EPX-01", "EPX-14"} <= refused
    assert {o for o in only if o.startswith("EPL")} <= refused
    assert all(r.calls for r in results.values())


@pytest.mark.long(30)
def test_faults_and_masks_are_tried_where_there_are_only_low_latency_calls(run: Run) -> None:
    results = run("ep-low-latency-only", "CAP-01", *(o.id for o in OBLIGATIONS if o.id.startswith("EPX")))
    refused = {"EPX-01", "EPX-02", "EPX-04"}
    assert {r.id: r.message for r in results.values() if r.status not in ("PASS", "REFUSED")} == {}
    assert {r.id for r in results.values() if r.status == "REFUSED"} == refused


def test_without_expert_parallel_calls_every_one_is_refused(run: Run) -> None:
    results = run("sample", "CAP-01", "EPN-01", "EPN-07", "EPL-01", "EPX-01", "EPX-10")
    assert [r.status for r in results.values()] == ["PASS", *["REFUSED"] * 5]


def test_a_failure_is_located_and_its_line_repeats_it(run: Run) -> None:
    result = run("mutant-scale-of-the-neighbour", "EPN-08")["EPN-08"]
    assert result.status == "FAIL"
    failure = result.failures[0]
    text = failure["problems"][0]
    for word in ("rank ", "dispatch: the scales differs in", "first in row", "token", "columns", "instead of"):
        assert word in text
    assert failure["diagnosis"]["cause"].startswith("scales of the neighbour")
    assert failure["reproduce"] == (
        f"hal conform --backend mutant-scale-of-the-neighbour --case EPN-08@{SEED}.{failure['index']} --quick"
    )
    again = run("mutant-scale-of-the-neighbour", "EPN-08", case=failure["index"])["EPN-08"]
    assert again.failures[0]["problems"] == failure["problems"]


@pytest.mark.long(28)
def test_a_rank_that_hangs_is_named_with_what_it_was_doing(run: Run) -> None:
    result = run("mutant-no-tokens-hang", "EPN-04")["EPN-04"]
    assert result.status == "FAIL"
    assert "is stuck in phase 'dispatch dispatch'" in result.message


def test_every_routing_has_legal_experts_of_every_rank() -> None:
    for routing in ROUTINGS:
        for experts, topk in ((7, 3), (1, 2), (16, 8)):
            case = EpCase(ranks=3, experts=experts, topk=topk, tokens=(4, 0, 9), routing=routing)
            for given, n in zip(case.inputs(5), case.tokens, strict=True):
                assert given.topk_idx.shape == (n, topk)
                assert given.topk_idx.dtype == torch.int64
                assert not bool(((given.topk_idx < -1) | (given.topk_idx >= experts)).any())
    assert torch.equal(EpCase().inputs(5)[1].x, EpCase().inputs(5)[1].x)


def test_ranks_take_the_devices_of_the_machine_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[int] = []
    module = SimpleNamespace(device_count=lambda: 2, set_device=current.append)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert [own_device("cuda", rank) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert own_device("cuda:1", 2) == "cuda:1"
    assert current == [0, 1, 0, 1]
    assert own_device("cpu", 1) == "cpu" and len(current) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.bool, torch.float64])
def test_tensors_of_every_dtype_travel_by_value(dtype: torch.dtype) -> None:
    for shape in ((3, 4), (0, 4), (2, 0)):
        sent = torch.randint(0, 2, shape).to(dtype)
        got = unpack(pack({"x": [sent.clone()]}))["x"][0]
        assert got.dtype == dtype
        assert got.shape == sent.shape
        assert torch.equal(got.double(), sent.double())


def test_a_column_of_one_row_travels_whatever_its_stride() -> None:
    column = torch.arange(8, dtype=torch.int32).view(4, 2)[2:3, 1]
    assert column.stride() == (2,)
    assert unpack(pack(column)).tolist() == [5]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_of_any_bits_hold_what_arithmetic_changes(dtype: str) -> None:
    case = EpCase(ranks=2, tokens=(9, 9), hidden=2000, dtype=dtype, data="bits")
    rows = torch.cat([given.x for given in case.inputs(5)])
    tiny = torch.finfo(case.torch_dtype).tiny
    assert bool(rows.isnan().any()) and bool(rows.isinf().any() | (rows.abs() > 1e4).any())
    assert bool(((rows != 0) & (rows.abs() < tiny)).any())
    assert bool(((rows == 0) & rows.signbit()).any()) and bool(((rows == 0) & ~rows.signbit()).any())
    sums = torch.cat(case.outputs([9, 9], 5))
    assert bool(sums.isnan().any()) and bool((sums == torch.inf).any())
    finite = sums[sums.isfinite()]
    assert bool((finite.abs() < tiny).all()) and bool((finite != 0).any())
    fp8 = case.but(scales="float32").inputs(5)[0].x
    assert bool(fp8.float().isnan().any())


def test_what_arithmetic_did_to_moved_rows_is_named() -> None:
    case = EpCase(ranks=1, tokens=(6,), hidden=512, data="bits", weights="")
    inputs = case.inputs(5)
    want = oracle.dispatch(inputs, case.experts)
    rows = want[0].x
    flushed = rows.where(rows.abs() >= torch.finfo(torch.float32).tiny, torch.zeros_like(rows))
    for x, cause in (
        (rows.where(rows != 0, torch.zeros_like(rows)), "-0 arrives as 0"),
        (rows.where(rows.isnan(), flushed), "denormal numbers arrive as 0"),
    ):
        seen = {"x": x, "idx": want[0].topk_idx, "scales": None, "weights": None, "counts": []}
        assert ep_causes.of_received(case, inputs, 0, seen, want, (), False).startswith(cause)


def test_calls_of_one_buffer_are_unlike_and_fit_it() -> None:
    case = EpDraw(random.Random(5), communicates(), 0).base((3,))
    calls = EpDraw(random.Random(5), communicates(), 0).unlike(case)
    assert len({call.tokens for call in calls}) > 3 and any(0 in call.tokens for call in calls)
    assert len({call.topk for call in calls}) == 2
    assert len({str(call.buffer()) for call in calls}) == 1


def test_a_negative_zero_is_another_bit_and_nan_equals_itself() -> None:
    want = torch.tensor([[1.0, torch.nan, 0.0]])
    assert differ("x", want.clone(), want, str) == ""
    assert "columns 2 of 3: -0.0 instead of 0.0" in differ("x", torch.tensor([[1.0, torch.nan, -0.0]]), want, str)
    assert differ("x", want[:, :2], want, str) == "x has shape [1, 2] instead of [1, 3]"
    assert differ("x", want[:0], want, str).endswith("first different in row 0 (0)")
    assert differ("x", torch.cat([want, want]), want, str).endswith("more rows from row 1 on")
    assert "dtype" in differ("x", want.half(), want, str)
    assert differ("x", None, want, str) == "x is nothing instead of a tensor"


class _Noted:
    """What `received` needs of a context."""

    def __init__(self) -> None:
        self.record = Record()
        self.wants_diagnosis = False

    def problem(self, text: str) -> None:
        self.record.problems.append(text)


@pytest.mark.parametrize("spare", [0, 2])
def test_as_many_rows_as_the_worst_case_are_judged(spare: int) -> None:
    case = EpCase(ranks=1, experts=2, topk=1, tokens=(3,), routing="distinct", worst=3 + spare)
    inputs = case.inputs(1)
    want = oracle.dispatch(inputs, 2)
    got = {
        "recv_x": padded(want[0].x, case.worst),
        "recv_topk_idx": torch.cat([want[0].topk_idx, torch.full((spare, 1), -1)]),
        "recv_topk_weights": padded(want[0].topk_weights, case.worst),
        "num_recv_tokens_per_expert": (),
        "num_dropped": 0,
    }
    context: Any = _Noted()
    assert received(context, case, inputs, 0, got, want)
    got["recv_topk_idx"][-1] = 7
    assert not received(context, case, inputs, 0, got, want)


def test_a_last_choice_that_is_not_looked_at_is_the_cause_also_where_every_row_comes() -> None:
    """On one rank a token's other choices bring it: only the experts it comes for tell."""
    case = EpCase(ranks=1, experts=4, topk=3, tokens=(5,), routing="distinct", hidden=16)
    inputs = case.inputs(1)
    want = oracle.dispatch(inputs, 4)
    inputs[0].topk_idx[:, -1] = -1
    got = oracle.dispatch(inputs, 4)[0]
    found = {"x": got.x, "idx": got.topk_idx, "counts": got.num_tokens_per_expert}
    assert ep_causes.of_received(case, inputs, 0, found, want, (), False) == ep_causes.LAST_COLUMN


def test_a_row_too_few_is_wrong_also_where_no_row_came() -> None:
    for rows in (3, 1, 0):
        step = Step("combine", "combine", {"x": torch.ones(rows, 8)})
        assert len(ep_misuse._short(step).args["x"]) == abs(rows - 1)


def test_counts_of_many_experts_are_told_by_those_that_differ() -> None:
    case = EpCase(ranks=1, experts=40, topk=1, tokens=(3,), routing="distinct")
    inputs = case.inputs(1)
    want = oracle.dispatch(inputs, 40)
    counts = list(want[0].num_tokens_per_expert)
    counts[33] += 2
    got = {
        "recv_x": want[0].x,
        "recv_topk_idx": want[0].topk_idx,
        "recv_topk_weights": want[0].topk_weights,
        "num_recv_tokens_per_expert": counts,
        "num_dropped": 0,
    }
    noted = _Noted()
    received(noted, case, inputs, 0, got, want, "dispatch")  # type: ignore[arg-type]
    assert f"differs for 1 of 40 experts: {counts[33]} instead of {counts[33] - 2} for local expert 33" in str(
        noted.record.problems
    )


@pytest.mark.parametrize(
    ("got", "others", "said"),
    [
        (0, (1, 0), "recv_count is 0 for every expert"),
        (3, (3, 0), "counts are swapped between ranks: these are those of rank 1"),
        (3, (3, 3), "recv_count is not the number of received rows"),
    ],
)
def test_counts_are_those_of_another_rank_only_if_no_other_has_them(
    got: int, others: tuple[int, int], said: str
) -> None:
    """A masked rank has zeros, and so has whatever writes nothing."""
    case = EpCase(ranks=3, experts=3, topk=1, tokens=(0, 0, 0), routing="distinct")
    wants: Any = [SimpleNamespace(count=torch.tensor([count])) for count in (5, *others)]
    given = {"recv_count": torch.tensor([got])}
    assert ep_causes.of_packed(case, case.inputs(1), 0, given, wants) == said


def test_counts_of_no_tokens_are_nobody_elses() -> None:
    case = EpCase(ranks=3, experts=3, topk=1, tokens=(0, 0, 0), routing="distinct")
    wants: Any = [SimpleNamespace(num_tokens_per_expert=[count]) for count in (5, 1, 0)]
    assert ep_causes._counts(case, [0], wants[0], wants) == ""
    assert ep_causes._counts(case, [1], wants[0], wants).endswith("these are those of rank 1")
