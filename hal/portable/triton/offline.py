"""Compile the kernels for architectures that are not here, and look at the machine code.

What a kernel would be launched with on a device is written down as a `Build`; its `Code` says whether the chip's matrix
instructions are in it, whether registers were spilled, and how much shared memory it takes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from hal.portable.triton import kernels, tuning
from hal.portable.triton.mla import Sizes
from hal.portable.triton.tuning import Table
from hal.spec.mla import MlaGeometry
from hal.spec.tensors import dtype_name

_TYPES: Final = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
_POINTERS: Final = {
    "table": "*i32",
    "seqlens": "*i32",
    "cu": "*i32",
    "lse": "*fp32",
    "prefix": "*i64",
    "first": "*i32",
    "slots": "*fp32",
    "states": "*fp32",
    "flag": "*i32",
}
_FLOATS: Final = ("scale", "log_unit")


@dataclass(frozen=True, slots=True)
class Build:
    """One kernel for one architecture.

    Attributes
    ----------
    arch : str
    kernel : str
        ``schedule``, ``decode`` or ``merge``.
    geometry : MlaGeometry
    far : bool
        Strides that are counted in single elements, and beyond what 32 bits hold.
    """

    arch: str
    kernel: str
    geometry: MlaGeometry
    far: bool = False

    def __str__(self) -> str:
        g = self.geometry
        options = "-causal" * g.causal + "-ragged" * g.ragged_q + "-invariant" * g.batch_invariant
        shape = f"h{g.h_q}-d{g.head_dim}v{g.head_dim_v}-p{g.page_size}-{dtype_name(g.dtype)}"
        return f"{self.arch}-{self.kernel}-{shape}{options}{'-far' * self.far}"


@dataclass(frozen=True, slots=True)
class Code:
    """What the compiler made.

    Attributes
    ----------
    assembly : str
    shared : int
        Bytes of shared memory.
    registers, spilled : int
        Of a thread; ``spilled`` in bytes of memory.
    spilled_in_loop : int
        Instructions of the loop over tokens that read or write spilled registers; what is merely put aside while that
        loop runs costs nothing.
    """

    assembly: str
    shared: int
    registers: int
    spilled: int
    spilled_in_loop: int

    def count(self, instruction: str) -> int:
        """How often an instruction (the beginning of its name) is in the code."""
        return len(re.findall(rf"(?<![\w.]){re.escape(instruction)}", self.assembly))


def builds(arch: str) -> Iterator[Build]:
    """What every variant of an architecture's table is used for, with the options that change the code, both dtypes."""
    for width, rows in dict.fromkeys((v.width, v.rows) for v in tuning.table(arch).variants):
        dims = (576, 512) if width == 576 else (256, 256)
        options: list[dict[str, Any]] = [
            {},
            {"ragged_q": True},
            {"batch_invariant": True},
            {"page_size": 8},
            {"page_size": 16},
            {"page_size": 32},
            {"dtype": torch.float16},
        ]
        for changed in options:
            group = rows // 2 if changed.get("ragged_q") else rows
            yield Build(arch, "decode", usual(group, *dims, **changed))
    # V as wide as K, which takes a second accumulator; and columns that fill a half of their powers of two.
    for dims in ((576, 576), (448, 448), (448, 256), (320, 256), (288, 288), (512, 512)):
        yield Build(arch, "decode", usual(64, *dims))
    yield Build(arch, "decode", usual(16, 192, 128))
    yield Build(arch, "decode", usual(16, 65, 33))
    yield Build(arch, "decode", usual(16, 576, 512), far=True)
    kinds: list[dict[str, Any]] = [{}, {"ragged_q": True}, {"batch_invariant": True}]
    for changed in kinds:
        yield Build(arch, "schedule", usual(64, 576, 512, **changed))
        yield Build(arch, "merge", usual(64, 576, 512, **changed))


def usual(h_q: int, head_dim: int, head_dim_v: int, **changes: Any) -> MlaGeometry:
    """One query of ``h_q`` heads over pages of 64 tokens in bf16, with changes."""
    fields: dict[str, Any] = {
        "batch": 8,
        "ragged_q": False,
        "s_q": 1,
        "h_q": h_q,
        "h_kv": 1,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "page_size": 64,
        "dtype": torch.bfloat16,
        "kv_format": "plain",
        "causal": False,
        "batch_invariant": False,
        "device": torch.device("cpu"),
    }
    return MlaGeometry(**(fields | changes))


def compile_build(build: Build, processors: int = 132) -> Code:
    """Compile one build, without a device.

    Raises
    ------
    Exception
        Whatever the compiler raises.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    g = build.geometry
    sizes = Sizes.of(build.arch, processors, g)
    kernel = getattr(kernels, build.kernel)
    strides: dict[str, Any] = {"token": 0, "unit": 1, "wide": True} if build.far else {}
    constants = sizes.constants(g) | sizes.compiled(build.kernel, g, **strides)
    signature: dict[str, str] = {}
    aligned: dict[tuple[int], list[list[Any]]] = {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("q", "kv", "out"):
            signature[name] = _TYPES[g.dtype]
        else:
            signature[name] = _POINTERS.get(name, "fp32" if name in _FLOATS else "i32")
        if signature[name].startswith("*"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {n: constants[n] for n in signature if n in constants}, aligned)
    generation = build.arch.removeprefix("sm_")
    vendor = ("cuda", int(generation), 32) if generation != build.arch else ("hip", build.arch, 64)
    warps = sizes.variant.warps if build.kernel == "decode" else 4
    made = triton.compile(source, target=GPUTarget(*vendor), options={"num_warps": warps})
    if "cubin" in made.asm:
        return _of_cubin(made.asm["ptx"], made.asm["cubin"], made.metadata.shared)
    return _of_amdgcn(made.asm["amdgcn"], made.metadata.shared)


def table_of(build: Build) -> Table:
    """The table a build is made by."""
    return tuning.table(build.arch)


def _of_cubin(ptx: str, cubin: bytes, shared: int) -> Code:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, machine_code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack, local = (int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "STACK", "LOCAL"))
    return Code(ptx, shared, registers, stack + local, _spills_in_loop(machine_code.splitlines()))


def _spills_in_loop(lines: list[str]) -> int:
    """In the shortest loop that multiplies matrices; 0 where there is none."""
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"\s*\.(L_x_\d+):", line))}
    jumps = [(i, found[1]) for i, line in enumerate(lines) if (found := re.search(r"BRA.*`\(\.(L_x_\d+)\)", line))]
    loops = [lines[labels[label] : i] for i, label in jumps if labels.get(label, i) < i]
    matrix = [loop for loop in loops if any(re.search(r"\b(HGMMA|HMMA|UTC\w*MMA)\b", line) for line in loop)]
    return sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in min(matrix, key=len, default=[]))


def _of_amdgcn(assembly: str, shared: int) -> Code:
    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}: *(\d+)", assembly)[0])

    spilled = number("private_segment_fixed_size")
    return Code(assembly, shared, number("vgpr_count"), spilled, len(re.findall(r"^\s*scratch_", assembly, re.M)))
