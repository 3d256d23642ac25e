"""vLLM, or what stands in for it: see README.md."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest

from integrations.recorded import engine

INTERFACE = Path(__file__).with_name("interface.json")


@pytest.fixture
def backend() -> Iterator[ModuleType]:
    """`hal_vllm.backend`, imported over vLLM's release or over its recorded interface."""
    with engine(INTERFACE) as is_release, ExitStack() as stack:
        if is_release:
            from vllm.config import VllmConfig, set_current_vllm_config

            stack.enter_context(set_current_vllm_config(VllmConfig()))
        import hal_vllm.backend

        yield hal_vllm.backend
