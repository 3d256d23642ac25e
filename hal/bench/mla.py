"""``hal bench mla``: a backend and its peers decode the same cases in the same rounds.

Nobody's time is looked at before its result agrees with the float64 reference, and again once the timing is over.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

import hal
from hal.bench import data as inputs
from hal.bench.cases import MlaCase
from hal.bench.data import MlaData
from hal.bench.limits import LimitContenders, Limits
from hal.bench.machine import Bystanders
from hal.bench.peers import Peer, Prepared
from hal.bench.rounds import Contender, Watcher, clock_for, interleave
from hal.bench.stats import Spread, paired_ratio
from hal.cli.verify import Agreement, compare
from hal.plugins import Selected
from hal.spec.errors import UnsupportedError

GROUP_BYTES: Final = 3 << 30
_FOOTPRINT: Final = 4
"""A case's memory in units of its cache: the cache, up to two contiguous copies, and room for a float32 upcast."""


class HalCall(Prepared):
    """The backend under test, called as a user calls it: `hal.mla_decode` with a plan and an output of its own.

    Parameters
    ----------
    data : MlaData
    backend : str

    Raises
    ------
    UnsupportedError
        The backend does not declare this case.
    """

    def __init__(self, data: MlaData, backend: str) -> None:
        case = data.case
        self._data, self._backend = data, backend
        self._out = data.q.new_empty(case.b, case.s_q, case.h_q, case.d_v)
        self._lse: Tensor | None = None
        self._plan = hal.mla_plan(
            data.cache_seqlens,
            h_q=case.h_q,
            s_q=case.s_q,
            page_size=case.page_size,
            dtype=case.dtype,
            causal=case.causal,
            backend=backend,
        )

    def call(self, layer: int) -> None:
        """One decode through the public face, validation included."""
        data = self._data
        _, self._lse = hal.mla_decode(
            data.q,
            data.kv_cache,
            data.tables[layer],
            data.cache_seqlens,
            head_dim_v=data.case.d_v,
            causal=data.case.causal,
            plan=self._plan,
            out=self._out,
            backend=self._backend,
        )

    def result(self) -> tuple[Tensor, Tensor | None]:
        """Out and lse."""
        return self._out, self._lse

    def poison(self) -> None:
        """NaN everywhere."""
        self._out.fill_(torch.nan)
        self._lse = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One contender in one case: either times, or the reason why there are none.

    Attributes
    ----------
    name : str
    reason : str
        Empty where there are times; else why not, in words: ``cannot: …``, ``WRONG: …``, ``failed: …``.
    wrong : bool
        Whether its result disagreed with the reference.
    samples : tuple of float
        Seconds, one a round.
    """

    name: str
    reason: str = ""
    wrong: bool = False
    samples: tuple[float, ...] = ()

    @property
    def seconds(self) -> Spread:
        """Of the samples, which there must be."""
        return Spread.of(self.samples)


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case: the backend, its peers, and the work the formulas count.

    Attributes
    ----------
    case : MlaCase
    flop, moved : int
        FLOPs and bytes of one call.
    layers : int
        Caches walked through.
    checked : int
        Sequences compared with the reference.
    backend : Entry
    peers : tuple of Entry
    """

    case: MlaCase
    flop: int
    moved: int
    layers: int
    checked: int
    backend: Entry
    peers: tuple[Entry, ...]

    def ratio(self, peer: Entry) -> Spread:
        """Time of a peer over the backend's, round by round; both must have samples."""
        return paired_ratio(peer.samples, self.backend.samples)


