"""L0: discovered, probed, honest capabilities."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import torch

import hal
from hal import plugins
from hal.backend import Backend, Evidence, Probe
from hal.spec.capability import Capabilities, EpCapabilities, Ints, MlaCapabilities
from hal.spec.ep import CASTS, FP8, MODES, OVERFLOW, PLAIN_DTYPES, ROW_ALIGNMENT
from hal.spec.mla import KV_FORMATS, LSE_BASES, QUERY_DTYPES
from hal.spec.tensors import dtype_name
from hal_conformance import manners
from hal_conformance.case import MlaCase
from hal_conformance.checks import holds
from hal_conformance.context import Context, refused
from hal_conformance.decode import call
from hal_conformance.draw import head_dims, head_pairs, members
from hal_conformance.requirements import decode

as_it_was: dict[str, Any] = {}
"""Settings of this process before anything of the backend was loaded."""

_PROBES = 3
_EP_WORDS = {
    "modes": MODES,
    "layouts": ("rank", "expand"),
    "dtypes": tuple(map(dtype_name, (*PLAIN_DTYPES, FP8))),
    "casts": CASTS,
    "transports": None,
    "overflow": OVERFLOW,
    "across_nodes": (*MODES, *OVERFLOW, "mask_ranks"),
}
_ROWS = range(ROW_ALIGNMENT, 1 << 20, ROW_ALIGNMENT)
"""Among which a row is looked for that may be sent."""


def _backend(context: Context) -> Backend | None:
    return plugins.registry().status(context.backend).backend


@holds("CAP-01")
def discovered(context: Context) -> None:
    """Load the plugin and note why it cannot be."""
    status = plugins.registry().status(context.backend)
    context.record.calls += 1
    if status.backend is None:
        context.problem(f"the plugin is {status.state}: {status.reason}")
    changed = manners.changed(as_it_was) if as_it_was else []
    if changed:
        context.problem(f"loading the plugin changed {', '.join(changed)}, which the whole process shares")


@holds("CAP-02")
def honest_probe(context: Context) -> None:
    """Probe several times."""
    backend = _backend(context)
    assert backend is not None
    answers = []
    for _ in range(_PROBES):
        context.record.calls += 1
        try:
            answers.append(backend.probe())
        except Exception as error:
            context.problem(f"probe() raised {type(error).__name__}: {error}")
            return
    first = answers[0]
    if type(first) is not Probe:
        context.problem(f"probe() returned a {type(first).__name__}, not a hal.backend.Probe")
        return
    if not isinstance(first.available, bool):
        context.problem(f"available is {first.available!r}, not True or False")
    if not isinstance(first.reason, str) or not first.reason.strip() or "\n" in first.reason:
        context.problem(f"reason is {first.reason!r}, not one line of text")
    if first.evidence not in get_args(Evidence):
        context.problem(f"evidence is {first.evidence!r}, not one of {', '.join(get_args(Evidence))}")
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in dict(first.details).items()):
        context.problem("details are not texts by name")
    if not first.available:
        context.problem(f"the backend is not available here: {first.reason}")
    elif first.evidence == "compiled":
        context.problem("the probe says available, and that kernels are only compiled here")
    if any((a.available, a.evidence) != (first.available, first.evidence) for a in answers):
        context.problem(f"the answer changes from one probe to the next: {[a.available for a in answers]}")


@holds("CAP-03")
def specification_version(context: Context) -> None:
    """Compare versions as the HAL does."""
    backend = _backend(context)
    context.record.calls += 1
    status = plugins.registry().status(context.backend)
    text = getattr(backend, "spec_version", None)
    parts = text.split(".") if isinstance(text, str) else []
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        context.problem(f"spec_version is {text!r}, not major.minor")
    elif status.state == "refused":
        context.problem(status.reason)
    if not isinstance(getattr(backend, "priority", None), int):
        context.problem(f"priority is {getattr(backend, 'priority', None)!r}, not an int")


@holds("CAP-04")
def capabilities_are_data(context: Context) -> None:
    """Types, vocabularies, JSON, and the same answer before and after a call."""
    backend = _backend(context)
    assert backend is not None
    context.record.calls += 1
    try:
        declared = backend.capabilities()
    except Exception as error:
        context.problem(f"capabilities() raised {type(error).__name__}: {error}")
        return
    problems = list(illegal(declared))
    for text in problems:
        context.problem(text)
    if problems:
        return
    if Capabilities.from_dict(json.loads(declared.to_json())) != declared:
        context.problem("capabilities do not survive JSON")
    if declared.mla_dense is not None and hal.capabilities(context.backend).mla_dense is not None:
        # What the call gives is for other obligations; here it only has to leave the declaration alone.
        refused(lambda: decode(context.draw().base(), context.backend))
    for _ in range(2):
        if backend.capabilities() != declared:
            context.problem("capabilities() gives another answer when asked again")
            break
    if hal.capabilities(context.backend) != declared:
        context.problem("capabilities() gives another answer than it gave the HAL")


def illegal(declared: object) -> Iterable[str]:
    """What in a declaration the specification does not allow, each with the field and what is legal."""
    if type(declared) is not Capabilities:
        yield f"capabilities() returned a {type(declared).__name__}, not hal.Capabilities"
        return
    yield from _words("device_types", declared.device_types, None)
    for device in declared.device_types if type(declared.device_types) is tuple else ():
        try:
            torch.device(device)
        except (RuntimeError, TypeError):
            yield f"device_types: {device!r} is no device type of torch"
    if declared.mla_dense is None and declared.mla_sparse is None and declared.ep is None:
        yield "no operation is declared at all: there is nothing to conform"
    for name, kind in (("mla_dense", declared.mla_dense), ("mla_sparse", declared.mla_sparse)):
        if kind is None:
            continue
        if type(kind) is not MlaCapabilities:
            yield f"{name} is a {type(kind).__name__}, not MlaCapabilities"
            continue
        yield from _illegal_mla(name, kind)
    if declared.ep is not None:
        if type(declared.ep) is not EpCapabilities:
            yield f"ep is a {type(declared.ep).__name__}, not EpCapabilities"
            return
        yield from _illegal_ep(declared.ep)


def _illegal_mla(name: str, kind: MlaCapabilities) -> Iterable[str]:
    wrong = list(_fields(name, kind))
    yield from wrong
    yield from _words(f"{name}.dtypes", kind.dtypes, tuple(map(dtype_name, QUERY_DTYPES)))
    yield from _words(f"{name}.kv_formats", kind.kv_formats, KV_FORMATS)
    yield from _words(f"{name}.lse_bases", kind.lse_bases, LSE_BASES)
    if "e" not in kind.lse_bases:
        yield f"{name}.lse_bases lacks 'e', the specified default"
    if (kind.topk is None) != (name == "mla_dense"):
        yield f"{name}.topk is {kind.topk}; it belongs to mla_sparse and only there"
    if not wrong and not head_dims(kind):
        yield f"{name}.head_dim_v ({kind.head_dim_v}) is above head_dim ({kind.head_dim}): no call is declared"
    if not wrong and not head_pairs(kind):
        yield f"{name}.h_q ({kind.h_q}) holds no multiple of h_kv ({kind.h_kv}): no call is declared"


def _illegal_ep(ep: EpCapabilities) -> Iterable[str]:
    yield from _fields("ep", ep)
    normal, packed = "normal" in ep.modes, "low_latency" in ep.modes
    needless = {"layouts": not normal, "casts": not packed, "across_nodes": True}
    for field, words in _EP_WORDS.items():
        value = getattr(ep, field)
        if value != () or not needless.get(field, False):
            yield from _words(f"ep.{field}", value, words)
    if normal and "rank" not in ep.layouts:
        yield f"ep.layouts is {ep.layouts}, without 'rank': a row per token and rank is what dispatch gives by default"
    if "error" not in ep.overflow:
        yield f"ep.overflow is {ep.overflow}, without 'error', the policy that a buffer has by default"
    plain = list(map(dtype_name, PLAIN_DTYPES))
    if not set(ep.dtypes) & set(plain):
        yield f"ep.dtypes is {ep.dtypes}, and a buffer has one of {', '.join(plain)}"
    if type(ep.nodes) is Ints and 1 not in ep.nodes:
        yield f"ep.nodes ({ep.nodes}) lacks 1: by default a group is one node"
    if type(ep.row_bytes) is Ints and not any(n in ep.row_bytes for n in _ROWS):
        yield f"ep.row_bytes ({ep.row_bytes}) holds no multiple of {ROW_ALIGNMENT}, which every row is"


def _words(name: str, value: object, legal: tuple[str, ...] | None) -> Iterable[str]:
    if type(value) is not tuple or not value:
        yield f"{name} is {value!r}, not a tuple of at least one word"
        return
    for word in value:
        if not isinstance(word, str) or (legal is not None and word not in legal):
            yield f"{name}: {word!r} is none of {', '.join(legal or ('a text',))}"
    if len(set(value)) != len(value):
        yield f"{name} says something twice: {value}"


def _fields(name: str, section: Any) -> Iterable[str]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if isinstance(value, Ints):
            if type(value) is not Ints or not any(n > 0 for n in members(value, ())):
                yield f"{name}.{field.name} ({value!r}) holds no number, or is not exactly Ints"
        elif field.type == "Ints":
            yield f"{name}.{field.name} is {value!r}, not Ints"
        elif field.type == "bool" and not isinstance(value, bool):
            yield f"{name}.{field.name} is {value!r}, not True or False"


def _corners(values: Ints, usual: tuple[int, ...], most: int, last: int = 0) -> list[int]:
    """Members at the ends of a declared set and the usual ones in it; its upper end also far off, up to ``last``."""
    found = {n for n in (*usual, *values.only) if n in values and n <= most}
    inside = [n for n in range(1, most + 1) if n in values]
    end = 0 if values.high is None else values.high // values.multiple_of * values.multiple_of
    far = {end} if end in values and most < end <= last else set()
    return sorted(found | far | set(inside[:1]) | set(inside[-1:]))


def declared_calls(context: Context) -> list[MlaCase]:
    """A call for every declared value and corner, everything else plain."""
    dense, base = context.dense, context.draw().base().but(lengths=(5, 70), pages="ordered")
    cases = [base.but(dtype=dtype) for dtype in dense.dtypes]
    cases += [base.but(device=device) for device in context.capabilities.device_types[1:]]
    cases += [base.but(lse_base=word) for word in dense.lse_bases]
    cases += [base.but(page=page) for page in _corners(dense.page_size, (1, 16, 32, 64, 128), 256, 4096)]
    for h_kv in _corners(dense.h_kv, (1, 2, 3, 8), 8):
        pairs = [pair for pair in head_pairs(dense, (h_kv,)) if pair[1] == h_kv]
        cases += [base.but(h_q=h_q, h_kv=h_kv) for h_q, _ in pairs[:1]]
    for h_q in _corners(dense.h_q, (1, 3, 16, 63, 64, 128), 256, 2048):
        fitting = [pair for pair in head_pairs(dense, (1, 2, 3, 4, 8)) if h_q % pair[1] == 0]
        cases += [base.but(h_q=h_q, h_kv=fitting[0][1])] if fitting else []
    cases += [base.but(d=d, d_v=v) for d, v in head_dims(dense)]
    for d in _corners(dense.head_dim, (512, 576), 1024):
        cases += [base.but(d=d, d_v=v) for v in _corners(dense.head_dim_v, (512,), d)[-1:]]
    cases += [base.but(s_q=s_q) for s_q in _corners(dense.s_q, (1, 2, 4), 16, 256)]
    most = max(_corners(dense.s_q, (1, 2), 16, 256), default=1)
    flags: list[tuple[str, dict[str, Any]]] = [
        ("causal", {"causal": True}),
        ("ragged_q", {"q_lens": (1, min(2, most))}),
    ]
    flags += [("batch_invariant", {"batch_invariant": True})]
    declared_flags = [changes for name, changes in flags if getattr(dense, name)]
    cases += [base.but(**changes) for changes in declared_flags]
    everything: dict[str, Any] = {}
    for changes in declared_flags:
        everything |= changes
    cases += [base.but(**everything, lse_base=dense.lse_bases[-1]), base.but(plan=True)]
    return cases


def _declared_count(context: Context) -> int:
    return len(declared_calls(context))


@holds("CAP-05", _declared_count)
def declared_runs(context: Context) -> None:
    """Make one declared call; what it computes is for L1."""
    case = declared_calls(context)[context.index]
    context.record.case = case.to_dict()
    context.record.calls += 1
    inputs = context.make(case)
    try:
        context.record.seconds += call(inputs, context.backend).seconds
    except Exception as error:
        context.problem(f"a declared call raised {type(error).__name__}: {error}")


def _outside(values: Ints, candidates: Iterable[int]) -> list[int]:
    return [n for n in candidates if n not in values][:3]


def undeclared_calls(context: Context) -> list[tuple[str, Callable[[], object]]]:
    """Legal calls outside the declaration, by name; made only when called."""
    dense, base, backend = context.dense, context.draw().base(), context.backend
    base = base.but(lengths=(5, 70))

    def later(case: MlaCase) -> Callable[[], object]:
        return lambda: decode(case, backend)

    cases = [base.but(dtype=name) for name in map(dtype_name, QUERY_DTYPES) if name not in dense.dtypes]
    cases += [base.but(lse_base=word) for word in LSE_BASES if word not in dense.lse_bases]
    cases += [base.but(page=n) for n in _outside(dense.page_size, (1, 16, 63, 65, 128, 257, 1024))]
    cases += [base.but(h_q=n, h_kv=1) for n in _outside(dense.h_q, (1, 3, 17, 63, 129, 256)) if 1 in dense.h_kv]
    cases += [base.but(h_q=base.h_q * n, h_kv=n) for n in _outside(dense.h_kv, (2, 3, 8, 16))]
    cases += [base.but(d=n, d_v=min(n, base.d_v)) for n in _outside(dense.head_dim, (64, 192, 512, 577, 640, 1024))]
    cases += [base.but(d_v=n) for n in _outside(dense.head_dim_v, (1, 64, 100, 448, base.d)) if n <= base.d]
    cases += [base.but(s_q=n) for n in _outside(dense.s_q, (2, 3, 5, 65))]
    for name, changes in (("causal", {"causal": True}), ("ragged_q", {"q_lens": (1, 2)})):
        if not getattr(dense, name):
            cases.append(base.but(**changes))
    if not dense.batch_invariant:
        cases.append(base.but(batch_invariant=True))
    found = [(str(case.to_dict()), later(case)) for case in cases]
    # Nothing may be refused only the first time: a call that was refused stays refused.
    return [pair for pair in found for _ in range(2)]


def _undeclared_count(context: Context) -> int:
    # Where everything of the specification is declared, the one case left is that nothing was left out.
    return max(1, len(undeclared_calls(context)))


@holds("CAP-06", _undeclared_count)
def undeclared_is_refused(context: Context) -> None:
    """Make one undeclared call."""
    calls = undeclared_calls(context)
    context.record.calls += 1
    if not calls:
        return
    name, call = calls[context.index]
    instead = refused(call)
    if instead:
        context.problem(f"{name} is not declared, but the call {instead}")


@holds("CAP-07")
def launches_are_counted(context: Context) -> None:
    """Decode a few times and look at the counters before, between and after."""
    case = context.draw().base()
    inputs = context.make(case)
    seen: dict[str, int] = {}
    for turn in range(3):
        counts = _launches(context)
        if counts is None:
            return
        fallen = [name for name, count in seen.items() if counts.get(name, 0) < count]
        if fallen:
            context.problem(f"launches()[{fallen[0]!r}] fell from {seen[fallen[0]]} to {counts.get(fallen[0], 0)}")
            return
        if turn and sum(counts.values()) <= sum(seen.values()):
            context.problem("a decode launched no kernel of this backend: who computed it?")
            return
        seen = counts
        # What it computes, and where it writes, is for L1.
        call(inputs, context.backend)
        context.record.calls += 1


def _launches(context: Context) -> dict[str, int] | None:
    backend = _backend(context)
    assert backend is not None
    counts = backend.launches()
    if not isinstance(counts, Mapping):
        context.problem(f"launches() returned a {type(counts).__name__}, not a mapping")
        return None
    for name, count in counts.items():
        if not isinstance(name, str) or name.count("@") < 1 or ":" not in name.split("@")[0]:
            context.problem(f"launches() has {name!r}, which does not read driver:kernel@device")
            return None
        if not isinstance(count, int) or count < 0:
            context.problem(f"launches()[{name!r}] is {count!r}, not a count")
            return None
    return dict(counts)
