"""The DeepSeek example: its parts, a run against transformers, and what happens when a rank fails."""

from __future__ import annotations

import importlib.util
import multiprocessing as mp
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hal
from examples.deepseek_v3.cache import LatentCache, PagePool
from examples.deepseek_v3.experts import TILE, LocalExperts
from examples.deepseek_v3.scheduler import Request, Scheduler
from hal import EpFault, EpFaults, RankFailure, SpecError

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)
if TYPE_CHECKING:
    from examples.deepseek_v3 import check, engine, model, ranks

# Fixed: with other weights a token in a few hundred thousand could be a tie, in the router or between two logits.
SEED = 1
ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("deepseek")]
# First of all: the fork server of a process starts with what its first user wants loaded, here transformers.
pytestmark.append(pytest.mark.long(5))


def requests_of(lengths: Sequence[int], new_tokens: int) -> tuple[Request, ...]:
    generator = torch.Generator().manual_seed(SEED)
    return tuple(
        Request(i, tuple(torch.randint(1024, (n,), generator=generator).tolist()), new_tokens)
        for i, n in enumerate(lengths)
    )


def job_of(requests: tuple[Request, ...], processes: int, name: str = "v3", **others: Any) -> ranks.Job:
    return ranks.Job(name, SEED, others.pop("dtypes", ("float32",)), requests, processes, "cpu", **others)


def answers_of(reports: Iterator[engine.Progress | engine.Summary]) -> list[dict[int, engine.Generated]]:
    """The answers of each dtype of a run, in order."""
    summaries = [report for report in reports if isinstance(report, engine.Summary)]
    ranks_in_all = 1 + max(summary.rank for summary in summaries)
    return [
        {one.number: one for summary in summaries[i : i + ranks_in_all] for one in summary.generated}
        for i in range(0, len(summaries), ranks_in_all)
    ]


@pytest.fixture(scope="module", autouse=True)
def _the_example_is_imported() -> None:
    """Not above: with transformers that takes seconds, and of the processes that collect these tests one runs them."""
    global check, engine, model, ranks
    from examples.deepseek_v3 import check, engine, model, ranks


@pytest.fixture(autouse=True)
def _one_thread_and_nothing_left() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
    assert not mp.active_children()


class TestPages:
    def test_taken_once_and_recycled(self) -> None:
        pool = PagePool(3)
        assert sorted(pool.take() for _ in range(3)) == [0, 1, 2]
        with pytest.raises(SpecError, match="beyond all 3;"):
            pool.take()
        pool.give_back([1])
        assert (pool.take(), pool.recycled, pool.free) == (1, 1, 0)

    def test_returning_what_is_free_is_refused(self) -> None:
        pool = PagePool(2)
        page = pool.take()
        pool.give_back([page])
        with pytest.raises(SpecError, match="which is free"):
            pool.give_back([page])

    def test_released_pages_hold_nothing(self) -> None:
        cache = LatentCache(2, 2, 4, 8, torch.float32, torch.device("cpu"))
        page = cache.pool.take()
        cache.write(1, torch.tensor([page * 4 + 3]), torch.ones(1, 8))
        assert bool((cache.layers[1][page, 3, 0] == 1).all())
        cache.release([page])
        assert all(bool(layer.isnan().all()) for layer in cache.layers)


