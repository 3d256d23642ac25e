"""The FlashMLA peer is found under its own name and inside vLLM, and says why it is not."""

from __future__ import annotations

import sys
import types

import pytest

from hal.bench.peers import flash_mla


def module(*names: str) -> types.ModuleType:
    made = types.ModuleType("made")
    vars(made).update(dict.fromkeys(names, print))
    return made


def test_the_one_inside_vllm_serves_where_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    own, inside = flash_mla._MODULES
    monkeypatch.setitem(sys.modules, own, None)
    for parent in ("vllm", "vllm.third_party", "vllm.third_party.flashmla"):
        monkeypatch.setitem(sys.modules, parent, module())
    monkeypatch.setitem(sys.modules, inside, module(*flash_mla._NAMES))
    found, said = flash_mla._found()
    assert found is sys.modules[inside]
    assert said.startswith(inside)


def test_a_module_without_the_functions_is_passed_over_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    own, inside = flash_mla._MODULES
    monkeypatch.setitem(sys.modules, own, module("get_mla_metadata"))
    monkeypatch.setitem(sys.modules, inside, None)
    found, said = flash_mla._found()
    assert found is None
    assert "flash_mla has no flash_mla_with_kvcache" in said
    assert f"{inside} does not import" in said
