"""The libraries of the judge, loaded without what installed distributions would have them run in its process."""

from __future__ import annotations

import importlib
import os
from typing import Final
from unittest import mock

BY_ITSELF: Final = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HYPOTHESIS_NO_PLUGINS": "1"}
"""Variables by which torch runs none of the entry points in ``torch.backends``, and hypothesis none of its own."""


def load() -> None:
    """Load them, once and for all; processes started later have the environment that the user gave.

    A device that torch knows only by such an entry point is known where backends run: in worker processes.
    """
    with mock.patch.dict(os.environ, BY_ITSELF):
        importlib.import_module("torch")
        importlib.import_module("hypothesis")
