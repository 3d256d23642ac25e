"""One watched call of `hal.mla_decode`: guarded outputs, sealed inputs, counted launches, and the comparison after it.

The front allocates ``lse`` (and ``out`` where none is passed) itself. To watch that memory too, the backend object in
force is wrapped for the time of the call: the wrapper hands the backend guarded tensors full of NaN instead. The
backend cannot tell: it gets a validated `MlaDecodeArgs`, as always.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import hal
from hal import plugins
from hal.backend import Backend, Probe
from hal.reference import mla as reference
from hal.spec.capability import Capabilities
from hal.spec.limits import Limits, rounding_of
from hal.spec.mla import MlaDecodeArgs
from hal_conformance.inputs import Inputs, build, make_out
from hal_conformance.limits import Comparison, compare
from hal_conformance.memory import Guarded, place
from hal_conformance.threads import few_threads, is_small

Around = Callable[[], AbstractContextManager[object]]
"""Makes what a call is within."""

_FEW = 4_000_000
"""Elements of out that one host thread compares."""


class Watcher(Backend):
    """Stands before a backend and gives it guarded memory to write to."""

    spec_version = hal.SPEC_VERSION
    priority = 0

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.outputs: list[Guarded] = []
        self.calls = 0
        self.last: MlaDecodeArgs | None = None

    def probe(self) -> Probe:
        """As the watched backend."""
        return self.inner.probe()

    def capabilities(self) -> Capabilities:
        """As the watched backend."""
        return self.inner.capabilities()

    def mla_plan(self, args: Any) -> object:
        """As the watched backend."""
        return self.inner.mla_plan(args)

    def mla_decode(self, args: MlaDecodeArgs) -> None:
        """Swap in guarded outputs, then call the watched backend."""
        self.calls += 1
        self.last = args
        device = str(args.q.device)
        lse = place("lse", tuple(args.lse.shape), torch.float32, device, fill=None)
        self.outputs = [lse]
        args.lse = lse.view
        if args.out._base is None:
            # Not a view of ours: the front allocated it.
            out = place("out", tuple(args.out.shape), args.out.dtype, device, fill=None)
            args.out = out.view
            self.outputs.append(out)
        self.inner.mla_decode(args)

    def ep_buffer(self, args: Any) -> Any:
        """As the watched backend."""
        return self.inner.ep_buffer(args)

    def launches(self) -> Mapping[str, int]:
        """As the watched backend."""
        return self.inner.launches()


@contextmanager
def watched(backend: str) -> Iterator[Watcher]:
    """Wrap the selected backend for a while."""
    selected = plugins.select(backend)
    watcher = Watcher(selected.backend)
    selected.backend = watcher
    try:
        yield watcher
    finally:
        selected.backend = watcher.inner


@dataclass(slots=True)
class Outcome:
    """What one call gave.

    Attributes
    ----------
    out, lse : Tensor
        As returned, on the host.
    problems : list of str
        Everything wrong that needs no reference: shapes, overruns, changed inputs.
    launches : dict of str to int
        Kernels this call launched, by name.
    seconds : float
    outputs : list of Guarded
        Where it wrote, with the bits it left there.
    """

    out: Tensor
    lse: Tensor
    problems: list[str]
    launches: dict[str, int]
    seconds: float
    outputs: list[Guarded] = field(default_factory=list)

    def written_later(self) -> list[str]:
        """Results whose memory was written since the call returned."""
        return [f"{g.name} was written after the call had returned" for g in self.outputs if g.modified()]


def plan_for(inputs: Inputs, backend: str) -> hal.MlaPlan:
    """A plan for exactly this call."""
    case = inputs.case
    return hal.mla_plan(
        inputs.cache_seqlens.view,
        h_q=case.h_q,
        h_kv=case.h_kv,
        s_q=case.s_q,
        cu_seqlens_q=None if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q.view,
        head_dim=case.d,
        head_dim_v=case.d_v,
        page_size=case.page,
        dtype=case.torch_dtype,
        causal=case.causal,
        batch_invariant=case.batch_invariant,
        backend=backend,
    )


def call(inputs: Inputs, backend: str, *, plan: hal.MlaPlan | None = None, around: Around = nullcontext) -> Outcome:
    """Call `hal.mla_decode` once, within ``around()``, and check all that needs no reference."""
    case = inputs.case
    positional, keywords = inputs.arguments()
    with few_threads(is_small(case)):
        given = make_out(case)
    with watched(backend) as watcher:
        with around():
            if plan is None and case.plan:
                plan = plan_for(inputs, backend)
            before = dict(watcher.launches())
            start = time.perf_counter()
            out, lse = hal.mla_decode(
                *positional,
                **keywords,
                plan=plan,
                out=None if given is None else given.view,
                batch_invariant=case.batch_invariant,
                backend=backend,
            )
        host_out, host_lse = (result.detach().to("cpu", copy=True) for result in (out, lse))
        seconds = time.perf_counter() - start
        after = dict(watcher.launches())
        outputs = [*watcher.outputs, *([given] if given is not None else [])]
    with few_threads(is_small(case)):
        problems = _shape_problems(inputs, out, lse)
        problems += [text for text in (g.overrun() for g in outputs) if text]
        problems += [text for text in (g.modified() for g in inputs.guarded()) if text]
        for guarded in outputs:
            guarded.seal()
    problems += _strangers({"out": out, "lse": lse}, outputs)
    launched = {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
    return Outcome(host_out, host_lse, problems, launched, seconds, outputs)


def _strangers(returned: dict[str, Tensor], outputs: list[Guarded]) -> list[str]:
    """Which results are not the memory that was given: buffers of the backend's own, which its next call overwrites."""
    return [
        f"the tensor returned as {home.name} is not the one given to write to"
        for home in outputs
        if home.view.numel() and returned[home.name].data_ptr() != home.view.data_ptr()
    ]


