"""``hal bench overhead``: what `hal.mla_decode` adds to the backend's own call, and ``import hal`` to ``import torch``.

The call is as small as a decode can be, so that its own time does not hide the difference; every contender runs in
every round, and what is added is the difference of two medians of one round.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from rich.text import Text

import hal
from hal.bench.machine import Bystanders
from hal.bench.rounds import Contender, HostClock, Watcher, interleave
from hal.bench.stats import Spread
from hal.bench.text import disturbance, short, span
from hal.plugins import Selected
from hal.spec.mla import MlaDecodeArgs, check_decode
from hal.spec.validation import Level, set_validation, validation_level

STYLES: Final = ("steady", "bare")
"""``steady``: with a plan and an out of the caller, as an engine calls every layer. ``bare``: with neither."""

_CALLS: Final = 200
_H_Q: Final = 4
_IMPORT: Final = (
    "import time; start = time.perf_counter(); import torch; middle = time.perf_counter(); "
    "import hal; hal.mla_decode; end = time.perf_counter(); print(middle - start, end - middle)"
)


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of one way to call, at one level of validation.

    Attributes
    ----------
    style : str
    level : Level
    call : Spread
        `hal.mla_decode`.
    own : Spread
        The backend's own call on the same arguments, already checked.
    added : Spread
        Their difference, round by round.
    validation : Spread
        `check_decode` alone, which also allocates what the caller did not bring.
    """

    style: str
    level: Level
    call: Spread
    own: Spread
    added: Spread
    validation: Spread


@dataclass(frozen=True, slots=True)
class Overhead:
    """All of it.

    Attributes
    ----------
    backend : str
    rounds : int
    costs : tuple of Cost
    import_torch_ms, import_hal_ms : Spread or None
        In fresh interpreters; the second on top of the first. None where no interpreter was asked for.
    others : float or None
        Share of the machine that other processes took.
    """

    backend: str
    rounds: int
    costs: tuple[Cost, ...]
    import_torch_ms: Spread | None
    import_hal_ms: Spread | None
    others: float | None


def run(selected: Selected, rounds: int, imports: int, watcher: Watcher | None = None) -> Overhead:
    """Measure.

    Parameters
    ----------
    selected : Selected
        The backend; one thread is used.
    rounds : int
    imports : int
        Fresh interpreters to time the imports in.
    watcher : Watcher, optional

    Returns
    -------
    Overhead
    """
    watcher = watcher or Watcher()
    level, threads = validation_level(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        bystanders = Bystanders()
        contenders = [one for style in STYLES for each in Level for one in _contenders(selected, style, each)]
        watcher.stage("calling", len(contenders) * (rounds + 1))
        outcome = interleave(contenders, rounds=rounds, clock=HostClock(), most_calls=_CALLS, on_turn=watcher.step)
    finally:
        set_validation(level)
        torch.set_num_threads(threads)
    others = bystanders.share()
    for error in outcome.failed.values():
        raise error
    costs = tuple(_cost(style, each, outcome.samples) for style in STYLES for each in Level)
    watcher.stage("importing", imports)
    import_times = [_import(watcher) for _ in range(imports)]
    torch_ms, hal_ms = (Spread.of(times) for times in zip(*import_times, strict=True)) if imports else (None, None)
    return Overhead(selected.name, outcome.rounds, costs, torch_ms, hal_ms, others)


def _contenders(selected: Selected, style: str, level: Level) -> Iterator[Contender]:
    device = torch.device(selected.capabilities.device_types[0])
    q = torch.randn(1, 1, _H_Q, 576, device=device).bfloat16()
    kv = torch.randn(1, 64, 1, 576, device=device).bfloat16()
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    lengths = torch.full((1,), 64, dtype=torch.int32, device=device)
    steady = style == "steady"
    out = q.new_empty(1, 1, _H_Q, 512) if steady else None
    plan = hal.mla_plan(lengths, h_q=_H_Q, backend=selected.name) if steady else None
    args = checked(q, kv, table, lengths, out)
    args.schedule = None if plan is None else plan.schedule
    name = selected.name

    def call(_: int) -> object:
        return hal.mla_decode(q, kv, table, lengths, plan=plan, out=out, backend=name)

    calls: dict[str, Callable[[int], object]] = {
        "call": call,
        "own": lambda _: selected.backend.mla_decode(args),
        "validation": lambda _: checked(q, kv, table, lengths, out),
    }
    for what, function in calls.items():
        yield Contender((style, level, what), function, lambda: set_validation(level))


def checked(
    q: torch.Tensor, kv: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor, out: torch.Tensor | None
) -> MlaDecodeArgs:
    """What a backend receives for a plain call."""
    nothing = None
    return check_decode(
        q, kv, table, lengths, 512, nothing, False, nothing, nothing, nothing, nothing, nothing, nothing, nothing, out,
        nothing, "e", False,
    )  # fmt: skip


def _cost(style: str, level: Level, samples: dict[Any, list[float]]) -> Cost:
    call, own, validation = (samples[style, level, what] for what in ("call", "own", "validation"))
    added = [a - b for a, b in zip(call, own, strict=True)]
    return Cost(style, level, *(Spread.of([1e6 * s for s in values]) for values in (call, own, added, validation)))


def _import(watcher: Watcher) -> tuple[float, float]:
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
    watcher.step()
    torch_seconds, hal_seconds = map(float, done.stdout.split())
    return torch_seconds * 1e3, hal_seconds * 1e3


def document(found: Overhead) -> dict[str, Any]:
    """What ``--json`` writes: medians."""
    imports = {"torch_ms_p50": found.import_torch_ms, "hal_ms_p50": found.import_hal_ms}
    return {
        "backend": found.backend,
        "calls": [
            {
                "style": cost.style,
                "level": cost.level.name.lower(),
                "call_us_p50": cost.call.p50,
                "own_us_p50": cost.own.p50,
                "added_us_p50": cost.added.p50,
                "validation_us_p50": cost.validation.p50,
            }
            for cost in found.costs
        ],
        "import": {name: None if spread is None else spread.p50 for name, spread in imports.items()},
    }


def lines(found: Overhead) -> Iterator[Text]:
    """The table."""
    yield Text()
    yield Text(f"µs, medians (p10–p90) of {found.rounds} interleaved rounds, one thread; b 1, s_k 64, h_q {_H_Q}")
    yield Text(
        f"  {'call':<8}{'checks':<7}{'hal.mla_decode':>15}{'backend alone':>14}{'added':>8} {'':<13}{'validation':>11}",
        style="bold",
    )
    for cost in found.costs:
        yield Text(
            f"  {cost.style:<8}{cost.level.name.lower():<7}{short(cost.call.p50):>15}{short(cost.own.p50):>14}"
            f"{short(cost.added.p50):>8} {f'({span(cost.added)})':<13}{short(cost.validation.p50):>11}"
        )
    yield Text("  added      = hal.mla_decode − the backend's own call on checked arguments")
    yield Text("  validation = the checks alone, and allocating lse (and out, if bare)")
    yield Text("  steady: plan= and out= given, as in every layer of an engine; bare: neither")
    if found.import_hal_ms is not None and found.import_torch_ms is not None:
        yield Text(
            f"  import hal adds {short(found.import_hal_ms.p50)} ms ({span(found.import_hal_ms)}) to the "
            f"{short(found.import_torch_ms.p50)} ms of import torch"
        )
    yield from disturbance([], found.others, ": read the lower end of each spread")
