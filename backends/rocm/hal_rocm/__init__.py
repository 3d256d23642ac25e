"""The ROCm backend of the kernel HAL; `hal_rocm.plugin` registers it."""

from __future__ import annotations

__version__ = "0.1.0"