class TestScheduler:
    @settings(max_examples=60, deadline=None)
    @given(
        lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=9),
        rows=st.integers(1, 12),
        spare=st.integers(0, 6),
    )
    def test_everybody_is_served_within_the_rows_and_pages(
        self, lengths: list[tuple[int, int]], rows: int, spare: int
    ) -> None:
        requests = [Request(i, tuple(range(n)), new) for i, (n, new) in enumerate(lengths)]
        size = 4
        pages = max(-(-one.length // size) for one in requests) + spare
        cache = LatentCache(1, pages, size, 1, torch.float32, torch.device("cpu"))
        scheduler = Scheduler(requests, cache, rows)
        left = []
        for _ in range(1 + sum(n + new for n, new in lengths)):
            if scheduler.idle:
                break
            scheduler.join()
            work = scheduler.plan()
            assert 0 < sum(part.count for part in work) <= rows
            held = [page for one in scheduler.running for page in one.pages]
            assert len(held) == len(set(held)) == pages - cache.pool.free
            for part in work:
                if part.samples:
                    part.sequence.tokens.append(0)
                part.sequence.cached += part.count
            left += [one.request.number for one in scheduler.leave()]
        assert scheduler.idle
        assert cache.pool.free == pages
        assert sorted(left) == list(range(len(requests)))

    def test_decoding_goes_before_prompts(self) -> None:
        requests = [Request(0, (1, 2), 5), Request(1, tuple(range(50)), 1)]
        cache = LatentCache(1, 8, 16, 1, torch.float32, torch.device("cpu"))
        scheduler = Scheduler(requests, cache, 4)
        scheduler.join()
        for expected in ([2, 2], [1, 3], [1, 3]):
            work = scheduler.plan()
            assert [part.count for part in work] == expected
            for part in work:
                if part.samples:
                    part.sequence.tokens.append(0)
                part.sequence.cached += part.count

    @pytest.mark.parametrize("request_", [Request(0, (), 1), Request(0, (1,), 0), Request(0, (1,) * 40, 1)])
    def test_what_can_never_be_served_is_refused(self, request_: Request) -> None:
        cache = LatentCache(1, 2, 16, 1, torch.float32, torch.device("cpu"))
        with pytest.raises(SpecError, match="requests"):
            Scheduler([request_], cache, 4)


class TestModel:
    def test_weights_depend_on_the_seed_and_are_exact_in_bf16(self) -> None:
        one, same, other = (model.build_model("v3", seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
        assert all(torch.equal(value, value.bfloat16().float()) for value in one.values())

    def test_narrow_copy_keeps_rotary_frequencies_exact(self) -> None:
        built: Any = model.build_model("v3", 0)
        narrow: Any = model.in_dtype(built, torch.bfloat16)
        assert torch.equal(narrow.model.rotary_emb.inv_freq, built.model.rotary_emb.inv_freq)
        assert narrow.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
        assert built.dtype == torch.float32

    def test_local_experts_do_not_depend_on_company(self) -> None:
        built: Any = model.build_model("v3", 0)
        local = LocalExperts(built.model.layers[1].mlp.experts, 1, 4)
        rows = torch.randn(2 * TILE, 256)
        alone = torch.zeros(TILE, 256)
        alone[3] = rows[TILE + 5]
        together = local(rows, (0, 0, 2 * TILE, 0))
        assert torch.equal(local(alone, (0, 0, TILE, 0))[3], together[TILE + 5])


class TestChecks:
    """The checks themselves notice what they are for."""

    @staticmethod
    def answer(number: int = 0) -> engine.Generated:
        return engine.Generated(number, (1, 2), torch.randn(2, 4).numpy())

    def test_another_token_is_noticed(self) -> None:
        good = self.answer()
        verdict = check.same_as_transformers({0: replace(good, tokens=(1, 3))}, [good])
        assert not verdict.passed
        assert "differs from token 1: 3, not 2" in verdict.found

    @pytest.mark.parametrize("change", [2e-4, float("nan")])
    def test_another_logit_is_noticed(self, change: float) -> None:
        good = self.answer()
        bad = good.logits.copy()
        bad[1, 3] += change
        assert check.same_as_transformers({0: good}, [good]).passed
        assert not check.same_as_transformers({0: replace(good, logits=bad)}, [good]).passed

    def test_one_bit_is_noticed(self) -> None:
        good = self.answer()
        bad = good.logits.copy()
        bad.view("int32")[0, 0] ^= 1
        assert check.same_bits({0: good}, {0: good}, "a", "b").passed
        assert not check.same_bits({0: replace(good, logits=bad)}, {0: good}, "a", "b").passed

    def test_coarser_bf16_is_noticed(self) -> None:
        built = model.build_model("v3", 0)
        request = requests_of([5], 4)[0]
        narrow = model.in_dtype(built, torch.bfloat16)
        logits = check._teacher_forced(narrow, request, (1, 2, 3, 4)).float().numpy()
        good = engine.Generated(0, (1, 2, 3, 4), logits)
        assert check.no_worse_than_transformers({0: good}, [request], built, torch.bfloat16).passed
        exact = check._teacher_forced(built, request, (1, 2, 3, 4)).float().numpy()
        for bad in (logits + 1.1 * (logits - exact), logits * float("nan")):
            verdict = check.no_worse_than_transformers({0: replace(good, logits=bad)}, [request], built, torch.bfloat16)
            assert not verdict.passed


@pytest.mark.sampled
@pytest.mark.long(12)
@pytest.mark.parametrize("name", ["v3", "v2"])
def test_runs_equal_transformers_and_each_other(name: str) -> None:
    # Few tokens, more than a page of them, more prompts than the pages have room for.
    requests = requests_of([70, 3, 20, 9], 5)
    first: list[dict[int, engine.Generated]] = []
    for processes in (1, 2, 4):
        reports = list(ranks.run(job_of(requests, processes, name, dtypes=("float32", "bf16"))))
        found = answers_of(iter(reports))
        assert [sorted(answers) for answers in found] == [[0, 1, 2, 3]] * 2
        first = first or found
        for answers, base in zip(found, first, strict=True):
            verdict = check.same_bits(answers, base, "", "")
            assert verdict.passed, verdict
        if processes == 1:
            assert any(isinstance(one, engine.Summary) and one.recycled for one in reports)
            assert any(isinstance(one, engine.Progress) and one.step and one.joined for one in reports)
    untouched = model.build_model(name, SEED)
    references = [check.transformers_greedy(untouched, request) for request in requests]
    verdict = check.same_as_transformers(first[0], references)
    assert verdict.passed, verdict


@pytest.mark.sampled
@pytest.mark.long(6)
@pytest.mark.parametrize("name", ["v3", "v2"])
def test_bf16_is_no_worse_than_transformers(name: str) -> None:
    # The default run's sizes: over a few tokens the comparison would be chance.
    requests = requests_of([3, 10, 20, 30, 40, 50, 60, 70], 64)
    (answers,) = answers_of(ranks.run(job_of(requests, 1, name, dtypes=("bf16",), rows=32)))
    untouched = model.build_model(name, SEED)
    verdict = check.no_worse_than_transformers(answers, requests, untouched, torch.bfloat16)
    assert verdict.passed, verdict


@pytest.mark.sampled
@pytest.mark.long(6)
def test_steps_of_other_sizes_are_right_too() -> None:
    requests = requests_of([20, 1], 4)
    untouched = model.build_model("v3", SEED)
    references = [check.transformers_greedy(untouched, request) for request in requests]
    for rows, page_size in ((1, 1), (5, 16)):
        (answers,) = answers_of(ranks.run(job_of(requests, 2, rows=rows, page_size=page_size)))
        verdict = check.same_as_transformers(answers, references)
        assert verdict.passed, verdict


@pytest.mark.sampled
@pytest.mark.long(4)
def test_a_rank_without_prompts_takes_part() -> None:
    requests = requests_of([4], 3)
    (alone,) = answers_of(ranks.run(job_of(requests, 1)))
    (answers,) = answers_of(ranks.run(job_of(requests, 3)))
    assert check.same_bits(answers, alone, "", "").passed


class TestFailures:
    def test_the_failing_rank_has_the_word(self) -> None:
        # Request 1 goes to rank 1, and its second token is in no vocabulary.
        requests = (*requests_of([4], 8), Request(1, (1, 10**6), 8))
        start = time.monotonic()
        with pytest.raises(ranks.RunFailed, match=r"^rank 1: IndexError: index out of range") as caught:
            list(ranks.run(job_of(requests, 3)))
        assert caught.value.rank == 1
        assert "Traceback" in caught.value.details
        assert time.monotonic() - start < 40

    def test_a_rank_that_dies_is_named(self) -> None:
        faults = {2: EpFaults(EpFault("kill", operation=9))}
        with pytest.raises(ranks.RunFailed, match=r"^rank 2: ended by SIGKILL") as caught:
            list(ranks.run(job_of(requests_of([4, 4, 4], 8), 3, faults=faults)))
        assert caught.value.rank == 2

    def test_a_rank_that_stalls_is_named(self) -> None:
        faults = {1: EpFaults(EpFault("stop", operation=9))}
        with pytest.raises(ranks.RunFailed, match=r"rank 1 failed in ") as caught:
            list(ranks.run(job_of(requests_of([4, 4], 8), 2, faults=faults, timeout=8.0)))
        assert "RankFailure" in str(caught.value)

    def test_a_rank_that_is_killed_is_the_reason(self) -> None:
        # Wherever it was: the others notice in the middle of dispatch, of combine, or in gloo.
        reports = ranks.run(job_of(requests_of([4, 4], 60), 2))
        for _ in range(9):
            next(reports)
        victim = mp.active_children()[0].pid
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(ranks.RunFailed, match=r"^rank [01]: ended by SIGKILL"):
            list(reports)

    def test_leaving_a_run_ends_its_ranks(self) -> None:
        reports = ranks.run(job_of(requests_of([4, 4], 60), 2))
        assert isinstance(next(reports), engine.Progress)
        assert len(mp.active_children()) == 2
        reports.close()  # type: ignore[attr-defined]


class TestCommand:
    @staticmethod
    def command(*options: str) -> list[str]:
        return [sys.executable, "-m", "examples.deepseek_v3", *options]

    def test_runs_and_checks(self) -> None:
        done = subprocess.run(
            self.command(
                "--batch",
                "3",
                "--tokens",
                "4",
                "--processes",
                "1",
                "--processes",
                "2",
                "--dtype",
                "float32",
                "--seed",
                "5",
            ),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(re.findall("^PASS", done.stdout, re.M)) == 2
        assert "FAIL" not in done.stdout
        assert re.search(r"^prompt 2, \d+ tokens, rank 0, steps \d+ to \d+:( \d+){4}$", done.stdout, re.M)
        assert "tokens/s" in done.stdout
        assert "--seed 5 repeats this run" in done.stdout

    @pytest.mark.sampled
    @pytest.mark.long(25)
    @pytest.mark.timeout(400)
    @pytest.mark.parametrize(("backend", "chip"), [("rocm", "hip:gfx942"), ("dcu", "hip:gfx936")])
    def test_runs_on_a_simulated_device(self, backend: str, chip: str) -> None:
        pytest.importorskip("hip", reason="hip-python is not installed")
        done = subprocess.run(
            self.command(*["--batch", "2", "--tokens", "2", "--processes", "2", "--dtype", "float32", "--seed", "5"]),
            cwd=ROOT,
            env=os.environ | {"HAL_BACKEND": backend, "HAL_SIM": chip},
            capture_output=True,
            text=True,
            timeout=380,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{backend}, chosen by HAL_BACKEND={backend}" in done.stdout
        assert len(re.findall("^PASS", done.stdout, re.M)) == 1 and "FAIL" not in done.stdout

    def test_unknown_backend_is_one_paragraph(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from examples.deepseek_v3.__main__ import main

        monkeypatch.setattr(sys, "argv", self.command("--backend", "abacus")[2:])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("BackendUnavailable: ") and said.count("\n") == 1


def test_failures_survive_the_way_between_processes() -> None:
    failed = pickle.loads(pickle.dumps(ranks.RunFailed(3, "x", "y")))
    assert (str(failed), failed.rank, failed.details) == ("rank 3: x", 3, "y")
    assert issubclass(ranks.RunFailed, hal.HalError)
    assert not issubclass(ranks.RunFailed, RankFailure)