@dataclass(slots=True)
class MlaReport:
    """A whole run.

    Attributes
    ----------
    backend : str
    limits : Limits or None
        None before anything was timed.
    results : list of CaseResult
    rounds : list of int
        Rounds of each group of cases that was timed together.
    limit_samples : dict
        Seconds, by limit.
    others : float or None
        Share of the machine that other processes took while timing, the most of any group; None if unknown.
    cpu_time : bool
        Whether samples are processor time.
    """

    backend: str
    limits: Limits | None = None
    results: list[CaseResult] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    limit_samples: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    others: float | None = None
    cpu_time: bool = False

    @property
    def right(self) -> bool:
        """Whether the backend has a right, timed result in at least one case and a wrong or failed one in none."""
        entries = [result.backend for result in self.results]
        broken = any(entry.wrong or entry.reason.startswith("failed") for entry in entries)
        return not broken and any(entry.samples for entry in entries)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to run.

    Attributes
    ----------
    threads : int
        For every contender.
    rounds : int
    deadline : float or None
        ``time.monotonic()`` after which no round but the first is begun.
    seed : int
    group_bytes : int
        Cases whose data fits in this much memory together are timed in the same rounds.
    cpu_time : bool
        Processor time instead of the wall clock; only for one thread, where the two mean the same.
    """

    threads: int
    rounds: int
    deadline: float | None = None
    seed: int = 0
    group_bytes: int = GROUP_BYTES
    cpu_time: bool = False


def footprint(case: MlaCase, device: torch.device) -> int:
    """Bytes one case may take with everything its contenders copy."""
    return _FOOTPRINT * inputs.bytes_of(case, device)


def run(
    selected: Selected,
    cases: Sequence[MlaCase],
    peers: Sequence[Peer],
    settings: Settings,
    watcher: Watcher | None = None,
) -> MlaReport:
    """Check and time a backend and its peers.

    Parameters
    ----------
    selected : Selected
        The backend.
    cases : sequence of MlaCase
    peers : sequence of Peer
        Those that are present.
    settings : Settings
    watcher : Watcher, optional

    Returns
    -------
    MlaReport
    """
    watcher = watcher or Watcher()
    device = torch.device(selected.capabilities.device_types[0])
    report = MlaReport(selected.name, cpu_time=settings.cpu_time)
    before = torch.get_num_threads()
    try:
        for group in _groups(cases, device, settings.group_bytes):
            _run_group(group, selected, peers, device, settings, watcher, report)
            gc.collect()
    finally:
        torch.set_num_threads(before)
    return report


def _groups(cases: Sequence[MlaCase], device: torch.device, most: int) -> Iterator[list[MlaCase]]:
    group: list[MlaCase] = []
    size = 0
    for case in cases:
        needed = footprint(case, device)
        if group and size + needed > most:
            yield group
            group, size = [], 0
        group.append(case)
        size += needed
    if group:
        yield group


@dataclass(slots=True)
class _Checked:
    """A case that is ready: its data, and for each contender the prepared call or the reason why there is none."""

    data: MlaData
    threads: int
    ready: dict[str, Prepared] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)


def _run_group(
    group: list[MlaCase],
    selected: Selected,
    peers: Sequence[Peer],
    device: torch.device,
    settings: Settings,
    watcher: Watcher,
    report: MlaReport,
) -> None:
    watcher.stage("checking", len(group) * (1 + len(peers)))
    checked = [_check(case, selected, peers, device, settings, watcher) for case in group]
    measured = LimitContenders(device, lambda: torch.set_num_threads(settings.threads))
    contenders = list(measured.contenders)
    for number, item in enumerate(checked):
        contenders += [_contender((number, name), item, prepared) for name, prepared in item.ready.items()]
    watcher.stage("timing", len(contenders) * (settings.rounds + 1))
    bystanders = Bystanders()
    outcome = interleave(
        contenders,
        rounds=settings.rounds,
        clock=clock_for(device, settings.cpu_time),
        deadline=settings.deadline,
        fewest=1,
        on_turn=watcher.step,
    )
    share = bystanders.share()
    if share is not None:
        report.others = max(share, report.others or 0.0)
    for number, item in enumerate(checked):
        for name in item.ready:
            error = outcome.failed.get((number, name))
            if error is not None:
                item.entries[name] = Entry(name, f"failed: {_one_line(error)}")
            else:
                item.entries[name] = _recheck(item, name, outcome.samples[number, name])
        report.results.append(_result(item, selected.name, peers))
    for contender in measured.contenders:
        key = contender.key
        assert isinstance(key, tuple)
        if key in outcome.failed:
            raise outcome.failed[key]
        report.limit_samples.setdefault(key, []).extend(outcome.samples[key])
    report.limits = measured.limits(report.limit_samples)
    report.rounds.append(outcome.rounds)


def _check(
    case: MlaCase,
    selected: Selected,
    peers: Sequence[Peer],
    device: torch.device,
    settings: Settings,
    watcher: Watcher,
) -> _Checked:
    """Prepare every contender and compare its first result with the reference."""
    threads = settings.threads if case.threads is None else case.threads
    torch.set_num_threads(settings.threads)
    item = _Checked(inputs.make(case, settings.seed, device), threads)
    item.data.expected(0)
    torch.set_num_threads(threads)
    _admit(item, selected.name, lambda: HalCall(item.data, selected.name))
    watcher.step()
    for peer in peers:
        reason = peer.cannot(case)
        if reason:
            item.entries[peer.name] = Entry(peer.name, f"cannot: {reason}")
        else:
            _admit(item, peer.name, lambda peer=peer: peer.prepare(item.data, threads))  # type: ignore[misc]
        watcher.step()
    return item


def _admit(item: _Checked, name: str, prepare: Callable[[], Prepared]) -> None:
    try:
        prepared = prepare()
        wrong = verdict(prepared, item.data)
    except UnsupportedError as error:
        item.entries[name] = Entry(name, f"cannot: {_one_line(error)}")
    except Exception as error:
        # Whatever a contender raises is its own result and must not end the run of the others.
        item.entries[name] = Entry(name, f"failed: {_one_line(error)}")
    else:
        if wrong:
            item.entries[name] = Entry(name, f"WRONG: {wrong}", wrong=True)
        else:
            item.ready[name] = prepared


def verdict(prepared: Prepared, data: MlaData) -> str:
    """Decode layer 0 and compare every row with the reference; the first wrong row in words, empty if all are right."""
    want_out, want_lse = data.expected(0)
    prepared.poison()
    prepared.call(0)
    out, lse = prepared.result()
    if len(out) != data.case.b:
        return f"out has {len(out)} sequences, not {data.case.b}"
    out, lse = out[data.checked], None if lse is None else lse[data.checked]
    if out.shape != want_out.shape:
        return f"out has shape {list(out.shape)}, not {list(want_out.shape)}"
    if lse is not None and lse.shape != want_lse.shape:
        return f"lse has shape {list(lse.shape)}, not {list(want_lse.shape)}"
    # A contender without an lse is held to its out alone.
    found: Agreement = compare(out, want_lse if lse is None else lse, want_out, want_lse, "")
    where = found.first_wrong.partition(", lse is")[0] if lse is None else found.first_wrong
    return "" if found.passed else f"{found.wrong} of {found.rows} rows; {where}"


def _recheck(item: _Checked, name: str, samples: list[float]) -> Entry:
    """The samples, unless the contender computes something else now than before the timing."""
    torch.set_num_threads(item.threads)
    wrong = verdict(item.ready[name], item.data)
    if wrong:
        return Entry(name, f"WRONG after timing: {wrong}", wrong=True)
    return Entry(name, samples=tuple(samples))


def _contender(key: tuple[int, str], item: _Checked, prepared: Prepared) -> Contender:
    layers, threads = item.data.layers, item.threads
    return Contender(key, lambda number: prepared.call(number % layers), lambda: torch.set_num_threads(threads))


def _result(item: _Checked, backend: str, peers: Sequence[Peer]) -> CaseResult:
    data = item.data
    return CaseResult(
        data.case,
        data.flop,
        data.moved,
        data.layers,
        len(data.checked),
        item.entries[backend],
        tuple(item.entries[peer.name] for peer in peers),
    )


def _one_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
