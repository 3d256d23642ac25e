"""MLA decode written by hand for compute capability 9.0: TMA, wgmma, two warpgroups that share the output."""

from __future__ import annotations

from hal_cuda.hopper.tier import HopperTier

__all__ = ["HopperTier"]
