"""Every kernel in the tuning tables, compiled for chips that are not here, and what the machine code looks like."""

from __future__ import annotations

import os
import random

import pytest
import torch
from seeds import SEED

triton = pytest.importorskip("triton", reason="triton is not installed")

from hal.portable.triton import offline, tuning  # noqa: E402
from hal.portable.triton.mla import Sizes  # noqa: E402

ARCHS = ["sm_90", "sm_100", "sm_89", "gfx942", "gfx90a", "gfx906"]
MAIN = "sm_90"
"""The chip whose variants are drawn from more often."""
CROWDED = {(576, 64, 64), (576, 16, 32)}
"""Columns, rows and tokens a step of its variants that leave no register free."""


def common(build: offline.Build) -> bool:
    """Neither ragged nor batch-invariant, pages of 64, bf16."""
    g = build.geometry
    return g.page_size == 64 and g.dtype == torch.bfloat16 and not g.ragged_q and not g.batch_invariant


def wanted(build: offline.Build) -> bool:
    """Whether it is part of this run: all is with ``HAL_COMPILE=all``.

    Otherwise what DeepSeek's shape needs on every chip, and of the rest what the seed of the run draws.
    """
    g = build.geometry
    if os.environ.get("HAL_COMPILE") == "all":
        return True
    if common(build) and (g.head_dim, g.head_dim_v) == (576, 512):
        return True
    rest = common(build) or (build.arch == MAIN and g.dtype == torch.bfloat16)
    return rest and random.Random(f"{SEED} {build}").random() < (1 / 5 if build.arch == MAIN else 1 / 10)


BUILDS = [build for arch in ARCHS for build in offline.builds(arch) if wanted(build)]


def spills_allowed(build: offline.Build) -> int:
    """Instructions of the loop over tokens that may move spilled registers: none but on Hopper, and far apart.

    512 columns of 64 rows leave no register free: offsets of ragged queries and chunks then cost some. Steps of which
    none would be spilled take 27 to 66 % longer, and of 16 rows over pages of 32 23 % (docs/performance.md). Rows
    further apart than 32 bits count take an address of two registers for every element, and the plan chose the step
    before anyone knew the strides.
    """
    g = build.geometry
    if build.far:
        return 24
    variant = Sizes.of(build.arch, 132, g).variant
    if build.arch != MAIN or (variant.width, variant.rows, variant.block_n) not in CROWDED:
        return 0
    return 20 if g.ragged_q or g.batch_invariant else 4


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled here and now, not found from an earlier run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield  # type: ignore[misc]


@pytest.mark.sampled
@pytest.mark.long(1)
@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_it_compiles_for_the_chip_and_uses_what_the_chip_has(build: offline.Build) -> None:
    table = tuning.table(build.arch)
    code = offline.compile_build(build)
    assert code.shared <= table.shared, f"{code.shared} bytes of shared memory, the chip has {table.shared}"
    if build.kernel != "decode":
        assert code.spilled == 0
        return
    assert code.registers > 32, "next to nothing is left of the kernel: its sizes cannot be"
    assert code.spilled_in_loop <= spills_allowed(build)
    if build.arch.startswith("gfx"):
        assert code.spilled == 0
    if table.matrix:
        assert any(code.count(name) for name in table.matrix), f"none of {', '.join(table.matrix)} in the code"
    else:
        assert not code.count("v_mfma")
        assert code.count("v_fma")
    if build.geometry.head_dim % 8 == 0 and not build.far:
        wide = ("cp.async.cg.shared.global", "ld.global.v4", "global_load_dwordx4", "buffer_load_dwordx4")
        assert any(code.count(name) for name in wide), "nothing is loaded 16 bytes at a time"


@pytest.mark.parametrize(
    ("page_size", "block_n"), [(64, 64), (128, 64), (32, 32), (96, 32), (16, 16), (8, 32), (7, 32)]
)
def test_a_step_lies_within_a_page_where_one_can(page_size: int, block_n: int) -> None:
    assert tuning.choose("sm_90", 576, 64, page_size).block_n == block_n


@pytest.mark.parametrize(("rows", "held"), [(1, 16), (16, 16), (17, 64), (64, 64), (65, 64)])
def test_a_tile_holds_all_rows_where_one_can(rows: int, held: int) -> None:
    assert tuning.choose("sm_90", 576, rows, 64).rows == held


@pytest.mark.parametrize(("head_dim", "width"), [(576, 576), (448, 576), (320, 576), (288, 288), (256, 288), (65, 288)])
def test_columns_count_as_they_are_padded(head_dim: int, width: int) -> None:
    assert tuning.choose("sm_90", sum(tuning.split_columns(head_dim)), 64, 64).width == width


@pytest.mark.parametrize("group", [64, 128])
def test_hopper_multiplies_whole_warpgroups_and_loads_k_once(group: int) -> None:
    code = offline.compile_build(offline.Build("sm_90", "decode", offline.usual(group, 576, 512)))
    assert code.count("wgmma.mma_async") > 0
    assert not code.count("mma.sync")
    # 64 tokens × 576 columns × 2 bytes over 256 threads are 18 loads of 16 bytes: once before the loop, once in it.
    assert code.count("cp.async.cg.shared.global") == 2 * 18
