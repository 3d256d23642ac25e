"""Cases of MLA decode: their names, their FLOPs and bytes, and the sweeps.

A name spells the case: ``b4_h128_s1024_q2_causal_varlen_fp16_p64_t1``. ``b`` (sequences), ``h`` (query heads) and ``s``
(cached tokens) are required; ``q`` (queries a sequence) defaults to 1, the dtype to bf16, ``p`` (tokens a page) to 64,
``t`` (threads) to those of the run. ``varlen`` draws lengths around s/2 … s.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

FORMULAS: Final = (
    "FLOP  = 2 · h_q · (d + d_v) · keys attended, over all queries; d 576, d_v 512",
    "bytes = q + each attended KV row once + out",
    "limit = share of min(gemm peak, FLOP / bytes · copy), both of the same rounds",
    "×     = p50 of the peer / p50 of the backend: above 1 the backend is faster;",
    "        p10–p90 of the ratio taken round by round",
)

_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PART: Final = re.compile(r"(?P<key>[bhsqpt])(?P<value>[1-9][0-9]{0,7})")
_HEAD_DIM: Final = 576
_HEAD_DIM_V: Final = 512


@dataclass(frozen=True, slots=True)
class MlaCase:
    """One decode call to be timed: DeepSeek's MLA, one KV head.

    Attributes
    ----------
    b, h_q, s_k, s_q : int
        Sequences, query heads, cached tokens (the most, with ``varlen``), queries a sequence.
    causal, varlen : bool
    dtype : torch.dtype
    page_size : int
    threads : int or None
        Threads for everybody in this case; None for those of the run.
    """

    b: int
    h_q: int
    s_k: int
    s_q: int = 1
    causal: bool = False
    varlen: bool = False
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 64
    threads: int | None = None

    @property
    def d(self) -> int:
        """Columns of K."""
        return _HEAD_DIM

    @property
    def d_v(self) -> int:
        """Columns of V."""
        return _HEAD_DIM_V

    @property
    def name(self) -> str:
        """The shortest spelling, which `parse` understands."""
        parts = [f"b{self.b}", f"h{self.h_q}", f"s{self.s_k}"]
        parts += [f"q{self.s_q}"] * (self.s_q > 1) + ["causal"] * self.causal + ["varlen"] * self.varlen
        parts += [next(text for text, dtype in _DTYPES.items() if dtype is self.dtype)]
        parts += [f"p{self.page_size}"] * (self.page_size != 64)
        parts += [f"t{self.threads}"] if self.threads is not None else []
        return "_".join(parts)

    @staticmethod
    def parse(name: str) -> MlaCase:
        """The case of a name.

        Raises
        ------
        ValueError
            Not a case; says what is wrong with it.
        """
        numbers: dict[str, int] = {}
        words: set[str] = set()
        for part in name.split("_"):
            number = _PART.fullmatch(part)
            if number is not None:
                key = number["key"]
                _refuse_twice(name, key, numbers)
                numbers[key] = int(number["value"])
            elif part in ("causal", "varlen") or part in _DTYPES:
                _refuse_twice(name, part, words)
                words.add(part)
            else:
                raise ValueError(f"case {name!r}: what is {part!r}? {_hint(name)}")
        missing = [key for key in "bhs" if key not in numbers]
        if missing:
            raise ValueError(f"case {name!r} lacks {' and '.join(missing)}. {_hint(name)}")
        dtypes = [text for text in words if text in _DTYPES]
        if len(dtypes) > 1:
            raise ValueError(f"case {name!r} has two dtypes")
        s_q, s_k = numbers.get("q", 1), numbers["s"]
        if s_q > s_k:
            raise ValueError(f"case {name!r}: {s_q} queries but only {s_k} cached tokens, which include theirs")
        return MlaCase(
            numbers["b"],
            numbers["h"],
            s_k,
            s_q,
            "causal" in words,
            "varlen" in words,
            _DTYPES[dtypes[0]] if dtypes else torch.bfloat16,
            numbers.get("p", 64),
            numbers.get("t"),
        )

    def flop(self, lengths: Sequence[int]) -> int:
        """2 · h_q · (d + d_v) · keys attended, summed over the queries of sequences of these lengths."""
        return 2 * self.h_q * (self.d + self.d_v) * sum(map(self._attended, lengths))

    def moved(self, lengths: Sequence[int]) -> int:
        """Bytes of q, of each attended KV row once, and of out."""
        queries = self.b * self.s_q * self.h_q * (self.d + self.d_v)
        return self.dtype.itemsize * (queries + sum(lengths) * self.d)

    def _attended(self, length: int) -> int:
        """Keys attended by all queries of one sequence; the last query sees the newest key, which is its own."""
        if not self.causal:
            return self.s_q * length
        return sum(max(0, length - self.s_q + i + 1) for i in range(self.s_q))


def _refuse_twice(name: str, what: str, seen: object) -> None:
    if what in seen:  # type: ignore[operator]
        raise ValueError(f"case {name!r} has {what!r} twice")


def _hint(name: str) -> str:
    near = difflib.get_close_matches(name, [case.name for case in standard(1)], n=1)
    return f"{f'Did you mean {near[0]!r}? ' if near else ''}A case reads b<sequences>_h<heads>_s<tokens>."


QUICK: Final = tuple(
    map(
        MlaCase.parse,
        (
            "b1_h16_s4096",
            "b1_h128_s4096",
            "b4_h128_s1024",
            "b8_h16_s2048",
            "b8_h1_s4096",
            "b2_h128_s1024_q2_causal",
            "b8_h32_s1024_varlen",
        ),
    )
)
"""A few shapes that show each bound: one long sequence, many heads, few heads, a batch, multi-token, ragged lengths."""


def standard(threads: int) -> tuple[MlaCase, ...]:
    """The sweep of the plots: lines along s_k, b, h_q and threads, then the variants."""
    s_k = [f"b1_h{h}_s{s}" for h in (16, 128) for s in (64, 256, 1024, 4096, 16384, 32768)]
    batch = [f"b{b}_h{h}_s1024" for h in (16, 128) for b in (1, 2, 4, 8, 16, 32, 64, 128) if b * h <= 64 * 128]
    heads = [f"b4_h{h}_s2048" for h in (1, 2, 4, 8, 16, 32, 64, 128)]
    counts = sorted({2**n for n in range(threads.bit_length()) if 2**n <= threads} | {threads})
    scaling = [f"b1_h128_s4096_t{count}" for count in counts]
    variants = ["b4_h128_s1024_q2_causal", "b16_h32_s1024_varlen", "b4_h128_s1024_fp16", "b8_h1_s4096_fp16"]
    every = dict.fromkeys([*(case.name for case in QUICK), *s_k, *batch, *heads, *scaling, *variants])
    return tuple(dict.fromkeys(map(MlaCase.parse, every)))