def _shape_problems(inputs: Inputs, out: Tensor, lse: Tensor) -> list[str]:
    case, q = inputs.case, inputs.q.view
    want_out = (*q.shape[:-1], case.d_v)
    want_lse = (case.batch, case.h_q, case.s_q) if case.q_lens is None else (case.h_q, q.shape[0])
    problems = []
    if tuple(out.shape) != want_out or out.dtype != q.dtype or out.device != q.device:
        problems.append(f"out is {out.dtype} {list(out.shape)} on {out.device}, not {q.dtype} {list(want_out)}")
    if tuple(lse.shape) != want_lse or lse.dtype != torch.float32 or lse.device != q.device:
        problems.append(f"lse is {lse.dtype} {list(lse.shape)} on {lse.device}, not torch.float32 {list(want_lse)}")
    return problems


@dataclass(slots=True)
class Expected:
    """The reference's answer and how large the data behind each row are.

    Attributes
    ----------
    out, lse : Tensor
        float64 on the host.
    out_magnitude, lse_magnitude : Tensor
        Per (token, head) row, at least 1, in the layouts of the rows of out and of lse.
    rounding : callable, optional
        `hal.spec.limits.rounding_of` every element of out. Called when something is beyond the published limits.
    """

    out: Tensor
    lse: Tensor
    out_magnitude: Tensor
    lse_magnitude: Tensor
    rounding: Callable[[], Tensor] | None = None


def expect(inputs: Inputs) -> Expected:
    """Ask the reference."""
    positional, keywords = inputs.arguments()
    with few_threads(is_small(inputs.case)):
        on_host = [t.detach().cpu() for t in positional], _on_host(keywords)
        out, lse = reference.mla_decode(*on_host[0], **on_host[1])
        return Expected(out, lse, *magnitudes(inputs), functools.cache(lambda: _rounding(out, *on_host)))


def _rounding(out: Tensor, positional: list[Tensor], keywords: dict[str, Any]) -> Tensor:
    """Ask the reference again, for the same weights on absolute values: columns that q does not see carry them."""
    q, kv_cache, *rest = positional
    values = kv_cache[..., : out.shape[-1]].abs()
    scale = keywords.get("softmax_scale")
    told = keywords | {"softmax_scale": q.shape[-1] ** -0.5 if scale is None else scale}
    unseen = q.new_zeros(*q.shape[:-1], out.shape[-1])
    spread, _ = reference.mla_decode(torch.cat([unseen, q], -1), torch.cat([values, kv_cache], -1), *rest, **told)
    return rounding_of(out, spread, q.dtype)


def _on_host(keywords: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in keywords.items()}


def magnitudes(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """How many times larger than the published data each row's V and products are."""
    case = inputs.case
    scale = abs(case.d**-0.5 if case.scale is None else case.scale)
    outs, lses = [], []
    for j, count in enumerate(case.queries):
        rows = torch.ones(count, case.h_q, dtype=torch.float64)
        sums = torch.ones(count, case.h_q, dtype=torch.float64)
        if case.lengths[j] and count:
            keys = inputs.keys(j)
            per_kv = keys[..., : case.d_v].abs().amax((0, 2)).clamp(min=1)
            rows = per_kv.repeat_interleave(case.h_q // case.h_kv).expand(count, -1).clone()
            largest = keys.abs().amax(0).repeat_interleave(case.h_q // case.h_kv, 0)
            sums = (scale * (inputs.queries(j).abs() * largest).sum(-1)).clamp(min=1)
        outs.append(rows)
        lses.append(sums)
    if case.q_lens is None:
        if not outs:
            empty = torch.ones(0, case.s_q, case.h_q, dtype=torch.float64)
            return empty, empty.transpose(-1, -2)
        return torch.stack(outs), torch.stack(lses).transpose(-1, -2)
    empty_rows = torch.ones(0, case.h_q, dtype=torch.float64)
    return torch.cat([empty_rows, *outs]), torch.cat([empty_rows, *lses]).transpose(0, 1)


@dataclass(slots=True)
class Verdict:
    """out and lse against the reference, under the limits in force.

    Attributes
    ----------
    out, lse : Comparison
        ``lse`` compares single values: its cosine limit follows from its relative one.
    """

    out: Comparison
    lse: Comparison
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every row of both is within the limits."""
        return self.out.ok and self.lse.ok

    @property
    def mask_differs(self) -> bool:
        """Whether inf or NaN are in other places than in the reference."""
        return bool(self.out.mask_differs or self.lse.mask_differs)


def judge(
    out: Tensor, lse: Tensor, expected: Expected, out_limits: Limits, lse_limits: Limits, slack: float = 1.0
) -> Verdict:
    """Compare with the reference; with ``slack`` 2, two results that may each be off by the limit with each other."""
    for_out = Limits(
        out_limits.absolute * slack,
        out_limits.relative * slack,
        out_limits.cosine * slack * slack,
        out_limits.row_cosine * slack * slack,
        out_limits.rounding * slack,
    )
    by_value = Limits(lse_limits.absolute * slack, lse_limits.relative * slack, float("inf"), float("inf"))
    with few_threads(out.numel() < _FEW):
        compared = compare(out, expected.out, for_out, expected.out_magnitude)
        if not compared.ok and expected.rounding is not None:
            compared = compare(out, expected.out, for_out, expected.out_magnitude, expected.rounding())
        return Verdict(
            compared, compare(lse.unsqueeze(-1), expected.lse.unsqueeze(-1), by_value, expected.lse_magnitude)
        )


__all__ = ["Expected", "Inputs", "Outcome", "Verdict", "build", "call", "expect", "judge", "plan_for", "watched"]
