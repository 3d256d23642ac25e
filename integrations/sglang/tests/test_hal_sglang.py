"""Dispatch and combine as SGLang drives them, on two processes, and how SGLang finds them."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points
from typing import Any

import hal_sglang
import pytest
from ep_ranks import run_ranks

import hal
from integrations.recorded import drift, engine, installed, load
from integrations.sglang.tests import dispatch_cases as cases


def test_the_record_is_the_installed_release() -> None:
    record = load(cases.INTERFACE)
    if not installed(record):
        pytest.skip("not applicable: SGLang is not installed, the record stands in for it")
    assert drift(record) == []


def test_it_takes_the_place_of_sglangs_dispatcher() -> None:
    """The same constructor, and every method that callers of the other one use."""
    with engine(cases.INTERFACE):
        from hal_sglang.dispatcher import HalDispatcher
        from sglang.srt.layers.moe.token_dispatcher.base import BaseDispatcher
        from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPDispatcher

        assert issubclass(HalDispatcher, BaseDispatcher)
        assert not HalDispatcher.__abstractmethods__
        members = load(cases.INTERFACE)["objects"]["sglang.srt.layers.moe.token_dispatcher.deepep:DeepEPDispatcher"][
            "members"
        ]
        assert {"dispatch_a", "dispatch_b", "combine_a", "combine_b"} <= set(members)
        for name in members:
            mine, theirs = getattr(HalDispatcher, name), getattr(DeepEPDispatcher, name)
            assert list(inspect.signature(mine).parameters) == list(inspect.signature(theirs).parameters), name


def test_sglang_finds_it_and_it_waits_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [one for one in entry_points(group="sglang.srt.plugins") if one.name == "hal"]
    assert [one.load() for one in found] == [hal_sglang.register]
    with engine(cases.INTERFACE):
        from hal_sglang.dispatcher import HalDispatcher
        from sglang.srt.plugins import hook_registry

        calls: list[tuple[Any, ...]] = []
        monkeypatch.setattr(hook_registry.HookRegistry, "register", lambda *args: calls.append(args))
        hal_sglang.register()
        assert calls == []
        monkeypatch.setenv("HAL_SGLANG_REPLACE", "deepep")
        hal_sglang.register()
        target = "sglang.srt.layers.moe.token_dispatcher.deepep.DeepEPDispatcher"
        assert calls == [(target, HalDispatcher, hook_registry.HookType.REPLACE)]
        monkeypatch.setenv("HAL_SGLANG_REPLACE", "pplx")
        with pytest.raises(hal.SpecError, match="HAL_SGLANG_REPLACE"):
            hal_sglang.register()


@pytest.mark.sampled
@pytest.mark.long(3)
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize(("mode", "dtype"), [("NORMAL", "bf16"), ("LOW_LATENCY", "bf16"), ("LOW_LATENCY", "fp8")])
def test_two_processes_are_one_dense_mixture(mode: str, dtype: str, staged: bool) -> None:
    run_ranks(2, cases.over_engine, cases.layers, mode, dtype, staged, limit=120)


def test_automatic_mode() -> None:
    run_ranks(2, cases.over_engine, cases.automatic, limit=120)


def test_two_micro_batches_in_flight() -> None:
    run_ranks(2, cases.over_engine, cases.two_in_flight, limit=120)


def test_hooks_and_stages_out_of_turn() -> None:
    run_ranks(2, cases.over_engine, cases.hooks_and_order, limit=120)
