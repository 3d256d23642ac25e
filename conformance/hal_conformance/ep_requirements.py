"""What expert-parallel obligations require, and the calls that must be refused where it is not declared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from hal.spec.capability import Capabilities, EpCapabilities
from hal_conformance.context import Context, Stop
from hal_conformance.cover_ep import ranks_of, scalable
from hal_conformance.ep import Ref, Step
from hal_conformance.ep_case import EpCase
from hal_conformance.ep_draw import EpDraw
from hal_conformance.ep_play import play
from hal_conformance.ep_round import PackedRound, Round, scripts

Declared = Callable[[EpCapabilities], bool]
Calls = Callable[[EpCase, Context], tuple[EpCase, Any, dict[str, Any], Callable[[int], list[Step]]]]
"""The case, the modes and other arguments of its buffer, and the calls, of which one (or the buffer) is undeclared."""


def ep(test: Declared) -> Callable[[Capabilities], bool]:
    """Whether expert-parallel calls are declared, and of them something more."""
    return lambda capabilities: capabilities.ep is not None and test(capabilities.ep)


def refusal(calls: Calls) -> Callable[[Context], str]:
    """Make the calls on local ranks: the buffer or one of the calls must raise UnsupportedError on all of them."""

    def refuse(context: Context) -> str:
        plain = EpCase() if context.capabilities.ep is None else EpDraw(context.rng, context.ep, 0).base((2, 1, 3, 4))
        case, modes, buffer, steps = calls(plain, context)
        script = scripts(case, steps, modes, **buffer)
        for one in script:
            one[0] = Step("open", "open", one[0].args)
            one[1:] = [Step(s.op, s.name or s.op, s.args, "open") for s in one[1:]]
        names = [step.name for step in script[0]]
        try:
            played = play(context, case, script, raising=names)
        except Stop:
            return "; ".join(context.record.problems)
        finally:
            context.record.problems.clear()
        for rank, done in enumerate(played.steps):
            raised = [d.raised for name, d in done.items() if d.raised is not None and name != "close"]
            if not raised:
                return f"returned a result on rank {rank} instead of raising UnsupportedError"
            if raised[0]["type"] != "UnsupportedError":
                return f"raised {raised[0]['type']} instead of UnsupportedError on rank {rank}: {raised[0]['text']}"
        return ""

    return refuse


def _normal(flags: dict[str, Any] | None = None, buffer: dict[str, Any] | None = None, **changes: Any) -> Calls:
    def calls(case: EpCase, context: Context) -> Any:
        changed = case.but(**changes)
        made = Round(context, changed)
        return changed, "normal", buffer or {}, lambda rank: [made.dispatch(rank, **(flags or {}))]

    return calls


def _cast(context: Context) -> str:
    """One that is declared, none if it may be."""
    casts = () if context.capabilities.ep is None else context.ep.casts
    return "none" if "none" in casts or not casts else casts[0]


def _packed(flags: dict[str, Any] | None = None, **changes: Any) -> Calls:
    def calls(case: EpCase, context: Context) -> Any:
        changed = case.but(**{"cast": _cast(context), **changes})
        made = PackedRound(context, changed)
        return changed, "low_latency", {}, lambda rank: [made.dispatch(rank, **(flags or {}))]

    return calls


def _cached(case: EpCase, context: Context) -> Any:
    made = Round(context, case)
    return case, "normal", {}, lambda r: [made.dispatch(r, "first"), made.dispatch(r, "again", handle=Ref("first"))]


def _zero_copy(case: EpCase, context: Context) -> Any:
    made = PackedRound(context, case.but(cast=_cast(context)))
    return made.case, "low_latency", {}, lambda r: [made.dispatch(r), made.combine(r, zero_copy=True)]


def _both(case: EpCase, context: Context) -> Any:
    made = Round(context, case)
    return case, ("normal", "low_latency"), {}, lambda rank: [made.dispatch(rank)]


def _mode(context: Context) -> str:
    """One that is declared; the normal one where both are, or none."""
    modes = () if context.capabilities.ep is None else context.ep.modes
    return "low_latency" if "low_latency" in modes and "normal" not in modes else "normal"


def _either(buffer: dict[str, Any] | None = None, **changes: Any) -> Calls:
    """A dispatch of a declared mode, on a buffer that asks for something more."""

    def calls(case: EpCase, context: Context) -> Any:
        mode = _mode(context)
        called = (_normal if mode == "normal" else _packed)(**changes)
        changed, mode, _, steps = called(case, context)
        return changed, mode, buffer or {}, steps

    return calls


_NODES: Final[dict[str, Any]] = {"ranks": 4, "tokens": (3, 4, 5, 6), "per_node": 2}


def masks_cross(e: EpCapabilities) -> bool:
    """Whether ranks of other nodes may be masked."""
    return e.mask_ranks and "mask_ranks" in e.across_nodes and any(_crosses(e, mode) for mode in e.modes)


def _crosses(e: EpCapabilities, mode: str) -> bool:
    """Whether a mode works over several nodes, of whatever size; by default a buffer has the policy ``error``."""
    return mode in e.modes and {mode, "error"} <= set(e.across_nodes) and bool(ranks_of(e, nodes=True))


def _casts(e: EpCapabilities, cast: str) -> bool:
    """Whether a low-latency dispatch may cast so."""
    return "low_latency" in e.modes and cast in e.casts and scalable(e, "cast")


EP_REQUIREMENTS: Final[dict[str, tuple[str, Declared, Calls]]] = {
    "ep_normal": ("EP, normal mode", lambda e: "normal" in e.modes, _normal()),
    "ep_low_latency": ("EP, low-latency mode", lambda e: "low_latency" in e.modes, _packed()),
    "ep_any": ("EP, either mode", lambda e: bool(e.modes), _either()),
    "ep_both": ("EP, both modes", lambda e: {"normal", "low_latency"} <= set(e.modes), _both),
    "ep_expand": ("EP, expand layout", lambda e: "normal" in e.modes and "expand" in e.layouts, _normal(expand=True)),
    "ep_fp8": (
        "EP, FP8 rows",
        lambda e: "normal" in e.modes and "float8_e4m3fn" in e.dtypes and scalable(e, "sent"),
        _normal(scales="float32", hidden=256),
    ),
    "ep_cached": ("EP, cached handles", lambda e: "normal" in e.modes and e.cached_handle, _cached),
    "ep_async": ("EP, async_finish", lambda e: "normal" in e.modes and e.async_finish, _normal({"async_finish": True})),
    "ep_hook": (
        "EP, receive hooks",
        lambda e: "normal" in e.modes and e.recv_hook,
        _normal({"return_recv_hook": True}),
    ),
    "ep_drop": ("EP, overflow drop", lambda e: "normal" in e.modes and "drop" in e.overflow, _normal(overflow="drop")),
    "ep_grow": ("EP, overflow grow", lambda e: "normal" in e.modes and "grow" in e.overflow, _normal(overflow="grow")),
    "ep_no_cast": (
        "EP, low-latency mode without a cast",
        lambda e: "low_latency" in e.modes and "none" in e.casts,
        _packed(cast="none"),
    ),
    "ep_cast_fp8": (
        "EP, low-latency cast to FP8",
        lambda e: _casts(e, "fp8"),
        _packed(cast="fp8", hidden=256),
    ),
    "ep_cast_pow2": (
        "EP, power-of-two scales",
        lambda e: _casts(e, "fp8_pow2"),
        _packed(cast="fp8_pow2", hidden=256),
    ),
    "ep_cast_ue8m0": (
        "EP, UE8M0 scales",
        lambda e: _casts(e, "fp8_ue8m0"),
        _packed(cast="fp8_ue8m0", hidden=256),
    ),
    "ep_zero_copy": (
        "EP, zero-copy combine",
        lambda e: "low_latency" in e.modes and e.zero_copy_combine,
        _zero_copy,
    ),
    "ep_ll_hook": (
        "EP, low-latency receive hooks",
        lambda e: "low_latency" in e.modes and e.recv_hook,
        _packed({"return_recv_hook": True}),
    ),
    "ep_ll_async": (
        "EP, low-latency async_finish",
        lambda e: "low_latency" in e.modes and e.async_finish,
        _packed({"async_finish": True}),
    ),
    "ep_nodes": (
        "EP over several nodes",
        lambda e: _crosses(e, "normal"),
        _normal(**_NODES),
    ),
    "ep_ll_nodes": (
        "EP, low-latency mode over several nodes",
        lambda e: _crosses(e, "low_latency"),
        _packed(**_NODES),
    ),
    "ep_pre_reduce": (
        "EP, pre-reduced sums",
        lambda e: _crosses(e, "normal") and e.pre_reduce,
        _normal(**_NODES, pre_reduce=True),
    ),
    "ep_any_nodes": (
        "EP over several nodes, either mode",
        lambda e: any(_crosses(e, mode) for mode in e.modes),
        _either(**_NODES),
    ),
    "ep_mask": ("EP, masked ranks", lambda e: bool(e.modes) and e.mask_ranks, _either({"mask_ranks": True})),
    "ep_mask_nodes": ("EP, masked ranks over several nodes", masks_cross, _either({"mask_ranks": True}, **_NODES)),
}
"""By name: in words, whether it is declared, and the calls that are refused where not."""
