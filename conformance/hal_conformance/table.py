"""Levels and obligations, as data. The specification's text (``docs/spec.md``) and the suite are both made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import hal

Mode = Literal["quick", "default", "full"]


@dataclass(frozen=True, slots=True)
class Level:
    """A rung of the ladder.

    Attributes
    ----------
    id, title : str
    after : str
        The level that must not have failed for this one to run; empty for the first.
    coming : str
        What this level does not hold yet, in words; empty if it is complete.
    """

    id: str
    title: str
    after: str
    coming: str = ""


LEVELS: Final = (
    Level("L0", "discovered, probed, honest capabilities", ""),
    Level("L1", "dense decode", "L0"),
    Level("L2", "all dense edge cases", "L1"),
    Level("L3", "FP8 KV, sparse, sinks and extra caches", "L2", "the results where these are declared"),
    Level("E1", "EP normal mode", "L0", "the results where EP is declared"),
    Level("E2", "EP low-latency mode and hooks", "E1", "the results where the mode is declared"),
    Level("E3", "EP across nodes and under faults", "E2", "all of it"),
)


@dataclass(frozen=True, slots=True)
class Obligation:
    """One thing a backend must do, tested by the check of the same id.

    Attributes
    ----------
    id, level, title : str
    sentence : str
        Of the specification; what the check holds.
    requires : str
        Name of the requirement (`hal_conformance.requirements`) a backend declares or not. Not declared: the suite
        makes the call all the same and it must raise `UnsupportedError`.
    cases : tuple of int
        How many cases ``--quick``, a default run and ``--full`` test. Zeros: the check itself says how many there are.
    timeout : float
        Seconds one case may take before it counts as hung.
    covered : bool
        False while only the refusal of an undeclared call is tested: declared, the obligation is *uncovered*.
    gate : bool
        Whether nothing after it in its level can be tested once it failed.
    needs : str
        A name of the HAL's public face without which the obligation does not exist yet.
    """

    id: str
    level: str
    title: str
    sentence: str
    requires: str = "dense"
    cases: tuple[int, int, int] = (4, 24, 200)
    timeout: float = 60.0
    covered: bool = True
    gate: bool = False
    needs: str = ""

    def count(self, mode: Mode) -> int:
        """How many cases this mode runs, 0 where the check says."""
        return self.cases[("quick", "default", "full").index(mode)]


_BY_CHECK = (0, 0, 0)
_FEW = (3, 12, 100)

TABLE: Final = (
    Obligation(
        "CAP-01",
        "L0",
        "discovered and loadable",
        "One installed distribution registers the name in the group hal.backends; its plugin imports and its hook "
        "returns one Backend without touching a device.",
        "nothing",
        (1, 1, 1),
        gate=True,
    ),
    Obligation(
        "CAP-02",
        "L0",
        "honest probe",
        "The probe answers quickly and never raises: available or not, one line of reason, and how kernels run here "
        "(hardware, simulation or compiled). Asked again it answers the same.",
        "nothing",
        (1, 1, 1),
        30.0,
        gate=True,
    ),
    Obligation(
        "CAP-03",
        "L0",
        "specification version",
        "The backend states the specification it was written for as major.minor: the same major, and no later minor "
        "than this HAL's.",
        "nothing",
        (1, 1, 1),
        gate=True,
    ),
    Obligation(
        "CAP-04",
        "L0",
        "capabilities are data",
        "Capabilities are exactly the specified dataclasses, hold only values the specification knows, survive JSON, "
        "declare at least one operation with no empty set in it and the natural logarithm, and are the same at every "
        "asking.",
        "nothing",
        (1, 1, 1),
        gate=True,
    ),
    Obligation(
        "CAP-05",
        "L0",
        "what is declared runs",
        "Every value and corner a backend declares is accepted: the call returns.",
        "dense",
        _BY_CHECK,
    ),
    Obligation(
        "CAP-06",
        "L0",
        "what is not declared is refused",
        "A legal call outside the declared capabilities raises UnsupportedError, naming the argument that decides; it "
        "never computes and never fails otherwise.",
        "dense",
        _BY_CHECK,
    ),
    Obligation(
        "CAP-07",
        "L0",
        "launches are counted",
        "launches() maps driver:kernel@device to a count that never falls, and every decode with a query and a token "
        "launches at least one kernel of this backend (seen at every call of every level).",
        "dense",
        (1, 4, 8),
    ),
    Obligation(
        "MLA-01",
        "L1",
        "plain decode",
        "out = softmax(scale · q Kᵀ) V, where K is the whole cached row and V its first head_dim_v columns; out has "
        "q's dtype.",
        "dense",
        (6, 36, 400),
    ),
    Obligation(
        "MLA-02",
        "L1",
        "softmax scale",
        "softmax_scale multiplies the scores; it defaults to d ** -0.5, with d the whole row.",
    ),
    Obligation(
        "MLA-03",
        "L1",
        "natural logarithm",
        "lse is float32 [b, h_q, s_q]: the natural logarithm of the sum of exponentials of the scaled scores.",
    ),
    Obligation(
        "MLA-04",
        "L1",
        "V is the head of K",
        "V is the first head_dim_v columns of the row, for every declared d and head_dim_v.",
    ),
    Obligation(
        "MLA-05",
        "L1",
        "grouped heads",
        "Query head h attends KV head h // (h_q / h_kv).",
        "several_kv_heads",
    ),
    Obligation(
        "MLA-06",
        "L1",
        "paged cache",
        "Token t of sequence j is row t % page_size of page block_table[j, t // page_size], whatever the order of "
        "pages, for every declared page size.",
    ),
    Obligation(
        "MLA-07",
        "L1",
        "causal alignment for s_q > 1",
        "With causal, query i of s_q sees positions up to and including cache_seqlens - s_q + i.",
        "causal",
    ),
    Obligation(
        "MLA-08",
        "L1",
        "several queries",
        "Without causal, each of the s_q queries attends the whole sequence, independently of the others.",
        "several_queries",
    ),
    Obligation(
        "MLA-09",
        "L1",
        "lengths differ",
        "Every sequence has its own length; none sees more or fewer keys because of another.",
    ),
    Obligation(
        "MLA-10",
        "L1",
        "plans",
        "A plan changes no result beyond the limits and serves every layer with the same lengths and sizes.",
        cases=_FEW,
    ),
    Obligation(
        "MLA-11",
        "L1",
        "out=",
        "A given out is written whole and returned; memory around out and lse and all inputs keep their bits.",
        cases=_FEW,
    ),
    Obligation(
        "MLA-12",
        "L1",
        "any number of heads",
        "Every declared h_q works, a multiple of a tile or not; head h of out belongs to head h of q.",
    ),
    Obligation(
        "MLA-13",
        "L1",
        "calls leave nothing behind",
        "The result of a call does not depend on the calls before it, whatever their sizes, dtypes and options.",
        cases=_FEW,
    ),
    Obligation(
        "MLA-20",
        "L2",
        "empty sequences",
        "cache_seqlens 0 is legal: out is 0 and lse +inf, and the other sequences are as without it.",
    ),
    Obligation(
        "MLA-21",
        "L2",
        "queries before the first key",
        "With causal and s_q > cache_seqlens, the queries that see no key give out 0 and lse +inf.",
        "causal",
    ),
    Obligation(
        "MLA-22",
        "L2",
        "the tail of the last page",
        "Rows of the last page past cache_seqlens are never read into a result; they may hold NaN, inf or anything.",
        cases=(6, 36, 300),
    ),
    Obligation(
        "MLA-23",
        "L2",
        "page boundaries",
        "Lengths 1, page - 1, page, page + 1 and whole multiples are as any other.",
        cases=(6, 36, 300),
    ),
    Obligation(
        "MLA-24",
        "L2",
        "garbage table entries",
        "Table entries past the last used page may hold any 32-bit integer and are not followed.",
    ),
    Obligation(
        "MLA-25",
        "L2",
        "shared pages",
        "A page may belong to several sequences, or to one of them twice.",
    ),
    Obligation(
        "MLA-26",
        "L2",
        "strided queries",
        "q may have any strides with a last one of 1: padded rows, swapped dimensions, odd row sizes.",
    ),
    Obligation(
        "MLA-27",
        "L2",
        "strided cache",
        "kv_cache may have any strides with a last one of 1: padded rows, tokens or blocks, heads before tokens.",
    ),
    Obligation(
        "MLA-28",
        "L2",
        "strided out and tables",
        "out and block_table may have padded rows; out also swapped dimensions. Nothing between rows is written.",
    ),
    Obligation(
        "MLA-29",
        "L2",
        "underflow",
        "Scores hundreds or thousands apart or far below zero: the softmax is taken relative to the row's maximum.",
        cases=(6, 24, 200),
    ),
    Obligation(
        "MLA-30",
        "L2",
        "equal logits",
        "Where all logits are equal, out is the mean of V and lse is the logit plus ln(n).",
        cases=_FEW,
    ),
    Obligation(
        "MLA-31",
        "L2",
        "large numbers",
        "Finite data far outside ±1, whose exact result is finite, give that result: no inf, no NaN.",
        cases=(6, 24, 200),
    ),
    Obligation(
        "MLA-32",
        "L2",
        "any finite scale",
        "softmax_scale may be any finite number, zero and negative ones included.",
        cases=_FEW,
    ),
    Obligation(
        "MLA-33",
        "L2",
        "one long among many short",
        "However the lengths are distributed, every token of every sequence counts.",
        cases=(2, 6, 40),
    ),
    Obligation(
        "MLA-34",
        "L2",
        "ragged queries",
        "With cu_seqlens_q, sequence j owns rows cu_seqlens_q[j] to cu_seqlens_q[j + 1], none included; lse is "
        "[h_q, total_q].",
        "ragged_q",
        (6, 36, 300),
    ),
    Obligation(
        "MLA-35",
        "L2",
        "base-2 logarithm",
        'With lse_base "2", lse is the base-2 logarithm of the same sum; out does not change.',
        "lse_base_2",
    ),
    Obligation(
        "MLA-36",
        "L2",
        "batch invariance",
        "With batch_invariant, the bits of a row do not depend on the other sequences, their order, a plan or threads.",
        "batch_invariant",
        (4, 16, 100),
    ),
    Obligation(
        "MLA-37",
        "L2",
        "the same call again",
        "Repeating a call gives a right result every time, and with batch_invariant the same bits every time.",
        "dense",
        (2, 3, 20),
        120.0,
    ),
    Obligation(
        "MLA-38",
        "L2",
        "nothing to do",
        "A batch of none, no queries and no cache pages in use are legal calls with results of those shapes.",
        cases=_BY_CHECK,
    ),
    Obligation(
        "MLA-39",
        "L2",
        "stale plans",
        "A plan used with other lengths, sizes or options is refused with SpecError.",
        cases=_BY_CHECK,
    ),
    Obligation(
        "MLA-40",
        "L2",
        "indices out of range",
        "A table entry or length in use that is out of range is never read through: SpecError or DeviceError, or a "
        "result without that memory; the process lives and the next call is right.",
        cases=(4, 8, 40),
    ),
    Obligation(
        "MLA-41",
        "L2",
        "order of heads and sequences",
        "Permuting query heads within a group, or sequences of a batch, permutes the result and changes nothing else.",
    ),
    Obligation(
        "MLA-42",
        "L2",
        "order of pages in memory",
        "Moving pages to other places of the cache, with the table following, changes nothing.",
    ),
    Obligation(
        "MLA-43",
        "L2",
        "split context",
        "Decoding parts of a sequence and merging them with mla_merge gives the whole.",
    ),
    Obligation(
        "MLA-44",
        "L2",
        "any legal call",
        "Any combination of sizes, options and layouts within the declared capabilities; found cases are shrunk.",
        "dense",
        (1, 3, 40),
        300.0,
    ),
    Obligation(
        "MLA-45",
        "L2",
        "the published sweep",
        "The shapes of the published FlashMLA test (b 1, 2, 6, 64; s_q 1, 2, 4; s_k 20, 140, 4096; h_q 1 to 128; h_kv "
        "1, 2, 3, 8; varlen; causal; zero lengths), as far as declared.",
        "dense",
        (2, 16, 2336),
        600.0,
    ),
    Obligation(
        "SPA-01",
        "L3",
        "sparse decode",
        "indices [b, s_q, topk] choose the tokens a query attends; -1 is a hole.",
        "sparse",
        covered=False,
    ),
    Obligation(
        "FP8-01",
        "L3",
        "packed FP8 cache, v32",
        "kv_format v32: 512 float8_e4m3, 4 float32 scales and 64 bf16 a token.",
        "kv_v32",
        covered=False,
    ),
    Obligation(
        "FP8-02",
        "L3",
        "packed FP8 cache, model1",
        "kv_format model1: page-major 448 float8_e4m3 and 64 bf16 a token, then UE8M0 scales.",
        "kv_model1",
        covered=False,
    ),
    Obligation(
        "SNK-01",
        "L3",
        "attention sink",
        "attn_sink scales out by exp(lse) / (exp(lse) + exp(sink)) and leaves lse alone.",
        "attn_sink",
        covered=False,
    ),
    Obligation(
        "XTR-01",
        "L3",
        "extra cache",
        "extra_kv_cache adds the tokens of extra_indices to what a query attends.",
        "extra_kv_cache",
        covered=False,
    ),
    Obligation(
        "EPN-01",
        "E1",
        "normal mode",
        "dispatch sends every token to the ranks of its experts, each rank once; combine sums what comes back.",
        "ep_normal",
        covered=False,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-01",
        "E2",
        "low-latency mode",
        "low_latency_dispatch packs tokens by local expert; low_latency_combine sums them weighted.",
        "ep_low_latency",
        covered=False,
        needs="EpBuffer",
    ),
)

OBLIGATIONS: Final = tuple(o for o in TABLE if not o.needs or o.needs in hal.__all__)
"""The obligations of the HAL that is installed."""

BY_ID: Final = {o.id: o for o in OBLIGATIONS}
LEVEL_IDS: Final = tuple(level.id for level in LEVELS)


def of_level(level: str) -> list[Obligation]:
    """The obligations of a level, in order."""
    return [o for o in OBLIGATIONS if o.level == level]
