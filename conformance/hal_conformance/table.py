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
    Level("E1", "EP normal mode", "L0"),
    Level("E2", "EP low-latency mode and hooks", "E1"),
    Level("E3", "EP across nodes and under faults", "E2"),
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
_STARTING = 150.0
"""The first case of several processes starts them, on a machine that may be busy; what a case does is timed apart."""

TABLE: Final = (
    Obligation(
        "CAP-01",
        "L0",
        "discovered and loadable",
        "One installed distribution registers the name in the group hal.backends; its plugin imports and its hook "
        "returns one Backend without touching a device, and leaves the settings of its process alone.",
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
        "and are the same at every asking. They declare at least one operation, no set of it empty and at least one "
        "call in it, and what is asked for by default: the natural logarithm; of expert parallelism a group on one "
        "node, the overflow policy error, in the normal mode a row per token and rank, and a dtype that can be summed.",
        "nothing",
        (1, 1, 1),
        gate=True,
    ),
    Obligation(
        "CAP-05",
        "L0",
        "what is declared runs",
        "Every value and corner a backend declares is accepted: the call returns. (What it computes: MLA-47.)",
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
        "out and lse are written whole where they were given, and returned; memory around them and all inputs keep "
        "their bits.",
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
        "The result of a call does not depend on the calls before it, whatever their sizes, dtypes and options. A call "
        "writes nothing once it has returned, and leaves what its process shares as it was: torch's defaults, "
        "generators of random numbers, denormal numbers, the working directory (seen at every call of every level).",
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
        "q may have any strides with a last one of 1 (padded rows, swapped dimensions, odd row sizes), and begin at "
        "any element of memory.",
    ),
    Obligation(
        "MLA-27",
        "L2",
        "strided cache",
        "kv_cache may have any strides with a last one of 1 (padded rows, tokens or blocks, heads before tokens), and "
        "begin at any element of memory.",
    ),
    Obligation(
        "MLA-28",
        "L2",
        "strided out and tables",
        "out and block_table may have padded rows; out also swapped dimensions. These and cache_seqlens may begin at "
        "any element. Nothing between rows is written.",
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
        "MLA-46",
        "L2",
        "every pair of values",
        "Any two legal values work together, not only each alone: of dtype, head_dim and head_dim_v, h_q, h_kv, "
        "page_size, s_q, causal, ragged, the views of every tensor and where they begin, the batch, lse_base, "
        "batch_invariant and a plan.",
        cases=_BY_CHECK,
    ),
    Obligation(
        "MLA-47",
        "L2",
        "what is declared is right",
        "Every value and corner a backend declares gives the reference's result: the calls of CAP-05, compared.",
        cases=_BY_CHECK,
    ),
    Obligation(
        "MLA-48",
        "L2",
        "large caches",
        "A cache may have more than 2^31 elements, and more than 2^32: every page of it is as any other. (Little of it "
        "is used, so that on the host it takes address space and no memory. Where a device has no room for it, the "
        "report says that it was not tried.)",
        cases=(2, 6, 12),
    ),
    Obligation(
        "MLA-49",
        "L2",
        "memory as it is",
        "A call reads its tensors as they are when it is made, however they were changed since the last one: through "
        "other views, .data or numpy, which torch's version counter does not count.",
        cases=(2, 6, 40),
    ),
    Obligation(
        "MLA-50",
        "L2",
        "whatever is set",
        "A call is right under torch.inference_mode and torch.no_grad, with any default dtype and device of torch, and "
        "any number of its threads.",
        cases=_BY_CHECK,
    ),
    Obligation(
        "MLA-51",
        "L2",
        "two threads",
        "Calls that two threads make at once, each with tensors and plans of its own, are right, side by side or one "
        "after the other.",
        cases=(2, 6, 40),
        timeout=120.0,
    ),
    Obligation(
        "MLA-52",
        "L2",
        "rows apart",
        "NaN or inf among the keys of a sequence, or in the query of a head, reach no other row.",
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
        "rows, routes and order",
        "dispatch sends a token to the ranks of its experts, once to each however many live there; rows lie by "
        "source rank, then source position; recv_topk_idx holds local ids, -1 elsewhere, and weights travel along. "
        "Every call is counted in launches().",
        "ep_normal",
        (4, 24, 160),
        _STARTING,
        gate=True,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-02",
        "E1",
        "skewed routing",
        "All tokens to one expert or one rank, none to a rank, or most to a few: the same rules.",
        "ep_normal",
        (4, 24, 120),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-03",
        "E1",
        "duplicates and holes",
        "An expert chosen twice counts once, for its rank and its count; -1 is no expert, and a token without any "
        "goes nowhere and comes back as its bias, or 0.",
        "ep_normal",
        (4, 24, 120),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-04",
        "E1",
        "no tokens",
        "A rank may send nothing, or receive nothing; all may at once.",
        "ep_normal",
        (4, 18, 80),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-05",
        "E1",
        "any sizes",
        "Any hidden whose row is a multiple of 16 bytes, any top-k, expert and rank count works, whether or not one "
        "divides the other; expert e lives on rank e // ceil(E / R).",
        "ep_normal",
        (6, 30, 240),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-06",
        "E1",
        "alignment and worst case",
        "num_recv_tokens_per_expert is rounded up to expert_alignment, 0 to 0; with num_worst_tokens there are "
        "exactly that many rows, -1 in recv_topk_idx past the received ones, and no counts.",
        "ep_normal",
        (4, 24, 80),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-07",
        "E1",
        "expand layout",
        "With expand there is a row for every token and local expert, grouped by expert, a group padded with zero "
        "rows and -1 to the alignment; its weight is the sum of the token's weights for that expert.",
        "ep_expand",
        (4, 30, 120),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-08",
        "E1",
        "FP8 rows with scales",
        "FP8 rows travel with their scales, float32 or packed int32, bit for bit.",
        "ep_fp8",
        (4, 18, 80),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-09",
        "E1",
        "element types",
        "Rows of every declared dtype are moved bit for bit, and summed in float32.",
        "ep_normal",
        (4, 18, 80),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-10",
        "E1",
        "a fixed order of summation",
        "combine adds in float32 in the order in which ranks (in the expand layout experts) first appear in the "
        "token's top-k, and rounds once.",
        "ep_normal",
        (4, 24, 160),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-11",
        "E1",
        "bias and weights",
        "combine is unweighted; it starts from the bias, the second added to the first; weights sent back are summed "
        "per choice. A weight where no expert is chosen is nobody's.",
        "ep_normal",
        (4, 18, 120),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-12",
        "E1",
        "conservation",
        "Rows sent back as they came are the token times the number of its ranks; over all ranks rows and counts are "
        "what was chosen.",
        "ep_normal",
        (4, 18, 80),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-13",
        "E1",
        "layout",
        "layout counts tokens per rank and per expert and tells which token goes to which rank, as dispatch then does.",
        "ep_normal",
        (2, 12, 40),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-14",
        "E1",
        "strided inputs",
        "Tensors may begin at any element, and rows, of biases too, be any number of elements apart, of x even 0; "
        "what lies between them is not read.",
        "ep_normal",
        (2, 9, 40),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-15",
        "E1",
        "unlike calls",
        "The result of a call does not depend on the calls before it, whatever their tokens, choices (up to the "
        "buffer's topk), weights, layouts and dtypes, nor on num_sms, which each rank may set as it likes.",
        "ep_normal",
        (2, 12, 60),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-16",
        "E1",
        "several buffers, some of the ranks",
        "Buffers of other sizes may be open and used in turn. A buffer's group may be some of the program's ranks: its "
        "ranks are numbered within it.",
        "ep_normal",
        (2, 6, 24),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-17",
        "E1",
        "what a handle tells",
        "A handle tells where each row came from (recv_src_rank, recv_src_position, recv_src_choice; -1 for padding "
        "and rows that never came), and how many tokens came and went (recv_counts, sent_counts); a cached one too. "
        "Dropped tokens were sent, and did not come.",
        "ep_normal",
        (4, 18, 60),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-19",
        "E1",
        "whatever is set",
        "torch's defaults, gradient modes and threads, as they are while a buffer opens and calls are made, change no "
        "result.",
        "ep_normal",
        _BY_CHECK,
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-20",
        "E1",
        "cached handles",
        "A dispatch with a handle sends other rows over the same routes, whatever was dispatched in between; every "
        "handle combines its own dispatch.",
        "ep_cached",
        (4, 18, 80),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-21",
        "E1",
        "backward",
        "The gradient of combine is a dispatch with its handle, the gradient of dispatch a combine.",
        "ep_cached",
        (2, 9, 40),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-22",
        "E1",
        "identical bits",
        "The same calls give the same bits every time, in whatever order ranks arrive.",
        "ep_normal",
        (1, 4, 30),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-23",
        "E1",
        "previous events",
        "Rows are read only after previous_event was waited for.",
        "ep_normal",
        (2, 12, 40),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-24",
        "E1",
        "asynchronous calls",
        "With async_finish results are complete once their event was waited for; several calls may be under way and "
        "be waited for in any order, on any thread.",
        "ep_async",
        (2, 12, 60),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-25",
        "E1",
        "results stay",
        "What a call returned keeps its bits through later calls and after close; handles stay valid, 60 of one buffer "
        "too.",
        "ep_normal",
        (2, 9, 40),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-26",
        "E1",
        "receive hook",
        "With return_recv_hook results are complete once the hook has run, also where another rank is late.",
        "ep_hook",
        (1, 3, 20),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-27",
        "E1",
        "overflow: error",
        "More rows than max_recv_tokens raise the same SpecError on all ranks at once; the next call works.",
        "ep_normal",
        (2, 9, 40),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-28",
        "E1",
        "overflow: drop",
        "With overflow drop the rows that come last, by source rank and position, are left out and counted; sums and "
        "cached dispatches go without them.",
        "ep_drop",
        (2, 18, 80),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-29",
        "E1",
        "overflow: grow",
        "With overflow grow a call that needs more room gets it; results of before stay.",
        "ep_grow",
        (2, 9, 40),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-30",
        "E1",
        "wrong calls",
        "A wrong call on one rank, calls that differ between ranks, and a handle of another dispatch raise the same "
        "SpecError, naming the argument, on all ranks at once; the next call is right.",
        "ep_normal",
        (2, 12, 40),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-31",
        "E1",
        "foreign handles",
        "A handle of another or a closed buffer is refused with SpecError on all ranks.",
        "ep_normal",
        (2, 6, 20),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-32",
        "E1",
        "buffers that differ",
        "Arguments of a buffer that are wrong or differ between ranks raise the same SpecError on all of them; a "
        "later buffer works.",
        "ep_normal",
        (2, 9, 20),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-33",
        "E1",
        "undeclared sizes and policies",
        "A legal buffer outside the declared dtypes, sizes, modes and policies raises UnsupportedError on every rank; "
        "a later buffer works.",
        "ep_normal",
        _BY_CHECK,
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPN-34",
        "E1",
        "every pair of values",
        "Any two legal values work together, not only each alone: of ranks, experts of a rank, top-k and the buffer's, "
        "dtype, columns, tokens, room, routing, padded rows, scales, data, weights, layout, expert_alignment, "
        "num_worst_tokens, bias, handle, how a call ends, and overflow; layout agrees. "
        "What a call was given may be used for something else once it returned.",
        "ep_normal",
        _BY_CHECK,
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-01",
        "E2",
        "packing",
        "low_latency_dispatch gives every local expert its rows from 0 on, by source rank, then source position; "
        "recv_count, src_info and layout_range tell how many, from where.",
        "ep_low_latency",
        (4, 24, 160),
        _STARTING,
        gate=True,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-02",
        "E2",
        "skew, holes, nothing",
        "Every slot in use, one expert chosen twice (one row), holes, ranks without tokens, none at all: the same "
        "rules.",
        "ep_low_latency",
        (6, 24, 128),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-03",
        "E2",
        "FP8 cast",
        "The scale of 128 columns is amax / 448, amax at least 1e-4; values are multiplied by 448 / amax and rounded "
        "to float8_e4m3.",
        "ep_cast_fp8",
        (4, 18, 120),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-04",
        "E2",
        "power-of-two scales",
        "With round_scale scales are rounded up to powers of two, exact ones staying as they are.",
        "ep_cast_pow2",
        (4, 18, 120),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-05",
        "E2",
        "UE8M0 scales",
        "With use_ue8m0 the exponents of the same scales come packed, four a little-endian int32.",
        "ep_cast_ue8m0",
        (4, 18, 120),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-06",
        "E2",
        "weighted sums",
        "low_latency_combine sums rows times weights in float32 in top-k order, product and sum rounded apart, an "
        "expert chosen twice taken twice, and none chosen not at all, whatever its weight; a given out is written and "
        "returned.",
        "ep_low_latency",
        (6, 27, 180),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-07",
        "E2",
        "any sizes",
        "Any hidden, dtype, top-k, expert and rank count works in this mode too.",
        "ep_low_latency",
        (6, 24, 160),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-08",
        "E2",
        "zero copy",
        "With zero_copy rows are taken from the memory low_latency_combine_buffer lent, each live result its own: the "
        "same until that combine, before the hook too; then other.",
        "ep_zero_copy",
        (2, 12, 40),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-09",
        "E2",
        "hooks defer",
        "With return_recv_hook a call returns without waiting for any rank, and writes nothing the caller gave it "
        "until the hook runs.",
        "ep_ll_hook",
        (1, 3, 20),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-10",
        "E2",
        "hooks block nobody",
        "A rank that runs its hook late, on whatever thread, keeps no other rank from receiving.",
        "ep_ll_hook",
        (1, 3, 20),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-11",
        "E2",
        "two live results",
        "Two results may be live, combined in any order; a third is refused on all ranks; a result let go is no "
        "longer live. A live result keeps its bits whatever becomes of the other, and sums keep theirs.",
        "ep_low_latency",
        (2, 9, 40),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-12",
        "E2",
        "receive statistics",
        "Received counts and microseconds waited for each rank, in dispatch and in combine, are added to what the "
        "caller gave, once; of a call with a hook or an event, what that waits and not what was computed before.",
        "ep_low_latency",
        (1, 3, 20),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-13",
        "E2",
        "identical bits",
        "The same calls give the same bits every time, in whatever order ranks arrive.",
        "ep_low_latency",
        (1, 4, 30),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-14",
        "E2",
        "asynchronous calls",
        "With async_finish results are complete once their event was waited for.",
        "ep_ll_async",
        (2, 9, 40),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-15",
        "E2",
        "wrong calls",
        "A wrong call on one rank, or calls that differ, raise the same SpecError on all ranks at once; the next "
        "call is right.",
        "ep_low_latency",
        (2, 12, 40),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-16",
        "E2",
        "both modes",
        "Calls of both modes follow each other on one buffer.",
        "ep_both",
        (2, 9, 40),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-17",
        "E2",
        "conservation",
        "Rows sent back as they came, weighted to a power of two, are the token; counts over all ranks are what was "
        "chosen.",
        "ep_no_cast",
        (2, 12, 60),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-18",
        "E2",
        "unlike calls",
        "The result of a call does not depend on the calls before it, whatever their tokens, choices and casts, nor on "
        "results that were let go before their hook ran, nor on num_sms; rows may be padded in memory.",
        "ep_low_latency",
        (2, 12, 60),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-19",
        "E2",
        "every pair of values",
        "Any two legal values work together, not only each alone: of ranks, experts of a rank, top-k and the buffer's, "
        "dtype, columns, tokens, room, routing, padded rows, cast, data, weights, how a call ends, zero_copy, out and "
        "statistics. What a dispatch was given, and x of a combine, may be used for something else once it returned "
        "a hook.",
        "ep_low_latency",
        _BY_CHECK,
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-20",
        "E2",
        "several buffers, some of the ranks",
        "Buffers of the same and of other sizes may be open and used in turn, each with two live results and memory it "
        "lent. A buffer's group may be some of the program's ranks.",
        "ep_low_latency",
        (2, 6, 24),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-21",
        "E2",
        "handles used again",
        "A handle may be combined again until a later dispatch has taken its memory; from then on it is refused with "
        "SpecError on all ranks, or still right. Live results stay as they are, and are two at most.",
        "ep_low_latency",
        (2, 6, 24),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-22",
        "E2",
        "results stay",
        "A live result, its handle and sums keep their bits after close, whatever a later buffer receives.",
        "ep_low_latency",
        (1, 4, 20),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-23",
        "E2",
        "strided inputs",
        "Tensors may begin at any element, and their rows, of out too, be any number of elements apart, of x even 0; "
        "what lies between them is neither read nor written.",
        "ep_low_latency",
        (2, 9, 40),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPL-24",
        "E2",
        "whatever is set",
        "torch's defaults, gradient modes and threads, as they are while a buffer opens and calls are made, change no "
        "result.",
        "ep_low_latency",
        _BY_CHECK,
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPX-01",
        "E3",
        "nodes are invisible",
        "A group over several nodes gives the bits of one node; layout counts a token once for a node.",
        "ep_nodes",
        (2, 8, 60),
        _STARTING,
        gate=True,
        needs="EpBuffer",
    ),
    Obligation(
        "EPX-02",
        "E3",
        "pre-reduced sums",
        "With pre_reduce the rows of a node are summed in top-k order from 0, and node sums are added in the order "
        "in which nodes first appear in the top-k, whether or not a row was dropped.",
        "ep_pre_reduce",
        (4, 12, 60),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPX-03",
        "E3",
        "wrong calls across nodes",
        "A wrong call on a rank of one node raises the same SpecError on all nodes; the next call is right; in either "
        "mode.",
        "ep_any_nodes",
        (1, 3, 10),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPX-04",
        "E3",
        "every pair of values across nodes",
        "What holds for pairs of values in the normal mode holds over several nodes too, with ranks of a node and "
        "pre_reduce among the values.",
        "ep_nodes",
        _BY_CHECK,
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPX-05",
        "E3",
        "every pair of values across nodes, low-latency mode",
        "What holds for pairs of values in the low-latency mode holds over several nodes too.",
        "ep_ll_nodes",
        _BY_CHECK,
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPX-06",
        "E3",
        "whatever is set, across nodes",
        "torch's defaults, gradient modes and threads, as they are while calls are made, change no result of the "
        "low-latency mode over several nodes either.",
        "ep_ll_nodes",
        _BY_CHECK,
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPX-10",
        "E3",
        "a killed rank",
        "When a rank is killed, between calls or in one, every other rank raises a RankFailure that names it and "
        "what was under way, within the timeout, and again at every later call; in either mode.",
        "ep_any",
        (2, 6, 60),
        240.0,
        needs="EpBuffer",
    ),
    Obligation(
        "EPX-11",
        "E3",
        "a stopped rank",
        "A rank that lives and does not answer is named within the timeout, by hooks that wait for it too.",
        "ep_any",
        (1, 4, 20),
        240.0,
        needs="EpBuffer",
    ),
    Obligation(
        "EPX-12",
        "E3",
        "a slow rank",
        "A rank that is late by less than the timeout is waited for. If all are idle for longer, or a hook runs later, "
        "that is no failure.",
        "ep_any",
        (1, 2, 10),
        240.0,
        needs="EpBuffer",
    ),
    Obligation(
        "EPX-13",
        "E3",
        "a rank that leaves",
        "A rank that closes its buffer while others call is named.",
        "ep_any",
        (1, 2, 10),
        240.0,
        needs="EpBuffer",
    ),
    Obligation(
        "EPX-14",
        "E3",
        "masked ranks",
        "With mask_ranks the others carry on without dead, stopped or masked ranks, as if these had sent nothing and "
        "received nothing; the call under way does not raise, whichever it is.",
        "ep_mask",
        (2, 4, 20),
        240.0,
        needs="EpBuffer",
    ),
    Obligation(
        "EPX-15",
        "E3",
        "a rank killed on another node",
        "It is named on all nodes, by its number in the whole group, in either mode.",
        "ep_any_nodes",
        (1, 4, 20),
        240.0,
        needs="EpBuffer",
    ),
    Obligation(
        "EPX-16",
        "E3",
        "nothing left behind",
        "Once the ranks are gone, however they ended, no memory with a name is left.",
        "ep_any",
        (2, 4, 20),
        240.0,
        needs="EpBuffer",
    ),
    Obligation(
        "EPX-17",
        "E3",
        "a later buffer",
        "After a failure all ranks outlived, and after refused calls, a later buffer of the same group works.",
        "ep_any",
        (1, 2, 10),
        240.0,
        needs="EpBuffer",
    ),
    Obligation(
        "EPX-18",
        "E3",
        "masked ranks and every option",
        "Without several ranks a dispatch has the same layouts, alignment, scales, casts, fixed numbers of rows and "
        "handles that tell; low-latency calls end, count, write and take lent memory as ever. A handle of before is "
        "combined, and dispatched by again, as if the masked ranks had sent nothing and gave nothing back.",
        "ep_mask",
        (1, 4, 20),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPX-19",
        "E3",
        "masks that are lifted",
        "A rank whose mask was lifted takes part from the next call on, whether or not calls were made meanwhile that "
        "it made too, without those that had masked it.",
        "ep_mask",
        (1, 4, 20),
        _STARTING,
        needs="EpBuffer",
    ),
    Obligation(
        "EPX-20",
        "E3",
        "masked ranks of other nodes",
        "The others carry on without dead or masked ranks over several nodes too, wherever those are.",
        "ep_mask_nodes",
        (1, 4, 20),
        240.0,
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
