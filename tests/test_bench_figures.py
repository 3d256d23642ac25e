"""What the bench counts, averages and interleaves."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
import types

import pytest
import torch

from hal.bench import machine, rounds
from hal.bench.cases import QUICK, MlaCase, standard
from hal.bench.data import UNUSED_ENTRY, make
from hal.bench.limits import COPY, READ, SGEMM, LimitContenders, Limits
from hal.bench.peers.vllm_cpu import best_variant
from hal.bench.report import DocumentError, changes, load
from hal.bench.rounds import Contender, CpuClock, EventClock, HostClock, clock_for, interleave
from hal.bench.stats import Spread, geometric_mean, paired_ratio, quantile
from hal.bench.text import short

CPU = torch.device("cpu")


def attended(case, lengths):
    """The definition, key by key."""
    return sum(
        1
        for length in lengths
        for i in range(case.s_q)
        for key in range(length)
        if not case.causal or key <= length - case.s_q + i
    )


@pytest.mark.parametrize("name", ["b1_h16_s64", "b3_h5_s70_q2", "b3_h5_s70_q4_causal", "b2_h1_s9_q3_causal_fp32"])
def test_flop_and_bytes_are_those_of_the_definition(name):
    case = MlaCase.parse(name)
    lengths = [case.s_k, *range(case.s_q, case.s_q + case.b - 1)]
    assert case.flop(lengths) == 2 * case.h_q * (576 + 512) * attended(case, lengths)
    rows = case.b * case.s_q * case.h_q * (576 + 512) + sum(lengths) * 576
    assert case.moved(lengths) == rows * (4 if case.dtype is torch.float32 else 2)


def test_bytes_match_the_published_example():
    # One sequence of 4096, 128 heads: 4096 · 576 · 2 of cache, 128 · (576 + 512) · 2 of q and out.
    assert MlaCase.parse("b1_h128_s4096").moved([4096]) == 4718592 + 278528


@pytest.mark.parametrize("case", [*QUICK, *standard(2), *standard(6)], ids=lambda case: case.name)
def test_a_name_spells_its_case(case):
    assert MlaCase.parse(case.name) == case


def test_a_name_may_leave_out_defaults():
    assert MlaCase.parse("h8_b2_s64") == MlaCase(2, 8, 64)
    assert MlaCase.parse("b2_h8_s64_fp16_p16_t1") == MlaCase(2, 8, 64, dtype=torch.float16, page_size=16, threads=1)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("b4_h128", "lacks s"),
        ("b4_h128_s1024_int8", "what is 'int8'"),
        ("b4_b4_h128_s1024", "'b' twice"),
        ("b4_h128_s0", "what is 's0'"),
        ("b4_h128_s2_q3", "3 queries but only 2"),
        ("b4_h128_s64_bf16_fp16", "two dtypes"),
        ("", "what is ''"),
        ("b4_h128_s1024_fast", "Did you mean 'b4_h128_s1024"),
    ],
)
def test_a_wrong_name_says_why(name, says):
    with pytest.raises(ValueError, match=says):
        MlaCase.parse(name)


def test_standard_sweep_has_every_axis_and_thread_count():
    names = [case.name for case in standard(6)]
    assert len(names) == len(set(names))
    assert {case.threads for case in standard(6)} == {None, 1, 2, 4, 6}
    assert {case.threads for case in standard(1)} == {None, 1}


def test_figures_are_short_whatever_their_size():
    values = (12345.6, 999.4, 56.78, 1.234, 0.0456, -0.5, -123.4)
    assert [short(value) for value in values] == ["12346", "999", "56.8", "1.23", "0.046", "-0.500", "-123"]


def test_quantiles_are_interpolated_and_agree_with_the_library():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert quantile(values, 0.5) == statistics.median(values)
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    assert [quantile(values, n / 10) for n in range(1, 10)] == pytest.approx(deciles)
    assert quantile([7.0], 0.9) == 7.0
    for bad in ([], [1.0]):
        with pytest.raises(ValueError, match="quantile"):
            quantile(bad, 0.5 if not bad else 1.5)


def test_spread_and_ratios():
    spread = Spread.of([1.0, 2.0, 3.0])
    assert (spread.p10, spread.p50, spread.p90, spread.count) == (1.2, 2.0, 2.8, 3)
    # A disturbance that hits both contenders of a round leaves the paired ratio alone.
    assert paired_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == Spread.of([2.0, 2.0, 2.0])
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="positive"):
        geometric_mean([1.0, 0.0])


def test_the_roofline_is_the_lower_of_two_limits():
    limits = Limits(Spread.of([100.0]), Spread.of([10.0]))
    assert limits.roofline(5.0, 1.0) == 50.0
    assert limits.roofline(50.0, 1.0) == 100.0
    assert limits.memory_bound(5.0, 1.0)
    assert not limits.memory_bound(50.0, 1.0)


def test_limits_count_the_work_they_do():
    made = LimitContenders(CPU, lambda: None)
    assert {contender.key for contender in made.contenders} >= {SGEMM, COPY, READ}
    assert made.buffer_bytes > machine.last_level_cache()
    assert made.rate(SGEMM, [1.0]).p50 == 2 * 2048**3 / 1e9
    assert made.rate(COPY, [1.0]).p50 == 2 * made.buffer_bytes / 1e9
    assert made.rate(READ, [1.0]).p50 == made.buffer_bytes / 1e9
    assert {one.key for one in LimitContenders(CPU, lambda: None, compute=False).contenders} == {COPY, READ}


class Ticking:
    """A clock on which every call takes what the contender says."""

    def __init__(self):
        self.order = []

    def times(self, calls):
        answers = [call() for call in calls]
        self.order += [name for name, _ in answers]
        return [seconds for _, seconds in answers]


def test_rounds_are_interleaved_and_alternate():
    clock = Ticking()
    contenders = [Contender(name, lambda _, name=name: (name, 1.0)) for name in "ABC"]
    outcome = interleave(contenders, rounds=3, clock=clock)
    turns = "".join(name for name, _ in itertools.groupby(clock.order))
    # The round that sizes the turns is in reverse, then A B C, C B A, A B C; equal neighbours of two rounds merge.
    assert turns == "CBABCBABC"
    assert outcome.rounds == 3
    assert {key: len(samples) for key, samples in outcome.samples.items()} == dict.fromkeys("ABC", 3)


def test_a_sample_is_the_median_of_a_turn_and_calls_are_numbered():
    numbers = []

    def call(number):
        numbers.append(number)
        return "A", 0.004 if number % 5 else 10.0

    outcome = interleave([Contender("A", call)], rounds=2, clock=Ticking())
    assert outcome.samples["A"] == [0.004, 0.004]
    assert numbers == list(range(len(numbers)))


def test_a_contender_that_raises_is_reported_and_the_others_go_on():
    def breaks(number):
        if number > 2:
            raise RuntimeError("no")
        return "B", 1.0

    outcome = interleave([Contender("A", lambda _: ("A", 1.0)), Contender("B", breaks)], rounds=4, clock=Ticking())
    assert len(outcome.samples["A"]) == 4
    assert "B" not in outcome.samples
    assert str(outcome.failed["B"]) == "no"


def test_a_deadline_leaves_whole_rounds_and_at_least_three():
    contenders = [Contender(name, lambda _, name=name: (name, 1.0)) for name in "AB"]
    outcome = interleave(contenders, rounds=50, clock=Ticking(), deadline=0.0)
    assert outcome.rounds == 3
    assert {len(samples) for samples in outcome.samples.values()} == {3}
    assert interleave(contenders, rounds=50, clock=Ticking(), deadline=0.0, fewest=1).rounds == 1


def test_each_clock_is_for_its_purpose():
    assert isinstance(clock_for(CPU), HostClock)
    assert isinstance(clock_for(CPU, cpu_time=True), CpuClock)
    assert isinstance(clock_for(torch.device("meta"), cpu_time=True), EventClock)
    for clock in (HostClock(), CpuClock()):
        assert clock.time(lambda: None) >= 0


class _Mark:
    """An event of a device that takes a millisecond a call, and counts what was queued before it."""

    queue = ()

    def __init__(self, device, enable_timing):
        assert enable_timing
        self.at = None

    def record(self):
        self.queue.append("mark")
        self.at = float(sum(entry == "call" for entry in self.queue))

    def synchronize(self):
        self.queue.append("wait")

    def elapsed_time(self, after):
        return after.at - self.at


def test_calls_on_a_device_are_queued_behind_other_work_and_awaited_once(monkeypatch):
    queue = []
    monkeypatch.setattr(_Mark, "queue", queue)
    monkeypatch.setattr(torch, "Event", _Mark)
    monkeypatch.setattr(EventClock, "_fill", lambda self: queue.append("fill"))
    clock = EventClock(torch.device("meta"))
    assert clock.times([lambda: queue.append("call")] * 3) == [1e-3] * 3
    assert queue == ["fill"] * (3 * rounds.FILLS) + ["mark", "call", "mark"] * 3 + ["wait"]


def test_processor_time_does_not_run_while_waiting():
    done = []
    assert CpuClock().time(lambda: done.append(time.sleep(0.05))) < 0.05
    assert done == [None]


def test_bystanders_take_a_share():
    share = machine.Bystanders()
    time.sleep(0.02)
    taken = share.share()
    assert taken is None or 0 <= taken <= 1


@pytest.fixture
def small_machine(monkeypatch):
    monkeypatch.setattr("hal.bench.data.last_level_cache", lambda: 4 << 20)


@pytest.mark.usefixtures("small_machine")
def test_layers_keep_a_cache_out_of_the_caches_and_tables_are_disjoint():
    data = make(MlaCase.parse("b2_h1_s512_varlen_q2_causal"), 0, CPU)
    assert data.layers > 1
    assert data.kv_cache.nbytes >= 4 << 20
    used = torch.cat([table[table != UNUSED_ENTRY] for table in data.tables])
    assert len(used.unique()) == len(used) == len(data.kv_cache)
    for table in data.tables:
        assert ((table != UNUSED_ENTRY).sum(1) == torch.tensor([-(-n // 64) for n in data.lengths])).all()
    assert not any(rows.isnan().any() for rows in data.gathered(0))
    waste = sum(-length % 64 for length in data.lengths) * data.layers
    assert int(data.kv_cache.isnan().all(-1).sum()) == waste
    assert [len(rows) for rows in data.gathered(1)] == data.lengths


@pytest.mark.usefixtures("small_machine")
def test_a_device_is_checked_in_as_many_sequences_as_the_host_can_afford(monkeypatch):
    data = make(MlaCase.parse("b9_h1_s512_varlen"), 0, CPU)
    assert data.checked == list(range(9))
    whole = data.expected(1)
    monkeypatch.setattr("hal.bench.data._DEVICE_CHECKED", data.flop * 5 / 9)
    some = dataclasses.replace(data, q=types.SimpleNamespace(device=torch.device("meta")), _expected={})
    assert some.checked == [0, 2, 4, 6, 8]
    some.q = data.q
    monkeypatch.setattr(type(data), "checked", property(lambda self: [0, 2, 4, 6, 8]))
    for have, want in zip(some.expected(1), whole, strict=True):
        assert torch.equal(have, want[[0, 2, 4, 6, 8]])


@pytest.mark.usefixtures("small_machine")
def test_inputs_repeat_with_their_seed():
    case = MlaCase.parse("b1_h1_s512")
    a, b, c = (make(case, seed, CPU) for seed in (1, 1, 2))
    assert torch.equal(a.kv_cache, b.kv_cache)
    assert torch.equal(a.q, b.q)
    assert not torch.equal(a.q, c.q)


@pytest.mark.parametrize(
    ("flags", "present", "best"),
    [
        ("avx2 avx512f avx512_bf16", "_C _C_AVX512 _C_AVX2", "_C"),
        ("avx2 avx512f", "_C _C_AVX512 _C_AVX2", "_C_AVX512"),
        ("avx2", "_C _C_AVX512 _C_AVX2", "_C_AVX2"),
        ("avx2 avx512f avx512_bf16", "_C_AVX2", "_C_AVX2"),
        ("sse2", "_C _C_AVX512 _C_AVX2", ""),
    ],
)
def test_the_best_library_the_processor_runs_is_chosen(flags, present, best):
    assert best_variant(frozenset(flags.split()), frozenset(present.split())) == best


def case(name, ms, fraction):
    return {"name": name, "ms_p50": ms, "fraction_of_limit": fraction}


def test_changes_are_ratios_of_time_and_of_the_fraction():
    before = {"cases": [case("a", 4.0, 0.2), case("b", 1.0, 0.5), case("gone", 1.0, 0.5)]}
    after = {"cases": [case("a", 2.0, 0.8), case("b", None, None), case("new", 1.0, 0.5)]}
    made, alone = changes(before, after)
    assert [(change.name, change.faster, change.fraction) for change in made] == [("a", 2.0, 4.0)]
    assert alone == ["b", "gone", "new"]


def test_changes_read_other_keys_for_other_documents():
    before, after = ({"cases": [{"name": "a", "us_p50": us, "fraction_of_copy": 0.5}]} for us in (8.0, 4.0))
    made, _ = changes(before, after, "us_p50", "fraction_of_copy")
    assert (made[0].faster, made[0].fraction) == (2.0, 1.0)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cases": 1}', '{"cases": [1]}', '{"cases": [{}]}', "\x00"])
def test_a_file_that_is_no_earlier_run_is_refused(tmp_path, text):
    file = tmp_path / "old.json"
    file.write_text(text)
    with pytest.raises(DocumentError, match=r"old\.json"):
        load(file)
    with pytest.raises(DocumentError, match="cannot be read"):
        load(tmp_path / "absent.json")
