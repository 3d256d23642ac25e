"""One real, tiny decode on a device: what ``hal doctor`` runs to see whether a backend works.

It runs in a process of its own: a driver that crashes or hangs is then an answer like any other.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Literal

import torch
from torch import Tensor

import hal
from hal import plugins
from hal.cli.text import plain
from hal.cli.verify import Agreement, compare, published
from hal.cli.workload import empty_cache, rows_of, shuffled_table
from hal.reference.mla import mla_decode as reference_decode
from hal.spec.capability import Capabilities, Ints, MlaCapabilities

Verdict = Literal["PASS", "FAIL", "ERROR", "CRASH", "TIMEOUT", "NOT RUN"]


@dataclass(frozen=True, slots=True)
class Check:
    """What became of the decode on one device.

    Attributes
    ----------
    device : str
    verdict : {"PASS", "FAIL", "ERROR", "CRASH", "TIMEOUT", "NOT RUN"}
    note : str
        One line: what was computed, or what went wrong.
    milliseconds : float or None
        Of one decode, once warm.
    out_error, cosine, lse_error : float or None
        The worst row against the reference, as in `hal.cli.verify.Agreement`.
    """

    device: str
    verdict: Verdict
    note: str
    milliseconds: float | None = None
    out_error: float | None = None
    cosine: float | None = None
    lse_error: float | None = None


def devices(capabilities: Capabilities) -> list[str]:
    """Every device of the types a backend takes."""
    found = []
    for kind in capabilities.device_types:
        if kind == "cpu":
            found.append(kind)
            continue
        try:
            module = torch.get_device_module(kind)
        except RuntimeError:
            continue  # a type this torch has no support for has no device either
        found += [f"{kind}:{i}" for i in range(module.device_count())]
    return found


def check_devices(name: str, where: Sequence[str], timeout: float) -> Iterator[Check]:
    """Decode on each device in a process of its own, and yield one `Check` for each, whatever happens there.

    ``timeout`` is in seconds and a device.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(theirs, name, list(where)), daemon=True)
    with _interrupts_ignored():
        # The worker inherits this, so that Ctrl-C ends it through us and without a traceback of its own.
        worker.start()
    theirs.close()
    left = list(where)
    end: tuple[Verdict, str] | None = None
    try:
        while left and end is None:
            if not ours.poll(timeout):
                end = "TIMEOUT", f"no answer in {timeout:g} s"
                break
            try:
                yield ours.recv()
                left.pop(0)
            except EOFError:
                worker.join()
                end = "CRASH", _ending(worker.exitcode)
    finally:
        worker.kill()
        worker.join()
        ours.close()
    if end is not None:
        yield Check(left.pop(0), *end)
        yield from (Check(device, "NOT RUN", "the check before it did not come back") for device in left)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _ending(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"the process that ran it was ended by {signal.Signals(-exit_code).name}"
    return f"the process that ran it exited with {exit_code}"


def _work(connection: Connection, name: str, where: Sequence[str]) -> None:
    """The worker: stdout belongs to the parent's answer, so everything printed here goes to stderr."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for device in where:
        try:
            check = _check(name, torch.device(device))
        except Exception as error:
            check = Check(device, "ERROR", plain(f"{type(error).__name__}: {error}"))
        connection.send(check)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The sizes of the decode, as near to 4 heads, d 576, page 64 as the backend declares."""

    h_q: int
    h_kv: int
    head_dim: int
    head_dim_v: int
    page_size: int
    s_q: int
    dtype: torch.dtype
    causal: bool

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"h_q {self.h_q}, d {self.head_dim}, page {self.page_size}, {dtype}"


def _check(name: str, device: torch.device) -> Check:
    capabilities = plugins.registry().select(name, "hal doctor").capabilities
    declared = capabilities.mla_dense
    if declared is None or "plain" not in declared.kv_formats:
        return Check(str(device), "NOT RUN", "it declares no dense MLA decode over a plain cache")
    sizes = _choose(declared)
    known = _known_answer(name, replace(sizes, s_q=_pick(declared.s_q, 1), causal=False), device)
    agreement, seconds = _against_reference(name, sizes, device)
    answers = (("the known answer", known), ("the reference", agreement))
    wrong = [f"differs from {what}: {a.first_wrong}" for what, a in answers if not a.passed]
    note = "; ".join(wrong) or f"a decode of {sizes} has the known answer and agrees with the reference"
    worst = known + agreement
    verdict: Verdict = "FAIL" if wrong else "PASS"
    return Check(str(device), verdict, note, seconds * 1e3, worst.out_error, worst.cosine, worst.lse_error)


def _choose(declared: MlaCapabilities) -> _Sizes:
    h_kv = _pick(declared.h_kv, 1)
    head_dim = _pick(declared.head_dim, 576, 512)
    return _Sizes(
        h_q=_pick(declared.h_q, *(h_kv * group for group in (4, 16, 64, 128, 1))),
        h_kv=h_kv,
        head_dim=head_dim,
        head_dim_v=_pick(declared.head_dim_v, 512, head_dim),
        page_size=_pick(declared.page_size, 64, 16, 1),
        s_q=_pick(declared.s_q, 2, 1),
        dtype=getattr(torch, declared.dtypes[0]),
        causal=declared.causal,
    )


def _pick(legal: Ints, *wanted: int) -> int:
    """The first wanted value that is legal, else the least legal one."""
    for value in wanted:
        if value in legal:
            return value
    return legal.only[0] if legal.only else -(-legal.low // legal.multiple_of) * legal.multiple_of


def _lengths(sizes: _Sizes) -> list[int]:
    # An even number of tokens that ends inside a second page, a single token, and a sequence without any.
    return [sizes.page_size + 2 + sizes.page_size % 2, 1, 0]


def _known_answer(name: str, s: _Sizes, device: torch.device) -> Agreement:
    """Queries of zeros weigh all keys alike: out is the mean of the rows, and lse the log of their number."""
    lengths = _lengths(s)
    long = torch.tensor([0.0, 2.0]).repeat(lengths[0] // 2)[:, None].expand(-1, s.head_dim)
    single = (torch.arange(s.head_dim) % 8 / 8)[None]
    q = torch.zeros(len(lengths), s.s_q, s.h_q, s.head_dim, dtype=s.dtype)
    out, lse, _ = _decode(name, s, device, q, lengths, [long, single, torch.zeros(0, s.head_dim)])
    right_out = torch.stack([torch.ones(s.head_dim), single[0], torch.zeros(s.head_dim)])[:, None, None]
    right_lse = torch.tensor([math.log(lengths[0]), 0.0, torch.inf], dtype=torch.float64)[:, None, None]
    return compare(out, lse, right_out[..., : s.head_dim_v].expand(out.shape), right_lse.expand(lse.shape))


def _against_reference(name: str, s: _Sizes, device: torch.device) -> tuple[Agreement, float]:
    generator = torch.Generator().manual_seed(20250224)
    lengths = _lengths(s)
    q = published(generator, len(lengths), s.s_q, s.h_q, s.head_dim).to(s.dtype)
    rows = [published(generator, length, s.head_dim) for length in lengths]
    out, lse, seconds = _decode(name, s, device, q, lengths, rows)
    cache, table = _cache(s, lengths, rows)
    right = reference_decode(
        q, cache, table, torch.tensor(lengths, dtype=torch.int32), head_dim_v=s.head_dim_v, causal=s.causal
    )
    return compare(out, lse, *right), seconds


def _cache(s: _Sizes, lengths: list[int], rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The same cache and table every time; each KV head holds the same rows."""
    table = shuffled_table(lengths, s.page_size, torch.Generator().manual_seed(1))
    cache = empty_cache(table, s.page_size, s.h_kv, s.head_dim, s.dtype)
    for sequence, own in enumerate(rows):
        at = rows_of(table, s.page_size, sequence, 0, len(own))
        cache.view(-1, s.h_kv, s.head_dim)[at] = own[:, None].to(s.dtype).expand(-1, s.h_kv, -1)
    return cache, table


def _decode(
    name: str, s: _Sizes, device: torch.device, q: Tensor, lengths: list[int], rows: list[Tensor]
) -> tuple[Tensor, Tensor, float]:
    """Out, lse and the seconds of a second, warm call."""
    cache, table = (x.to(device) for x in _cache(s, lengths, rows))
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    plan = hal.mla_plan(
        cache_seqlens,
        h_q=s.h_q,
        h_kv=s.h_kv,
        s_q=s.s_q,
        head_dim=s.head_dim,
        head_dim_v=s.head_dim_v,
        page_size=s.page_size,
        dtype=s.dtype,
        causal=s.causal,
        backend=name,
    )
    q = q.to(device)
    for _ in range(2):
        start = time.perf_counter()
        out, lse = hal.mla_decode(
            q,
            cache,
            table,
            cache_seqlens,
            head_dim_v=s.head_dim_v,
            causal=s.causal,
            plan=plan,
            backend=name,
        )
        synchronize(device)
    return out, lse, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the device; a host has nothing to wait for."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
