"""Compile a decode through hip-python with a ROCm library that needs no device; run in a process of its own."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from hal_rocm.backend import vendor

from hal.portable import bindings
from hal.portable.mla import Tile
from hal.portable.runtime import Facts
from hal.spec.mla import MlaGeometry

USUAL = MlaGeometry(2, False, 1, 128, 1, 576, 512, 64, torch.bfloat16, "plain", False, False, torch.device("cpu"))


def tile(local_bytes: int) -> Tile:
    return Tile.of(Facts("chip", "", "hip", 100, 2, local_bytes, 64), USUAL)


def main(library: str, folder: str, *architectures: str) -> None:
    names = ("libamdhip64.so", "libhiprtc.so")
    of_the_file = replace(vendor().bindings(), files=dict.fromkeys(names, library))
    try:
        bindings.load(of_the_file)
    except bindings.BackendUnavailable as error:
        print(error)
    runtime = bindings.load(of_the_file, compiles_only=True)
    sizes = tile(vendor().tunings["gfx90a"].local_bytes)
    for architecture in architectures:
        for name, source in {"decode": sizes.decode(), "schedule": sizes.schedule()}.items():
            code = runtime.compile(
                source.text("hip"), source, f"--gpu-architecture={architecture}", "-std=c++17", "-O3"
            )
            Path(folder, f"{architecture}-{name}").write_bytes(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
