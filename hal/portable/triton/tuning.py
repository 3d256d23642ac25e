"""Sizes the kernels are compiled with, as data: one table an architecture. Nothing is tuned at run time.

An entry is used for calls whose K is at most ``width`` columns wide; among those of the least sufficient width the ones
with the fewest ``rows`` that hold all query rows of a sequence and KV head, else the ones with the most. Of these it is
the one with the longest steps that lie within pages; where a step of each would span pages, and so take an address for
each token, the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from hal.spec.errors import SpecError


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compile the decode kernel.

    Attributes
    ----------
    width : int
        The most columns of K it is for, as `split_columns` cuts them.
    rows : int
        Query rows a program holds: their output stays in registers.
    block_n : int
        Tokens a step.
    warps, stages : int
        Of the compiler; ``stages`` is how many loads of K are under way or in use.
    shares : int
        Shares of the work for each processor of the device.
    columns : int
        Of K in one power of two, how many are multiplied at once.
    """

    width: int
    rows: int
    block_n: int
    warps: int
    stages: int
    shares: int = 1
    columns: int = 512


@dataclass(frozen=True, slots=True)
class Table:
    """What is known of an architecture.

    Attributes
    ----------
    variants : tuple of Variant
    shared : int
        Bytes of shared memory a program may have.
    matrix : tuple of str
        Instructions of which the machine code must hold one; empty for an architecture without any.
    begin : int
        Steps that stand for the cost of beginning a unit: of reading Q, filling the pipeline and writing the result.
    chunks : int
        Most pieces a sequence is split into with ``batch_invariant``, over all its tiles of rows.
    chunk_tokens : int
        Least tokens of such a piece.
    side : int
        Most tiles of one sequence and KV head that run side by side.
    together : int
        Rows a program merges.
    """

    variants: tuple[Variant, ...]
    shared: int
    matrix: tuple[str, ...]
    begin: int = 3
    chunks: int = 32
    chunk_tokens: int = 512
    side: int = 8
    together: int = 4


USUAL_TOKENS: Final = (576, 512)
"""Elements from one token of a cache to the next that kernels are compiled for, which saves them registers."""

# Of 64 rows and pages of 32 or 16, an H200 takes 338 and 340 us in steps of 64 tokens, 205 and 312 in steps of a page;
# of 16 rows and pages of 32, 176 and 123 (docs/performance.md).
_HOPPER: Final = (
    Variant(576, 16, 64, 8, 3),
    Variant(576, 16, 32, 4, 3),
    Variant(576, 64, 32, 8, 4),
    Variant(576, 64, 64, 8, 2),
    Variant(576, 64, 16, 8, 3),
    Variant(288, 16, 64, 4, 3),
    Variant(288, 64, 64, 8, 2),
    Variant(288, 128, 64, 8, 2),
)

# What goes through tensor memory is kept in shared memory beside the blocks: there is no room for two of 64 tokens.
_BLACKWELL: Final = (
    Variant(576, 16, 64, 8, 3),
    Variant(576, 64, 32, 8, 2),
    Variant(288, 16, 64, 4, 3),
    Variant(288, 64, 64, 8, 2),
    Variant(288, 128, 32, 8, 2),
)

# Any other of NVIDIA's. Products of a single warp: 64 rows would spill. 99 KiB are what a desktop card has.
_AMPERE: Final = (
    Variant(576, 16, 32, 8, 3),
    Variant(576, 32, 32, 8, 2),
    Variant(288, 16, 64, 4, 2),
    Variant(288, 64, 32, 8, 2),
)

# 64 KiB of local memory hold one block of 32 tokens and no second.
_CDNA: Final = (
    Variant(576, 16, 32, 4, 1),
    Variant(576, 32, 32, 4, 1),
    Variant(288, 16, 32, 4, 1),
    Variant(288, 64, 32, 4, 1),
)

# No matrix instructions: operands of a product lie in registers, whole rows of 512 in none.
_GCN: Final = (
    Variant(576, 16, 8, 4, 1, columns=16),
    Variant(288, 16, 16, 4, 1, columns=32),
)

_ANY: Final = Table(_AMPERE, 101_376, ("mma.sync",))

TABLES: Final[dict[str, Table]] = {
    "sm_90": Table(_HOPPER, 232_448, ("wgmma", "mma.sync")),
    "sm_100": Table(_BLACKWELL, 232_448, ("tcgen05.mma", "mma.sync")),
    "sm_103": Table(_BLACKWELL, 232_448, ("tcgen05.mma", "mma.sync")),
    "gfx942": Table(_CDNA, 65_536, ("v_mfma",)),
    "gfx90a": Table(_CDNA, 65_536, ("v_mfma",)),
    "gfx906": Table(_GCN, 65_536, ()),
    # Small tiles, so that the sizes a test can afford make several of them; lengths of a few hundred are split.
    "interpreter": Table(
        (Variant(576, 16, 32, 4, 1, columns=128), Variant(576, 32, 32, 4, 1)),
        0,
        (),
        begin=1,
        chunks=4,
        chunk_tokens=64,
        side=2,
        together=16,
    ),
}
"""By architecture, as its compiler names it."""


def table(arch: str) -> Table:
    """The table of an architecture; of NVIDIA's without one, what every chip from sm_80 on can hold.

    Parameters
    ----------
    arch : str
        For instance ``sm_90`` or ``gfx942``.
    """
    return TABLES.get(arch, _ANY)


def choose(arch: str, width: int, rows: int, page_size: int) -> Variant:
    """The variant for so many columns, the query rows of a sequence and KV head, and the tokens of a page.

    Raises
    ------
    SpecError
        Wider than any variant.
    """
    variants = table(arch).variants
    wide = [variant.width for variant in variants if variant.width >= width]
    if not wide:
        raise SpecError("head_dim", width, f"at most {max(v.width for v in variants)} columns in two powers of two")
    narrowest = [v for v in variants if v.width == min(wide)]
    most = max(v.rows for v in narrowest)
    fitting = min((v.rows for v in narrowest if v.rows >= rows), default=most)
    alike = [v for v in narrowest if v.rows == fitting]
    return max((v for v in alike if page_size % v.block_n == 0), key=lambda v: v.block_n, default=alike[0])


def split_columns(head_dim: int) -> tuple[int, int]:
    """The columns of K as two powers of two, at least 16 each where not 0: 576 → (512, 64), 512 → (512, 0)."""
    main = 1 << max(4, head_dim.bit_length() - 1)
    rest = head_dim - main
    return main, 0 if rest <= 0 else 1 << max(4, (rest - 1).bit_length())
