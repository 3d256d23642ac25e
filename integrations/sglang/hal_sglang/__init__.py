"""SGLang's expert-parallel token dispatch by the HAL.

SGLang calls `register` in every process, through the entry point ``sglang.srt.plugins``. Nothing of SGLang is imported
before that.
"""

from __future__ import annotations

import os
from typing import Final

from hal.spec.errors import SpecError

REPLACE_ENV: Final = "HAL_SGLANG_REPLACE"
"""``deepep`` puts the HAL in place of DeepEP; empty or unset changes nothing."""

_REPLACED: Final = {"deepep": "sglang.srt.layers.moe.token_dispatcher.deepep.DeepEPDispatcher"}


def register() -> None:
    """Put `HalDispatcher` where ``HAL_SGLANG_REPLACE`` says.

    Raises
    ------
    SpecError
        The variable names something that cannot be replaced.
    """
    name = os.environ.get(REPLACE_ENV, "")
    if not name:
        return
    if name not in _REPLACED:
        raise SpecError(REPLACE_ENV, repr(name), " or ".join(_REPLACED))
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from hal_sglang.dispatcher import HalDispatcher

    HookRegistry.register(_REPLACED[name], HalDispatcher, HookType.REPLACE)
