"""vLLM's MLA decode by the HAL.

vLLM calls `register` in every process, through the entry point ``vllm.general_plugins``. Nothing of vLLM is imported
before that.
"""

from __future__ import annotations

import os
from typing import Final

REPLACE_ENV: Final = "HAL_VLLM_REPLACE"
"""Names of vLLM's backends, separated by commas, in whose place the HAL serves too."""

_BACKEND: Final = "hal_vllm.backend.HalMLABackend"


def register() -> None:
    """Make the HAL vLLM's backend ``CUSTOM``, and what ``HAL_VLLM_REPLACE`` names. May be called again.

    Raises
    ------
    ValueError
        vLLM has no backend of a name in ``HAL_VLLM_REPLACE``; it lists those it has.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, _BACKEND)
    for name in filter(None, (one.strip() for one in os.environ.get(REPLACE_ENV, "").split(","))):
        register_backend(AttentionBackendEnum[name], _BACKEND)
